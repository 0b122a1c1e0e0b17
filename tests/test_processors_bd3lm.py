"""Logits processors over many places: the nucleus, and contexts that fit."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers.generation import TopPLogitsWarper

from bd3lm_hf.modeling.processors_bd3lm import NucleusLogitsProcessor


GOLDEN = Path(__file__).parent / "golden" / "07_samplers"
EXAMPLE = torch.tensor([[0.5, 0.3, 0.15, 0.05]])


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "tensors.safetensors")


def kept(scores: torch.Tensor) -> set[int]:
    return set((scores[0] > -torch.inf).nonzero().flatten().tolist())


@pytest.mark.parametrize("p", [0.9, 0.5])
def test_the_nucleus_is_the_published_one(golden, p):
    logits, ids, expected = golden["nucleus.logits"], golden["nucleus.x"], golden[f"nucleus.filtered_{p}"]
    scores = logits.flatten(0, 1).clone()
    scores[:, 96] = -torch.inf  # the mask token has probability zero
    probabilities = NucleusLogitsProcessor(p)(None, scores).softmax(-1).view_as(logits)
    for row, column in (ids == 96).nonzero().tolist():
        if (row, column) == (1, 1):
            # A flat position: which of the equal values are kept depends on how they are sorted.
            assert (probabilities[row, column] > 0).sum() == (expected[row, column] > 0).sum()
        else:
            torch.testing.assert_close(probabilities[row, column], expected[row, column], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("p", "ours", "theirs"), [(0.9, {0, 1}, {0, 1, 2}), (0.7, {0}, {0, 1}), (0.99, {0, 1, 2}, {0, 1, 2, 3})]
)
def test_the_nucleus_drops_the_token_that_crosses_p_and_top_p_keeps_it(p, ours, theirs):
    assert kept(NucleusLogitsProcessor(p)(None, EXAMPLE.log())) == ours
    assert kept(TopPLogitsWarper(p)(None, EXAMPLE.log())) == theirs


def test_the_most_likely_token_always_stays():
    assert kept(NucleusLogitsProcessor(0.01)(None, EXAMPLE.log())) == {0}
