"""The model that a run starts from when it has weights already: a checkpoint, perhaps of another block size.

The paper trains 850,000 steps at block = length and 150,000 more at the block size it wants. A block size shapes
attention and noise, never a weight, so all weights go on; what was learned about the noise of the old blocks does not.
"""

from typing import Any

import torch
from accelerate import PartialState
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging

from bd3lm_hf.adapt import adapt_decoder, decoder_class
from bd3lm_hf.checkpoints import load_model, read_config
from bd3lm_hf.modeling.configuration_bd3lm import SAMPLING_EPS, BD3LMConfig
from bd3lm_hf.modeling.configuration_bd3lm_decoders import BD3LMDecoderConfigMixin
from bd3lm_hf.tokenization import check_tokenizer_fits


logger = logging.get_logger("bd3lm_hf.train")


# Of a decoder that is adapted without a word on them.
_DECODER_BLOCK, _DECODER_LENGTH = 4, 1024

_INTERVAL = ("sampling_eps_min", "sampling_eps_max")


#: These shape the weights, or what they have learned to read; any other field may change. The values are what
#: transformers' own models call them.
SHAPE_FIELDS = {
    "hidden_dim": "hidden_size",
    "n_blocks": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "cond_dim": None,
    "adaln": None,
    "time_conditioning": None,
}


def check_shape(name: str, fields: dict[str, Any], *, argument: str = "--init_from") -> None:
    """Refuse fields that contradict the shape of a checkpoint's network; a recipe may repeat it.

    Only the configuration is read, so a run can ask before it loads any text.

    Raises:
        ValueError: such a field, or a checkpoint that cannot be read.
    """
    config = read_config(name, argument=argument)
    own = {
        field: getattr(config, field, getattr(config, other or field, None)) for field, other in SHAPE_FIELDS.items()
    }
    wrong = [field for field, value in own.items() if field in fields and fields[field] != value]
    if wrong:
        raise ValueError(
            f"--{wrong[0]} {fields[wrong[0]]} contradicts {argument} {name}, whose {wrong[0]} is "
            f"{own[wrong[0]]}: the checkpoint decides the shape of the network, so leave out "
            f"{', '.join('--' + field for field in wrong)}."
        )


def start_from(
    name: str, tokenizer: Any, fields: dict[str, Any], *, argument: str = "--init_from", **options: Any
) -> Any:
    """The model of a checkpoint with some fields of its configuration changed.

    - Every weight is kept, and every weight must be there; only the two buffers of the interval may be missing.
    - Where the text becomes more than one block, the noisy stream attends to a clean one (`cross_attn=True`).
    - An interval of noise levels belongs to the block size it was learned at. At another block size training starts
      from the interval in `fields`, or from the whole one, [1e-3, 1]; at the same one the checkpoint's goes on.
    - Special tokens that the configuration leaves open are the tokenizer's.

    Args:
        name: folder or hub name.
        tokenizer: of the text to train on.
        fields: configuration fields, `block_size` and `model_length` among them.
        argument: what the user calls `name`, for messages.
        options: for `from_pretrained`, such as `attn_implementation`.

    Raises:
        ValueError: fields or a tokenizer that do not fit the checkpoint, or weights that are missing, unexpected, of
            another shape or not finite.
    """
    check_shape(name, fields, argument=argument)
    old = read_config(name, argument=argument)
    if not hasattr(MODEL_FOR_CAUSAL_LM_MAPPING.get(type(old), None), "token_nll"):
        return _start_from_decoder(name, old, tokenizer, fields, argument=argument, **options)
    changes = dict(fields)
    for token in ("bos", "eos", "pad"):
        if getattr(old, f"{token}_token_id", None) is None:
            changes[f"{token}_token_id"] = getattr(tokenizer, f"{token}_token_id")
    check_tokenizer_fits(tokenizer, old)
    if isinstance(old, BD3LMConfig):
        changes = _of_new_blocks(old, changes)
    elif isinstance(old, BD3LMDecoderConfigMixin) and changes.get("block_size", old.block_size) != old.block_size:
        changes = {"sampling_eps_min": SAMPLING_EPS, "sampling_eps_max": 1.0, **changes}
    config = type(old).from_dict({**old.to_dict(), **changes})
    # Of a checkpoint in half precision too: optimizers need all digits, and mixed precision is an option of training.
    model = load_model(name, argument=argument, config=config, dtype=torch.float32, **options)
    if any(end in changes for end in _INTERVAL):
        kept = model.interval()
        low, high = (changes.get(end, value) for end, value in zip(_INTERVAL, kept, strict=True))
        model.set_interval(low, high)
        if PartialState().is_main_process:
            logger.warning(
                f"{argument} {name}: blocks of {old.block_size} tokens go on as blocks of {model.config.block_size}, "
                f"with noise levels in [{low:g}, {high:g}] instead of [{kept[0]:g}, {kept[1]:g}]; choose others with "
                f"--sampling_eps_min and --sampling_eps_max."
            )
    return model


