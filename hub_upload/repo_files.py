"""The tree of a repository: exactly the files that a model needs, written from a folder of any kind.

The folder of a run, a checkpoint or a converted model holds much that is nobody's business: optimizer states, logs,
pickles, notes. So nothing is copied as it lies there. The model is loaded and saved again, which gives its weights,
this version's code and its configurations; whatever else is in the folder is left out, and listed.
"""

import fnmatch
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import PreTrainedTokenizerBase

from bd3lm_hf.checkpoints import adapter_base, check_finite_weights, load_model
from bd3lm_hf.data.sources import exists, looks_like_path
from bd3lm_hf.modeling import __file__ as _MODELING
from bd3lm_hf.run_folder import COMPLETE_NAME, EMA_NAME, incomplete_because, last_complete_checkpoint
from bd3lm_hf.tokenization import check_tokenizer_fits, load_tokenizer


CODE = Path(_MODELING).resolve().parent


CARD_NAME = "README.md"


MANIFEST_NAME = "manifest.json"


MAX_SHARD_SIZE = "5GB"


WEIGHTS = ("auto", "ema", "raw")


#: All that is ever uploaded, by kind; of code, the files of `modeling/` only.
ALLOWED = {
    "weights": (
        "model.safetensors",
        "model-?????-of-?????.safetensors",
        "model.safetensors.index.json",
        "adapter_model.safetensors",
    ),
    "configuration": ("config.json", "generation_config.json", "adapter_config.json"),
    "tokenizer": (
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "vocab.txt",
        "tokenizer.model",
        "spiece.model",
        "sentencepiece.bpe.model",
        "chat_template.jinja",
        "additional_chat_templates/*.jinja",
    ),
    "model card": (CARD_NAME,),
    "manifest": (MANIFEST_NAME,),
}


_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


_PICKLES = ("pytorch_model*.bin", "adapter_model.bin", "model.pt", "*.ckpt")


class Contents(NamedTuple):
    """What a folder has to share."""

    model: Any  # a model, or the `PeftModel` of an adapter on its base
    tokenizer: PreTrainedTokenizerBase | None
    base: str | None  # what an adapter says that its base is
    decay: float | None  # of the average that was taken in place of a checkpoint's weights
    notes: list[str]  # what was chosen or left out


def kind_of(name: str) -> str | None:
    """What an allowed file is, such as "weights" or "code"; None for a file that is never uploaded."""
    if name.endswith(".py"):
        return "code" if "/" not in name and name != "__init__.py" and (CODE / name).is_file() else None
    kinds = (kind for kind, patterns in ALLOWED.items() for p in patterns if fnmatch.fnmatchcase(name, p))
    return next(kinds, None)


