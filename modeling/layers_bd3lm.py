"""The layers of the diffusion transformer (DiT with adaLN and rotary positions; arXiv 2503.09573).

Names and structure are those of the published checkpoints.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention_bd3lm import AttentionPlan, BD3LMAttention
from .configuration_bd3lm import BD3LMConfig
from .linear_bd3lm import NOT_PREPACKED, PrepackedLinears, is_plain_linear


_FREQUENCY_DIM = 256  # sinusoidal features of the noise level
_Tensor = TypeVar("_Tensor", torch.Tensor, torch.Tensor | None)


class BD3LMEmbedding(nn.Embedding):
    """An embedding whose table is called `embedding` in the weights, as published, and `weight` in code."""

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = self.max_norm = None
        self.norm_type, self.scale_grad_by_freq, self.sparse = 2.0, False, False
        self.embedding = nn.Parameter(torch.empty(num_embeddings, embedding_dim))
        self.reset_parameters()

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

    def fold(self, shift: torch.Tensor | None, scale: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight and bias of the modulated norm: `(dim,)`, or `(batch, 1, dim)` if the modulation differs by row."""
        weight = self.weight.float()
        if shift is None or scale is None:
            return weight, None
        weight, bias = weight * (1 + scale.float()), shift.float()
        return (weight.view(-1), bias.view(-1)) if weight.numel() == self.weight.numel() else (weight, bias)

    def forward(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Normalise `(..., dim)` with what [`fold`] gave."""
        if weight.dim() == 1:
            # One modulation for all rows is an affine layer norm: one kernel instead of three.
            return F.layer_norm(x.float(), weight.shape, weight, bias, eps=1e-5).to(x.dtype)
        assert bias is not None  # modulation by row gives both
        return (F.layer_norm(x.float(), x.shape[-1:], eps=1e-5) * weight + bias).to(x.dtype)


class BD3LMZeroLinear(nn.Linear):
    """A linear layer that starts at zero: adaLN and the head.

    The layer itself says so, because transformers initialises custom code leaf by leaf: `_init_weights` never meets a
    module that has no weights of its own.
    """


class TimestepEmbedder(nn.Module):
    """Sinusoidal features of the noise level sigma (cosines first), then a two-layer perceptron."""

    def __init__(self, cond_dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(_FREQUENCY_DIM, cond_dim), nn.SiLU(), nn.Linear(cond_dim, cond_dim))

    def forward(self, sigma: torch.Tensor) -> torch.Tensor:
        half = _FREQUENCY_DIM // 2
        frequencies = torch.exp(-math.log(10000) / half * torch.arange(half, device=sigma.device, dtype=torch.float32))
        angles = sigma.float()[:, None] * frequencies
        features = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.mlp(features.to(cast(nn.Linear, self.mlp[0]).weight.dtype))


class BD3LMRotaryEmbedding(nn.Module):
    """Rotary positions. The published buffer `inv_freq` travels with the weights but is not trusted.

    A cast of the whole model to bfloat16 casts the buffer too and would turn position 1023 by half a radian, so the
    angles are computed from their definition, in float64 where the device has it: exact at any position.
    """

    inv_freq: torch.Tensor

    def __init__(self, config: BD3LMConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.register_buffer("inv_freq", self.frequencies(torch.float32), persistent=True)

    def frequencies(self, dtype: torch.dtype, device: torch.device | None = None) -> torch.Tensor:
        """10000^(-2 i / head_dim) for each rotated pair i."""
        exponents = torch.arange(0, self.head_dim, 2, dtype=dtype, device=device) / self.head_dim
        return 10000.0**-exponents

    def forward(self, position_ids: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines `(batch or 1, length, 1, head_dim / 2)` for positions `(batch or 1, length)`."""
        wide = torch.float32 if position_ids.device.type == "mps" else torch.float64
        angles = position_ids.to(wide).unsqueeze(-1) * self.frequencies(wide, position_ids.device)
        return angles.cos().to(dtype).unsqueeze(2), angles.sin().to(dtype).unsqueeze(2)


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the two halves of the last axis (NeoX convention); `x` is `(batch, length, heads, head_dim)`."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


@dataclass
class ForwardContext:
    """What all layers of one forward pass share."""

    plan: AttentionPlan
    cos: torch.Tensor
    sin: torch.Tensor
    past_key_values: Cache | None = None
    commit: int = 0  # leading positions to write to the cache
    output_indices: torch.Tensor | None = None  # flat indices of the positions that the head will read
    linears: PrepackedLinears = NOT_PREPACKED  # calls the layers' products


class Modulation(NamedTuple):
    """What adaLN makes of one layer: two norms and two gates, `(hidden_dim,)` or, by row, `(batch, 1, hidden_dim)`."""

    norm1: tuple[torch.Tensor, torch.Tensor | None]  # weight and bias
    gate1: torch.Tensor | None
    norm2: tuple[torch.Tensor, torch.Tensor | None]
    gate2: torch.Tensor | None

    def of_rows(self, row: torch.Tensor) -> "Modulation":
        """The modulation of flattened positions, given the batch row of each."""
        norm2 = (_of_rows(self.norm2[0], row), _of_rows(self.norm2[1], row))
        return Modulation(self.norm1, _of_rows(self.gate1, row), norm2, _of_rows(self.gate2, row))


class BD3LMBlock(GradientCheckpointingLayer):
    """One transformer layer: attention and MLP, each behind a modulated layer norm and a gate."""

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

    def linears(self) -> tuple[nn.Module, ...]:
        """The layers whose products make up its cost."""
        return self.attn_qkv, self.attn_out, self.mlp[0], self.mlp[2]

    def fold(self, conditioning: torch.Tensor | None) -> Modulation:
        """The norms and gates of this layer, by the vector `(batch or 1, cond_dim)` that adaLN makes them from.

        Decoding computes them once for all steps.
        """
        modulation = None if conditioning is None else self.adaLN_modulation(conditioning).unsqueeze(1)
        shift1, scale1, gate1, shift2, scale2, gate2 = split_modulation(modulation, 6)
        if gate1 is not None and gate2 is not None and gate1.shape[0] == 1:
            gate1, gate2 = gate1.reshape(-1), gate2.reshape(-1)
        return Modulation(self.norm1.fold(shift1, scale1), gate1, self.norm2.fold(shift2, scale2), gate2)

    def forward(
        self,
        hidden_states: torch.Tensor,
        modulation: torch.Tensor | Modulation | None,
        shared: ForwardContext,
        last: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`(batch, length, hidden_dim)` in and out; `modulation` is what [`fold`] takes, or what it gave.

        In the last layer only the positions after `plan.skip` are queried, and with `shared.output_indices` only those
        positions go on: the output is then `(output_indices, hidden_dim)`.
        """
        folded = modulation if isinstance(modulation, Modulation) else self.fold(modulation)
        skip = shared.plan.skip if last else 0
        tiles = shared.plan.last_tiles if last else shared.plan.tiles
        query, key, value = self._project(self.norm1(hidden_states, *folded.norm1), skip, shared)
        attended, weights = self.attention(query, key, value, tiles, shared.past_key_values, shared.commit)
        hidden_states = hidden_states[:, skip:] if skip else hidden_states
        if last and shared.output_indices is not None:
            folded = folded.of_rows(shared.output_indices // hidden_states.shape[1])
            hidden_states, attended = (x.flatten(0, 1)[shared.output_indices] for x in (hidden_states, attended))
        hidden_states = hidden_states + self._branch(shared, self.attn_out, attended, folded.gate1)
        widened = shared.linears(self.mlp[0], self.norm2(hidden_states, *folded.norm2))
        return hidden_states + self._branch(shared, self.mlp[2], widened, folded.gate2, self.mlp[1]), weights

    def _project(self, normed: torch.Tensor, skip: int, shared: ForwardContext) -> tuple[torch.Tensor, ...]:
        """Queries (after the first `skip` positions), keys and values, rotated, `(batch, heads, length, head_dim)`."""
        layer = self.attn_qkv
        if is_plain_linear(layer) and layer not in shared.linears and (skip or torch.is_grad_enabled()):
            # Skipped positions need no query. With a gradient, three results instead of one let queries and keys be
            # freed once they are rotated; a common one would live on as long as the values.
            inputs = (normed[:, skip:], normed, normed)
            query, key, value = (F.linear(x, w) for x, w in zip(inputs, layer.weight.chunk(3), strict=True))
        else:
            states = shared.linears(layer, normed).unflatten(-1, (3, *self.heads))
            cos, sin = (x.to(states.dtype).unsqueeze(2) for x in (shared.cos, shared.sin))
            query, key = apply_rotary(states[:, :, :2], cos, sin).unbind(2)
            return query[:, skip:].transpose(1, 2), key.transpose(1, 2), states[:, :, 2].transpose(1, 2)
        query, key, value = (x.unflatten(-1, self.heads) for x in (query, key, value))
        cos, sin = shared.cos.to(query.dtype), shared.sin.to(query.dtype)
        query = apply_rotary(query, cos[:, skip:], sin[:, skip:])
        key = apply_rotary(key, cos, sin)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    def _branch(
        self,
        shared: ForwardContext,
        linear: nn.Module,
        x: torch.Tensor,
        gate: torch.Tensor | None,
        activation: nn.Module | None = None,
    ) -> torch.Tensor:
        """gate * linear(activation(x)) with dropout, what a residual connection adds."""
        if _spares_memory(linear, x, gate):
            branch = _LeanLinear.apply(x, linear.weight, linear.bias, gate, activation)
        else:
            branch = shared.linears(linear, x if activation is None else activation(x))
            branch = branch if gate is None else branch * gate
        return F.dropout(branch, self.dropout) if self.training and self.dropout else branch


def _spares_memory(linear: nn.Module, x: torch.Tensor, gate: torch.Tensor | None) -> bool:
    """Whether [`_LeanLinear`] can stand in: plain layers in one precision, in eager training."""
    return (
        torch.is_grad_enabled()
        and is_plain_linear(linear)
        and x.dtype == linear.weight.dtype
        # A gate per row is two-dimensional even where the batch has a single masked token, and its gradient is too.
        and (gate is None or gate.dim() == 1 and gate.dtype == x.dtype)
        and not torch.is_autocast_enabled(x.device.type)
        and not torch.compiler.is_compiling()
    )


class _LeanLinear(torch.autograd.Function):
    """gate * linear(activation(x)) that keeps x alone for its backward pass.

    The activation is recomputed. The gate's gradient needs no ungated result y = W a + b either: with G = sum of g a^T
    over tokens, the weight's gradient before the gate, sum of g y is the row sum of W * G plus b * sum of g.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        gate: torch.Tensor | None,
        activation: nn.Module | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight, bias, gate)
        ctx.activation = activation
        branch = F.linear(x if activation is None else activation(x), weight, bias)
        return branch if gate is None else branch.mul_(gate)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, bias, gate = ctx.saved_tensors
        needs = ctx.needs_input_grad
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            activated = x if ctx.activation is None else ctx.activation(x)
        flat = grad_output.flatten(0, -2)
        grad_weight = flat.T @ activated.detach().flatten(0, -2) if needs[1] or needs[3] else None
        grad_bias = flat.sum(0) if bias is not None else None
        grad_gate = None
        if gate is not None:
            if needs[3]:
                grad_gate = (weight * grad_weight).sum(1)
                grad_gate = grad_gate if bias is None else grad_gate + bias * grad_bias
            grad_weight = grad_weight.mul_(gate.unsqueeze(1)) if needs[1] and grad_weight is not None else None
            grad_bias = None if grad_bias is None else grad_bias * gate
            grad_output = grad_output * gate
        grad_x = grad_output @ weight
        if ctx.activation is not None:
            (grad_x,) = torch.autograd.grad(activated, x, grad_x)
        return grad_x, grad_weight, grad_bias, grad_gate, None


def split_modulation(modulation: torch.Tensor | None, parts: int) -> tuple[torch.Tensor | None, ...]:
    """Shifts, scales and gates that stand side by side on the last axis; None for each without adaLN."""
    return (None,) * parts if modulation is None else modulation.chunk(parts, dim=-1)


def _of_rows(modulation: _Tensor, row: torch.Tensor) -> _Tensor:
    return modulation if modulation is None or modulation.dim() == 1 else modulation[row, 0]


class BD3LMFinalLayer(nn.Module):
    """Final modulated layer norm and the output head, which is never tied to the embedding."""

    def __init__(self, config: BD3LMConfig) -> None:
        super().__init__()
        self.norm_final = BD3LMLayerNorm(config.hidden_dim)
        self.linear: nn.Module = BD3LMZeroLinear(config.hidden_dim, config.vocab_size)
        if config.adaln:
            self.adaLN_modulation = BD3LMZeroLinear(config.cond_dim, 2 * config.hidden_dim)

    def fold(self, conditioning: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight and bias of the final norm."""
        modulation = None if conditioning is None else self.adaLN_modulation(conditioning).unsqueeze(1)
        return self.norm_final.fold(*split_modulation(modulation, 2))

    def norm(
        self,
        hidden_states: torch.Tensor,
        modulation: torch.Tensor | tuple[torch.Tensor, torch.Tensor | None] | None,
        row: torch.Tensor | None,
    ) -> torch.Tensor:
        """Final norm of `(batch, length, hidden_dim)`, or of flattened positions whose batch rows are given."""
        folded = modulation if isinstance(modulation, tuple) else self.fold(modulation)
        if row is not None:
            folded = (_of_rows(folded[0], row), _of_rows(folded[1], row))
        return self.norm_final(hidden_states, *folded)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.linear(hidden_states)


__all__ = [
    "BD3LMBlock",
    "BD3LMEmbedding",
    "BD3LMFinalLayer",
    "BD3LMLayerNorm",
    "BD3LMRotaryEmbedding",
    "BD3LMZeroLinear",
    "Modulation",
    "ForwardContext",
    "TimestepEmbedder",
    "apply_rotary",
]
