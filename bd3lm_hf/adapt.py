"""Turn an autoregressive decoder into a block-diffusion model: its class, its mask token, its weights.

The mask token is the first of these that exists; the choice is logged:

1. the tokenizer's own mask token, or its token `<|mask|>`;
2. the first row of the embedding that no token uses, which many decoders have (Qwen3, Qwen2.5);
3. a reserved token of the tokenizer (Llama 3, Gemma);
4. a new row.
"""

import copy
import dataclasses
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from bd3lm_hf.checkpoints import load_model, read_config
from bd3lm_hf.modeling.configuration_bd3lm_decoders import unsupported_reason
from bd3lm_hf.modeling.modeling_bd3lm_decoders import DECODERS
from bd3lm_hf.tokenization import MASK, complete_special_tokens, first_free_id, has_tokenizer, set_mask_token


logger = logging.get_logger("bd3lm_hf.adapt")

# `<|reserved_special_token_0|>`, `<unused7>`, `<SPECIAL_10>`, `[control_8]`, `<|dummy_3|>`, `<|extra_0|>`
_RESERVED = re.compile(r"[<\[]\|?(reserved|unused|special|control|dummy|extra)\w*?_?\d+\|?[>\]]", re.IGNORECASE)

#: A row whose norm is below this fraction of the mean has decayed in training; gradients through it explode.
_DECAYED = 0.1

#: Options for `from_pretrained`; all others are fields of the diffusion process.
_LOADING = (
    *("attn_implementation", "cache_dir", "device_map", "dtype", "local_files_only", "max_memory", "offload_folder"),
    *("quantization_config", "revision", "subfolder", "token", "torch_dtype", "trust_remote_code"),
)


class MaskToken(NamedTuple):
    """The mask token of a decoder."""

    id: int
    origin: str  # where it comes from, for the log
    trained: bool  # the token was already a mask token: its row is kept unless it has decayed


def is_adaptable(config: Any) -> bool:
    """Return whether [`adapt_decoder`] accepts a decoder with this configuration."""
    return getattr(config, "model_type", None) in DECODERS and not unsupported_reason(config)


def adapt_decoder(
    model_or_name: Any,
    block_size: int = 4,
    *,
    mask_token_id: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    alignment: str = "same",
    context: str = "block",
    **process_fields: Any,
) -> Any:
    """Return a block-diffusion model with the weights of a transformers decoder, under the same names.

    Dtype, tied weights, rotary settings and the generation config, including lists of end tokens, are kept. Train the
    model before use: an autoregressive decoder has not learned to predict masked tokens.

    ```python
    >>> tokenizer = AutoTokenizer.from_pretrained("Qwen/Qwen3-0.6B")
    >>> model = adapt_decoder("Qwen/Qwen3-0.6B", block_size=4, tokenizer=tokenizer)
    >>> loss = model(input_ids=ids, labels=ids).loss
    ```

    Args:
        model_or_name: a decoder, a folder or a hub name. A decoder is consumed: its modules move to the new model.
        block_size: tokens per block.
        mask_token_id: overrides the choice of the mask token.
        tokenizer: gets the mask token, in place. Without it, the mask token is chosen from the tokenizer that belongs
            to the name.
        alignment, context: see [`BD3LMDecoderConfigMixin`].
        process_fields: more fields of the configuration (`model_length`, `noise`, `sampling_eps_min`, ...) and, with
            a name, options of `from_pretrained` (`dtype`, `device_map`, `attn_implementation`, ...).

    Raises:
        ValueError: if the family is not supported (with the reason), a field does not exist or has an invalid value,
            or the mask token is also another special token.
    """
    if isinstance(model_or_name, os.PathLike):
        model_or_name = os.fspath(model_or_name)
    loading = {name: process_fields.pop(name) for name in _LOADING if name in process_fields}
    named = isinstance(model_or_name, str)
    argument = f"adapt_decoder({model_or_name!r})" if named else f"adapt_decoder of a {type(model_or_name).__name__}"
    if named:
        stock = read_config(model_or_name, argument=argument, **loading)
    elif hasattr(model_or_name, "config") and hasattr(model_or_name, "get_input_embeddings"):
        stock = model_or_name.config
    else:
        raise ValueError(f"{argument}: give a transformers decoder, its folder or its hub name.")
    model_class = decoder_class(stock, argument)
    own = _tokenizer_of(model_or_name, loading) if named else tokenizer
    tokenizer = own if tokenizer is None else tokenizer
    mask = _find_mask(mask_token_id, tokenizer, stock)
    if mask.trained and own is not None and own.mask_token_id is None:
        # The caller added this mask token to the tokenizer: it is as new to the decoder as one that is chosen here.
        chosen = choose_mask(own, stock)
        mask = chosen if chosen.id == mask.id else mask._replace(trained=False)
    fields = {"block_size": block_size, "alignment": alignment, "context": context, **process_fields}
    config = decoder_config(stock, mask, fields, argument)
    if named:
        model = load_model(model_or_name, argument="adapt_decoder:", config=config, **loading)
    elif built := [*loading, *(name for name in process_fields if hasattr(stock, name) and "token_id" not in name)]:
        raise ValueError(f"{', '.join(built)} applies when a model is loaded by name: leave it out for a model.")
    else:
        model = _take_over(model_or_name, model_class, config, argument)
    _make_mask_row(model, mask, tokenizer)
    if tokenizer is not None:
        set_mask_token(tokenizer, mask.id)
    logger.warning("mask token: id %d, %s.", mask.id, mask.origin)
    return model


