"""Configurations of BD3-LM (arXiv 2503.09573) and of its baselines, validated on construction."""

# First, to report an unsupported version of transformers before any other import fails.
from .compatibility_bd3lm import TRANSFORMERS_VERSIONS  # noqa: F401


# isort: split
from typing import Any, ClassVar

from transformers.configuration_utils import PreTrainedConfig

from .noise_bd3lm import check_interval, check_noise_samples, noise_schedule


# Lower end of the authors' unclipped interval of noise levels.
SAMPLING_EPS = 1e-3

# Fields that only models with several blocks per window take over from a recipe for BD3-LM.
_OF_BLOCKS = (
    *("block_size", "sampling_eps_min", "sampling_eps_max", "resample", "antithetic_sampling", "noise_draws"),
    *("masking", "complementary"),
)

# Every configuration saved by this code has these fields; no published one has any of them.
_NEVER_PUBLISHED = ("antithetic_sampling", "resample", "requires_transformers")

# Types of the fields, as error messages name them; `check_sizes` covers the sizes.
_TYPES: dict[str, tuple[str, ...]] = {
    "a number": ("dropout", "sampling_eps_min", "sampling_eps_max", "one_hot_value"),
    "a whole number or None": ("mask_token_id", "bos_token_id", "pad_token_id"),
    "True or False": (
        *("adaln", "time_conditioning", "cross_attn", "causal", "var_min", "resample", "complementary", "ignore_bos"),
        *("use_cache", "mdlm_loss_scale"),
    ),
}


