"""What is counted of texts, by hand."""

import json
import math
from pathlib import Path

import pytest
from safetensors.torch import load_file

from bd3lm_hf.evaluation.text_metrics import distinct, lengths, mean_entropy, mean_repetition, repetition, text_entropy


GOLDEN = Path(__file__).parents[1] / "golden" / "08_gen_ppl"


def test_repetition_lowers_the_entropy_of_a_text():
    assert text_entropy([5] * 9) == text_entropy([]) == 0
    assert text_entropy([1, 2, 3, 4]) == pytest.approx(math.log(4))
    assert text_entropy([1, 1, 1, 2]) == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert text_entropy(["a", "a", "b"]) == text_entropy([7, 7, 9])
    assert mean_entropy([[1, 2], [3, 3]]) == pytest.approx(math.log(2) / 2)


@pytest.mark.parametrize("case", json.loads((GOLDEN / "config.json").read_text())["cases"])
def test_the_published_entropy_is_ours_summed_over_the_batch(case):
    tensors = load_file(GOLDEN / "tensors.safetensors")
    rows = tensors[f"{case}.ids"].tolist()
    published = tensors[f"{case}.entropy"].item()
    assert math.fsum(map(text_entropy, rows)) == pytest.approx(published, abs=1e-4)
    assert mean_entropy(rows) * len(rows) == pytest.approx(published, abs=1e-4)


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
    assert lengths([[1] * 3, [1], [1] * 5, [1] * 7]) == (4.0, 4.0, 1, 7)


def test_what_can_not_be_counted_is_refused():
    with pytest.raises(ValueError, match="n=0: n-grams have at least 1 token"):
        distinct([[1]], 0)
    for count in (mean_entropy, lengths):
        with pytest.raises(ValueError, match="there are no texts: give at least one"):
            count([])
