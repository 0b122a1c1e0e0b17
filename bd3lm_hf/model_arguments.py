"""The flags that every verb with a model has, and types of arguments. Imports nothing slow."""

import argparse
import math
from collections.abc import Callable
from typing import Any


#: Counts and sizes above this are typing errors, and overflow the integers of torch.
LARGEST_INTEGER = 2**31 - 1


def integer(minimum: int, maximum: int = LARGEST_INTEGER) -> Callable[[str], int]:
    """Return an argument type: integers from `minimum` to `maximum`."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if not minimum <= value <= maximum:
            limits = f"an integer >= {minimum}" if value < minimum else f"an integer <= {maximum}"
            raise argparse.ArgumentTypeError(f"expected {limits}, got {text!r}")
        return value

    return read


def number(maximum: float = math.inf, *, allow_zero: bool = False) -> Callable[[str], float]:
    """Return an argument type: numbers above 0 (or from 0 on), up to `maximum`."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 <= value <= maximum or not math.isfinite(value) or (value == 0 and not allow_zero):
            limits = f"{'>=' if allow_zero else '>'} 0" + (f" and <= {maximum:g}" if math.isfinite(maximum) else "")
            raise argparse.ArgumentTypeError(f"expected a number {limits}, got {text!r}")
        return value

    return read


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--model`, `--tokenizer`, `--trust-remote-code`, `--device` and `--seed`."""
    parser.add_argument("--model", required=True, help="checkpoint folder or hub name")
    parser.add_argument("--tokenizer", help="folder or hub name of the tokenizer, if the model comes without one")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code that comes with the model; ours needs none"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (a GPU if there is one)")
    parser.add_argument("--seed", type=integer(-(2**62), 2**62), default=0)


def load_model_and_tokenizer(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """Return the model on its device, in evaluation mode, and its tokenizer.

    Raises:
        ValueError: if the checkpoint cannot be read, lacks weights, has others or holds NaN, the tokenizer is missing
            or belongs to another model, or this machine has no such device.
    """
    from transformers.utils import logging

    from bd3lm_hf.checkpoints import find_device, load_model
    from bd3lm_hf.tokenization import check_tokenizer_fits, load_tokenizer

    # The libraries' own reports would drown the results; our warnings have loggers of their own.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    arguments.device = find_device(arguments.device)
    model = load_model(arguments.model, trust_remote_code=arguments.trust_remote_code)
    tokenizer = load_tokenizer(arguments.tokenizer or arguments.model)
    if hasattr(model.config, "mask_token_id"):
        check_tokenizer_fits(tokenizer, model.config)
    return model.to(arguments.device).eval(), tokenizer


__all__ = ["LARGEST_INTEGER", "add_model_arguments", "integer", "load_model_and_tokenizer", "number"]
