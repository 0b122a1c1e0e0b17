"""The original layout of SSD-LM (arXiv 2210.17432): a masked language model, and its two own layers beside it.

`embed_sum_layer.pt` holds the linear layer from the simplex to the hidden size, `timestep_layer.pt` that of the
progress. Both are pickles, and are read as data.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_MASKED_LM_MAPPING
from transformers.models.roberta.configuration_roberta import RobertaConfig

from bd3lm_hf.hub_upload.architecture import Architecture
from bd3lm_hf.hub_upload.pickles import read_checkpoint
from bd3lm_hf.modeling.configuration_ssdlm import SSDLMConfig


# File -> the layer's name in our model, and its tensors.
_LAYERS = {"embed_sum_layer.pt": ("embed_sum", ("weight",)), "timestep_layer.pt": ("timestep", ("weight", "bias"))}
_BLOCK, _LENGTH = 25, 200  # of the published model, whose configuration is that of its encoder


class SimplexLayout(NamedTuple):
    """What such a folder holds."""

    weights: dict[str, torch.Tensor]  # with our names
    architecture: Architecture


def is_simplex_layout(folder: Path) -> bool:
    """Whether a folder holds either layer; both must be there to read it."""
    return any((folder / file).is_file() for file in _LAYERS)


def read_simplex(folder: Path, encoder: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> SimplexLayout:
    """Name the weights as ours, and say what the configuration is.

    Args:
        encoder: weights of the masked language model, under its own names.
        config: its `config.json`.

    Raises:
        ValueError: a layer is missing, holds other tensors or objects, or contradicts the encoder.
    """
    notes: list[str] = []
    weights = {}
    for name, tensor in encoder.items():
        if name.endswith("position_ids"):  # numbers that old versions of transformers saved
            notes.append(f"{name} is no weight, and was left out")
        else:
            weights[f"model.{name}"] = tensor.float() if tensor.is_floating_point() else tensor
    for file, (layer, names) in _LAYERS.items():
        weights |= _read_layer(folder / file, layer, names)
    vocab_size = weights["embed_sum.weight"].shape[-1]
    kind = str(config.get("model_type"))
    if kind not in CONFIG_MAPPING or CONFIG_MAPPING[kind] not in MODEL_FOR_MASKED_LM_MAPPING:
        raise ValueError(f"SRC {folder}: model_type={kind!r} of config.json is no masked language model.")
    own = {name: value for name, value in config.items() if name not in ("_name_or_path", "auto_map")}
    if own.get("vocab_size") != vocab_size:
        # The original enlarges the embeddings to its tokenizer.
        notes.append(f"vocab_size={vocab_size} as in the weights; the configuration says {own.get('vocab_size')}")
        own["vocab_size"] = vocab_size
    length = _window(own, kind)
    notes.append(f"block_size={_BLOCK} and model_length={length}, as far as it fits those of the published model")
    fields = {"encoder_config": own, "vocab_size": vocab_size, "block_size": _BLOCK, "model_length": length}
    special = (f"{name}_token_id" for name in ("bos", "eos", "pad"))
    fields |= {name: own[name] for name in special if own.get(name) is not None}
    return SimplexLayout(weights, Architecture(SSDLMConfig.model_type, fields, notes))


def _read_layer(path: Path, layer: str, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise ValueError(f"SRC {path.parent} holds no {path.name}, which belongs to the layout of SSD-LM.")
    found = {str(name).removeprefix("module."): tensor for name, tensor in read_checkpoint(path).items()}
    if set(found) != set(names) or not all(isinstance(tensor, torch.Tensor) for tensor in found.values()):
        raise ValueError(f"{path} holds {', '.join(sorted(found)) or 'nothing'} instead of {', '.join(names)}.")
    return {f"{layer}.{name}": tensor.float() for name, tensor in found.items()}


def _window(config: Mapping[str, Any], kind: str) -> int:
    """The published window, or what the encoder has positions for."""
    room = config.get("max_position_embeddings")
    # RoBERTa counts positions from behind its padding id.
    offset = (config.get("pad_token_id") or 0) + 1 if issubclass(CONFIG_MAPPING[kind], RobertaConfig) else 0
    return _LENGTH if room is None else min(_LENGTH, room - offset)


__all__ = ["SimplexLayout", "is_simplex_layout", "read_simplex"]
