"""The layers of the diffusion transformer (DiT with adaLN and rotary positions; arXiv 2503.09573).

Names and structure are those of the published checkpoints. Linear layers have special cases at the end: sharded and
prepacked weights, and which layers' weights can be used directly.
"""

import functools
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention_bd3lm import AttentionPlan, BD3LMAttention, Tile, in_memory
from .cache_bd3lm import StepCache
from .configuration_bd3lm import BD3LMConfig
from .noise_bd3lm import wide_float


_FREQUENCY_DIM = 256  # sinusoidal features of the noise level


class BD3LMEmbedding(nn.Embedding):
    """An embedding whose table is called `embedding` in the weights, as published, and `weight` in code."""

    embedding: nn.Parameter

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        return self.embedding

    def __setattr__(self, name: str, value: torch.Tensor | nn.Module) -> None:
        super().__setattr__("embedding" if name == "weight" else name, value)

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.embedding, a=math.sqrt(5))


class BD3LMLayerNorm(nn.Module):
    """Layer norm with a weight and no bias, in float32, modulated by adaLN: norm(x) * w * (1 + scale) + shift."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(
        self, x: torch.Tensor, shift: torch.Tensor | None = None, scale: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Normalise `(..., dim)`; `shift` and `scale` are `(dim,)`, or broadcast over x if rows differ."""
        # The weight is read only here: offloaded weights exist only while their module is called.
        weight = self.weight.float()
        if scale is not None:
            weight = weight * (1 + scale.float())
        bias = None if shift is None else shift.float()
        if weight.dim() == 1:
            # With the same modulation for all rows this is an affine layer norm: one kernel instead of three.
            return F.layer_norm(x.float(), weight.shape, weight, bias, eps=1e-5).to(x.dtype)
        normed = F.layer_norm(x.float(), x.shape[-1:], eps=1e-5) * weight
        return (normed if bias is None else normed + bias).to(x.dtype)


class BD3LMZeroLinear(nn.Linear):
    """A linear layer that starts at zero: adaLN and the head.

    It has its own class because transformers initialises custom code leaf by leaf: `_init_weights` is never called for
    a module without weights, so a parent cannot zero its layers.
    """


