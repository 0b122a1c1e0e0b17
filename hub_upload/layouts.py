"""Which model a foreign checkpoint is: its type and fields, from its configuration and the shapes of its weights.

Published configurations leave things out or name them differently from one repository to the next; the weights do not
lie about sizes.

The original layout of SSD-LM (arXiv 2210.17432): a masked language model, and its two own layers beside it.

`embed_sum_layer.pt` holds the linear layer from the simplex to the hidden size, `timestep_layer.pt` that of the
progress. Both are pickles, and are read as data.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_MASKED_LM_MAPPING
from transformers.models.roberta.configuration_roberta import RobertaConfig

from bd3lm_hf.hub_upload.safe_pickle import read_checkpoint
from bd3lm_hf.modeling.configuration_ssdlm import SSDLMConfig


_BERT_VOCABULARY, _BERT_MASK = 30522, 103  # bert-base-uncased, of the authors' LM1B models


_LENGTH = 1024  # of all published checkpoints


_PREFIX = "backbone."


class Architecture(NamedTuple):
    """A configuration to be, and what had to be guessed for it."""

    model_type: str
    fields: dict[str, Any]
    notes: list[str]


def architecture_of(
    weights: Mapping[str, torch.Tensor], config: Mapping[str, Any], model_type: str | None = None
) -> Architecture:
    """Type and fields of the model that `weights` belong to.

    Args:
        weights: with the published names.
        config: a `config.json`, or a Lightning run's configuration; may lack anything.
        model_type: overrides what they say.

    Raises:
        ValueError: weights of no model of this family, or a type that contradicts them.
    """
    given = _flat(config)
    notes: list[str] = []
    fields = _sizes(weights, given, notes)
    kind = model_type or _type_of(fields, given, notes)
    for name in ("dropout", "ignore_bos", "time_conditioning", "mdlm_loss_scale", "resample", "noise"):
        if given.get(name) is not None:
            fields[name] = given[name]
    fields = _OF_TYPE[_known(kind)](fields, given, weights, notes)
    if "mask_token_id" in given:
        fields["mask_token_id"] = given["mask_token_id"]
    elif fields["vocab_size"] == _BERT_VOCABULARY:
        fields["mask_token_id"] = _BERT_MASK
        notes.append(f"mask_token_id={_BERT_MASK}, that of bert-base-uncased, as the vocabulary has its size")
    return Architecture(kind, fields, notes)


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of either kind of configuration under the names of a config.json."""
    if not isinstance(config.get("algo"), Mapping):
        return dict(config)
    model, algo = dict(config.get("model") or {}), dict(config["algo"])
    noise, training = dict(config.get("noise") or {}), dict(config.get("training") or {})
    flat = {
        "algorithm": algo.get("name"),
        "hidden_dim": model.get("hidden_size"),
        "model_length": model.get("length"),
        "cond_dim": model.get("cond_dim"),
        "n_blocks": model.get("n_blocks"),
        "n_heads": model.get("n_heads"),
        "dropout": model.get("dropout"),
        "block_size": config.get("block_size"),
        "noise": noise.get("type"),
        "resample": training.get("resample"),
        **{k: algo.get(k) for k in ("cross_attn", "time_conditioning", "ignore_bos", "mdlm_loss_scale", "var_min")},
    }
    # A value such as "${model.length}" refers to another; the sizes are in the weights.
    return {k: v for k, v in flat.items() if v is not None and not (isinstance(v, str) and v.startswith("${"))}


