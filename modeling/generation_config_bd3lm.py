"""What `generate` can be told beside transformers' own fields: sampler, its numbers, the published stop rules."""

from typing import Any

from transformers.generation import GenerationConfig

from .decoding_state_bd3lm import check_entropy_stop
from .samplers_bd3lm import SAMPLERS, SAMPLING_DTYPES, SCORE_SAMPLERS
from .windows_bd3lm import WINDOWS


class BD3LMGenerationConfig(GenerationConfig):
    """transformers' `GenerationConfig` with the fields of block diffusion.

    Args:
        sampler (`str`, defaults to `"first_hitting"`): which masked positions are revealed when. `"first_hitting"` and
            `"ancestral"` sample the model's distribution; `"confidence"` and `"entropy_bound"` reveal several tokens
            per pass where the model is certain. `"analytic"` is for models that predict scores (SEDD): there it is the
            default and the only one.
        num_denoising_steps (`int`, *optional*): denoising steps of a block. `"ancestral"` spaces its grid by it (by
            default one step per token of a block) and skips steps that reveal nothing; the others take at most so
            many, and without it as many as their rule needs.
        confidence_threshold (`float`, defaults to 0.9): `"confidence"` reveals the tokens that are more probable.
        entropy_bound (`float`, defaults to 0.1): `"entropy_bound"` reveals the tokens of lowest entropy while the sum
            of their entropies without the largest one, in nats, stays within it.
        remask_fraction (`float`, defaults to 0.0): share of the tokens of a block, the least probable ones, that
            return to mask when the block is full and are revealed again, once, by the same sampler. Never the prompt.
        nucleus_p (`float`, defaults to 1.0): the paper's nucleus: a token stays while the cumulative probability
            *including itself* is at most p, so the token that crosses p is dropped (`top_p` keeps it). The most likely
            token always stays. The paper samples with 0.9.
        sampling_dtype (`str`, defaults to `"float32"`): precision of the probabilities that tokens are drawn from,
            `"float32"` or, as published, `"float64"`.
        window_stride (`int`, *optional*): tokens by which the window moves on when a text outgrows it, of a model
            whose block fills its window; the last `model_length - window_stride` tokens are the context of the next
            ones. By default half of the window, the published 512 of 1024.
        window (`str`, defaults to `"cached"`): what a text longer than `model_length` attends to. `"cached"`, as
            published, keeps the keys and values of the blocks in the window: constant time per block, but those of
            deeper layers still know of blocks that have left. `"exact"` computes a window that has moved anew, once
            per block: nothing to the left of the window has any influence.
        entropy_stop (`float`, *optional*): a row ends when the entropy of its last tokens is lower, in nats. The paper
            has 4.0.
        entropy_stop_window (`int`, defaults to 256): how many tokens that stop looks at; shorter texts go on.
        stop_at_second_eos (`bool`, defaults to `False`): a row ends when it holds two end tokens, the prompt included,
            instead of with the first new one.
        output_trace (`bool`, defaults to `False`): with `return_dict_in_generate`, also return every denoising step.
        kwargs: fields of `GenerationConfig`. `top_k` defaults to 0 here: sampling draws from the whole distribution.

    Raises:
        ValueError: a field that has no meaning; the message names the value and the remedy.
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

    def validate(self, *args: Any, **kwargs: Any) -> None:
        super().validate(*args, **kwargs)
        check_generation_fields(self)

    @classmethod
    def from_model_config(cls, model_config: Any) -> "BD3LMGenerationConfig":
        # transformers then calls the constructor. A config made from a model config forgets its own fields on reload.
        raise NotImplementedError("a BD3LMGenerationConfig is made by its constructor, not from a model config.")


class SEDDGenerationConfig(BD3LMGenerationConfig):
    """That of a model that predicts scores: its `sampler` defaults to `"analytic"`."""

    default_sampler = "analytic"


def check_generation_fields(config: Any) -> None:
    """Validate the fields that [`BD3LMGenerationConfig`] adds."""
    _check_choice("sampler", config.sampler, {**SAMPLERS, **SCORE_SAMPLERS})
    _check_choice("sampling_dtype", config.sampling_dtype, SAMPLING_DTYPES)
    _check_choice("window", config.window, WINDOWS)
    stride = config.window_stride
    if stride is not None and (isinstance(stride, bool) or not isinstance(stride, int) or stride < 1):
        raise ValueError(
            f"window_stride={stride!r}: give a whole number of tokens from 1 to model_length, or None for half of the "
            f"window."
        )
    steps = config.num_denoising_steps
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise ValueError(
            f"num_denoising_steps={steps!r}: give a whole number of steps per block, 1 at least, or None for as many "
            f"as the sampler needs."
        )
    for name, low, high, meaning in (
        ("confidence_threshold", 0.0, 1.0, "a probability from 0 (reveal all at once) to 1 (one token per step)"),
        ("entropy_bound", 0.0, None, "a number of nats, 0 (one token per step) or more"),
        ("remask_fraction", 0.0, 1.0, "a share of the tokens of a block, from 0 (none) to 1"),
    ):
        value = getattr(config, name)
        if not _is_number(value) or value < low or (high is not None and value > high):
            raise ValueError(f"{name}={value!r}: give {meaning}.")
    if not _is_number(config.nucleus_p) or not 0.0 < config.nucleus_p <= 1.0:
        raise ValueError(
            f"nucleus_p={config.nucleus_p!r}: give a probability above 0 and at most 1 (1 keeps all tokens)."
        )
    for name in ("stop_at_second_eos", "output_trace"):
        if not isinstance(getattr(config, name), bool):
            raise ValueError(f"{name}={getattr(config, name)!r}: give True or False.")
    if config.entropy_stop is not None:
        check_entropy_stop(config.entropy_stop, config.entropy_stop_window)


def _check_choice(name: str, value: Any, table: dict[str, Any]) -> None:
    if value not in table:
        raise ValueError(f"{name}={value!r} is unknown: choose one of {', '.join(table)}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value


__all__ = ["BD3LMGenerationConfig", "SEDDGenerationConfig", "check_generation_fields"]
