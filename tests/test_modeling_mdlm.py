"""Masked diffusion: parity with the published one, and what it shares with block diffusion."""

import pytest
import torch
from published import load_recorded, published, recorded_noise

from bd3lm_hf import BD3LMConfig, BD3LMForMaskedLM, MDLMConfig, MDLMForMaskedLM


SIZES = {"vocab_size": 12, "model_length": 8, "hidden_dim": 16, "cond_dim": 8, "n_blocks": 2, "n_heads": 2}


@pytest.fixture(scope="module")
def recorded() -> dict[str, torch.Tensor]:
    return load_recorded("06_mdlm_sedd")


def test_logits_are_the_published_ones(recorded):
    model = published("06_mdlm_sedd", MDLMForMaskedLM, MDLMConfig)
    torch.testing.assert_close(model(recorded["xt"]).logits, recorded["mdlm.logits"], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("case", "scale", "training"),
    [("mdlm.full", False, False), ("mdlm.scale", True, False), ("mdlm.train", False, True)],
)
def test_losses_are_the_published_ones(recorded, case, scale, training):
    model = published("06_mdlm_sedd", MDLMForMaskedLM, MDLMConfig, mdlm_loss_scale=scale).train(training)
    loss = model(recorded["x0"], labels=recorded["x0"], **recorded_noise(recorded, case)).loss
    torch.testing.assert_close(loss, recorded[f"{case}.loss"], atol=1e-5, rtol=0)


def two_models(randomize):
    mdlm = randomize(MDLMForMaskedLM(MDLMConfig(**SIZES, dropout=0.0))).eval()
    bd3lm = BD3LMForMaskedLM(BD3LMConfig(**SIZES, dropout=0.0, block_size=8)).eval()
    bd3lm.load_state_dict(
        {**mdlm.state_dict(), "sampling_eps_min": torch.tensor(1e-3), "sampling_eps_max": torch.ones(())}
    )
    return mdlm, bd3lm


def test_block_diffusion_with_one_block_is_masked_diffusion(randomize):
    mdlm, bd3lm = two_models(randomize)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 11, (3, 8), generator=generator)
    noise = {
        "block_noise": torch.rand(3, 1, generator=generator),
        "token_noise": torch.rand(3, 8, generator=generator),
    }
    for training in (False, True):
        losses = [model.train(training)(ids, labels=ids, **noise).loss for model in (mdlm, bd3lm)]
        torch.testing.assert_close(*losses, atol=1e-6, rtol=0)
    for estimator in ("exact", "stratified", "sampled"):
        scores = [
            model.eval().token_nll(ids, estimator=estimator, generator=torch.Generator().manual_seed(1)).nll
            for model in (mdlm, bd3lm)
        ]
        torch.testing.assert_close(*scores, atol=1e-6, rtol=0)
    x_t = ids.clone()
    x_t[:, 3:6] = 11
    torch.testing.assert_close(mdlm(x_t).logits, bd3lm(x_t, clean_input_ids=ids).logits, atol=1e-6, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_scores_as_if_it_stood_alone(randomize, side):
    mdlm, _ = two_models(randomize)
    ids = torch.randint(0, 11, (2, 8), generator=torch.Generator().manual_seed(1))
    real = slice(3, 8) if side == "left" else slice(0, 5)
    mask = torch.ones_like(ids)
    mask[1] = 0
    mask[1, real] = 1

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in (3, 4)]

    both = mdlm.token_nll(ids, mask, estimator="stratified", num_samples=3, generator=generators())
    alone = mdlm.token_nll(ids[1:, real], estimator="stratified", num_samples=3, generator=generators()[1:])
    torch.testing.assert_close(both.nll[1, real], alone.nll[0], atol=1e-5, rtol=0)


def test_the_exact_bound_equals_the_mean_of_draws(randomize):
    mdlm, _ = two_models(randomize)
    ids = torch.randint(0, 11, (1, 5), generator=torch.Generator().manual_seed(2))
    exact = mdlm.token_nll(ids, estimator="exact").nll.sum()

    def draw(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return mdlm.token_nll(ids, estimator="stratified", num_samples=4, generator=generator).nll.sum()

    draws = torch.stack([draw(seed) for seed in range(200)])
    assert abs(draws.mean() - exact) < 4 * draws.std() / len(draws) ** 0.5


def test_a_text_beyond_the_window_is_refused():
    model = MDLMForMaskedLM(MDLMConfig(**SIZES))
    ids = torch.zeros(1, 9, dtype=torch.long)
    for call in (lambda: model(ids), lambda: model(ids, labels=ids), lambda: model.token_nll(ids)):
        with pytest.raises(ValueError, match="tokens does not fit the window, model_length=8"):
            call()
