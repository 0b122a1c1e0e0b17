"""Local files of text: plain, JSON, JSON lines, parquet and CSV, by split, read at once or while iterating."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, IterableDataset, load_dataset
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher
from pyarrow.dataset import ParquetFragmentScanOptions

from bd3lm_hf.rows import faulty_rows, first_row, refusal, usable_rows
from bd3lm_hf.schemas import Schema, Text


#: File name ending -> builder of the datasets library.
BUILDERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
_OPTIONS: dict[str, dict[str, Any]] = {
    "text": {"sample_by": "document"},
    "csv": {"keep_default_na": False},  # the words "null" and "NA" are text
    "parquet": {"fragment_scan_options": ParquetFragmentScanOptions(page_checksum_verification=True)},
}
_SPLIT = re.compile(r"(train|validation|valid|val|dev|test)([-_.]?\d.*)?")
#: Part of every cache key: raise it when the meaning of a row changes.
_VERSION = 1


def exists(path: str) -> bool:
    """Whether the path is a file or folder here."""
    return Path(path).expanduser().exists()


def looks_like_path(name: str) -> bool:
    """Whether the name can only mean a local file or folder."""
    return name.startswith((".", "/", "~", "\\")) or Path(name).suffix.lower() in BUILDERS or name.count("/") > 1


def files_by_split(path: str, default_split: str) -> dict[str, list[str]]:
    """The files of a file or folder, by the split names that they bear.

    Args:
        default_split: split of the files whose names tell none.

    Raises:
        ValueError: no file of a known kind, several kinds at once, or files without a byte.
    """
    files = _sorted_files(Path(path).expanduser(), default_split)
    names = [name for group in files.values() for name in group]
    endings = {Path(name).suffix.lower() for name in names}
    if len({BUILDERS[ending] for ending in endings}) > 1:
        raise ValueError(
            f"The folder {path!r} holds files of several kinds ({', '.join(sorted(endings))}); keep one kind in it, "
            "or name a single file."
        )
    if not any(Path(name).stat().st_size for name in names):
        raise ValueError(f"The data set {path!r} is empty: its files hold no byte. Name another file.")
    return files


def load_files(files: Sequence[str], schema: Schema, *, cache_dir: str | None) -> Dataset:
    """All rows and columns of the files, read at once by the datasets library.

    Raises:
        ValueError: a file that can not be read; the message names it, and the row, line or byte.
    """
    builder = BUILDERS[Path(files[0]).suffix.lower()]
    try:
        options = _OPTIONS.get(builder, {})
        part = load_dataset(builder, data_files=list(files), split="train", cache_dir=cache_dir, **options)
        part.data.table.validate(full=True)  # JSON and parquet are read without decoding their text
    except (DatasetGenerationError, OSError, ValueError, pa.ArrowException) as error:
        if "corresponds to no data" in str(error):
            raise ValueError(f"{', '.join(files[:3])} is empty: it has no row. Name another file.") from error
        if faults := faulty_rows(files, schema):
            raise refusal(faults) from error
        reason = error.__cause__ or error
        raise ValueError(
            f"{', '.join(files[:3])} can not be read: {type(reason).__name__}: {reason}. Repair the file."
        ) from error
    return part


def load_usable_rows(files: Sequence[str], schema: Schema, *, skip_bad_rows: bool, cache_dir: str | None) -> Dataset:
    """The rows of the files in the schema's columns, read one by one.

    Raises:
        ValueError: as `usable_rows`.
    """
    states = [(file, Path(file).stat().st_size, Path(file).stat().st_mtime_ns) for file in files]
    key = (_VERSION, states, type(schema).__name__, vars(schema), skip_bad_rows)
    try:
        rows = Dataset.from_generator(
            usable_rows,
            features=schema.features,
            gen_kwargs={"files": list(files), "schema": schema, "skip_bad_rows": skip_bad_rows},
            cache_dir=cache_dir,
            fingerprint=Hasher.hash(key),
        )
    except DatasetGenerationError as error:
        raise error.__cause__ if isinstance(error.__cause__, ValueError) else error from None
    assert isinstance(rows, Dataset)
    return rows


def stream_rows(files: Sequence[str], schema: Schema, *, skip_bad_rows: bool) -> IterableDataset:
    """As `load_usable_rows`, read while iterating; every file is a shard."""
    return IterableDataset.from_generator(
        usable_rows,
        features=schema.features,
        gen_kwargs={"files": list(files), "schema": schema, "skip_bad_rows": skip_bad_rows},
    )


def columns_of(files: Sequence[str]) -> dict[str, str]:
    """The columns of the first row that can be read, and what each holds.

    Raises:
        ValueError: no row can be read.
    """
    row = first_row(files)
    if row is None:
        if faults := faulty_rows(files, Text()):
            raise refusal(faults)
        raise ValueError(f"{', '.join(files[:3])} is empty: it has no row. Name another file.")
    return {name: _kind(value) for name, value in row.items()}


def _kind(value: Any) -> str:
    try:
        return str(pa.array([value]).type)
    except pa.ArrowException:  # nested values of several kinds
        return type(value).__name__


def _sorted_files(path: Path, default_split: str) -> dict[str, list[str]]:
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
