"""What `generate` is to every model that writes in blocks: a kept generation config, prompts, and what is refused.

Only `_sample` is left to the models, where greedy decoding and sampling both arrive; preparation, logits processors,
stopping criteria, streamers and the pipeline are transformers'.

Text from a block-diffusion model, block by block (arXiv 2503.09573, Algorithm 2), as transformers' own `generate`.

Only `_sample` is replaced, where greedy decoding and sampling both arrive; preparation, logits processors, stopping
criteria, streamers and the pipeline are transformers'.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.logits_process import LogitNormalization, LogitsProcessorList
from transformers.generation.stopping_criteria import EosTokenCriteria, StoppingCriteriaList
from transformers.modeling_outputs import ModelOutput

from .cache_bd3lm import cache_maker
from .decoding_bd3lm import NOT_FOR_GAPS, BlockWriter, Trace, TraceStep, fill_gaps, sequence_columns
from .decoding_state_bd3lm import EntropyStopCriteria, SecondEosCriteria, SequenceBuffer, StopRules, lay_out
from .generation_config_bd3lm import BD3LMGenerationConfig, check_generation_fields
from .logits_process_bd3lm import NucleusLogitsProcessor
from .samplers_bd3lm import SAMPLERS, Generators, Sampler, check_generators
from .windows_bd3lm import fills_window


# transformers types the `self` of its mixin as a whole model, which another mixin is not: to a type checker it is Any.
_Generative: Any = GenerationMixin


# Arguments of the forward pass that `generate` decides itself: given by a caller, they would be ignored.
_DECIDED_HERE = (
    "labels",
    "clean_input_ids",
    "noisy_logits",
    "timesteps",
    "block_noise",
    "token_noise",
    "count_noise",
    "num_items_in_batch",
    "output_attentions",
    "output_hidden_states",
)


class BlockGenerationMixin(_Generative):
    """Preparation of `generate`, where transformers' own does not fit models that write in blocks.

    A class names its `generation_config_class`, whose constructor has a default for every field of its own.
    """

    generator_per_row = True  # `generate` also takes a list of generators, one for each row of the batch

    generation_config: Any
    generation_config_class: Any
    _supported_generation_modes = [GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE]

    def adjust_generation_fn(self, *args: Any, **kwargs: Any) -> None:
        super().adjust_generation_fn(*args, **kwargs)
        # transformers reloads a plain GenerationConfig; one made from config.json forgets its own fields on saving.
        fields = self.generation_config.to_dict()
        fields.pop("_from_model_config", None)
        kind = self.generation_config_class
        self.generation_config = kind(**{**kind().to_dict(), **{k: v for k, v in fields.items() if v is not None}})
        self._adopt_special_tokens()

    def _adopt_special_tokens(self) -> None:
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(self.generation_config, name) is None:
                setattr(self.generation_config, name, getattr(self.config, name, None))

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, **kwargs: Any
    ) -> tuple[Any, dict]:
        prepared, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        asked = (kwargs.get("top_k"), getattr(generation_config, "top_k", None), self.generation_config.top_k)
        if all(top_k is None for top_k in asked):
            prepared.top_k = 0
        return prepared, model_kwargs

    def prepare_inputs_for_generation(
        self, input_ids: Any, generator: Generators = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Declares `generator` as an argument of `generate`: the source of all randomness of the call, or one per row,
        which makes what a row draws independent of its batch."""
        return super().prepare_inputs_for_generation(input_ids, **kwargs)

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        # Some tokenizers send the type of each token, which is nothing to a model of plain text.
        super()._validate_model_kwargs({k: v for k, v in model_kwargs.items() if k != "token_type_ids"})
        unfit = [name for name in _DECIDED_HERE if model_kwargs.get(name) is not None]
        if unfit:
            raise ValueError(
                f"generate does not take {', '.join(unfit)}: call the model itself for losses, attentions and hidden "
                f"states."
            )

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
                f"guidance_scale={generation_config.guidance_scale}: transformers' classifier-free guidance runs the "
                f"model autoregressively, which a block-diffusion model is not. Leave it out."
            )
        if prefix_allowed_tokens_fn is not None:
            prefix_allowed_tokens_fn = self._only_finished_prefixes(
                prefix_allowed_tokens_fn, input_ids_seq_length or 0
            )
        return super()._get_logits_processor(
            generation_config,
            input_ids_seq_length,
            prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
            **kwargs,
        )

    def _only_finished_prefixes(
        self, allowed: Callable[[int, torch.Tensor], list[int]], prompt_width: int
    ) -> Callable[[int, torch.Tensor], list[int]]:
        """Spares a caller's function the rows that are judged elsewhere, whose prefix is not all revealed here."""
        mask = self.config.mask_token_id

        def of_revealed(row: int, prefix: torch.Tensor) -> list[int]:
            return [mask] if (prefix[prompt_width:] == mask).any() else allowed(row, prefix)

        return of_revealed

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(
            "continuous batching (generate_batch, cache_implementation='paged') decodes autoregressively, which a "
            "block-diffusion model does not: call generate with a padded batch and its attention_mask."
        )

    @property
    def init_continuous_batching(self) -> Any:
        raise AttributeError(f"{type(self).__name__} has no continuous batching: call generate.")

    def _check_prompt(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
        """Refuse what the model can not read, before any work."""
        config = self.config
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask of shape {tuple(attention_mask.shape)} does not fit input_ids of shape "
                f"{tuple(input_ids.shape)}: give one 0 (padding) or 1 per token."
            )
        lengths = [input_ids.shape[1]] if attention_mask is None else attention_mask.bool().sum(1).tolist()
        if min(lengths) == 0:
            raise ValueError(
                "empty prompt: give every row at least one token, or call generate without input_ids to start from "
                "bos_token_id."
            )
        if max(lengths) > config.model_length:
            raise ValueError(
                f"the prompt has {max(lengths)} tokens, more than the model's window "
                f"model_length={config.model_length}: shorten it, for instance by tokenizer(..., truncation=True, "
                f"max_length={config.model_length})."
            )
        real = input_ids if attention_mask is None else input_ids[attention_mask.bool()]
        outside = (real < 0) | (real >= config.vocab_size)
        if outside.any():
            raise ValueError(
                f"the prompt holds the id {int(real[outside][0])}, outside the vocabulary of {config.vocab_size} ids: "
                f"use the tokenizer that the model was trained with."
            )

    def _check_continuable(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, synced_gpus: bool
    ) -> None:
        """Refuse what `generate` can not continue, before any work."""
        if synced_gpus:
            raise ValueError(
                "synced_gpus=True: generating from sharded weights (ZeRO-3, FSDP) is not supported; gather the model "
                "on one device first, or pass synced_gpus=False where every process holds whole weights."
            )
        self._check_prompt(input_ids, attention_mask)
        masked = input_ids == self.config.mask_token_id
        if (masked if attention_mask is None else masked & attention_mask.bool()).any():
            instead = "; model.infill(input_ids) does" if hasattr(self, "infill") else ""
            raise ValueError(
                f"the prompt holds mask_token_id={self.config.mask_token_id}: generate continues a text and does not "
                f"fill gaps in it{instead}."
            )


