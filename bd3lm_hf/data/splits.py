"""Splits: find the data files of each, and hold out documents for one that is missing.

The words for splits and the repository cards are those of `datasets`. Held-out documents are chosen by a hash, so the
choice is the same on every machine. If a source has only training documents, 5 % are held out for validation and 5 %
for test.
"""

import hashlib
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset, concatenate_datasets, load_dataset_builder
from datasets.data_files import FILES_TO_IGNORE, SPLIT_KEYWORDS
from huggingface_hub import metadata_load
from yaml import YAMLError

from bd3lm_hf.data.sources import COMPRESSIONS, ENDINGS, DatasetSpec, data_ending
from bd3lm_hf.user_files import read_json


logger = logging.getLogger(__name__)

#: Our split -> the names that sources use for it.
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}

#: Fraction of the documents to hold out for validation, and also for test, if a source has no such split.
HELD_OUT = 0.05

_SEPARATOR = "\x1e"  # between the columns of a row


# Files


#: Word in the name of a file or folder -> split, as in `datasets`. Every other word is a form of "held out".
_SPLIT_OF_WORD = {word: str(split) for split, words in SPLIT_KEYWORDS.items() for word in words}

# A word ends where no letter follows: "ptb.valid.txt", "my_test-2.jsonl", "testset.csv", but not "contest.txt".
_SPLIT_WORD = re.compile(rf"(?<![^\W\d_])({'|'.join(_SPLIT_OF_WORD)}|h[eo]ld[-._ ]?out)(?:set)?(?![^\W\d_])")

# "myTest" has two words.
_WORD_BEGIN = re.compile(r"(?<=[a-z])(?=[A-Z])")

#: Files that describe a dataset or a repository, in lower case.
_NOT_DATA = {
    *(name.lower() for name in FILES_TO_IGNORE),
    *("state.json", "metadata.json", "manifest.json", "croissant.json", "citation.md", "requirements.txt"),
    *(
        f"{name}{ending}"
        for name in ("readme", "license", "licence", "notice", "changelog")
        for ending in (".md", ".txt")
    ),
}


def files_by_split(path: str, default_split: str, config_name: str | None = None) -> dict[str, list[str]]:
    """Return the data files of a file or folder by split.

    If the card of a downloaded dataset repository lists configurations, it decides. Otherwise the split is a word in a
    name, delimited by characters that are not letters. Such words are looked for first in folders with exactly that
    name ("test/"), then in the file's name ("ptb.valid.txt"), then in other folders' names ("my-test/"). Hidden files
    and files that describe a dataset are left out.

    Args:
        default_split: split of the files whose names contain no such word.
        config_name: configuration of a repository card; None if there is only one, or a default.

    Raises:
        ValueError: if there are no data files, the choice is ambiguous (several formats, several configurations, a
            name with words for several splits), or all files are empty.
    """
    root = Path(path).expanduser()
    files = _files_of_card(root, config_name)
    if files is None:
        if config_name is not None:
            raise ValueError(f"config_name is {config_name!r}, but {path!r} has no configurations; leave it out.")
        files = {}
        for file in _data_files(root):
            split = default_split if root.is_file() else _split_of(file.relative_to(root)) or default_split
            files.setdefault(split, []).append(str(file))
    names = [name for group in files.values() for name in group]
    endings = {data_ending(name) for name in names}
    if len({ENDINGS.get(ending, ending) for ending in endings}) > 1 or not endings <= set(ENDINGS):
        raise ValueError(
            f"The folder {path!r} has files of several kinds ({', '.join(sorted(endings))}); keep one kind in it, or "
            "name a single file."
        )
    if not any(Path(name).stat().st_size for name in names):
        raise ValueError(f"The dataset {path!r} is empty: all its files have 0 bytes. Name another file.")
    return files


