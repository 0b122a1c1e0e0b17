"""Load a checkpoint and refuse what would score or train as garbage: weights missing, foreign or not finite."""

from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
)

from bd3lm_hf.files import exists, looks_like_path


def load_model(name: str, *, argument: str = "--model", trust_remote_code: bool = False, **fields: Any) -> Any:
    """The model of a folder or hub name, with every one of its weights.

    Args:
        argument: what the user calls `name`, for messages.
        fields: configuration fields to override, and `attn_implementation`.

    Raises:
        ValueError: a checkpoint that can not be read, lacks weights, has others, or holds NaN.
    """
    if looks_like_path(name) and not exists(name):
        raise ValueError(f"{argument} {name}: there is no such folder; name a checkpoint folder or a hub model.")
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        auto_map = getattr(config, "auto_map", None) or {}
        masked = type(config) in MODEL_FOR_MASKED_LM_MAPPING or "AutoModelForMaskedLM" in auto_map
        auto_class: Any = AutoModelForMaskedLM if masked else AutoModelForCausalLM
        # Weights of another shape are reported below, with their names.
        options = {"trust_remote_code": trust_remote_code, "ignore_mismatched_sizes": True}
        loaded: Any = auto_class.from_pretrained(name, output_loading_info=True, **options, **fields)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"{argument} {name} can not be loaded; name a complete checkpoint: {type(error).__name__}: {error}"
        ) from error
    model, info = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := sorted(key if isinstance(key, str) else str(key[0]) for key in info.get(kind, ())):
            raise ValueError(
                f"{argument} {name} has {len(keys)} {kind.removesuffix('_keys')} weights ({', '.join(keys[:8])}"
                f"{', ...' if len(keys) > 8 else ''}): it is a checkpoint of another model."
            )
    check_finite_weights(model, name)
    return model


class NotFiniteError(ValueError):
    """Weights that are no longer finite numbers."""


def check_finite_weights(model: torch.nn.Module, origin: str) -> None:
    """Refuse a model whose weights or buffers hold NaN or infinity.

    Args:
        origin: where the weights come from, for the message.

    Raises:
        NotFiniteError: names the first such tensor.
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            count = int((~torch.isfinite(tensor)).sum())
            raise NotFiniteError(
                f"{count} of {tensor.numel()} numbers of {name} in {origin} are NaN or infinite: start from another "
                f"checkpoint."
            )


__all__ = ["NotFiniteError", "check_finite_weights", "load_model"]
