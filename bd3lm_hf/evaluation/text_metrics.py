"""Text metrics: entropy of tokens, distinct n-grams, repetition, lengths.

A text is a sequence of token ids, of words, or of anything else that can be counted. A low generative perplexity
alone means little, because a reference model finds a text that repeats itself easy to predict.
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
    """Return the entropy in nats of the token frequencies of a text; 0 for an empty one.

    It falls when a text repeats itself. The published figure is the same number summed over the texts of a batch.
    """
    total = len(text)
    return math.fsum(-n / total * math.log(n / total) for n in Counter(text).values()) if total else 0.0


def mean_entropy(texts: Sequence[Sequence[Hashable]]) -> float:
    """Return the mean of [`text_entropy`] over texts.

    Raises:
        ValueError: if there are no texts.
    """
    check_some(texts)
    return math.fsum(map(text_entropy, texts)) / len(texts)


def distinct(texts: Sequence[Sequence[Hashable]], n: int) -> float | None:
    """Return the fraction of distinct n-grams among those of all texts together (Li et al., arXiv 1510.03055).

    It falls with the number of texts and their length, so compare equal amounts only. None if no text has n tokens.

    Raises:
        ValueError: if n is below 1.
    """
    found = [gram for text in texts for gram in _ngrams(text, n)]
    return len(set(found)) / len(found) if found else None


def repetition(text: Sequence[Hashable], n: int = 4) -> float | None:
    """Return the fraction of the n-grams of a text that occurred in it before (seq-rep-n, arXiv 1908.04319).

    None if the text has fewer than n tokens.

    Raises:
        ValueError: if n is below 1.
    """
    fraction = distinct([text], n)
    return None if fraction is None else 1 - fraction


def mean_repetition(texts: Sequence[Sequence[Hashable]], n: int = 4) -> float | None:
    """Return the mean of [`repetition`] over the texts that have n tokens; None if none has."""
    values = [value for value in (repetition(text, n) for text in texts) if value is not None]
    return math.fsum(values) / len(values) if values else None


def lengths(texts: Sequence[Sequence[Hashable]]) -> Lengths:
    """Return the lengths of texts.

    Raises:
        ValueError: if there are no texts.
    """
    check_some(texts)
    counts = [len(text) for text in texts]
    return Lengths(statistics.fmean(counts), statistics.median(counts), min(counts), max(counts))


def check_some(texts: Sequence[object]) -> None:
    """Refuse to summarize no texts."""
    if not len(texts):
        raise ValueError("there are no texts: give at least one.")


def _ngrams(text: Sequence[Hashable], n: int) -> Iterator[tuple[Hashable, ...]]:
    if n < 1:
        raise ValueError(f"n={n}: n-grams have at least 1 token.")
    return (tuple(text[start : start + n]) for start in range(len(text) - n + 1))
