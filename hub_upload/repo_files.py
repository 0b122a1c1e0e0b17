"""The files of a Hub repository: only what a model needs, from a run folder, a checkpoint or an adapter.

A run folder also contains optimizer states, logs and pickles, which must not be uploaded. So no file is copied: the
model is loaded and saved again, which writes its weights, this version's code and its configurations. Everything else
in the folder is left out and listed.

`manifest.json` lists size and SHA-256 of every file that determines what a model computes, and the version that wrote
them. It excludes the model card, which people edit. Nothing in it depends on time or place: the same model has the
same manifest. It reveals damage and changes, but does not prove who wrote the files.
"""

import fnmatch
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedTokenizerBase

import bd3lm_hf
from bd3lm_hf.checkpoints import adapter_base, check_finite_weights, load_model
from bd3lm_hf.data.sources import is_local
from bd3lm_hf.hub_upload.hub_cli import MAX_SHARD_SIZE
from bd3lm_hf.modeling import __file__ as _MODELING
from bd3lm_hf.run_folder import COMPLETE_NAME, EMA_NAME, incomplete_because, last_complete_checkpoint, publish_folder
from bd3lm_hf.tokenization import check_tokenizer_fits, has_tokenizer, limit_to_window, load_tokenizer
from bd3lm_hf.user_files import read_json


CODE = Path(_MODELING).resolve().parent  # the code that is saved with a model
CARD_NAME = "README.md"
MANIFEST_NAME = "manifest.json"

_WEIGHTS = ("model.safetensors", "model-?????-of-?????.safetensors")
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")

