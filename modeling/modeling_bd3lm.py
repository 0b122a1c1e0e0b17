"""The diffusion transformer of BD3-LM (DiT with adaLN and rotary positions) and its masked language model.

Structure and weight names are those of the published checkpoints (arXiv 2503.09573).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, ModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import can_return_tuple

from .attention_bd3lm import (
    AttentionPlan,
    BD3LMAttention,
    block_causal_plan,
    token_layout,
    two_stream_plan,
)
from .cache_bd3lm import BlockCache
from .configuration_bd3lm import BD3LMConfig
from .generation_bd3lm import BD3LMGenerationConfig, BD3LMGenerationMixin
from .loss_bd3lm import TokenNLL, check_token_ids, denoising_loss, is_plain_linear, token_nll
from .noise_bd3lm import Noise


# Sources of dispatch that transformers looks for when it decides whether a model may switch its attention.
_ATTENTION_FUNCTIONS = ALL_ATTENTION_FUNCTIONS

_FREQUENCY_DIM = 256  # sinusoidal features of the noise level


@dataclass
class BD3LMOutput(ModelOutput):
    """Output of [`BD3LMForMaskedLM`].

    Args:
        loss: scalar, nats per scored token, when `labels` are given.
        logits: `(batch, length, vocab_size)`, raw: no SUBS parameterisation; absent when `labels` are given, so that
            no `(batch, length, vocab_size)` tensor is ever built in training or gathered in evaluation.
        past_key_values: the cache, when one was used.
        hidden_states: embeddings and the output of each layer, when asked for.
        attentions: attention weights of each layer, when asked for (eager attention only).
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


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
    def weight(self) -> torch.Tensor:
        return self.embedding

    def __setattr__(self, name: str, value) -> None:
        super().__setattr__("embedding" if name == "weight" else name, value)

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.embedding, a=math.sqrt(5))


