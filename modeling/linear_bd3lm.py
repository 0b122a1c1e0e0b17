"""Weights that are spread over processes (FSDP2, DeepSpeed ZeRO-3): a module's are whole only while it is called.

Both gather a module's weights in hooks around its `forward`, and count on every process making the same calls.

Products of a few rows with large weights on a CPU: weights packed once, so that only reading them costs time.

A denoising step multiplies the rows of a block with every weight. With weights as PyTorch stores them 4 rows cost
twice and 8 rows three times what 1 row costs; packed in the order in which oneDNN reads them, they cost the same.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


def is_sharded(module: nn.Module) -> bool:
    """Whether a module has weights of its own that only a call of it makes whole."""
    # FSDP2 gives the modules that it manages this method; ZeRO-3 gives the weights an id.
    return hasattr(module, "unshard") or any(hasattr(p, "ds_id") for p in module.parameters(recurse=False))


def call_as(module: nn.Module, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call `function` in the place of `module.forward`, with the module's hooks around it: its weights are whole."""
    module.forward = function
    try:
        return module(*arguments)
    finally:
        del module.forward


_LEAST_WEIGHTS = 2**18  # of a layer; with fewer, which a core's cache holds, the call costs more than it spares


_ROWS = 32  # the number of rows that the packing is chosen for; it serves 1 to some 100 rows well


class _Packed(NamedTuple):
    state: tuple[int, int]  # address and version of the weight that was packed
    probe: torch.Tensor  # what the weight makes of a fixed vector
    weight: torch.Tensor


# Beside the modules, not in them: packed weights can be neither copied nor pickled.
_PACKED: "weakref.WeakKeyDictionary[nn.Module, _Packed]" = weakref.WeakKeyDictionary()


class PrepackedLinears:
    """Calls linear layers, by packed weights where there are some: `linears(layer, x)` for `layer(x)`.

    Packed are float32 weights of plain layers on an x86 CPU, whose products need no gradient. They take as much memory
    as the weights themselves, are kept for the next decode, and are packed again when the weights have changed. Within
    `torch.backends.mkldnn.flags(enabled=False)` nothing is packed.

    Args:
        layers: modules that will be called; all others are called as they are.
    """

    def __init__(self, layers: Sequence[nn.Module] = ()) -> None:
        packable = [layer for layer in layers if _is_packable(layer)] if layers and _has_packed_products() else []
        self._weights = {layer: _pack(layer) for layer in packable}

    def __len__(self) -> int:
        return len(self._weights)

    def __contains__(self, layer: nn.Module) -> bool:
        return layer in self._weights

    def __call__(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        weight = self._weights.get(layer)
        if weight is None:
            return layer(x)
        return torch.ops.mkldnn._linear_pointwise(x, weight, layer.bias, "none", [], "")


NOT_PREPACKED = PrepackedLinears()  # calls every layer as it is


def release_prepacked(model: nn.Module) -> None:
    """Free the packed weights of a model's layers."""
    for module in model.modules():
        _PACKED.pop(module, None)


def _has_packed_products() -> bool:
    """oneDNN with the instructions that this was measured with, in full precision and outside of autograd."""
    return (
        torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
        and torch.backends.cpu.get_cpu_capability().startswith("AVX")
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def _is_packable(layer: nn.Module) -> bool:
    weight = layer._parameters.get("weight")
    return (
        is_plain_linear(layer)
        and not layer.training
        and type(weight) is nn.Parameter  # no subclass, such as those of quantized or sharded weights
        and weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and weight.layout == torch.strided
        and weight.numel() >= _LEAST_WEIGHTS
        and not weight.is_inference()
    )


def _pack(layer: nn.Module) -> torch.Tensor:
    weight: torch.Tensor = layer.weight  # type: ignore[assignment]
    # A write through `weight.data` leaves address and version as they are, so the weight itself is asked too: one
    # product, what a token costs, where packing costs as much as several.
    state, probe = (weight.data_ptr(), weight._version), F.linear(_probe(weight.shape[1]), weight)
    known = _PACKED.get(layer)
    if known is None or known.state != state or not torch.equal(known.probe, probe):
        _PACKED.pop(layer, None)  # frees its memory before the new one is made
        known = _Packed(state, probe, torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _ROWS))
        _PACKED[layer] = known
    return known.weight


def _probe(width: int) -> torch.Tensor:
    return torch.rand(1, width, generator=torch.Generator().manual_seed(0)) + 0.5


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module computes x W^T + b and nothing else: not one that PEFT or a hook has extended."""
    extended = (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or "forward" in vars(module)
    )
    return type(module).forward is nn.Linear.forward and not extended


__all__ = ["NOT_PREPACKED", "PrepackedLinears", "call_as", "is_plain_linear", "is_sharded", "release_prepacked"]
