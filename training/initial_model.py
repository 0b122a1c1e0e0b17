"""The model that a run starts from: a new one, a checkpoint (perhaps of another block size), or a stock decoder.

The paper trains 850,000 steps at block = length and 150,000 more at the final block size. The block size affects
attention and noise but no weight, so training continues with all weights. Only the interval of noise levels, which was
learned for the old block size, is dropped.
"""

from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM
from transformers.utils import logging

from bd3lm_hf.adapt import adapt_decoder, decoder_class, is_adaptable
from bd3lm_hf.checkpoints import adapter_base, add_adapters, load_model, read_config
from bd3lm_hf.modeling.configuration_bd3lm import SAMPLING_EPS, BD3LMConfig
from bd3lm_hf.modeling.configuration_bd3lm_decoders import BD3LMDecoderConfigMixin
from bd3lm_hf.run_folder import publish_folder, staging_folder
from bd3lm_hf.tokenization import check_tokenizer_fits, limit_to_window
from bd3lm_hf.training.arguments import BD3LMTrainingArguments, LoraArguments, ModelArguments
from bd3lm_hf.user_files import BASE_NAME


logger = logging.get_logger("bd3lm_hf.train")

# Defaults for adapted decoders.
_DECODER_BLOCK, _DECODER_LENGTH = 4, 1024

_INTERVAL = ("sampling_eps_min", "sampling_eps_max")

# Fields that determine the shape of the weights or the inputs they were trained with, and their names in transformers'
# own models. Any other field may change.
SHAPE_FIELDS = {
    "hidden_dim": "hidden_size",
    "n_blocks": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "cond_dim": None,
    "adaln": None,
    "time_conditioning": None,
}


def make_model(arguments: ModelArguments, tokenizer: Any) -> Any:
    """Return a new model of the requested type, or a checkpoint's model with some of its fields overridden.

    Raises:
        ValueError: if the model type is unknown or has no such field, weights are missing, unexpected or not finite,
            or special tokens contradict the tokenizer's.
    """
    keywords: dict[str, Any] = {}
    implementation = arguments.attn_implementation
    # With `auto`, the encoder in an SSD-LM and every model on a CPU keep transformers' default attention.
    if implementation != "auto" or trains_by_flex(arguments.model_type, PartialState().device):
        keywords["attn_implementation"] = implementation
    head, name, fields = model_class(arguments.model_type), arguments.init_from, arguments.config_fields()
    config = None if name is None else read_config(name, argument="--init_from")
    if name is None:
        # len(tokenizer) is too small for a tokenizer with gaps in its ids.
        fields |= {"vocab_size": max(tokenizer.get_vocab().values()) + 1, **_special_tokens(tokenizer)}
        model = AutoModelForCausalLM.from_config(new_config(arguments.model_type, **fields), **keywords)
    elif hasattr(head, "from_encoder") and not isinstance(config, head.config_class):
        # A new model around a trained encoder, such as RoBERTa.
        _check_known(head.config_class, fields)
        encoder = load_model(name, argument="--init_from", skip_unexpected=True, dtype=torch.float32, **keywords)
        model = head.from_encoder(encoder, **_special_tokens(tokenizer), **fields)
    else:
        model = start_from(name, tokenizer, fields, **keywords)
    check_tokenizer_fits(tokenizer, model.config)
    limit_to_window(tokenizer, model.config)
    if arguments.num_denoising_steps is not None:
        model.generation_config.num_denoising_steps = arguments.num_denoising_steps
    return model


def trains_by_flex(model_type: str, device: torch.device) -> bool:
    """Return whether `--attn_implementation auto` may select flex attention: on CUDA, for all models but SSD-LM."""
    return device.type == "cuda" and not hasattr(model_class(model_type), "from_encoder")


def check_start(arguments: ModelArguments) -> None:
    """Refuse an initial model that cannot work, before any text is loaded.

    Raises:
        ValueError: if the checkpoint cannot be read, is a decoder of an unsupported family, or contradicts the fields;
            or if a new model has an unknown type or one that cannot be trained from scratch, or its fields contradict
            one another.
    """
    name = arguments.init_from
    config = None if name is None else read_config(name, argument="--init_from")
    if arguments.mask_token_id is not None and not is_adaptable(config):
        raise ValueError(
            f"--mask_token_id {arguments.mask_token_id} is for a plain decoder named by --init_from: any other model "
            f"has the mask token of its tokenizer, so leave it out."
        )
    kind = model_class(arguments.model_type)
    if name is None:
        if not hasattr(kind, "token_nll"):
            raise ValueError(
                f"--model_type {arguments.model_type} is not a model type of this package: to train a model of "
                f"another type, start from its weights with --init_from."
            )
        # The vocabulary is not known yet; these tokens fit any model type.
        tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "mask_token_id": 3}
        new_config(arguments.model_type, vocab_size=300, **tokens, **arguments.config_fields())
        return
    check_shape(name, arguments.config_fields())
    if not (hasattr(kind, "from_encoder") or _is_ours(config)):
        decoder_class(config, f"--init_from {name}")


