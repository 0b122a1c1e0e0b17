"""The console: printable text, tables and progress bars, and the arguments that commands share.

Imports nothing slow: `bd3lm VERB --help` must answer without loading torch.
"""

import argparse
import difflib
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn


# Printable text


# Tokens with a known prefix: those of the Hub, and of services that people use in the same shell.
_TOKEN = re.compile(r"\b(hf_|api_org_|sk-|gh[pousr]_|github_pat_|xox[abp]-)[\w-]{3,}")
# The value of an option or header that contains a secret, whatever the value looks like.
_SECRET = re.compile(
    r"((?:--?[\w-]*(?:token|api[-_]?key|password|secret)|authorization:)(?:=|\s+)(?:bearer\s+)?|\bbearer\s+)([^\s'\"]+)",
    re.IGNORECASE,
)


def mask_secrets(text: str) -> str:
    """Return a text with tokens and the values of secret options replaced by `***`."""
    from huggingface_hub import get_token  # only where something is printed: it costs a third of a second

    own = get_token()
    if own:
        text = text.replace(own, "***")
    return _TOKEN.sub(r"\1***", _SECRET.sub(r"\1***", text))


def printable(text: str) -> str:
    """Return a text with control characters escaped, so a name from a file cannot control the terminal."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def one_line(text: str) -> str:
    """Return a text as one printable line without secrets, for error messages."""
    return printable(" ".join(mask_secrets(text).split()))


# Markdown


_LONGEST = 200  # characters in a cell
_MARKUP = re.compile(r"([\\`*_\[\]<>|~#&!{}])")
_PLAIN = re.compile(r"[\w .,:/+()±%-]*")


def escape_markdown(value: Any) -> str:
    """Return a value as one line of Markdown without markup, truncated to fit a cell."""
    text = " ".join(str(value).split())
    text = printable(text if len(text) <= _LONGEST else f"{text[:_LONGEST]}...")
    # Numbers and plain words stay readable in the source.
    return text if _PLAIN.fullmatch(text) and "__" not in text else _MARKUP.sub(r"\\\1", text)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table. Cells are Markdown: escape untrusted text with `escape_markdown` first."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


# Progress


def progress_bar(name: str, total: int, *, initial: int = 0, unit: str = "text", disable: bool = False) -> Any:
    """Return a progress bar on standard error, which disappears at the end.

    Outside a terminal it is printed once per minute, and never by a shorter command.

    Args:
        initial: items finished by an earlier run.
        unit: name of an item.
    """
    from tqdm.auto import tqdm  # only where something is shown: it costs a tenth of a second

    interval: dict[str, Any] = {} if sys.stderr.isatty() else {"mininterval": 60, "maxinterval": 60, "delay": 60}
    return tqdm(total=total, initial=initial, desc=name, unit=unit, leave=False, disable=disable, **interval)


# Arguments


LARGEST_INTEGER = 2**31 - 1  # counts and sizes above this are typos, and overflow the integers of torch


class ArgumentParser(argparse.ArgumentParser):
    """Report a wrong argument in one line, without secrets, and exit with code 2."""

    def error(self, message: str) -> NoReturn:
        """Print the message and exit."""
        self.exit(2, f"error: {one_line(message)} (see {self.prog} --help)\n")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse all words, and suggest the nearest flag for one that does not exist."""
        parsed, rest = self.parse_known_args(args, namespace)
        if rest:
            flags = re.findall(r"--[\w-]+", self.format_usage())
            nearest = difflib.get_close_matches(rest[0].partition("=")[0], flags, n=1)
            hint = f": did you mean {nearest[0]}?" if nearest else ""
            self.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
        return parsed


def with_underscores(word: str) -> str:
    """Return a word with underscores in its flag: `--max-steps=3` becomes `--max_steps=3`."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return "--" + name.removeprefix("--").replace("-", "_") + equals + value


_TEXT_FLAGS = ("--prompt", "--sample-prompt", "--text", "--gap")


def with_home(words: Sequence[str]) -> list[str]:
    """Return the words with a leading `~` of their values expanded, except in text such as prompts.

    A shell expands `--dataset ~/x`, but not `--dataset=~/x` or a path in quotes or in a recipe.
    """
    expanded: list[str] = []
    for word in words:
        flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        name = (flag or "".join(words[len(expanded) - 1 : len(expanded)])).replace("_", "-")
        is_text = name in _TEXT_FLAGS
        expanded.append(word if is_text else flag + equals + os.path.expanduser(value))
    return expanded


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


def check_minimum(arguments: Any, minimum: int, *names: str) -> None:
    """Refuse fields below a minimum; None is not checked."""
    for name in names:
        value = getattr(arguments, name)
        if value is not None and value < minimum:
            raise ValueError(f"--{name} {value}: expected an integer >= {minimum}.")


def unknown(name: str, known: Sequence[str], kind: str) -> str:
    """Return the end of a message about an unknown name, with the nearest known one."""
    name = name.split("=")[0]
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]!r}?" if nearest else "see --help for the fields."
    return f"an unknown {kind} {name!r}: {hint}"


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--model`, `--tokenizer`, `--trust-remote-code`, `--device` and `--seed`."""
    parser.add_argument("--model", required=True, help="checkpoint folder or hub name")
    parser.add_argument("--tokenizer", help="folder or hub name of the tokenizer, if the model comes without one")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code that comes with the model; not needed for ours"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (by default a GPU if there is one)")
    parser.add_argument("--seed", type=integer(-(2**62), 2**62), default=0, help="random seed (0)")


def load_model_and_tokenizer(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """Return the model on its device, in evaluation mode, and its tokenizer.

    Raises:
        ValueError: if the checkpoint cannot be read or its weights are not complete and finite, the tokenizer is
            missing or belongs to another model, or this machine has no such device.
    """
    from transformers.utils import logging

    from bd3lm_hf.checkpoints import find_device, load_model
    from bd3lm_hf.tokenization import check_tokenizer_fits, load_tokenizer

    # The libraries' own reports would drown out the results; our warnings have separate loggers.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    arguments.device = find_device(arguments.device)
    model = load_model(arguments.model, trust_remote_code=arguments.trust_remote_code)
    tokenizer = load_tokenizer(arguments.tokenizer or arguments.model)
    if hasattr(model.config, "mask_token_id"):
        check_tokenizer_fits(tokenizer, model.config)
    return model.to(arguments.device).eval(), tokenizer
