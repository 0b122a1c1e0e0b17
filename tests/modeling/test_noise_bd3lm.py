"""The forward process: schedules, stratified times, masks, and masks with a truncated rate."""

import json
import math
from itertools import combinations

import pytest
import torch
from published import GOLDEN, load_recorded

from bd3lm_hf.modeling.inputs_bd3lm import token_layout
from bd3lm_hf.modeling.loss_bd3lm import corrupt, loss_mask
from bd3lm_hf.modeling.noise_bd3lm import (
    LogLinearNoise,
    Noise,
    check_interval,
    draw_noise,
    mask_positions,
    mask_positions_within,
    noise_schedule,
    stack_noise,
    stratify,
    times,
)


RECORDED = "03_noise"
SCHEDULES = ["loglinear", "square", "square_root", "log", "cosine"]


def blocks_of(length: int, size: int) -> torch.Tensor:
    return (torch.arange(length) // size).unsqueeze(0)


# --- Schedules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_equals_the_published_one(recorded, name):
    level = noise_schedule(name)(recorded["t"])
    torch.testing.assert_close(level.move_chance, recorded[f"{name}.move_chance"], rtol=2e-6, atol=2e-7)
    torch.testing.assert_close(level.loss_scaling, recorded[f"{name}.loss_scaling"], rtol=2e-5, atol=2e-6)


def test_the_noise_level_sigma_equals_the_published_one(recorded):
    noise, t = LogLinearNoise(), recorded["t"]
    torch.testing.assert_close(noise.total_noise(t), recorded["loglinear.total_noise"], rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(noise.rate_noise(t), recorded["loglinear.rate_noise"], rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(noise.sigma(t), recorded["sigma_from_p"], rtol=2e-5, atol=2e-6)
    # The published cap is computed in float32, hence 6.907768 instead of 6.907755.
    assert noise.sigma_max == pytest.approx(recorded["loglinear.sigma_max"].item(), abs=2e-5)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_move_rate_is_the_derivative_of_the_move_chance(name):
    # Away from t = 0, where two schedules clamp the probability to 1e-3.
    t = torch.linspace(0.05, 1.0, 200, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(noise_schedule(name).move_chance(t).sum(), t)
    torch.testing.assert_close(noise_schedule(name).move_rate(t), slope, rtol=1e-10, atol=1e-12)


# --- Times -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order, label", [("published", "anti"), ("none", "iid")])
def test_times_equal_the_published_ones_for_the_same_noise(order, label):
    config = json.loads((GOLDEN / "04_sample_t" / "config.json").read_text())
    tensors, compared = load_recorded("04_sample_t"), 0
    for length, size in config["cases"]:
        name = f"L{length}.bs{size}"
        uniform = stratify(tensors[f"{name}.u"], order=order)
        for low, high in config["clips"]:
            key = f"{name}.{label}_{low}_{high}"
            if key not in tensors:
                continue
            expected = tensors[key][:, :: size if size < length else 1]
            torch.testing.assert_close(times(uniform, low, high), expected, rtol=0, atol=1e-7)
            compared += 1
            if f"{name}.anti_buf_{low}_{high}" in tensors and label == "anti":  # from an interval of tensors
                expected = tensors[f"{name}.anti_buf_{low}_{high}"][:, :: size if size < length else 1]
                found = times(uniform, torch.tensor(low), torch.tensor(high))
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)
                compared += 1
    assert compared >= (10 if label == "anti" else 5)


def test_shuffled_strata_do_not_tie_the_noise_level_to_the_position():
    def within_sequence_std(order: str) -> float:
        generator = torch.Generator().manual_seed(0)
        draws = [draw_noise(16, 256, 1, order=order, generator=generator).block_noise for _ in range(8)]
        return torch.stack(draws).std(dim=2).mean().item()

    assert within_sequence_std("shuffled") == pytest.approx(math.sqrt(1 / 12), abs=0.004)
    assert within_sequence_std("published") == pytest.approx(0.018, abs=0.001)


def test_the_same_generator_gives_the_same_noise():
    first, second = (draw_noise(2, 3, 12, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    other = draw_noise(2, 3, 12, generator=torch.Generator().manual_seed(6))
    for a, b, c in zip(first, second, other, strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
        assert ((a >= 0) & (a < 1)).all()
    assert [tuple(field.shape) for field in first] == [(2, 3), (2, 12), (2, 3)]


# --- Several noise samples -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["shuffled", "published"])
@pytest.mark.parametrize("num_samples", [1, 2, 3, 4])
def test_samples_hit_every_stratum_once_and_every_block_has_one_time_in_each_part(order, num_samples):
    generator = torch.Generator().manual_seed(0)
    noise = draw_noise(4, 6, 24, num_noise_samples=num_samples, order=order, generator=generator)
    axis = (num_samples,) if num_samples > 1 else ()
    assert [tuple(field.shape) for field in noise] == [(4, *axis, 6), (4, *axis, 24), (4, *axis, 6)]
    strata = (noise.block_noise.double() * 24 * num_samples).floor().long()
    assert sorted(strata.flatten().tolist()) == list(range(24 * num_samples))
    parts = (noise.block_noise * num_samples).floor().long()
    assert torch.equal(parts.view(4, num_samples, 6), torch.arange(num_samples).view(1, -1, 1).expand(4, -1, 6))


def test_independent_samples_are_not_spread():
    noise = draw_noise(50, 4, 4, num_noise_samples=2, order="none", generator=torch.Generator().manual_seed(0))
    parts = (noise.block_noise * 2).floor()
    assert 0.4 < parts[:, 0].mean() < 0.6 and 0.4 < parts[:, 1].mean() < 0.6


@pytest.mark.parametrize("num_samples", [1, 2])
def test_samples_are_put_side_by_side_in_the_order_of_their_axis(num_samples):
    noise = draw_noise(2, 3, 12, num_noise_samples=num_samples, generator=torch.Generator().manual_seed(5))
    assert noise.num_noise_samples() == num_samples and stack_noise([noise]) is noise
    for field, joined in zip(noise, noise.side_by_side(), strict=True):
        assert torch.equal(joined, field if num_samples == 1 else torch.cat([field[:, 0], field[:, 1]], dim=1))


# --- Masks -----------------------------------------------------------------------------------------------------------


def confined_masks(
    rows: int, length: int, size: int, low: float, high: float, mask_prob: float = 0.5, real: int | None = None
) -> torch.Tensor:
    """Seeded masks `(rows, length)` of blocks of `size` whose rate is truncated; padding follows `real` tokens."""
    blocks = -(-length // size)
    noise = draw_noise(rows, blocks, length, generator=torch.Generator().manual_seed(0))
    probs, valid = torch.full((rows, blocks), mask_prob), (torch.arange(length) < (real or length)).expand(rows, -1)
    return mask_positions_within(noise, probs, blocks_of(length, size), valid, low, high, block_size=size)


def test_a_token_is_masked_if_its_noise_is_at_most_the_probability_of_its_block():
    noise = Noise(torch.zeros(1, 2), torch.tensor([[0.0, 0.5, 0.51, 0.2, 0.21]]), torch.zeros(1, 2))
    masked = mask_positions(noise, torch.tensor([[0.5, 0.2]]), torch.tensor([[0, 0, 0, 1, 1]]))
    assert masked.tolist() == [[True, True, False, True, False]]


@pytest.mark.parametrize("draw", [0.0, 1 - 2**-24])
def test_extreme_count_noise_stays_in_the_interval(draw):
    noise = Noise(torch.zeros(1, 1), torch.rand(1, 16), torch.full((1, 1), draw))
    valid = torch.ones(1, 16, dtype=torch.bool)
    masked = mask_positions_within(noise, torch.tensor([[0.5]]), blocks_of(16, 16), valid, 0.3, 0.8, block_size=16)
    assert 0.3 <= masked.double().mean().item() <= 0.8


@pytest.mark.parametrize(
    ("low", "high", "mask_prob", "size"),
    [(0.3, 0.8, 0.4, 4), (0.5, 1.0, 0.55, 4), (0.001, 0.5, 0.45, 4), (0.35, 0.75, 0.5, 5)],
)
def test_truncated_masks_have_the_distribution_of_redrawing_until_the_rate_fits(low, high, mask_prob, size):
    num_samples = 40_000
    masked = confined_masks(num_samples, size, size, low, high, mask_prob)
    patterns = (masked.long() * 2 ** torch.arange(size)).sum(1)
    observed = torch.bincount(patterns, minlength=2**size).double()
    # The distribution of rejection sampling: independent coins, given that the number of heads fits.
    distribution = torch.zeros(2**size, dtype=torch.float64)
    for k in range(size + 1):
        fits = (low <= 1e-3 or k >= low * size - 1e-9) and k <= high * size + 1e-9
        for positions in combinations(range(size), k):
            distribution[sum(2**position for position in positions)] = (
                fits * mask_prob**k * (1 - mask_prob) ** (size - k)
            )
    expected = num_samples * distribution / distribution.sum()
    assert observed[expected == 0].sum() == 0
    possible = expected > 0
    chi_square = ((observed - expected)[possible] ** 2 / expected[possible]).sum().item()
    freedom = int(possible.sum()) - 1
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)


def test_a_shorter_last_block_is_truncated_by_its_own_length_or_to_the_nearest_counts():
    masked = confined_masks(200, 6, 4, 0.5, 0.75)
    assert set(masked[:, :4].sum(1).tolist()) == {2, 3}
    assert set(masked[:, 4:].sum(1).tolist()) == {1}
    assert set(confined_masks(200, 5, 4, 0.5, 0.75)[:, 4].tolist()) == {False, True}  # no rate fits one token


def test_padding_is_never_masked_and_does_not_count_in_the_rate():
    masked = confined_masks(300, 12, 4, 0.5, 0.5, real=10)
    assert not masked[:, 10:].any()
    assert masked[:, :8].view(300, 2, 4).sum(-1).eq(2).all()
    assert masked[:, 8:10].sum(-1).eq(1).all()


@pytest.mark.parametrize("low, high, size", [(1e-3, 1.0, 1), (0.5, 1.0, 1), (0.3, 0.3, 10), (0.25, 0.3, 4)])
def test_an_interval_that_some_count_meets_is_accepted(low, high, size):
    check_interval(low, high, size, truncated=True)
    check_interval(torch.tensor(low).item(), torch.tensor(high).item(), size, truncated=True)


# --- Exact numbers, and complementary streams ------------------------------------------------------------------------


def corrupted(model, ids, **fields):
    for name, value in fields.items():
        setattr(model.config, name, value)
    layout = token_layout(None, ids.shape[1], model.config.block_size, device=ids.device)
    scored = loss_mask(layout, ids, ignore_bos=False, training=True)
    return corrupt(model.train(), layout, scored, None, *model.interval())


def test_exact_k_masks_every_block_with_the_weight_of_its_number(tiny_model):
    ids = torch.randint(3, 40, (64, 32))
    masked, weights, _ = corrupted(tiny_model, ids, masking="exact_k")
    counts = masked.view(64, 8, 4).sum(-1)
    assert counts.unique(return_counts=True)[1].tolist() == [128] * 4  # stratified: 512 blocks over k = 1..4
    torch.testing.assert_close(weights.view(64, 8, 4), (4 / counts).unsqueeze(-1).expand(-1, -1, 4))


def test_a_pair_of_streams_masks_every_token_once(tiny_model):
    masked, weights, _ = corrupted(tiny_model, torch.randint(3, 40, (8, 32)), complementary=True)
    first, second = masked.split(32, dim=1)
    assert (first ^ second).all()
    assert torch.isfinite(weights).all() and not (weights == 1).all()
    tiny_model.set_interval(0.55, 0.95)  # above one half the published weight is one, for both streams
    assert (corrupted(tiny_model, torch.randint(3, 40, (8, 32)), complementary=True).weights == 1).all()
