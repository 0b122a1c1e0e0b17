"""The paper's evaluations: which data sets, and how their texts become sequences (arXiv 2503.09573, Sec. 6, App. C).

How a document ends and whether a sequence begins and ends with special tokens changes a perplexity by several per
cent, so the flags belong to a published number like its data set.
"""

from collections.abc import Mapping
from typing import NamedTuple


class Flags(NamedTuple):
    """How a data set is cut into sequences."""

    split: str = "validation"
    packing: str = "published"
    insert_eos: bool = True  # behind every document
    insert_special: bool = True  # begin and end token around every sequence


class Suite(NamedTuple):
    """Data sets that are scored together."""

    about: str
    length: int  # tokens of a sequence in the paper
    sets: Mapping[str, Flags]


#: In-domain evaluations by data set; any other one has the published defaults, those of `Flags`.
PUBLISHED: Mapping[str, Flags] = {
    "openwebtext": Flags(insert_special=False),
    "lm1b": Flags(split="test"),
}

_ZERO_SHOT = Flags(insert_eos=False)
_ZERO_SHOT_TEST = Flags(split="test", insert_eos=False)

#: By name. Zero-shot is Table 5, in the order of its columns.
SUITES: Mapping[str, Suite] = {
    "zero-shot": Suite(
        "the paper's Table 5: models of OpenWebText on eight other data sets",
        1024,
        {
            "ptb": _ZERO_SHOT,
            "wikitext2": _ZERO_SHOT,
            "wikitext103": _ZERO_SHOT,
            "lm1b": _ZERO_SHOT_TEST,
            "lambada": _ZERO_SHOT_TEST,
            "ag_news": _ZERO_SHOT_TEST,
            "scientific_papers_pubmed": _ZERO_SHOT,
            "scientific_papers_arxiv": _ZERO_SHOT,
        },
    ),
}


def published_flags(name: str) -> Flags:
    """The flags of an in-domain evaluation on the data set of that name."""
    return PUBLISHED.get(name, Flags())


__all__ = ["PUBLISHED", "SUITES", "Flags", "Suite", "published_flags"]
