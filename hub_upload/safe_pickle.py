"""Reading a Lightning checkpoint without running it: tensors and plain values, and inert records of other objects.

A `.ckpt` is a pickle, and a pickle is a program. This unpickler knows the functions that rebuild tensors and a few
plain containers; classes of the libraries that write such checkpoints become records that hold what was stored; the
rest is refused by name.
"""

import collections
import pickle
import types
import zipfile
from pathlib import Path
from typing import Any

import torch


# Harmless: they hold or rebuild values. (Storage types are torch's own business.)
_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("collections", "defaultdict"): collections.defaultdict,
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    **{
        (module, kind.__name__): kind
        for module in ("builtins", "__builtin__")
        for kind in (bool, bytearray, bytes, complex, dict, float, frozenset, int, list, set, slice, str, tuple)
    },
    **{("torch", str(kind).removeprefix("torch.")): kind for kind in (torch.float32, torch.float16, torch.bfloat16)},
}


# What these write into checkpoints beside the weights: configurations, tokenizers, loop states.
_RECORDED = ("omegaconf", "hydra", "lightning", "pytorch_lightning", "lightning_fabric", "transformers", "tokenizers")


_RECORDED_NAMES = {("typing", "Any"), ("collections", "Counter"), ("enum", "Enum"), ("pathlib", "PosixPath")}


class InertObject:
    """An object that was not made: what the pickle would have handed to its constructor and set as its state."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        self.arguments, self.keywords, self.state = arguments, keywords, None
        self.items: dict[Any, Any] = {}

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items[key] = value

    def append(self, value: Any) -> None:
        """What pickle does with the items of a list."""
        self.items[len(self.items)] = value

    def extend(self, values: Any) -> None:
        """What pickle does with the items of a list."""
        for value in values:
            self.append(value)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        if module.split(".")[0] in _RECORDED or (module, name) in _RECORDED_NAMES:
            return type(name, (InertObject,), {"__module__": module})
        raise pickle.UnpicklingError(f"{module}.{name}")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The contents of a `.ckpt` file, without running anything that it says.

    Raises:
        ValueError: no archive as torch writes it since 1.6, a TorchScript program, or an object of a class that is
            neither a tensor nor known; the message names it.
    """
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is no checkpoint that torch.save wrote (torch 1.6 or later): name such a file.")
    with zipfile.ZipFile(path) as archive:
        names = {name.rpartition("/")[2] for name in archive.namelist()}
    if "constants.pkl" in names:
        raise ValueError(f"{path} is a TorchScript program, which would be run to be read: name a .ckpt file.")
    reader = types.ModuleType("restricted_pickle")
    reader.Unpickler = _Unpickler  # type: ignore[attr-defined]
    reader.load = lambda file, **keywords: _Unpickler(file, **keywords).load()  # type: ignore[attr-defined]
    try:
        contents = torch.load(path, map_location="cpu", pickle_module=reader, weights_only=False)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} asks for {error}, which is no tensor and no known part of a checkpoint. It was not run, and the "
            f"file is not converted: take such objects out of it where it was made."
        ) from error
    except (RuntimeError, EOFError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} can not be read as a checkpoint: {type(error).__name__}: {error}") from error
    if not isinstance(contents, dict):
        raise ValueError(f"{path} holds a {type(contents).__name__}, no checkpoint: a dict with a state_dict.")
    return contents


def plain(value: Any) -> Any:
    """A configuration record as dicts, lists and values: OmegaConf's containers keep theirs in `_content`, `_val`."""
    if isinstance(value, InertObject):
        state: dict[str, Any] = value.state if isinstance(value.state, dict) else {}
        if isinstance(value.state, tuple):  # of a class with slots: (dict, slots)
            state = {k: v for part in value.state if isinstance(part, dict) for k, v in part.items()}
        for field in ("_content", "_val"):
            if field in state:
                return plain(state[field])
        return plain(value.items or state)
    if isinstance(value, dict):
        return {str(plain(k)): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


__all__ = ["InertObject", "plain", "read_checkpoint"]
