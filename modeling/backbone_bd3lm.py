"""The network of BD3-LM and the baselines: loading, initialisation, backbone, head, clean and noisy streams.

Block diffusion has two kinds of streams (arXiv 2503.09573, Sec. 3): the clean x_0, and noisy x_t that attend to it.

The clean stream attends only to itself, so it is computed once, as a cache or in the same pass, for any number of
noisy streams. A text of one block has no earlier block to attend to, so its noisy streams run alone.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, ModelOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple, is_triton_available, logging

from .attention_bd3lm import AttentionPlan, block_causal_plan, two_stream_plan
from .cache_bd3lm import BlockCache, StepCache
from .compatibility_bd3lm import SelfContainedMixin, check_config_class, check_not_next_token_training
from .configuration_bd3lm import BD3LMConfig
from .inputs_bd3lm import Layout, read_inputs
from .layers_bd3lm import (
    BD3LMBlock,
    BD3LMEmbedding,
    BD3LMFinalLayer,
    BD3LMLayerNorm,
    BD3LMRotaryEmbedding,
    BD3LMZeroLinear,
    ForwardContext,
    TimestepEmbedder,
    is_sharded,
    unstack_modulations,
)


logger = logging.get_logger(__name__)

_NARROWEST_FLEX_HEAD = 16  # torch has no flex kernel for narrower heads


def automatic_attention(head_dim: int) -> str:
    """Resolve `attn_implementation="auto"`: flex attention on a CUDA device with triton, else sdpa.

    Flex skips the three quarters of the doubled sequence that no query sees. Its kernel is compiled on first use,
    which pays off in training; models loaded for anything else get transformers' default, sdpa.

    Args:
        head_dim: width of the model's heads; narrow ones, which have no flex kernel, get sdpa.
    """
    compiles = torch.cuda.is_available() and is_triton_available()
    return "flex_attention" if compiles and head_dim >= _NARROWEST_FLEX_HEAD else "sdpa"


@dataclass
class BD3LMOutput(ModelOutput):
    """Output of [`BD3LMForMaskedLM`].

    Args:
        loss: scalar, nats per scored token, when `labels` are given.
        logits: `(batch, length, vocab_size)`, raw: no SUBS parameterisation; absent when `labels` are given, so that
            no `(batch, length, vocab_size)` tensor is ever built in training or gathered in evaluation.
        nll, mask: `(batch, length)`, nats of each token and ones where it is scored; in a Trainer's evaluation, in
            place of the logits.
        past_key_values: the cache, if one was used.
        hidden_states: embeddings and the output of each layer, if requested.
        attentions: attention weights of each layer, if requested (eager attention only).
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    nll: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


def logits_output(model: Any, requested: dict[str, Any], kept: Any = None, **inputs: Any) -> BD3LMOutput:
    """Run the backbone and the head of a model, the head at the `kept` positions, by default all.

    Args:
        requested: may have `output_hidden_states` and `output_attentions`; other arguments are ignored.
    """
    recorded = {name: requested[name] for name in ("output_hidden_states", "output_attentions") if name in requested}
    outputs = model.backbone(**inputs, **recorded, return_dict=True)
    hidden = outputs.last_hidden_state if kept is None else outputs.last_hidden_state[:, kept]
    return BD3LMOutput(
        logits=model.logits_head()(hidden),
        past_key_values=outputs.past_key_values,
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
    )


