"""The modules for the `evaluate` library load by path, without network, and give the numbers of the package."""

import math
from pathlib import Path

import evaluate
import pytest
from published import load_recorded, published_gpt2
from transformers import GPT2LMHeadModel

import bd3lm_hf
from bd3lm_hf.evaluation.generative import distinct, lengths, mean_entropy, mean_repetition, repetition, text_entropy
from bd3lm_hf.metrics import METRICS, load_metric
from bd3lm_hf.tokenization import train_tokenizer


FOLDER = Path(bd3lm_hf.__file__).parent / "metrics"
TENSORS = load_recorded("08_gen_ppl")


@pytest.fixture(scope="module")
def golden_model():
    return published_gpt2()


@pytest.mark.parametrize("name", ["distinct_n", "generative_perplexity", "repetition", "text_length", "token_entropy"])
def test_a_module_is_loaded_by_the_path_of_its_folder_or_by_name(name):
    assert name in METRICS
    for module in (evaluate.load(str(FOLDER / name)), load_metric(name)):
        assert isinstance(module, evaluate.Measurement)
        assert "predictions: texts, or their token ids" in module.inputs_description


@pytest.mark.parametrize("case", ["long", "padded", "longer"])
def test_the_published_figures_are_reproduced(golden_model, case):
    rows = TENSORS[f"{case}.ids"].tolist()
    result = load_metric("generative_perplexity").compute(predictions=rows, judge=golden_model)
    assert result["generative_perplexity"] == pytest.approx(TENSORS[f"{case}.ppl"].item(), rel=1e-4)
    assert result["num_tokens"] == int(TENSORS[f"{case}.length"])
    assert result["mean_perplexity"] == pytest.approx(sum(result["perplexities"]) / len(rows))
    found = load_metric("token_entropy").compute(predictions=rows)
    for total in (math.fsum(found["entropies"]), found["mean_entropy"] * len(rows)):
        assert total == pytest.approx(TENSORS[f"{case}.entropy"].item(), abs=1e-4)


def test_texts_are_read_by_the_judges_tokenizer(gpt2_folder, tiny_tokenizer):
    texts = ["The lazy dog sleeps on.", "A block is written<eos><bos>from noise."]
    ids = [[0, *tiny_tokenizer(text)["input_ids"]] for text in texts]
    metric = load_metric("generative_perplexity")
    by_text = metric.compute(predictions=texts, judge=str(gpt2_folder))
    model = GPT2LMHeadModel.from_pretrained(gpt2_folder).eval()
    by_ids = metric.compute(predictions=ids, judge=model, tokenizer=tiny_tokenizer)
    assert by_text["perplexities"] == pytest.approx(by_ids["perplexities"])
    assert by_text["num_tokens"] == sum(len(row) - 1 for row in ids) - 1  # without the end token
    letters = [[0, *(i for letter in text for i in tiny_tokenizer(letter)["input_ids"])] for text in texts[:1]]
    again = metric.compute(predictions=letters, judge=model, tokenizer=tiny_tokenizer, writer=str(gpt2_folder))
    assert again["perplexities"] == pytest.approx(by_ids["perplexities"][:1])
    other = train_tokenizer(["x"], vocab_size=280)  # the writer's ids are of no concern to a text
    assert metric.compute(predictions=texts, judge=str(gpt2_folder), writer=other) == by_text
    ends = metric.compute(predictions=texts, judge=str(gpt2_folder), score_end=True)
    assert ends["num_tokens"] == by_text["num_tokens"] + 1


def test_a_missing_tokenizer_or_judge_is_named(golden_model, tmp_path):
    metric = load_metric("generative_perplexity")
    with pytest.raises(ValueError, match="judge's tokenizer: give it as tokenizer=, or give token ids"):
        metric.compute(predictions=["a text"], judge=golden_model)
    with pytest.raises(ValueError, match="judge .*nowhere: there is no such folder"):
        metric.compute(predictions=["a text"], judge=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="'bleu'.* distinct_n, generative_perplexity"):
        load_metric("bleu")


def test_diversity_counts_ids_tokens_or_words(tiny_tokenizer):
    texts = ["the dog the dog the dog", "the fox"]
    ids = [tiny_tokenizer(text)["input_ids"] for text in texts]
    assert load_metric("distinct_n").compute(predictions=texts, n=(1, 2)) == {"distinct_1": 3 / 8, "distinct_2": 3 / 6}
    found = load_metric("repetition").compute(predictions=texts, n=2)
    assert found == {"mean_repetition": 0.3, "repetitions": [0.6, 0.0]}
    assert load_metric("text_length").compute(predictions=texts)["longest"] == 6
    entropy = load_metric("token_entropy").compute(predictions=texts)
    assert entropy["mean_entropy"] == pytest.approx(math.log(2)) and len(entropy["entropies"]) == 2
    for name in ("distinct_n", "repetition", "text_length", "token_entropy"):
        by_ids = load_metric(name).compute(predictions=ids)
        assert load_metric(name).compute(predictions=texts, tokenizer=tiny_tokenizer) == by_ids


def test_repetition_lowers_the_entropy_of_a_text():
    assert text_entropy([5] * 9) == text_entropy([]) == 0
    assert text_entropy([1, 2, 3, 4]) == pytest.approx(math.log(4))
    assert text_entropy([1, 1, 1, 2]) == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert text_entropy(["a", "a", "b"]) == text_entropy([7, 7, 9])
    assert mean_entropy([[1, 2], [3, 3]]) == pytest.approx(math.log(2) / 2)


def test_distinct_ngrams_are_counted_over_all_texts():
    assert distinct([[1, 2, 3], [1, 2, 4]], 1) == 4 / 6
    assert distinct([[1, 2, 3], [1, 2, 4]], 2) == 3 / 4
    assert distinct([[1], [2]], 2) is None and distinct([], 1) is None


def test_repetition_is_counted_within_a_text():
    assert repetition([1, 2, 3, 4, 5]) == 0
    assert repetition([1, 2, 1, 2, 1, 2], n=2) == 3 / 5
    assert repetition([1, 2, 3], n=4) is None
    assert mean_repetition([[1, 2, 1, 2, 1, 2], [1], [1, 2, 3]], n=2) == (3 / 5 + 0) / 2
    assert mean_repetition([[1]], n=2) is None


def test_lengths_have_mean_median_and_range():
    expected = {"mean": 4.0, "median": 4.0, "shortest": 1, "longest": 7}
    assert lengths([[1] * 3, [1], [1] * 5, [1] * 7]) == expected


def test_empty_n_grams_and_no_texts_are_refused():
    with pytest.raises(ValueError, match="n=0 must be at least 1"):
        distinct([[1]], 0)
    for count in (mean_entropy, lengths):
        with pytest.raises(ValueError, match="there are no texts: give at least one"):
            count([])
