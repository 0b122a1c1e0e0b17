"""Score entropy: parity with the published model and sampler weights, and the entropy's defining properties."""

import pytest
import torch
from noisy_text import gradients
from published import published, recorded_noise
from published_scores import analytic_weights, denoising_weights, log_score

from bd3lm_hf import SEDDConfig, SEDDForMaskedLM
from bd3lm_hf.modeling import modeling_sedd
from bd3lm_hf.modeling.modeling_sedd import score_entropy


RECORDED = "06_mdlm_sedd"
MASK = 40


@pytest.fixture(scope="module")
def model() -> SEDDForMaskedLM:
    return published(RECORDED, SEDDForMaskedLM, SEDDConfig)


def test_logits_and_scores_are_the_published_ones(model, recorded):
    sigma = recorded["sigma"]
    logits = model(recorded["xt"], timesteps=sigma).logits
    torch.testing.assert_close(logits, recorded["sedd.logits"], atol=1e-5, rtol=0)
    scores = log_score(logits, recorded["xt"], sigma[:, 0])
    torch.testing.assert_close(scores, recorded["sedd.log_score"], atol=1e-5, rtol=0)


def test_score_entropies_are_the_published_ones(recorded):
    masked = recorded["xt"] == MASK
    sigma = recorded["sigma"].expand(masked.shape)[masked]
    entropy = score_entropy(recorded["sedd.logits"][masked], recorded["x0"][masked], sigma, MASK)
    torch.testing.assert_close(entropy, recorded["sedd.entropy"][masked], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(("case", "scale"), [("sedd.full", False), ("sedd.scale", True)])
def test_losses_are_the_published_ones(recorded, case, scale):
    model = published(RECORDED, SEDDForMaskedLM, SEDDConfig, mdlm_loss_scale=scale)
    loss = model(recorded["x0"], labels=recorded["x0"], **recorded_noise(recorded, case)).loss
    torch.testing.assert_close(loss, recorded[f"{case}.loss"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("step", [0, 1, 2])
def test_sampling_weights_are_the_published_ones(model, recorded, step):
    x_t, (sigma_t, sigma_s) = recorded["xt"], recorded[f"sedd.step{step}.sigma"].double().unbind(1)
    logits = model(x_t, timesteps=sigma_t.float()).logits
    score = log_score(logits, x_t, sigma_t.float()).double().exp()
    weights = analytic_weights(score.clone(), x_t, sigma_t, sigma_s, MASK).float()
    torch.testing.assert_close(weights, recorded[f"sedd.step{step}.analytic_probs"], atol=1e-5, rtol=0)
    weights = denoising_weights(score, x_t, sigma_t, MASK).float()
    torch.testing.assert_close(weights, recorded[f"sedd.step{step}.denoise_probs"], atol=1e-5, rtol=0)


def test_the_loss_in_chunks_equals_the_loss_at_once(recorded, monkeypatch):
    noise = recorded_noise(recorded, "sedd.full")
    results = []
    for budget in (2**23, 41 * 3):
        monkeypatch.setattr(modeling_sedd, "_LOGIT_BUDGET", budget)
        model = published(RECORDED, SEDDForMaskedLM, SEDDConfig)
        loss = model(recorded["x0"], labels=recorded["x0"], **noise).loss
        results.append({"loss": loss, **gradients(model, loss)})
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


def test_both_estimators_agree_and_more_samples_vary_less(model, recorded):
    ids = recorded["x0"]

    def totals(estimator: str, num_samples: int, count: int) -> torch.Tensor:
        options = {"estimator": estimator, "num_samples": num_samples}
        sources = (torch.Generator().manual_seed(seed) for seed in range(count))
        return torch.stack([model.token_nll(ids, generator=source, **options).nll.sum() for source in sources])

    single, spread = totals("sampled", 1, 200), totals("stratified", 8, 40)
    error = (single.var() / len(single) + spread.var() / len(spread)).sqrt()
    assert abs(single.mean() - spread.mean()) < 4 * error
    assert spread.var() < single.var() / 4


def test_an_exact_likelihood_is_refused_and_a_noise_level_required(model, recorded):
    with pytest.raises(ValueError, match="estimator='exact'.* sampled, stratified"):
        model.token_nll(recorded["x0"], estimator="exact")
    with pytest.raises(ValueError, match="time_conditioning=True: pass timesteps"):
        model(recorded["xt"])
