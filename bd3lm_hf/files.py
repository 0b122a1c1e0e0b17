"""Local files of text: plain, JSON, JSON lines, parquet and CSV; a fault is named by file and place."""

import codecs
import json
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher


logger = logging.getLogger(__name__)

#: File name ending -> builder of the datasets library.
BUILDERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
_OPTIONS: dict[str, dict[str, Any]] = {
    "text": {"sample_by": "document"},
    "csv": {"keep_default_na": False},  # the words "null" and "NA" are text
}
_SPLIT = re.compile(r"(train|validation|valid|val|dev|test)([-_.]?\d.*)?")
_CHUNK = 1 << 20


def exists(path: str) -> bool:
    """Whether the path is a file or folder here."""
    return Path(path).expanduser().exists()


def looks_like_path(name: str) -> bool:
    """Whether the name can only mean a local file or folder."""
    return name.startswith((".", "/", "~", "\\")) or Path(name).suffix.lower() in BUILDERS or name.count("/") > 1


def load_files(
    path: str, *, default_split: str, streaming: bool, skip_bad_rows: bool, cache_dir: str | None
) -> Mapping[str, Any]:
    """The data sets in a file or folder, by the split names that the files bear.

    Args:
        default_split: split of the files whose names tell none.
        streaming: read while iterating; faults then show when they are met, in the words of the datasets library.
        skip_bad_rows: leave out rows of `.jsonl` files that are not JSON objects, with a warning (not of a stream).

    Raises:
        ValueError: no file of a known kind, several kinds at once, or a file that can not be read; the message names
            the file, and where it can the byte or line.
    """
    files = _files_by_split(Path(path).expanduser(), default_split)
    names = [name for group in files.values() for name in group]
    endings = {Path(name).suffix.lower() for name in names}
    builders = {BUILDERS[ending] for ending in endings}
    if len(builders) > 1:
        raise ValueError(
            f"The folder {path!r} holds files of several kinds ({', '.join(sorted(endings))}); keep one kind in it, "
            "or name a single file."
        )
    if not any(Path(name).stat().st_size for name in names):
        raise ValueError(f"The data set {path!r} is empty: its files hold no byte. Name another file.")
    if skip_bad_rows and endings == {".jsonl"} and not streaming:
        return {split: _good_rows(group, cache_dir) for split, group in files.items()}
    builder = builders.pop()
    try:
        parts = load_dataset(
            builder, data_files=files, streaming=streaming, cache_dir=cache_dir, **_OPTIONS.get(builder, {})
        )
        for part in parts.values():
            if isinstance(part, Dataset):  # JSON and parquet are read without decoding their text
                part.data.table.validate(full=True)
    except (DatasetGenerationError, OSError, ValueError, pa.ArrowException) as error:
        if "corresponds to no data" in str(error):
            raise ValueError(
                f"The data set {path!r} is empty: a split of it has no row. Name another file."
            ) from error
        raise _diagnosis(names, error) from error
    return parts


def _files_by_split(path: Path, default_split: str) -> dict[str, list[str]]:
    if path.is_file():
        if path.suffix.lower() not in BUILDERS:
            raise ValueError(
                f"The file {str(path)!r} is of no known kind; its name must end in one of: {', '.join(BUILDERS)}."
            )
        return {default_split: [str(path)]}
    found = sorted(file for file in path.rglob("*") if file.suffix.lower() in BUILDERS and file.is_file())
    if not found:
        raise ValueError(f"The folder {str(path)!r} holds no file that ends in one of: {', '.join(BUILDERS)}.")
    files: dict[str, list[str]] = {}
    for file in found:
        relative = file.relative_to(path)
        matches = (_SPLIT.fullmatch(part.lower()) for part in (relative.stem, *relative.parts[:-1]))
        split = next((match[1] for match in matches if match), default_split)
        files.setdefault(split, []).append(str(file))
    return files


def _good_rows(files: list[str], cache_dir: str | None) -> Dataset:
    states = [(file, Path(file).stat().st_size, Path(file).stat().st_mtime_ns) for file in files]
    rows = Dataset.from_generator(
        _json_rows, gen_kwargs={"files": list(files)}, cache_dir=cache_dir, fingerprint=Hasher.hash(states)
    )
    assert isinstance(rows, Dataset)
    return rows


def _json_rows(files: list[str]) -> Iterator[dict[str, Any]]:
    """The rows that are JSON objects."""
    for file in files:
        with open(file, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    row = json.loads(line) if line.strip() else None
                except ValueError as error:  # not JSON, or not UTF-8
                    logger.warning("Skipped line %d of %s: %s", number, file, error)
                    continue
                if isinstance(row, dict):
                    yield row
                elif row is not None:
                    logger.warning("Skipped line %d of %s: it holds no object.", number, file)


def _diagnosis(files: list[str], error: Exception) -> ValueError:
    """What is wrong with the files that could not be read: the first fault that can be found."""
    for file in files:
        fault = _fault(Path(file))
        if fault:
            return ValueError(fault)
    reason = error.__cause__ or error
    return ValueError(f"{', '.join(files[:3])} can not be read: {type(reason).__name__}: {reason}. Repair the file.")


def _fault(path: Path) -> str | None:
    ending = path.suffix.lower()
    try:
        if ending == ".parquet":
            pq.read_table(path)
            return None
        offset = _first_undecodable_byte(path)
    except (OSError, pa.ArrowException) as error:
        return f"The file {str(path)!r} can not be read: {error}. Repair or replace it."
    if offset is not None:
        return (
            f"The file {str(path)!r} is not UTF-8: byte {offset} can not be decoded. Convert the file (for instance "
            "with iconv -t UTF-8), or repair that place."
        )
    return _json_fault(path) if ending == ".jsonl" else None


def _first_undecodable_byte(path: Path) -> int | None:
    decoder = codecs.getincrementaldecoder("utf-8")()
    read = 0
    with path.open("rb") as file:
        while True:
            chunk = file.read(_CHUNK)
            waiting = len(decoder.getstate()[0])  # bytes of a character that the last chunk cut
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                return read - waiting + error.start
            if not chunk:
                return None
            read += len(chunk)


def _json_fault(path: Path) -> str | None:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                fault = None if not line.strip() or isinstance(json.loads(line), dict) else "it holds no object"
            except ValueError as error:
                fault = str(error)
            if fault:
                return (
                    f"Line {number} of {str(path)!r} is no row of JSON: {fault}. Repair the line, or skip it with "
                    "skip_bad_rows=True."
                )
    return None