def pad_left(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Prompts `(batch, length)` with their padding moved to the left, and where it is then; None: nowhere.

    Processors and criteria that read the text find the new tokens right behind it.
    """
    if attention_mask is None or bool(attention_mask.all()):
        return input_ids, None
    order = attention_mask.bool().long().argsort(dim=1, stable=True)
    return input_ids.gather(1, order), ~attention_mask.bool().gather(1, order)


@dataclass
class BD3LMGenerateOutput(ModelOutput):
    """What `generate(return_dict_in_generate=True)` returns.

    Args:
        sequences: `(batch, prompt + new)`, the prompt as given and what was written.
        scores: with `output_scores`, for each new token the processed scores `(batch, vocab_size)` it was drawn from.
        logits: with `output_logits`, the same before processing.
        past_key_values: the cache of finished blocks, for the next call. Empty when the window has moved, or texts
            that ended early were left out of the network: the next call then reads its prompt anew.
        num_forward_passes: denoising passes of the network; the pass over the prompt is not counted.
        tokens_per_forward: new tokens, finished rows' padding left out, per row and denoising pass.
        trace: with `output_trace`, every denoising step that draws tokens.
    """

    sequences: torch.Tensor | None = None
    scores: tuple[torch.Tensor, ...] | None = None
    logits: tuple[torch.Tensor, ...] | None = None
    past_key_values: Cache | None = None
    num_forward_passes: int | None = None
    tokens_per_forward: float | None = None
    trace: list[TraceStep] | None = None


class BD3LMGenerationMixin(BlockGenerationMixin):
    """`generate` for block diffusion."""

    generation_config_class: type[BD3LMGenerationConfig] = BD3LMGenerationConfig
    samplers: dict[str, type[Sampler]] = SAMPLERS  # those that fit what the network predicts

    # --- Preparation, where transformers' own does not fit -----------------------------------------------------------

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, **kwargs: Any
    ) -> tuple[Any, dict]:
        prepared, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        check_generation_fields(prepared)
        if prepared.output_trace and not prepared.return_dict_in_generate:
            raise ValueError(
                "output_trace=True has no place in a plain tensor of tokens: set return_dict_in_generate=True too."
            )
        return prepared, model_kwargs

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        make = cache_maker(generation_config.cache_implementation)
        given = model_kwargs.get("past_key_values") is not None
        if self.config.time_conditioning:
            # The keys of finished blocks depend on the noise level of the step that reads them: nothing can be kept.
            if given:
                raise ValueError(
                    "past_key_values does not fit this model: with time_conditioning=True the keys of a text change "
                    "with the noise level. Leave the cache out."
                )
        elif fills_window(self.config):
            # A window is one block, denoised together: nothing in it is finished before the rest. A cache stays empty.
            cache = model_kwargs.pop("past_key_values", None)
            if cache is not None and cache.get_seq_length() > 0:
                raise ValueError(
                    f"past_key_values does not fit this model: its block of {self.config.block_size} tokens fills the "
                    f"window, so there are no finished blocks to keep. Leave the cache out."
                )
        elif generation_config.use_cache and not given:
            model_kwargs["past_key_values"] = make(self.config)

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
        """Write block after block (Algorithm 2).

        1. Lay the prompts out so that the blocks of all rows end together.
        2. For each block: reveal its masked positions as the sampler says. The first step also writes the block before
           it to the cache.
        3. Cut rows where a stopping criterion holds; show the block to the streamer.
        4. Put prompts and new tokens together.
        """
        # 1. Lay out
        home, input_ids = input_ids.device, input_ids.to(self.device)
        attention_mask = model_kwargs.get("attention_mask")
        attention_mask = None if attention_mask is None else attention_mask.to(self.device)
        self._check_continuable(input_ids, attention_mask, synced_gpus)
        check_generators(model_kwargs.get("generator"), len(input_ids))
        size, mask_id = self.config.block_size, self.config.mask_token_id
        new_tokens = generation_config.max_length - input_ids.shape[1]
        stride = window_stride(self.config, generation_config.window_stride)
        canvas = lay_out(input_ids, attention_mask, new_tokens, size, mask_id, stride)
        prompt, padding = pad_left(input_ids, attention_mask)
        stop = StopRules(stopping_criteria, prompt, canvas, generation_config, padding)
        writer = BlockWriter(
            self,
            canvas,
            prompt,
            logits_processor,
            generation_config,
            model_kwargs.get("past_key_values"),
            model_kwargs.get("generator"),
            trace_of(canvas, input_ids, attention_mask) if generation_config.output_trace else None,
        )
        for begin in canvas.blocks():
            # 2. Denoise
            writer.denoise(begin, stop.finished, streamer)
            # 3. Stop and stream
            shown = stop.update(begin)
            if streamer is not None and shown.numel():
                streamer.put(shown.cpu())
            if stop.all_finished:
                break
            writer.passes.leave_out(stop.finished)
        if streamer is not None:
            streamer.end()
        # 4. Assemble
        cache = writer.passes.close()
        sequences = torch.cat([input_ids, stop.new_tokens()], dim=1).to(home)
        if not generation_config.return_dict_in_generate:
            return sequences
        count = sequences.shape[1] - input_ids.shape[1]
        return BD3LMGenerateOutput(
            sequences=sequences,
            scores=writer.scores.result(len(input_ids), count),
            logits=writer.logits.result(len(input_ids), count),
            past_key_values=cache,
            num_forward_passes=writer.passes.count,
            tokens_per_forward=float(stop.lengths.sum()) / max(1, writer.passes.count) / input_ids.shape[0],
            trace=None if writer.trace is None else writer.trace.steps,
        )

    @torch.no_grad()
    def infill(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        logits_processor: LogitsProcessorList | list[Any] | None = None,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> BD3LMGenerateOutput | torch.Tensor:
        """Complete texts in place: every mask token becomes a token of the text, wherever it stands.

        Blocks are filled from left to right, each jointly: a gap sees all that stands to its left, and to its right
        what its own block holds; later blocks are not seen by earlier ones. Where one token is missing, the greedy
        choice is that of `pipeline("fill-mask")`. An end token inside a gap is a token like any other.

        ```python
        >>> ids = tokenizer("The <mask> jumps over the <mask> dog", return_tensors="pt").input_ids
        >>> tokenizer.decode(model.infill(ids)[0])
        ```

        Args:
            input_ids: `(batch, length)`, of at most `model_length` tokens. Rows without a mask token stay as they are.
            attention_mask: `(batch, length)`, zeros where a row is padded; inferred from padding where left out.
            generation_config: as for `generate`; what it says about lengths and ends has no meaning here.
            kwargs: its fields: `do_sample`, `sampler`, `temperature`, `nucleus_p`, `bad_words_ids`, ...

        Returns:
            the completed `input_ids`, or with `return_dict_in_generate` a [`BD3LMGenerateOutput`].

        Raises:
            ValueError: arguments on lengths and ends; ids or lengths that the model does not know.
        """
        unfit = [name for name in NOT_FOR_GAPS if kwargs.get(name) is not None]
        if unfit:
            raise ValueError(
                f"infill does not take {', '.join(unfit)}: it replaces the mask tokens of its input, and adds, ends "
                f"and returns nothing else. Leave it out, or call generate to continue a text."
            )
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids of shape {tuple(input_ids.shape)}: give texts of shape (batch, length).")
        config, model_kwargs = self._prepare_generation_config(generation_config, **kwargs)
        self._validate_model_kwargs(model_kwargs)
        self._prepare_special_tokens(config, attention_mask is not None, device=self.device)
        home, input_ids = input_ids.device, input_ids.to(self.device)
        if attention_mask is None:
            attention_mask = self._prepare_attention_mask_for_generation(input_ids, config, {})
        attention_mask = attention_mask.to(self.device)
        self._check_prompt(input_ids, attention_mask)
        processors = self._get_logits_processor(
            config,
            0,
            encoder_input_ids=input_ids,
            logits_processor=LogitsProcessorList(logits_processor or []),
            device=self.device,
            model_kwargs=model_kwargs,
        )
        filled = fill_gaps(self, input_ids, attention_mask, processors, config, generator)
        if not config.return_dict_in_generate:
            return filled.sequences.to(home)
        return BD3LMGenerateOutput(
            sequences=filled.sequences.to(home),
            num_forward_passes=filled.num_forward_passes,
            tokens_per_forward=filled.num_gaps / max(1, filled.num_forward_passes) / len(input_ids),
            trace=None if filled.trace is None else filled.trace.steps,
        )


def window_stride(config: Any, stride: int | None) -> int | None:
    """Tokens from window to window of a model whose block fills it, by default half of it; None for other models.

    Raises:
        ValueError: a stride beyond the window, or for a model whose window moves by blocks.
    """
    window = config.model_length
    if not fills_window(config):
        if stride is not None:
            raise ValueError(
                f"window_stride={stride} is for models whose block fills the window of {window} tokens: this one "
                f"moves its window by blocks of {config.block_size}. Leave it out."
            )
        return None
    if stride is not None and stride > window:
        raise ValueError(f"window_stride={stride} would skip tokens: give at most the window, model_length={window}.")
    return stride or max(1, window // 2)


def trace_of(canvas: SequenceBuffer, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> Trace:
    """An empty trace whose columns are those of the result."""
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    return Trace(sequence_columns(canvas.text.shape[1], canvas.start, real))


__all__ = [
    "BD3LMGenerateOutput",
    "BD3LMGenerationConfig",
    "BD3LMGenerationMixin",
    "BlockGenerationMixin",
    "NucleusLogitsProcessor",
    "pad_left",
]