def _sizes(weights: Mapping[str, torch.Tensor], given: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    embedding = weights.get(f"{_PREFIX}vocab_embed.embedding")
    layers = {int(m[1]) for name in weights if (m := re.match(rf"{_PREFIX}blocks\.(\d+)\.", name))}
    if embedding is None or not layers:
        raise ValueError(
            f"the weights are those of no model of this family: {_PREFIX}vocab_embed.embedding and {_PREFIX}blocks.0 "
            f"must be among them; there are {', '.join(sorted(weights)[:4]) or 'none'}, ..."
        )
    sizes: dict[str, Any] = {
        "vocab_size": embedding.shape[0],
        "hidden_dim": embedding.shape[1],
        "n_blocks": max(layers) + 1,
        "adaln": f"{_PREFIX}sigma_map.mlp.0.weight" in weights,
    }
    if sizes["adaln"]:
        sizes["cond_dim"] = weights[f"{_PREFIX}sigma_map.mlp.0.weight"].shape[0]
    for name, value in sizes.items():
        if given.get(name, value) != value:
            notes.append(f"{name}={value} as in the weights; the configuration says {given[name]}")
    frequencies = weights.get(f"{_PREFIX}rotary_emb.inv_freq")
    if given.get("n_heads"):
        sizes["n_heads"] = given["n_heads"]
    elif frequencies is not None:
        sizes["n_heads"] = sizes["hidden_dim"] // (2 * len(frequencies))
        notes.append(f"n_heads={sizes['n_heads']}, from the rotary frequencies in the weights")
    else:
        raise ValueError(
            "n_heads is neither in the configuration nor to be seen from the weights (inv_freq is absent)."
        )
    sizes["model_length"] = given.get("model_length") or _LENGTH
    if not given.get("model_length"):
        notes.append(f"model_length={_LENGTH}, that of the published checkpoints")
    return sizes


def _type_of(fields: Mapping[str, Any], given: Mapping[str, Any], notes: list[str]) -> str:
    """The model type that a configuration means; published ones say `bd3lm` or `mdlm` for several models."""
    if given.get("algorithm"):
        return str(given["algorithm"])
    if given.get("causal") or not fields["adaln"]:
        found, reason = "ar", "causal" if given.get("causal") else "its weights have no adaLN"
    elif given.get("time_conditioning") and not given.get("cross_attn"):
        found, reason = "sedd", "it is time-conditioned, with attention over the whole sequence"
    else:
        return str(given.get("model_type") or "bd3lm")
    if found != given.get("model_type"):
        notes.append(f"taken for model_type={found!r}: {reason}")
    return found


def _known(model_type: str) -> str:
    if model_type not in _OF_TYPE:
        raise ValueError(f"model_type={model_type!r} is none of this family: choose one of {', '.join(_OF_TYPE)}.")
    return model_type


def _block_diffusion(
    fields: dict[str, Any], given: Mapping[str, Any], weights: Mapping[str, torch.Tensor], notes: list[str]
) -> dict[str, Any]:
    cross = given.get("cross_attn")
    size = given.get("block_size")
    if size is None:
        raise ValueError("block_size is not in the configuration, and no weight tells: a BD3-LM needs it there.")
    fields |= {"block_size": size, "cross_attn": size != fields["model_length"] if cross is None else cross}
    fields["var_min"] = "sampling_eps_min" in weights
    for name in ("sampling_eps_min", "sampling_eps_max"):
        if name in weights:
            fields[name] = float(weights[name])
    return fields


def _autoregressive(
    fields: dict[str, Any], given: Mapping[str, Any], weights: Mapping[str, torch.Tensor], notes: list[str]
) -> dict[str, Any]:
    if fields["adaln"]:
        raise ValueError(
            "model_type='ar' contradicts the weights, which have adaLN (sigma_map) as only diffusion models do: leave "
            "the type out, or name bd3lm, mdlm or sedd."
        )
    for name in ("time_conditioning", "mdlm_loss_scale", "resample", "noise", "ignore_bos"):
        fields.pop(name, None)
    return fields


def _masked_diffusion(
    fields: dict[str, Any], given: Mapping[str, Any], weights: Mapping[str, torch.Tensor], notes: list[str]
) -> dict[str, Any]:
    if "mdlm_loss_scale" not in fields:
        notes.append("mdlm_loss_scale=False; set it in config.json for a model that Sahoo et al. trained")
    return fields


def _score_entropy(
    fields: dict[str, Any], given: Mapping[str, Any], weights: Mapping[str, torch.Tensor], notes: list[str]
) -> dict[str, Any]:
    return {**_masked_diffusion(fields, given, weights, notes), "time_conditioning": True}


_OF_TYPE = {"bd3lm": _block_diffusion, "ar": _autoregressive, "mdlm": _masked_diffusion, "sedd": _score_entropy}


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


__all__ = ["Architecture", "SimplexLayout", "architecture_of", "is_simplex_layout", "read_simplex"]
