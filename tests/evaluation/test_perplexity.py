import math

import pytest
import torch
from shared_models import CLASSES, TINY, tiny_ssdlm

from bd3lm_hf import TokenNLL
from bd3lm_hf.evaluation.perplexity import (
    PUBLISHED_BATCH,
    SequenceScore,
    batch_of,
    check_estimator,
    perplexity,
    published_noise,
    score_sequences,
    scored_token_ids,
    sequence_losses,
    summarize,
    summarize_losses,
    unigram_perplexity,
)
from bd3lm_hf.modeling.noise_bd3lm import stratify


class ConstantModel:
    """Gives every token but padding the same loss; its only method is `token_nll`."""

    def __init__(self, nll: float) -> None:
        self.nll = nll

    def token_nll(self, input_ids, attention_mask, *, estimator, num_samples, generator=None, labels=None):
        mask = attention_mask.float() if labels is None else (labels != -100).float()
        return TokenNLL(self.nll * mask, mask)


@pytest.fixture
def sequences() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 47, (length,), generator=generator).tolist() for length in (32, 32, 21, 32, 9, 32, 30)]


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary():
    result = perplexity(ConstantModel(math.log(50)), [[1, 2, 3], [4]])
    assert result.perplexity == pytest.approx(50)
    assert result.bits_per_token == pytest.approx(math.log2(50))
    assert result.bits_per_byte is None
    assert (result.num_tokens, result.num_sequences) == (4, 2)
    assert result.standard_error == pytest.approx(0)


def test_bits_per_byte_do_not_depend_on_the_tokenizer():
    coarse = perplexity(ConstantModel(2.0), [[1] * 10], bytes_per_token=4.0)
    fine = perplexity(ConstantModel(1.0), [[1] * 20], bytes_per_token=2.0)
    assert coarse.bits_per_byte == pytest.approx(fine.bits_per_byte)
    assert coarse.bits_per_byte == pytest.approx(2.0 / math.log(2) / 4)


@pytest.mark.parametrize("estimator", ["sampled", "stratified", "exact", "published"])
def test_the_batch_size_changes_only_rounding(tiny_model, sequences, estimator):
    options = {"estimator": estimator, "seed": 3}
    results = [score_sequences(tiny_model, sequences, batch_size=size, **options) for size in (1, 3, 7)]
    for result in results[1:]:
        assert [score.row for score in result] == [score.row for score in results[0]]
        assert [score.num_tokens for score in result] == [score.num_tokens for score in results[0]]
        scores = (torch.tensor([score.nll for score in scored]) for scored in (result, results[0]))
        torch.testing.assert_close(*scores, rtol=1e-5, atol=1e-4)


def test_published_times_are_assigned_to_a_batch_in_order():
    noise = published_noise(range(40), 40, num_blocks=3, length=12, seed=5)
    positions = torch.randperm(40, generator=torch.Generator().manual_seed(5))
    for first, size in ((0, 16), (16, 16), (32, 8)):
        times = noise.block_noise[positions[first : first + size]]
        stratum = (times * size * 3).floor()
        assert stratum.tolist() == torch.arange(size * 3).view(size, 3).tolist()
        # The same as the published deal of the same draws.
        uniform = times * size * 3 - stratum
        torch.testing.assert_close(stratify(uniform, order="published"), times, rtol=0, atol=1e-6)
    assert noise.token_noise.shape == (40, 12) and noise.token_noise.min() >= 0 and noise.token_noise.max() < 1


def test_the_published_estimate_is_the_evaluation_loss_at_its_noise(tiny_model, sequences):
    rows = [sequence for sequence in sequences if len(sequence) == 32] * 5
    assert len(rows) > PUBLISHED_BATCH
    result = perplexity(tiny_model, rows, estimator="published", seed=2)
    noise = published_noise(range(len(rows)), len(rows), num_blocks=8, length=32, seed=2)
    ids = torch.tensor(rows)
    with torch.no_grad():
        loss = tiny_model(input_ids=ids, labels=ids, **noise._asdict()).loss
    assert result.nll == pytest.approx(loss.item(), rel=1e-5)
    assert result.num_tokens == 31 * len(rows)


def test_the_first_token_is_never_scored_by_the_published_protocol(tiny_model, sequences):
    expected = perplexity(tiny_model, sequences, estimator="published")
    tiny_model.config.ignore_bos = False
    assert perplexity(tiny_model, sequences, estimator="published")[:6] == expected[:6]
    assert perplexity(tiny_model, sequences, estimator="stratified").num_tokens == expected.num_tokens + len(sequences)


@pytest.mark.parametrize("family", ["mdlm", "sedd", "ar"])
def test_every_baseline_has_the_published_estimate_and_refuses_others_by_name(randomize, sequences, family):
    model_class, config_class = CLASSES[family]
    config = config_class(**{name: value for name, value in TINY.items() if name != "block_size"})
    model = randomize(model_class(config), std=0.02).eval()
    for estimator in ("published", "stratified", "sampled", "exact"):
        if estimator != "exact" or family == "ar":
            check_estimator(model, estimator)
            found = perplexity(model, sequences * 4, estimator=estimator)
            assert abs(found.nll - math.log(47)) < 4 * found.standard_error + 0.05
        else:
            with pytest.raises(ValueError, match="estimator='exact'"):
                check_estimator(model, estimator)


