"""`generate` and `infill`: hooks into transformers' GenerationMixin, and the loop over blocks.

Only `_sample`, which greedy decoding and sampling share, is replaced (arXiv 2503.09573, Algorithm 2). Preparation,
logits processors, stopping criteria, streamers and the pipeline are those of transformers.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.logits_process import LogitNormalization, LogitsProcessorList
from transformers.generation.stopping_criteria import EosTokenCriteria, StoppingCriteriaList
from transformers.utils import logging

from .cache_bd3lm import cache_maker
from .decoding_bd3lm import BD3LMGenerateOutput, BlockWriter, Trace
from .decoding_state_bd3lm import EntropyStopCriteria, SecondEosCriteria, SequenceBuffer, StopRules, pad_left
from .generation_config_bd3lm import (
    SPECIAL_TOKENS,
    BD3LMGenerationConfig,
    check_known_fields,
    check_standard_fields,
    refuse_arguments_of_forward,
    refuse_arguments_of_generate,
    warn_about_unused_fields,
    window_stride,
)
from .inputs_bd3lm import check_attention_mask, check_ids, check_vocabulary
from .logits_process_bd3lm import NucleusLogitsProcessor
from .samplers_bd3lm import SAMPLERS, Generators, Sampler, check_generators
from .windows_bd3lm import DecodingNetwork, compiles_by_default, fills_window


logger = logging.get_logger(__name__)

# Any to a type checker: transformers types the `self` of its mixin as a whole model, which a mixin is not.
_Generative: Any = GenerationMixin

_EMPTY_PROMPT = "empty prompt: give every row a token, or call generate without input_ids to start from bos_token_id."


class Prompts(NamedTuple):
    """The prompts of a call on the model's device, each `(batch, length)`."""

    input_ids: torch.Tensor  # as passed
    attention_mask: torch.Tensor
    left: torch.Tensor  # padded on the left
    padding: torch.Tensor | None  # bool, True at the padding of `left`; None: no padding