class BD3LMConfig(PreTrainedConfig):
    r"""
    Configuration of a [`BD3LMForMaskedLM`]. Accepts the `config.json` of the published checkpoints unchanged.

    Args:
        vocab_size (`int`, defaults to 50258): size of the vocabulary, the mask token included.
        block_size (`int`, defaults to 4): tokens per block. 1 gives an autoregressive model, `model_length` a masked
            diffusion model. It affects attention and noise only, never the shape of a parameter.
        model_length (`int`, defaults to 1024): tokens of a training sequence and of the window in generation. A
            multiple of `block_size`.
        hidden_dim (`int`, defaults to 768): width of the residual stream, a multiple of `n_heads`.
        n_blocks (`int`, defaults to 12): number of transformer layers.
        n_heads (`int`, defaults to 12): number of attention heads; `hidden_dim / n_heads` must be even, since rotary
            embeddings rotate pairs.
        cond_dim (`int`, defaults to 128): width of the noise-level embedding that drives adaLN.
        dropout (`float`, defaults to 0.1): dropout on both residual branches, in training only.
        adaln (`bool`, defaults to `True`): adaptive layer norm. `False` removes `sigma_map` and every
            `adaLN_modulation` from the weights.
        time_conditioning (`bool`, defaults to `False`): feed the noise level sigma to adaLN. `False` feeds a constant
            zero, as the published models do, so adaLN is a learned constant of each layer.
        cross_attn (`bool`, defaults to `True`): the noisy stream attends to the clean stream of earlier blocks.
            `False` is the published pre-training checkpoint: one full-length block, no clean stream.
        causal (`bool`, defaults to `False`): causal attention (the AR baseline); excludes `cross_attn`.
        mask_token_id (`int`, *optional*): id of the absorbing state. Defaults to the last id, `vocab_size - 1`.
        noise (`str`, defaults to `"loglinear"`): noise schedule of training, see [`noise_schedule`].
        var_min (`bool`, defaults to `True`): save the learned interval with the weights, as the buffers
            `sampling_eps_min` and `sampling_eps_max`.
        sampling_eps_min (`float`, defaults to 0.001): lower end of the interval of noise levels in training.
        sampling_eps_max (`float`, defaults to 1.0): upper end of that interval.
        resample (`bool`, defaults to `False`): in training, keep the mask rate of every block within the interval.
        antithetic_sampling (`str`, defaults to `"shuffled"`): how noise levels are stratified over the blocks of a
            batch: `"shuffled"`, `"published"` (row-major strata, ties the level to the position) or `"none"`.
        noise_draws (`int`, defaults to 1): noisy streams that share one clean stream in a training step; the loss is
            the mean over them. They share the clean stream's dropout too. Excludes `time_conditioning`.
        eval_noise_draws (`int`, defaults to 1): noise samples per sequence in a Trainer's evaluation.
        masking (`str`, defaults to `"independent"`): `"exact_k"` masks exactly k of the n tokens of a block, k uniform
            on 1..n, with the weight n/k: the same bound with less variance.
        complementary (`bool`, defaults to `False`): in training, pair each noisy stream with one that masks exactly
            the other tokens, so that a pair scores every token.
        ignore_bos (`bool`, defaults to `True`): the first token of a sequence is never masked and, outside training,
            never scored.
        attn_backend (`str`, *optional*): attention kernel named in published checkpoints; ignored. transformers'
            `attn_implementation` chooses the kernel.
        bos_token_id, eos_token_id, pad_token_id (`int`, *optional*): special tokens.
        use_cache (`bool`, defaults to `True`): not read, since a Trainer sets it to `False`. `generate` has its own
            argument `use_cache`.

    Raises:
        ValueError: if a value, or a combination of values, is impossible. The message names the value and the remedy.
    """

    model_type = "bd3lm"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "hidden_dim",
        "num_hidden_layers": "n_blocks",
        "num_attention_heads": "n_heads",
        "max_position_embeddings": "model_length",
    }

    # Fields that a recipe for another model type sets for reasons that do not apply to this one.
    unshared_fields: ClassVar[tuple[str, ...]] = ()

    # Field -> the value that a model of this type needs, and the reason.
    _required: ClassVar[dict[str, tuple[Any, str]]] = {}

    vocab_size: int = 50258
    block_size: int = 4
    model_length: int = 1024
    hidden_dim: int = 768
    n_blocks: int = 12
    n_heads: int = 12
    cond_dim: int = 128
    dropout: float | int = 0.1
    adaln: bool = True
    time_conditioning: bool = False
    cross_attn: bool = True
    causal: bool = False
    mask_token_id: int | None = None
    noise: str = "loglinear"
    var_min: bool = True
    sampling_eps_min: float | int = SAMPLING_EPS
    sampling_eps_max: float | int = 1.0
    resample: bool = False
    antithetic_sampling: str = "shuffled"
    noise_draws: int = 1
    eval_noise_draws: int = 1
    masking: str = "independent"
    complementary: bool = False
    ignore_bos: bool = True
    attn_backend: str | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    use_cache: bool = True
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        # Published configs set return_dict=False, and some set tie_word_embeddings=True. The first would turn every
        # output into a tuple. The second never took effect: their head is a separate matrix.
        self.return_dict = True
        self.tie_word_embeddings = False
        check_types(self)
        self._check_sizes()
        if self.mask_token_id is None:
            self.mask_token_id = self.vocab_size - 1
        self._check_tokens()
        self._check_noise()
        self._check_flags()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Return the configuration as transformers does; missing fields get the defaults of the code that wrote it.

        Raises:
            ValueError: if it is the configuration of another model type.
        """
        check_model_type(cls, config_dict)
        if cls is BD3LMConfig and not any(name in config_dict for name in _NEVER_PUBLISHED):
            if config_dict.get("time_conditioning") and not config_dict.get("cross_attn", True):
                raise ValueError(
                    "this is a configuration of SEDD in the layout of BD3-LM (time_conditioning=True, "
                    "cross_attn=False): its outputs are scores, not logits. Convert it with `bd3lm convert SOURCE "
                    "TARGET --model-type sedd`."
                )
            config_dict = {"block_size": 1, **config_dict}  # the default of the published class
        return super().from_dict(config_dict, **kwargs)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_dim // self.n_heads

    def num_blocks(self, length: int) -> int:
        """Return the number of blocks of a sequence of `length` tokens; the last one may be shorter."""
        return -(-length // self.block_size)

    def _check_sizes(self) -> None:
        sizes = ("vocab_size", "block_size", "model_length", "hidden_dim", "n_blocks", "n_heads", "cond_dim")
        check_sizes(self, *sizes, "noise_draws", "eval_noise_draws")
        if self.vocab_size < 2:
            raise ValueError(f"vocab_size={self.vocab_size}: give at least 2, one token and the mask.")
        if self.hidden_dim % self.n_heads:
            raise ValueError(
                f"hidden_dim={self.hidden_dim} is not divisible by n_heads={self.n_heads}: choose n_heads among the "
                f"divisors of hidden_dim, or change hidden_dim."
            )
        if self.head_dim % 2:
            raise ValueError(
                f"hidden_dim / n_heads = {self.hidden_dim} / {self.n_heads} = {self.head_dim} is odd: rotary "
                f"embeddings rotate pairs, so choose sizes with an even quotient."
            )
        self.check_block_size()

    def check_block_size(self) -> None:
        """Refuse a block size that does not fit the window. Models check again on use, since a config can change.

        Raises:
            ValueError: if it is not an integer >= 1, does not divide `model_length`, or does not fit the model type.
        """
        check_sizes(self, "block_size", "model_length")
        for name, (value, reason) in self._required.items():
            value = self.model_length if value == "model_length" else value
            if getattr(self, name) != value:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} does not fit model_type={self.model_type!r}: {reason}, so leave "
                    f"it out (it is {value!r}), or use another model type, for instance bd3lm."
                )
        if self.model_length % self.block_size:
            nearest = max(self.block_size, self.model_length // self.block_size * self.block_size)
            raise ValueError(
                f"block_size={self.block_size} does not divide model_length={self.model_length}: choose a divisor, or "
                f"model_length={nearest}."
            )

    def _check_tokens(self) -> None:
        eos = self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id]
        singles = [(name, getattr(self, name)) for name in ("mask_token_id", "bos_token_id", "pad_token_id")]
        for name, value in [*singles, *(("eos_token_id", value) for value in eos)]:
            if value is not None and not 0 <= value < self.vocab_size:
                raise ValueError(
                    f"{name}={value} is outside the vocabulary of {self.vocab_size} ids: choose an id from 0 to "
                    f"{self.vocab_size - 1}, or raise vocab_size."
                )
        for name, ids in (("bos_token_id", [self.bos_token_id]), ("eos_token_id", eos)):
            if self.mask_token_id in ids:
                raise ValueError(
                    f"{name}={getattr(self, name)} is also mask_token_id={self.mask_token_id}: the mask must be a "
                    f"separate token, so add one to the tokenizer and raise vocab_size by one."
                )

    def _check_noise(self) -> None:
        noise_schedule(self.noise)
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout={self.dropout}: give a probability of at least 0 and below 1.")
        check_interval(self.sampling_eps_min, self.sampling_eps_max, self.block_size, truncated=self.resample)
        if self.antithetic_sampling not in ("shuffled", "published", "none"):
            raise ValueError(
                f"antithetic_sampling={self.antithetic_sampling!r}: choose 'shuffled', 'published' or 'none'."
            )
        if self.masking not in ("independent", "exact_k"):
            raise ValueError(f"masking={self.masking!r} is unknown: choose 'independent' or 'exact_k'.")
        for name in ("resample", "time_conditioning", "complementary"):
            if self.masking == "exact_k" and getattr(self, name):
                raise ValueError(
                    f"masking='exact_k' excludes {name}=True: it draws the number of masked tokens, not a noise "
                    f"level. Set {name}=False or masking='independent'."
                )
        if self.complementary and self.time_conditioning:
            raise ValueError("complementary=True needs time_conditioning=False: paired streams differ in noise level.")

    def _check_flags(self) -> None:
        if self.causal and self.cross_attn:
            raise ValueError(
                "causal=True contradicts cross_attn=True: a causal model has no clean stream to attend to, so set "
                "cross_attn=False (AR baseline) or causal=False (block diffusion)."
            )
        if not self.causal and not self.cross_attn and self.block_size != self.model_length:
            raise ValueError(
                f"cross_attn=False with block_size={self.block_size} below model_length={self.model_length}: without "
                f"a clean stream a sequence is one block, so set cross_attn=True or block_size=model_length."
            )
        if self.time_conditioning and not self.adaln:
            raise ValueError(
                "time_conditioning=True needs adaln=True: the noise level enters through adaptive layer norm only."
            )
        check_noise_samples(self.noise_draws, self.time_conditioning)


class ARConfig(BD3LMConfig):
    """
    Configuration of an [`ARForCausalLM`]: the same layers with causal attention and without adaLN.

    Takes the fields of [`BD3LMConfig`]. Those about noise and blocks have no effect: `block_size` is 1.

    Raises:
        ValueError: if a field contradicts an autoregressive model.
    """

    model_type = "ar"
    unshared_fields: ClassVar[tuple[str, ...]] = (*_OF_BLOCKS, "adaln", "time_conditioning", "noise")
    _required: ClassVar[dict[str, tuple[Any, str]]] = {
        "block_size": (1, "an autoregressive model has no blocks"),
        "causal": (True, "an autoregressive model has causal attention"),
        "time_conditioning": (False, "an autoregressive model has no noise level"),
    }

    block_size: int = 1
    adaln: bool = False
    cross_attn: bool = False
    causal: bool = True
    var_min: bool = False
    ignore_bos: bool = False

    def num_blocks(self, length: int) -> int:
        """Return 0: a sequence has no noise levels."""
        return 0


class MDLMConfig(BD3LMConfig):
    """
    Configuration of an [`MDLMForMaskedLM`] (masked diffusion, arXiv 2406.07524): one block as long as the window.

    Takes the fields of [`BD3LMConfig`]; `block_size` is `model_length`.

    Args:
        mdlm_loss_scale (`bool`, defaults to `False`): use the noise of Sahoo et al.'s checkpoints, whose masking
            probability is 0.999 t; overrides `noise`.

    Raises:
        ValueError: if a field contradicts attention over the whole sequence.
    """

    model_type = "mdlm"
    unshared_fields: ClassVar[tuple[str, ...]] = _OF_BLOCKS
    _required: ClassVar[dict[str, tuple[Any, str]]] = {
        "block_size": ("model_length", "it attends to the whole sequence at once"),
        "causal": (False, "it attends to the whole sequence at once"),
        "cross_attn": (False, "it attends to the whole sequence at once"),
    }

    block_size: int | None = None  # type: ignore[assignment]  # until __post_init__
    cross_attn: bool = False
    var_min: bool = False
    mdlm_loss_scale: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.block_size is None:
            self.block_size = kwargs.get("max_position_embeddings", self.model_length)
        if self.mdlm_loss_scale:
            self.noise = "total_noise"
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Return the configuration as [`BD3LMConfig`] does; the block is as long as a `model_length` in `kwargs`."""
        length = kwargs.get("model_length", kwargs.get("max_position_embeddings"))
        if length is not None:
            kwargs.setdefault("block_size", length)
        return super().from_dict(config_dict, **kwargs)


