"""The published checkpoint layouts: read their files, and find model type and fields in configuration and weights.

Published configurations omit fields, or name them differently in each repository. Sizes are taken from the weights.

BD3-LM, AR, MDLM and SEDD share one layout. SSD-LM (arXiv 2210.17432) has its own: a masked language model and, in
pickles next to it, two extra linear layers: `embed_sum_layer.pt`, from the simplex to the hidden size, and
`timestep_layer.pt`, for the diffusion progress.
"""

import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, MODEL_FOR_MASKED_LM_MAPPING
from transformers.models.roberta.configuration_roberta import RobertaConfig

from bd3lm_hf.checkpoints import read_shard_index
from bd3lm_hf.console import one_line
from bd3lm_hf.data.sources import looks_like_path
from bd3lm_hf.hub_upload.repo_files import check_links
from bd3lm_hf.modeling.configuration_bd3lm import BD3LMConfig
from bd3lm_hf.modeling.configuration_ssdlm import SSDLMConfig
from bd3lm_hf.user_files import read_json


_INDEX_FILE = "model.safetensors.index.json"
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
MODEL_TYPES = ("bd3lm", "ar", "mdlm", "sedd")
BUFFERS = ("rotary_emb.inv_freq", "sampling_eps_min", "sampling_eps_max")
_BERT_VOCABULARY, _BERT_MASK = 30522, 103  # bert-base-uncased, of the authors' LM1B models
_MODEL_LENGTH = 1024  # of all published checkpoints
_PREFIX = "backbone."
# Of the published SSD-LM, whose configuration describes only its encoder.
_SSDLM_BLOCK_SIZE, _SSDLM_LENGTH = 25, 200
# File -> the layer's name in our model, and its tensors.
_SSDLM_LAYERS = {
    "embed_sum_layer.pt": ("embed_sum", ("weight",)),
    "timestep_layer.pt": ("timestep", ("weight", "bias")),
}

# Pickled objects next to the weights (configurations, tokenizers, loop states) of which only the state is kept, by the
# beginning of their names.
_INERT = (
    *("omegaconf.", "hydra.", "lightning.", "pytorch_lightning.", "lightning_fabric.", "transformers.", "tokenizers."),
    *("builtins.bool", "builtins.bytes", "builtins.dict", "builtins.float", "builtins.frozenset", "builtins.int"),
    *("builtins.list", "builtins.long", "builtins.slice", "builtins.str", "builtins.tuple"),
    *("typing.Any", "enum.Enum", "pathlib.PosixPath", "collections.defaultdict"),
)
_MAX_VALUES = 100_000  # in hyper-parameters


class Architecture(NamedTuple):
    """Model type and configuration fields of a checkpoint."""

    model_type: str
    fields: dict[str, Any]
    notes: list[str]  # what was inferred


class Source(NamedTuple):
    """The contents of a checkpoint."""

    weights: dict[str, torch.Tensor]  # named as published: `backbone.`...
    average: list[torch.Tensor] | None  # moving averages of the parameters, in their order
    config: dict[str, Any]  # a config.json, or the hyper-parameters
    folder: Path | None  # where a tokenizer may be
    architecture: Architecture | None = None  # set if the layout alone determines it


