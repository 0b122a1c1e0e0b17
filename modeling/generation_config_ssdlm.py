"""What SSD-LM's `generate` can be told beside transformers' own fields: context, projection, number of steps."""

from typing import Any

from transformers.generation import GenerationConfig

from .decoding_ssdlm import CONTEXTS
from .simplex_ssdlm import PROJECTIONS


class SSDLMGenerationConfig(GenerationConfig):
    """transformers' `GenerationConfig` with the fields of simplex diffusion.

    Args:
        num_denoising_steps (`int`, defaults to 1000): steps T of a block, each one pass of the network over context
            and block. The block-diffusion paper compares 1000 and 25.
        context (`str`, defaults to `"all"`): what a block is written behind. `"all"`, the original: all text before
            it, as far as the window `model_length` reaches. `"previous_block"`, as the block-diffusion paper ran it:
            the block before it only, or the prompt for the first one.
        projection (`str`, defaults to `"sampling"`): how logits become almost-one-hot vectors after a step.
            `"sampling"`: a token drawn from the nucleus. `"even"`: all tokens of the nucleus alike. `"uneven"`: the
            likeliest token, and the others of the nucleus by their distance to it.
        top_p (`float`, defaults to 0.95): probability of the nucleus that is projected on, the token that crosses it
            included; 1 is the whole vocabulary. No logits processor does it again.
        do_sample (`bool`, defaults to `True`): whether `"sampling"` draws its tokens or takes the likeliest ones. The
            noise that is added after each step is drawn in any case, and what a block holds in the end is always the
            most likely token of the last step.
        kwargs: fields of `GenerationConfig`. `top_k` defaults to 0 here: the nucleus is chosen from all tokens.

    Raises:
        ValueError: a field that has no meaning; the message names the value and the remedy.
    """

    def __init__(self, **kwargs: Any) -> None:
        self.num_denoising_steps = kwargs.pop("num_denoising_steps", 1000)
        self.context = kwargs.pop("context", "all")
        self.projection = kwargs.pop("projection", "sampling")
        super().__init__(**{"top_p": 0.95, "do_sample": True, **kwargs})

    def validate(self, *args: Any, **kwargs: Any) -> None:
        super().validate(*args, **kwargs)
        check_simplex_fields(self)

    @classmethod
    def from_model_config(cls, model_config: Any) -> "SSDLMGenerationConfig":
        # transformers then calls the constructor. A config made from a model config forgets its own fields on reload.
        raise NotImplementedError("an SSDLMGenerationConfig is made by its constructor, not from a model config.")


def check_simplex_fields(config: Any) -> None:
    """Validate the fields that [`SSDLMGenerationConfig`] adds, and `top_p`, which transformers does not."""
    for name, table in (("context", CONTEXTS), ("projection", PROJECTIONS)):
        value = getattr(config, name)
        if value not in table:
            raise ValueError(f"{name}={value!r} is unknown: choose one of {', '.join(table)}.")
    steps, top_p = config.num_denoising_steps, config.top_p
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"num_denoising_steps={steps!r}: give a whole number of steps per block, 1 at least.")
    if isinstance(top_p, bool) or not isinstance(top_p, (int, float)) or not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p!r}: give a probability above 0 and at most 1 (1 is the whole vocabulary).")


__all__ = ["SSDLMGenerationConfig", "check_simplex_fields"]
