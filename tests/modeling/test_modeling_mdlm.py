"""Masked diffusion: parity with the published one, and what it shares with block diffusion."""

import pytest
import torch
from generating import MASK, make_family
from published import published, recorded_noise

from bd3lm_hf import BD3LMForMaskedLM, MDLMConfig, MDLMForMaskedLM
from bd3lm_hf.modeling.cache_bd3lm import BlockCache


RECORDED = "06_mdlm_sedd"


def test_logits_are_the_published_ones(recorded):
    model = published(RECORDED, MDLMForMaskedLM, MDLMConfig)
    torch.testing.assert_close(model(recorded["xt"]).logits, recorded["mdlm.logits"], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("case", "scale", "training"),
    [("mdlm.full", False, False), ("mdlm.scale", True, False), ("mdlm.train", False, True)],
)
def test_losses_are_the_published_ones(recorded, case, scale, training):
    model = published(RECORDED, MDLMForMaskedLM, MDLMConfig, mdlm_loss_scale=scale).train(training)
    loss = model(recorded["x0"], labels=recorded["x0"], **recorded_noise(recorded, case)).loss
    torch.testing.assert_close(loss, recorded[f"{case}.loss"], atol=1e-5, rtol=0)


def two_models() -> tuple[MDLMForMaskedLM, BD3LMForMaskedLM]:
    """Return a masked diffusion model, and block diffusion of one block with the same weights."""
    return make_family("mdlm"), make_family("bd3lm", model_length=8, block_size=8)


def test_block_diffusion_with_one_block_is_masked_diffusion():
    mdlm, bd3lm = two_models()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 11, (3, 8), generator=generator)
    noise = {"block_noise": torch.rand(3, 1, generator=generator)}
    noise["token_noise"] = torch.rand(3, 8, generator=generator)
    for training in (False, True):
        losses = [model.train(training)(ids, labels=ids, **noise).loss for model in (mdlm, bd3lm)]
        torch.testing.assert_close(*losses, atol=1e-6, rtol=0)
    for loss in losses:
        loss.backward()
    gradients = [{name: p.grad for name, p in model.named_parameters()} for model in (mdlm, bd3lm)]
    assert gradients[0]["backbone.vocab_embed.embedding"].any()
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=0)
    for estimator in ("exact", "stratified", "sampled"):
        scores = [
            model.eval().token_nll(ids, estimator=estimator, generator=torch.Generator().manual_seed(1)).nll
            for model in (mdlm, bd3lm)
        ]
        torch.testing.assert_close(*scores, atol=1e-6, rtol=0)
    x_t = ids.clone()
    x_t[:, 3:6] = MASK
    torch.testing.assert_close(mdlm(x_t).logits, bd3lm(x_t, clean_input_ids=ids).logits, atol=1e-6, rtol=0)


def test_a_text_beyond_the_window_is_refused():
    model = make_family("mdlm")
    ids = torch.zeros(1, 9, dtype=torch.long)
    for call in (lambda: model(ids), lambda: model(ids, labels=ids), lambda: model.token_nll(ids)):
        with pytest.raises(ValueError, match="tokens does not fit the window, model_length=8"):
            call()


def test_packed_documents_exceed_the_window_only_together():
    model = make_family("mdlm").eval()
    ids = torch.randint(3, 47, (1, 14), generator=torch.Generator().manual_seed(0))
    noise = {"block_noise": torch.rand(1, 2), "token_noise": torch.rand(1, 14)}
    with torch.no_grad():
        packed = model(ids, labels=ids, position_ids=torch.arange(14).unsqueeze(0) % 7, **noise).loss
        rows = {"block_noise": noise["block_noise"].view(2, 1), "token_noise": noise["token_noise"].view(2, 7)}
        apart = model(ids.view(2, 7), labels=ids.view(2, 7), **rows).loss
    torch.testing.assert_close(packed, apart)


def test_a_cache_that_holds_a_text_is_refused():
    model, cache = two_models()[0], BlockCache()
    model(torch.arange(8).unsqueeze(0), past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="past_key_values does not fit this model: its block of 8 tokens fills"):
        model.generate(torch.arange(8).unsqueeze(0), max_new_tokens=2, past_key_values=cache)