def _is_ours(config: Any) -> bool:
    return hasattr(MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None), "token_nll")


def check_shape(name: str, fields: dict[str, Any]) -> None:
    """Refuse fields that contradict the shape of a checkpoint's network; a recipe may repeat the shape.

    Only the configuration is read, so a run can call this before it loads any text.

    Raises:
        ValueError: if there is such a field, or the checkpoint cannot be read.
    """
    config = read_config(name, argument="--init_from")
    # An encoder or a stock decoder uses transformers' names for the same sizes.
    own = {
        field: getattr(config, field, getattr(config, other or field, None)) for field, other in SHAPE_FIELDS.items()
    }
    wrong = [field for field, value in own.items() if field in fields and fields[field] != value]
    if wrong:
        raise ValueError(
            f"--{wrong[0]} {fields[wrong[0]]} contradicts --init_from {name}, whose {wrong[0]} is "
            f"{own[wrong[0]]}: the checkpoint determines the shape of the network, so leave out "
            f"{', '.join('--' + field for field in wrong)}."
        )


def start_from(name: str, tokenizer: Any, fields: dict[str, Any], **options: Any) -> Any:
    """Return the model of a checkpoint with some fields of its configuration changed.

    - All weights are kept, and none may be missing except the two buffers of the interval.
    - If sequences now have more than one block, the noisy stream attends to a clean one (`cross_attn=True`).
    - An interval of noise levels belongs to the block size it was learned for. At another block size training starts
      from the interval in `fields`, or from the whole one, [1e-3, 1]; at the same one the checkpoint's is kept.
    - Special tokens that the configuration does not set are the tokenizer's.

    Args:
        name: folder or hub name.
        tokenizer: tokenizer of the training text.
        fields: configuration fields, `block_size` and `model_length` among them.
        options: for `from_pretrained`, such as `attn_implementation`.

    Raises:
        ValueError: if fields or the tokenizer do not fit the checkpoint, or weights are missing, unexpected, of
            another shape or not finite.
    """
    old = read_config(name, argument="--init_from")
    if not _is_ours(old):
        return _start_from_decoder(name, old, tokenizer, fields, **options)
    changes = fields | _missing_tokens(old, tokenizer)
    check_tokenizer_fits(tokenizer, old)
    if isinstance(old, BD3LMConfig):
        changes = _with_implied_changes(old, changes)
    elif isinstance(old, BD3LMDecoderConfigMixin) and changes.get("block_size", old.block_size) != old.block_size:
        changes = {"sampling_eps_min": SAMPLING_EPS, "sampling_eps_max": 1.0, **changes}
    # A new configuration instead of changed fields in the old one: creating it checks that the fields fit together.
    config = type(old).from_dict({**old.to_dict(), **changes})
    # float32 even if the checkpoint is in half precision: optimizers need all digits, and --bf16 is a training option.
    model = load_model(name, argument="--init_from", config=config, dtype=torch.float32, **options)
    if any(end in changes for end in _INTERVAL):
        kept = model.interval()
        low, high = (changes.get(end, value) for end, value in zip(_INTERVAL, kept, strict=True))
        model.set_interval(low, high)
        is_new = (model.config.block_size, low, high) != (old.block_size, *kept)
        if is_new and PartialState().is_main_process:
            logger.warning(
                f"--init_from {name}: blocks of {old.block_size} tokens become blocks of {model.config.block_size}, "
                f"with noise levels in [{low:g}, {high:g}] instead of [{kept[0]:g}, {kept[1]:g}]; choose others with "
                f"--sampling_eps_min and --sampling_eps_max."
            )
    return model


def _start_from_decoder(name: str, stock: Any, tokenizer: Any, fields: dict[str, Any], **options: Any) -> Any:
    decoder_class(stock, f"--init_from {name}")
    # The shape is the decoder's; its configuration uses other names for it, and has its own dropout.
    process = {field: value for field, value in fields.items() if field not in (*SHAPE_FIELDS, "dropout")}
    if "model_length" not in process:
        # Decoders have positions for far longer texts than training with two streams can fit into memory.
        size = process.get("block_size", _DECODER_BLOCK)
        process["model_length"] = min(_DECODER_LENGTH, stock.max_position_embeddings) // size * size
        logger.warning(
            f"--init_from {name}: sequences of {process['model_length']} tokens; choose others with --model_length."
        )
    process |= _missing_tokens(stock, tokenizer)
    return adapt_decoder(name, tokenizer=tokenizer, dtype=torch.float32, **process, **options)


