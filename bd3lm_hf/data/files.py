"""What the rows of a data set hold: text, a prompt and its completion, or the messages of a conversation.

Rows of local files, one by one: what can not be read is named by file and place, and skipped only on request.

Local files of text: plain, JSON, JSON lines, parquet and CSV, by split, read at once or while iterating.
"""

import codecs
import csv
import json
import logging
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, IterableDataset, Value, load_dataset
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher
from pyarrow.dataset import ParquetFragmentScanOptions


class Schema:
    """How a row becomes columns of strings, which `features` names.

    `columns` chooses the source's columns once for a data set, `read` takes a row of it.
    """

    names: ClassVar[tuple[str, ...]]

    @property
    def features(self) -> Features:
        """The columns that `read` gives, all of strings."""
        return Features({name: Value("string") for name in self.names})

    def resolved(self, found: Mapping[str, str], origin: str) -> "Schema":
        """This schema, checked against the columns of a data set.

        Args:
            found: the source's columns and what each holds ("string", "int64", ...).
            origin: name of the data set, for messages.

        Raises:
            ValueError: a column is missing or holds something else; the message lists the columns.
        """
        missing = [name for name in self.names if name not in found]
        if missing:
            raise ValueError(
                f"The data set {origin!r} has no column {missing[0]!r}; its columns are: {_listed(found)}."
            )
        return self

    def read(self, row: Mapping[str, Any]) -> dict[str, str]:
        """The row's strings.

        Raises:
            ValueError: it holds something else; the message is a predicate, such as "has no text (null)".
        """
        return {name: _string(row, name) for name in self.names}


class TextRow(Schema):
    """Documents.

    Args:
        column: where the text is; None looks for "text", then for the only column of strings.
    """

    names = ("text",)

    def __init__(self, column: str | None = None) -> None:
        self.column = column

    def resolved(self, found: Mapping[str, str], origin: str) -> "TextRow":
        strings = [name for name, kind in found.items() if kind in ("string", "large_string")]
        column = self.column
        if column is None:
            column = "text" if "text" in found else strings[0] if len(strings) == 1 else None
        if column is None:
            raise ValueError(
                f"Which column of {origin!r} holds the text? Set text_column; its columns are: {_listed(found)}."
            )
        if column not in found:
            raise ValueError(
                f"The data set {origin!r} has no column {column!r}; its columns are: {_listed(found)}. Set "
                "text_column."
            )
        if column not in strings and found[column] != "null":
            raise ValueError(
                f"The column {column!r} of {origin!r} holds {found[column]}, not text; its columns are: "
                f"{_listed(found)}."
            )
        return TextRow(column)

    def read(self, row: Mapping[str, Any]) -> dict[str, str]:
        return {"text": _string(row, self.column or "text")}


class PromptCompletion(Schema):
    """A prompt, which is given, and its completion, which is learned."""

    names = ("prompt", "completion")


class Messages(Schema):
    """A conversation: `messages` is a list of objects with `role` and `content`, kept as JSON."""

    names = ("messages",)

    def read(self, row: Mapping[str, Any]) -> dict[str, str]:
        given = row.get("messages")
        messages = given if isinstance(given, list) else []
        # A column of structs fills fields that a message lacks with null.
        whole = [
            {name: value for name, value in message.items() if value is not None}
            for message in messages
            if isinstance(message, dict)
        ]
        if not whole or len(whole) != len(messages) or not all("role" in m and "content" in m for m in whole):
            raise ValueError("has no list of messages with role and content in the column 'messages'")
        if not any(message["role"] == "assistant" for message in whole):
            raise ValueError("has no message of the role 'assistant', so nothing to learn")
        return {"messages": json.dumps(whole, ensure_ascii=False)}


#: Every schema by the name that users choose it by.
SCHEMAS: dict[str, type[Schema]] = {"text": TextRow, "prompt_completion": PromptCompletion, "messages": Messages}


def detect_schema(found: Mapping[str, str], origin: str) -> Schema:
    """The schema of a data set that has these columns: text, unless it has the columns of another one.

    Raises:
        ValueError: it has the columns of several.
    """
    fitting = [name for name, schema in SCHEMAS.items() if set(schema.names) <= set(found)]
    if len(fitting) > 1:
        raise ValueError(
            f"The columns of {origin!r} fit several formats ({', '.join(fitting)}); choose one with data_format. Its "
            f"columns are: {_listed(found)}."
        )
    return SCHEMAS[fitting[0]]() if fitting else TextRow()