class BD3LMPreTrainedModel(SelfContainedMixin, PreTrainedModel):
    """Loading, saving and initialisation shared by the models on this backbone."""

    config_class = BD3LMConfig
    base_model_prefix = "backbone"
    main_input_name = "input_ids"
    _input_embed_layer = "vocab_embed"
    supports_gradient_checkpointing = True
    _no_split_modules = ["BD3LMBlock"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_flash_attn = False
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _supports_context_parallel = False
    _keep_in_fp32_modules_strict = ["inv_freq"]

    def _check_and_adjust_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> Any:
        if attn_implementation == "auto":
            attn_implementation = automatic_attention(self.config.head_dim)
        return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)

    @property
    def dummy_inputs(self) -> dict[str, torch.Tensor]:
        """Seeded inputs of a forward pass without a loss, on the CPU."""
        config, generator = self.config, torch.Generator().manual_seed(0)
        length = min(config.model_length, 4 * config.block_size)
        inputs = {"input_ids": torch.randint(0, config.vocab_size, (2, length), generator=generator)}
        return {**inputs, "timesteps": torch.tensor([0.1, 1.0])} if config.time_conditioning else inputs

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Count the parameters; transformers finds the embedding table only in an `nn.Embedding`."""
        table = cast(BD3LMEmbedding, self.get_input_embeddings()).embedding
        excluded = exclude_embeddings and (table.requires_grad or not only_trainable)
        return super().num_parameters(only_trainable) - (table.numel() if excluded else 0)

    def get_submodule(self, target: str) -> nn.Module:
        """Return a submodule as torch does; refuse peft's prompt methods, which look up the word embeddings here.

        Raises:
            ValueError: if the embedding table is looked up.
        """
        if target.endswith("vocab_embed.embedding"):
            raise ValueError(
                "prompt tuning, prefix tuning and P-tuning prepend vectors that are not tokens, but the loss of this "
                "model masks and scores tokens: use LoRA instead (peft.LoraConfig)."
            )
        return super().get_submodule(target)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise as published: PyTorch's defaults, with adaLN and the head at zero.

        In a new model the gates are zero, so every layer is the identity and the logits are uniform.
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
            init.constant_(module.get_buffer("sampling_eps_min"), float(self.config.sampling_eps_min))
            init.constant_(module.get_buffer("sampling_eps_max"), float(self.config.sampling_eps_max))


# For every layer and the final norm: the conditioning vector, or the adaLN modulation computed from it.
Modulations = list[torch.Tensor | tuple[torch.Tensor | None, ...] | None]


class BD3LMModel(BD3LMPreTrainedModel):
    """The backbone: maps token ids to normed hidden states, ready for the head. Noise and losses are elsewhere."""

    def __init__(self, config: BD3LMConfig) -> None:
        super().__init__(config)
        self.vocab_embed: nn.Module = BD3LMEmbedding(config.vocab_size, config.hidden_dim)
        if config.adaln:
            self.sigma_map = TimestepEmbedder(config.cond_dim)
        self.rotary_emb = BD3LMRotaryEmbedding(config)
        self.blocks = nn.ModuleList(BD3LMBlock(config, i) for i in range(config.n_blocks))
        self.output_layer = BD3LMFinalLayer(config)
        self.gradient_checkpointing = False
        self.post_init()

    def modulations(self, timesteps: torch.Tensor | None, device: torch.device) -> Modulations:
        """Return the source of the shifts, scales and gates of each layer and of the final norm.

        With gradients or sharded weights this is the conditioning vector, from which each layer computes its
        modulation when called: then checkpointing recomputes it, and sharded weights are gathered. Otherwise it is the
        modulation itself, computed once for a whole decode.

        Args:
            timesteps: noise levels sigma `(batch,)`, read only by time-conditioned models; the others, as published,
                feed a zero to the same weights, which gives one learned modulation for all inputs.
        """
        conditioning = None
        if self.config.adaln:
            if self.config.time_conditioning:
                if timesteps is None:
                    raise ValueError(
                        "this model has time_conditioning=True: pass timesteps, the noise levels sigma, one per "
                        "sequence."
                    )
                sigma = timesteps.reshape(-1)
            else:
                sigma = torch.zeros(1, device=device)
            conditioning = F.silu(self.sigma_map(sigma, self.dtype))
        layers = [*self.blocks, self.output_layer]
        if torch.is_grad_enabled() or any(map(is_sharded, layers)):
            return [conditioning] * len(layers)
        return [layer.modulate(conditioning) for layer in layers]

    def stacked(self, modulations: Modulations) -> Modulations | torch.Tensor:
        """Return computed modulations as one tensor, which [`run`] also accepts; return others unchanged."""
        parts = [part for layer in modulations if isinstance(layer, tuple) for part in layer if part is not None]
        return torch.stack(parts) if parts else modulations

    def run(
        self,
        inputs_embeds: torch.Tensor,
        position_ids: torch.Tensor,
        plan: AttentionPlan,
        modulations: Modulations | torch.Tensor,
        *,
        cache: StepCache | None = None,
        output_indices: torch.Tensor | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> BaseModelOutputWithPast:
        """Run one pass over the streams `[x_0 ; x_t]`, or over one of them, according to `plan`.

        Args:
            inputs_embeds: `(batch, length, hidden_dim)` of all streams.
            position_ids: `(batch or 1, length)`.
            output_indices: flat indices into the `(batch, length - plan.skip)` positions after `plan.skip`. Only these
                pass through the last layer's MLP and are returned.

        Returns:
            `last_hidden_state` of `(batch, length - plan.skip, hidden_dim)`, or `(output_indices, hidden_dim)`.
            Recorded hidden states and attentions are those of the positions after `plan.skip`.
        """
        no_output = output_indices is not None and not output_indices.numel()
        if no_output and output_indices is not None:
            output_indices = output_indices.new_zeros(1)  # kernels of quantized layers crash on zero rows
        if isinstance(modulations, torch.Tensor):
            modulations = unstack_modulations(modulations)
        cos, sin = self.rotary_emb(position_ids, torch.float32)
        shared = ForwardContext(plan, cos, sin, cache, output_indices)
        hidden_states = inputs_embeds
        recorded: tuple[torch.Tensor, ...] = ()
        attentions: tuple[torch.Tensor, ...] = ()
        for index, (block, modulation) in enumerate(zip(self.blocks, modulations[:-1], strict=True)):
            if output_hidden_states:
                # With no stream to skip, record the tensor itself: gradients reach it, but not a view of it.
                recorded += (hidden_states[:, plan.skip :] if plan.skip else hidden_states,)
            hidden_states, weights = block(hidden_states, modulation, shared, index == len(self.blocks) - 1)
            if output_attentions and weights is not None:
                attentions += (weights,)
        if output_attentions and not attentions:
            logger.warning_once(
                f"output_attentions=True has no effect with {self.config._attn_implementation} attention: load the "
                f"model with attn_implementation='eager'."
            )
        if output_hidden_states:
            recorded += (hidden_states,)
        row = None if output_indices is None else output_indices // (inputs_embeds.shape[1] - plan.skip)
        hidden_states = self.output_layer.norm(hidden_states, modulations[-1], row)
        return BaseModelOutputWithPast(
            # An empty result keeps its graph: every process needs a gradient to average.
            last_hidden_state=hidden_states[:0] if no_output else hidden_states,
            past_key_values=None if cache is None else cache.cache,
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
        position_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Return normed hidden states `(batch, length, hidden_dim)`; arguments as in [`BD3LMForMaskedLM.forward`]."""
        if use_cache is False and clean_input_ids is None and past_key_values is None:
            check_not_next_token_training(self, input_ids, self.config)
        embeds, layout, cache, past = read_inputs(
            self,
            input_ids=input_ids,
            attention_mask=attention_mask,
            clean_input_ids=clean_input_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
            **kwargs,
        )
        length = embeds.shape[1]
        position_ids = layout.position_ids[:, past:] if position_ids is None else position_ids
        if clean_input_ids is None or length <= self.config.block_size:
            plan = block_causal_plan(layout, length, self.config, embeds.dtype)
        else:
            plan = two_stream_plan(layout, self.config, embeds.dtype)
            embeds = torch.cat([self.vocab_embed(clean_input_ids), embeds], dim=1)
            position_ids = torch.cat([position_ids, position_ids], dim=1)
        return self.run(
            embeds,
            position_ids,
            plan,
            self.modulations(timesteps, embeds.device),
            cache=cache,
            output_hidden_states=bool(
                self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
            ),
            output_attentions=self.config.output_attentions if output_attentions is None else output_attentions,
        )


