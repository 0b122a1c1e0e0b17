"""Rows of local files, one by one: what can not be read is named by file and place, and skipped only on request."""

import codecs
import csv
import json
import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from bd3lm_hf.schemas import Schema


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
                raise refusal([row])


def faulty_rows(files: Iterable[str], schema: Schema) -> list[FaultyRow]:
    """All rows of the files that can not be used."""
    return [row for file in files for row in _judged(file, schema) if isinstance(row, FaultyRow)]


def first_row(files: Iterable[str]) -> dict[str, Any] | None:
    """The first row that can be read."""
    return next((row.content for file in files for row in read_rows(file) if row.content is not None), None)


def refusal(faults: Sequence[object]) -> ValueError:
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

__all__ = ["FaultyRow", "Row", "faulty_rows", "first_row", "read_rows", "refusal", "usable_rows"]
