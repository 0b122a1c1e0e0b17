"""All five noise schedules train, score and generate."""

import itertools

import pytest
import torch
from noisy_text import random_ids, toy_model
from shared_models import tiny_bd3lm

from bd3lm_hf.modeling.modeling_bd3lm import BD3LMForMaskedLM
from bd3lm_hf.modeling.noise_bd3lm import draw_noise, noise_schedule


SCHEDULES = ["loglinear", "square", "square_root", "log", "cosine"]


# --- Training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("conditioned", "resample"), [(False, False), (False, True), (True, True)])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_loss_and_its_gradient_are_finite_on_every_interval(name, conditioned, resample):
    model = tiny_bd3lm(noise=name, time_conditioning=conditioned, resample=resample).train()
    ids = random_ids(4, 18)
    noise = draw_noise(4, 5, 18, generator=torch.Generator().manual_seed(0))
    # Both ends of the interval are times too.
    noise.block_noise[0, 0], noise.block_noise[0, 1] = 0.0, 1.0
    for low, high in [(1e-3, 1.0), (0.3, 0.8), (0.55, 0.95), (1.0, 1.0)]:
        model.set_interval(low, high)
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids, **noise._asdict()).loss
        loss.backward()
        assert 0 < loss.item() < 1000
        for parameter in model.backbone.blocks.parameters():
            assert parameter.grad.isfinite().all() and parameter.grad.any()


# --- Scoring ---------------------------------------------------------------------------------------------------------

TEXT = [[2, 0, 1, 2, 1, 0]]
# Expectation of the published estimator over the bound, minus 1, for the toy below. It averages t over [1e-3, 1].
BIAS = {"loglinear": (-1e-3, 1e-3), "square": (0, 2e-3), "square_root": (-0.035, -0.01)}
BIAS |= {"log": (-2e-3, 1e-3), "cosine": (-8e-3, -1e-3)}


def losses_by_count(model: BD3LMForMaskedLM) -> list[list[float]]:
    """Return for each block and k the summed -log p of all masks with k tokens; the first token is never masked."""
    ids, found = torch.tensor(TEXT), []
    for block in ([1, 2], [3, 4, 5]):
        sums = [0.0]
        for k in range(1, len(block) + 1):
            total = 0.0
            for masked in itertools.combinations(block, k):
                x_t = ids.clone()
                x_t[0, list(masked)] = 3
                with torch.no_grad():
                    logits = model(input_ids=x_t, clean_input_ids=ids).logits.double()
                logits[..., 3] = -torch.inf
                total -= sum(logits[0, position].log_softmax(-1)[ids[0, position]].item() for position in masked)
            sums.append(total)
        found.append(sums)
    return found


def expectation(name: str, sums: list[list[float]]) -> float:
    """Return its mean over t in [1e-3, 1] of w(t) times the expected loss at move_chance(t), as published."""
    edges = torch.logspace(-3, 0, 20_001, dtype=torch.float64)
    t, width = (edges[1:] + edges[:-1]) / 2, edges.diff()
    level = noise_schedule(name)(t)
    p, weight = level.move_chance, -level.loss_scaling
    loss = sum(p**k * (1 - p) ** (len(block) - 1 - k) * total for block in sums for k, total in enumerate(block))
    return ((weight * loss * width).sum() / width.sum()).item()


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_sampled_likelihood_has_the_expectation_of_its_schedule(name):
    model = toy_model(3, noise=name)
    sums = losses_by_count(model)
    expected, bound = expectation(name, sums), model.token_nll(torch.tensor(TEXT), estimator="exact").nll.sum().item()
    low, high = BIAS[name]
    assert low < expected / bound - 1 < high
    ids = torch.tensor(TEXT).repeat(10_000, 1)
    rows = model.token_nll(ids, generator=torch.Generator().manual_seed(0)).nll.double().sum(1)
    error = rows.std().item() / len(rows) ** 0.5
    assert error < 0.03 * bound
    assert rows.mean().item() == pytest.approx(expected, abs=4 * error)


@pytest.mark.parametrize("estimator", ["stratified", "exact"])
def test_the_other_likelihoods_do_not_depend_on_the_schedule(estimator):
    ids, scores = torch.tensor(TEXT).repeat(3, 1), []
    for name in SCHEDULES:
        source = torch.Generator().manual_seed(0)
        scores.append(toy_model(3, noise=name).token_nll(ids, estimator=estimator, generator=source).nll)
    assert all(torch.equal(score, scores[0]) for score in scores)


# --- Writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("conditioned", [False, True])
def test_text_of_the_same_seed_is_the_same_under_every_schedule(monkeypatch, conditioned):
    # Measured in masking probability, a token is hit at a uniform time under every schedule.
    texts, levels = [], []
    for name in SCHEDULES:
        model = tiny_bd3lm(noise=name, time_conditioning=conditioned)
        seen, modulations = [], model.backbone.modulations

        def record(sigma, device, seen=seen, modulations=modulations):
            seen.append(sigma)
            return modulations(sigma, device)

        monkeypatch.setattr(model.backbone, "modulations", record)
        torch.manual_seed(0)
        options = {"max_new_tokens": 10, "do_sample": True, "eos_token_id": None}
        texts.append(model.generate(torch.tensor([[5, 6], [7, 8]]), **options))
        levels.append(seen)
    assert texts[0].shape == (2, 12)
    assert not (texts[0] == 47).any()
    assert all(torch.equal(text, texts[0]) for text in texts)
    if not conditioned:
        assert levels == [[None]] * 5
        return
    for seen in levels:
        assert torch.equal(torch.stack(seen), torch.stack(levels[0]))
