"""The analytic sampler of scores: the published distribution of each step, with one number per position."""

import math
from types import SimpleNamespace

import pytest
import torch
from published import published
from published_scores import analytic_weights, denoising_weights, log_score

from bd3lm_hf import SEDDConfig, SEDDForMaskedLM
from bd3lm_hf.modeling.generation_config_bd3lm import SEDDGenerationConfig
from bd3lm_hf.modeling.noise_bd3lm import LogLinearNoise
from bd3lm_hf.modeling.samplers_bd3lm import LAST_TIME, AnalyticSampler, RevealState


RECORDED = "06_mdlm_sedd"
MASK = 40


@pytest.fixture(scope="module")
def model() -> SEDDForMaskedLM:
    return published(RECORDED, SEDDForMaskedLM, SEDDConfig)


def make(mask_token_id: int = MASK, **fields) -> AnalyticSampler:
    config = SimpleNamespace(mask_token_id=mask_token_id, noise="loglinear", time_conditioning=True)
    return AnalyticSampler(SEDDGenerationConfig(**fields), config)


def round_of(masked: torch.Tensor, seed: int = 0, **fields) -> RevealState:
    requested = torch.ones_like(masked)
    return RevealState(masked.clone(), requested, **{"generator": torch.Generator().manual_seed(seed), **fields})


def published_nucleus(log_scores: torch.Tensor, p: float) -> torch.Tensor:
    """Return the score that the published sampler uses: normalised and cut off at p, the mask included."""
    probabilities = log_scores.double().softmax(-1)
    ranked, order = probabilities.sort(dim=-1, descending=True)
    kept = ranked.cumsum(-1) <= p
    kept[..., 0] = True
    cut = torch.zeros_like(probabilities).scatter(-1, order, ranked * kept)
    return cut / cut.sum(-1, keepdim=True)


@pytest.mark.parametrize("nucleus_p", [1.0, 0.99, 0.9, 0.5])
@pytest.mark.parametrize("step", [0, 1, 2, None])
@pytest.mark.parametrize("loudness", [0.0, 4.0, -4.0])
def test_a_step_has_the_published_distribution(model, recorded, step, nucleus_p, loudness):
    # Scores above true ratios reveal a position with a probability above 1; the mask's negative weight counts as zero.
    x_t, final = recorded["xt"], step is None
    sigma_t, sigma_s = recorded[f"sedd.step{step or 0}.sigma"][0].double()
    sigmas = sigma_t.expand(len(x_t))
    logits = model(x_t, timesteps=sigmas.float()).logits + loudness
    score = log_score(logits, x_t, sigmas.float())
    score = score.double().exp() if nucleus_p == 1.0 else published_nucleus(score, nucleus_p)
    if final:
        weights = denoising_weights(score, x_t, sigmas, MASK)
    else:
        weights = analytic_weights(score, x_t, sigmas, sigma_s.expand(len(x_t)), MASK)
    expected = weights[x_t == MASK].clamp(min=0)
    known = expected.sum(1) > 0  # in the last step possibly no token but the mask is left, which leaves it undefined
    assert known.all() or final
    expected = expected[known] / expected[known].sum(1, keepdim=True)

    sampler = make(nucleus_p=nucleus_p)
    sampler._sigma, sampler._rise = float(sigma_t), math.inf if final else math.expm1(float(sigma_t - sigma_s))
    scores, reveal_prob = sampler._apply_nucleus(logits[x_t == MASK])
    ours = reveal_prob.double().unsqueeze(1) * scores.double().softmax(1)
    ours[:, MASK] = 1 - reveal_prob.double()
    torch.testing.assert_close(ours[known], expected, atol=1e-5, rtol=0)
    assert (scores.softmax(1)[:, MASK] == 0).all()


