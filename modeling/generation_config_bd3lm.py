"""The generation config: the fields of `generate` that transformers does not have, and their validation."""

import math
from collections.abc import Collection, Mapping
from typing import Any

from transformers.generation import GenerationConfig
from transformers.utils import logging

from .decoding_state_bd3lm import EntropyStopCriteria
from .samplers_bd3lm import SAMPLERS, SAMPLING_DTYPES, SCORE_SAMPLERS
from .windows_bd3lm import WINDOWS, fills_window


logger = logging.get_logger(__name__)

#: Fields of a generation config that the config of a model has too.
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


class BlockGenerationConfig(GenerationConfig):
    """transformers' `GenerationConfig` with more fields."""

    @staticmethod
    def check_fields(config: Any) -> None:
        """Validate the fields that this class adds, in a config of any class."""
        raise NotImplementedError

    def validate(self, *args: Any, **kwargs: Any) -> None:
        super().validate(*args, **kwargs)
        self.check_fields(self)

    @classmethod
    def from_model_config(cls, config: Any) -> "BlockGenerationConfig":
        # Not as transformers does, which marks such a config and on saving leaves out our fields.
        return cls(**{name: getattr(config, name, None) for name in SPECIAL_TOKENS})


class BD3LMGenerationConfig(BlockGenerationConfig):
    """transformers' `GenerationConfig` with the fields of block diffusion.

    Args:
        sampler (`str`, defaults to `"first_hitting"`): the order in which masked positions are revealed.
            `"first_hitting"` and `"ancestral"` sample the model's distribution; `"confidence"` and `"entropy_bound"`
            reveal several tokens per forward pass where the model is certain. `"analytic"` is for models that predict
            scores (SEDD): their default and only sampler.
        num_denoising_steps (`int`, *optional*): denoising steps per block. `"ancestral"` and `"analytic"` divide time
            into this many steps (by default one per token of a block); `"ancestral"` skips those that reveal nothing,
            `"analytic"` adds a last one. The others take at most this many, by default as many as their rule needs.
        confidence_threshold (`float`, defaults to 0.9): `"confidence"` reveals tokens more probable than this.
        entropy_bound (`float`, defaults to 0.1): `"entropy_bound"` reveals the tokens of lowest entropy while the sum
            of their entropies without the largest one, in nats, stays within this bound.
        remask_fraction (`float`, defaults to 0.0): after a block is filled, mask this fraction of its tokens, the
            least probable ones, and reveal them again, once, with the same sampler. The prompt is never masked.
        nucleus_p (`float`, defaults to 1.0): the paper's nucleus: a token stays if the cumulative probability
            *including itself* is at most p, so the token that crosses p is dropped (`top_p` keeps it). The most likely
            token always stays. The paper samples with 0.9.
        sampling_dtype (`str`, defaults to `"float32"`): precision of the probabilities from which tokens are drawn,
            `"float32"` or, as published, `"float64"`.
        window_stride (`int`, *optional*): for models whose block fills the window: tokens by which the window moves
            when a text outgrows it. The last `model_length - window_stride` tokens are the context of the next ones.
            By default half of the window, the published 512 of 1024.
        window (`str`, defaults to `"cached"`): what a text longer than `model_length` attends to. `"cached"`, as
            published, keeps the keys and values of the blocks in the window: constant time per block, but deeper
            layers' keys still contain information from blocks outside the window. `"exact"` recomputes the window
            once per block after it has moved, so nothing outside it has any influence.
        entropy_stop (`float`, *optional*): end a row when the entropy of its last tokens falls below this, in nats.
            The paper uses 4.0.
        entropy_stop_window (`int`, defaults to 256): number of last tokens over which the entropy is computed. Texts
            of at most this length continue.
        stop_at_second_eos (`bool`, defaults to `False`): end a row at its second end token, counting those of the
            prompt, instead of at the first new one.
        output_trace (`bool`, defaults to `False`): with `return_dict_in_generate`, also return every denoising step.
        kwargs: fields of `GenerationConfig`. Here `top_k` defaults to 0: sampling uses the whole distribution.

    On one CUDA device, batches of up to 64 rows use a static cache and a compiled denoising step by default.
    `cache_implementation="dynamic"` or `disable_compile=True` turn this off.

    Raises:
        ValueError: if a field has an invalid value; the message names the value and the remedy.
    """

    default_sampler = "first_hitting"

    def __init__(self, **kwargs: Any) -> None:
        self.sampler = kwargs.pop("sampler", self.default_sampler)
        self.num_denoising_steps = kwargs.pop("num_denoising_steps", None)
        self.confidence_threshold = kwargs.pop("confidence_threshold", 0.9)
        self.entropy_bound = kwargs.pop("entropy_bound", 0.1)
        self.remask_fraction = kwargs.pop("remask_fraction", 0.0)
        self.nucleus_p = kwargs.pop("nucleus_p", 1.0)
        self.sampling_dtype = kwargs.pop("sampling_dtype", "float32")
        self.window_stride = kwargs.pop("window_stride", None)
        self.window = kwargs.pop("window", "cached")
        self.entropy_stop = kwargs.pop("entropy_stop", None)
        self.entropy_stop_window = kwargs.pop("entropy_stop_window", 256)
        self.stop_at_second_eos = kwargs.pop("stop_at_second_eos", False)
        self.output_trace = kwargs.pop("output_trace", False)
        super().__init__(**kwargs)

    @staticmethod
    def check_fields(config: Any) -> None:
        check_choice("sampler", config.sampler, {**SAMPLERS, **SCORE_SAMPLERS})
        check_choice("sampling_dtype", config.sampling_dtype, SAMPLING_DTYPES)
        check_choice("window", config.window, WINDOWS)
        for name, meaning in (
            ("window_stride", "the number of tokens by which the window moves"),
            ("num_denoising_steps", "the denoising steps per block"),
        ):
            if getattr(config, name) is not None:
                check_count(name, getattr(config, name), f"{meaning} (None for the default)")
        for name, highest, meaning in (
            ("confidence_threshold", 1.0, "a probability from 0 (reveal all at once) to 1 (one token per step)"),
            ("entropy_bound", math.inf, "a number of nats, 0 (one token per step) or more"),
            ("remask_fraction", 1.0, "a fraction of the tokens of a block, from 0 (none) to 1"),
        ):
            _check_number(name, getattr(config, name), highest, meaning, may_be_zero=True)
        check_probability("nucleus_p", config.nucleus_p, "keeps all tokens")
        for name in ("stop_at_second_eos", "output_trace"):
            if not isinstance(getattr(config, name), bool):
                raise ValueError(f"{name}={getattr(config, name)!r}: give True or False.")
        if config.entropy_stop is not None:
            EntropyStopCriteria(config.entropy_stop, config.entropy_stop_window)  # which checks both


