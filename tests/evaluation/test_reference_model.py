"""Reference models: the published windows and rules, any causal model, and invalid arguments."""

import json

import pytest
import torch
from generating import make_family
from published import GOLDEN, published_gpt2
from shared_models import tiny_bd3lm, tiny_gpt2, tiny_ssdlm
from transformers import BertConfig, BertForMaskedLM

from bd3lm_hf.evaluation.perplexity import summarize
from bd3lm_hf.evaluation.reference_model import (
    ReferenceModel,
    load_reference_model,
    sliding_windows,
)
from bd3lm_hf.generation.text_generation import GeneratedText


RECORDED = "08_gen_ppl"
SETTINGS = json.loads((GOLDEN / RECORDED / "config.json").read_text())


@pytest.fixture(scope="module")
def golden_judge() -> ReferenceModel:
    return ReferenceModel(published_gpt2(), unscored=[SETTINGS["eos_token_id"]])


@pytest.mark.parametrize("case", SETTINGS["cases"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_published_perplexity_is_reproduced(golden_judge, recorded, case, batch_size):
    rows = recorded[f"{case}.ids"].tolist()
    scores = golden_judge.score([GeneratedText(ids, 0) for ids in rows], batch_size=batch_size)
    result = summarize(scores)
    assert result.perplexity == pytest.approx(recorded[f"{case}.ppl"].item(), rel=1e-4)
    assert result.num_tokens == int(recorded[f"{case}.length"].item())
    for score, nlls, valid in zip(scores, recorded[f"{case}.nlls"], recorded[f"{case}.valid"], strict=True):
        assert score.num_tokens == int(valid.sum())
        assert score.nll == pytest.approx(float((nlls.double() * valid).sum()), rel=1e-4)


@pytest.mark.parametrize("length", [1, 3, 8, 9, 11, 12, 13, 30])
@pytest.mark.parametrize("window", [8, 7])
def test_each_token_is_scored_by_one_window(length, window):
    windows = sliding_windows(length, window)
    assert [at for begin, end, first in windows for at in range(max(first, begin), end)] == list(range(length))
    for begin, end, first in windows:
        assert end - begin <= window and (first == 0 or first - begin >= window // 2)


def test_a_model_scores_itself_exactly_up_to_blocks_of_8():
    assert ReferenceModel(tiny_bd3lm()).estimator == "exact"
    for fields, estimator in (({"block_size": 16}, "stratified"), ({"time_conditioning": True}, "sampled")):
        judge = ReferenceModel(tiny_bd3lm(**fields))
        assert (judge.estimator, judge.num_samples) == (estimator, 8)


def test_a_judge_of_another_vocabulary_reads_the_text(tiny_tokenizer):
    judge = ReferenceModel(tiny_gpt2(), retokenize=(tiny_tokenizer, tiny_tokenizer))
    ids = tiny_tokenizer("The lazy dog sleeps on.")["input_ids"]
    letters = [token for letter in "The lazy dog sleeps on." for token in tiny_tokenizer(letter)["input_ids"]]
    assert len(letters) > len(ids)
    given = tiny_tokenizer("A block")["input_ids"]
    texts = [GeneratedText([0, *given, *written], 1 + len(given)) for written in (ids, letters)]
    scores = judge.score(texts, seed=0, batch_size=2)
    assert scores[0].num_tokens == scores[1].num_tokens == len(ids)
    assert scores[0].nll == pytest.approx(scores[1].nll)


def test_special_tokens_of_both_tokenizers_are_kept_and_others_dropped(tiny_tokenizer):
    special = {"bos_token": "<bos>", "eos_token": "<eos>"}
    other = type(tiny_tokenizer)(tokenizer_object=tiny_tokenizer.backend_tokenizer, **special)
    judge = ReferenceModel(tiny_gpt2(), retokenize=(tiny_tokenizer, other))
    read = judge.read(GeneratedText([0, *tiny_tokenizer("The dog")["input_ids"], 1, 2, 0], 1))
    assert read == GeneratedText([0, *tiny_tokenizer("The dog")["input_ids"], 1, 0], 1)
    # A text that does not begin with the judge's begin token gets one.
    begun = judge.read(GeneratedText(tiny_tokenizer("The dog")["input_ids"], 0))
    assert begun[:2] == read._replace(ids=read.ids[:-2])[:2]


def test_our_autoregressive_model_scores_with_its_exact_likelihood():
    model = make_family("ar", model_length=32).float()
    judge = ReferenceModel(model)
    ids = torch.randint(3, 47, (50,), generator=torch.Generator().manual_seed(0)).tolist()
    assert judge.estimator == "exact" and judge.window == 32
    first, second, third = (model.token_nll(torch.tensor([ids[at : at + 32]])).nll[0] for at in (0, 16, 32))
    expected = first.sum() + second[16:].sum() + third[16:].sum()
    (score,) = judge.score([GeneratedText(ids, 0)])
    assert score.num_tokens == 49 and score.nll == pytest.approx(expected.item(), rel=1e-5)


def test_the_noise_of_an_estimated_bound_depends_on_the_index_of_the_text():
    judge = ReferenceModel(tiny_bd3lm(block_size=16))
    texts = [GeneratedText([0, *range(5 + shift, 25 + shift)], 1) for shift in range(3)]
    scores = judge.score(texts, seed=1, batch_size=3)
    (alone,) = judge.score(texts[2:], seed=1, indices=[2])
    assert alone.nll == pytest.approx(scores[2].nll, rel=1e-5)
    assert judge.score(texts[2:], seed=2, indices=[2])[0].nll != pytest.approx(scores[2].nll, rel=1e-5)


def test_a_model_that_cannot_be_a_judge_is_refused(tiny_tokenizer, tmp_path):
    with pytest.raises(ValueError, match="a SSDLMForMaskedLM has no likelihood"):
        ReferenceModel(tiny_ssdlm())
    bert = BertForMaskedLM(BertConfig(vocab_size=320, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    bert.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"--judge .*: a BertForMaskedLM does not predict next tokens"):
        load_reference_model(str(tmp_path), tiny_tokenizer, as_text=True, score_end=False)


def test_ids_and_windows_beyond_the_limits_of_a_judge_are_refused():
    with pytest.raises(ValueError, match="token id 320, .* 320 ids"):
        ReferenceModel(tiny_gpt2()).score([GeneratedText([0, 320], 1)])
    for window in (1, 65):
        with pytest.raises(ValueError, match=f"window={window}: .* from 2 to 64"):
            ReferenceModel(tiny_gpt2(), window=window)


def test_a_score_that_is_not_a_number_is_refused():
    judge = tiny_gpt2()
    judge.transformer.wte.weight.data[0] = torch.nan
    with pytest.raises(ValueError, match="text 0 as nan"):
        ReferenceModel(judge).score([GeneratedText([0, 5], 1)])


def test_a_text_without_a_token_to_score_counts_zero():
    assert ReferenceModel(tiny_gpt2(), unscored=[5]).score(
        [GeneratedText([0, 5, 5], 1), GeneratedText([4], 0), GeneratedText([], 0)]
    ) == [(0, 0.0, 0), (1, 0.0, 0), (2, 0.0, 0)]