class TimestepEmbedder(nn.Module):
    """Sinusoidal features of the noise level sigma (cosines first), then a two-layer perceptron."""

    def __init__(self, cond_dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(_FREQUENCY_DIM, cond_dim), nn.SiLU(), nn.Linear(cond_dim, cond_dim))

    def forward(self, sigma: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Embed noise levels `(batch,)`; `dtype` is the precision of the model, for a quantized layer."""
        # As in DiT: frequencies from 1 down to 1/10000, geometrically spaced.
        half = _FREQUENCY_DIM // 2
        frequencies = torch.exp(-math.log(10000) / half * torch.arange(half, device=sigma.device, dtype=torch.float32))
        angles = sigma.float()[:, None] * frequencies
        features = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.mlp(features.to(compute_dtype(self.mlp[0], dtype)))


class BD3LMRotaryEmbedding(nn.Module):
    """Rotary positions. The published buffer `inv_freq` is saved with the weights, but not used.

    Casting the whole model to bfloat16 casts the buffer too, which would rotate position 1023 by half a radian more.
    So the angles are computed from their definition, in float64 where the device has it: exact at any position.
    """

    inv_freq: torch.Tensor

    def __init__(self, config: BD3LMConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.register_buffer("inv_freq", self.frequencies(torch.float32), persistent=True)

    def frequencies(self, dtype: torch.dtype, device: torch.device | None = None) -> torch.Tensor:
        """Return 10000^(-2 i / head_dim) for each rotated pair i, `(head_dim / 2,)`."""
        exponents = torch.arange(0, self.head_dim, 2, dtype=dtype, device=device) / self.head_dim
        return 10000.0**-exponents

    def forward(self, position_ids: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosines and sines `(batch or 1, length, 1, head_dim / 2)` for positions `(batch or 1, length)`."""
        wide = wide_float(position_ids.device)
        angles = position_ids.to(wide).unsqueeze(-1) * self.frequencies(wide, position_ids.device)
        # All layers read them; recomputed in a GPU kernel, their float64 arithmetic would take longer than the rest.
        cos, sin = (in_memory(x.to(dtype)) for x in (angles.cos(), angles.sin()))
        return cos.unsqueeze(2), sin.unsqueeze(2)


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the two halves of the last axis (NeoX convention); `x` is `(batch, length, heads, head_dim)`."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


@dataclass
class ForwardContext:
    """Inputs that all layers of one forward pass share."""

    plan: AttentionPlan
    cos: torch.Tensor
    sin: torch.Tensor
    cache: StepCache | None = None
    output_indices: torch.Tensor | None = None  # flat indices of the positions that the head reads

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "ForwardContext":
        """Move the tensors, for layers that accelerate has placed on several devices."""

        def move(x: Any) -> Any:
            return x.to(device, non_blocking=non_blocking) if isinstance(x, torch.Tensor) else x

        def moved(tiles: tuple[Tile, ...]) -> tuple[Tile, ...]:
            return tuple(
                t._replace(mask=t.mask.to(device) if isinstance(t.mask, BlockMask) else move(t.mask)) for t in tiles
            )

        plan = self.plan._replace(tiles=moved(self.plan.tiles), last_tiles=moved(self.plan.last_tiles))
        tensors = {name: move(getattr(self, name)) for name in ("cos", "sin", "output_indices")}
        return replace(self, plan=plan, **tensors)


class Modulation(NamedTuple):
    """The output of adaLN for one layer, each `(hidden_dim,)` or, if rows differ, `(batch, 1, hidden_dim)`."""

    shift1: torch.Tensor | None
    scale1: torch.Tensor | None
    gate1: torch.Tensor | None
    shift2: torch.Tensor | None
    scale2: torch.Tensor | None
    gate2: torch.Tensor | None


class BD3LMBlock(GradientCheckpointingLayer):
    """One transformer layer: attention and MLP, each after a modulated layer norm and followed by a gate."""

    def __init__(self, config: BD3LMConfig, layer_idx: int) -> None:
        super().__init__()
        dim = config.hidden_dim
        self.heads = (config.n_heads, config.head_dim)
        self.dropout = config.dropout
        self.norm1 = BD3LMLayerNorm(dim)
        self.attn_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.attention = BD3LMAttention(config, layer_idx)
        self.attn_out = nn.Linear(dim, dim, bias=False)
        self.norm2 = BD3LMLayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), nn.Linear(4 * dim, dim))
        if config.adaln:
            self.adaLN_modulation = BD3LMZeroLinear(config.cond_dim, 6 * dim)

    def modulate(self, conditioning: torch.Tensor | None) -> Modulation:
        """Compute shifts, scales and gates from the conditioning vector `(batch or 1, cond_dim)`.

        Decoding computes them once for all steps.
        """
        return Modulation(*split_modulation(None if conditioning is None else self.adaLN_modulation(conditioning), 6))

    def forward(
        self,
        hidden_states: torch.Tensor,
        modulation: torch.Tensor | Modulation | None,
        shared: ForwardContext,
        last: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run the layer on `(batch, length, hidden_dim)`; `modulation` is the argument of [`modulate`], or its result.

        In the last layer only the positions after `plan.skip` are queried, and with `shared.output_indices` only those
        positions continue: the output is then `(output_indices, hidden_dim)`.
        """
        # In training the modulation is computed in the layer, where checkpointing recomputes it.
        mod = modulation if isinstance(modulation, Modulation) else self.modulate(modulation)
        skip = shared.plan.skip if last else 0
        tiles = shared.plan.last_tiles if last else shared.plan.tiles
        query, key, value = self._project(self.norm1(hidden_states, mod.shift1, mod.scale1), skip, shared)
        attended, weights = self.attention(query, key, value, tiles, shared.cache)
        hidden_states = hidden_states[:, skip:] if skip else hidden_states
        if not tiles:  # only keys and values are needed, and kernels of quantized layers crash on zero rows
            return hidden_states, weights
        if last and shared.output_indices is not None:
            # From here on, only the positions that the head reads.
            row = shared.output_indices // hidden_states.shape[1]
            mod = Modulation(*(of_rows(x, row) for x in mod))
            hidden_states, attended = (x.flatten(0, 1)[shared.output_indices] for x in (hidden_states, attended))
        hidden_states = hidden_states + self._gated(self.attn_out(attended), mod.gate1)
        mlp = self.mlp(self.norm2(hidden_states, mod.shift2, mod.scale2))
        return hidden_states + self._gated(mlp, mod.gate2), weights

    def _gated(self, branch: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
        """Apply gate and dropout to a residual branch."""
        branch = branch if gate is None else branch * gate
        return F.dropout(branch, self.dropout) if self.training and self.dropout else branch

    def _project(self, normed: torch.Tensor, skip: int, shared: ForwardContext) -> tuple[torch.Tensor, ...]:
        """Return queries (without the first `skip` positions), keys and values, `(batch, heads, length, head_dim)`."""
        layer = self.attn_qkv
        if is_plain_linear(layer) and (skip or torch.is_grad_enabled()):
            # Skipped positions need no query. With a gradient, three results let queries and keys be freed once they
            # are rotated; a single one would live as long as the values.
            inputs = (normed[:, skip:], normed, normed)
            query, key, value = (F.linear(x, w) for x, w in zip(inputs, layer.weight.chunk(3), strict=True))
        else:
            states = layer(normed).unflatten(-1, (3, *self.heads))
            cos, sin = (x.to(states.dtype).unsqueeze(2) for x in (shared.cos, shared.sin))
            query, key = apply_rotary(states[:, :, :2], cos, sin).unbind(2)
            return query[:, skip:].transpose(1, 2), key.transpose(1, 2), states[:, :, 2].transpose(1, 2)
        query, key, value = (x.unflatten(-1, self.heads) for x in (query, key, value))
        cos, sin = shared.cos.to(query.dtype), shared.sin.to(query.dtype)
        query = apply_rotary(query, cos[:, skip:], sin[:, skip:])
        key = apply_rotary(key, cos, sin)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


def split_modulation(modulation: torch.Tensor | None, parts: int) -> tuple[torch.Tensor | None, ...]:
    """Split the output of adaLN, `(batch or 1, parts * hidden_dim)`; return None for each part without adaLN."""
    if modulation is None:
        return (None,) * parts
    return (modulation[0] if modulation.shape[0] == 1 else modulation.unsqueeze(1)).chunk(parts, dim=-1)


def unstack_modulations(stacked: torch.Tensor) -> list[torch.Tensor | tuple[torch.Tensor | None, ...] | None]:
    """Return the modulations of all layers and the final norm, from one tensor `(6 * layers + 2, ...)`."""
    parts = stacked.unbind()
    layers = [Modulation(*parts[first : first + 6]) for first in range(0, len(parts) - 2, 6)]
    return [*layers, parts[-2:]]


def of_rows(modulation: Any, row: torch.Tensor) -> Any:
    """Expand a modulation to flattened positions, given the batch row of each."""
    return modulation if modulation is None or modulation.dim() == 1 else modulation[row, 0]


class BD3LMFinalLayer(nn.Module):
    """Final modulated layer norm and the output head, which is never tied to the embedding."""

    def __init__(self, config: BD3LMConfig) -> None:
        super().__init__()
        self.norm_final = BD3LMLayerNorm(config.hidden_dim)
        self.linear: nn.Module = BD3LMZeroLinear(config.hidden_dim, config.vocab_size)
        if config.adaln:
            self.adaLN_modulation = BD3LMZeroLinear(config.cond_dim, 2 * config.hidden_dim)

    def modulate(self, conditioning: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """Compute the shift and scale of the final norm."""
        return split_modulation(None if conditioning is None else self.adaLN_modulation(conditioning), 2)

    def norm(
        self,
        hidden_states: torch.Tensor,
        modulation: torch.Tensor | tuple[torch.Tensor | None, ...] | None,
        row: torch.Tensor | None,
    ) -> torch.Tensor:
        """Normalise `(batch, length, hidden_dim)`, or flattened positions whose batch rows are given."""
        shift_scale = modulation if isinstance(modulation, tuple) else self.modulate(modulation)
        if row is not None:
            shift_scale = tuple(of_rows(x, row) for x in shift_scale)
        return self.norm_final(hidden_states, *shift_scale)


# --- Linear layers ---------------------------------------------------------------------------------------------------


def is_sharded(module: nn.Module) -> bool:
    """Return whether the module's own weights are whole only while it is called.

    FSDP2 and DeepSpeed ZeRO-3 gather sharded weights in hooks around `forward`, and rely on every process making the
    same calls.
    """
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

    A denoising step multiplies the rows of a block with every weight. With weights as PyTorch stores them, on a CPU 4
    rows cost twice and 8 rows three times as much as 1 row. Packed once in the order in which oneDNN reads them, they
    all cost the same.

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
    vector = torch.rand(1, weight.shape[1], generator=torch.Generator().manual_seed(0)) + 0.5
    state, probe = (weight.data_ptr(), weight._version), F.linear(vector, weight)
    packed = _PACKED.get(layer)
    if packed is None or packed.state != state or not torch.equal(packed.probe, probe):
        _PACKED.pop(layer, None)  # frees its memory before the new one is made
        packed = _Packed(state, probe, torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _ROWS))
        _PACKED[layer] = packed
    return packed.weight


def is_plain_linear(module: nn.Module) -> bool:
    """Return whether a module computes x W^T + b from a weight that can be read directly, and nothing else.

    Layers that are quantized, offloaded, sharded, pruned, hooked or wrapped by PEFT are not plain: call them.
    """
    extended = (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__  # replaced on the instance, as accelerate's offloading does
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
