"""Which masked position is revealed next, and which tokens it may become."""

import collections
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers.generation import TopPLogitsWarper

from bd3lm_hf.modeling.generation_bd3lm import NucleusLogitsProcessor
from bd3lm_hf.modeling.samplers_bd3lm import SAMPLERS, FirstHittingSampler, draw_tokens, wide_float


GOLDEN = Path(__file__).parent / "golden" / "07_samplers"
EXAMPLE = torch.tensor([[0.5, 0.3, 0.15, 0.05]])


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "tensors.safetensors")


def kept(scores: torch.Tensor) -> set[int]:
    return set((scores[0] > -torch.inf).nonzero().flatten().tolist())


def test_the_default_sampler_has_a_name():
    assert SAMPLERS["first_hitting"] is FirstHittingSampler


def test_every_masked_place_comes_once_and_before_the_others():
    masked = torch.tensor([[True, False, True, True], [False, False, False, False], [True, True, True, True]])
    for random in (True, False):
        order = FirstHittingSampler().order(masked, random=random)
        assert order.sort(dim=1).values.tolist() == [[0, 1, 2, 3]] * 3
        for row, places in zip(masked, order.tolist(), strict=True):
            assert all(row[place] for place in places[: int(row.sum())])


def test_without_chance_places_are_revealed_from_left_to_right():
    masked = torch.tensor([[False, True, True, False, True]])
    assert FirstHittingSampler().order(masked, random=False)[0, :3].tolist() == [1, 2, 4]


def test_every_order_is_equally_likely():
    masked = torch.tensor([True, True, False, True]).expand(12_000, 4)
    order = FirstHittingSampler().order(masked, generator=torch.Generator().manual_seed(0))
    counts = collections.Counter(tuple(row) for row in order[:, :3].tolist())
    assert len(counts) == 6
    # A count is binomial with mean 2000 and standard deviation 41.
    assert all(abs(count - 2000) < 5 * 41 for count in counts.values())


def test_an_order_repeats_itself_with_its_generator():
    masked = torch.ones(3, 16, dtype=torch.bool)
    first, second = (FirstHittingSampler().order(masked, generator=torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first, second)


def test_the_hitting_time_reproduces_the_published_one(golden, monkeypatch):
    draws = iter(golden["fh.u_time"].float())
    monkeypatch.setattr(torch, "rand", lambda *args, **kwargs: next(draws).reshape(1))
    t, block = torch.ones(1), 0
    remaining = 3  # the first block begins with the bos token
    for expected, index in zip(golden["fh.t"], golden["fh.block_index"], strict=True):
        if int(index) != block:
            t, block, remaining = torch.ones(1), int(index), 4
        t = FirstHittingSampler().time(t, torch.tensor([remaining]))
        remaining -= 1
        torch.testing.assert_close(t[0], expected, atol=1e-6, rtol=0)


def test_without_chance_the_hitting_time_is_its_mean():
    n = torch.tensor([1, 2, 5])
    drawn = FirstHittingSampler().time(
        torch.full((100_000, 3), 0.8), n.expand(100_000, 3), generator=torch.Generator().manual_seed(0)
    )
    expected = FirstHittingSampler().time(torch.full((3,), 0.8), n, random=False)
    torch.testing.assert_close(drawn.mean(0), expected, atol=3e-3, rtol=0)


def test_tokens_are_drawn_with_their_probability():
    probability = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    scores = (probability.log() + 7.0).expand(40_000, 6)
    counts = draw_tokens(scores, torch.Generator().manual_seed(0)).bincount(minlength=6)
    # Binomial, with standard deviations of at most 100.
    assert ((counts - 40_000 * probability).abs() < 500).all()
    assert not counts[probability == 0].any()


@pytest.mark.parametrize("uniform", [0.0, 1.0 - 2.0**-53])
def test_the_extreme_draws_give_tokens_that_can_be(monkeypatch, uniform):
    monkeypatch.setattr(torch, "rand", lambda shape, **kwargs: torch.full(shape, uniform, dtype=torch.float64))
    scores = torch.randn(64, 1000, generator=torch.Generator().manual_seed(0))
    scores[:, [0, 1, 998, 999]] = -torch.inf
    drawn = draw_tokens(scores)
    assert ((drawn >= 2) & (drawn <= 997)).all()


def test_a_device_without_float64_gets_float32():
    assert wide_float(torch.device("cpu")) == torch.float64
    assert wide_float(torch.device("mps")) == torch.float32


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
