"""Held-out splits: documents are chosen by a hash, so that the choice is the same on every machine.

Of a source with training documents only, 5 % are held out for validation and 5 % for the test.
"""

import hashlib
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset


#: Fraction of the documents that is held out for validation, and as much again for the test, where a source has none.
HELD_OUT = 0.05

_SEPARATOR = "\x1e"  # between the columns of a row


def held_out_score(key: str) -> float:
    """Return a number in [0, 1) that depends on the key alone; the smallest scores are held out."""
    # 48 bits: a float holds such a fraction exactly, so the score is the same on every machine.
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], "big") / 2**48


def hold_out(dataset: Any, split: str, missing: list[str]) -> Any:
    """Return the documents of one split of a source that has only training documents.

    Args:
        dataset: the training documents, a `Dataset` or `IterableDataset` whose columns are all strings.
        split: the requested split.
        missing: the splits that the source lacks, in the order in which they are held out.

    Returns:
        The dataset's documents of that split. A single document is cut; of two or more, training and the splits
        each get at least one, as far as they suffice. A stream is filtered document by document.

    The hash is that of a document's text, or of all columns of a row.
    """
    if split not in ("train", *missing) or not missing:
        return dataset
    if isinstance(dataset, IterableDataset):
        return dataset.filter(_in_part, fn_kwargs={"split": split, "missing": missing})
    if len(dataset) == 1 and dataset.column_names == ["text"]:
        return _cut(dataset, split, missing)
    rows = (row for batch in dataset.iter(1000) for row in zip(*batch.values(), strict=True))
    scores = np.array([held_out_score(_SEPARATOR.join(row)) for row in rows])
    return dataset.select(members(scores, split, missing))


def _in_part(row: dict[str, str], *, split: str, missing: list[str]) -> bool:
    part = int(held_out_score(_SEPARATOR.join(row.values())) / HELD_OUT)
    return (missing[part] if part < len(missing) else "train") == split


def members(scores: np.ndarray, split: str, missing: list[str]) -> np.ndarray:
    """Return the indices, in the source's order, of the split's documents; no split is left empty if enough exist."""
    # Stable: equal documents have equal scores, and keep the order of the source.
    order = np.argsort(scores, kind="stable")
    start, bounds = 0, {}
    for part, name in enumerate(missing):
        spare = len(scores) - 1 - start  # training keeps a document
        spare = max(spare - (len(missing) - 1 - part), min(spare, 1), 0)  # and so does each later part
        count = min(max(int((scores < HELD_OUT * (part + 1)).sum()) - start, 1), spare)
        bounds[name] = (start, start + count)
        start += count
    first, last = bounds.get(split, (start, len(scores)))
    return np.sort(order[first:last])


def _cut(dataset: Dataset, split: str, missing: list[str]) -> Dataset:
    """Cut a single document at the end of the line in which 90 and 95 % of its characters are reached.

    A line whose end is nearer to the next cut is cut inside: text8 is a single line.
    """
    text = dataset[0]["text"]
    length = len(text.rstrip("\n"))
    cuts = [0]
    for part in range(len(missing), 0, -1):
        cut = round(length * (1 - HELD_OUT * part))
        # From cut - 1: a line that ends right before the cut is already whole.
        line_end = text.find("\n", max(cut - 1, 0), cut + round(length * HELD_OUT / 2))
        cuts.append(line_end + 1 if line_end >= 0 else cut)
    cuts.append(len(text))
    part = ["train", *missing].index(split)
    return Dataset.from_dict({"text": [piece] if (piece := text[cuts[part] : cuts[part + 1]]) else []})