def _start_from_decoder(
    name: str, stock: Any, tokenizer: Any, fields: dict[str, Any], *, argument: str, **options: Any
) -> Any:
    """Return a stock decoder as a block-diffusion model.

    Raises:
        ValueError: if its family is not supported, or a field does not fit.
    """
    decoder_class(stock, f"{argument} {name}")
    process = {field: value for field, value in fields.items() if field not in (*SHAPE_FIELDS, "dropout")}
    if "model_length" not in process:
        # Decoders have positions for far longer texts than fit into memory twice.
        size = process.get("block_size", _DECODER_BLOCK)
        process["model_length"] = min(_DECODER_LENGTH, stock.max_position_embeddings) // size * size
        logger.warning(
            f"{argument} {name}: sequences of {process['model_length']} tokens; choose others with --model_length."
        )
    for token in ("bos", "eos", "pad"):
        if getattr(stock, f"{token}_token_id", None) is None:
            process[f"{token}_token_id"] = getattr(tokenizer, f"{token}_token_id")
    return adapt_decoder(name, tokenizer=tokenizer, dtype=torch.float32, **process, **options)


def decoder_shape(config_class: Any, fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a new network in the words of a decoder's configuration.

    What goes with the width follows from it, as in our own network: an MLP four times as wide, and a key and value
    head for every head.
    """
    named = {SHAPE_FIELDS.get(field) or field: value for field, value in fields.items()}
    width, heads = named.get("hidden_size"), named.get("num_attention_heads", config_class().num_attention_heads)
    if width is None:
        return named
    follows = {"intermediate_size": 4 * width, "num_key_value_heads": heads, "head_dim": width // heads}
    return {name: value for name, value in follows.items() if hasattr(config_class, name)} | named


def _of_new_blocks(old: BD3LMConfig, changes: dict[str, Any]) -> dict[str, Any]:
    """`changes`, and what follows from them."""
    block_size = changes.get("block_size", old.block_size)
    if not old.causal and block_size != changes.get("model_length", old.model_length):
        changes = {"cross_attn": True, **changes}
    if block_size == old.block_size:
        return changes
    return {"var_min": True, "sampling_eps_min": SAMPLING_EPS, "sampling_eps_max": 1.0, **changes}


def start_around(
    head: Any, name: str, tokenizer: Any, fields: dict[str, Any], *, argument: str = "--init_from", **options: Any
) -> Any:
    """A new model around the weights of a trained encoder, such as RoBERTa; its other layers are fresh.

    Args:
        head: class of the model, with a `from_encoder`.
        name: folder or hub name of the encoder, with its tokenizer.
        fields: configuration fields of the new model.

    Raises:
        ValueError: fields that the model does not have or the encoder contradicts, weights that are missing.
    """
    unknown = [field for field in fields if not hasattr(head.config_class, field)]
    if unknown:
        raise ValueError(
            f"--{unknown[0]} {fields[unknown[0]]}: a {head.__name__} has no such field; leave out "
            f"{', '.join('--' + field for field in unknown)}."
        )
    check_shape(name, fields, argument=argument)
    encoder = load_model(name, argument=argument, spare=True, dtype=torch.float32, **options)
    special = {f"{token}_token_id": getattr(tokenizer, f"{token}_token_id") for token in ("bos", "eos", "pad", "mask")}
    return head.from_encoder(encoder, **special, **fields)


__all__ = ["SHAPE_FIELDS", "check_shape", "decoder_shape", "start_around", "start_from"]
