"""Block diffusion on transformers' own decoders: Llama, Qwen, Mistral, GPT-2 and others, with their weight names.

No modelling code is copied: the stock layers run with our masks and positions, see [`DecoderBackbone`]. Objective,
likelihood, samplers and the loop over blocks are those of [`BD3LMForMaskedLM`].

    visible(query, key) =   the key is not padding, is in the query's document, and
        clean  -> clean     its block is not later (context="block"), or it is not later itself (context="token")
        noisy  -> clean     its block is earlier
        noisy  -> noisy     it is in the query's block and noise sample
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    Gemma3ForCausalLM,
    GPT2LMHeadModel,
    GraniteForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    Olmo2ForCausalLM,
    Phi3ForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
    SmolLM3ForCausalLM,
)

from .backbone_bd3lm import BD3LMPreTrainedModel, automatic_attention
from .cache_bd3lm import BlockCache, StepCache
from .compatibility_bd3lm import (
    SelfContainedMixin,
    check_config_class,
    check_not_next_token_training,
    register_auto_classes,
    warn_of_visible_tokens,
)
from .configuration_bd3lm_decoders import BD3LMDecoderConfigMixin, head_dim_of
from .decoder_backbone_bd3lm import (
    FLEX_ATTENTION,
    DecoderBackbone,
    DecoderDecodingNetwork,
    TwoStreamHidden,
    check_length,
    decoder_mask,
)
from .inputs_bd3lm import Layout
from .loss_bd3lm import chunked_cross_entropy, denoising_loss, divide_by_count, loss_mask, masked_indices
from .modeling_bd3lm import BlockDiffusionMixin


class BD3LMDecoderMixin(SelfContainedMixin, BlockDiffusionMixin):
    """Block diffusion for a stock class of transformers. List this mixin before that class."""

    _supports_flash_attn = False
    _can_compile_fullgraph = True
    dummy_inputs = BD3LMPreTrainedModel.dummy_inputs
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

    # Set by bd3lm_hf: applies the decoding settings published with a checkpoint in another layout.
    adopt_published_decoding: Callable[..., Any] | None = None

    def __init__(self, config: Any) -> None:
        check_config_class(type(self), config)
        super().__init__(config)
        self.watch_decoder()
        # The loss is not shifted, so Trainer must count all labels, not labels[1:].
        self.loss_type = None

    def _check_and_adjust_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> Any:
        if "flash" in str(attn_implementation):
            raise ValueError(
                f"attn_implementation={attn_implementation!r}: FlashAttention does not support the mask of two "
                f"streams. Use 'sdpa', or 'flex_attention' on a GPU."
            )
        if attn_implementation == "auto":
            auto = automatic_attention(head_dim_of(self.config))
            attn_implementation = auto if self._supports_flex_attn else None
        if attn_implementation == "flex_attention" and not self._supports_flex_attn:
            raise ValueError(
                f"attn_implementation='flex_attention': {type(self).__bases__[-1].__name__} does not support its "
                f"masks. Use 'sdpa' or 'eager'."
            )
        found = super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)
        return FLEX_ATTENTION if found == "flex_attention" else found

    def adjust_generation_fn(
        self, generation_config: Any, from_auto_class: Any, from_pipeline: Any, name: Any, *args: Any, **kwargs: Any
    ) -> None:
        super().adjust_generation_fn(generation_config, from_auto_class, from_pipeline, name, *args, **kwargs)
        if generation_config is None and name is not None and self.adopt_published_decoding is not None:
            self.adopt_published_decoding(name)

    def watch_decoder(self) -> None:
        """Check every call of the stock decoder: trainers that bypass this class compute a next-token loss from it."""
        self.base_model.register_forward_pre_hook(_check_direct_call, with_kwargs=True)

    @property
    def backbone(self) -> DecoderBackbone:
        """The stock decoder, with the interface of BD3-LM's backbone."""
        return DecoderBackbone(self)

    def decoding_network(self) -> DecoderDecodingNetwork:
        """Return the forward passes of `generate` and `infill`."""
        return DecoderDecodingNetwork(self)

    def _sample(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        generation_config = kwargs["generation_config"]
        positions = self.config.max_position_embeddings // self.config.block_size * self.config.block_size
        if self.config.has_learned_positions and generation_config.max_length > positions:
            raise ValueError(
                f"max_length={generation_config.max_length} exceeds the {positions} learned positions of this "
                f"{self.config.model_type}: ask for fewer new tokens, or shorten the prompt."
            )
        return super()._sample(input_ids, *args, **kwargs)

    def logits_head(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return the head, a map from hidden states to logits, with the family's soft cap."""
        head, cap = self.get_output_embeddings(), getattr(self.config, "final_logit_softcapping", None)
        return head if cap is None else lambda hidden: cap * torch.tanh(head(hidden) / cap)

    def objective(self, *batch: Any, **layout: Any) -> torch.Tensor:
        """Return the loss of a batch; in training, add the clean stream's next-token loss, times `ar_loss_weight`.

        Both are sums divided by the same number of tokens; see [`denoising_loss`].
        """
        weight = self.config.ar_loss_weight
        if not weight or not self.training:
            return super().objective(*batch, **layout)
        network = _TwoLossNetwork(self)
        return denoising_loss(network, *batch, interval=self.interval(), **layout) + weight * network.next_token_loss(
            *batch
        )

    def clean_cache(self, input_ids: torch.Tensor, layout: Layout) -> StepCache:
        """Return keys and values of the clean stream, with its hidden states if the alignment needs them."""
        backbone, cache, length = self.backbone, BlockCache(), input_ids.shape[1]
        check_length(layout, self.config)
        embeds = backbone.vocab_embed(input_ids)
        mask = decoder_mask(layout, self.config, embeds.dtype)
        backbone.run(embeds, layout.position_ids, mask, StepCache(cache, length))
        return StepCache(cache)

    def noisy_hidden(
        self,
        x_t: torch.Tensor,
        x_0: torch.Tensor,
        layout: Layout,
        masked_indices: torch.Tensor,
        sigma: torch.Tensor | None = None,
        **streams: Any,
    ) -> torch.Tensor:
        """Return the hidden states that predict the masked tokens; see [`BD3LMLanguageModel.noisy_hidden`]."""
        hidden = self.stream_hidden(x_t, x_0, layout, **streams)
        return hidden.noisy.flatten(0, 1)[masked_indices]

    def stream_hidden(
        self,
        x_t: torch.Tensor,
        x_0: torch.Tensor,
        layout: Layout,
        *,
        cache: StepCache | None = None,
        num_noise_samples: int = 1,
    ) -> TwoStreamHidden:
        """Return all hidden states of both streams."""
        ids = x_t if cache is not None else torch.cat([x_0, x_t], dim=1)
        embeds = self.backbone.vocab_embed(ids)
        return self.backbone.two_streams(embeds, layout, num_noise_samples=num_noise_samples, cache=cache)[0]


def _check_direct_call(decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Check calls of the stock decoder that do not come from [`DecoderBackbone`], which never passes ids."""
    input_ids = args[0] if args else kwargs.get("input_ids")
    if input_ids is not None:
        check_not_next_token_training(decoder, input_ids, decoder.config)
        warn_of_visible_tokens(decoder, input_ids, kwargs.get("attention_mask"), decoder.config.mask_token_id)


class _TwoLossNetwork:
    """A model during one call of the loss, which keeps the clean hidden states for the next-token loss."""

    noisy_hidden = BD3LMDecoderMixin.noisy_hidden

    def __init__(self, model: Any) -> None:
        self.model, self.config, self.training = model, model.config, model.training
        self.clean_cache, self.logits_head = model.clean_cache, model.logits_head

    def stream_hidden(self, x_t: torch.Tensor, x_0: torch.Tensor, layout: Layout, **streams: Any) -> TwoStreamHidden:
        hidden = self.model.stream_hidden(x_t, x_0, layout, **streams)
        self.clean_hidden, self.layout = hidden.clean, layout
        return hidden

    def next_token_loss(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        noise: Any = None,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Return the loss of all scored tokens, each given those before it, with [`denoising_loss`]'s denominator."""
        predicted = loss_mask(self.layout, labels, ignore_bos=True, training=False).counted[:, 1:]
        indices, is_predicted = masked_indices(predicted, 1.0, self.config)
        targets = labels[:, 1:].flatten()[indices].clamp(min=0)
        hidden = self.clean_hidden[:, :-1].flatten(0, 1)[indices]
        weights = torch.ones(targets.shape, device=targets.device) if is_predicted is None else is_predicted
        total = chunked_cross_entropy(hidden, self.logits_head(), targets, weights, self.config)
        scored = loss_mask(self.layout, labels, ignore_bos=self.config.ignore_bos, training=self.training)
        return divide_by_count(total, scored.counted, num_items_in_batch)


# The configuration class of each is that of its model type, see below.


class BD3LMLlamaForMaskedLM(BD3LMDecoderMixin, LlamaForCausalLM):
    """Block diffusion on a [`LlamaForCausalLM`]."""


class BD3LMQwen2ForMaskedLM(BD3LMDecoderMixin, Qwen2ForCausalLM):
    """Block diffusion on a [`Qwen2ForCausalLM`]."""


class BD3LMQwen3ForMaskedLM(BD3LMDecoderMixin, Qwen3ForCausalLM):
    """Block diffusion on a [`Qwen3ForCausalLM`]."""


class BD3LMMistralForMaskedLM(BD3LMDecoderMixin, MistralForCausalLM):
    """Block diffusion on a [`MistralForCausalLM`]."""


class BD3LMSmolLM3ForMaskedLM(BD3LMDecoderMixin, SmolLM3ForCausalLM):
    """Block diffusion on a [`SmolLM3ForCausalLM`]."""


class BD3LMGPT2ForMaskedLM(BD3LMDecoderMixin, GPT2LMHeadModel):
    """Block diffusion on a [`GPT2LMHeadModel`]."""

    lora_targets = ("c_attn", "c_proj", "c_fc")


class BD3LMPhi3ForMaskedLM(BD3LMDecoderMixin, Phi3ForCausalLM):
    """Block diffusion on a [`Phi3ForCausalLM`]."""

    lora_targets = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")


class BD3LMOlmo2ForMaskedLM(BD3LMDecoderMixin, Olmo2ForCausalLM):
    """Block diffusion on a [`Olmo2ForCausalLM`]."""


class BD3LMGraniteForMaskedLM(BD3LMDecoderMixin, GraniteForCausalLM):
    """Block diffusion on a [`GraniteForCausalLM`]."""


class BD3LMGemma3ForMaskedLM(BD3LMDecoderMixin, Gemma3ForCausalLM):
    """Block diffusion on a [`Gemma3ForCausalLM`]."""


#: Model type of a stock decoder -> its class for block diffusion.
DECODERS: dict[str, Any] = {}
_CONFIGURATIONS = {config.model_type: config for config in BD3LMDecoderConfigMixin.__subclasses__()}

_stock: Any
_kind: Any
for _kind in BD3LMDecoderMixin.__subclasses__():
    _stock = _kind.__bases__[-1]
    DECODERS[_stock.config_class.model_type] = _kind
    _kind.config_class = _CONFIGURATIONS[f"bd3lm_{_stock.config_class.model_type}"]
    register_auto_classes(_kind, "AutoModelForMaskedLM", "AutoModelForCausalLM", backbone=_kind)