def decoder_class(config: Any, argument: str) -> Any:
    """Return the block-diffusion class for a stock configuration.

    Raises:
        ValueError: if there is none, with the reason and the supported families.
    """
    found = getattr(config, "model_type", None)
    if isinstance(found, str) and found.startswith("bd3lm"):
        raise ValueError(f"{argument}: this is a block-diffusion model already (model_type={found!r}); load it.")
    reason = unsupported_reason(config) or (None if found in DECODERS else "this type is not supported yet")
    if reason:
        raise ValueError(
            f"{argument}: a decoder with model_type={found!r} cannot be adapted: {reason}. Supported types: "
            f"{', '.join(DECODERS)}."
        )
    return DECODERS[str(found)]


def decoder_config(stock: Any, mask: MaskToken, fields: dict[str, Any], argument: str) -> Any:
    """Return a decoder's configuration with the fields of the diffusion process.

    Raises:
        ValueError: if a field does not exist or has an invalid value.
    """
    config_class = DECODERS[stock.model_type].config_class
    known = {field.name for field in dataclasses.fields(config_class)}  # without the options that are fixed
    unknown = [name for name in fields if name not in known]
    if unknown:
        raise ValueError(f"{argument}: {', '.join(unknown)} is not a field of a {config_class.__name__}.")
    kept = {k: v for k, v in stock.to_dict().items() if k not in ("model_type", "architectures", "auto_map")}
    # A mask token in a new row would fail the checks: the vocabulary grows only when the embedding is resized.
    config = config_class.from_dict(
        {**kept, "vocab_size": max(stock.vocab_size, mask.id + 1), **fields, "mask_token_id": mask.id}
    )
    config.vocab_size = stock.vocab_size
    config._name_or_path = stock._name_or_path
    return config


def choose_mask(tokenizer: PreTrainedTokenizerBase | None, config: Any) -> MaskToken:
    """Choose the mask token of a decoder, in the order at the top of this file.

    Raises:
        ValueError: if the tokenizer's mask token is also a BOS, EOS or padding token.
    """
    if tokenizer is None:
        return MaskToken(config.vocab_size, "a new row, since no tokenizer was given", trained=False)
    if tokenizer.mask_token_id is not None:
        number = tokenizer.mask_token_id
        _check_mask(f"the tokenizer's mask token {tokenizer.mask_token} (id {number})", number, tokenizer, config)
        return MaskToken(number, "the tokenizer's own", trained=True)
    known = tokenizer.get_vocab().get(MASK)
    if known is not None and known < config.vocab_size:
        return MaskToken(known, f"the tokenizer's token {MASK}", trained=False)
    free = first_free_id(tokenizer)
    if free < config.vocab_size:
        return MaskToken(free, "the first row of the embedding that no token uses", trained=False)
    reserved = ((number, token) for token, number in tokenizer.get_vocab().items() if _RESERVED.fullmatch(token))
    for number, token in sorted(reserved):
        if number < config.vocab_size and number not in _special_ids(tokenizer, config).values():
            return MaskToken(number, f"the tokenizer's reserved token {token}", trained=False)
    return MaskToken(free, "a new row", trained=False)


