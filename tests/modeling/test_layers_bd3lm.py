"""The layers: the lean linear layer beside the plain one."""

import pytest
import torch
import torch.nn.functional as F

from bd3lm_hf.modeling import layers_bd3lm
from bd3lm_hf.modeling.modeling_bd3lm import BD3LMForMaskedLM
from bd3lm_hf.modeling.noise_bd3lm import draw_noise


def random_ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 47, (rows, length), generator=torch.Generator().manual_seed(seed))


def given_noise(rows: int, blocks: int, length: int, seed: int = 0) -> dict[str, torch.Tensor]:
    return draw_noise(rows, blocks, length, generator=torch.Generator().manual_seed(seed))._asdict()


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_the_lean_linear_layer_equals_the_plain_one_with_all_gradients(tiny_model, monkeypatch):
    ids, noise, found = random_ids(2, 16), given_noise(2, 4, 16), []
    calls = []
    lean = layers_bd3lm._LeanLinear.apply
    monkeypatch.setattr(layers_bd3lm._LeanLinear, "apply", lambda *arguments: calls.append(1) or lean(*arguments))
    for spares in (None, lambda *arguments: False):
        if spares is not None:
            monkeypatch.setattr(layers_bd3lm, "_spares_memory", spares)
        loss = tiny_model.train()(input_ids=ids, labels=ids, **noise).loss
        found.append((loss.detach(), gradients(tiny_model, loss)))
        assert len(calls) == 4  # attn_out and mlp.2 of two layers, in the first round only
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-6, atol=0)
    for name, gradient in found[1][1].items():
        assert gradient.any(), name
        torch.testing.assert_close(found[0][1][name], gradient, rtol=2e-5, atol=1e-7)


def test_a_time_conditioned_model_learns_from_a_batch_with_one_masked_token(tiny_config, randomize):
    tiny_config.time_conditioning = True
    model, ids = randomize(BD3LMForMaskedLM(tiny_config)).train(), random_ids(2, 16)
    noise = {**given_noise(2, 4, 16), "token_noise": torch.full((2, 16), 2.0)}
    noise["token_noise"][1, 5] = 0.0
    model(input_ids=ids, labels=ids, **noise).loss.backward()
    assert model.backbone.blocks[-1].adaLN_modulation.weight.grad.any()


@pytest.mark.parametrize("frozen", [["weight"], ["bias"], ["gate"], ["weight", "gate"], ["x"], []])
@pytest.mark.parametrize("activation", [None, torch.nn.GELU(approximate="tanh")])
def test_the_lean_linear_layer_gives_gradients_to_what_needs_them(frozen, activation):
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (3, 5, 6), "weight": (4, 6), "bias": (4,), "gate": (4,)}
    tensors = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_(name not in frozen)
        for name, shape in shapes.items()
    }
    x, weight, bias, gate = tensors.values()
    wanted = [tensor for tensor in tensors.values() if tensor.requires_grad]
    found = layers_bd3lm._LeanLinear.apply(x, weight, bias, gate, activation)
    expected = F.linear(x if activation is None else activation(x), weight, bias) * gate
    torch.testing.assert_close(found, expected)
    factor = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad((found * factor).sum(), wanted),
        torch.autograd.grad((expected * factor).sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
