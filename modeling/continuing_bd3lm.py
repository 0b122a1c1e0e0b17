"""What `generate` is to every model that writes in blocks: a kept generation config, prompts, and what is refused.

Only `_sample` is left to the models, where greedy decoding and sampling both arrive; preparation, logits processors,
stopping criteria, streamers and the pipeline are transformers'.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.logits_process import LogitsProcessorList

from .draws_bd3lm import Generators


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


class ContinuingMixin(_Generative):
    """Preparation of `generate`, where transformers' own does not fit models that write in blocks.

    A class names its `generation_config_class`, whose constructor has a default for every field of its own.
    """

    draws_by_row = True  # whether `generate` takes a source of randomness for each row

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


__all__ = ["ContinuingMixin", "pad_left"]