def architecture_of(
    weights: Mapping[str, torch.Tensor], config: Mapping[str, Any], model_type: str | None = None
) -> Architecture:
    """Return type and fields of the model that `weights` belong to.

    Args:
        weights: with the published names.
        config: a `config.json`, or a Lightning run's configuration; any field may be absent.
        model_type: overrides both.

    Raises:
        ValueError: if the weights are not those of BD3-LM or its baselines, or the type contradicts them.
    """
    given = _flat(config)
    notes: list[str] = []
    fields = _sizes(weights, given, notes)
    kind = model_type or _type_of(fields, given, notes)
    if kind not in MODEL_TYPES:
        raise ValueError(
            f"model_type={kind!r} is not a BD3-LM or one of its baselines: choose one of {', '.join(MODEL_TYPES)}."
        )
    for name in ("dropout", "ignore_bos", "time_conditioning", "mdlm_loss_scale", "resample", "noise"):
        if given.get(name) is not None:
            fields[name] = given[name]
    _fit_to_type(kind, fields, given, weights, notes)
    if "mask_token_id" in given:
        fields["mask_token_id"] = given["mask_token_id"]
    elif fields["vocab_size"] == _BERT_VOCABULARY:
        fields["mask_token_id"] = _BERT_MASK
        notes.append(f"mask_token_id={_BERT_MASK}, as in bert-base-uncased, which has a vocabulary of this size")
    return Architecture(kind, fields, notes)


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of either kind of configuration under the names of a config.json."""
    if not isinstance(config.get("algo"), Mapping):
        return dict(config)
    sections = (config.get(name) for name in ("algo", "model", "noise", "training"))
    algo, model, noise, training = (section if isinstance(section, Mapping) else {} for section in sections)
    flat = {
        "algorithm": algo.get("name"),
        "hidden_dim": model.get("hidden_size"),
        "model_length": model.get("length"),
        **{name: model.get(name) for name in ("cond_dim", "n_blocks", "n_heads", "dropout")},
        "block_size": config.get("block_size"),
        "noise": noise.get("type"),
        "resample": training.get("resample"),
        **{
            name: algo.get(name)
            for name in ("cross_attn", "time_conditioning", "ignore_bos", "mdlm_loss_scale", "var_min")
        },
    }
    # A value such as "${model.length}" refers to another field; the sizes are in the weights.
    return {k: v for k, v in flat.items() if v is not None and not (isinstance(v, str) and v.startswith("${"))}


def _sizes(weights: Mapping[str, torch.Tensor], given: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    embedding = weights.get(f"{_PREFIX}vocab_embed.embedding")
    layers = {int(m[1]) for name in weights if (m := re.match(rf"{_PREFIX}blocks\.(\d+)\.", name))}
    if embedding is None or embedding.dim() != 2 or not layers:
        raise ValueError(
            f"These are not the weights of a BD3-LM or one of its baselines, which have {_PREFIX}vocab_embed.embedding"
            f" (vocabulary, hidden) and {_PREFIX}blocks.0: found {', '.join(sorted(weights)[:4]) or 'none'}, ..."
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
            notes.append(f"{name}={value} as in the weights; the configuration has {given[name]}")
    frequencies = weights.get(f"{_PREFIX}rotary_emb.inv_freq")
    if given.get("n_heads"):
        sizes["n_heads"] = given["n_heads"]
    elif frequencies is not None:
        sizes["n_heads"] = sizes["hidden_dim"] // (2 * len(frequencies))
        notes.append(f"n_heads={sizes['n_heads']}, from the rotary frequencies in the weights")
    else:
        raise ValueError(
            "n_heads is missing in the configuration, and the weights have no rotary_emb.inv_freq to infer it from: "
            "add it to config.json."
        )
    sizes["model_length"] = given.get("model_length") or _MODEL_LENGTH
    if not given.get("model_length"):
        notes.append(f"model_length={_MODEL_LENGTH}, as in the published checkpoints")
    return sizes


def _type_of(fields: Mapping[str, Any], given: Mapping[str, Any], notes: list[str]) -> str:
    """Return the model type of a configuration; published ones say `bd3lm` or `mdlm` for several models."""
    if given.get("algorithm"):
        return str(given["algorithm"])
    if given.get("causal", not fields["adaln"]):
        found, reason = "ar", "causal" if given.get("causal") else "its weights have no adaLN"
    elif given.get("time_conditioning") and not given.get("cross_attn"):
        found, reason = "sedd", "time-conditioned, with attention over the whole sequence"
    else:
        return str(given.get("model_type") or "bd3lm")
    if found != given.get("model_type"):
        notes.append(f"read as model_type={found!r}: {reason}")
    return found


def _fit_to_type(
    kind: str, fields: dict[str, Any], given: Mapping[str, Any], weights: Mapping[str, torch.Tensor], notes: list[str]
) -> None:
    """Add the fields that only this type of model has, and remove those that it lacks."""
    if kind == "bd3lm":
        size = given.get("block_size")
        if size is None:
            if given.get("algorithm"):
                raise ValueError(
                    "block_size is missing in the hyper-parameters, and cannot be inferred from the weights."
                )
            # The default is 1 in the published class, 4 in ours.
            size = BD3LMConfig.block_size if given.get("architectures") == ["BD3LMForMaskedLM"] else 1
            notes.append(f"block_size={size}, the default of its configuration class")
        cross = given.get("cross_attn")
        fields |= {"block_size": size, "cross_attn": size != fields["model_length"] if cross is None else cross}
        fields["var_min"] = "sampling_eps_min" in weights
        fields |= {name: float(weights[name]) for name in BUFFERS[1:] if name in weights}
    elif kind == "ar":
        if fields["adaln"]:
            raise ValueError(
                "model_type='ar' contradicts the weights, which have adaLN (sigma_map), as only diffusion models do: "
                "leave the type out, or choose bd3lm, mdlm or sedd."
            )
        for name in ("time_conditioning", "mdlm_loss_scale", "resample", "noise", "ignore_bos"):
            fields.pop(name, None)
    else:
        if "mdlm_loss_scale" not in fields:
            notes.append("mdlm_loss_scale=False; set it to true in config.json for a model trained by Sahoo et al.")
        if kind == "sedd":
            fields["time_conditioning"] = True


# SSD-LM


def read_simplex(
    folder: Path, encoder: Mapping[str, torch.Tensor], config: Mapping[str, Any]
) -> tuple[dict[str, torch.Tensor], Architecture]:
    """Return the weights of an SSD-LM folder under our names, and its configuration.

    Args:
        encoder: weights of the masked language model, under its own names.
        config: its `config.json`.

    Raises:
        ValueError: if a layer is missing or contains other tensors or objects, or the encoder is not a masked
            language model.
    """
    notes: list[str] = []
    weights = {}
    for name, tensor in encoder.items():
        if name.endswith("position_ids"):  # a buffer that old versions of transformers saved
            notes.append(f"{name} is not a weight, and was left out")
        else:
            weights[f"model.{name}"] = tensor.float() if tensor.is_floating_point() else tensor
    for file, (layer, names) in _SSDLM_LAYERS.items():
        weights |= _read_layer(folder / file, layer, names)
    vocab_size = weights["embed_sum.weight"].shape[-1]
    kind = str(config.get("model_type"))
    if kind not in CONFIG_MAPPING or CONFIG_MAPPING[kind] not in MODEL_FOR_MASKED_LM_MAPPING:
        raise ValueError(f"SRC {folder}: model_type={kind!r} in config.json is not a masked language model.")
    own = {name: value for name, value in config.items() if name not in ("_name_or_path", "auto_map")}
    if own.get("vocab_size") != vocab_size:
        # The original code enlarges the embeddings to fit its tokenizer.
        notes.append(f"vocab_size={vocab_size} as in the weights; the configuration has {own.get('vocab_size')}")
        own["vocab_size"] = vocab_size
    length = _ssdlm_length(own, kind)
    notes.append(f"block_size={_SSDLM_BLOCK_SIZE} and model_length={length}, as in the published model where they fit")
    fields = {"encoder_config": own, "vocab_size": vocab_size}
    fields |= {"block_size": _SSDLM_BLOCK_SIZE, "model_length": length}
    special = (f"{name}_token_id" for name in ("bos", "eos", "pad"))
    fields |= {name: own[name] for name in special if own.get(name) is not None}
    return weights, Architecture(SSDLMConfig.model_type, fields, notes)


def _read_layer(path: Path, layer: str, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise ValueError(f"SRC {path.parent} has no {path.name}, which is part of the layout of SSD-LM.")
    found = {str(name).removeprefix("module."): tensor for name, tensor in read_checkpoint(path).items()}
    if set(found) != set(names) or not all(isinstance(tensor, torch.Tensor) for tensor in found.values()):
        raise ValueError(f"{path} contains {', '.join(sorted(found)) or 'nothing'} instead of {', '.join(names)}.")
    return {f"{layer}.{name}": tensor.float() for name, tensor in found.items()}


def _ssdlm_length(config: Mapping[str, Any], kind: str) -> int:
    """Return the published length, or the number of the encoder's positions if that is smaller."""
    positions = config.get("max_position_embeddings")
    # RoBERTa's positions start after its padding id.
    offset = (config.get("pad_token_id") or 0) + 1 if issubclass(CONFIG_MAPPING[kind], RobertaConfig) else 0
    return _SSDLM_LENGTH if positions is None else min(_SSDLM_LENGTH, positions - offset)