class SEDDGenerationConfig(BD3LMGenerationConfig):
    """The generation config of models that predict scores, whose `sampler` defaults to `"analytic"`."""

    default_sampler = "analytic"


def check_known_fields(config: GenerationConfig, kind: type[GenerationConfig]) -> None:
    """Refuse fields that `kind` does not have, such as misspelt ones: no code would read them."""
    # The constructor sets every field, including those of transformers. An underscore marks its bookkeeping.
    known = vars(kind())
    unknown = [name for name in vars(config) if name not in known and not name.startswith("_")]
    if unknown:
        raise ValueError(f"generation_config has unknown fields: {', '.join(unknown)}. Remove or rename them.")


_LARGEST_STEPS = 2**20  # denoising steps per block; a grid of this size still fits in memory


# Fields of transformers -> their smallest or largest value, and their meaning. transformers does not check these: it
# treats top_p=1.5 or num_return_sequences=0 as not given.
_COUNTS = {
    "max_new_tokens": (1, "a number of new tokens"),
    "min_new_tokens": (0, "a number of new tokens"),
    "min_length": (0, "a number of tokens, the prompt included"),
    "num_return_sequences": (1, "a number of texts per prompt"),
    "no_repeat_ngram_size": (0, "a number of tokens (0 allows repetitions)"),
    "encoder_no_repeat_ngram_size": (0, "a number of tokens (0 allows repetitions)"),
}
_NUMBERS = {
    "max_time": (math.inf, "a number of seconds above 0"),
    "top_p": (1.0, "a probability (1 keeps all tokens)"),
    "typical_p": (1.0, "a probability above 0 (1 keeps all tokens)"),
    "epsilon_cutoff": (1.0, "a probability (0 keeps all tokens)"),
    "eta_cutoff": (1.0, "a probability (0 keeps all tokens)"),
}
_MAY_BE_ZERO = {"top_p", "epsilon_cutoff", "eta_cutoff"}
_IDS = (*SPECIAL_TOKENS, "suppress_tokens", "begin_suppress_tokens")