def decoder_shape(config_class: Any, fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a new network under the names of a decoder's configuration.

    Other sizes follow from the width, as in our own network: an MLP four times as wide, and one key and value head per
    attention head.
    """
    named = {SHAPE_FIELDS.get(field) or field: value for field, value in fields.items()}
    width, heads = named.get("hidden_size"), named.get("num_attention_heads", config_class().num_attention_heads)
    if width is None:
        return named
    follows = {"intermediate_size": 4 * width, "num_key_value_heads": heads, "head_dim": width // heads}
    return {name: value for name, value in follows.items() if hasattr(config_class, name)} | named


def _with_implied_changes(old: BD3LMConfig, changes: dict[str, Any]) -> dict[str, Any]:
    """Return `changes` and the changes that a new block size implies."""
    block_size = changes.get("block_size", old.block_size)
    if not old.causal and block_size != changes.get("model_length", old.model_length):
        changes = {"cross_attn": True, **changes}
    if block_size == old.block_size:
        return changes
    return {"var_min": True, "sampling_eps_min": SAMPLING_EPS, "sampling_eps_max": 1.0, **changes}


def check_lora(model: Any, lora: LoraArguments, start: str | None) -> None:
    """Refuse adapters on a model that they do not fit.

    Args:
        start: the checkpoint that the model was loaded from.

    Raises:
        ValueError: if the model is new (its weights would stay random), is an adapter itself (its name would refer to
            its base alone), or has another block size than the checkpoint (an adapter does not store it).
    """
    assert lora.lora_r is not None
    if start is None:
        raise ValueError(f"--lora_r {lora.lora_r} adapts a trained model: name one with --init_from.")
    if adapter_base(start) is not None:
        raise ValueError(
            f"--lora_r {lora.lora_r} would adapt the adapter {start}, and an adapter names one base model: save the "
            f"merged model first (PeftModel.merge_and_unload), or leave out --lora_r to train all its weights."
        )
    config = read_config(start, argument="--init_from")
    if is_adaptable(config):  # this run saves a base with the requested block size
        return
    block_size = getattr(config, "block_size", None)  # None for an encoder, which SSD-LM is built around
    if block_size != model.config.block_size:
        raise ValueError(
            f"--block_size {model.config.block_size} with --lora_r: an adapter is used with the configuration of "
            f"{start}, whose block_size is {block_size}. Train all weights at the new size first, or leave it out."
        )


def with_adapters(
    model: Any, lora: LoraArguments, start: str, tokenizer: Any, training: BD3LMTrainingArguments
) -> Any:
    """Return the model with adapters.

    An adapter names one base model, which must be a block-diffusion model. A base adapted from a plain decoder is
    therefore saved once, in the folder of the run. Its new embedding of the mask token is trained too.

    Args:
        start: the checkpoint that the model was loaded from.
    """
    assert lora.lora_r is not None  # checked
    is_new = is_adaptable(read_config(start, argument="--init_from"))
    if is_new:
        folder = Path(training.output_dir)
        if training.process_index == 0 and not (folder / BASE_NAME).exists():
            staged = staging_folder(folder) / BASE_NAME
            model.save_pretrained(staged)
            tokenizer.save_pretrained(staged)
            publish_folder(staged, folder / BASE_NAME)
        model.name_or_path = str(folder / BASE_NAME)
    return add_adapters(
        model,
        rank=lora.lora_r,
        alpha=lora.lora_alpha,
        dropout=lora.lora_dropout,
        targets=lora.lora_target_modules,
        train_mask_row=is_new,
    )


def new_config(model_type: str, **fields: Any) -> Any:
    """Return the configuration of a new model.

    Raises:
        ValueError: if the model type has no such field.
    """
    found = config_class(model_type)
    if issubclass(found, BD3LMDecoderConfigMixin):
        fields = decoder_shape(found, fields)
    _check_known(found, fields)
    return found(**fields)


def _check_known(config_class: Any, fields: dict[str, Any]) -> None:
    unknown = [name for name in fields if not hasattr(config_class, name) and name not in config_class.attribute_map]
    if unknown:
        raise ValueError(
            f"--{unknown[0]} {fields[unknown[0]]}: a {config_class.__name__} has no such field; leave out "
            f"{', '.join('--' + name for name in unknown)}."
        )


def config_class(model_type: str) -> Any:
    """Return the configuration class of a model type.

    Raises:
        ValueError: if there is no such type.
    """
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"--model_type {model_type} is unknown: try --model_type bd3lm.")
    return CONFIG_MAPPING[model_type]


def model_class(model_type: str) -> Any:
    """Return the model class of a model type, or None if it cannot generate text."""
    return MODEL_FOR_CAUSAL_LM_MAPPING.get(config_class(model_type), None)


def _special_tokens(tokenizer: Any, *names: str) -> dict[str, int | None]:
    return {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in names or ("bos", "eos", "pad", "mask")
    }


def _missing_tokens(config: Any, tokenizer: Any) -> dict[str, int | None]:
    """Return the tokenizer's special tokens that a configuration does not set.

    An id outside the vocabulary is the default of a larger one, and counts as not set.
    """
    found = _special_tokens(tokenizer, "bos", "eos", "pad")
    known = {name: getattr(config, name, None) for name in found}
    outside = [name for name, token in known.items() if isinstance(token, int) and token >= config.vocab_size]
    return {name: token for name, token in found.items() if known[name] is None or name in outside}
