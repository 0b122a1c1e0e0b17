"""Read the records of data files (text, JSON, CSV, parquet), each with its position, or a fault if it is unreadable.

One reader serves loading, streaming, error messages and `skip_bad_rows`, so they cannot disagree. It parses JSON and
CSV itself, because the readers of `datasets` reformat strings that look like times, fill short CSV rows, and lose a
whole file to one bad line.
"""

import codecs
import csv
import io
import itertools
import json
import logging
import lzma
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import pyarrow as pa
import pyarrow.parquet as pq

from bd3lm_hf.data.schemas import OBJECTS, RECORD_COLUMNS, Schema
from bd3lm_hf.data.sources import COMPRESSIONS, ENDINGS, data_ending
from bd3lm_hf.user_files import find_fault


logger = logging.getLogger(__name__)

_MAX_PROBED = 100  # records to read to find the columns of a file

# Byte order mark -> encoding; longer marks first, because a UTF-32 mark begins with that of UTF-16.
_WIDE_ENCODINGS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}

_NUL = "has a NUL byte: the file is binary, or UTF-16 without a byte order mark (iconv -f UTF-16LE -t UTF-8)"
_NOT_UTF8 = "cannot be decoded: the file is not UTF-8; convert it (for instance with iconv -t UTF-8)"


class Record(NamedTuple):
    """One record of a file, or a fault, which can cover several records."""

    position: str  # "line 5" of text, counted from 1; "row 4", counted from 0
    content: dict[str, Any] | None  # None if it cannot be read
    fault: str = ""  # a predicate, such as "is not JSON: ..."


def usable_rows(
    records: Iterable[Record], origin: str, schema: Schema, *, skip_bad_rows: bool
) -> Iterator[dict[str, str]]:
    """Yield the records as the schema reads them.

    Raises:
        ValueError: if a record cannot be read or does not follow the schema. With `skip_bad_rows` it is skipped
            instead, with a warning.
    """
    for record in records:
        fault = record.fault
        if record.content is not None:
            try:
                row = schema.read(record.content)
            except ValueError as error:
                fault = str(error)
            else:
                yield row
                continue
        fault = f"{record.position.capitalize()} of {origin} {fault}"
        if not skip_bad_rows:
            raise row_error(fault)
        logger.warning("Skipped: %s.", fault)


def row_error(fault: str) -> ValueError:
    """Return the error for a record that cannot be used."""
    return ValueError(f"{fault}: repair the data, or skip such rows with skip_bad_rows=True.")


def rows_of_files(files: Iterable[str], schema: Schema, skip_bad_rows: bool) -> Iterator[dict[str, str]]:
    """Yield the rows of data files, as [`usable_rows`] does."""
    for file in files:
        yield from usable_rows(read_records(file, schema.columns), repr(file), schema, skip_bad_rows=skip_bad_rows)


def read_records(path: str | Path, columns: Sequence[str] | None = None) -> Iterator[Record]:
    """Yield all records of a data file, with faults in place of unreadable ones.

    Args:
        columns: columns to read, or None for all. Only parquet files can skip the others.
    """
    ending = data_ending(path)
    try:
        if fault := find_fault(path):
            yield Record("the text", None, fault)
            return
        if ending == ".parquet":
            yield from _parquet(path, columns)
            return
        with _open(Path(path)) as file:
            yield from _READERS[ENDINGS[ending]](file, ending)
    except (OSError, EOFError, UnicodeError, lzma.LZMAError, pa.ArrowException, csv.Error) as error:
        yield Record("the rest", None, f"cannot be read: {error}")


def _open(path: Path) -> BinaryIO:
    """Open a file as UTF-8, decompressed by its last ending and decoded by its byte order mark.

    Arrow supports all compressions but xz without further packages.
    """
    ending = path.suffix.lower()
    if ending == ".xz":
        file: Any = lzma.open(path)  # noqa: SIM115  (the caller closes it)
    else:
        file = io.BufferedReader(pa.input_stream(path, compression=COMPRESSIONS.get(ending)))
    start = file.peek(4)
    for mark, encoding in _WIDE_ENCODINGS.items():
        if start.startswith(mark):  # exported by a spreadsheet, so the file is small
            return io.BytesIO(file.read().decode(encoding).encode("utf-8"))
    return cast(BinaryIO, file)


def columns_of(path: str | Path) -> dict[str, str]:
    """Return the columns of a data file and the kind of each; empty if no record can be read."""
    if data_ending(path) == ".parquet":
        try:
            return kinds_of(pq.read_schema(path))
        except (OSError, UnicodeError, pa.ArrowException):
            return {}
    found: dict[str, str] = {}
    for record in itertools.islice(read_records(path), _MAX_PROBED):
        for name, value in (record.content or {}).items():
            # The first value that is not null decides, unless any is text: then the others are faults.
            kind = _kind(value)
            if kind == "string" or found.get(name, "null") == "null":
                found[name] = kind
    return found


def kinds_of(schema: pa.Schema) -> dict[str, str]:
    """Return the columns of an Arrow schema and the kind of each."""
    return {field.name: _arrow_kind(field.type) for field in schema}


def _arrow_kind(kind: pa.DataType) -> str:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return "string"
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    return OBJECTS if is_list and pa.types.is_struct(kind.value_type) else str(kind)


def _kind(value: Any) -> str:
    if value is None or value == []:
        return "null"
    if isinstance(value, list) and isinstance(value[0], dict):
        return OBJECTS
    return "string" if isinstance(value, str) else type(value).__name__


