"""Text metrics: entropy of tokens, distinct n-grams, repetition, lengths.

A text is a sequence of token ids, or of words: anything that can be counted. A low generative perplexity alone means
little, as a judge finds a text that repeats itself easy to predict.
"""

import math
import statistics
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple


class Lengths(NamedTuple):
    """Lengths of texts in tokens."""

    mean: float
    median: float
    shortest: int
    longest: int


def text_entropy(text: Sequence[Hashable]) -> float:
    """Entropy in nats of the token frequencies of a text: it falls when a text repeats itself; 0 for an empty one.

    The published figure is the same number, but summed over the texts of a batch.
    """
    total = len(text)
    return math.fsum(-n / total * math.log(n / total) for n in Counter(text).values()) if total else 0.0


def distinct(texts: Sequence[Sequence[Hashable]], n: int) -> float | None:
    """Share of different ones among the n-grams of all texts together (Li et al., arXiv 1510.03055).

    It falls with the number of texts and their length, so compare equal amounts only. None where no text has n tokens.

    Raises:
        ValueError: n below 1.
    """
    found = [gram for text in texts for gram in _ngrams(text, n)]
    return len(set(found)) / len(found) if found else None


def repetition(text: Sequence[Hashable], n: int = 4) -> float | None:
    """Share of the n-grams of a text that occurred in it before (Welleck et al., arXiv 1908.04319, seq-rep-n).

    None where the text has fewer than n tokens.

    Raises:
        ValueError: n below 1.
    """
    share = distinct([text], n)
    return None if share is None else 1 - share


def mean_repetition(texts: Sequence[Sequence[Hashable]], n: int = 4) -> float | None:
    """The mean of [`repetition`] over the texts that have n tokens; None where none has."""
    shares = [share for share in (repetition(text, n) for text in texts) if share is not None]
    return math.fsum(shares) / len(shares) if shares else None


def mean_entropy(texts: Sequence[Sequence[Hashable]]) -> float:
    """The mean of [`token_entropy`] over texts.

    Raises:
        ValueError: no texts.
    """
    check_some(texts)
    return math.fsum(map(text_entropy, texts)) / len(texts)


def lengths(texts: Sequence[Sequence[Hashable]]) -> Lengths:
    """Lengths of texts.

    Raises:
        ValueError: no texts.
    """
    check_some(texts)
    counts = [len(text) for text in texts]
    return Lengths(statistics.fmean(counts), statistics.median(counts), min(counts), max(counts))


def check_some(texts: Sequence[object]) -> None:
    """Refuse to tell anything of no texts."""
    if not len(texts):
        raise ValueError("there are no texts: give at least one.")


def _ngrams(text: Sequence[Hashable], n: int) -> Iterator[tuple[Hashable, ...]]:
    if n < 1:
        raise ValueError(f"n={n}: n-grams have at least 1 token.")
    return (tuple(text[start : start + n]) for start in range(len(text) - n + 1))


__all__ = [
    "Lengths",
    "check_some",
    "distinct",
    "lengths",
    "mean_entropy",
    "mean_repetition",
    "repetition",
    "text_entropy",
]