# Reading


def read_source(source: str) -> Source:
    """Return weights and configuration of a file, a folder or a repository.

    Raises:
        ValueError: if the source does not exist or cannot be read.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return _read_lightning(path)
    if path.is_dir():
        return _read_folder(path)
    if looks_like_path(source):
        raise ValueError(f"SRC {source}: there is no such file or folder.")
    try:
        return _read_folder(Path(snapshot_download(source)))
    except OSError as error:
        raise ValueError(
            f"SRC {source} is not a local file or folder and cannot be downloaded from the Hub: "
            f"{type(error).__name__}: {one_line(str(error))}"
        ) from error


def _read_folder(folder: Path) -> Source:
    if not (folder / "config.json").is_file():
        raise ValueError(f"SRC {folder} has no config.json: name the folder of a checkpoint, or a .ckpt file.")
    check_links(folder, "SRC")
    config = read_json(folder / "config.json")
    weights = _read_weights(folder)
    if any((folder / file).is_file() for file in _SSDLM_LAYERS):  # both are needed, which `read_simplex` checks
        weights, architecture = read_simplex(folder, weights, config)
        return Source(weights, None, config, folder, architecture)
    return Source(_published_names(weights), None, config, folder)


def _read_weights(folder: Path) -> dict[str, torch.Tensor]:
    index, single, pickled = (folder / name for name in (_INDEX_FILE, *WEIGHT_FILES))
    if index.is_file():
        shards = [folder / name for name in sorted(set(read_shard_index(index).values()))]
    elif single.is_file():
        shards = [single]
    elif pickled.is_file():
        return read_checkpoint(pickled)
    else:
        raise ValueError(f"SRC {folder} has no weights: one of {', '.join(WEIGHT_FILES)} is needed.")
    weights: dict[str, torch.Tensor] = {}
    for shard in shards:
        try:
            weights |= load_file(shard)
        except FileNotFoundError as error:
            raise ValueError(f"{index} lists {shard.name}, which does not exist.") from error
        except SafetensorError as error:
            raise ValueError(f"{shard} is damaged ({error}): get it again from its source.") from error
    return weights


def _read_lightning(path: Path) -> Source:
    contents = read_checkpoint(path)
    if not isinstance(contents.get("state_dict"), dict):
        names = ", ".join(map(str, contents))[:200] or "nothing"
        raise ValueError(f"SRC {path} has no state_dict, only {names}: name a Lightning checkpoint.")
    weights = _published_names(contents["state_dict"])
    for name in BUFFERS[1:]:
        if name not in weights and isinstance(contents.get(name), torch.Tensor):
            weights[name] = contents[name]
    average = contents.get("ema")
    shadows = average.get("shadow_params") if isinstance(average, dict) else None
    hyper_parameters = plain(contents.get("hyper_parameters") or {})
    config = hyper_parameters.get("config", hyper_parameters)
    return Source(weights, shadows, config if isinstance(config, dict) else {}, None)


def _published_names(weights: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return tensors under their names, without the prefixes that compiling and wrapping add."""
    named = {}
    for name, tensor in weights.items():
        if isinstance(tensor, torch.Tensor):
            # The first comes from torch.compile, the second from data parallelism.
            for part in ("_orig_mod.", "module."):
                name = name.replace(part, "")
            named[name] = tensor
    if named and not any(name.startswith("backbone.") for name in named):
        # Only the backbone was saved. The interval belongs to the whole model.
        named = {n if n in BUFFERS[1:] else f"backbone.{n}": t for n, t in named.items()}
    return named