def _text(file: BinaryIO, _: str) -> Iterator[Record]:
    content = file.read()
    try:
        text = content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        yield Record(f"byte {error.start}", None, _NOT_UTF8)
    else:
        if "\0" in text:
            yield Record("the text", None, _NUL)
        else:
            yield Record("the text", {"text": text.replace("\r\n", "\n").replace("\r", "\n")})


def _json(file: BinaryIO, ending: str) -> Iterator[Record]:
    """Yield records line by line, or those of one document (a list of records, or an object that contains one)."""
    head: list[bytes] = []
    filled = 0  # lines that are not blank; two of them show the layout
    while filled < 2 and (line := file.readline()):
        line = line if head else line.removeprefix(codecs.BOM_UTF8)
        head.append(line)
        filled += bool(line.strip())
    lines = itertools.chain(head, file)
    begins_list = b"".join(head).lstrip().startswith(b"[")
    if filled == 2 and not begins_list and any(_json_line("", line).content for line in head):
        yield from _json_lines(lines)
        return
    content = list(lines)  # a document must be parsed as a whole
    if not any(line.strip() for line in content):
        return
    try:
        document = json.loads(b"".join(content).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        records = list(_json_lines(content))
        if any(record.content is not None for record in records):
            yield from records
        elif isinstance(error, UnicodeDecodeError):
            yield Record(f"byte {error.start}", None, _NOT_UTF8)
        else:
            yield Record("the text", None, f"is not JSON: {error}")
    else:
        yield from _document(document, expand=ending == ".json")


def _document(document: Any, *, expand: bool) -> Iterator[Record]:
    if isinstance(document, dict) and expand and not RECORD_COLUMNS & set(document):
        lists = [name for name, value in document.items() if _kind(value) == OBJECTS]
        if len(lists) > 1:
            yield Record("the text", None, f"has several lists of records ({', '.join(lists)}): keep one of them")
            return
        document = document[lists[0]] if lists else document
    for index, value in enumerate(document if isinstance(document, list) else [document]):
        yield _object(f"row {index}", value)


def _json_lines(lines: Iterable[bytes]) -> Iterator[Record]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield _json_line(f"line {number}", line)


def _json_line(position: str, line: bytes) -> Record:
    try:
        return _object(position, json.loads(line.decode("utf-8")))
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested too deeply
        return Record(position, None, f"is not JSON: {error}")


def _object(position: str, value: Any) -> Record:
    if isinstance(value, dict):
        return Record(position, value)
    return Record(position, None, f"is not a JSON object, but {type(value).__name__}")


def _csv(file: BinaryIO, ending: str) -> Iterator[Record]:
    """Yield the rows below the header; the delimiter is the one that gives the header most columns."""
    # Many documents are longer than the default limit of 128 kB. This is the largest limit on Windows.
    csv.field_size_limit(2**31 - 1)
    marks = "\t,;|" if ending == ".tsv" else ",;\t|"
    # A byte that is not UTF-8 becomes a lone surrogate, so only its own row is faulty.
    with io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        header = lines.readline()
        if "\0" in header:
            yield Record("the header", None, _NUL)
            return
        delimiter = max(marks, key=lambda mark: len(next(csv.reader([header], delimiter=mark), [])))
        # Unless strict, an unclosed quotation mark would swallow all later rows.
        reader = csv.DictReader(itertools.chain([header], lines), delimiter=delimiter, strict=True)
        names = Counter(name for name in reader.fieldnames or () if name)
        if repeated := [name for name, count in names.items() if count > 1]:
            yield Record("the header", None, f"has several columns {repeated[0]!r}: keep one of them")
            return
        yield from _csv_rows(reader)


def _csv_rows(reader: csv.DictReader) -> Iterator[Record]:
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Record(f"line {reader.reader.line_num}", None, f"is not CSV: {error}")
            continue
        position, width = f"line {reader.line_num}", len(reader.fieldnames or ())
        if None in row or None in row.values():
            num_fields = width + len(row.get(None) or ()) - sum(value is None for value in row.values())
            yield Record(position, None, f"has {num_fields} fields, not {width}")
        elif any("\0" in value for value in row.values()):
            yield Record(position, None, _NUL)
        else:
            yield Record(position, dict(row))


def _parquet(path: str | Path, columns: Sequence[str] | None) -> Iterator[Record]:
    """Yield rows by row group; after a damaged page, the rest of its group is lost."""
    file = pq.ParquetFile(path, page_checksum_verification=True)
    index = 0
    for group in range(file.num_row_groups):
        end = index + file.metadata.row_group(group).num_rows
        try:
            for batch in file.iter_batches(batch_size=1000, row_groups=[group], columns=columns):
                yield from _records_of(batch, index)
                index += len(batch)
        except (OSError, pa.ArrowException) as error:
            position = f"rows {index} to {end - 1}" if index < end - 1 else f"row {index}"
            yield Record(position, None, f"cannot be read: {error}")
            index = end


def _records_of(batch: pa.RecordBatch, index: int) -> Iterator[Record]:
    """Yield the rows of a batch; `index` is that of its first row in the file."""
    try:
        batch.validate(full=True)  # reading parquet does not check that its text is UTF-8
    except pa.ArrowException as error:
        if len(batch) == 1:
            yield Record(f"row {index}", None, f"cannot be read: {error}")
            return
        for offset in range(len(batch)):
            yield from _records_of(batch.slice(offset, 1), index + offset)
        return
    yield from (Record(f"row {index + offset}", row) for offset, row in enumerate(batch.to_pylist()))


_READERS: dict[str, Callable[[BinaryIO, str], Iterator[Record]]] = {"text": _text, "json": _json, "csv": _csv}