def _string(row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    if isinstance(value, str):
        return value
    if value is None:
        raise ValueError("has no text (null)" if column == "text" else f"has no text (null) in the column {column!r}")
    raise ValueError(f"holds {type(value).__name__} in the column {column!r}, not text")


def _listed(found: Mapping[str, str]) -> str:
    return ", ".join(found) or "none at all"


logger = logging.getLogger(__name__)


_SHOWN = 5  # faults that a message names


_CHUNK = 1 << 20


_REMEDY = "repair the data, or skip such rows with skip_bad_rows=True."


class Row(NamedTuple):
    """One row of a file, or several rows that a fault takes along."""

    place: str  # "line 5" of text, counted from 1; "row 4", counted from 0
    content: dict[str, Any] | None  # None if it can not be read
    fault: str = ""  # why: a predicate, such as "is no row of JSON: ..."


class FaultyRow(NamedTuple):
    """A row that can not be used, and where it is."""

    file: str
    place: str
    fault: str

    def __str__(self) -> str:
        return f"{self.place.capitalize()} of {self.file!r} {self.fault}"


def read_rows(path: str | Path) -> Iterator[Row]:
    """All rows of a `.txt`, `.json`, `.jsonl`, `.parquet` or `.csv` file, those with a fault in their place."""
    path = Path(path)
    try:
        yield from _READERS[path.suffix.lower()](path)
    except UnicodeDecodeError:
        yield Row(
            f"byte {_first_undecodable_byte(path)}",
            None,
            "can not be decoded: the file is not UTF-8, convert it (for instance with iconv -t UTF-8)",
        )
    except (OSError, pa.ArrowException, csv.Error) as error:
        yield Row("the rest", None, f"can not be read: {error}")


def usable_rows(files: Sequence[str], schema: Schema, skip_bad_rows: bool) -> Iterator[dict[str, str]]:
    """The rows of the files, as the schema reads them.

    Raises:
        ValueError: a row that can not be read, or that is not what the schema asks for; the message names its file and
            place. With `skip_bad_rows` it is a warning.
    """
    for file in files:
        for row in _judged(file, schema):
            if not isinstance(row, FaultyRow):
                yield row
            elif skip_bad_rows:
                logger.warning("Skipped: %s.", row)
            else:
                raise row_error([row])


def faulty_rows(files: Iterable[str], schema: Schema) -> list[FaultyRow]:
    """All rows of the files that can not be used."""
    return [row for file in files for row in _judged(file, schema) if isinstance(row, FaultyRow)]


def first_row(files: Iterable[str]) -> dict[str, Any] | None:
    """The first row that can be read."""
    return next((row.content for file in files for row in read_rows(file) if row.content is not None), None)


def row_error(faults: Sequence[object]) -> ValueError:
    """The error for rows that can not be used."""
    shown = "; ".join(map(str, faults[:_SHOWN])) + (f"; and {len(faults) - _SHOWN} more" * (len(faults) > _SHOWN))
    return ValueError(f"{shown}: {_REMEDY}")


def _judged(file: str, schema: Schema) -> Iterator[dict[str, str] | FaultyRow]:
    for row in read_rows(file):
        if row.content is None:
            yield FaultyRow(file, row.place, row.fault)
            continue
        try:
            yield schema.read(row.content)
        except ValueError as error:
            yield FaultyRow(file, row.place, str(error))


def _text(path: Path) -> Iterator[Row]:
    yield Row("the text", {"text": path.read_text(encoding="utf-8")})


def _json_lines(path: Path) -> Iterator[Row]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            place = f"line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:  # not JSON, or not UTF-8
                yield Row(place, None, f"is no row of JSON: {error}")
            else:
                yield _object(place, row)


def _json(path: Path) -> Iterator[Row]:
    """A list of objects; objects line by line are read, too."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise
    except ValueError as error:
        rows = list(_json_lines(path))
        if any(row.content is not None for row in rows):
            yield from rows
        else:
            yield Row("the text", None, f"is no JSON: {error}")
        return
    for index, row in enumerate(content if isinstance(content, list) else [content]):
        yield _object(f"row {index}", row)


def _object(place: str, row: Any) -> Row:
    return Row(place, row) if isinstance(row, dict) else Row(place, None, "is no row of JSON: it holds no object")


def _parquet(path: Path) -> Iterator[Row]:
    """Row groups; a damaged page takes the rest of its group with it."""
    file = pq.ParquetFile(path, page_checksum_verification=True)
    index = 0
    for group in range(file.num_row_groups):
        end = index + file.metadata.row_group(group).num_rows
        try:
            for batch in file.iter_batches(batch_size=1000, row_groups=[group]):
                yield from _rows_of(batch, index)
                index += len(batch)
        except (OSError, pa.ArrowException) as error:
            place = f"rows {index} to {end - 1}" if index < end - 1 else f"row {index}"
            yield Row(place, None, f"can not be read: {error}")
            index = end


def _rows_of(batch: pa.RecordBatch, index: int) -> Iterator[Row]:
    """The rows of a batch whose first one has this index in its file."""
    try:
        batch.validate(full=True)  # parquet is read without decoding its text
    except pa.ArrowException as error:
        if len(batch) == 1:
            yield Row(f"row {index}", None, f"can not be read: {error}")
            return
        for place in range(len(batch)):
            yield from _rows_of(batch.slice(place, 1), index + place)
        return
    yield from (Row(f"row {index + place}", row) for place, row in enumerate(batch.to_pylist()))


def _csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    with path.open(encoding="utf-8", newline="") as lines:
        reader = csv.DictReader(lines)
        for row in reader:
            place, width = f"line {reader.line_num}", len(reader.fieldnames or ())
            if None in row or None in row.values():
                found = len(row[None]) + width if None in row else sum(value is not None for value in row.values())
                yield Row(place, None, f"has {found} fields, not {width}")
            else:
                yield Row(place, dict(row))


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


_READERS = {".txt": _text, ".json": _json, ".jsonl": _json_lines, ".parquet": _parquet, ".csv": _csv}


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
            raise row_error(faults) from error
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
        if faults := faulty_rows(files, TextRow()):
            raise row_error(faults)
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


__all__ = [
    "FaultyRow",
    "Messages",
    "PromptCompletion",
    "Row",
    "SCHEMAS",
    "Schema",
    "TextRow",
    "detect_schema",
    "faulty_rows",
    "first_row",
    "read_rows",
    "row_error",
    "usable_rows",
]
