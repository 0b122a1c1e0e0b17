"""Load a checkpoint and refuse what would score or train as garbage: weights missing, foreign or not finite."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError
from torch.distributed.tensor import DTensor
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
)
from transformers.utils import logging

from bd3lm_hf.adapters import adapter_base, merge_adapter
from bd3lm_hf.files import exists, looks_like_path
from bd3lm_hf.refusals import is_refusal


logger = logging.get_logger("bd3lm_hf.checkpoints")

# The buffers of the learned interval, which checkpoints of full diffusion come without; the configuration has it too.
_MAY_LACK = {"sampling_eps_min", "sampling_eps_max"}


def read_config(name: str, *, argument: str = "--model", trust_remote_code: bool = False) -> Any:
    """The configuration of a folder or hub name; arguments and errors as in [`load_model`]."""
    if looks_like_path(name) and not exists(name):
        raise ValueError(f"{argument} {name}: there is no such folder; name a checkpoint folder or a hub model.")
    base = adapter_base(name)
    if base is not None:
        return read_config(base, argument=f"{argument} {name} on", trust_remote_code=trust_remote_code)
    with _reading(name, argument):
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)


def load_model(
    name: str,
    *,
    argument: str = "--model",
    trust_remote_code: bool = False,
    config: Any = None,
    spare: bool = False,
    **options: Any,
) -> Any:
    """The model of a folder or hub name, with every one of its weights; an adapter is merged into its base model.

    Args:
        argument: what the user calls `name`, for messages.
        config: instead of the checkpoint's own.
        spare: leave weights out that the model has no place for, such as the pooler of many encoders, with a warning.
        options: for `from_pretrained`, such as `attn_implementation`.

    Raises:
        ValueError: a checkpoint that can not be read, lacks weights, has others, or holds NaN.
    """
    config = config or read_config(name, argument=argument, trust_remote_code=trust_remote_code)
    base = adapter_base(name)
    if base is not None:
        options |= {"trust_remote_code": trust_remote_code, "config": config}
        return merge_adapter(load_model(base, argument=f"{argument} {name} on", **options), name)
    auto_map = getattr(config, "auto_map", None) or {}
    known = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not is_refusal(MODEL_FOR_MASKED_LM_MAPPING[type(config)])
    masked = known or "AutoModelForMaskedLM" in auto_map
    auto_class: Any = AutoModelForMaskedLM if masked else AutoModelForCausalLM
    # Weights of another shape are reported below, with their names.
    options |= {"trust_remote_code": trust_remote_code, "ignore_mismatched_sizes": True, "output_loading_info": True}
    with _reading(name, argument):
        model, info = auto_class.from_pretrained(name, config=config, **options)
    if set(info["missing_keys"]) >= _MAY_LACK:
        info["missing_keys"] = set(info["missing_keys"]) - _MAY_LACK
    if spare and info["unexpected_keys"]:
        logger.warning(f"{argument} {name}: {', '.join(sorted(info['unexpected_keys']))} are left out.")
        info["unexpected_keys"] = set()
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := sorted(key if isinstance(key, str) else str(key[0]) for key in info.get(kind, ())):
            raise ValueError(
                f"{argument} {name} has {len(keys)} {kind.removesuffix('_keys')} weights ({', '.join(keys[:8])}"
                f"{', ...' if len(keys) > 8 else ''}): it is a checkpoint of another model."
            )
    check_finite_weights(model, name)
    return model


@contextmanager
def _reading(name: str, argument: str) -> Iterator[None]:
    """Any failure to read the files of a checkpoint is one kind of error."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"{argument} {name} can not be loaded; name a complete checkpoint: {type(error).__name__}: {error}"
        ) from error


class NotFiniteError(ValueError):
    """Weights that are no longer finite numbers."""


def check_finite_weights(model: torch.nn.Module, origin: str) -> None:
    """Refuse a model whose weights or buffers hold NaN or infinity.

    With sharded weights all processes call this together, and find the same.

    Args:
        origin: where the weights come from, for the message.

    Raises:
        NotFiniteError: names the first such tensor.
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            count = int((~torch.isfinite(tensor)).sum())
            raise NotFiniteError(
                f"{count} of {tensor.numel()} numbers of {name} in {origin} are NaN or infinite: start from another "
                f"checkpoint."
            )


__all__ = ["NotFiniteError", "check_finite_weights", "load_model", "read_config"]
