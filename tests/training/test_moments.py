"""The moments of a block's loss: the integral over t, the draws that all intervals share, and their plain twins."""

import functools

import pytest
import torch
from noisy_text import random_ids
from shared_models import tiny_bd3lm

from bd3lm_hf.modeling.likelihood_bd3lm import mask_losses, noise_of_batch
from bd3lm_hf.modeling.loss_bd3lm import Corruption, corrupt
from bd3lm_hf.modeling.noise_bd3lm import count_probabilities, draw_noise, noise_schedule
from bd3lm_hf.training.interval import candidate_intervals
from bd3lm_hf.training.loss_moments import BlockMoments, HeldOut, PassPerInterval, SharedDraws, held_out, level_moments


SCHEDULES = ("loglinear", "square", "square_root", "log", "cosine")
INTERVALS = [(1e-3, 1.0), (1e-3, 0.5), (0.3, 0.8), (0.45, 0.95), (0.55, 0.95)]
make_model = functools.partial(tiny_bd3lm, std=0.3)


def text_of(model, ids: torch.Tensor, attention_mask=None, labels=None) -> HeldOut:
    generators = [torch.Generator().manual_seed(row) for row in range(len(ids))]
    return held_out(model, ids, attention_mask, labels, generators)


@torch.no_grad()
def exact_moments(model, batch: HeldOut, intervals, powers=(1, 2)) -> torch.Tensor:
    """E[X^j] of every block `(powers, intervals, blocks)`, from every mask of its maskable tokens; no confinement."""
    config, (rows, length) = model.config, batch.input_ids.shape
    size, blocks = config.block_size, config.num_blocks(length)
    place = torch.arange(length) % size
    masks = [((torch.tensor(p) >> place) & 1 > 0).expand(rows, -1) for p in range(1, 2**size)]
    draws = (Corruption(mask & batch.scored.maskable, torch.ones(rows, length), None) for mask in masks)
    found = torch.zeros(len(powers), len(intervals), rows, blocks, dtype=torch.float64)
    maskable = batch.scored.maskable.double().view(rows, blocks, size)
    for mask, (draw, losses) in zip(masks, mask_losses(model, batch.input_ids, batch.layout, draws), strict=True):
        loss = losses.double().view(rows, blocks, size).sum(-1) / size
        whole = (mask.view(rows, blocks, size).sum(-1) == draw.masked.view(rows, blocks, size).sum(-1)).double()
        k, n = draw.masked.view(rows, blocks, size).sum(-1), maskable.sum(-1).long()
        for i, (low, high) in enumerate(intervals):
            ends = torch.linspace(low, high, 40_001, dtype=torch.float64)
            t = (ends[1:] + ends[:-1]) / 2
            weight = torch.ones_like(t) if low > 0.5 else 1 / t
            for count in k.unique().tolist():
                for total in n.unique().tolist():
                    here = ((k == count) & (n == total)).double() * whole
                    for j, power in enumerate(powers):
                        level = (weight**power * t**count * (1 - t) ** (total - count)).mean()
                        found[j, i] += here * level * loss**power
    return found.flatten(2)[:, :, batch.scored.maskable.view(rows, blocks, size).any(-1).flatten()]


@pytest.mark.parametrize("confined", [False, True])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_moments_of_the_weight_are_their_integrals(name, confined):
    schedule = noise_schedule(name)
    for low, high in [(1e-3, 1.0), (0.3, 0.8), (0.55, 0.95)]:
        for size in (1, 4, 16):
            found = level_moments(schedule, (low, high), size=size, maskable=size, truncated=confined)
            ends = torch.linspace(low**0.25, high**0.25, 20_001, dtype=torch.float64) ** 4
            t, share = (ends[1:] + ends[:-1]) / 2, (ends[1:] - ends[:-1]) / (high - low)
            weight = torch.ones_like(t) if low > 0.5 else -schedule(t).loss_scaling
            bounds = (low, high) if confined else (0.0, 1.0)
            chance = schedule(t).move_chance.unsqueeze(0)
            counts = count_probabilities(chance, torch.full(chance.shape, size), *bounds, max_size=size)[0]
            expected = torch.stack([share * weight**power for power in range(3)]) @ counts
            error = (found - expected).abs().amax(1) / expected.abs().amax(1)
            assert error.max() < 1e-4, (low, high, size)
            assert found[0].sum() == pytest.approx(1, abs=1e-9)


