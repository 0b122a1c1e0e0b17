"""`bd3lm convert SRC DST`: a published or Lightning checkpoint becomes a folder that loads by itself, and back.

1. Read weights, configuration and tokenizer of the source; nothing that it holds is run.
2. Choose the weights: the exponential moving average where there is one, as the published checkpoints are.
3. Say what the configuration is; what it lacks is inferred from the weights, and printed.
4. Load the weights into a model of that type: a missing or unexpected one is an error.
5. Save, load what was saved, and compare the logits.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

import bd3lm_hf  # noqa: F401  (registers the model types)
from bd3lm_hf.checkpoints import check_finite_weights, load_model
from bd3lm_hf.data.sources import exists, looks_like_path
from bd3lm_hf.hub_upload.layouts import Architecture, architecture_of, is_simplex_layout, read_simplex
from bd3lm_hf.hub_upload.safe_pickle import plain, read_checkpoint
from bd3lm_hf.run_folder import publish_folder, staging_folder
from bd3lm_hf.tokenization import check_tokenizer_fits, load_tokenizer


# The fields of a published config.json, with the authors' names (their export script's order).
_PUBLISHED_FIELDS = (
    "block_size",
    "vocab_size",
    "model_length",
    "cross_attn",
    "adaln",
    "causal",
    "hidden_dim",
    "cond_dim",
    "n_blocks",
    "n_heads",
    "dropout",
    "time_conditioning",
    "var_min",
    "sampling_eps_min",
    "sampling_eps_max",
)
_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
_BUFFERS = ("rotary_emb.inv_freq", "sampling_eps_min", "sampling_eps_max")


class Source(NamedTuple):
    """What a checkpoint holds."""

    weights: dict[str, torch.Tensor]  # named as published: `backbone.`...
    average: list[torch.Tensor] | None  # moving averages of the parameters, in their order
    config: dict[str, Any]  # a config.json, or what stands for it in the hyper-parameters
    folder: Path | None  # where a tokenizer may lie
    architecture: Architecture | None = None  # where the layout alone tells what it is


class Conversion(NamedTuple):
    """What a conversion did."""

    model_type: str
    num_parameters: int
    notes: list[str]  # what was inferred, chosen or left out


def convert(
    source: str,
    target: str | Path,
    *,
    weights: str = "auto",
    tokenizer: str | None = None,
    model_type: str | None = None,
) -> Conversion:
    """Convert a checkpoint into a folder for `from_pretrained`, with its code.

    Args:
        source: a folder with `config.json` and weights, the name of one on the hub, or a Lightning `.ckpt` file. A
            masked language model with the layers of SSD-LM beside it becomes one model.
        target: folder to write; it must not exist or be empty.
        weights: `"ema"` or `"raw"` of a `.ckpt` file; `"auto"` takes the average where there is one.
        tokenizer: folder or name, where the source has none.
        model_type: `bd3lm`, `ar`, `mdlm` or `sedd`, where the source does not tell.

    Raises:
        ValueError: a source that can not be read, weights that are missing, unexpected or not finite, a model type
            that contradicts the weights, or a target that is in use.
    """
    _check_target(Path(target))
    # 1. Read
    found = read_source(source)
    # 2. Weights
    tensors, notes = _choose_weights(found, weights)
    # 3. Configuration
    architecture = found.architecture or architecture_of(tensors, found.config, model_type)
    if model_type not in (None, architecture.model_type):
        raise ValueError(
            f"--model-type {model_type}: the files of {source} are those of a {architecture.model_type}; leave it out."
        )
    words = _tokenizer_of(found.folder, tokenizer)
    config = _make_config(architecture, words)
    # 4. Load
    model = AutoModelForCausalLM.from_config(config).eval()
    _load_weights(model, tensors, source)
    check_finite_weights(model, source)
    # 5. Save and check
    _save_checked(model, words, Path(target))
    if words is None:
        notes.append("no tokenizer was found: name one with --tokenizer, or save one into the folder")
    count = sum(parameter.numel() for parameter in model.parameters())
    return Conversion(config.model_type, count, [*notes, *architecture.notes])


def to_published(source: str, target: str | Path) -> Conversion:
    """Write a BD3-LM of ours in the published layout, for the authors' code.

    Weights have the same names. Their code files are theirs: copy `configuration_bd3lm.py` and `modeling_bd3lm.py`
    from one of their repositories into the folder.

    Raises:
        ValueError: the model is no BD3-LM, or the target is in use.
    """
    target = Path(target)
    _check_target(target)
    model = load_model(source, argument="SRC")
    if model.config.model_type != "bd3lm":
        raise ValueError(
            f"{source} is a model of type {model.config.model_type!r}: the published layout that --to published "
            f"writes is that of BD3-LM."
        )
    config = {name: getattr(model.config, name) for name in _PUBLISHED_FIELDS}
    # Their masks need a tensor of the interval's ends, and ours are in the weights.
    config |= dict(zip(("sampling_eps_min", "sampling_eps_max"), model.interval(), strict=True))
    config |= {
        "architectures": ["BD3LM"],
        "attn_backend": model.config.attn_backend or "sdpa",
        "auto_map": {
            "AutoConfig": "configuration_bd3lm.BD3LMConfig",
            "AutoModelForMaskedLM": "modeling_bd3lm.BD3LM",
        },
        "model_type": "bd3lm",
        "return_dict": False,
        "torch_dtype": "float32",
    }
    staged = staging_folder(target.parent) / f"{target.name}.published"
    staged.mkdir(parents=True)
    (staged / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, staged / "model.safetensors", metadata={"format": "pt"})
    words = _tokenizer_of(Path(source) if exists(source) else None, None)
    if words is not None:
        words.save_pretrained(staged)
    notes = ["the authors' configuration_bd3lm.py and modeling_bd3lm.py belong beside it"]
    if model.config.noise != "loglinear":
        notes.append(f"noise={model.config.noise!r} has no field there; their code trains with loglinear noise")
    if model.config.mask_token_id != model.config.vocab_size - 1:
        notes.append(
            f"mask_token_id={model.config.mask_token_id} has no field there; their code takes the tokenizer's"
        )
    _publish(staged, target)
    return Conversion("bd3lm", sum(p.numel() for p in model.parameters()), notes)


# --- Reading -----------------------------------------------------------------------------------------------------


def read_source(source: str) -> Source:
    """Weights and configuration of a checkpoint, by the kind of place that it is.

    Raises:
        ValueError: nothing there, or nothing that can be read.
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
            f"SRC {source} is no file or folder here, and can not be had from the hub: {type(error).__name__}: {error}"
        ) from error