def test_an_estimator_is_refused_before_a_text_is_scored(tiny_model):
    tiny_model.config.block_size = 16
    passes = r"2\^16 - 1 forward passes; the limit is 8 scored tokens per block.*Use estimator='stratified'"
    for scorer, arguments, message in (
        (ConstantModel(1.0), ("published",), "'published' .*noise.* ConstantModel"),
        (tiny_model, ("published", 3), "estimator='published' is one draw|num_samples=3"),
        (tiny_model, ("exact",), passes),
    ):
        with pytest.raises(ValueError, match=message):
            check_estimator(scorer, *arguments)


def test_evaluation_restores_the_mode_and_the_random_state(tiny_model, sequences):
    tiny_model.train()
    state = torch.get_rng_state()
    perplexity(tiny_model, sequences[:2])
    assert tiny_model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_sequences_are_padded_on_the_right():
    batch = batch_of([[5, 6, 7], {"input_ids": [8]}])
    assert batch.input_ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.context == {}
    given = batch_of([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, [8]]).context["labels"]
    assert given.tolist() == [[-100, 6, 7], [8, -100, -100]]


def test_standard_error_is_that_of_a_ratio():
    scores = [SequenceScore(0, 2.0, 2), SequenceScore(1, 6.0, 2)]
    result = summarize([*scores, scores[0]])  # a sequence that two processes scored counts once
    assert result.nll == 2.0
    assert result.standard_error == pytest.approx(math.sqrt(2 * (2.0**2 + 2.0**2)) / 4)
    assert math.isnan(summarize(scores[:1]).standard_error)


def test_the_unigram_baseline_adds_one_to_every_count():
    # Counts 2, 1, 0 become 3/6, 2/6, 1/6.
    expected = math.exp(-(math.log(3 / 6) + math.log(1 / 6)) / 2)
    assert unigram_perplexity([0, 0, 1], torch.tensor([0, 2]), 3) == pytest.approx(expected)


def test_scored_tokens_are_those_that_the_model_counts(tiny_model, sequences):
    tokens = scored_token_ids(tiny_model, sequences, batch_size=3)
    assert len(tokens) == perplexity(tiny_model, sequences).num_tokens
    # The first token of each sequence is given.
    assert tokens.tolist() == [token for sequence in sequences for token in sequence[1:]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: perplexity(ConstantModel(1.0), []), "0 sequences have no scored token"),
        (lambda: perplexity(ConstantModel(1.0), [[1]], batch_size=0), "batch_size=0 must be at least 1"),
        (lambda: unigram_perplexity([0], [], 3), "eval_ids is empty"),
        (lambda: sequence_losses(tiny_ssdlm(), [[1] * 8], batch_size=0), "batch_size=0 must be at least 1"),
        (lambda: sequence_losses(tiny_ssdlm(), [[3, 4, 5, 6]]), "a text of 4 tokens .* block of 4"),
        (lambda: summarize_losses([]), "0 sequences have no scored token"),
    ],
)
def test_bad_input_is_refused_with_its_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.fixture
def ssdlm(randomize):
    return randomize(tiny_ssdlm(vocab_size=20, dropout=0.3)).train()


@pytest.fixture
def rows() -> list[dict[str, list[int]]]:
    """Texts of several lengths; the beginning of one is given."""
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(3, 19, (length,), generator=generator).tolist() for length in (16, 9, 16, 12, 7)]
    rows = [{"input_ids": ids, "labels": list(ids)} for ids in texts]
    rows[3]["labels"][:5] = [-100] * 5
    return rows


def test_batches_and_processes_change_nothing(ssdlm, rows):
    ssdlm.train()
    whole = sequence_losses(ssdlm, rows, num_samples=3, batch_size=2, seed=1)
    assert ssdlm.training  # restored; there was no dropout in between
    parts = [
        score
        for share in (range(0, 5, 2), range(1, 5, 2))
        for score in sequence_losses(ssdlm, rows, indices=share, num_samples=3, batch_size=8, seed=1)
    ]
    first, second = summarize_losses(whole), summarize_losses(parts + parts[:1])  # a repeated row counts once
    assert first.loss == pytest.approx(second.loss, rel=1e-6)
    assert (first.num_sequences, first.num_tokens) == (second.num_sequences, second.num_tokens) == (5, 55)
    assert summarize_losses(sequence_losses(ssdlm, rows, num_samples=3, seed=2)).loss != first.loss


def test_a_score_is_the_mean_loss_over_the_noise_samples(ssdlm, rows):
    (score,) = sequence_losses(ssdlm, rows[:1], num_samples=4000, batch_size=4000, seed=3)
    ssdlm.eval()
    ids = torch.tensor([rows[0]["input_ids"]]).expand(4000, -1)
    torch.manual_seed(0)
    with torch.no_grad():
        expected = ssdlm(input_ids=ids, labels=ids).loss.item()
    assert score.num_tokens == 16
    assert score.nll / score.num_tokens == pytest.approx(expected, rel=0.03)