def check_standard_fields(config: Any, vocab_size: int) -> None:
    """Refuse values of transformers' own fields that it would ignore or fail on later."""
    for name, (minimum, meaning) in _COUNTS.items():
        value = getattr(config, name, None)
        is_whole = hasattr(value, "__index__") and not isinstance(value, bool)
        if value is not None and not (is_whole and value >= minimum):
            raise ValueError(f"{name}={value!r}: give {meaning}, an integer from {minimum}.")
    for name, (highest, meaning) in _NUMBERS.items():
        if (value := getattr(config, name, None)) is not None:
            _check_number(name, value, highest, meaning, may_be_zero=name in _MAY_BE_ZERO)
    # transformers would advise to run the code of another repository, which decodes autoregressively.
    for name in ("penalty_alpha", "dola_layers", "constraints", "force_words_ids"):
        if (value := getattr(config, name, None)) is not None:
            raise ValueError(f"{name}={value!r}: these models have only greedy search and sampling. Leave it out.")
    if config.do_sample not in (True, False, None):
        raise ValueError(f"do_sample={config.do_sample!r}: give True or False.")
    for name in _IDS:
        ids = getattr(config, name, None)
        outside = [i for i in (ids if isinstance(ids, list) else [ids]) if isinstance(i, int) and i >= vocab_size]
        if outside:
            raise ValueError(f"{name}={ids!r}: the vocabulary ends with the id {vocab_size - 1}.")


def warn_about_unused_fields(given: Mapping[str, Any], config: Any) -> None:
    """Warn once about fields of one sampler in a call of `generate` that uses another sampler.

    Args:
        given: arguments of the call; a model's own configuration may hold the fields of several samplers.
        config: the configuration that the call uses.
    """
    for name, sampler in (("confidence_threshold", "confidence"), ("entropy_bound", "entropy_bound")):
        used = getattr(config, "sampler", None)
        if given.get(name) is not None and used != sampler:
            logger.warning_once(
                f"{name}={given[name]} has no effect with sampler={used!r}: pass sampler={sampler!r} to use it."
            )


# Arguments that are not fields of the generation config. Others of `forward` would be ignored.
_TAKEN = {"input_ids", "attention_mask", "past_key_values", "generator", "token_type_ids"}

# `infill` does not change the length of a text, and returns neither scores nor a cache.
_NOT_FOR_INFILL = (
    *("max_new_tokens", "max_length", "min_new_tokens", "min_length", "max_time", "num_beams", "num_return_sequences"),
    *("stop_strings", "stop_at_second_eos", "entropy_stop", "past_key_values", "output_scores", "output_logits"),
)


def refuse_arguments_of_forward(given: Mapping[str, Any]) -> None:
    """Refuse arguments of `forward` that `generate` and `infill` would ignore."""
    refused = [name for name, value in given.items() if value is not None and name not in _TAKEN]
    if refused:
        raise ValueError(
            f"generation does not take {', '.join(refused)}: call the model itself for losses, attentions and hidden "
            f"states. Mark padding in attention_mask, and put packed documents into separate rows."
        )


def refuse_arguments_of_generate(given: Mapping[str, Any]) -> None:
    """Refuse arguments that `infill` would ignore."""
    refused = [name for name in _NOT_FOR_INFILL if given.get(name) is not None]
    if refused:
        raise ValueError(
            f"infill does not take {', '.join(refused)}: it replaces mask tokens and does not change the length of a "
            f"text. Leave it out, or call generate to continue a text."
        )


def check_count(name: str, value: Any, meaning: str) -> None:
    """Refuse a field that is not an integer from 1 to the largest that memory allows."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _LARGEST_STEPS:
        raise ValueError(f"{name}={value!r}: give {meaning}, an integer from 1 to {_LARGEST_STEPS}.")


def check_probability(name: str, value: Any, meaning: str) -> None:
    """Refuse a field that is not above 0 and at most 1."""
    _check_number(name, value, 1.0, f"a probability above 0 and at most 1 (1 {meaning})")


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Refuse a field that is not one of the names in `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}={value!r} is unknown: choose one of {', '.join(choices)}.")


def _check_number(name: str, value: Any, highest: float, meaning: str, *, may_be_zero: bool = False) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or not (0 < value <= highest or (may_be_zero and value == 0)):
        raise ValueError(f"{name}={value!r}: give {meaning}.")


def window_stride(config: Any, stride: int | None) -> int | None:
    """Return by how many tokens a window moves if one block fills it, by default half of it; None for other models.

    Raises:
        ValueError: if the stride exceeds the window, or if it is given for a window that moves by blocks.
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