class SEDDConfig(MDLMConfig):
    """
    Configuration of a [`SEDDForMaskedLM`] (score entropy, arXiv 2310.16834): full attention, time conditioning.

    Takes the fields of [`MDLMConfig`].

    Raises:
        ValueError: if a field contradicts a score model, which is conditioned on the noise level.
    """

    model_type = "sedd"
    unshared_fields: ClassVar[tuple[str, ...]] = (*_OF_BLOCKS, "adaln", "time_conditioning")
    _required: ClassVar[dict[str, tuple[Any, str]]] = {
        **MDLMConfig._required,
        "time_conditioning": (True, "a score depends on the noise level"),
    }

    time_conditioning: bool = True


def check_sizes(config: Any, *names: str) -> None:
    """Refuse sizes that no model has.

    Raises:
        ValueError: if a size is not an integer, or is below 1.
    """
    for name in names:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r}: give a whole number of at least 1.")


def check_types(config: Any) -> None:
    """Refuse fields of the wrong type, which would otherwise fail much later, in an error that does not name them.

    Raises:
        ValueError: if a field is not of its documented type.
    """
    for expected, names in _TYPES.items():
        for name in names:
            value = getattr(config, name, None)
            unset = value is None and getattr(type(config), name, None) is None
            if not unset and not _has_type(value, expected):
                raise ValueError(f"{name}={value!r} is of type {type(value).__name__}: give {expected}.")
    eos = config.eos_token_id
    if not all(_has_type(token, "a whole number or None") for token in (eos if isinstance(eos, list) else [eos])):
        raise ValueError(f"eos_token_id={eos!r}: give a whole number, a list of them, or None.")


def _has_type(value: Any, expected: str) -> bool:
    if expected == "True or False":
        return isinstance(value, bool)
    whole = isinstance(value, int) and not isinstance(value, bool)
    return whole or (isinstance(value, float) if expected == "a number" else value is None)


def check_model_type(config_class: type[PreTrainedConfig], config_dict: dict[str, Any]) -> None:
    """Refuse the configuration of another model type.

    Raises:
        ValueError: if it names another type; the message names both.
    """
    found = config_dict.get("model_type") or config_class.model_type
    if found != config_class.model_type:
        raise ValueError(
            f"this is a configuration of model_type={found!r}, not of a {config_class.__name__}: load it, and the "
            f"model, with AutoConfig and AutoModelForCausalLM, which know the class of each model type."
        )


for _config in (BD3LMConfig, ARConfig, MDLMConfig, SEDDConfig):
    _config.register_for_auto_class()