class BlockGenerationMixin(_Generative):
    """`generate` for models that generate block by block.

    A subclass sets `generation_config_class`, whose constructor must have a default for every field that it adds, and
    has `open_writer`.
    """

    generator_per_row = True  # `generate` also takes a list of generators, one per row of the batch

    generation_config_class: Any
    masks_text = True  # new tokens start as mask tokens, so prompts must not contain one and outputs never do
    _supported_generation_modes = [GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE]

    # --- Preparation, where transformers' own does not fit -----------------------------------------------------------

    @property
    def generation_config(self) -> Any:
        """Defaults of `generate`. A plain `GenerationConfig` can be assigned; missing fields take their defaults."""
        return self._generation_config

    @generation_config.setter
    def generation_config(self, value: GenerationConfig | None) -> None:
        # transformers assigns plain configs while loading a model, and so do notebooks and trainers.
        kind = self.generation_config_class
        if value is not None and not isinstance(value, kind):
            check_known_fields(value, kind)
            # A config marked as made from a model config would lose our fields on saving, so the mark is dropped.
            fields = {k: v for k, v in value.to_dict().items() if v is not None and k != "_from_model_config"}
            value = kind(**{**kind().to_dict(), **fields})
        self._generation_config = value

    @functools.wraps(GenerationMixin.generate)
    def generate(self, inputs: Any = None, generation_config: Any = None, *args: Any, **kwargs: Any) -> Any:
        if isinstance(generation_config, Mapping):  # transformers would fail on its missing attributes
            generation_config, kwargs = None, {**generation_config, **kwargs}
        ids, mask = kwargs.get("input_ids") if inputs is None else inputs, kwargs.get("attention_mask")
        if ids is not None:
            # Before transformers reads the last token, and drops a mask of ones whatever its shape.
            if isinstance(ids, torch.Tensor) and ids.dim() == 2 and len(ids) and not ids.numel():
                raise ValueError(_EMPTY_PROMPT)
            check_ids(ids, "input_ids")
            check_attention_mask(mask, ids.shape)
        return super().generate(inputs, generation_config, *args, **kwargs)

    def adjust_generation_fn(self, *args: Any, **kwargs: Any) -> None:
        # `from_pretrained(folder, block_size=4)` also passes fields of the model's config to the generation config.
        known = vars(self.generation_config)
        kwargs = {k: v for k, v in kwargs.items() if k in known or not hasattr(self.config, k)}
        super().adjust_generation_fn(*args, **kwargs)
        for name in SPECIAL_TOKENS:
            if getattr(self.generation_config, name) is None:
                setattr(self.generation_config, name, getattr(self.config, name, None))

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Resize as transformers does. The mask token keeps its id.

        Raises:
            ValueError: if the new vocabulary would not include the mask token.
        """
        self._check_keeps_mask_token(new_num_tokens)
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)

    def _check_keeps_mask_token(self, new_num_tokens: int | None) -> None:
        mask = self.config.mask_token_id
        if new_num_tokens is not None and new_num_tokens <= mask:
            raise ValueError(
                f"resize_token_embeddings({new_num_tokens}) would drop mask_token_id={mask}: keep at least {mask + 1} "
                f"tokens."
            )

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, **kwargs: Any
    ) -> tuple[Any, dict]:
        self.config.check_block_size()
        for config in (generation_config, self.generation_config):
            if config is not None:
                check_known_fields(config, self.generation_config_class)
        prepared, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        if isinstance(prepared.eos_token_id, torch.Tensor):  # which transformers accepts
            prepared.eos_token_id = prepared.eos_token_id.tolist()
        # top_k of the call, of the config that was passed, and of the model's own config.
        requested = (kwargs.get("top_k"), getattr(generation_config, "top_k", None), self.generation_config.top_k)
        if all(top_k is None for top_k in requested):
            prepared.top_k = 0  # transformers would keep only the 50 most likely tokens
        check_standard_fields(prepared, self.config.vocab_size)
        self.generation_config_class.check_fields(prepared)
        if getattr(prepared, "output_trace", False) and not prepared.return_dict_in_generate:
            raise ValueError("output_trace=True needs return_dict_in_generate=True: a plain tensor has no trace.")
        warn_about_unused_fields(kwargs, prepared)
        return prepared, model_kwargs

    def _prepare_attention_mask_for_generation(
        self, inputs_tensor: torch.Tensor, generation_config: Any, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        # Tokenizers without a padding token are often given the mask token as one. A mask token in a text is a blank
        # and, without an attention_mask, must not be mistaken for padding.
        if self.masks_text and generation_config.pad_token_id == self.config.mask_token_id:
            return torch.ones(inputs_tensor.shape[:2], dtype=torch.long, device=inputs_tensor.device)
        return super()._prepare_attention_mask_for_generation(inputs_tensor, generation_config, *args, **kwargs)

    def prepare_inputs_for_generation(
        self, input_ids: Any, generator: Generators = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Declare `generator` for `generate`: a `torch.Generator`, or one per row, to make rows independent."""
        return super().prepare_inputs_for_generation(input_ids, **kwargs)

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        # Some tokenizers return token types, which these models do not use.
        super()._validate_model_kwargs({k: v for k, v in model_kwargs.items() if k != "token_type_ids"})
        refuse_arguments_of_forward(model_kwargs)

    def _get_logits_processor(
        self,
        generation_config: Any,
        input_ids_seq_length: int | None = None,
        *,
        prefix_allowed_tokens_fn: Callable[[int, torch.Tensor], list[int]] | None = None,
        **kwargs: Any,
    ) -> LogitsProcessorList:
        if generation_config.guidance_scale not in (None, 1):
            raise ValueError(
                f"guidance_scale={generation_config.guidance_scale} is not supported: transformers' classifier-free "
                f"guidance runs the model autoregressively. Leave it out."
            )
        allowed, mask = prefix_allowed_tokens_fn, self.config.mask_token_id
        if allowed is not None:
            # Processors run on whole batches. The scores of a row whose prefix still has masks are not used, so the
            # caller's function never sees it.
            def allowed_after(row: int, prefix: torch.Tensor) -> list[int]:
                is_hidden = self.masks_text and (prefix[input_ids_seq_length:] == mask).any()
                return [mask] if is_hidden else allowed(row, prefix)

            kwargs["prefix_allowed_tokens_fn"] = allowed_after
        model_kwargs = kwargs.get("model_kwargs") or {}
        if (real := model_kwargs.get("attention_mask")) is not None:
            # Processors see prompts padded on the left, and the repetition penalty must find where each begins.
            kwargs["model_kwargs"] = {**model_kwargs, "attention_mask": (real != 0).long().sort(dim=1).values}
        return super()._get_logits_processor(generation_config, input_ids_seq_length, **kwargs)

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(
            "continuous batching (generate_batch, cache_implementation='paged') decodes autoregressively and does not "
            "fit a block-diffusion model: call generate with a padded batch and its attention_mask."
        )

    def _check_prompt(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, generator: Generators) -> None:
        """Refuse a prompt that the model cannot read, or a wrong number of generators, before any work."""
        check_generators(generator, len(input_ids))
        real = attention_mask.bool()
        if not real.any(1).all():
            raise ValueError(_EMPTY_PROMPT)
        # Waits for the device, once per call.
        check_vocabulary(input_ids[real].cpu(), self.config.vocab_size, "the prompt")

    def _check_fits_window(self, attention_mask: torch.Tensor) -> None:
        """Refuse a text longer than the window, for callers that cannot drop part of it."""
        longest = int(attention_mask.bool().sum(1).max())
        if longest > self.config.model_length:
            raise ValueError(
                f"the prompt has {longest} tokens, more than the model's window "
                f"model_length={self.config.model_length}: shorten it, for instance by tokenizer(..., "
                f"truncation=True, max_length={self.config.model_length})."
            )

    def _last_window(self, attention_mask: torch.Tensor, size: int, cache: Cache | None) -> torch.Tensor:
        """Return the mask `(batch, length)` of the tokens to read: of a prompt longer than the window only its end.

        Args:
            size: tokens are dropped in multiples of this, so that block borders do not move.
            cache: that of an earlier call, which must be empty if tokens are dropped.
        """
        window, mask = self.config.model_length, attention_mask.long()
        if mask.shape[1] <= window:
            return mask
        lengths = mask.sum(1, keepdim=True)
        # Rounded up to whole blocks, so that the rest fits the window.
        left_out = ((lengths - window + size - 1) // size * size).clamp(min=0)
        if left_out.any():
            if cache is not None and cache.get_seq_length() > 0:
                raise ValueError(
                    f"past_key_values holds {cache.get_seq_length()} tokens of a prompt of {int(lengths.max())}, more "
                    f"than the model's window model_length={window}: leave it out, as the window has moved."
                )
            logger.warning_once(
                f"A prompt has {int(lengths.max())} tokens, more than the model's window "
                f"model_length={window}: only its end is read, as when the window slides over generated text."
            )
        return mask * (mask.cumsum(1) > left_out)

    def _take_prompts(self, input_ids: torch.Tensor, model_kwargs: dict[str, Any], synced_gpus: bool) -> Prompts:
        """Return the prompts of a call, which are refused if `generate` cannot continue them."""
        input_ids, attention_mask = input_ids.long().to(self.device), model_kwargs.get("attention_mask")
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(self.device)
        if synced_gpus:
            raise ValueError(
                "synced_gpus=True: generating from sharded weights (ZeRO-3, FSDP) is not supported. Gather the model "
                "on one device first, or pass synced_gpus=False if every process holds the whole weights."
            )
        self._check_prompt(input_ids, attention_mask, model_kwargs.get("generator"))
        if self.masks_text and ((input_ids == self.config.mask_token_id) & attention_mask.bool()).any():
            instead = "; model.infill(input_ids) does" if hasattr(self, "infill") else ""
            raise ValueError(
                f"the prompt contains mask_token_id={self.config.mask_token_id}: generate continues a text and does "
                f"not fill blanks in it{instead}. If the mask tokens are padding, pass an attention_mask."
            )
        return Prompts(input_ids, attention_mask, *pad_left(input_ids, attention_mask))

    # --- Decoding ----------------------------------------------------------------------------------------------------

    def open_writer(
        self, prompts: Prompts, processors: LogitsProcessorList, generation_config: Any, model_kwargs: dict[str, Any]
    ) -> Any:
        """Align the prompts in a buffer. Return what denoises its blocks, with the methods of a [`BlockWriter`]."""
        raise NotImplementedError

    @torch.no_grad()
    def _sample(
        self,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> BD3LMGenerateOutput | torch.Tensor:
        """Generate block by block (Algorithm 2).

        1. Align the prompts.
        2. Denoise each block, given the text before it.
        3. End the rows that meet a stopping criterion, and stream the block.
        4. Concatenate prompts and new tokens.
        """
        # 1. Align
        prompts, home = self._take_prompts(input_ids, model_kwargs, synced_gpus), input_ids.device
        writer = self.open_writer(prompts, logits_processor, generation_config, model_kwargs)
        stop = StopRules(stopping_criteria, prompts.left, writer.buffer, generation_config, prompts.padding)
        for begin in writer.buffer.blocks():
            # 2. Denoise
            writer.denoise(begin, stop.finished, streamer)
            # 3. Stop and stream
            streamed = stop.update(begin)
            if streamer is not None and streamed.numel():
                streamer.put(streamed.cpu())
            if stop.all_finished:
                break
        if streamer is not None:
            streamer.end()
        # 4. Concatenate
        cache = writer.close(keep=bool(generation_config.return_dict_in_generate))
        new_tokens = stop.new_tokens()
        sequences = torch.cat([prompts.input_ids, new_tokens], dim=1).to(home)
        if not generation_config.return_dict_in_generate:
            return sequences
        return BD3LMGenerateOutput(
            sequences=sequences,
            past_key_values=cache,
            **writer.record.result(*new_tokens.shape),
            **writer.statistics(int(stop.lengths.sum())),
        )


class BD3LMGenerationMixin(BlockGenerationMixin):
    """`generate` and `infill` for block diffusion."""

    generation_config_class: type[BD3LMGenerationConfig] = BD3LMGenerationConfig
    samplers: dict[str, type[Sampler]] = SAMPLERS  # those that suit the network's predictions

    def decoding_network(self) -> DecodingNetwork:
        """Return the forward passes of decoding; models with another network override this."""
        return DecodingNetwork(self)

    # --- Preparation, where transformers' own does not fit -----------------------------------------------------------

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode | None = None,
        batch_size: int = 1,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        name = generation_config.cache_implementation
        make_cache = cache_maker(name)
        given = model_kwargs.get("past_key_values") is not None
        reason = None
        if self.config.time_conditioning:
            reason = "with time_conditioning=True the keys of a text change with the noise level"
        elif fills_window(self.config):
            reason = f"its block of {self.config.block_size} tokens fills the window, so no block is finished early"
        if reason is not None:
            cache = model_kwargs.pop("past_key_values", None)
            if cache is not None and cache.get_seq_length() > 0:
                raise ValueError(f"past_key_values does not fit this model: {reason}. Leave the cache out.")
        elif generation_config.use_cache and not given:
            if name is None and compiles_by_default(self, generation_config, batch_size):
                make_cache = cache_maker("static")
            model_kwargs["past_key_values"] = make_cache(self.config)

    def _get_logits_processor(self, generation_config: Any, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        processors = super()._get_logits_processor(generation_config, *args, **kwargs)
        if generation_config.nucleus_p < 1.0:
            normalizes = len(processors) > 0 and isinstance(processors[-1], LogitNormalization)
            processors.insert(len(processors) - normalizes, NucleusLogitsProcessor(generation_config.nucleus_p))
        return processors

    def _get_stopping_criteria(self, generation_config: Any, *args: Any, **kwargs: Any) -> StoppingCriteriaList:
        criteria = super()._get_stopping_criteria(generation_config, *args, **kwargs)
        if generation_config.entropy_stop is not None:
            criteria.append(EntropyStopCriteria(generation_config.entropy_stop, generation_config.entropy_stop_window))
        if generation_config.stop_at_second_eos:
            if generation_config.eos_token_id is None:
                raise ValueError("stop_at_second_eos=True needs an end token: set eos_token_id.")
            criteria = StoppingCriteriaList(c for c in criteria if not isinstance(c, EosTokenCriteria))
            criteria.append(SecondEosCriteria(generation_config.eos_token_id))
        return criteria

    # --- Decoding ----------------------------------------------------------------------------------------------------

    def open_writer(
        self, prompts: Prompts, processors: LogitsProcessorList, generation_config: Any, model_kwargs: dict[str, Any]
    ) -> BlockWriter:
        # The blocks of all rows end at the same columns.
        cache = model_kwargs.get("past_key_values")
        stride = window_stride(self.config, generation_config.window_stride)
        read = self._last_window(prompts.attention_mask, stride or self.config.block_size, cache)
        max_new_tokens = generation_config.max_length - prompts.input_ids.shape[1]
        buffer = SequenceBuffer.from_prompts(
            prompts.input_ids, read, max_new_tokens, self.config.block_size, self.config.mask_token_id, stride
        )
        generator = model_kwargs.get("generator")
        trace = Trace(buffer, read) if generation_config.output_trace else None
        return BlockWriter(self, buffer, prompts.left, processors, generation_config, cache, generator, trace)

    @torch.no_grad()
    def infill(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        logits_processor: LogitsProcessorList | list[Any] | None = None,
        generator: Generators = None,
        **kwargs: Any,
    ) -> BD3LMGenerateOutput | torch.Tensor:
        """Replace every mask token of a text, at any position.

        Blocks are filled from left to right, each jointly: a blank sees everything to its left, and to its right the
        rest of its own block. With a single blank, the greedy choice is that of `pipeline("fill-mask")`. An end token
        in a blank has no special meaning.

        ```python
        >>> ids = tokenizer("The <mask> jumps over the <mask> dog", return_tensors="pt").input_ids
        >>> tokenizer.decode(model.infill(ids)[0])
        ```

        Args:
            input_ids: `(batch, length)`, of at most `model_length` tokens. Rows without a mask token are unchanged.
            attention_mask: `(batch, length)`, zeros for padding. Without it `pad_token_id` marks padding, unless that
                is also the mask token: a mask token is then always a blank.
            generation_config: as for `generate`; its fields about lengths and stopping have no effect.
            generator: a `torch.Generator`, or one per row, to make rows independent.
            kwargs: fields of the generation config: `do_sample`, `sampler`, `temperature`, `nucleus_p`, ...

        Returns:
            the completed `input_ids`, or with `return_dict_in_generate` a [`BD3LMGenerateOutput`].

        Raises:
            ValueError: if an argument concerns lengths or stopping, or if ids or lengths do not fit the model.
        """
        if isinstance(generation_config, Mapping):
            generation_config, kwargs = None, {**generation_config, **kwargs}
        refuse_arguments_of_generate(kwargs)
        check_ids(input_ids, "input_ids")
        check_attention_mask(attention_mask, input_ids.shape)
        config, model_kwargs = self._prepare_generation_config(generation_config, **kwargs)
        self._validate_model_kwargs(model_kwargs)
        self._prepare_special_tokens(config, attention_mask is not None, device=self.device)
        home, input_ids = input_ids.device, input_ids.long().to(self.device)
        if attention_mask is None:
            attention_mask = self._prepare_attention_mask_for_generation(input_ids, config, {})
        attention_mask = attention_mask.to(self.device)
        self._check_prompt(input_ids, attention_mask, generator)
        self._check_fits_window(attention_mask)
        processors = self._get_logits_processor(
            config,
            0,
            encoder_input_ids=input_ids,
            logits_processor=LogitsProcessorList(logits_processor or []),
            device=self.device,
            model_kwargs=model_kwargs,
        )
        # 1. Align, as in `_sample`; blanks are the positions to reveal.
        buffer, is_text = SequenceBuffer.from_blanks(
            input_ids, attention_mask, self.config.block_size, self.config.mask_token_id
        )
        trace = Trace(buffer, attention_mask) if config.output_trace else None
        cached = config.use_cache and not self.config.time_conditioning and not fills_window(self.config)
        cache = cache_maker(config.cache_implementation)(self.config) if cached else None
        # The context of processors starts at the first token of each row, so the prompt before the buffer is empty.
        writer = BlockWriter(self, buffer, input_ids[:, :0], processors, config, cache, generator, trace)
        # 2. Fill block after block; those without a blank are only read.
        for begin in buffer.blocks():
            if buffer.new_positions(begin).any():
                writer.denoise(begin, torch.zeros(len(input_ids), dtype=torch.bool))
        writer.close(keep=False)
        # 3. Put the texts back in their columns; both sides are in reading order.
        sequences = input_ids.masked_scatter(attention_mask.bool(), buffer.token_ids[is_text]).to(home)
        if not config.return_dict_in_generate:
            return sequences
        assert buffer.blanks is not None
        return BD3LMGenerateOutput(sequences=sequences, **writer.statistics(int(buffer.blanks.sum())))