class BD3LMLayerNorm(nn.Module):
    """Layer norm with a weight and no bias, computed in float32, modulated by adaLN: norm(x) * w * (1 + scale) + shift."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(
        self, x: torch.Tensor, shift: torch.Tensor | None = None, scale: torch.Tensor | None = None
    ) -> torch.Tensor:
        weight = self.weight.float()
        if scale is None or shift is None:
            return F.layer_norm(x.float(), weight.shape, weight, eps=1e-5).to(x.dtype)
        weight, shift = weight * (1 + scale.float()), shift.float()
        if weight.numel() == self.weight.numel():
            # One modulation for all rows is an affine layer norm: one kernel instead of three.
            dim = self.weight.shape
            return F.layer_norm(x.float(), dim, weight.view(dim), shift.view(dim), eps=1e-5).to(x.dtype)
        return (F.layer_norm(x.float(), self.weight.shape, eps=1e-5) * weight + shift).to(x.dtype)


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
        return self.mlp(features.to(self.mlp[0].weight.dtype))


class BD3LMRotaryEmbedding(nn.Module):
    """Rotary positions. The published buffer `inv_freq` travels with the weights but is not trusted.

    A cast of the whole model to bfloat16 casts the buffer too and would turn position 1023 by half a radian, so the
    angles are computed from their definition, in float64 where the device has it: exact at any position.
    """

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
class Pass:
    """What all layers of one forward pass share."""

    plan: AttentionPlan
    cos: torch.Tensor
    sin: torch.Tensor
    past_key_values: Cache | None = None
    commit: int = 0  # leading positions to write to the cache
    rows: torch.Tensor | None = None  # flat indices of the positions that the head will read


class BD3LMBlock(GradientCheckpointingLayer):
    """One transformer layer: attention and MLP, each behind a modulated layer norm and a gate."""

    def __init__(self, config: BD3LMConfig, layer_idx: int) -> None:
        super().__init__()
        dim = config.hidden_dim
        self.config = config
        self.layer_idx = layer_idx
        self.dropout = config.dropout
        self.norm1 = BD3LMLayerNorm(dim)
        self.attn_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.attention = BD3LMAttention(config, layer_idx)
        self.attn_out = nn.Linear(dim, dim, bias=False)
        self.norm2 = BD3LMLayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), nn.Linear(4 * dim, dim))
        if config.adaln:
            self.adaLN_modulation = BD3LMZeroLinear(config.cond_dim, 6 * dim)

    def modulation(self, conditioning: torch.Tensor | None) -> torch.Tensor | None:
        """shift, scale and gate of attention, then of the MLP, side by side: `(batch or 1, 1, 6 * hidden_dim)`.

        One tensor, not six: reentrant checkpointing cuts the graph only at tensors that are arguments of their own.
        """
        return None if conditioning is None else self.adaLN_modulation(conditioning).unsqueeze(1)

    def forward(
        self,
        hidden_states: torch.Tensor,
        modulation: torch.Tensor | None,
        shared: Pass,
        last: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`(batch, length, hidden_dim)` in and out.

        In the last layer only the positions after `plan.skip` are queried, and with `shared.rows` only those rows go on:
        the output is then `(rows, hidden_dim)`.
        """
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = _split(modulation, 6)
        skip = shared.plan.skip if last else 0
        tiles = shared.plan.last_tiles if last else shared.plan.tiles
        query, key, value = self._project(self.norm1(hidden_states, shift_1, scale_1), skip, shared)
        attended, weights = self.attention(query, key, value, tiles, shared.past_key_values, shared.commit)
        hidden_states = hidden_states[:, skip:]
        if last and shared.rows is not None:
            hidden_length = hidden_states.shape[1]
            hidden_states, attended = (x.flatten(0, 1)[shared.rows] for x in (hidden_states, attended))
            row = shared.rows // hidden_length
            gate_1, shift_2, scale_2, gate_2 = (_of_rows(m, row) for m in (gate_1, shift_2, scale_2, gate_2))
        hidden_states = hidden_states + self._branch(self.attn_out, attended, gate_1)
        widened = self.mlp[0](self.norm2(hidden_states, shift_2, scale_2))
        return hidden_states + self._branch(self.mlp[2], widened, gate_2, self.mlp[1]), weights

    def _project(self, normed: torch.Tensor, skip: int, shared: Pass) -> tuple[torch.Tensor, ...]:
        """Queries (after the first `skip` positions), keys and values, rotated, `(batch, heads, length, head_dim)`."""
        config, layer = self.config, self.attn_qkv
        if is_plain_linear(layer) and (skip or torch.is_grad_enabled()):
            # Skipped positions need no query. With a gradient, three results instead of one let queries and keys be
            # freed once they are rotated; a common one would live on as long as the values.
            inputs = (normed[:, skip:], normed, normed)
            query, key, value = (F.linear(x, w) for x, w in zip(inputs, layer.weight.chunk(3), strict=True))
        else:
            query, key, value = layer(normed).chunk(3, dim=-1)
            query = query[:, skip:]
        query, key, value = (x.unflatten(-1, (config.n_heads, config.head_dim)) for x in (query, key, value))
        cos, sin = shared.cos.to(query.dtype), shared.sin.to(query.dtype)
        query = apply_rotary(query, cos[:, skip:], sin[:, skip:])
        key = apply_rotary(key, cos, sin)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    def _branch(
        self, linear: nn.Module, x: torch.Tensor, gate: torch.Tensor | None, activation: nn.Module | None = None
    ) -> torch.Tensor:
        """gate * linear(activation(x)) with dropout, what a residual connection adds."""
        if _spares_memory(linear, x, gate):
            gate = None if gate is None else gate.reshape(-1)
            branch = _LeanLinear.apply(x, linear.weight, linear.bias, gate, activation)
        else:
            branch = linear(x if activation is None else activation(x))
            branch = branch if gate is None else branch * gate
        return F.dropout(branch, self.dropout) if self.training and self.dropout else branch


