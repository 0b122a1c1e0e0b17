"""Detokenizers: undo the tokenization that some evaluation corpora were published with (paper, App. C.2).

Each detokenizer is one ordered table of replacements, applied from top to bottom. A plain string replaces every
non-overlapping occurrence, a compiled pattern substitutes. The order matters: a rule sees what earlier rules left.
"""

import re
from collections.abc import Callable


Rule = tuple[str | re.Pattern[str], str]


def _spaced_marks(marks: str) -> tuple[Rule, ...]:
    """`a , b` -> `a, b` for every mark."""
    return tuple((f" {mark} ", f"{mark} ") for mark in marks)


def _trimmed_pairs(*pairs: tuple[str, str]) -> tuple[Rule, ...]:
    """`( a )` -> `(a)`: no white space inside a pair of delimiters, whatever its amount."""
    return tuple(
        (re.compile(rf"{re.escape(left)}\s*([^{re.escape(right)}]*?)\s*{re.escape(right)}"), rf"{left}\1{right}")
        for left, right in pairs
    )


def _single_spaced_pairs(*pairs: tuple[str, str]) -> tuple[Rule, ...]:
    """`( a )` -> `(a)`: exactly one space on each side, and no delimiter of the pair in between."""
    return tuple(
        (
            re.compile(rf"{re.escape(left)} ([^{re.escape(left)}{re.escape(right)}]+) {re.escape(right)}"),
            rf"{left}\1{right}",
        )
        for left, right in pairs
    )


WIKITEXT: tuple[Rule, ...] = (
    ("s '", "s'"),
    # numbers and hyphens
    (" @-@ ", "-"),
    (" @,@ ", ","),
    (" @.@ ", "."),
    *_spaced_marks(":;.!?,"),
    *_trimmed_pairs(("(", ")"), ("[", "]"), ("{", "}"), ('"', '"'), ("'", "'")),
    # headings
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" ° ", "°"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)

PENN_TREEBANK: tuple[Rule, ...] = (
    (" 's", "'s"),
    ("s ' ", "s' "),
    (" n't", "n't"),
    (" \n ", "\n"),
    ("\\/", "/"),
    # Neighbours share a space, so that one pass leaves every second N; ten passes are the published number.
    *((" N ", " 1 "),) * 10,
    ("$ 1", "$1"),
    ("# 1", "#1"),
    ("<unk>", "?"),
)

LM1B: tuple[Rule, ...] = (
    ("http : / / ", "http://"),
    ("https : / / ", "https://"),
    (re.compile(r" '(\w+)"), r"'\1"),
    (re.compile(r" (\w+) \. "), r" \1. "),
    (re.compile(r" (\w+) \.$"), r" \1."),
    (" ? ", "? "),
    (re.compile(r" \?$"), "?"),
    (" ! ", "! "),
    (re.compile(r" !$"), "!"),
    *_spaced_marks(",:;"),
    (" / ", "/"),
    *_single_spaced_pairs(('"', '"'), ("'", "'"), ("(", ")"), ("[", "]")),
    ("$ ", "$"),
    ("£ ", "£"),
)

LAMBADA: tuple[Rule, ...] = (
    ("“", '"'),
    ("”", '"'),
    (re.compile(r"\s+\Z"), ""),
    (re.compile(r"\A\s*"), "\n"),
)

#: Every detokenizer by name. Scientific papers pass through two tables, one after the other.
DETOKENIZERS: dict[str, tuple[Rule, ...]] = {
    "wikitext": WIKITEXT,
    "ptb": PENN_TREEBANK,
    "lm1b": LM1B,
    "lambada": LAMBADA,
    "scientific_papers": WIKITEXT + LM1B,
}


def detokenizer(name: str) -> Callable[[str], str]:
    """The function that detokenizes one text of the corpus `name`.

    Args:
        name: a key of `DETOKENIZERS`.

    Raises:
        ValueError: there is no detokenizer of that name.
    """
    if name not in DETOKENIZERS:
        raise ValueError(f"No detokenizer is called {name!r}; there are: {', '.join(DETOKENIZERS)}.")
    rules = DETOKENIZERS[name]

    def detokenize(text: str) -> str:
        for old, new in rules:
            text = text.replace(old, new) if isinstance(old, str) else old.sub(new, text)
        return text

    return detokenize
