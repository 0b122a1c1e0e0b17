"""What decides the numbers of a run, as hashes and named values: the model, its weights, its vocabulary, the text."""

import hashlib
import json
import platform
from collections.abc import Sized
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

import bd3lm_hf


_DIGITS = 16
# Of a configuration, what says where a model comes from and how it runs, not what it computes.
_FREE_CONFIG = {"_name_or_path", "architectures", "attn_backend", "auto_map", "dtype", "torch_dtype", "return_dict"}
_FREE_CONFIG |= {"output_attentions", "output_hidden_states", "use_cache"}
_FREE_CONFIG |= {"requires_transformers", "transformers_version"}
_FREE_CONFIG |= {"sampling_eps_min", "sampling_eps_max"}


def config_identity(config: Any) -> dict[str, Any]:
    """The fields of a configuration that say what the model computes.

    The interval of noise levels is none of them: a search moves it, and the weights carry it.
    """
    return {name: value for name, value in config.to_dict().items() if name not in _FREE_CONFIG}


def tokenizer_identity(tokenizer: Any) -> dict[str, Any]:
    """Size and hash of the vocabulary; empty without a tokenizer."""
    if tokenizer is None or not hasattr(tokenizer, "get_vocab"):
        return {}
    vocabulary = sorted(tokenizer.get_vocab().items())
    return {
        "tokens": len(vocabulary),
        "sha256 of the vocabulary": digest([vocabulary, sorted(tokenizer.all_special_ids)]),
    }


def data_identity(rows: Any, *, sample: int | None = None) -> dict[str, Any]:
    """Number and hash of sequences; a stream says itself what it depends on.

    Args:
        sample: hash so many of them, spread evenly; all by default.
    """
    if not isinstance(rows, Sized):
        return {"kind": "a stream", **getattr(rows, "identity", {})}
    hashed = hashlib.sha256()
    step = 1 if sample is None else max(1, -(-len(rows) // sample))
    for index in range(0, len(rows), step):
        row = rows[index]  # type: ignore[index]
        for name in ("input_ids", "labels"):
            hashed.update(np.asarray(row.get(name, ()), dtype=np.int64).tobytes())
    return {"kind": "sequences", "sequences": len(rows), "sha256 of the sequences": hashed.hexdigest()[:_DIGITS]}


def weights_digest(model: torch.nn.Module) -> str:
    """Hash of names, types, shapes and numbers of all weights, in the order of their names."""
    hashed = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        hashed.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()[:_DIGITS]


def digest(value: Any) -> str:
    """Hash of a value as JSON, whose keys are sorted."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]


def library_versions() -> dict[str, str]:
    """What a number may depend on beside model and text."""
    others = {name: version(name) for name in ("torch", "transformers", "datasets")}
    return {"bd3lm_hf": bd3lm_hf.__version__, **others, "python": platform.python_version()}


__all__ = [
    "config_identity",
    "data_identity",
    "digest",
    "library_versions",
    "tokenizer_identity",
    "weights_digest",
]