# Pickles. A pickle is a program: torch's restricted reader rebuilds tensors and plain values, and calls nothing else


class InertObject:
    """The state of a pickled object that was not constructed."""

    state: Any = None

    def __new__(cls, *arguments: Any) -> "InertObject":
        """Ignore the arguments."""
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        self.state = state


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return the contents of a `.ckpt` or `.bin` file, without running any code in it.

    Raises:
        ValueError: if the file is not an archive as written by torch 1.6 or later, expands beyond its size, or has an
            object that is neither a tensor nor known; the message names it.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            # torch does not compress, so the contents are never larger than the archive.
            total = sum(entry.file_size for entry in archive.infolist())
        if total > path.stat().st_size:
            raise ValueError(f"it expands to {total:,} bytes from {path.stat().st_size:,}")
        inert: dict[str, Any] = dict.fromkeys(torch.serialization.get_unsafe_globals_in_checkpoint(path), InertObject)
        if unknown := [name for name in inert if not name.startswith(_INERT)]:
            raise ValueError(f"{', '.join(unknown)} in it is neither a tensor nor a known part of a checkpoint")
        inert["collections.defaultdict"] = lambda *factory: {}
        with torch.serialization.safe_globals([(kind, name) for name, kind in inert.items()]):
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises whatever its program runs into
        raise ValueError(
            f"{path} cannot be read as a checkpoint of torch 1.6 or later ({type(error).__name__}: {error}). Nothing "
            f"in it was run: save the weights alone where the file was made, as safetensors."
        ) from error
    if not isinstance(contents, dict):
        raise ValueError(
            f"{path} contains a {type(contents).__name__} instead of a checkpoint: a dict with a state_dict."
        )
    return contents


def plain(value: Any) -> Any:
    """Return a configuration as dicts, lists and values.

    OmegaConf's containers keep their values in `_content`, its nodes in `_val`.

    Raises:
        ValueError: if the configuration is cyclic, or expands to more values than hyper-parameters have.
    """
    try:
        return _plain(value, iter(range(_MAX_VALUES)))
    except (RecursionError, StopIteration):
        raise ValueError(f"The hyper-parameters are cyclic, or expand to more than {_MAX_VALUES:,} values.") from None


def _plain(value: Any, budget: Iterator[int]) -> Any:
    next(budget)
    if isinstance(value, InertObject):
        state = value.state if isinstance(value.state, dict) else {}
        return _plain(state.get("_content", state.get("_val", state)), budget)
    if isinstance(value, dict):
        return {str(_plain(key, budget)): _plain(item, budget) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, budget) for item in value]
    return value
