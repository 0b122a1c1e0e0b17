"""Weights that are spread over processes (FSDP2, DeepSpeed ZeRO-3): a module's are whole only while it is called.

Both gather a module's weights in hooks around its `forward`, and count on every process making the same calls.
"""

from collections.abc import Callable
from typing import Any

from torch import nn


def is_sharded(module: nn.Module) -> bool:
    """Whether a module has weights of its own that only a call of it makes whole."""
    # FSDP2 gives the modules that it manages this method; ZeRO-3 gives the weights an id.
    return hasattr(module, "unshard") or any(hasattr(p, "ds_id") for p in module.parameters(recurse=False))


def call_as(module: nn.Module, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call `function` in the place of `module.forward`, with the module's hooks around it: its weights are whole."""
    module.forward = function
    try:
        return module(*arguments)
    finally:
        del module.forward


__all__ = ["call_as", "is_sharded"]
