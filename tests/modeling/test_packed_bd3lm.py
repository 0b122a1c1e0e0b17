"""Packed weights give the plain products, follow every change of weights, and are not used where they must not be."""

import copy
import gc

import peft
import pytest
import torch
import torch.nn.functional as F
from generating import batch_of, generate, prompts_of
from torch import nn

from bd3lm_hf.modeling import layers_bd3lm
from bd3lm_hf.modeling.decoding_bd3lm import BlockWriter
from bd3lm_hf.modeling.layers_bd3lm import PrepackedLinears, release_prepacked


pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or not torch.backends.cpu.get_cpu_capability().startswith("AVX"),
    reason="weights are packed for oneDNN on x86",
)


@pytest.fixture(autouse=True)
def pack_small_layers(monkeypatch):
    monkeypatch.setattr(layers_bd3lm, "_MIN_WEIGHTS", 1)


def layer_of(inputs: int = 96, outputs: int = 80, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, bias=bias).eval()


def packed(*layers: nn.Module) -> PrepackedLinears:
    with torch.no_grad():
        return PrepackedLinears(nn.ModuleList(layers))


def product(prepacked: PrepackedLinears, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with prepacked, torch.no_grad():
        return layer(x)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 96), (4, 96), (2, 8, 96), (8, 4, 96), (300, 96)])
def test_a_packed_product_is_the_product(shape, bias):
    layer = layer_of(bias=bias)
    prepacked, x = packed(layer), torch.randn(shape, generator=torch.Generator().manual_seed(1))
    assert layer in prepacked.products
    for rows in (x, x[..., :1, :]):
        torch.testing.assert_close(product(prepacked, layer, rows), layer(rows), atol=1e-5, rtol=0)
    assert "forward" not in vars(layer)


@pytest.mark.parametrize("batch", [[13], [1, 6, 12]])
def test_a_text_generated_with_packed_weights_is_the_plain_one(make_model, monkeypatch, batch):
    model, used = make_model(), []
    close = BlockWriter.close
    watched = lambda self, **how: [used.append(self.forward.prepacked.products), close(self, **how)][1]  # noqa: E731
    monkeypatch.setattr(BlockWriter, "close", watched)
    batch = batch_of(prompts_of(batch), "left")
    fast = generate(model, **batch, max_new_tokens=40)
    with torch.backends.mkldnn.flags(enabled=False):
        plain = generate(model, **batch, max_new_tokens=40)
    heavy = [module for name, module in model.named_modules() if name.endswith(("attn_qkv", "mlp.0", "linear"))]
    assert used[0].keys() >= set(heavy) and not used[1]
    assert torch.equal(fast.sequences, plain.sequences)
    for ours, theirs in zip(fast.logits, plain.logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_layers_that_fit_into_a_cores_cache_are_not_packed(monkeypatch):
    monkeypatch.undo()
    small, large = layer_of(), layer_of(1024, 256)
    assert list(packed(small, large).products) == [large]


class Negative(nn.Parameter):
    """A weight with its own class, like quantized and sharded ones."""


def _hooked(layer: nn.Linear) -> nn.Linear:
    layer.register_forward_hook(lambda module, inputs, output: -output)
    return layer


def _wrapped(layer: nn.Linear) -> nn.Module:
    config = peft.LoraConfig(target_modules=["0"], r=2, init_lora_weights=False)
    return peft.get_peft_model(nn.Sequential(layer), config).base_model.model[0].eval()


def _replaced(layer: nn.Linear) -> nn.Linear:
    layer.forward = lambda x: -F.linear(x, layer.weight)
    return layer


def _reclassed(layer: nn.Linear) -> nn.Linear:
    layer.weight = Negative(layer.weight.data)
    return layer


def _inferred(layer: nn.Linear) -> nn.Linear:
    with torch.inference_mode():
        return layer_of()


@pytest.mark.parametrize(
    "change",
    [_hooked, _wrapped, _replaced, _reclassed, _inferred, nn.Module.train, nn.Module.double, nn.Module.bfloat16],
    ids=lambda change: change.__name__,
)
def test_a_layer_that_is_more_than_a_float32_product_is_not_packed(change):
    layer = change(layer_of())
    prepacked = packed(layer)
    assert layer not in prepacked.products
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(1)).to(next(layer.parameters()).dtype)
    torch.testing.assert_close(product(prepacked, layer, x), layer(x), atol=1e-5, rtol=0)


def test_nothing_is_packed_for_another_device_a_gradient_another_precision_or_without_onednn():
    assert not packed(layer_of().to("meta")).products
    layer = layer_of()
    assert not PrepackedLinears(layer).products  # with a gradient
    with torch.autocast("cpu", torch.bfloat16):
        assert not packed(layer).products
    with torch.backends.mkldnn.flags(enabled=False):
        assert not packed(layer).products
    assert packed(layer).products


CHANGES = {
    "in place": lambda layer: layer.weight.detach()[7, 3].add_(1.0),
    "through data": lambda layer: layer.weight.data[7, 3].add_(1.0),  # which no version counter sees
    "permuted": lambda layer: layer.weight.data.copy_(layer.weight.data.flip(0)),
    "exchanged": lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight.detach() + 1.0)),
    "loaded": lambda layer: layer.load_state_dict({name: value + 1.0 for name, value in layer.state_dict().items()}),
    "bias": lambda layer: layer.bias.data.add_(1.0),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_packed_weights_follow_every_change(change):
    layer, x = layer_of(), torch.randn(4, 96, generator=torch.Generator().manual_seed(1))
    before = product(packed(layer), layer, x)
    change(layer)
    after = product(packed(layer), layer, x)
    assert not torch.allclose(before, after, atol=1e-3)
    torch.testing.assert_close(after, layer(x), atol=1e-5, rtol=0)


def test_weights_are_packed_once_and_freed_with_their_layer():
    layer, known = layer_of(), len(layers_bd3lm._PACKED)
    first, second = packed(layer), packed(layer)
    assert first.products[layer].args[1] is second.products[layer].args[1]
    assert len(layers_bd3lm._PACKED) == known + 1
    del layer, first, second
    gc.collect()
    assert len(layers_bd3lm._PACKED) <= known


def test_training_frees_packed_weights(make_model):
    model = make_model()
    generate(model, input_ids=prompts_of([5])[0][None])
    assert model.get_output_embeddings() in layers_bd3lm._PACKED
    model.train()
    assert not any(module in layers_bd3lm._PACKED for module in model.modules())
    generate(model, input_ids=prompts_of([5])[0][None])  # a model in training mode is not packed either
    assert not any(module in layers_bd3lm._PACKED for module in model.modules())
    generate(model.eval(), input_ids=prompts_of([5])[0][None])
    release_prepacked(model)
    assert not any(module in layers_bd3lm._PACKED for module in model.modules())


def test_packed_weights_are_not_part_of_the_model(make_model, tmp_path):
    model = make_model()
    names, prompt = list(model.state_dict()), prompts_of([5])[0][None]
    expected = generate(model, input_ids=prompt).sequences
    assert list(model.state_dict()) == names
    twin = copy.deepcopy(model)
    torch.save(twin, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    for other in (twin, loaded):
        assert torch.equal(generate(other, input_ids=prompt).sequences, expected)
