"""Configuration of SSD-LM (arXiv 2210.17432), validated on construction."""

# First, to report an unsupported version of transformers before any other import fails.
from .compatibility_bd3lm import TRANSFORMERS_VERSIONS  # noqa: F401


# isort: split
from typing import Any, ClassVar

from transformers import CONFIG_MAPPING, MODEL_FOR_MASKED_LM_MAPPING
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto import AutoConfig
from transformers.models.roberta.configuration_roberta import RobertaConfig

from .configuration_bd3lm import BD3LMConfig, check_sizes, check_types


class SSDLMConfig(PreTrainedConfig):
    r"""
    Configuration of an [`SSDLMForMaskedLM`]: a masked-LM encoder, and a diffusion over blocks of the simplex.

    Args:
        encoder_config (`PreTrainedConfig` or `dict`, *optional*): configuration of any masked language model of
            transformers that takes `inputs_embeds`. By default a RoBERTa of the sizes below; otherwise the sizes are
            taken from it.
        vocab_size, hidden_dim, n_blocks, n_heads: sizes of the default RoBERTa; they default to roberta-large's.
        dropout (`float`, *optional*): dropout of the encoder's hidden states and attention, if it has
            `hidden_dropout_prob`. By default the encoder's own, 0.1 for the default RoBERTa.
        block_size (`int`, defaults to 25): tokens per block, which are denoised together.
        model_length (`int`, defaults to 200): tokens of a training sequence and of the window, the block included.
        one_hot_value (`float`, defaults to 5.0): K, the scale of the almost-one-hot logits and of the noise.
        num_train_timesteps (`int`, defaults to 5000): steps T of the training schedule.
        bos_token_id, eos_token_id, pad_token_id, mask_token_id: special tokens of the encoder. The mask, by default
            the last id as in RoBERTa, plays no part in this diffusion.

    Raises:
        ValueError: if a block leaves no room for context in the window, K <= 0, T < 1, the encoder is unknown, or
            `dropout` is given and the encoder has no `hidden_dropout_prob`.
    """

    model_type = "ssdlm"
    sub_configs: ClassVar[dict[str, Any]] = {"encoder_config": AutoConfig}
    attribute_map: ClassVar[dict[str, str]] = BD3LMConfig.attribute_map

    encoder_config: Any = None
    vocab_size: int = 50265
    hidden_dim: int = 1024
    n_blocks: int = 24
    n_heads: int = 16
    dropout: float | int | None = None
    block_size: int = 25
    model_length: int = 200
    one_hot_value: float | int = 5.0
    num_train_timesteps: int = 5000
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = 1
    mask_token_id: int | None = None
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        # Before transformers maps the common names of the sizes, which the encoder needs.
        for name, common_name in ((ours, theirs) for theirs, ours in self.attribute_map.items() if theirs in kwargs):
            setattr(self, name, kwargs.pop(common_name))
        self._check()
        if self.encoder_config is None:
            self.encoder_config = self._roberta()
        elif isinstance(self.encoder_config, dict):
            kind = str(self.encoder_config.get("model_type"))
            if kind not in CONFIG_MAPPING:
                raise ValueError(
                    f"encoder_config has model_type={kind!r}, which transformers does not know: give that of a masked "
                    f"language model, for instance roberta."
                )
            self.encoder_config = CONFIG_MAPPING[kind](**self.encoder_config)
        if type(self.encoder_config) not in MODEL_FOR_MASKED_LM_MAPPING:
            raise ValueError(
                f"encoder_config is a {type(self.encoder_config).__name__}, for which transformers has no masked "
                f"language model: give another one, for instance a RobertaConfig."
            )
        super().__post_init__(**kwargs)  # it passes the attention implementation on to the encoder
        encoder = self.encoder_config
        self.vocab_size, self.hidden_dim = encoder.vocab_size, encoder.hidden_size
        self.n_blocks, self.n_heads = encoder.num_hidden_layers, encoder.num_attention_heads
        self._adopt_dropout(encoder)
        if self.mask_token_id is None:
            self.mask_token_id = self.vocab_size - 1
        room = getattr(encoder, "max_position_embeddings", None)
        # RoBERTa counts positions from pad_token_id + 1.
        offset = (encoder.pad_token_id or 0) + 1 if isinstance(encoder, RobertaConfig) else 0
        if room is not None and self.model_length + offset > room:
            raise ValueError(
                f"model_length={self.model_length} does not fit the encoder's max_position_embeddings={room}: give at "
                f"most {room - offset}."
            )

    def num_blocks(self, length: int) -> int:
        """Return 2, the uniform numbers per sequence: one for its step t, one for the start of its block."""
        return 2

    def _check(self) -> None:
        check_types(self)
        own = () if self.encoder_config is not None else ("vocab_size", "hidden_dim", "n_blocks", "n_heads")
        check_sizes(self, "num_train_timesteps", *own)
        self.check_block_size()
        if not self.one_hot_value > 0:
            raise ValueError(f"one_hot_value={self.one_hot_value}: the scale K of the simplex must be above 0.")

    def check_block_size(self) -> None:
        """Refuse a block that leaves no room for context. Models check again on use, since a config can change.

        Raises:
            ValueError: if it is not an integer >= 1, or not below `model_length`.
        """
        check_sizes(self, "block_size", "model_length")
        if self.block_size >= self.model_length:
            raise ValueError(
                f"block_size={self.block_size} leaves no room for context in a window of "
                f"model_length={self.model_length} tokens: give a smaller block or a longer window."
            )

    def _adopt_dropout(self, encoder: Any) -> None:
        own = getattr(encoder, "hidden_dropout_prob", None)
        if self.dropout is None or self.dropout == own:
            self.dropout = own
        elif own is None:
            raise ValueError(
                f"dropout={self.dropout}: a {type(encoder).__name__} has no hidden_dropout_prob to set. Leave it "
                f"out, and set the encoder's own fields in encoder_config."
            )
        else:
            encoder.hidden_dropout_prob = encoder.attention_probs_dropout_prob = self.dropout

    def _roberta(self) -> RobertaConfig:
        pad = 1 if self.pad_token_id is None else self.pad_token_id
        return RobertaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_dim,
            num_hidden_layers=self.n_blocks,
            num_attention_heads=self.n_heads,
            intermediate_size=4 * self.hidden_dim,
            max_position_embeddings=self.model_length + pad + 1,
            type_vocab_size=1,
            layer_norm_eps=1e-5,
            bos_token_id=self.bos_token_id,
            eos_token_id=self.eos_token_id,
            pad_token_id=pad,
        )


SSDLMConfig.register_for_auto_class()

__all__ = ["SSDLMConfig"]