def test_a_small_nucleus_decides_which_tokens_are_drawn_and_which_positions_stay_masked():
    sampler = make(mask_token_id=3, nucleus_p=0.5)
    # No token is in the nucleus: the position stays masked until the last step.
    logits = torch.tensor([[-20.0, -19.0, -21.0, 0.0]])
    sampler._sigma, sampler._rise = 0.01, 0.5
    assert sampler._apply_nucleus(logits)[1].tolist() == [0.0]
    sampler._rise = math.inf
    scores, reveal_prob = sampler._apply_nucleus(logits)
    assert reveal_prob.tolist() == [1.0]
    torch.testing.assert_close(scores[:, :3].softmax(1), logits[:, :3].softmax(1), atol=1e-3, rtol=0)
    assert scores[0, 3] == -torch.inf
    # A token outside of it is never drawn, and still there when the others are forbidden.
    logits = torch.tensor([[9.0, 2.0, 1.0, 0.0]])
    sampler._sigma, sampler._rise = 3.0, 0.5
    scores, _ = sampler._apply_nucleus(logits)
    assert scores.softmax(1).tolist() == [[1.0, 0.0, 0.0, 0.0]]
    torch.testing.assert_close(scores[:, 1:3].softmax(1), logits[:, 1:3].softmax(1), atol=1e-3, rtol=0)
    # A step within the capped noise level reveals only what the nucleus leaves no mask for.
    sampler._rise = 0.0
    assert sampler._apply_nucleus(torch.cat([logits, torch.zeros(1, 4)]))[1].tolist() == [1.0, 0.0]


def test_the_grid_is_the_published_one_and_ends_with_a_denoising():
    sampler, work = make(num_denoising_steps=4), round_of(torch.tensor([[True, True, False]]))
    times, sigmas, growths = [], [], []
    for step in sampler.steps(work):
        assert step.positions.tolist() == [0, 1] and step.mask_prob.shape == (1,)
        times.append(float(step.mask_prob))
        sigmas.append(sampler._sigma)
        growths.append(sampler._rise)
    expected = torch.linspace(1, LAST_TIME, 5, dtype=torch.float64)
    torch.testing.assert_close(torch.tensor(times), expected.float())
    torch.testing.assert_close(torch.tensor(sigmas).double(), LogLinearNoise().sigma(expected), atol=1e-6, rtol=1e-6)
    assert growths == [math.expm1(a - b) for a, b in zip(sigmas, sigmas[1:], strict=False)] + [math.inf]


def test_by_default_there_are_as_many_steps_as_tokens_in_a_window():
    assert len(list(make().steps(round_of(torch.ones(1, 7, dtype=torch.bool))))) == 7 + 1


def test_rows_that_are_done_are_not_predicted_and_steps_end_with_the_last_mask():
    sampler, work = make(num_denoising_steps=9), round_of(torch.tensor([[True, False], [True, True]]))
    work.requested[1, 1] = False
    steps = sampler.steps(work)
    assert next(steps).positions.tolist() == [0, 2, 3]
    work.masked[0, 0] = False
    assert next(steps).positions.tolist() == [2, 3]
    work.masked[1, 0] = False
    assert next(steps, None) is None


# Scores of true ratios: log s_v = log p_v - log(e^sigma - 1).
TRUE = torch.tensor([0.5, 0.3, 0.2, 1.0]).log() + math.log(3)


def test_without_sampling_positions_are_revealed_evenly_from_left_to_right():
    sampler, work = make(mask_token_id=3, num_denoising_steps=4), round_of(torch.ones(1, 8).bool(), do_sample=False)
    revealed = []
    for step in sampler.steps(work):
        narrowed, kept = sampler.select(work, step, TRUE.expand(len(step.positions), -1))
        assert len(kept) == len(narrowed.positions)
        work.masked.view(-1)[narrowed.positions] = False
        revealed.append(narrowed.positions.tolist())
    assert revealed == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_text_readers_get_positions_from_left_to_right():
    work = round_of(torch.ones(50, 8, dtype=torch.bool), left_to_right=True)
    logits = TRUE.expand(50 * 8, -1) + 2 * torch.randn(50 * 8, 1, generator=torch.Generator().manual_seed(1))
    sampler, done = make(mask_token_id=3, num_denoising_steps=6), torch.zeros(50, 8, dtype=torch.bool)
    for step in sampler.steps(work):
        narrowed, _ = sampler.select(work, step, logits[step.positions])
        work.masked.view(-1)[narrowed.positions] = False
        done.view(-1)[narrowed.positions] = True
        assert (done == done.cumprod(1).bool()).all()  # from the left
    assert done.all()
