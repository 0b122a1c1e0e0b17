"""Configurations of block diffusion on transformers' decoders: the fields of the family plus those of the process.

Each family has its own class, whose `model_type` differs from the stock one: where its code is not trusted, a folder
of a stock type would load as an autoregressive model and generate garbage.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import (
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from .configuration_bd3lm import SAMPLING_EPS, BD3LMConfig, check_model_type, check_sizes, check_types


#: Which hidden state predicts the token at position i: that at i, or that at i - 1, as in an autoregressive model.
ALIGNMENTS = ("same", "shifted", "shifted_noisy")

#: How clean tokens attend to one another: block by block, or token by token, as in an autoregressive model.
CONTEXTS = ("block", "token")

_RECURRENT = {"linear_attention", "conv", "mamba", "recurrent", "attention_mamba", "hybrid"}


# Any to a type checker, since each family brings its own fields.
_Configuration: Any = object


@dataclass(kw_only=True, repr=False)
class BD3LMDecoderConfigMixin(_Configuration):
    r"""
    The fields of block diffusion, for the configuration of a decoder.

    Args:
        block_size (`int`, defaults to 4): tokens per block.
        model_length (`int`, *optional*): tokens of a training sequence, and of the window in generation. Defaults to
            `max_position_embeddings`, or the sliding window if that is shorter, rounded down to whole blocks.
        mask_token_id (`int`, *optional*): id of the absorbing state; [`adapt_decoder`] chooses one. Defaults to the
            last id that is not a special token.
        alignment (`str`, defaults to `"same"`): which hidden state predicts the token at position i. `"same"`: the one
            at i. `"shifted"`: the one at i - 1, as the decoder was trained; for the first token of a block that is the
            clean token before it. `"shifted_noisy"`: always the one at i - 1 of the noisy stream; in generation, where
            the previous block is finished, its clean state is used.
        context (`str`, defaults to `"block"`): `"block"` makes the clean stream block-causal; `"token"` makes it
            causal, so that it remains the autoregressive model.
        ar_loss_weight (`float`, defaults to 0.0): weight of the clean stream's next-token loss, which is added to the
            loss; needs `context="token"`.
        noise, sampling_eps_min, sampling_eps_max, resample, antithetic_sampling, noise_draws, eval_noise_draws,
            masking, complementary, ignore_bos: as in [`BD3LMConfig`].

    Raises:
        ValueError: if a value, or a combination of values, is impossible.
    """

    keys_to_ignore_at_inference = ["past_key_values"]

    # Options of the objective that are fixed for these networks.
    time_conditioning: ClassVar[bool] = False
    causal: ClassVar[bool] = False
    cross_attn: ClassVar[bool] = True
    var_min: ClassVar[bool] = False
    dropout: ClassVar[float] = 0.0
    unshared_fields: ClassVar[tuple[str, ...]] = ()
    _required: ClassVar[dict[str, tuple[Any, str]]] = {}

    block_size: int = 4
    model_length: int | None = None
    mask_token_id: int | None = None
    alignment: str = "same"
    context: str = "block"
    ar_loss_weight: float | int = 0.0
    noise: str = "loglinear"
    sampling_eps_min: float | int = SAMPLING_EPS
    sampling_eps_max: float | int = 1.0
    resample: bool = False
    antithetic_sampling: str = "shuffled"
    noise_draws: int = 1
    eval_noise_draws: int = 1
    masking: str = "independent"
    complementary: bool = False
    ignore_bos: bool = True

    num_blocks = BD3LMConfig.num_blocks
    check_block_size = BD3LMConfig.check_block_size
    _check_tokens = BD3LMConfig._check_tokens
    _check_noise = BD3LMConfig._check_noise

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # that of the family
        self.return_dict = True
        check_sizes(self, "block_size", "noise_draws", "eval_noise_draws")
        check_types(self)
        self._drop_default_tokens()
        self._choose_length()
        if self.mask_token_id is None:
            self.mask_token_id = self._last_ordinary_id()
        self._check_tokens()
        self._check_noise()
        self._check_objective()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Return the configuration as transformers does; another model type is an error, not a warning."""
        check_model_type(cls, config_dict)
        return super().from_dict(config_dict, **kwargs)

    @property
    def longest(self) -> int:
        """Most tokens that every query can see: the positions of the network, or its sliding window if shorter."""
        windows = [self.sliding_window] if slides(self) else []
        return min([self.max_position_embeddings, *windows])

    @property
    def has_learned_positions(self) -> bool:
        """Whether positions are rows of a table, as in GPT-2, instead of rotations."""
        return getattr(self, "rope_parameters", None) is None

    def _drop_default_tokens(self) -> None:
        """Drop special tokens that are only the family's defaults and do not exist in a smaller vocabulary."""
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, name)
            default = type(self).__dataclass_fields__[name].default
            if isinstance(value, int) and value == default and value >= self.vocab_size:
                setattr(self, name, None)

    def _last_ordinary_id(self) -> int:
        ends = self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id]
        special = {self.bos_token_id, self.pad_token_id, *ends}
        return next(token for token in reversed(range(self.vocab_size)) if token not in special)

    def _choose_length(self) -> None:
        longest = self.longest
        if self.model_length is None:
            self.model_length = longest // self.block_size * self.block_size
        if self.block_size > longest:
            raise ValueError(
                f"block_size={self.block_size} is longer than the {longest} tokens that this {self.model_type} can "
                f"see: choose a smaller block_size."
            )
        check_sizes(self, "model_length")
        if self.model_length > longest:
            why = f"sliding_window={longest}" if slides(self) else f"max_position_embeddings={longest}"
            raise ValueError(
                f"model_length={self.model_length} exceeds {why} of this {self.model_type}: choose model_length="
                f"{longest // self.block_size * self.block_size} or less."
            )
        self.check_block_size()

    def _check_objective(self) -> None:
        for name, choices in (("alignment", ALIGNMENTS), ("context", CONTEXTS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown: choose one of {', '.join(choices)}.")
        for name in ("time_conditioning", "causal", "cross_attn", "var_min"):
            if getattr(self, name) != (fixed := getattr(type(self), name)):
                raise ValueError(f"{name}={getattr(self, name)!r}: for decoders this is {fixed}. Leave it out.")
        if self.alignment != "same" and not self.ignore_bos:
            raise ValueError(
                f"alignment={self.alignment!r} with ignore_bos=False: the first token of a text has no predecessor to "
                f"predict it from, so set ignore_bos=True or alignment='same'."
            )
        weight = self.ar_loss_weight
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < float("inf"):
            raise ValueError(f"ar_loss_weight={weight!r}: give a number of 0 or more.")
        if weight and self.context != "token":
            raise ValueError(
                f"ar_loss_weight={weight} with context={self.context!r}: only a causal clean stream predicts the next "
                f"token without seeing it, so set context='token' or ar_loss_weight=0."
            )


def slides(config: Any) -> bool:
    """Return whether any layer of a decoder has sliding-window attention."""
    if getattr(config, "sliding_window", None) is None:
        return False
    kinds = getattr(config, "layer_types", None)
    return "sliding_attention" in kinds if kinds else getattr(config, "use_sliding_window", True)


def head_dim_of(config: Any) -> int:
    """Return the width of a decoder's attention heads."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def unsupported_reason(config: Any) -> str | None:
    """Return why a decoder with this configuration cannot denoise blocks; None if nothing is known against it."""
    kinds = set(getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ())
    if kinds & _RECURRENT or any(hasattr(config, name) for name in ("conv_kernel", "ssm_cfg", "mamba_d_state")):
        return "it has recurrent or convolutional layers, which cannot be rewound or see later tokens of a block"
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder, and block diffusion needs a single stack"
    if getattr(config, "alibi", False) or config.model_type in ("bloom", "mpt"):
        return "its ALiBi attention measures distances in columns, but the two streams share positions"
    return None


class BD3LMLlamaConfig(BD3LMDecoderConfigMixin, LlamaConfig):
    """Configuration of a [`BD3LMLlamaForMaskedLM`]."""

    model_type = "bd3lm_llama"


class BD3LMQwen2Config(BD3LMDecoderConfigMixin, Qwen2Config):
    """Configuration of a [`BD3LMQwen2ForMaskedLM`]."""

    model_type = "bd3lm_qwen2"


class BD3LMQwen3Config(BD3LMDecoderConfigMixin, Qwen3Config):
    """Configuration of a [`BD3LMQwen3ForMaskedLM`]."""

    model_type = "bd3lm_qwen3"


class BD3LMMistralConfig(BD3LMDecoderConfigMixin, MistralConfig):
    """Configuration of a [`BD3LMMistralForMaskedLM`]."""

    model_type = "bd3lm_mistral"


class BD3LMSmolLM3Config(BD3LMDecoderConfigMixin, SmolLM3Config):
    """Configuration of a [`BD3LMSmolLM3ForMaskedLM`]."""

    model_type = "bd3lm_smollm3"


class BD3LMGPT2Config(BD3LMDecoderConfigMixin, GPT2Config):
    """Configuration of a [`BD3LMGPT2ForMaskedLM`]."""

    model_type = "bd3lm_gpt2"


class BD3LMPhi3Config(BD3LMDecoderConfigMixin, Phi3Config):
    """Configuration of a [`BD3LMPhi3ForMaskedLM`]."""

    model_type = "bd3lm_phi3"


class BD3LMOlmo2Config(BD3LMDecoderConfigMixin, Olmo2Config):
    """Configuration of a [`BD3LMOlmo2ForMaskedLM`]."""

    model_type = "bd3lm_olmo2"


class BD3LMGraniteConfig(BD3LMDecoderConfigMixin, GraniteConfig):
    """Configuration of a [`BD3LMGraniteForMaskedLM`]."""

    model_type = "bd3lm_granite"


class BD3LMGemma3TextConfig(BD3LMDecoderConfigMixin, Gemma3TextConfig):
    """Configuration of a [`BD3LMGemma3ForMaskedLM`]."""

    model_type = "bd3lm_gemma3_text"


for _config in BD3LMDecoderConfigMixin.__subclasses__():
    _config.register_for_auto_class()
