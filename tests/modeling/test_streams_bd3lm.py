"""Several noisy streams that share a clean stream, and noisy streams without one."""

import pytest
import torch
from noisy_text import gradients, masked_of, nll_of, random_ids
from shared_models import tiny_bd3lm

from bd3lm_hf.modeling.modeling_bd3lm import BD3LMForMaskedLM
from bd3lm_hf.modeling.noise_bd3lm import LogLinearNoise, Noise, draw_noise


def noise_of(model: BD3LMForMaskedLM, ids: torch.Tensor, num_samples: int) -> Noise:
    generator = torch.Generator().manual_seed(0)
    shape = (len(ids), model.config.num_blocks(ids.shape[1]), ids.shape[1])
    return draw_noise(*shape, num_noise_samples=num_samples, generator=generator)


def lengths_of_first_layer(model: BD3LMForMaskedLM) -> list[int]:
    """Return a list that records how many positions enter the network in each pass from now on."""
    seen: list[int] = []
    model.backbone.blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[:2].numel()))
    return seen


# --- Several samples -------------------------------------------------------------------------------------------------

PADDED = torch.ones(3, 18, dtype=torch.long)
PADDED[0, :3] = 0
PADDED[1, 13:] = 0
CASES = {
    "whole blocks": ({}, {}),
    "short last block": ({"length": 18}, {}),
    "padding": ({"length": 18, "attention_mask": PADDED}, {}),
    "prompt": ({"length": 18, "prompt": 6}, {}),
    "clipped": ({}, {"sampling_eps_min": 0.3, "sampling_eps_max": 0.8}),
    "weight one": ({}, {"sampling_eps_min": 0.55, "sampling_eps_max": 0.95}),
    "resampled": (
        {"length": 18, "attention_mask": PADDED},
        {"resample": True, "sampling_eps_min": 0.25, "sampling_eps_max": 0.5},
    ),
    "cosine": ({}, {"noise": "cosine"}),
    "one block": ({"attention_mask": PADDED[:, :16]}, {"block_size": 32}),
    "block size one": ({"length": 7}, {"block_size": 1}),
}


def case_of(name: str):
    """Return a model in train mode, and the arguments of its loss without noise."""
    inputs, fields = CASES[name]
    model = tiny_bd3lm(**fields).train()
    ids = random_ids(3, inputs.get("length", 16))
    labels = ids.clone()
    labels[:, : inputs.get("prompt", 0)] = -100
    arguments = {"input_ids": ids, "labels": labels}
    if "attention_mask" in inputs:
        arguments["attention_mask"] = inputs["attention_mask"]
        arguments["labels"] = labels.masked_fill(inputs["attention_mask"] == 0, -100)
    return model, arguments


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("case", CASES)
def test_the_loss_of_several_samples_is_the_mean_of_single_ones_with_its_gradient(case, implementation):
    model, arguments = case_of(case)
    model.set_attn_implementation(implementation)
    noise = noise_of(model, arguments["input_ids"], 3)
    together = model(**arguments, **noise._asdict()).loss
    found = gradients(model, together)
    singles = [{name: field[:, draw] for name, field in noise._asdict().items()} for draw in range(3)]
    losses = [model(**arguments, **single).loss for single in singles]
    mean = torch.stack(losses).mean()
    assert len({round(loss.item(), 4) for loss in losses}) == 3
    torch.testing.assert_close(together, mean, rtol=1e-5, atol=0)
    for name, expected in gradients(model, mean).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=2e-6, msg=name)


def test_the_clean_stream_enters_the_network_once_for_all_samples(tiny_model):
    seen, ids = lengths_of_first_layer(tiny_model), random_ids(2, 16)
    tiny_model(input_ids=ids, labels=ids, **noise_of(tiny_model, ids, 3)._asdict()).loss.backward()
    assert seen == [2 * (1 + 3) * 16]


# --- Texts of one block ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize("cross_attn", [True, False])
def test_a_text_of_one_block_is_scored_without_a_clean_stream(implementation, cross_attn):
    model = tiny_bd3lm(block_size=32, cross_attn=cross_attn)
    model.set_attn_implementation(implementation)
    seen, ids, mask = lengths_of_first_layer(model), random_ids(3, 18), PADDED
    noise = noise_of(model, ids, 1)
    masked, weights, _ = masked_of(model, ids, mask, noise)
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids, attention_mask=mask, num_items_in_batch=1, **noise._asdict()).loss
        assert seen == [3 * 18]
        nll = nll_of(model, ids.masked_fill(masked, 47), ids, attention_mask=mask)
    torch.testing.assert_close(loss, (nll * weights).sum().float(), rtol=1e-5, atol=0)


def test_the_likelihood_of_one_block_needs_no_clean_stream():
    model, ids = tiny_bd3lm(block_size=8), random_ids(2, 8)
    seen = lengths_of_first_layer(model)
    alone = model.token_nll(ids, estimator="exact")
    assert sum(seen) == 2 * 8 * 127  # the first token is given
    # The same block before another one, which it cannot see, has a clean stream.
    both = model.token_nll(torch.cat([ids, ids], dim=1), estimator="exact")
    torch.testing.assert_close(both.nll[:, :8], alone.nll, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prompts", [[1], [2, 6]])
def test_generation_has_the_noise_level_of_the_first_block_as_in_training(make_model, prompts):
    model, levels = make_model(time_conditioning=True), []
    model.backbone.sigma_map.register_forward_pre_hook(lambda module, inputs: levels.append(inputs[0].clone()))
    width = max(prompts)
    ids = torch.full((len(prompts), width), 5)
    mask = torch.tensor([[0] * (width - n) + [1] * n for n in prompts])
    model.generate(ids, attention_mask=mask, max_new_tokens=10, eos_token_id=None, do_sample=False)
    lowest = LogLinearNoise().sigma(torch.tensor(1e-3))
    seen = torch.stack(levels)
    first = [4 - n if n < 4 else 0 for n in prompts]  # masked tokens of the first block, revealed one in each step
    for row, steps in enumerate(first):
        others = seen[:, row].isclose(lowest)
        assert int((~others).sum()) == steps and bool(others[steps:].all())