def _data_files(root: Path) -> list[Path]:
    known = f"{', '.join(ENDINGS)} (also with {', '.join(COMPRESSIONS)})"
    if root.is_file():
        if data_ending(root) not in ENDINGS:
            raise ValueError(f"The file {str(root)!r} is of an unknown kind; its name must end in one of: {known}.")
        return [root]
    entries = [entry for entry in sorted(root.rglob("*")) if not _is_ignored(entry.relative_to(root))]
    found = [entry for entry in entries if data_ending(entry) in ENDINGS and not entry.is_dir()]
    if broken := [entry.name for entry in found if not entry.exists()]:
        raise ValueError(f"The folder {str(root)!r} has broken links: {', '.join(broken)}. Repair or remove them.")
    if linked := [entry.name for entry in entries if entry.is_symlink() and entry.is_dir()]:
        logger.warning("Links to folders are not followed: %s in %s.", ", ".join(linked), root)
    if not found:
        saved = [file.parent.name for file in sorted(root.glob("*/state.json"))]
        hint = f" Its folders {', '.join(saved)} were written by save_to_disk: name one of them." if saved else ""
        raise ValueError(f"The folder {str(root)!r} has no file that ends in one of: {known}.{hint}")
    return found


def _is_ignored(relative: Path) -> bool:
    """Return whether a file is hidden, inside a hidden or special folder, or describes a dataset."""
    # "~$" begins the lock file of a document that is open in an office program.
    return relative.name.lower() in _NOT_DATA or any(part.startswith((".", "__", "~$")) for part in relative.parts)


def _split_of(relative: Path) -> str | None:
    """Return the split that the path of a file names, or None."""
    file, *folders = (_WORD_BEGIN.sub("_", part).lower() for part in reversed(relative.parts))
    exact = [name for name in folders if _SPLIT_WORD.fullmatch(name)]
    for name in (*exact, file, *folders):
        splits = {_SPLIT_OF_WORD.get(word, "validation") for word in _SPLIT_WORD.findall(name)}
        if len(splits) > 1:
            raise ValueError(
                f"The name {name!r} of {str(relative)!r} has words for several splits ({', '.join(sorted(splits))}): "
                "rename it."
            )
        if splits:
            return splits.pop()
    return None


def _files_of_card(root: Path, config_name: str | None) -> dict[str, list[str]] | None:
    """Return the files of a configuration in the card of a dataset repository, or None if it lists none."""
    card = root / "README.md"
    try:
        metadata = (metadata_load(card) or {}) if card.is_file() else {}
        configs = {entry.get("config_name", "default"): entry for entry in metadata.get("configs") or ()}
    except (AttributeError, TypeError, ValueError, YAMLError) as error:
        raise ValueError(f"The metadata of {str(card)!r} cannot be read: {error}. Repair it.") from error
    if not configs:
        _check_described(root, metadata)
        return None
    default = [name for name, entry in configs.items() if entry.get("default") or name == "default"]
    if config_name is None and len(configs) > 1 and not default:
        raise ValueError(
            f"The dataset {str(root)!r} has several configurations ({', '.join(configs)}): choose one with "
            "config_name (--dataset_config)."
        )
    chosen = config_name or (default or list(configs))[0]
    if chosen not in configs:
        raise ValueError(
            f"config_name is {config_name!r}, but {str(root)!r} has the configurations {', '.join(configs)}."
        )
    try:
        files = load_dataset_builder(str(root), name=chosen).config.data_files
    except (OSError, ValueError) as error:
        raise ValueError(f"The configuration {chosen!r} of {str(card)!r} names no data: {error}") from error
    return {str(split): sorted(group) for split, group in files.items()}


def _check_described(root: Path, metadata: dict[str, Any]) -> None:
    """Refuse a repository that describes several configurations in separate folders, as older repositories do."""
    described = metadata.get("dataset_info") or []
    names = {entry.get("config_name") for entry in described} if isinstance(described, list) else set()
    if (infos := root / "dataset_infos.json").is_file():
        names |= read_json(infos).keys()
    folders = sorted(name for name in names if name and (root / name).is_dir())
    if len(folders) > 1:
        raise ValueError(
            f"The dataset {str(root)!r} has configurations in folders ({', '.join(folders)}): name one of them."
        )


# Splits of a source


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