#: All files that are ever uploaded; of code, only the files of `modeling/`.
ALLOWED = (
    *(*_WEIGHTS, "model.safetensors.index.json", *_ADAPTER_FILES, "config.json", "generation_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("chat_template.jinja", "additional_chat_templates/*.jinja", CARD_NAME, MANIFEST_NAME),
)
# Files that no manifest lists: its own, and those that users and the Hub may edit and no loader reads.
NOT_LISTED = {CARD_NAME, MANIFEST_NAME, ".gitattributes", "LICENSE", "LICENSE.md", "LICENSE.txt"}
_CLIENT_FOLDERS = (".cache", ".git")  # written by the Hub's client and by git
_PICKLES = ("pytorch_model*.bin", "adapter_model.bin", "model.pt", "*.ckpt")


class ModelContents(NamedTuple):
    """The model and tokenizer of a folder, and their origin."""

    model: Any  # a model, or the `PeftModel` of an adapter on its base
    tokenizer: PreTrainedTokenizerBase | None
    base: str | None  # base model of an adapter
    decay: float | None  # of the weight average that was loaded instead of a checkpoint's weights
    notes: list[str]  # choices that were made


def is_allowed(name: str) -> bool:
    """Return whether a file may be uploaded."""
    if name.endswith(".py"):
        return "/" not in name and name != "__init__.py" and (CODE / name).is_file()
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in ALLOWED)


def files_of(folder: Path) -> dict[str, Path]:
    """Return every file of a folder, by its name in a repository."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path for path in found}


# Check a folder


def check_source(folder: Path, *, tokenizer: bool = True, base_model: str | None = None) -> None:
    """Refuse a folder that cannot be shared, by the names of its files.

    Raises:
        ValueError: if the folder does not exist, has no model, only pickled weights, no tokenizer, or a link that
            leaves it; if it is an incomplete checkpoint, or an adapter whose base others cannot load.
    """
    if not folder.is_dir():
        raise ValueError(f"DIR {folder}: there is no such folder. Name the folder of a model.")
    adapter = (folder / _ADAPTER_FILES[0]).is_file()
    if not adapter and not (folder / "config.json").is_file():
        last = last_complete_checkpoint(folder)
        hint = f"its last checkpoint is {last}" if last else "name the folder of a run or a checkpoint"
        raise ValueError(f"DIR {folder} has no config.json and no adapter_config.json: {hint}.")
    if (folder / COMPLETE_NAME).is_file() and (reason := incomplete_because(folder)):
        raise ValueError(f"DIR {folder} is an incomplete checkpoint: {reason}. Name another one.")
    _check_weights(folder, _ADAPTER_FILES[1:] if adapter else _WEIGHTS)
    check_links(folder, "DIR")
    if tokenizer and not has_tokenizer(folder):
        raise ValueError(
            f"DIR {folder} has no tokenizer: save the one that the model was trained with there "
            f"(tokenizer.save_pretrained), or pass --no-tokenizer."
        )
    if adapter:
        _check_base(folder, base_model)
    elif base_model is not None:
        raise ValueError(f"--base-model {base_model}: {folder} is not an adapter, and only adapters have a base.")


def check_links(folder: Path, argument: str) -> None:
    """Refuse a model folder with a link to a file elsewhere, whose content would be copied or uploaded.

    The Hub's own cache consists of links from `snapshots/REVISION` to `blobs`, which are allowed.

    Raises:
        ValueError: if a file that a model is read from is a link out of the folder.
    """
    root = folder.resolve()
    allowed = [root, *([root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [])]
    for path in sorted(folder.rglob("*")):
        if not path.is_symlink() or any(path.resolve().is_relative_to(root) for root in allowed):
            continue
        name = path.relative_to(folder).as_posix()
        # A linked folder would bring its templates along.
        read = is_allowed(name) or is_allowed(f"{name}/a.jinja") or any(fnmatch.fnmatch(name, p) for p in _PICKLES)
        if read or name.endswith(".pt"):
            raise ValueError(
                f"{argument} {folder}: {name} is a symbolic link to a file outside of the folder. Replace it with a "
                f"copy if you know what it contains."
            )


def _check_weights(folder: Path, patterns: Iterable[str]) -> None:
    if any(path for pattern in patterns for path in folder.glob(pattern)):
        return
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise ValueError(
            f"DIR {folder} has only pickled weights ({', '.join(pickles)}), which run code when they are loaded: "
            f"convert them to safetensors with `bd3lm convert {folder} DST`, and push DST."
        )
    raise ValueError(f"DIR {folder} has no weights: none of {', '.join(patterns)} exists.")


def _check_base(folder: Path, base_model: str | None) -> None:
    base = str(adapter_base(str(folder)))
    if base_model is not None and is_local(base_model):
        raise ValueError(f"--base-model {base_model} is a local folder: name the repository that others will load.")
    if base_model is None and is_local(base):
        raise ValueError(
            f"DIR {folder} is an adapter on {base}, a local folder that others cannot load: push that first, and name "
            f"its repository with --base-model."
        )


# Read and write a model


def read_contents(folder: Path, *, tokenizer: bool = True, weights: str = "auto") -> ModelContents:
    """Load the model and tokenizer of a folder, in evaluation mode on the CPU.

    Args:
        tokenizer: whether a tokenizer is required; otherwise it is loaded if there is one.
        weights: `"ema"` takes a checkpoint's average of the weights, `"raw"` the weights that training continues from,
            and `"auto"` the average if there is one, as in the published checkpoints.

    Raises:
        ValueError: if weights are missing, unexpected or not finite, the tokenizer cannot be read or does not fit the
            model, or averaged weights are requested and missing.
    """
    loaded_tokenizer = None
    if tokenizer or has_tokenizer(folder):
        loaded_tokenizer = load_tokenizer(str(folder))
    base = adapter_base(str(folder))
    model = load_model(base or str(folder), argument="DIR" if base is None else f"DIR {folder} on")
    notes, decay = [], None
    if base is not None:
        model = PeftModel.from_pretrained(model, str(folder))
        check_finite_weights(model, str(folder))
    average = folder / EMA_NAME
    if weights == "ema" and (base is not None or not average.is_file()):
        raise ValueError(f"--weights ema: {folder} has no {EMA_NAME} of a whole model. Leave --weights out.")
    if average.is_file() and (base is not None or weights == "raw"):
        notes.append(f"the raw weights were taken, not the average in {EMA_NAME}")
    elif average.is_file():
        decay = _load_average(model, average)
        check_finite_weights(model, str(average))
        notes.append(f"the average of the weights in {EMA_NAME} was taken (--weights raw takes the raw ones)")
    if loaded_tokenizer is not None and hasattr(model.config, "mask_token_id"):
        check_tokenizer_fits(loaded_tokenizer, model.config)
    return ModelContents(model.eval(), loaded_tokenizer, base, decay, notes)


@torch.no_grad()
def _load_average(model: Any, path: Path) -> float:
    """Fill the parameters with their averages, and return the decay."""
    parameters = dict(model.named_parameters())
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (the file is not a mapping)
                average = file.get_tensor(name)
                if name not in parameters or parameters[name].shape != average.shape:
                    raise ValueError(
                        f"{path} has an average of {name} {tuple(average.shape)}, which this model does not have: "
                        f"take the raw weights with --weights raw."
                    )
                parameters[name].copy_(average)
            return float((file.metadata() or {}).get("decay", "nan"))
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}. Take the raw weights with --weights raw.") from error


def write_contents(
    contents: ModelContents, source: Path, target: Path, *, max_shard_size: int | str = MAX_SHARD_SIZE
) -> None:
    """Write weights, code, configurations and tokenizer to an empty folder; equal contents give equal bytes.

    Args:
        source: folder of the adapter, whose two files are copied.
        max_shard_size: larger weights are split, for example "5GB".
    """
    target.mkdir(parents=True, exist_ok=True)
    if contents.base is None:
        contents.model.save_pretrained(target, max_shard_size=max_shard_size)
    else:
        for name in _ADAPTER_FILES:
            shutil.copyfile(source / name, target / name)
    if contents.tokenizer is not None:
        limit_to_window(contents.tokenizer, contents.model.config)
        contents.tokenizer.save_pretrained(target)
    if unknown := [name for name in files_of(target) if not is_allowed(name)]:
        raise ValueError(f"DIR {source} is not a model of bd3lm_hf: saving it wrote {', '.join(unknown)}.")


def name_base(folder: Path, base_model: str) -> None:
    """Set the repository of the base model in an adapter's configuration."""
    path = folder / _ADAPTER_FILES[0]
    content = json.loads(path.read_text(encoding="utf-8")) | {"base_model_name_or_path": base_model}
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def left_out(source: Path, target: Path) -> list[str]:
    """Return the files and folders of `source` that are not uploaded; a folder is listed once, with a slash."""
    kept = files_of(target)
    return sorted(
        f"{path.name}/" if path.is_dir() else path.name
        for path in source.iterdir()
        if path.name not in kept and not any(name.startswith(f"{path.name}/") for name in kept)
    )


@contextmanager
def new_folder(target: Path, argument: str) -> Iterator[Path]:
    """Yield an empty folder that becomes `target` if the block ends without an error, and is removed otherwise.

    It is created next to the target under a random name, so nobody can plant a link there in a shared folder.

    Raises:
        ValueError: if the target is a file, a symbolic link, or a folder that is not empty.
    """
    target = Path(os.path.abspath(target))  # "." and ".." have no name that could be staged
    if target.is_symlink():
        raise ValueError(f"{argument} {target} is a symbolic link: name the folder itself.")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{argument} {target} is in use: name a folder that does not exist, or an empty one.")
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        folder = staging / target.name
        folder.mkdir()
        yield folder
        if target.exists():
            target.rmdir()  # still empty, or this fails
        publish_folder(folder, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


# The manifest


def describe(path: Path) -> dict[str, Any]:
    """Return size in bytes and SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        # In pieces, because weights may be larger than the memory.
        while chunk := file.read(1 << 20):
            digest.update(chunk)
        return {"size": file.tell(), "sha256": digest.hexdigest()}


def write_manifest(folder: Path) -> dict[str, Any]:
    """Write `manifest.json` for the files of a folder, and return its content."""
    files = {name: describe(path) for name, path in files_of(folder).items() if name not in NOT_LISTED}
    content = {"bd3lm_hf": bd3lm_hf.__version__, "files": files}
    (folder / MANIFEST_NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return content


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a folder.

    Raises:
        ValueError: if it is missing or damaged.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise ValueError(f"DIR {folder} has no {MANIFEST_NAME}: only folders that `bd3lm push` wrote have one.")
    try:
        content = read_json(path)
        return {"bd3lm_hf": str(content["bd3lm_hf"]), "files": dict(content["files"])}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is damaged ({reason}): get the folder again from its source.") from error


class ManifestDifference(NamedTuple):
    """The difference between a folder and its manifest; names in order."""

    missing: list[str]
    changed: list[str]
    extra: list[str]
    num_files: int  # files in the manifest
    version: str  # of the bd3lm_hf that wrote it, according to the manifest
    other_code: list[str]  # code files that differ from those of this version

    @property
    def intact(self) -> bool:
        """Whether the folder contains exactly the listed files."""
        return not (self.missing or self.changed or self.extra)


def compare_with_manifest(folder: Path) -> ManifestDifference:
    """Hash the files of a folder again. Only files that are found in it are read, whatever the manifest lists.

    Raises:
        ValueError: if the manifest is missing or damaged.
    """
    content = read_manifest(folder)
    present = {name: path for name, path in files_of(folder).items() if name.split("/")[0] not in _CLIENT_FOLDERS}
    listed = content["files"]
    code = [name for name in present if name.endswith(".py")]
    other = [n for n in code if not (CODE / n).is_file() or (CODE / n).read_bytes() != present[n].read_bytes()]
    return ManifestDifference(
        missing=sorted(listed.keys() - present.keys()),
        changed=sorted(name for name in listed.keys() & present.keys() if describe(present[name]) != listed[name]),
        extra=sorted(present.keys() - listed.keys() - NOT_LISTED),
        num_files=len(listed),
        version=content["bd3lm_hf"],
        other_code=sorted(other),
    )