def test_a_block_of_a_thousand_tokens_is_resolved():
    found = level_moments(noise_schedule("loglinear"), (1e-3, 1.0), size=1024, maskable=1024, truncated=False)
    k = torch.arange(100, 1024, dtype=torch.float64)
    # The integral of t^(k - j) (1 - t)^(n - k) C(n, k) is a Beta function where its ends at 1e-3 and 1 do not matter.
    torch.testing.assert_close(found[0, 100:-1], torch.full_like(k, 1 / 1025 / 0.999), rtol=1e-5, atol=0)
    torch.testing.assert_close(found[1, 100:-1], 1 / k / 0.999, rtol=1e-5, atol=0)
    torch.testing.assert_close(found[2, 100:-1], 1024 / (k * (k - 1)) / 0.999, rtol=1e-5, atol=0)


def test_an_interval_of_one_point_is_that_point():
    found = level_moments(noise_schedule("loglinear"), (0.5, 0.5), size=2, maskable=2, truncated=False)
    chances = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64)
    torch.testing.assert_close(found, torch.stack([chances, 2 * chances, 4 * chances]))
    whole = level_moments(noise_schedule("loglinear"), (1, 1), size=1, maskable=1, truncated=True)
    torch.testing.assert_close(whole[:, 1], torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("resample", [False, True])
@pytest.mark.parametrize("interval", [(0.3, 0.8), (0.55, 0.95), (1e-3, 0.5)])
def test_the_moments_of_the_weight_are_the_frequencies_of_the_losses_own_draws(interval, resample):
    model, rows = make_model(resample=resample), 40_000
    ids = random_ids(1, 10).expand(rows, -1)
    labels = ids.clone()
    labels[:, 5] = -100  # a given token inside the second block; the first block has a given first token
    batch = text_of(model, ids[:1], labels=labels[:1])
    maskable, valid = (mask.expand(rows, -1) for mask in (batch.scored.maskable, batch.scored.valid))
    scored = batch.scored._replace(maskable=maskable, valid=valid, counted=maskable)
    noise = draw_noise(rows, 3, 10, order="none", generator=torch.Generator().manual_seed(0))
    masked, weights, _ = corrupt(model, batch.layout, scored, noise, *interval, training=True)
    for block, (start, stop, maskable) in enumerate([(0, 4, 3), (4, 8, 3), (8, 10, 2)]):
        expected = level_moments(
            noise_schedule("loglinear"), interval, size=stop - start, maskable=maskable, truncated=resample
        )
        k, weight = masked[:, start:stop].sum(1), weights[:, start].double()
        for power in range(1 if interval[0] < 0.01 else 3):  # 1/t near 0 has too heavy a tail to be estimated
            values = weight.pow(power) * torch.nn.functional.one_hot(k, maskable + 1).T
            error = (values.mean(1) - expected[power]) / (values.std(1) / rows**0.5).clamp(min=1e-9)
            assert error.abs().max() < 4, (block, power)


@pytest.mark.parametrize("passes", [4, 3, 1])
def test_shared_draws_are_unbiased_for_every_block(passes):
    model, draws = make_model(), 1000
    ids = random_ids(2, 8)
    expected = exact_moments(model, text_of(model, ids), INTERVALS)
    with torch.no_grad():  # each row has its own noise
        found = SharedDraws(model.config, INTERVALS, passes=passes)(model, text_of(model, ids.repeat(draws, 1)))
    found = torch.stack(found).view(3, len(INTERVALS), draws, 4)
    mean, error = found.mean(2), found.std(2) / draws**0.5
    truth = torch.cat([torch.ones_like(expected[:1]), expected])
    assert mean.shape == truth.shape == (3, len(INTERVALS), 4)
    torch.testing.assert_close(mean, truth, rtol=0.2, atol=0)
    assert (((mean - truth).abs() - 1e-6 * truth) / error.clamp(min=1e-12)).max() < 4.5


def test_with_a_pass_for_every_count_the_zeroth_moment_is_exact():
    model = make_model(ignore_bos=False)
    with torch.no_grad():
        found = SharedDraws(model.config, INTERVALS)(model, text_of(model, random_ids(2, 16)))
    torch.testing.assert_close(found.zeroth, torch.ones_like(found.zeroth))


@pytest.mark.parametrize("method", [SharedDraws, PassPerInterval])
def test_padding_prompts_and_short_blocks_do_not_change_what_a_row_gives(method):
    model = make_model(resample=True)
    ids = random_ids(3, 16)
    mask = torch.ones_like(ids)
    mask[1, 11:] = 0  # a last block of three tokens
    mask[2, :4] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, :6] = -100  # a prompt of one and a half blocks
    measure = method(model.config, INTERVALS)
    with torch.no_grad():
        whole = measure(model, text_of(model, ids, mask, labels))
        parts = []
        for row in range(3):
            real = mask[row].bool()
            generators = [torch.Generator().manual_seed(row)]
            alone = held_out(model, ids[row : row + 1, real], None, labels[row : row + 1, real], generators)
            parts.append(measure(model, alone))
    for field, name in enumerate(BlockMoments._fields):
        expected = torch.cat([part[field] for part in parts], dim=1)
        assert expected.shape[1] == 3 + 3 + 3  # the block that is all prompt does not count
        torch.testing.assert_close(whole[field], expected, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("method", [SharedDraws, PassPerInterval])
def test_a_batch_with_nothing_to_score_gives_no_block(method):
    model, ids = make_model(), random_ids(2, 8)
    with torch.no_grad():
        found = method(model.config, INTERVALS)(model, text_of(model, ids, labels=torch.full_like(ids, -100)))
    assert found.first.shape == (len(INTERVALS), 0)


def passes_of(model, monkeypatch, measure, batch) -> tuple[int, int]:
    """Clean and noisy passes that a method takes over a batch."""
    clean, noisy = [], []
    inner_clean, inner_noisy = model.clean_cache, model.noisy_hidden
    monkeypatch.setattr(model, "clean_cache", lambda *a: (clean.append(1), inner_clean(*a))[1])

    def count_noisy(*arguments, num_noise_samples=1, **keywords):
        noisy.append(num_noise_samples)
        return inner_noisy(*arguments, num_noise_samples=num_noise_samples, **keywords)

    monkeypatch.setattr(model, "noisy_hidden", count_noisy)
    with torch.no_grad():
        measure(model, batch)
    return len(clean), sum(noisy)


@pytest.mark.parametrize(("block_size", "passes"), [(1, 1), (4, 4), (8, 8), (16, 12), (32, 12)])
def test_36_intervals_take_at_most_12_noisy_passes_and_one_clean_one(monkeypatch, block_size, passes):
    model, intervals = make_model(block_size=block_size), candidate_intervals(4)
    clean = int(block_size < 32)  # a lone block has no clean text before it
    for method, noisy in ((SharedDraws, passes), (PassPerInterval, len(intervals))):
        measure = method(model.config, intervals)
        with monkeypatch.context() as patch:
            taken = passes_of(model, patch, measure, text_of(model, random_ids(2, 32)))
        assert taken == (clean, noisy) and measure.passes == noisy


@pytest.mark.parametrize("changes", [{}, {"resample": True}, {"time_conditioning": True}, {"noise": "cosine"}])
def test_the_published_way_sums_up_to_the_training_loss(changes):
    model, ids = make_model(**changes), random_ids(2, 16)
    batch = text_of(model, ids)
    with torch.no_grad():
        found = PassPerInterval(model.config, INTERVALS)(model, batch)
        model.train()
        sources = text_of(model, ids).generators
        for i, interval in enumerate(INTERVALS):
            noise = noise_of_batch(model, batch.scored, model.config.antithetic_sampling, sources)
            model.set_interval(*interval)
            loss = model(input_ids=ids, labels=ids, **noise._asdict(), num_items_in_batch=1).loss
            assert found.first[i].sum().item() * 4 == pytest.approx(loss.item(), rel=1e-5)
    assert torch.equal(found.second, found.first**2)


def test_draws_are_not_shared_by_a_model_that_reads_the_noise_level():
    with pytest.raises(ValueError, match="time_conditioning=True gives other losses at each noise level"):
        SharedDraws(make_model(time_conditioning=True).config, INTERVALS)
