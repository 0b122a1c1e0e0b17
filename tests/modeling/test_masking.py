"""Ways of drawing masks: exactly k tokens of a block, and pairs of complementary streams."""

import pytest
import torch

from bd3lm_hf import BD3LMConfig
from bd3lm_hf.modeling.inputs_bd3lm import token_layout
from bd3lm_hf.modeling.loss_bd3lm import corrupt, loss_mask


def draw(model, ids, **fields):
    for name, value in fields.items():
        setattr(model.config, name, value)
    layout = token_layout(None, ids.shape[1], model.config.block_size, device=ids.device)
    scored = loss_mask(layout, ids, ignore_bos=False, training=True)
    return corrupt(model.train(), layout, scored, None, *model.interval())


def test_exact_k_masks_every_block_with_the_weight_of_its_number(tiny_model):
    ids = torch.randint(3, 40, (64, 32))
    masked, weights, _ = draw(tiny_model, ids, masking="exact_k")
    counts = masked.view(64, 8, 4).sum(-1)
    assert counts.unique(return_counts=True)[1].tolist() == [128] * 4  # stratified: 512 blocks over k = 1..4
    torch.testing.assert_close(weights.view(64, 8, 4), (4 / counts).unsqueeze(-1).expand(-1, -1, 4))


@pytest.mark.parametrize("fields", [{"masking": "exact_k"}, {"complementary": True}])
def test_the_expected_loss_is_the_exact_bound(tiny_model, fields):
    ids = torch.randint(3, 40, (1, 8))
    for name, value in fields.items():
        setattr(tiny_model.config, name, value)
    exact = tiny_model.token_nll(ids, estimator="exact")
    rows = ids.expand(4096, -1)
    with torch.no_grad():
        loss = tiny_model.train()(input_ids=rows, labels=rows, num_items_in_batch=4096).loss
    torch.testing.assert_close(loss, exact.nll.sum(), rtol=0.02, atol=0.0)


def test_a_pair_of_streams_masks_every_token_once(tiny_model):
    masked, weights, _ = draw(tiny_model, torch.randint(3, 40, (8, 32)), complementary=True)
    first, second = masked.split(32, dim=1)
    assert (first ^ second).all()
    assert torch.isfinite(weights).all() and not (weights == 1).all()
    tiny_model.set_interval(0.55, 0.95)  # above one half the published weight is one, for both streams
    assert (draw(tiny_model, torch.randint(3, 40, (8, 32)), complementary=True).weights == 1).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"masking": "all"}, "masking='all'"),
        ({"masking": "exact_k", "resample": True}, "resample=True"),
        ({"masking": "exact_k", "time_conditioning": True}, "time_conditioning=True"),
        ({"masking": "exact_k", "complementary": True}, "complementary=True"),
        ({"complementary": True, "time_conditioning": True}, "time_conditioning=False"),
    ],
)
def test_contradictory_ways_of_masking_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        BD3LMConfig(**fields)