def _read_folder(folder: Path) -> Source:
    if not (folder / "config.json").is_file():
        raise ValueError(f"SRC {folder} holds no config.json: name the folder of a checkpoint, or a .ckpt file.")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"SRC {folder}: config.json is no JSON: {error}") from error
    weights = _weights_of(folder)
    if is_simplex_layout(folder):
        simplex = read_simplex(folder, weights, config)
        return Source(simplex.weights, None, config, folder, simplex.architecture)
    return Source(_published_names(weights), None, config, folder)


def _weights_of(folder: Path) -> dict[str, torch.Tensor]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        return {name: tensor for shard in shards for name, tensor in load_file(folder / shard).items()}
    if (folder / _WEIGHT_FILES[0]).is_file():
        return load_file(folder / _WEIGHT_FILES[0])
    if (folder / _WEIGHT_FILES[1]).is_file():
        return read_checkpoint(folder / _WEIGHT_FILES[1])
    raise ValueError(f"SRC {folder} holds no weights: one of {', '.join(_WEIGHT_FILES)} must be there.")


def _read_lightning(path: Path) -> Source:
    contents = read_checkpoint(path)
    if not isinstance(contents.get("state_dict"), dict):
        raise ValueError(f"SRC {path} holds no state_dict but {', '.join(map(str, contents)) or 'nothing'}.")
    weights = _published_names(contents["state_dict"])
    for name in ("sampling_eps_min", "sampling_eps_max"):
        if name not in weights and isinstance(contents.get(name), torch.Tensor):
            weights[name] = contents[name]
    average = contents.get("ema")
    shadows = average.get("shadow_params") if isinstance(average, dict) else None
    hyper_parameters = plain(contents.get("hyper_parameters") or {})
    config = hyper_parameters.get("config", hyper_parameters)
    return Source(weights, shadows, config if isinstance(config, dict) else {}, None)


