"""Read local files: find the files of each split, and their usable rows; report faulty rows with file and line.

The words for splits, repository cards, caching, streaming and resuming are those of `datasets`.
"""

import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, IterableDataset, Value, load_dataset_builder
from datasets.data_files import FILES_TO_IGNORE, SPLIT_KEYWORDS
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher
from huggingface_hub import metadata_load
from yaml import YAMLError

from bd3lm_hf.data.records import Record, columns_of, read_records
from bd3lm_hf.data.schemas import Schema, TextRow
from bd3lm_hf.data.sources import COMPRESSIONS, ENDINGS, data_ending
from bd3lm_hf.data.splits import SPLIT_NAMES, held_out_splits
from bd3lm_hf.user_files import read_json


logger = logging.getLogger(__name__)

_MAX_SHOWN = 5  # faults listed in a message

_REMEDY = "repair the data, or skip such rows with skip_bad_rows=True."

#: Part of every cache key: increase it when the meaning of a record changes.
_VERSION = 2

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


def usable_rows(
    records: Iterable[Record], origin: str, schema: Schema, *, skip_bad_rows: bool
) -> Iterator[dict[str, str]]:
    """Yield the records as the schema reads them.

    Raises:
        ValueError: if a record cannot be read or does not follow the schema. With `skip_bad_rows` it is skipped
            instead, with a warning.
    """
    for row in _checked(records, origin, schema):
        if isinstance(row, dict):
            yield row
        elif skip_bad_rows:
            logger.warning("Skipped: %s.", row)
        else:
            raise row_error([row])


def _checked(records: Iterable[Record], origin: str, schema: Schema) -> Iterator[dict[str, str] | str]:
    """Yield each record as the schema reads it, or its fault, such as "Line 5 of 'a.csv' has 3 fields, not 2"."""
    for record in records:
        fault = record.fault
        if record.content is not None:
            try:
                yield schema.read(record.content)
                continue
            except ValueError as error:
                fault = str(error)
        yield f"{record.position.capitalize()} of {origin} {fault}"


def find_faults(files: Iterable[str], schema: Schema) -> list[str]:
    """Return all faults of the files' records, each with file and position."""
    checked = (row for file in files for row in _checked(read_records(file, schema.columns), repr(file), schema))
    return [row for row in checked if isinstance(row, str)]


def row_error(faults: Sequence[str]) -> ValueError:
    """Return the error for records that cannot be used."""
    more = len(faults) - _MAX_SHOWN
    shown = "; ".join(faults[:_MAX_SHOWN]) + (f"; and {more} more" if more > 0 else "")
    return ValueError(f"{shown}: {_REMEDY}")


def _rows_of_files(files: Sequence[str], schema: Schema, skip_bad_rows: bool) -> Iterator[dict[str, str]]:
    for file in files:
        yield from usable_rows(read_records(file, schema.columns), repr(file), schema, skip_bad_rows=skip_bad_rows)


@dataclass
class SplitFiles:
    """Read data files split by split."""

    name: str  # of the dataset, for messages
    files: dict[str, list[str]]  # by split, as `files_by_split` returns them
    streaming: bool  # read while iterating; every file is then a shard
    cut_single: bool  # a single document is to be cut into splits, which a stream cannot do
    cache_dir: str | None  # where the datasets library keeps its files

    @property
    def splits(self) -> list[str]:
        return list(self.files)

    def columns(self, split: str) -> dict[str, str]:
        """Return the columns of the first file of a split that has any, and the kind of each.

        Raises:
            ValueError: if no record of the split can be read.
        """
        columns = next(filter(None, map(columns_of, self.files[split])), {})
        if not columns and (faults := find_faults(self.files[split], TextRow())):
            raise row_error(faults)
        return columns

    def read(self, split: str, schema: Schema, *, skip_bad_rows: bool) -> Dataset | IterableDataset:
        """Return the rows of a split in the schema's columns.

        Raises:
            ValueError: if there are none, or one is faulty; a stream raises when it reaches the row.
        """
        files = self.files[split]
        columns = self.columns(split)
        if not columns:
            raise self._empty_split(split)
        is_cut = self.cut_single and split in SPLIT_NAMES["train"] and held_out_splits(self.splits)
        if self.streaming and is_cut and len(files) == 1 and ENDINGS[data_ending(files[0])] == "text":
            raise ValueError(
                f"The file {files[0]!r} is one document, which a stream cannot cut into training and held-out text: "
                "load it without streaming, or put several files into a folder."
            )
        schema = schema.resolved(columns, self.name)
        arguments = {"files": list(files), "schema": schema, "skip_bad_rows": skip_bad_rows}
        features = Features({name: Value("string") for name in schema.names})
        if self.streaming:
            return IterableDataset.from_generator(_rows_of_files, features=features, gen_kwargs=arguments)
        # With the size and time of each file, so an edited file is read again.
        states = [(file, Path(file).stat().st_size, Path(file).stat().st_mtime_ns) for file in files]
        key = (_VERSION, states, type(schema).__name__, vars(schema), skip_bad_rows)
        try:
            return Dataset.from_generator(
                _rows_of_files,
                features=features,
                gen_kwargs=arguments,
                cache_dir=self.cache_dir,
                fingerprint=Hasher.hash(key),
            )
        except DatasetGenerationError as error:
            if isinstance(error.__cause__, ValueError) and (faults := find_faults(files, schema)):
                raise row_error(faults) from None
            if isinstance(error.__cause__, OSError):  # from writing the cache, such as a full disk
                raise error.__cause__ from error
            raise
        except ValueError as error:
            if "corresponds to no data" in str(error):
                raise self._empty_split(split) from error
            raise

    def _empty_split(self, split: str) -> ValueError:
        others = [name for name in self.splits if name != split and self.columns(name)]
        choice = f"choose another split ({', '.join(others)})" if others else "name another dataset"
        return ValueError(
            f"The split {split!r} of {self.name!r} is empty: no usable row in {', '.join(self.files[split][:3])}. "
            f"Add rows, or {choice}."
        )
