"""Tokens are drawn with their probability, in either precision, and impossible ones never."""

import pytest
import torch

from bd3lm_hf.modeling import samplers_bd3lm
from bd3lm_hf.modeling.noise_bd3lm import wide_float
from bd3lm_hf.modeling.samplers_bd3lm import SAMPLING_DTYPES, random_uniform, sample_categorical, token_probability


CPU = torch.device("cpu")


def seed(value: int) -> torch.Generator:
    return torch.Generator().manual_seed(value)


@pytest.mark.parametrize("in_groups", [False, True])
@pytest.mark.parametrize("dtype", SAMPLING_DTYPES.values(), ids=SAMPLING_DTYPES)
def test_tokens_are_drawn_with_their_probability(dtype, in_groups):
    probability = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    scores = (probability.log() + 7.0).expand(40_000, 6)
    uniform = random_uniform((40_000,), CPU, seed(0))
    counts = sample_categorical(scores, uniform, dtype=dtype, in_groups=in_groups).bincount(minlength=6)
    # Binomial, with standard deviations of at most 100.
    assert ((counts - 40_000 * probability).abs() < 500).all()
    assert not counts[probability == 0].any()


def test_both_precisions_draw_from_the_same_distribution_of_a_large_vocabulary():
    # The probability of a token is the length of its piece of [0, 1), which is known exactly; no sample of any size
    # could show the difference.
    scores = 3 * torch.randn(1, 50_258, generator=seed(0))
    exact = scores.double().softmax(-1).cumsum(-1)[0]
    narrow = scores.softmax(-1).cumsum(-1, dtype=torch.float64)[0]
    narrow = narrow / narrow[-1]
    lengths, expected = narrow.diff(), exact.diff()
    assert (lengths - expected).abs().sum() / 2 < 1e-7  # total variation
    assert ((lengths - expected) / expected).abs().max() < 1e-4  # of the rarest token, too
    uniform = random_uniform((300,), CPU, seed(1))
    expected, *drawn = (
        sample_categorical(scores.expand(300, -1), uniform, dtype=dtype, in_groups=in_groups)
        for dtype in SAMPLING_DTYPES.values()
        for in_groups in (False, True)
    )
    assert all(torch.equal(tokens, expected) for tokens in drawn)


@pytest.mark.parametrize("in_groups", [False, True])
def test_without_float64_impossible_tokens_are_still_never_drawn(monkeypatch, in_groups):
    monkeypatch.setattr(samplers_bd3lm, "wide_float", lambda device: torch.float32)
    cumsum = torch.Tensor.cumsum

    def in_parallel(self, *args, **kwargs):
        """Return a sum whose rounding differs from position to position, as on a GPU."""
        total = cumsum(self, *args, **kwargs)
        return total + 1e-3 * (torch.arange(total.shape[-1]) % 2)

    monkeypatch.setattr(torch.Tensor, "cumsum", in_parallel)
    scores = torch.full((2000, 50), -torch.inf)
    scores[:, [20, 21, 40]] = 0.0
    drawn = sample_categorical(scores, torch.arange(2000) / 2000, in_groups=in_groups)
    assert set(drawn.tolist()) == {20, 21, 40}


@pytest.mark.parametrize("uniform", [0.0, 1.0 - 2.0**-53])
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
@pytest.mark.parametrize("in_groups", [False, True])
def test_extreme_uniform_numbers_give_possible_tokens(monkeypatch, uniform, wide, in_groups):
    # The largest number below 1 is 1 in float32.
    monkeypatch.setattr(samplers_bd3lm, "wide_float", lambda device: wide)
    scores = torch.randn(64, 1000, generator=seed(0))
    scores[:, [0, 1, 998, 999]] = -torch.inf
    drawn = sample_categorical(scores, torch.full((64,), uniform, dtype=torch.float64), in_groups=in_groups)
    assert ((drawn >= 2) & (drawn <= 997)).all()


def test_uniform_numbers_follow_their_generator():
    first, second = (random_uniform((2, 3), CPU, seed(5)) for _ in range(2))
    assert torch.equal(first, second) and first.shape == (2, 3) and first.dtype == torch.float64
    torch.manual_seed(5)
    assert torch.equal(random_uniform((2, 3), CPU), first)
    # A row with a source of its own gets the numbers that it would get alone.
    together = random_uniform((2, 5), CPU, [seed(3), seed(4)])
    alone = [random_uniform((1, 5), CPU, source)[0] for source in (seed(3), seed(4))]
    assert torch.equal(together, torch.stack(alone)) and not torch.equal(*alone)


def test_a_device_without_float64_gets_float32():
    assert wide_float(torch.device("cpu")) == torch.float64
    assert wide_float(torch.device("mps")) == torch.float32


def test_the_probability_of_a_token_ignores_the_scale_of_its_scores():
    scores = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.0, 0.9]]).log() + 5.0
    expected = torch.tensor([0.3, 0.9])
    torch.testing.assert_close(token_probability(scores, torch.tensor([1, 2])), expected)
