"""Low-rank adapters (LoRA, arXiv 2106.09685) on our models, by the `peft` library.

Adapted layers are no plain linear layers any more, so the network computes them one by one and exactly as peft does;
merged into the weights they are plain again, and the model as fast as its base.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from safetensors import SafetensorError
from transformers.utils.peft_utils import find_adapter_config_file


#: Attention and MLP of every layer. The ending `mlp.0` is also that of the small network of the noise level.
TARGET_MODULES = ("attn_qkv", "attn_out", "mlp.0", "mlp.2")


def register_targets(model_type: str, targets: Sequence[str] = TARGET_MODULES) -> None:
    """Let `LoraConfig` without `target_modules` adapt attention and MLP of models of this type."""
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.setdefault(model_type, list(targets))


def add_adapters(
    model: Any, *, rank: int, alpha: int = 16, dropout: float = 0.0, targets: list[str] | None = None
) -> PeftModel:
    """The model with adapters, which alone have gradients.

    Args:
        rank: of the update of each adapted matrix.
        alpha: the update is scaled by `alpha / rank`.
        dropout: in front of the adapters.
        targets: endings of the names of the adapted layers, or `["all-linear"]`, which is all but the head.

    Raises:
        ValueError: no layer has such a name.
    """
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        linears = (name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear))
        names = sorted({re.sub(r"^.*?(\w+(\.\d+)?)$", r"\1", name) for name in linears})
        raise ValueError(f"{error} Linear layers of this model are called: {', '.join(names)}.") from error


def adapter_base(name: str) -> str | None:
    """The folder or hub name of the model that an adapter was trained on; None if `name` is no adapter.

    Raises:
        ValueError: an adapter that does not say.
    """
    try:
        found = find_adapter_config_file(name)
    except OSError:  # neither a folder nor to be had from the hub, which whoever loads it will say
        return None
    if found is None:
        return None
    base = json.loads(Path(found).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise ValueError(
            f"The adapter {name!r} does not name the model that it was trained on: write it into its "
            "adapter_config.json as base_model_name_or_path."
        )
    return base


def merge_adapter(base: Any, name: str) -> Any:
    """The base model with an adapter merged into its weights: a plain model again, all of whose weights may train.

    Raises:
        ValueError: the adapter can not be read, or is one of another model.
    """
    try:
        return PeftModel.from_pretrained(base, name).merge_and_unload().requires_grad_(True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"The adapter {name!r} can not be put on its base model: {type(error).__name__}: {error}"
        ) from error


__all__ = ["TARGET_MODULES", "adapter_base", "add_adapters", "merge_adapter", "register_targets"]