def files_of(folder: Path) -> dict[str, Path]:
    """Every file of a folder by its name in a repository."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path for path in found}


def check_source(folder: Path, *, tokenizer: bool = True, base_model: str | None = None) -> None:
    """Refuse a folder that can not be shared, by a look at its names.

    Raises:
        ValueError: there is no such folder, it holds no model, only pickled weights, or no tokenizer, it is a
            checkpoint that is not complete, or an adapter whose base nobody else has.
    """
    if not folder.is_dir():
        raise ValueError(f"DIR {folder}: there is no such folder; name one that holds a model.")
    adapter = (folder / _ADAPTER_FILES[0]).is_file()
    if not adapter and not (folder / "config.json").is_file():
        last = last_complete_checkpoint(folder)
        hint = f"its last checkpoint is {last}" if last else "name the folder of a run or a checkpoint"
        raise ValueError(f"DIR {folder} holds no config.json and no adapter_config.json: {hint}.")
    if (folder / COMPLETE_NAME).is_file() and (reason := incomplete_because(folder)):
        raise ValueError(f"DIR {folder} is a checkpoint that is not complete: {reason}. Name another one.")
    _check_weights(folder, _ADAPTER_FILES[1:] if adapter else ALLOWED["weights"][:2])
    if tokenizer and not any(kind_of(name) == "tokenizer" for name in files_of(folder)):
        raise ValueError(
            f"DIR {folder} holds no tokenizer: save the one that the model was trained with there "
            f"(tokenizer.save_pretrained), or pass --no-tokenizer."
        )
    if adapter:
        _check_base(folder, base_model)
    elif base_model is not None:
        raise ValueError(f"--base-model {base_model}: {folder} is no adapter, which alone has a base; leave it out.")


def _check_weights(folder: Path, patterns: Iterable[str]) -> None:
    if any(path for pattern in patterns for path in folder.glob(pattern)):
        return
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise ValueError(
            f"DIR {folder} holds pickled weights only ({', '.join(pickles)}), which run code when they are loaded: "
            f"make safetensors of them first, by `bd3lm convert {folder} DST`, and push DST."
        )
    raise ValueError(f"DIR {folder} holds no weights: none of {', '.join(patterns)} is there.")


def _check_base(folder: Path, base_model: str | None) -> None:
    base = str(adapter_base(str(folder)))
    if base_model is not None and (exists(base_model) or looks_like_path(base_model)):
        raise ValueError(f"--base-model {base_model} is a folder here: name the repository that others will load.")
    if base_model is None and (exists(base) or looks_like_path(base)):
        raise ValueError(
            f"DIR {folder} is an adapter on {base}, which is a folder here and nowhere else: push that first, and "
            f"name its repository with --base-model."
        )


def read_contents(folder: Path, *, tokenizer: bool = True, weights: str = "auto") -> Contents:
    """Load what a folder has to share, in evaluation mode on the CPU.

    Args:
        tokenizer: whether there has to be one; otherwise it is loaded where it is there.
        weights: of a checkpoint that holds both, `"ema"` takes the average of the weights, `"raw"` those that training
            goes on from, and `"auto"` the average where there is one, as in the published checkpoints.

    Raises:
        ValueError: as [`check_source`]; weights that are missing, unexpected or not finite; a tokenizer that can not
            be read or is another model's; no average where one is asked for.
    """
    words = None
    if tokenizer or any(kind_of(name) == "tokenizer" for name in files_of(folder)):
        words = load_tokenizer(str(folder))
    base = adapter_base(str(folder))
    model = load_model(base or str(folder), argument="DIR" if base is None else f"DIR {folder} on")
    notes, decay = [], None
    if base is not None:
        model = PeftModel.from_pretrained(model, str(folder))
        check_finite_weights(model, str(folder))
    average = folder / EMA_NAME
    if weights == "ema" and (base is not None or not average.is_file()):
        raise ValueError(f"--weights ema: {folder} holds no {EMA_NAME} of a whole model; leave --weights out.")
    if average.is_file() and (base is not None or weights == "raw"):
        notes.append(f"raw weights were taken, not the average in {EMA_NAME}")
    elif average.is_file():
        decay = _take_average(model, average)
        check_finite_weights(model, str(average))
        notes.append(f"the average of the weights in {EMA_NAME} was taken (--weights raw takes the others)")
    if words is not None and hasattr(model.config, "mask_token_id"):
        check_tokenizer_fits(words, model.config)
    return Contents(model.eval(), words, base, decay, notes)


@torch.no_grad()
def _take_average(model: Any, path: Path) -> float:
    """Fill the parameters with their averages; returns the decay."""
    parameters = dict(model.named_parameters())
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  (the file is no mapping)
            average = file.get_tensor(name)
            if name not in parameters or parameters[name].shape != average.shape:
                raise ValueError(
                    f"{path} holds an average of {name} {tuple(average.shape)}, which is no weight of this model: "
                    f"take the raw weights with --weights raw."
                )
            parameters[name].copy_(average)
        return float((file.metadata() or {}).get("decay", "nan"))


def write_contents(
    contents: Contents, source: Path, target: Path, *, max_shard_size: int | str = MAX_SHARD_SIZE
) -> None:
    """Write weights, code, configurations and tokenizer into an empty folder; the same contents give equal bytes.

    Args:
        source: where an adapter lies, whose two files are copied.
        max_shard_size: weights of more than this are split, for example "5GB".
    """
    target.mkdir(parents=True, exist_ok=True)
    if contents.base is None:
        contents.model.save_pretrained(target, max_shard_size=max_shard_size)
    else:
        for name in _ADAPTER_FILES:
            shutil.copyfile(source / name, target / name)
    if contents.tokenizer is not None:
        contents.tokenizer.save_pretrained(target)
    if strange := [name for name in files_of(target) if kind_of(name) is None]:
        raise ValueError(f"DIR {source} is no model of ours: with it come {', '.join(strange)}, never uploaded.")
    # Safetensors come with the rights of a private file; what is shared is for everyone.
    for path in files_of(target).values():
        path.chmod(0o644)


def name_base(folder: Path, base_model: str) -> None:
    """Have the adapter in a folder name another repository as its base."""
    path = folder / _ADAPTER_FILES[0]
    content = json.loads(path.read_text(encoding="utf-8")) | {"base_model_name_or_path": base_model}
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def left_out(source: Path, target: Path) -> list[str]:
    """The files and folders of `source` that are not in its tree, a folder as one name that ends in a slash."""
    kept = files_of(target)
    return sorted(
        f"{path.name}/" if path.is_dir() else path.name
        for path in source.iterdir()
        if path.name not in kept and not any(name.startswith(f"{path.name}/") for name in kept)
    )


__all__ = [
    "ALLOWED",
    "CARD_NAME",
    "CODE",
    "Contents",
    "MANIFEST_NAME",
    "MAX_SHARD_SIZE",
    "WEIGHTS",
    "check_source",
    "files_of",
    "kind_of",
    "left_out",
    "name_base",
    "read_contents",
    "write_contents",
]
