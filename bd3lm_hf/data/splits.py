"""Splits: find a source's split for each of ours, or hold out documents for one that is missing.

Documents are chosen by a hash, so the choice is the same on every machine. If a source has only training documents,
5 % are held out for validation and 5 % for test.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset, concatenate_datasets

from bd3lm_hf.data.sources import DatasetSpec


#: Our split -> the names that sources use for it.
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}

#: Fraction of the documents to hold out for validation, and also for test, if a source has no such split.
HELD_OUT = 0.05

_SEPARATOR = "\x1e"  # between the columns of a row


def _present(splits: Sequence[str], split: str) -> str | None:
    """Return the source's name for a split, or None if it has no such split."""
    return next((name for name in SPLIT_NAMES[split] if name in splits), None)


def held_out_splits(splits: Sequence[str]) -> list[str]:
    """Return the splits to hold out from the training split: validation if missing, and then also a missing test."""
    if _present(splits, "validation") is not None:
        return []
    return [split for split in ("validation", "test") if _present(splits, split) is None]


def split_to_read(splits: Sequence[str], spec: DatasetSpec, split: str) -> str:
    """Return the source's split to read: the split itself, or the one that it is held out from."""
    if spec.splits:
        origin = spec.splits.get(split)
    else:
        origin = _present(splits, "train" if split in held_out_splits(splits) else split)
    if origin is None or origin not in splits:
        raise ValueError(
            f"The dataset {spec.name!r} has no split {split!r}; its source has: {', '.join(splits)}"
            + (f"; there are: {', '.join(spec.splits)}." if spec.splits else ". Save one of them and name its folder.")
        )
    return origin


# Documents that are held out


def held_out_score(key: str) -> float:
    """Return a number in [0, 1) that depends only on the key; documents with the smallest scores are held out."""
    # 48 bits: a float holds such a fraction exactly, so the score is the same on every machine.
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], "big") / 2**48


def hold_out(dataset: Any, split: str, missing: list[str]) -> Any:
    """Return one split of training documents, chosen by the hash of a document's text or of all columns of a row.

    Args:
        dataset: the training documents, a `Dataset` or `IterableDataset` whose columns are all strings.
        split: the requested split.
        missing: the splits that the source lacks, in the order in which they are held out.

    Returns:
        The documents of that split. A single document is cut; if there are two or more, training and each split get
        at least one as far as possible. A stream is filtered document by document.
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
    """Return the indices of the split's documents in the source's order; no split is empty if there are enough."""
    # Stable, because equal documents have equal scores: they keep the order of the source.
    order = np.argsort(scores, kind="stable")
    start, bounds = 0, {}
    for part, name in enumerate(missing):
        available = len(scores) - 1 - start  # training keeps a document
        available = max(available - (len(missing) - 1 - part), min(available, 1), 0)  # and so does each later part
        count = min(max(int((scores < HELD_OUT * (part + 1)).sum()) - start, 1), available)
        bounds[name] = (start, start + count)
        start += count
    first, last = bounds.get(split, (start, len(scores)))
    return np.sort(order[first:last])


def _cut(dataset: Dataset, split: str, missing: list[str]) -> Dataset:
    """Cut a single document at the ends of the lines in which 90 and 95 % of its characters are reached.

    A line that extends past the middle of the next part is cut inside: text8 is a single line.
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


# The end of the training split


def head_or_tail(dataset: Any, spec: DatasetSpec, split: str) -> Any:
    """Return all but the last `spec.tail` documents for training, and those last ones for another split."""
    streamed = isinstance(dataset, IterableDataset)
    if streamed and split != "train":
        return _tail_of_stream(dataset, spec)
    count = spec.documents if streamed else len(dataset)
    if count is None:
        raise ValueError(
            f"The training split of {spec.name!r} is all but the last {spec.tail} documents of its source, so "
            "streaming needs their number: load it without streaming, or pass a DatasetSpec with documents=..."
        )
    _check_whole(count, spec)
    head = count - spec.tail
    return dataset.take(head) if split == "train" else dataset.skip(head)


def _tail_of_stream(dataset: IterableDataset, spec: DatasetSpec) -> IterableDataset:
    """Return the last documents of a stream; only the last files are read."""
    first, count = dataset.num_shards, 0
    # From the last file back, until the files contain the tail.
    while count < spec.tail and first > 0:
        first -= 1
        count += sum(1 for _ in dataset.shard(dataset.num_shards, first))
    if first == 0:
        _check_whole(count, spec)
    files = [dataset.shard(dataset.num_shards, index) for index in range(first, dataset.num_shards)]
    return concatenate_datasets(files).skip(count - spec.tail)


def _check_whole(count: int, spec: DatasetSpec) -> None:
    if count <= spec.tail:
        raise ValueError(
            f"The source of {spec.name!r} has {count} documents, but the last {spec.tail} are its validation split, "
            "so it is not the whole dataset. Pass a DatasetSpec with a smaller tail."
        )