def _spares_memory(linear: nn.Module, x: torch.Tensor, gate: torch.Tensor | None) -> bool:
    """Whether [`_LeanLinear`] can stand in: plain layers in one precision, in eager training."""
    return (
        torch.is_grad_enabled()
        and is_plain_linear(linear)
        and x.dtype == linear.weight.dtype
        and (gate is None or gate.numel() == linear.out_features and gate.dtype == x.dtype)
        and not torch.is_autocast_enabled(x.device.type)
        and not torch.compiler.is_compiling()
    )


class _LeanLinear(torch.autograd.Function):
    """gate * linear(activation(x)) that keeps x alone for its backward pass.

    The activation is recomputed. The gate's gradient needs no ungated result y = W a + b either: with G = sum of g a^T
    over tokens, the weight's gradient before the gate, sum of g y is the row sum of W * G plus b * sum of g.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, gate, activation):
        ctx.save_for_backward(x, weight, bias, gate)
        ctx.activation = activation
        branch = F.linear(x if activation is None else activation(x), weight, bias)
        return branch if gate is None else branch.mul_(gate)

    @staticmethod
    def backward(ctx, grad_output):
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
            grad_weight = grad_weight.mul_(gate.unsqueeze(1)) if needs[1] else None
            grad_bias = None if grad_bias is None else grad_bias * gate
            grad_output = grad_output * gate
        grad_x = grad_output @ weight
        if ctx.activation is not None:
            (grad_x,) = torch.autograd.grad(activated, x, grad_x)
        return grad_x, grad_weight, grad_bias, grad_gate, None


def _split(modulation: torch.Tensor | None, parts: int) -> tuple[torch.Tensor | None, ...]:
    return (None,) * parts if modulation is None else modulation.chunk(parts, dim=-1)


def _of_rows(modulation: torch.Tensor | None, row: torch.Tensor) -> torch.Tensor | None:
    """Modulation `(batch or 1, 1, dim)` for flattened rows: `(1, dim)`, kept 3-d when shared by all."""
    if modulation is None or modulation.shape[0] == 1:
        return modulation if modulation is None else modulation[0]
    return modulation[row, 0]


class BD3LMFinalLayer(nn.Module):
    """Final modulated layer norm and the output head, which is never tied to the embedding."""

    def __init__(self, config: BD3LMConfig) -> None:
        super().__init__()
        self.norm_final = BD3LMLayerNorm(config.hidden_dim)
        self.linear = BD3LMZeroLinear(config.hidden_dim, config.vocab_size)
        if config.adaln:
            self.adaLN_modulation = BD3LMZeroLinear(config.cond_dim, 2 * config.hidden_dim)

    def modulation(self, conditioning: torch.Tensor | None) -> torch.Tensor | None:
        """shift and scale, side by side: `(batch or 1, 1, 2 * hidden_dim)`."""
        return None if conditioning is None else self.adaLN_modulation(conditioning).unsqueeze(1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.linear(hidden_states)


class BD3LMPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation shared by the models on this backbone."""

    config_class = BD3LMConfig
    base_model_prefix = "backbone"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["BD3LMBlock"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_flash_attn = False
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _supports_context_parallel = False
    _keep_in_fp32_modules_strict = ["inv_freq"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The published initialisation: PyTorch's defaults, with adaLN and the head at zero.

        A fresh model has gates of zero, so every layer is the identity and the logits are uniform.
        """
        if isinstance(module, BD3LMEmbedding):
            init.kaiming_uniform_(module.embedding, a=math.sqrt(5))
        elif isinstance(module, BD3LMZeroLinear):
            init.zeros_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                bound = 1 / math.sqrt(module.in_features)
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, BD3LMLayerNorm):
            init.ones_(module.weight)
        elif isinstance(module, BD3LMRotaryEmbedding):
            init.copy_(module.inv_freq, module.frequencies(torch.float32))
        if "sampling_eps_min" in module._buffers:
            init.constant_(module.sampling_eps_min, float(self.config.sampling_eps_min))
            init.constant_(module.sampling_eps_max, float(self.config.sampling_eps_max))


class BD3LMModel(BD3LMPreTrainedModel):
    """The backbone: token ids to normed hidden states, ready for the head. It knows nothing of noise or losses."""

    def __init__(self, config: BD3LMConfig) -> None:
        super().__init__(config)
        self.vocab_embed = BD3LMEmbedding(config.vocab_size, config.hidden_dim)
        if config.adaln:
            self.sigma_map = TimestepEmbedder(config.cond_dim)
        self.rotary_emb = BD3LMRotaryEmbedding(config)
        self.blocks = nn.ModuleList(BD3LMBlock(config, i) for i in range(config.n_blocks))
        self.output_layer = BD3LMFinalLayer(config)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.vocab_embed

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.vocab_embed = value

    def modulations(self, timesteps: torch.Tensor | None, device: torch.device) -> list[torch.Tensor | None]:
        """adaLN's shifts, scales and gates of every layer and of the final norm.

        Args:
            timesteps: noise levels sigma `(batch,)`, read only by time-conditioned models; the others, as published,
                feed a zero to the same weights, which gives one learned modulation for all inputs.
        """
        conditioning = None
        if self.config.adaln:
            if self.config.time_conditioning:
                if timesteps is None:
                    raise ValueError(
                        "this model has time_conditioning=True: pass timesteps, the noise levels sigma, one per sequence."
                    )
                sigma = timesteps.reshape(-1)
            else:
                sigma = torch.zeros(1, device=device)
            conditioning = F.silu(self.sigma_map(sigma))
        return [layer.modulation(conditioning) for layer in [*self.blocks, self.output_layer]]

    def run(
        self,
        inputs_embeds: torch.Tensor,
        position_ids: torch.Tensor,
        plan: AttentionPlan,
        modulations: list[torch.Tensor | None],
        *,
        past_key_values: Cache | None = None,
        commit: int = 0,
        rows: torch.Tensor | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> BaseModelOutputWithPast:
        """One pass over the streams `[x_0 ; x_t]`, or over either alone, as `plan` says.

        Args:
            inputs_embeds: `(batch, length, hidden_dim)` of all streams.
            position_ids: `(batch or 1, length)`.
            rows: flat indices into the positions that have an output, `(batch * (length - plan.skip),)` at most. Only
                these pass the last layer's MLP and come out.

        Returns:
            `last_hidden_state` of `(batch, length - plan.skip, hidden_dim)`, or `(rows, hidden_dim)`. Recorded hidden
            states and attentions are those of the positions after `plan.skip`.
        """
        cos, sin = self.rotary_emb(position_ids, torch.float32)
        shared = Pass(plan, cos, sin, past_key_values, commit, rows)
        hidden_states, recorded, attentions = inputs_embeds, (), ()
        for index, (block, modulation) in enumerate(zip(self.blocks, modulations, strict=False)):
            if output_hidden_states:
                # Without a stream to leave out, the tensor itself: a gradient reaches it, not a view of it.
                recorded += (hidden_states[:, plan.skip :] if plan.skip else hidden_states,)
            hidden_states, weights = block(hidden_states, modulation, shared, index == len(self.blocks) - 1)
            if output_attentions:
                attentions += (weights,)
        if output_hidden_states:
            recorded += (hidden_states,)
        shift, scale = _split(modulations[-1], 2)
        if rows is not None and shift is not None:
            length = inputs_embeds.shape[1] - plan.skip
            shift, scale = (_of_rows(m, rows // length) for m in (shift, scale))
        return BaseModelOutputWithPast(
            last_hidden_state=self.output_layer.norm_final(hidden_states, shift, scale),
            past_key_values=past_key_values,
            hidden_states=recorded or None,
            attentions=attentions or None,
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        clean_input_ids: torch.Tensor | None = None,
        timesteps: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        inputs_embeds: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Normed hidden states `(batch, length, hidden_dim)`; arguments as in [`BD3LMForMaskedLM.forward`]."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds.")
        check_token_ids(input_ids, self.config.vocab_size, "input_ids")
        check_token_ids(clean_input_ids, self.config.vocab_size, "clean_input_ids")
        embeds = self.vocab_embed(input_ids) if inputs_embeds is None else inputs_embeds
        length, device = embeds.shape[1], embeds.device
        past_key_values, commit, past = self._open_cache(past_key_values, use_cache, length, attention_mask)
        layout = token_layout(attention_mask, length, self.config.block_size, past=past, device=device)
        position_ids = layout.position_ids[:, past:]
        options = {"implementation": self.config._attn_implementation, "dtype": embeds.dtype}
        if clean_input_ids is None:
            plan = block_causal_plan(layout, length, self.config.block_size, **options)
        else:
            if past_key_values is not None or clean_input_ids.shape != embeds.shape[:2]:
                raise ValueError(
                    f"clean_input_ids of shape {tuple(clean_input_ids.shape)} must have the shape of the noisy input, "
                    f"{tuple(embeds.shape[:2])}, and no cache beside it: x_0 itself is the context."
                )
            plan = two_stream_plan(layout, self.config.block_size, **options)
            embeds = torch.cat([self.vocab_embed(clean_input_ids), embeds], dim=1)
            position_ids = torch.cat([position_ids, position_ids], dim=1)
        return self.run(
            embeds,
            position_ids,
            plan,
            self.modulations(timesteps, device),
            past_key_values=past_key_values,
            commit=commit,
            output_hidden_states=self.config.output_hidden_states
            if output_hidden_states is None
            else output_hidden_states,
            output_attentions=self.config.output_attentions if output_attentions is None else output_attentions,
        )

    def _open_cache(
        self, cache: Cache | None, use_cache: bool | None, length: int, attention_mask: torch.Tensor | None
    ) -> tuple[Cache | None, int, int]:
        """The cache of this pass, how many positions to write to it, and how many it holds."""
        write = cache is not None if use_cache is None else use_cache
        if cache is None:
            cache = BlockCache() if write and not self.training else None
            write = cache is not None
        past = 0 if cache is None else int(cache.get_seq_length())
        if write and attention_mask is None and (past + length) % self.config.block_size:
            raise ValueError(
                f"use_cache=True would store {length} tokens behind {past}, which is no whole number of blocks of "
                f"{self.config.block_size}: a block is stored when it is finished, so pass whole blocks, or "
                f"use_cache=False to read the cache only."
            )
        return cache, length if write else 0, past


class BD3LMForMaskedLM(BD3LMGenerationMixin, BD3LMPreTrainedModel):
    """Block-diffusion language model: scores with `token_nll`, writes with `generate`, carries the paper's loss.

    ```python
    >>> logits = model(input_ids).logits                                # block-causal denoising logits
    >>> logits = model(input_ids=x_t, clean_input_ids=x_0).logits       # noisy stream given the clean one
    >>> loss = model(input_ids=x_0, labels=x_0).loss                    # training objective; NELBO in eval mode
    ```
    """

    generation_config_class = BD3LMGenerationConfig
    accepts_loss_kwargs = True
    _keep_in_fp32_modules_strict = ["sampling_eps_min", "sampling_eps_max", "inv_freq"]

    def __init__(self, config: BD3LMConfig) -> None:
        super().__init__(config)
        self.backbone = BD3LMModel(config)
        if config.var_min:
            self.register_buffer("sampling_eps_min", torch.tensor(float(config.sampling_eps_min)))
            self.register_buffer("sampling_eps_max", torch.tensor(float(config.sampling_eps_max)))
        self._adopt_special_tokens()
        # The loss is not shifted, so Trainer must count all labels, not labels[1:].
        self.loss_type = None
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.vocab_embed

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbone.vocab_embed = value

    def get_output_embeddings(self) -> nn.Module:
        return self.backbone.output_layer.linear

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.backbone.output_layer.linear = value

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        clean_input_ids: torch.Tensor | None = None,
        timesteps: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        inputs_embeds: torch.Tensor | None = None,
        block_noise: torch.Tensor | None = None,
        token_noise: torch.Tensor | None = None,
        count_noise: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> BD3LMOutput:
        """One of three passes, by what is given: the loss, the noisy stream's logits, or block-causal logits.

        Args:
            input_ids: `(batch, length)`. With `labels`, the clean text x_0. With `clean_input_ids`, the noisy x_t.
                Alone, a text whose blocks are seen from left to right, mask tokens to be predicted.
            attention_mask: `(batch, length)`, ones for tokens and zeros for padding on either side; with a cache
                `(batch, cached + length)`. Blocks are counted from each row's first token.
            labels: `(batch, length)`. Gives the loss: the paper's training objective in train mode (noise levels from
                the learned interval), its bound on the negative log-likelihood in eval mode, both in nats per scored
                token. Where labels are -100 a token is context: never masked, never scored.
            clean_input_ids: `(batch, length)`, the clean text that x_t was made of.
            timesteps: noise levels sigma `(batch,)`; read only if `config.time_conditioning`.
            past_key_values: cache of finished blocks. `use_cache=True` writes the given blocks to it, `use_cache=False`
                only reads it.
            block_noise, token_noise, count_noise: the uniform draws that decide the noise of the loss, see
                [`Noise`]. Without them they are drawn from torch's global generator.
            num_items_in_batch: tokens to divide the summed loss by, when a step spans several batches or processes.

        Raises:
            ValueError: ids outside the vocabulary, or arguments that exclude one another.
        """
        if labels is not None:
            noise = None if block_noise is None else Noise(block_noise, token_noise, count_noise)
            return BD3LMOutput(loss=denoising_loss(self, input_ids, labels, attention_mask, noise, num_items_in_batch))
        outputs = self.backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            clean_input_ids=clean_input_ids,
            timesteps=timesteps,
            past_key_values=past_key_values,
            use_cache=use_cache,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **{k: kwargs[k] for k in ("output_hidden_states", "output_attentions") if k in kwargs},
        )
        return BD3LMOutput(
            logits=self.backbone.output_layer(outputs.last_hidden_state),
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def token_nll(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        labels: torch.Tensor | None = None,
        estimator: str = "sampled",
        num_samples: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> TokenNLL:
        """Bound on the negative log-likelihood of every token; see [`token_nll`] in `loss_bd3lm.py`."""
        return token_nll(
            self,
            input_ids,
            attention_mask,
            labels=labels,
            estimator=estimator,
            num_samples=num_samples,
            generator=generator,
        )

    def interval(self) -> tuple[float, float]:
        """The interval of noise levels that training draws from."""
        if self.config.var_min:
            return float(self.sampling_eps_min), float(self.sampling_eps_max)
        return float(self.config.sampling_eps_min), float(self.config.sampling_eps_max)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs) -> nn.Module:
        """As in transformers; the mask token keeps its id.

        Raises:
            ValueError: the new vocabulary would not hold the mask token.
        """
        if new_num_tokens is not None and new_num_tokens <= self.config.mask_token_id:
            raise ValueError(
                f"resize_token_embeddings({new_num_tokens}) would drop mask_token_id={self.config.mask_token_id}: keep "
                f"at least {self.config.mask_token_id + 1} tokens."
            )
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)


BD3LMModel.register_for_auto_class("AutoModel")
BD3LMForMaskedLM.register_for_auto_class("AutoModelForMaskedLM")

__all__ = ["BD3LMForMaskedLM", "BD3LMModel", "BD3LMOutput", "BD3LMPreTrainedModel"]
