"""Text for people: mask secrets, escape Markdown, report progress."""

import re
import sys
from collections.abc import Sequence
from typing import Any


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

    interval = {} if sys.stderr.isatty() else {"mininterval": 60, "maxinterval": 60, "delay": 60}
    return tqdm(total=total, initial=initial, desc=name, unit=unit, leave=False, disable=disable, **interval)