def _published_names(weights: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Names without what compiling and wrapping put into them."""
    named = {}
    for name, tensor in weights.items():
        if isinstance(tensor, torch.Tensor):
            for part in ("_orig_mod.", "module."):
                name = name.replace(part, "")
            named[name] = tensor
    if named and not any(name.startswith("backbone.") for name in named):
        # A backbone saved by itself.
        named = {n if n in _BUFFERS[1:] else f"backbone.{n}": t for n, t in named.items()}
    return named


# --- Weights -----------------------------------------------------------------------------------------------------


def _choose_weights(source: Source, wanted: str) -> tuple[dict[str, torch.Tensor], list[str]]:
    if wanted not in ("auto", "ema", "raw"):
        raise ValueError(f"weights={wanted!r}: choose 'ema', 'raw' or 'auto'.")
    if source.average is None:
        if wanted == "ema":
            raise ValueError("--weights ema: this checkpoint holds no moving average; leave --weights out.")
        return source.weights, []
    if wanted == "raw":
        return source.weights, ["raw weights were taken, not their moving average"]
    # The average has no names: it lists the backbone's parameters in their order, which is that of the weights.
    names = [name for name in source.weights if name.startswith("backbone.") and not name.endswith(_BUFFERS)]
    if len(names) != len(source.average):
        raise ValueError(
            f"the moving average holds {len(source.average)} tensors for {len(names)} parameters: take the raw "
            f"weights with --weights raw."
        )
    averaged = dict(source.weights)
    for name, shadow in zip(names, source.average, strict=True):
        if shadow.shape != averaged[name].shape:
            raise ValueError(
                f"the moving average of {name} has the shape {tuple(shadow.shape)} instead of "
                f"{tuple(averaged[name].shape)}: take the raw weights with --weights raw."
            )
        averaged[name] = shadow
    return averaged, ["the exponential moving average of the weights was taken (--weights raw takes the others)"]


def _load_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor], source: str) -> None:
    own = model.state_dict()
    weights = _under_every_name(own, weights)
    problems = []
    for kind, names in (("missing", own.keys() - weights.keys()), ("unexpected", weights.keys() - own.keys())):
        if names:
            problems.append(f"{len(names)} {kind} ({', '.join(sorted(names)[:8])}{', ...' if len(names) > 8 else ''})")
    wrong = [name for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape]
    if wrong:
        problems.append(f"{len(wrong)} of another shape ({', '.join(sorted(wrong)[:8])})")
    if problems:
        raise ValueError(
            f"the weights of {source} are not those of a {type(model).__name__}: {'; '.join(problems)}. Name the type "
            f"with --model-type if it was taken for another."
        )
    model.load_state_dict(weights)


def _under_every_name(own: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A tied tensor has several names, of which a checkpoint may hold one."""
    names: dict[int, list[str]] = {}
    for name, tensor in own.items():
        names.setdefault(tensor.data_ptr(), []).append(name)
    tied = dict(weights)
    for same in names.values():
        held = [name for name in same if name in weights]
        if any(not torch.equal(weights[held[0]], weights[name]) for name in held[1:]):
            raise ValueError(f"the weights {' and '.join(held)} differ, but are one in the model: it ties them.")
        tied |= {name: weights[held[0]] for name in same if held}
    return tied


# --- Configuration and tokenizer ---------------------------------------------------------------------------------


def _make_config(architecture: Architecture, tokenizer: PreTrainedTokenizerBase | None) -> Any:
    fields = dict(architecture.fields)
    if tokenizer is not None:
        for name in ("bos", "eos", "pad", "mask"):
            value = getattr(tokenizer, f"{name}_token_id")
            if value is not None and value < fields["vocab_size"]:
                fields.setdefault(f"{name}_token_id", value)
    config: Any = AutoConfig.for_model(architecture.model_type, **fields)
    if tokenizer is not None:
        check_tokenizer_fits(tokenizer, config)
    return config


def _tokenizer_of(folder: Path | None, name: str | None) -> PreTrainedTokenizerBase | None:
    if name is not None:
        return load_tokenizer(name)
    files = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt")
    if folder is not None and any((folder / file).is_file() for file in files):
        return load_tokenizer(str(folder))
    return None


# --- Writing -----------------------------------------------------------------------------------------------------


def _check_target(target: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"DST {target} is in use: name a folder that does not exist, or an empty one.")


@torch.no_grad()
def _save_checked(model: Any, tokenizer: PreTrainedTokenizerBase | None, target: Path) -> None:
    """Save; the folder appears under its name once its logits are those of the model in memory."""
    staged = staging_folder(target.parent) / f"{target.name}.converted"
    shutil.rmtree(staged, ignore_errors=True)
    model.save_pretrained(staged)
    if tokenizer is not None:
        tokenizer.save_pretrained(staged)
    inputs = model.dummy_inputs
    logits = model(**inputs).logits
    again = load_model(str(staged), argument="the converted folder").eval()
    same = all(torch.equal(mine, theirs) for mine, theirs in zip(*map(_tensors, (model, again)), strict=True))
    # Kernels may round differently for weights at another place in memory.
    if not same or not torch.allclose(logits, again(**inputs).logits, atol=1e-4):
        shutil.rmtree(staged)
        raise ValueError(f"what was saved does not load as the model that was converted: {target} is not written.")
    _publish(staged, target)


def _tensors(model: torch.nn.Module) -> list[torch.Tensor]:
    return list(model.state_dict().values())


def _publish(staged: Path, target: Path) -> None:
    if target.exists():
        target.rmdir()  # empty, as was checked
    publish_folder(staged, target)
    staged.parent.rmdir()


def main(argv: Sequence[str] | None = None) -> None:
    """Run with the command line's arguments; bad input ends in one line on stderr and exit code 2."""
    parser = argparse.ArgumentParser(prog="bd3lm convert", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("source", metavar="SRC", help="folder, hub name or .ckpt file")
    parser.add_argument("target", metavar="DST", help="folder to write")
    parser.add_argument("--to", default="bd3lm_hf", choices=("bd3lm_hf", "published"), help="layout to write")
    parser.add_argument("--weights", default="auto", choices=("auto", "ema", "raw"), help="of a .ckpt file")
    parser.add_argument("--tokenizer", help="folder or name, where the source has none")
    parser.add_argument("--model-type", help="bd3lm, ar, mdlm or sedd, where the source does not tell")
    arguments = parser.parse_args(argv)
    try:
        if arguments.to == "published":
            done = to_published(arguments.source, arguments.target)
        else:
            done = convert(
                arguments.source,
                arguments.target,
                weights=arguments.weights,
                tokenizer=arguments.tokenizer,
                model_type=arguments.model_type,
            )
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    for note in done.notes:
        print(f"note: {note}")
    print(f"{arguments.target}: {done.model_type}, {done.num_parameters:,} parameters; logits checked after loading")


__all__ = ["Conversion", "Source", "convert", "main", "read_source", "to_published"]
