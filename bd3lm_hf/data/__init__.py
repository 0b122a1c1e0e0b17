"""Read, split, pack and stream datasets."""

from importlib import import_module
from typing import Any


#: Public name -> module. Resolved on first use, because the modules import torch and `datasets`.
_MODULES = {
    "find_schema": "documents",
    "load_rows": "documents",
    "load_text": "documents",
    "pack": "packing",
    "PackedStream": "streaming",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


__all__ = ["PackedStream", "find_schema", "load_rows", "load_text", "pack"]  # noqa: F822