def load_decoder_tokenizer(name: str, config: Any, mask_token_id: int | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a decoder, with all special tokens that a block-diffusion model needs.

    Args:
        mask_token_id: overrides the choice of the mask token.

    Raises:
        ValueError: if the decoder has no tokenizer, or the mask token is also another special token.
    """
    tokenizer = _tokenizer_of(name, {})
    if tokenizer is None:
        raise ValueError(f"{name} has no tokenizer: name one with --tokenizer.")
    set_mask_token(tokenizer, _find_mask(mask_token_id, tokenizer, config).id)
    return complete_special_tokens(tokenizer)


def _find_mask(mask_token_id: int | None, tokenizer: PreTrainedTokenizerBase | None, config: Any) -> MaskToken:
    """Return the mask token that a caller asked for, or else choose one."""
    if mask_token_id is None:
        return choose_mask(tokenizer, config)
    if isinstance(mask_token_id, bool) or not isinstance(mask_token_id, int) or mask_token_id < 0:
        raise ValueError(f"mask_token_id={mask_token_id!r} is not a token id: give an integer >= 0.")
    if mask_token_id >= config.vocab_size:
        raise ValueError(
            f"mask_token_id={mask_token_id} is outside the vocabulary of {config.vocab_size} ids: give one from 0 to "
            f"{config.vocab_size - 1}, or leave it out, which adds a row if none is free."
        )
    _check_mask(f"mask_token_id={mask_token_id}", mask_token_id, tokenizer, config)
    return MaskToken(mask_token_id, "as given", trained=False)


def _check_mask(label: str, number: int, tokenizer: PreTrainedTokenizerBase | None, config: Any) -> None:
    for name, special in _special_ids(tokenizer, config).items():
        if special == number:
            raise ValueError(
                f"{label} is also {name}: a mask token must have no other role, or the model forgets what the token "
                f"means. Choose another with mask_token_id (`bd3lm train --mask_token_id`)."
            )


def _special_ids(tokenizer: PreTrainedTokenizerBase | None, config: Any) -> dict[str, int]:
    found = {}
    for owner in (config, tokenizer):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(owner, name, None)
            for number, single in enumerate(value if isinstance(value, list) else [value]):
                if single is not None:
                    found[name if number == 0 else f"{name}[{number}]"] = single
    return found


def _tokenizer_of(name: str, loading: dict[str, Any]) -> PreTrainedTokenizerBase | None:
    options = {k: loading[k] for k in ("revision", "token", "cache_dir", "local_files_only") if k in loading}
    if Path(name).is_dir() and not has_tokenizer(Path(name)):
        return None
    try:
        return AutoTokenizer.from_pretrained(name, **options)
    except (OSError, ValueError, KeyError):
        return None


def _take_over(model: Any, model_class: Any, config: Any, argument: str) -> Any:
    """Return a model of `model_class` that takes over the modules of a decoder."""
    stock_class = model_class.__bases__[-1]
    if not isinstance(model, stock_class):
        raise ValueError(f"{argument}: give the whole language model, a {stock_class.__name__}.")
    config._attn_implementation = model.config._attn_implementation
    with torch.device("meta"):
        adapted = model_class(config)
    stock_config = model.config
    for name, module in model.named_children():
        setattr(adapted, name, module)
    adapted.watch_decoder()
    for module in adapted.modules():
        # Stock layers keep a reference to the configuration, and read the attention implementation from it.
        if getattr(module, "config", None) is stock_config:
            module.config = config
    generation_config = copy.deepcopy(model.generation_config)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        # Defaults of the family that this vocabulary does not contain; see `_drop_default_tokens`.
        if getattr(config, name) is None and getattr(generation_config, name) == getattr(stock_config, name):
            setattr(generation_config, name, None)
    adapted.generation_config = generation_config
    return adapted.train(model.training)


@torch.no_grad()
def _make_mask_row(model: Any, mask: MaskToken, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Give the mask token an embedding that training can start from: the mean of the used rows.

    At most this row is added: the head could predict any further row, which would belong to no token.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    if mask.id >= rows:
        model.resize_token_embeddings(mask.id + 1, mean_resizing=False)
    used = rows if tokenizer is None else min(rows, first_free_id(tokenizer))
    # Tied weights are the same parameter.
    tables = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    for weight in dict.fromkeys(tables):
        if weight.is_meta or not weight.is_floating_point():  # offloaded or quantized
            continue
        known = torch.arange(used, device=weight.device)
        known = known[known != mask.id]
        norms = weight[known].float().norm(dim=1)
        if not mask.trained or weight[mask.id].float().norm() < _DECAYED * norms.mean():
            weight[mask.id] = weight[known].float().mean(0).to(weight.dtype)
