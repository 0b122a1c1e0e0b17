"""Special cases of linear layers: sharded weights, prepacked weights, and which layers' weights can be used directly.

Sharded weights (FSDP2, DeepSpeed ZeRO-3) are whole only while their module is called: both libraries gather them in
hooks around `forward`, and rely on every process making the same calls.

Prepacked weights make products with a few rows cheap on a CPU. A denoising step multiplies the rows of a block with
every weight. With weights as PyTorch stores them, 4 rows cost twice and 8 rows three times as much as 1 row. Packed
once in the order in which oneDNN reads them, they all cost the same.
"""

import functools
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


def is_sharded(module: nn.Module) -> bool:
    """Return whether the module's own weights are whole only while it is called."""
    # FSDP2 adds this method to the modules that it manages; ZeRO-3 adds an id to the weights.
    return hasattr(module, "unshard") or any(hasattr(p, "ds_id") for p in module.parameters(recurse=False))


def call_as(module: nn.Module, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call `function` instead of `module.forward`, within the module's hooks, which make its weights whole."""
    # On the instance: `module(...)` runs its hooks and then this function.
    module.forward = function
    try:
        return module(*arguments)
    finally:
        del module.forward


_MIN_WEIGHTS = 2**18  # fewer fit into a core's cache, and the call costs more than it saves
_ROWS = 32  # number of rows for which the packing is optimised; measured to suit 1 to about 100 rows


class _Packed(NamedTuple):
    state: tuple[int, int]  # address and version of the weight that was packed
    probe: torch.Tensor  # product of the weight and a fixed vector
    weight: torch.Tensor


# Not in the modules themselves: packed weights can be neither copied nor pickled.
_PACKED: "weakref.WeakKeyDictionary[nn.Module, _Packed]" = weakref.WeakKeyDictionary()


class PrepackedLinears:
    """Context manager in which a model's large linear layers compute with prepacked weights.

    It packs float32 weights of plain layers on an x86 CPU, outside autograd. The copies take as much memory as the
    weights, are kept for the next decode, and are packed again when the weights have changed. Within
    `torch.backends.mkldnn.flags(enabled=False)` nothing is packed.

    Args:
        model: the model whose layers in eval mode are packed.
        enabled: False packs nothing.
    """

    def __init__(self, model: nn.Module, enabled: bool = True) -> None:
        packable = filter(_is_packable, model.modules()) if enabled and _has_packed_products() else ()
        self.products = {layer: functools.partial(_packed_product, layer, _pack(layer)) for layer in packable}

    def __enter__(self) -> "PrepackedLinears":
        for layer, product in self.products.items():
            vars(layer)["forward"] = product
        return self

    def __exit__(self, *exception: object) -> None:
        for layer in self.products:
            vars(layer).pop("forward", None)  # another thread may have removed it


def _packed_product(layer: nn.Module, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, layer.bias, "none", [], "")


def release_prepacked(model: nn.Module) -> None:
    """Free the prepacked weights of a model's layers."""
    for module in model.modules():
        _PACKED.pop(module, None)


def _has_packed_products() -> bool:
    """Return whether oneDNN has the instructions this was measured with, in full precision and outside autograd."""
    return (
        torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
        and torch.backends.cpu.get_cpu_capability().startswith("AVX")
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def _is_packable(layer: nn.Module) -> bool:
    if not is_plain_linear(layer):
        return False
    weight = layer.weight
    return (
        isinstance(weight, torch.Tensor)
        and not layer.training
        and weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and weight.layout == torch.strided
        and weight.numel() >= _MIN_WEIGHTS
        and not weight.is_inference()
    )


def _pack(layer: nn.Module) -> torch.Tensor:
    weight: torch.Tensor = layer.weight  # type: ignore[assignment]
    # A write through `weight.data` changes neither address nor version, so the weight itself is checked too, with one
    # product: it costs as much as one token, and packing as much as several.
    state, probe = (weight.data_ptr(), weight._version), F.linear(_probe(weight.shape[1]), weight)
    packed = _PACKED.get(layer)
    if packed is None or packed.state != state or not torch.equal(packed.probe, probe):
        _PACKED.pop(layer, None)  # frees its memory before the new one is made
        packed = _Packed(state, probe, torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _ROWS))
        _PACKED[layer] = packed
    return packed.weight


def _probe(width: int) -> torch.Tensor:
    return torch.rand(1, width, generator=torch.Generator().manual_seed(0)) + 0.5


def is_plain_linear(module: nn.Module) -> bool:
    """Return whether a module computes x W^T + b from a weight that can be read directly, and nothing else.

    Layers that are quantized, offloaded, sharded, pruned, hooked or wrapped by PEFT are not plain: call them.
    """
    extended = (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)  # replaced on the instance, as accelerate's offloading does
    )
    # Quantized and sharded weights have their own classes; pruned ones are not among the parameters.
    weight = module._parameters.get("weight")
    return type(module).forward is nn.Linear.forward and type(weight) is nn.Parameter and not extended


def compute_dtype(layer: nn.Module, default: torch.dtype) -> torch.dtype:
    """Return the precision in which a linear layer takes its inputs; `default` if its weight does not show it."""
    weight = getattr(layer, "weight", None)
    # The weight of a quantized layer is a method, or of an integer or 8-bit type, in which nothing is computed.
    if isinstance(weight, torch.Tensor) and weight.is_floating_point() and weight.element_size() > 1:
        return weight.dtype
    return default