class BD3LMLanguageModel(BD3LMPreTrainedModel):
    """A backbone with its head, shared by BD3-LM and the baselines."""

    backbone_class: type[BD3LMModel] = BD3LMModel
    # LoRA: attention and MLP of every layer. `mlp.0` also matches a layer of the noise-level embedding.
    lora_targets: tuple[str, ...] = ("attn_qkv", "attn_out", "mlp.0", "mlp.2")

    def __init__(self, config: BD3LMConfig) -> None:
        super().__init__(config)
        check_config_class(type(self), config)
        self.backbone = self.backbone_class(config)

    def get_output_embeddings(self) -> nn.Module:
        return self.backbone.output_layer.linear

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.backbone.output_layer.linear = value

    def logits_head(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return the map from normed hidden states to logits; networks that scale or cap their logits override it."""
        return self.get_output_embeddings()

    def clean_cache(self, input_ids: torch.Tensor, layout: Layout) -> StepCache:
        """Return keys and values of the clean stream; its last layer computes nothing else."""
        backbone, config, length = self.backbone, self.config, input_ids.shape[1]
        embeds, cache = backbone.vocab_embed(input_ids), BlockCache()
        plan = AttentionPlan(block_causal_plan(layout, length, config, embeds.dtype).tiles, (), length)
        modulations = backbone.modulations(None, input_ids.device)
        backbone.run(embeds, layout.position_ids, plan, modulations, cache=StepCache(cache, length))
        return StepCache(cache)

    def noisy_hidden(
        self,
        x_t: torch.Tensor,
        x_0: torch.Tensor,
        layout: Layout,
        masked_indices: torch.Tensor,
        sigma: torch.Tensor | None,
        *,
        cache: StepCache | None = None,
        num_noise_samples: int = 1,
    ) -> torch.Tensor:
        """Return normed hidden states at the masked positions of the noisy streams, `(masked_indices, hidden_dim)`.

        Args:
            x_t: `(batch, num_noise_samples * length)`, the noisy streams of each row side by side.
            x_0: `(batch, length)`, the clean stream that all of them attend to.
            masked_indices: flat indices into x_t.
            sigma: noise level `(batch,)` of each row, for time-conditioned models, which take one noise sample.
            cache: from [`clean_cache`]; without it the clean stream is computed in this pass, with a gradient.
        """
        backbone, config, length = self.backbone, self.config, x_0.shape[1]
        if config.num_blocks(length) == 1:  # no earlier block to attend to
            layout, cache = layout.repeat_rows(num_noise_samples), None
            embeds, positions = backbone.vocab_embed(x_t.view(-1, length)), layout.position_ids
            plan = block_causal_plan(layout, length, config, embeds.dtype)
        else:
            embeds = backbone.vocab_embed(x_t if cache is not None else torch.cat([x_0, x_t], dim=1))
            cached = cache is not None
            plan = two_stream_plan(
                layout, config, embeds.dtype, num_noise_samples=num_noise_samples, clean_cached=cached
            )
            # Not a sum with a bool, which torch 2.11 cannot trace for inputs of several lengths.
            positions = layout.position_ids.repeat(1, num_noise_samples + (1 if cache is None else 0))
        modulations = backbone.modulations(sigma, x_t.device)
        outputs = backbone.run(embeds, positions, plan, modulations, cache=cache, output_indices=masked_indices)
        return cast(torch.Tensor, outputs.last_hidden_state)
