import bz2
import codecs
import csv
import datetime
import gzip
import json
import lzma
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bd3lm_hf.data.documents import load_rows, load_text
from bd3lm_hf.data.records import columns_of, read_records, rows_of_files
from bd3lm_hf.data.schemas import OBJECTS, PromptCompletion


TEXTS = [f"text {i}" for i in range(40)]
ROWS = [{"id": str(i), "text": text} for i, text in enumerate(TEXTS)]
COMPRESS = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "ZST": lambda content: pa.Codec("zstd").compress(content, asbytes=True),
}


def json_lines(path: Path, rows: list) -> Path:
    """Write rows as JSON, but strings as they are."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return path


def contents(path: Path) -> list:
    return [record.content for record in read_records(path)]


def loaded(folder: Path, **settings) -> list[str]:
    """Texts of the training split, the same with and without streaming."""
    loads = (load_text(str(folder), streaming=streaming, **settings) for streaming in (False, True))
    whole, streamed = ([row["text"] for row in dataset] for dataset in loads)
    assert whole == streamed
    return whole


def refused(folder: Path, message: str) -> None:
    for streaming in (False, True):
        with pytest.raises(ValueError, match=message):
            list(load_text(str(folder), streaming=streaming))


def damaged_parquet(path: Path, group: int = 1, *, hidden: bool = False) -> Path:
    """Four groups of ten rows with one page overwritten, by valid text if the damage is to be hidden."""
    options = {"row_group_size": 10, "use_dictionary": False, "write_page_checksum": True, "compression": "none"}
    pq.write_table(pa.table({"text": TEXTS}), path, **options)
    column = pq.ParquetFile(path).metadata.row_group(group).column(0)
    content = bytearray(path.read_bytes())
    end = column.data_page_offset + column.total_compressed_size
    content[end - 8 : end] = bytes(8) if hidden else b"\xff" * 8
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("ending", ["json", "jsonl", "ndjson", "csv", "tsv", "parquet"])
@pytest.mark.parametrize("compression", [None, "gz", "bz2", "xz", "ZST"])
def test_every_format_yields_its_rows_with_their_positions(tmp_path: Path, ending: str, compression) -> None:
    path = tmp_path / f"rows.{ending}"
    if ending == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=7)
    elif ending in ("csv", "tsv"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["id", "text"], delimiter=",\t"[ending == "tsv"])
            writer.writeheader()
            writer.writerows(ROWS)
    else:
        path.write_text(json.dumps(ROWS) if ending == "json" else "\n".join(map(json.dumps, ROWS)))
    if compression is not None:
        if ending == "parquet":
            pytest.skip("parquet compresses its own pages")
        path = path.with_name(f"{path.name}.{compression}")
        path.write_bytes(COMPRESS[compression](path.with_suffix("").read_bytes()))
    found = list(read_records(path))
    assert [record.content for record in found] == ROWS
    position = {"json": "row 3", "parquet": "row 3", "csv": "line 5", "tsv": "line 5"}.get(ending, "line 4")
    assert found[3].position == position


@pytest.mark.parametrize("ending", ["txt", "md"])
def test_a_text_file_is_one_record_without_mark_or_windows_line_ends(tmp_path: Path, ending: str) -> None:
    (tmp_path / f"a.{ending}").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    assert contents(tmp_path / f"a.{ending}") == [{"text": "one\ntwo\nthree\n"}]


DOCUMENTS = [
    '{"text": "a"}\n{"text": "b"}\n',
    '\ufeff{"text": "a"}\r\n\r\n   \n{"text": "b"}',
    '[{"text": "a"}, {"text": "b"}]',
    '[\n{"text": "a"},\n{"text": "b"}\n]',
    '\ufeff\n{"version": 1, "data": [{"text": "a"}, {"text": "b"}]}',
    '{\n "version": {"major": 1},\n "rows": [\n  {"text": "a"},\n  {"text": "b"}\n ]\n}\n',
]


@pytest.mark.parametrize("content", DOCUMENTS)
def test_json_has_records_by_line_in_a_list_or_inside_a_field(tmp_path: Path, content: str) -> None:
    (tmp_path / "b.json").write_text(content, "utf-8")
    assert contents(tmp_path / "b.json") == [{"text": "a"}, {"text": "b"}]


def test_a_record_that_contains_a_list_is_one_record(tmp_path: Path) -> None:
    record = {"messages": [{"role": "user", "content": "a"}], "id": 1}
    (tmp_path / "one.json").write_text(json.dumps(record, indent=1))
    assert contents(tmp_path / "one.json") == [record]
    line = {"id": 1, "tags": [{"name": "a"}]}
    assert contents(json_lines(tmp_path / "one.jsonl", [line])) == [line]
    (tmp_path / "two.json").write_text(json.dumps({"a": [{"x": 1}], "b": [{"x": 1}]}))
    (fault,) = read_records(tmp_path / "two.json")
    assert "(a, b)" in fault.fault


@pytest.mark.parametrize(
    "content", ["id;text\n1;a, b\n", "id\ttext\n1\ta, b\n", "id|text\r\n1|a, b\r\n", '\ufeffid,text\n\n1,"a, b"\n']
)
def test_the_separator_of_a_csv_file_is_found(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.csv").write_bytes(content.encode())
    assert contents(tmp_path / "a.csv") == [{"id": "1", "text": "a, b"}]


def test_a_csv_file_of_one_column_and_words_for_null_are_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\nnull\nNA\n12\n2020-01-01\n")
    assert [row["text"] for row in contents(tmp_path / "a.csv")] == ["null", "NA", "12", "2020-01-01"]


def test_text_that_looks_like_a_time_is_kept_whatever_the_other_columns_are(tmp_path: Path) -> None:
    texts = ["2020-01-01T00:00:00", "2021-02-03 04:05:06"]
    others = [1, {"a": [None, "x"]}]
    rows = [{"text": text, "other": other} for text, other in zip(texts, others, strict=True)]
    json_lines(tmp_path / "train.jsonl", rows)
    json_lines(tmp_path / "dev.jsonl", [{"text": "x"}])
    assert loaded(tmp_path) == texts


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]
)
def test_every_column_of_strings_is_text_and_times_next_to_it_are_left_alone(tmp_path: Path, kind) -> None:
    times = pa.array([1, 2], pa.timestamp("ns"))  # not representable as Python's times
    pq.write_table(pa.table({"text": pa.array(["a", "b"]).cast(kind), "time": times}), tmp_path / "train.parquet")
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "dev.parquet")
    assert loaded(tmp_path) == ["a", "b"]
    pq.write_table(pa.table({"text": [datetime.datetime(2020, 1, 1)]}), tmp_path / "train.parquet")
    refused(tmp_path, r"'text' .* timestamp\[us\]")


def test_columns_are_those_of_the_first_records_and_of_text_if_any_is(tmp_path: Path) -> None:
    rows = [{"text": 1}, {"text": "a", "n": 1}, {"text": "b", "m": [{"role": "user"}], "tags": ["x"]}]
    found = columns_of(json_lines(tmp_path / "a.jsonl", rows))
    assert found == {"text": "string", "n": "int", "m": OBJECTS, "tags": "list"}
    pq.write_table(pa.Table.from_pylist(rows[1:]), tmp_path / "a.parquet")
    assert columns_of(tmp_path / "a.parquet") == {"text": "string", "n": "int64"}


# Faults


FAULTS = {
    2: ('{"text": "broken', "JSON: Invalid control character"),
    3: ({"text": None}, "null"),
    5: ({"text": 7}, "int in the column 'text'"),
    6: ({"other": "x"}, "null"),
    7: ("[1]", "list"),
    8: ('{"text": "\\ud800"}', "surrogate '\\ud800'"),
    9: ('{"text": ' + 100_000 * "[", "recursion"),
}
BAD = [fault for fault, _ in FAULTS.values()]
LINES = [{"text": "first"}, *BAD[:2], "", *BAD[2:], {"text": "good"}]


def test_every_fault_of_a_line_is_named_with_file_and_line_and_skipped_on_request(tmp_path: Path, caplog) -> None:
    path = json_lines(tmp_path / "train.jsonl", LINES)
    content = path.read_bytes().replace(b"first", b"first\xe9", 1)
    path.write_bytes(content)
    json_lines(tmp_path / "validation.jsonl", [{"text": "x"}])
    refused(tmp_path, r"Line 1 of .*train\.jsonl'.*skip_bad_rows=True")
    assert loaded(tmp_path, skip_bad_rows=True) == ["good"]
    for line, reason in ((1, ""), *((n, why) for n, (_, why) in FAULTS.items())):
        assert re.search(rf"Skipped: Line {line} of {re.escape(repr(str(path)))} .*{re.escape(reason)}", caplog.text)


def test_a_document_that_is_nested_too_deeply_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(100_000 * "[" + 100_000 * "]")
    refused(tmp_path / "rows.json", "not JSON: .*recursion")


@pytest.mark.parametrize("ending", ["txt", "json"])
@pytest.mark.parametrize("offset", [30, (1 << 20) + 4321])
def test_a_document_that_is_not_utf8_is_named_with_the_byte(tmp_path: Path, ending: str, offset: int) -> None:
    content = bytearray(json.dumps([{"text": "text, " * 30_000}] * 8).encode())
    content[offset] = 0xE9
    (tmp_path / f"latin.{ending}").write_bytes(content)
    refused_with = rf"Byte {offset} of '.*latin\.{ending}' .*UTF-8.*iconv"
    with pytest.raises(ValueError, match=refused_with):
        load_text(str(tmp_path / f"latin.{ending}"))


def test_a_byte_that_is_not_utf8_is_a_fault_of_its_row_only(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_bytes(b"id,text\n1,good\n2,b\xe9d\n\xe9,fine\n")
    (tmp_path / "dev.csv").write_text("text,\nx,\n")
    refused(tmp_path, r"Line 3 of .*'text'")
    assert loaded(tmp_path, skip_bad_rows=True) == ["good", "fine"]  # the other column is not read
    data = b"good" + b"b\xe9d" + b"fine"
    column = pa.StringArray.from_buffers(3, pa.array([0, 4, 7, 11], pa.int32()).buffers()[1], pa.py_buffer(data))
    pq.write_table(pa.table({"text": column}), tmp_path / "rows.parquet")
    records = list(read_records(tmp_path / "rows.parquet"))
    assert [record.content and record.content["text"] for record in records] == ["good", None, "fine"]
    assert records[1].position == "row 1"


@pytest.mark.parametrize(
    ("line", "fault"), [("1,2,3", "3 fields, not 2"), ("1", "1 fields, not 2"), ('1,"b" c', "CSV")]
)
def test_a_malformed_csv_line_is_named_and_others_are_read(tmp_path: Path, line: str, fault: str) -> None:
    (tmp_path / "rows.csv").write_text(f"id,text\n1,a\n{line}\n2,b\n")
    records = list(read_records(tmp_path / "rows.csv"))
    assert records[1].position == "line 3" and fault in records[1].fault
    assert records[2].content == {"id": "2", "text": "b"}


def test_two_columns_of_one_name_and_a_quotation_mark_without_end_are_faults(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text,id,text\na,1,b\n")
    [record] = read_records(tmp_path / "rows.csv")
    assert record.content is None and "several columns 'text'" in record.fault
    (tmp_path / "rows.csv").write_text('id,text\n1,a\n2,"b\n3,c\n')
    records = list(read_records(tmp_path / "rows.csv"))
    assert [bool(record.content) for record in records] == [True, False]


def test_a_damaged_page_is_named_with_its_rows_and_skipped_on_request(tmp_path: Path) -> None:
    damaged_parquet(tmp_path / "train.parquet")
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "validation.parquet")
    refused(tmp_path, r"Rows 10 to 19 of '.*train\.parquet'.*skip_bad_rows")
    assert loaded(tmp_path, skip_bad_rows=True) == TEXTS[:10] + TEXTS[20:]


def test_damage_that_reads_as_text_is_found_by_the_checksum(tmp_path: Path) -> None:
    path = damaged_parquet(tmp_path / "rows.parquet", group=3, hidden=True)
    assert pq.read_table(path)["text"][39].as_py() != TEXTS[39]  # nothing else detects it
    refused(path, "Rows 30 to 39 of")


def test_a_damaged_column_name_is_named_with_its_file(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": TEXTS}), tmp_path / "rows.parquet")
    content = (tmp_path / "rows.parquet").read_bytes()
    (tmp_path / "rows.parquet").write_bytes(content.replace(b"body", b"b\xdbdy"))
    refused(tmp_path / "rows.parquet", "The rest of .*rows.parquet' cannot be read")


@pytest.mark.parametrize("ending", ["parquet", "json", "txt", "jsonl.gz"])
def test_an_unreadable_file_is_skipped_and_the_others_read(tmp_path: Path, ending: str) -> None:
    for name, target in (("a", "train-1"), ("b", "train-2"), ("x", "validation")):
        path = tmp_path / f"{target}.{ending}"
        row = json.dumps({"text": name})
        if ending == "parquet":
            pq.write_table(pa.table({"text": [name]}), path)
        elif ending == "jsonl.gz":
            path.write_bytes(gzip.compress(row.encode()))
        else:
            path.write_text(name if ending == "txt" else f"[{row}]")
    (tmp_path / f"train-0.{ending}").write_bytes(b"[\xff\xfe{")
    refused(tmp_path, "(Byte 1|The rest) of '.*train-0")
    assert loaded(tmp_path, skip_bad_rows=True) == ["a", "b"]


def test_a_compressed_file_that_breaks_off_keeps_its_first_rows(tmp_path: Path) -> None:
    content = gzip.compress(b"".join(json.dumps({"text": f"{i} {i * i}" * 50}).encode() + b"\n" for i in range(2000)))
    (tmp_path / "train.jsonl.gz").write_bytes(content[: len(content) * 3 // 4])
    (tmp_path / "dev.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}'))
    refused(tmp_path, "The rest of|Line")
    assert 500 < len(loaded(tmp_path, skip_bad_rows=True)) < 2000


def test_a_file_whose_rows_are_all_faulty_is_empty_when_they_are_skipped(tmp_path: Path) -> None:
    json_lines(tmp_path / "train.jsonl", [{"text": None}])
    json_lines(tmp_path / "dev.jsonl", [{"text": "x"}])
    refused(tmp_path, "null")
    with pytest.raises(ValueError, match=r"'train' .*train\.jsonl.*\(validation\)"):
        load_text(str(tmp_path), skip_bad_rows=True)


def test_rows_of_another_schema_are_checked_by_it(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": None}, {"prompt": "b", "completion": "c"}]
    path = str(json_lines(tmp_path / "train.jsonl", rows))
    with pytest.raises(ValueError, match="Line 1 of .*null.*'completion'"):
        list(rows_of_files([path], PromptCompletion(), skip_bad_rows=False))
    json_lines(tmp_path / "dev.jsonl", rows[1:])
    assert load_rows(str(tmp_path), PromptCompletion(), skip_bad_rows=True).to_list() == rows[1:]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.tsv", "a.jsonl", "a.json", "a.csv.gz", "a.jsonl.xz"])
def test_a_byte_order_mark_determines_the_encoding(tmp_path: Path, name: str, encoding: str) -> None:
    rows = [{"text": "naïve", "id": "1"}, {"text": "café", "id": "2"}]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    content = {"txt": "naïve\n", "csv": "text,id\nnaïve,1\ncafé,2\n", "tsv": "text\tid\nnaïve\t1\ncafé\t2\n"}
    content |= {"jsonl": lines, "json": json.dumps(rows)}
    _, ending, *compression = name.split(".")
    path = tmp_path / name
    compress = COMPRESS[compression[0]] if compression else bytes
    path.write_bytes(compress(content[ending].encode(encoding)))
    assert contents(path) == ([{"text": "naïve\n"}] if ending == "txt" else rows)


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.tsv"])
def test_binary_files_and_utf_16_without_its_mark_are_not_text(tmp_path: Path, name: str) -> None:
    for content in ("text\tid\nabc\t1\n".encode("utf-16-le"), b"PK\x03\x04" + bytes(80), b"text\nab\0c\n"):
        (tmp_path / name).write_bytes(content)
        refused(tmp_path, "NUL.*iconv")
    (tmp_path / name).write_bytes(codecs.BOM_UTF16_LE + b"a")  # half a character
    refused(tmp_path, "cannot be read")
