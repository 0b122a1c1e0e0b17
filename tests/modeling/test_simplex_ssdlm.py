"""Schedule, noise and projections of simplex diffusion, against the published ones and their definitions."""

import pytest
import torch

from bd3lm_hf.modeling.simplex_ssdlm import (
    almost_one_hot,
    noisy_logits,
    nucleus,
    project_by_sampling,
    project_evenly,
    project_unevenly,
    simplex_alpha_bar,
)


RECORDED = "11_ssdlm"
K, TOP_P = 5.0, 0.95


def test_the_schedule_is_the_published_one(recorded):
    now, before = (simplex_alpha_bar(recorded["sched.t"] - back, 1000) for back in (0, 1))
    found = (now, before, now / before)
    published = tuple(recorded[f"sched.{name}"] for name in ("alpha_t_bar", "alpha_t_minus_bar", "alpha_t"))
    torch.testing.assert_close(found, published, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("project", "name"), [(project_evenly, "even"), (project_unevenly, "uneven")])
def test_projections_are_the_published_ones(recorded, project, name):
    projected = project(recorded["proj.logits"], K, TOP_P)
    torch.testing.assert_close(projected.logits, recorded[f"proj.{name}"], atol=1e-5, rtol=0)
    assert torch.equal(projected.input_ids, recorded["proj.logits"].argmax(-1))


def test_sampling_draws_from_the_published_probabilities(recorded):
    seen = []

    def draw(scores: torch.Tensor) -> torch.Tensor:
        seen.append(scores.softmax(-1))
        return recorded["proj.sampled_ids"].flatten()

    projected = project_by_sampling(recorded["proj.logits"], K, TOP_P, draw)
    torch.testing.assert_close(seen[0].view(2, 3, -1), recorded["proj.sampling_probs"], atol=1e-6, rtol=0)
    assert torch.equal(projected.logits, recorded["proj.sampling"].float())
    assert torch.equal(projected.input_ids, recorded["proj.sampled_ids"])


def test_noise_is_added_as_published(recorded):
    clean = almost_one_hot(recorded["train.diffusion_ids"], 41, K)
    assert torch.equal(clean, recorded["train.clean_logits"].float())
    alpha_bar = simplex_alpha_bar(recorded["train.t"], 1000)
    noisy = noisy_logits(clean, alpha_bar, recorded["train.normal"], K)
    torch.testing.assert_close(noisy, recorded["train.noisy_logits"], atol=1e-5, rtol=0)
    torch.testing.assert_close(noisy.softmax(-1), recorded["train.simplex"], atol=1e-6, rtol=0)


def test_the_nucleus_keeps_the_token_that_crosses():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert nucleus(logits, 0.9).tolist() == [True, True, True, False]
    assert nucleus(logits, 0.7).tolist() == [True, True, False, False]
    assert nucleus(logits, 1e-9).tolist() == [True, False, False, False]
    assert nucleus(logits, 1.0).all()
