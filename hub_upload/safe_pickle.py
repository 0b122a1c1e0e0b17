"""Read a torch checkpoint without running it: tensors and plain values, and inert records of other objects.

A `.ckpt` file is a pickle, and a pickle is a program. This unpickler provides the functions that rebuild tensors and
the containers of a state dict. Built-in types and classes of the libraries that write such checkpoints become records
of what was stored; anything else is refused by name. Sizes are bounded by the size of the file: small files that would
expand to gigabytes are refused before they do.
"""

import collections
import pickle
import types
import zipfile
from pathlib import Path
from typing import Any

import torch


# Libraries whose objects are in checkpoints next to the weights: configurations, tokenizers, loop states.
_RECORDED = ("omegaconf", "hydra", "lightning", "pytorch_lightning", "lightning_fabric", "transformers", "tokenizers")
_RECORDED_NAMES = {("typing", "Any"), ("collections", "Counter"), ("enum", "Enum"), ("pathlib", "PosixPath")}
_BUILTINS = {
    *("bool", "bytearray", "bytes", "complex", "dict", "float"),
    *("frozenset", "int", "list", "long", "set", "slice", "str", "tuple"),
}
_MAX_PROGRAM = 256_000_000  # bytes of the pickle itself, without the tensors' data
_MAX_VALUES = 100_000  # in hyper-parameters


class InertObject:
    """The arguments, items and state of an object that was not constructed."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    items: dict[Any, Any]
    state: Any

    # Not `__init__`, which pickle may skip.
    def __new__(cls, *arguments: Any, **keywords: Any) -> "InertObject":
        """Record the arguments."""
        self = super().__new__(cls)
        self.arguments, self.keywords, self.items, self.state = arguments, keywords, {}, None
        return self

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items[key] = value

    def append(self, value: Any) -> None:
        """Record an item of a list; pickle also calls this where a list would be extended."""
        self.items[len(self.items)] = value


def _ordered_dict(*arguments: Any) -> dict[Any, Any]:
    if arguments:  # would copy data for a few bytes of pickle; torch never writes this
        raise pickle.UnpicklingError("collections.OrderedDict with arguments")
    return collections.OrderedDict()


def _default_dict(factory: Any = None) -> dict[Any, Any]:
    return {}


def _rebuild_tensor(storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *rest: Any) -> Any:
    tensor = torch._utils._rebuild_tensor_v2(storage, offset, size, stride, *rest)
    # Strides of 0 let four bytes represent any number of values.
    if tensor.numel() * tensor.element_size() > storage._untyped_storage.nbytes():
        raise pickle.UnpicklingError(f"a tensor of shape {tuple(size)}, which is larger than its data")
    return tensor


_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _ordered_dict,
    ("collections", "defaultdict"): _default_dict,
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    **{("torch", str(kind).removeprefix("torch.")): kind for kind in (torch.float32, torch.float16, torch.bfloat16)},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        # Even harmless types are only recorded: bytearray(10**10) would allocate as much.
        builtin = module in ("builtins", "__builtin__") and name in _BUILTINS
        if builtin or module.split(".")[0] in _RECORDED or (module, name) in _RECORDED_NAMES:
            return type(name, (InertObject,), {"__module__": module})
        raise pickle.UnpicklingError(f"{module}.{name}")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return the contents of a `.ckpt` or `.bin` file, without running any code in it.

    Raises:
        ValueError: if the file is not an archive as written by torch 1.6 or later, expands beyond its size, is a
            TorchScript program, or contains an object that is neither a tensor nor known; the message names it.
    """
    _check_archive(path)
    reader = types.ModuleType("restricted_pickle")
    reader.Unpickler = _Unpickler  # type: ignore[attr-defined]
    reader.load = lambda file, **keywords: _Unpickler(file, **keywords).load()  # type: ignore[attr-defined]
    try:
        contents = torch.load(path, map_location="cpu", pickle_module=reader, weights_only=False)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} asks for {error}, which is neither a tensor nor a known part of a checkpoint. It was not run. "
            f"Save the weights alone where the file was made, as safetensors."
        ) from error
    except MemoryError as error:
        raise ValueError(f"{path} does not fit into memory, or is damaged.") from error
    except Exception as error:  # a damaged pickle raises whatever its program runs into
        raise ValueError(f"{path} cannot be read as a checkpoint: {type(error).__name__}: {error}") from error
    if not isinstance(contents, dict):
        raise ValueError(
            f"{path} contains a {type(contents).__name__} instead of a checkpoint: a dict with a state_dict."
        )
    return contents


def check_pickled_weights(folder: Path) -> None:
    """Refuse a model folder without safetensors whose pickles contain more than tensors.

    Raises:
        ValueError: as by [`read_checkpoint`].
    """
    if not any(folder.glob("*.safetensors")):
        for path in sorted(folder.glob("pytorch_model*.bin")):
            read_checkpoint(path)


def _check_archive(path: Path) -> None:
    """Refuse an archive that torch.save would not write; only its directory is read."""
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is not a checkpoint that torch.save wrote (torch 1.6 or later).")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, OSError) as error:
        raise ValueError(f"{path} cannot be read as a checkpoint: {error}") from error
    names = {entry.filename.rpartition("/")[2] for entry in entries}
    if "constants.pkl" in names:
        raise ValueError(f"{path} is a TorchScript program, which runs when it is read: name a .ckpt file.")
    # torch does not compress, so the contents are never larger than the archive.
    total = sum(entry.file_size for entry in entries)
    if total > path.stat().st_size or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError(
            f"{path} expands to {total:,} bytes from {path.stat().st_size:,}: torch.save never compresses."
        )
    if any(entry.file_size > _MAX_PROGRAM for entry in entries if entry.filename.endswith("data.pkl")):
        raise ValueError(f"{path} has a pickle of more than {_MAX_PROGRAM:,} bytes without its tensors.")


def plain(value: Any) -> Any:
    """Return a configuration record as dicts, lists and values.

    OmegaConf's containers keep their values in `_content`, its nodes in `_val`.

    Raises:
        ValueError: if the record is cyclic, or expands to more values than hyper-parameters have.
    """
    try:
        return _plain(value, iter(range(_MAX_VALUES)))
    except (RecursionError, StopIteration):
        raise ValueError(f"The hyper-parameters are cyclic, or expand to more than {_MAX_VALUES:,} values.") from None


def _plain(value: Any, budget: Any) -> Any:
    next(budget)
    if isinstance(value, InertObject):
        state: dict[str, Any] = value.state if isinstance(value.state, dict) else {}
        if isinstance(value.state, tuple):  # of a class with slots: (dict, slots)
            state = {k: v for part in value.state if isinstance(part, dict) for k, v in part.items()}
        inner = next((state[field] for field in ("_content", "_val") if field in state), value.items or state)
        return _plain(inner, budget)
    if isinstance(value, dict):
        return {str(_plain(key, budget)): _plain(item, budget) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, budget) for item in value]
    return value
