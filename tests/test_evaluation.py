import math
from typing import NamedTuple

import pytest
import torch

from bd3lm_hf.evaluation import (
    SequenceScore,
    batch_of,
    perplexity,
    score_sequences,
    scored_tokens,
    summarize,
    unigram_perplexity,
)
from bd3lm_hf.modeling.modeling_bd3lm import BD3LMForMaskedLM


class _TokenNLL(NamedTuple):
    nll: torch.Tensor
    mask: torch.Tensor


class ConstantModel:
    """Gives every token but padding the same loss; has nothing but the verb `token_nll`."""

    def __init__(self, nll: float) -> None:
        self.nll = nll

    def token_nll(self, input_ids, attention_mask, *, estimator, num_samples, generator=None, labels=None):
        mask = attention_mask.float() if labels is None else (labels != -100).float()
        return _TokenNLL(self.nll * mask, mask)


@pytest.fixture
def model(tiny_config, randomize) -> BD3LMForMaskedLM:
    return randomize(BD3LMForMaskedLM(tiny_config)).eval()


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


def test_a_fresh_model_is_uniform_over_all_but_the_mask(tiny_config, sequences):
    result = perplexity(BD3LMForMaskedLM(tiny_config), sequences, estimator="exact")
    assert result.perplexity == pytest.approx(47, rel=1e-5)


def test_bits_per_byte_do_not_depend_on_the_tokenizer():
    coarse = perplexity(ConstantModel(2.0), [[1] * 10], bytes_per_token=4.0)
    fine = perplexity(ConstantModel(1.0), [[1] * 20], bytes_per_token=2.0)
    assert coarse.bits_per_byte == pytest.approx(fine.bits_per_byte)
    assert coarse.bits_per_byte == pytest.approx(2.0 / math.log(2) / 4)


@pytest.mark.parametrize("estimator", ["sampled", "stratified", "exact"])
def test_the_batch_size_changes_rounding_only(model, sequences, estimator):
    results = [
        score_sequences(model, sequences, estimator=estimator, num_samples=2, batch_size=size, seed=3)
        for size in (1, 3, 7)
    ]
    for result in results[1:]:
        assert [score.row for score in result] == [score.row for score in results[0]]
        assert [score.num_tokens for score in result] == [score.num_tokens for score in results[0]]
        torch.testing.assert_close(
            torch.tensor([score.nll for score in result]),
            torch.tensor([score.nll for score in results[0]]),
            rtol=1e-5,
            atol=1e-4,
        )


def test_two_halves_give_the_same_as_the_whole(model, sequences):
    whole = perplexity(model, sequences, seed=1)
    halves = [score_sequences(model, sequences, indices=range(part, 7, 2), seed=1, batch_size=2) for part in (0, 1)]
    joined = summarize(halves[1] + halves[0])
    assert joined.nll == pytest.approx(whole.nll, rel=1e-6)
    assert joined.standard_error == pytest.approx(whole.standard_error, rel=1e-5)


def test_a_sequence_that_two_processes_scored_counts_once():
    scores = [SequenceScore(0, 2.0, 2), SequenceScore(1, 5.0, 2), SequenceScore(0, 2.0, 2)]
    assert summarize(scores).nll == pytest.approx(7 / 4)


def test_the_seed_decides_the_noise(model, sequences):
    first, again, other = (perplexity(model, sequences, seed=seed).nll for seed in (0, 0, 1))
    assert first == again != other


def test_estimates_agree_with_the_exact_bound_within_their_noise(model, sequences):
    exact = perplexity(model, sequences, estimator="exact")
    draws = torch.tensor([perplexity(model, sequences, num_samples=2, seed=seed).nll for seed in range(8)])
    error = draws.std().item() / math.sqrt(len(draws))
    assert abs(draws.mean().item() - exact.nll) < 4 * error + 1e-6


def test_evaluation_leaves_the_mode_and_the_random_state_alone(model, sequences):
    model.train()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    perplexity(model, sequences[:2])
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_padding_and_given_tokens_are_not_scored():
    rows = [
        {"input_ids": [5, 6, 7, 0], "attention_mask": [1, 1, 1, 0], "labels": [-100, 6, 7, -100]},
        {"input_ids": [5, 6], "attention_mask": [1, 1], "labels": [5, 6]},
    ]
    assert perplexity(ConstantModel(1.0), rows).num_tokens == 4
    plain = [{key: row[key] for key in ("input_ids", "attention_mask")} for row in rows]
    assert perplexity(ConstantModel(1.0), plain).num_tokens == 5


def test_sequences_are_padded_on_the_right():
    batch = batch_of([[5, 6, 7], {"input_ids": [8]}])
    assert batch.input_ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.context == {}


def test_standard_error_is_that_of_a_ratio():
    scores = [SequenceScore(0, 2.0, 2), SequenceScore(1, 6.0, 2)]
    result = summarize(scores)
    assert result.nll == 2.0
    assert result.standard_error == pytest.approx(math.sqrt(2 * (2.0**2 + 2.0**2)) / 4)
    assert math.isnan(summarize(scores[:1]).standard_error)


def test_the_unigram_baseline_adds_one_to_every_count():
    # Counts 2, 1, 0 become 3/6, 2/6, 1/6.
    expected = math.exp(-(math.log(3 / 6) + math.log(1 / 6)) / 2)
    assert unigram_perplexity([0, 0, 1], torch.tensor([0, 2]), 3) == pytest.approx(expected)


def test_the_unigram_baseline_of_uniform_text_is_the_vocabulary():
    assert unigram_perplexity(range(64), [3, 4, 5], 64) == pytest.approx(64)


def test_scored_tokens_are_those_that_the_model_counts(model, sequences):
    tokens = scored_tokens(model, sequences, batch_size=3)
    assert len(tokens) == perplexity(model, sequences).num_tokens
    # The first token of each sequence is given.
    assert tokens.tolist() == [token for sequence in sequences for token in sequence[1:]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: perplexity(ConstantModel(1.0), []), "0 sequences hold no scored token"),
        (lambda: perplexity(ConstantModel(1.0), [[1]], batch_size=0), "batch_size=0: give at least 1"),
        (lambda: unigram_perplexity([0], [], 3), "eval_ids is empty"),
        (lambda: unigram_perplexity([0], [3], 3), "token id 3 is outside the vocabulary of 3 ids"),
    ],
)
def test_bad_input_is_refused_with_its_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_sequence_of_one_given_token_has_no_perplexity(model):
    with pytest.raises(ValueError, match="1 sequences hold no scored token"):
        perplexity(model, [[5]])
