"""A stock decoder of transformers as the network of block diffusion.

A stock decoder attends as its mask says and rotates as its positions say. Both are passed, so that the sequence
`[x_0 ; x_t]` of two streams, or a block after a cache of finished blocks, goes through the stock layers in one call.
"""

from typing import Any, NamedTuple, cast

import torch
from torch.nn.attention.flex_attention import BlockMask
from transformers.cache_utils import StaticCache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import AttentionInterface

from .attention_bd3lm import flex_attention_forward, stream_mask
from .cache_bd3lm import StaticSlots, StepCache, last_clean
from .configuration_bd3lm_decoders import head_dim_of, slides
from .inputs_bd3lm import Layout, may_read, read_inputs, token_layout
from .windows_bd3lm import DecodingNetwork


#: The name in transformers of the attention of a decoder with attn_implementation="flex_attention".
FLEX_ATTENTION = "bd3lm_flex_attention"


AttentionInterface.register(FLEX_ATTENTION, flex_attention_forward)


class TwoStreamHidden(NamedTuple):
    """Hidden states of a pass over `[x_0 ; x_t]`."""

    noisy: torch.Tensor  # (batch, num_noise_samples * length, hidden_size), aligned: the state at i predicts token i
    clean: torch.Tensor  # (batch, length, hidden_size), not aligned; empty if a cache holds the clean stream


