"""Markdown that shows text of files and of users as it is: without markup, and within its cell."""

import re
from collections.abc import Sequence
from typing import Any

from bd3lm_hf.argument_parser import printable


_LONGEST = 200  # characters of a cell
_MARKUP = re.compile(r"([\\`*_\[\]<>|~#&!{}])")
_PLAIN = re.compile(r"[\w .,:/+()±%-]*")


def escape(value: Any) -> str:
    """Return a value as one line of Markdown without markup; a long one is cut."""
    text = " ".join(str(value).split())
    text = printable(text if len(text) <= _LONGEST else f"{text[:_LONGEST]}...")
    # Numbers and plain words stay readable in the source.
    return text if _PLAIN.fullmatch(text) and "__" not in text else _MARKUP.sub(r"\\\1", text)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table; cells are Markdown, so what is not ours goes through `escape` first."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))
