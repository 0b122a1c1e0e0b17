import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bd3lm_hf.data.documents import load_text
from bd3lm_hf.data.files import PromptCompletion, TextRow, faulty_rows, first_row, read_rows, row_error, usable_rows


TEXTS = [f"text {i}" for i in range(40)]


def json_lines(path: Path, rows: list) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return path


def damaged_parquet(path: Path, group: int = 1, *, hidden: bool = False) -> Path:
    """Four groups of ten rows; a page of one of them is overwritten, with text if the damage is to be hidden."""
    options = {"row_group_size": 10, "use_dictionary": False, "write_page_checksum": True, "compression": "none"}
    pq.write_table(pa.table({"text": TEXTS}), path, **options)
    column = pq.ParquetFile(path).metadata.row_group(group).column(0)
    content = bytearray(path.read_bytes())
    end = column.data_page_offset + column.total_compressed_size
    content[end - 8 : end] = bytes(8) if hidden else b"\xff" * 8
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("ending", ["json", "jsonl", "csv", "parquet"])
def test_every_kind_of_file_gives_its_rows_with_their_places(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"rows.{ending}"
    rows = [{"id": str(i), "text": text} for i, text in enumerate(TEXTS)]
    if ending == "parquet":
        pq.write_table(pa.table({"id": [row["id"] for row in rows], "text": TEXTS}), path, row_group_size=7)
    elif ending == "csv":
        path.write_text("id,text\n" + "".join(f"{row['id']},{row['text']}\n" for row in rows))
    else:
        path.write_text(json.dumps(rows) if ending == "json" else "\n".join(map(json.dumps, rows)))
    found = list(read_rows(path))
    assert [row.content for row in found] == rows
    place = {"jsonl": "line 4", "csv": "line 5"}.get(ending, "row 3")
    assert found[3].place == place


def test_a_text_file_is_one_row_and_json_lines_in_a_json_file_are_rows(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    assert [row.content for row in read_rows(tmp_path / "a.txt")] == [{"text": "one\ntwo\n"}]
    rows = json_lines(tmp_path / "b.json", [{"text": "a"}, {"text": "b"}])
    assert [row.content for row in read_rows(rows)] == [{"text": "a"}, {"text": "b"}]
    assert first_row([str(rows)]) == {"text": "a"}


FAULTS = ['{"text": "broken', {"text": None}, {"text": 7}, {"other": "x"}, "[1]", {"text": "good"}]


def test_every_fault_of_a_line_is_named_with_file_and_line(tmp_path: Path) -> None:
    path = str(json_lines(tmp_path / "rows.jsonl", FAULTS))
    found = [str(row) for row in faulty_rows([path], TextRow())]
    reasons = (
        "is no row of JSON: Invalid control character",
        "has no text (null)",
        "holds int in the column 'text', not text",
        "has no text (null)",
        "is no row of JSON: it holds no object",
    )
    for line, (row, reason) in enumerate(zip(found, reasons, strict=True), start=1):
        assert row.startswith(f"Line {line} of {path!r} {reason}")


@pytest.mark.parametrize("streaming", [False, True])
def test_faulty_lines_are_refused_and_skipped_on_request(
    tmp_path: Path, streaming: bool, caplog: pytest.LogCaptureFixture
) -> None:
    path = json_lines(tmp_path / "train.jsonl", [{"text": "first"}, *FAULTS])
    json_lines(tmp_path / "validation.jsonl", [{"text": "x"}])
    with pytest.raises(ValueError, match=r"Line 2 of .*train\.jsonl' .*repair the data, or skip .*skip_bad_rows=True"):
        list(load_text(str(tmp_path), streaming=streaming))
    kept = load_text(str(tmp_path), streaming=streaming, skip_bad_rows=True)
    assert [row["text"] for row in kept] == ["first", "good"]
    if streaming:  # otherwise they were written to the cache by another process of the library, too
        assert f"Skipped: Line 4 of {str(path)!r} holds int in the column 'text', not text." in caplog.text


@pytest.mark.parametrize("streaming", [False, True])
def test_a_damaged_page_is_named_with_its_rows_and_skipped_on_request(tmp_path: Path, streaming: bool) -> None:
    damaged_parquet(tmp_path / "train.parquet")
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "validation.parquet")
    with pytest.raises(ValueError, match=r"Rows 10 to 19 of '.*train\.parquet' can not be read: .*skip_bad_rows"):
        list(load_text(str(tmp_path), streaming=streaming))
    kept = load_text(str(tmp_path), streaming=streaming, skip_bad_rows=True)
    assert [row["text"] for row in kept] == TEXTS[:10] + TEXTS[20:]


def test_damage_that_reads_as_text_is_found_by_the_checksum(tmp_path: Path) -> None:
    path = damaged_parquet(tmp_path / "rows.parquet", group=3, hidden=True)
    assert pq.read_table(path)["text"][39].as_py() != TEXTS[39]  # nobody else notices
    (fault,) = faulty_rows([str(path)], TextRow())
    assert str(fault).startswith(f"Rows 30 to 39 of {str(path)!r} can not be read: ")
    for streaming in (False, True):
        with pytest.raises(ValueError, match="Rows 30 to 39 of"):
            list(load_text(str(path), streaming=streaming))


def test_one_row_that_is_not_utf8_does_not_take_its_neighbours_along(tmp_path: Path) -> None:
    data = b"good" + b"b\xe9d" + b"fine"
    column = pa.StringArray.from_buffers(3, pa.array([0, 4, 7, 11], pa.int32()).buffers()[1], pa.py_buffer(data))
    pq.write_table(pa.table({"text": column}), tmp_path / "rows.parquet")
    rows = list(read_rows(tmp_path / "rows.parquet"))
    assert [row.content and row.content["text"] for row in rows] == ["good", None, "fine"]
    assert rows[1].place == "row 1"


@pytest.mark.parametrize("ending", ["parquet", "json", "txt", "csv"])
def test_a_file_that_is_no_use_at_all_is_skipped_with_the_others_left(tmp_path: Path, ending: str) -> None:
    for name in ("a", "b"):
        path = tmp_path / f"train-{ord(name)}.{ending}"
        if ending == "parquet":
            pq.write_table(pa.table({"text": [name]}), path)
        else:
            path.write_text({"json": f'[{{"text": "{name}"}}]', "csv": f"text,id\n{name},1\n", "txt": name}[ending])
    bad = tmp_path / f"train-0.{ending}"
    bad.write_bytes(b"[\xff\xfe{")
    reason = {"parquet": "The rest of .* can not be read: Parquet", "csv": "Byte 1 of .* can not be decoded"}
    with pytest.raises(ValueError, match=reason.get(ending, r"Byte 1 of '.*train-0")):
        list(load_text(str(tmp_path), split="train"))
    (tmp_path / f"validation.{ending}").write_bytes((tmp_path / f"train-97.{ending}").read_bytes())
    kept = load_text(str(tmp_path), skip_bad_rows=True)
    assert [row["text"] for row in kept] == ["a", "b"]


@pytest.mark.parametrize(("line", "fields"), [("1,2,3", 3), ("1", 1)])
def test_a_csv_line_of_another_width_is_named(tmp_path: Path, line: str, fields: int) -> None:
    (tmp_path / "rows.csv").write_text(f"id,text\n1,a\n{line}\n2,b\n")
    rows = list(read_rows(tmp_path / "rows.csv"))
    assert (rows[1].place, rows[1].fault) == ("line 3", f"has {fields} fields, not 2")
    assert rows[2].content == {"id": "2", "text": "b"}


def test_many_faults_are_counted_and_few_are_named() -> None:
    message = str(row_error([f"Row {i} is bad" for i in range(9)]))
    assert "Row 4 is bad; and 4 more: repair the data" in message
    assert "Row 5" not in message
    assert "more" not in str(row_error(["Row 0 is bad"]))


def test_rows_of_another_schema_are_judged_by_it(tmp_path: Path) -> None:
    path = str(
        json_lines(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": None}, {"prompt": "b", "completion": "c"}])
    )
    with pytest.raises(ValueError, match=r"Line 1 of .* has no text \(null\) in the column 'completion'"):
        list(usable_rows([path], PromptCompletion(), False))
    assert list(usable_rows([path], PromptCompletion(), True)) == [{"prompt": "b", "completion": "c"}]