class DecoderBackbone:
    """A stock decoder with the interface of a [`BD3LMModel`]: maps token ids to hidden states for the head."""

    def __init__(self, model: Any) -> None:
        self.model, self.config = model, model.config
        self.shifted: bool = model.config.alignment != "same"

    def vocab_embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the embeddings of tokens, without positions."""
        return self.model.get_input_embeddings()(input_ids)

    def run(
        self,
        inputs_embeds: torch.Tensor,
        position_ids: torch.Tensor,
        mask: torch.Tensor | BlockMask,
        cache: StepCache | None = None,
        **recorded: bool,
    ) -> BaseModelOutputWithPast:
        """Run the stock decoder once; `last_hidden_state` is `(batch, length, hidden_size)`.

        Args:
            mask: additive `(batch or 1, 1, length, keys)`, or a sparse mask of flex attention.
            recorded: `output_hidden_states` and `output_attentions`.

        Raises:
            ValueError: if a cache is used in train mode with gradient checkpointing, where stock layers ignore it.
        """
        decoder = self.model.base_model
        if cache is not None and decoder.training and _checkpoints_gradients(decoder):
            raise ValueError(
                "a cache cannot be used with gradient checkpointing in train mode, where the layers would ignore it: "
                "call model.eval() before scoring or generating."
            )
        outputs = decoder(
            inputs_embeds=inputs_embeds,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=False,
            return_dict=True,
            **recorded,
        )
        divisor = getattr(self.config, "logits_scaling", None)
        if divisor:
            # Granite divides its logits. Its head has no bias, so the hidden states can be divided instead.
            outputs.last_hidden_state = outputs.last_hidden_state / divisor
        if cache is not None and cache.num_committed and self.shifted:
            cache.cache.clean_hidden = outputs.last_hidden_state[:, : cache.num_committed]
        return outputs

    def two_streams(
        self,
        embeds: torch.Tensor,
        layout: Layout,
        *,
        num_noise_samples: int = 1,
        cache: StepCache | None = None,
        **recorded: bool,
    ) -> tuple[TwoStreamHidden, BaseModelOutputWithPast]:
        """Run the embeddings of `[x_0 ; x_t]`, or of x_t alone after a cache of x_0."""
        check_length(layout, self.config)
        length = layout.block_ids.shape[1]
        streams = num_noise_samples + 1
        mask = decoder_mask(
            layout, self.config, embeds.dtype, num_streams=streams, first_query=0 if cache is None else length
        )
        positions = layout.position_ids.repeat(1, streams if cache is None else num_noise_samples)
        outputs = self.run(embeds, positions, mask, cache, **recorded)
        hidden = cast(torch.Tensor, outputs.last_hidden_state)
        split = 0 if cache is not None else length
        clean, noisy = hidden[:, :split], hidden[:, split:]
        before = clean if cache is None else cache.cache.clean_hidden if self.shifted else None
        return TwoStreamHidden(self._aligned(noisy, before, layout, num_noise_samples), clean), outputs

    def _aligned(
        self, noisy: torch.Tensor, clean: torch.Tensor | None, layout: Layout, num_noise_samples: int
    ) -> torch.Tensor:
        """Align the hidden states of noisy streams, side by side, with the tokens that they predict.

        Args:
            clean: hidden states of the clean stream, which predict the first token of a block; None if there is only
                one block.
        """
        if not self.shifted:
            return noisy
        batch, _, width = noisy.shape
        streams = noisy.view(batch, num_noise_samples, -1, width)
        moved = shift_right(streams, streams[:, :, :1])
        if clean is not None and self.config.alignment == "shifted":
            begins = (layout.position_ids % self.config.block_size == 0)[:, None, :, None]
            moved = torch.where(begins, shift_right(clean, clean[:, :1]).unsqueeze(1), moved)
        # The first token of a text has no predecessor: its logits are those of its own position, and never scored.
        return torch.where((layout.position_ids == 0)[:, None, :, None], streams, moved).flatten(1, 2)

    def __call__(
        self,
        input_ids: torch.Tensor | None = None,
        *,
        clean_input_ids: torch.Tensor | None = None,
        timesteps: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **inputs: Any,
    ) -> BaseModelOutputWithPast:
        """Return hidden states `(batch, length, hidden_size)`; arguments as in [`BlockDiffusionMixin.forward`].

        Without `clean_input_ids` and a cache, every block is denoised given the blocks of `input_ids` before it.
        `timesteps` is unused.
        """
        embeds, layout, cache, past = read_inputs(
            self.model, input_ids=input_ids, clean_input_ids=clean_input_ids, **inputs
        )
        length = embeds.shape[1]
        requested = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
        recorded: Any = {name: value for name, value in requested.items() if value is not None}
        # A causal context and the blocks to denoise need two streams, although their tokens are the same.
        causal_context = self.config.context == "token" and cache is None and length > 1
        if clean_input_ids is not None or causal_context:
            clean = embeds if clean_input_ids is None else self.vocab_embed(clean_input_ids)
            hidden, outputs = self.two_streams(torch.cat([clean, embeds], dim=1), layout, **recorded)
            return BaseModelOutputWithPast(
                last_hidden_state=hidden.noisy,
                hidden_states=_noisy_part(outputs.hidden_states, 1, length),
                attentions=_noisy_part(outputs.attentions, 2, length),
            )
        check_length(layout, self.config)
        causal = past + (0 if cache is None else cache.num_committed)
        mask = decoder_mask(layout, self.config, embeds.dtype, first_query=past, causal_columns=causal)
        before = last_clean(cache) if cache is not None and self.shifted and past else None
        positions = layout.position_ids[:, past:]
        outputs = self.run(embeds, positions, mask, cache, **recorded)
        if self.shifted:
            states = cast(torch.Tensor, outputs.last_hidden_state)
            moved = shift_right(states, states[:, :1] if before is None else before)
            # As in `_aligned`: a text after padding or another document has no predecessor.
            outputs.last_hidden_state = torch.where((positions == 0).unsqueeze(-1), states, moved)
        outputs.past_key_values = None if cache is None else cache.cache
        return outputs


class DecoderDecodingNetwork(DecodingNetwork):
    """The forward passes of `generate` and `infill`, with a stock decoder."""

    def __init__(self, model: Any) -> None:
        self.model, self.config = model, model.config
        self.dtype, self.device = model.dtype, model.device
        self.backbone: DecoderBackbone = model.backbone
        rope = getattr(model.config, "rope_parameters", None) or {}
        if rope.get("rope_type") == "longrope":
            self.rope_switch = rope["original_max_position_embeddings"]

    @property
    def key_value_shape(self) -> tuple[int, int]:
        """Number of heads of the cached keys and values, and the width of each."""
        heads = getattr(self.config, "num_key_value_heads", None) or self.config.num_attention_heads
        return heads, head_dim_of(self.config)

    def hidden(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        key_valid: torch.Tensor | None,
        positions: torch.Tensor | None,
        *,
        cache: StepCache | None = None,
        num_cached: int = 0,
        num_out_of_window: int = 0,
        sigma: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """Return the hidden states that predict the given positions of the block; see [`DecodingNetwork.hidden`]."""
        length, size = input_ids.shape[1], self.config.block_size
        finished = length if positions is None else length - size
        layout = token_layout(key_valid, length, size, past=num_cached, device=input_ids.device)
        mask = decoder_mask(
            layout,
            self.config,
            self.dtype,
            first_query=num_cached,
            causal_columns=num_cached + finished,
            dense=True,
        )
        if num_out_of_window:
            mask = cast(torch.Tensor, mask).clone()
            mask[:, :, finished:, :num_out_of_window] = -torch.inf
        embeds = self.backbone.vocab_embed(input_ids)
        states = self.backbone.run(embeds, position_ids, mask, cache).last_hidden_state
        if positions is None:
            return None
        before = cache if num_cached else None
        return self._block_states(cast(torch.Tensor, states), finished, before).flatten(0, 1)[positions]

    def static_hidden(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        mask: torch.Tensor,
        slots: torch.Tensor,
        cache: StaticCache,
    ) -> torch.Tensor:
        """Return the hidden states that predict the block; see [`DecodingNetwork.static_hidden`]."""
        finished = input_ids.shape[1] - self.config.block_size
        if self.config.context == "token" and finished > 1:
            # The mask is block-causal, but a clean token of this context sees nothing to its right.
            later = torch.ones(finished, finished, dtype=torch.bool, device=mask.device).triu(1)
            rows = torch.arange(finished, device=mask.device).unsqueeze(1)
            hidden = torch.zeros(mask.shape[2:], dtype=torch.bool, device=mask.device)
            mask = mask.masked_fill(hidden.index_put((rows, slots[:finished]), later), -torch.inf)
        embeds = self.backbone.vocab_embed(input_ids)
        step = StaticSlots(cache, slots, finished)
        states = self.backbone.run(embeds, position_ids, mask, step).last_hidden_state
        # Nothing is cached before the first block of a text. Its first token is not predicted.
        before = None if getattr(cache, "clean_hidden", None) is None else step
        return self._block_states(cast(torch.Tensor, states), finished, before)

    def _block_states(self, states: torch.Tensor, finished: int, cache: StepCache | None) -> torch.Tensor:
        """Return the states that predict the tokens of the block, `(batch, block_size, hidden_size)`."""
        noisy = states[:, finished:]
        if not self.backbone.shifted:
            return noisy
        if finished:
            return shift_right(noisy, states[:, finished - 1 : finished])
        return shift_right(noisy, noisy[:, :1] if cache is None else last_clean(cache))


def _checkpoints_gradients(decoder: Any) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in decoder.modules())


def shift_right(hidden: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """Return hidden states `(..., length, width)` shifted right by one, with `first` `(..., 1, width)` in front."""
    return torch.cat([first, hidden[..., :-1, :]], dim=-2)


def _noisy_part(recorded: tuple[torch.Tensor, ...] | None, dim: int, length: int) -> tuple[torch.Tensor, ...] | None:
    return None if recorded is None else tuple(states.narrow(dim, length, length) for states in recorded)


def check_length(layout: Layout, config: Any) -> None:
    """Refuse a text that is longer than the network can see.

    Raises:
        ValueError: if it is longer than the sliding window or the table of learned positions.
    """
    limited = config.has_learned_positions or slides(config)
    if not limited or layout.block_ids.shape[1] <= config.longest:
        return
    if not layout.is_aligned() and not may_read(layout.position_ids.device):
        return  # training must not wait for an accelerator to learn how long padded or packed rows are
    # Packed documents are each counted from their start.
    longest = layout.block_ids.shape[1] if layout.is_aligned() else int(layout.position_ids.max()) + 1
    if longest > config.longest:
        what = "sliding_window" if slides(config) else "max_position_embeddings"
        raise ValueError(
            f"a text of {longest} tokens is longer than {what}={config.longest} of this {config.model_type}: pass at "
            f"most {config.longest} tokens, or score it in windows (`bd3lm eval --window {config.model_length}`)."
        )


def decoder_mask(
    layout: Layout,
    config: Any,
    dtype: torch.dtype,
    *,
    causal_columns: int | None = None,
    dense: bool = False,
    **streams: int,
) -> torch.Tensor | BlockMask:
    """Return the mask of a decoder's context, see [`stream_mask`]; sparse for flex attention, else additive.

    Args:
        causal_columns: leading tokens of x_0 that are causal in `context="token"`, by default all.
        dense: return a dense mask for flex attention too, as for short passes, where building a sparse one is slow.
        streams: `num_streams` and `first_query`.
    """
    causal = layout.block_ids.shape[1] if causal_columns is None else causal_columns
    return stream_mask(
        layout,
        config.block_size,
        dtype,
        causal_columns=0 if config.context == "block" else causal,
        sparse=config._attn_implementation == FLEX_ATTENTION and not dense,
        **streams,
    )
