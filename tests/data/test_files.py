import json
from pathlib import Path

import pytest
from datasets import Dataset

from bd3lm_hf.data.documents import load_text


TEXTS = [f"document {i}: naïve" for i in range(40)]


def write(path: Path, texts: list[str] = TEXTS) -> Path:
    """The texts in the file's own format, one row each, in the column `text`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = Dataset.from_dict({"id": range(len(texts)), "text": texts})
    if path.suffix == ".parquet":
        table.to_parquet(path)
    elif path.suffix == ".csv":
        table.to_csv(path)
    elif path.suffix == ".txt":
        path.write_text("\n".join(texts), encoding="utf-8")
    else:
        rows = [{"id": i, "text": text} for i, text in enumerate(texts)]
        lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        path.write_text(lines if path.suffix == ".jsonl" else json.dumps(rows), encoding="utf-8")
    return path


def texts_of(path: Path, split: str = "train", **settings) -> list[str]:
    return [row["text"] for row in load_text(str(path), split=split, **settings)]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("ending", ["json", "jsonl", "parquet", "csv"])
def test_files_of_rows_are_read_and_split_by_document(tmp_path: Path, ending: str, streaming: bool) -> None:
    path = write(tmp_path / f"data.{ending}")
    found = [texts_of(path, split, streaming=streaming) for split in ("train", "validation", "test")]
    assert sorted(text for part in found for text in part) == sorted(TEXTS)
    assert len(found[0]) > 30


def test_a_text_file_is_one_document_cut_into_three(tmp_path: Path) -> None:
    path = write(tmp_path / "book.txt")
    pieces = [texts_of(path, split) for split in ("train", "validation", "test")]
    assert [len(piece) for piece in pieces] == [1, 1, 1]
    assert "".join(piece[0] for piece in pieces) == path.read_text(encoding="utf-8")


def test_a_folder_of_text_files_is_one_document_a_file(tmp_path: Path) -> None:
    for i, text in enumerate(TEXTS):
        write(tmp_path / f"part {i}.txt", [text, "second line"])
    found = [text for split in ("train", "validation", "test") for text in texts_of(tmp_path, split)]
    assert sorted(found) == sorted(f"{text}\nsecond line" for text in TEXTS)


def test_files_named_after_a_split_hold_it(tmp_path: Path) -> None:
    write(tmp_path / "rows" / "train-00000-of-00002.jsonl", ["a"])
    write(tmp_path / "rows" / "train-00001-of-00002.jsonl", ["b"])
    write(tmp_path / "rows" / "validation.jsonl", ["c"])
    write(tmp_path / "rows" / "test" / "anything.jsonl", ["d"])
    write(tmp_path / "rows" / "my tests and trains.jsonl", ["e"])
    assert sorted(texts_of(tmp_path / "rows")) == ["a", "b", "e"]
    assert texts_of(tmp_path / "rows", "validation") == ["c"]
    assert texts_of(tmp_path / "rows", "test") == ["d"]


def test_the_words_null_and_na_in_a_csv_file_are_text(tmp_path: Path) -> None:
    path = write(tmp_path / "train.csv", ["null", "NA", "word"])
    write(tmp_path / "dev.csv", ["x"])
    assert texts_of(path.parent) == ["null", "NA", "word"]


@pytest.mark.parametrize("ending", ["txt", "json", "csv"])
@pytest.mark.parametrize("offset", [30, (1 << 20) + 4321])
def test_a_file_that_is_not_utf8_is_named_with_the_byte(tmp_path: Path, ending: str, offset: int) -> None:
    path = write(tmp_path / f"latin.{ending}", ["text, " * 30_000] * 8)
    data = bytearray(path.read_bytes())
    data[offset] = 0xE9
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"Byte {offset} of '.*latin\.{ending}' .* is not UTF-8, .*iconv"):
        texts_of(path)


def test_a_character_cut_by_the_reading_buffer_does_not_shift_the_byte(tmp_path: Path) -> None:
    path = tmp_path / "cut.txt"
    path.write_bytes(b"a" * ((1 << 20) - 1) + "é".encode() + b"bc\xff")
    with pytest.raises(ValueError, match=rf"Byte {(1 << 20) + 3} of .* can not be decoded"):
        texts_of(path)
    path.write_bytes(b"abc\xe9")
    with pytest.raises(ValueError, match="Byte 3 of .* can not be decoded"):
        texts_of(path)


def test_a_malformed_line_is_named_and_skipped_on_request(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "train.jsonl")
    write(tmp_path / "dev.jsonl", ["x"])
    lines = path.read_text(encoding="utf-8").split("\n")
    lines[4] = '{"id": 4, "text": "broken'
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(ValueError, match=r"Line 5 of .*train\.jsonl' is no row of JSON: .*skip_bad_rows=True"):
        texts_of(tmp_path)
    assert texts_of(tmp_path, skip_bad_rows=True) == TEXTS[:4] + TEXTS[5:]
    assert "Skipped: Line 5 of" in caplog.text


def test_a_line_that_is_no_object_is_named_and_skipped_on_request(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n\n[1, 2]\n{"text": "b"}\n')
    write(tmp_path / "dev.jsonl", ["x"])
    with pytest.raises(ValueError, match=r"Line 3 of .* is no row of JSON: it holds no object"):
        texts_of(tmp_path)
    assert texts_of(tmp_path, skip_bad_rows=True) == ["a", "b"]


def test_a_file_that_is_no_parquet_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and then nothing of the kind")
    with pytest.raises(ValueError, match=r"broken\.parquet' can not be read: .*magic bytes.*repair the data"):
        texts_of(tmp_path / "broken.parquet")


def test_a_file_that_is_no_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text('[{"text": "a"}, {"text": ')
    with pytest.raises(ValueError, match=r"broken\.json' is no JSON: .*repair the data"):
        texts_of(tmp_path / "broken.json")


@pytest.mark.parametrize("ending", ["txt", "json", "jsonl", "csv"])
def test_an_empty_file_is_an_empty_data_set(tmp_path: Path, ending: str) -> None:
    (tmp_path / f"nothing.{ending}").touch()
    with pytest.raises(ValueError, match=rf"nothing\.{ending}' is empty: its files hold no byte"):
        texts_of(tmp_path / f"nothing.{ending}")


def test_a_file_of_unknown_kind_lists_the_kinds(tmp_path: Path) -> None:
    (tmp_path / "data.xml").write_text("<a/>")
    with pytest.raises(
        ValueError, match=r"data\.xml' is of no known kind; its name must end in one of: \.txt, \.json"
    ):
        texts_of(tmp_path / "data.xml")
    with pytest.raises(ValueError, match=r"holds no file that ends in one of: \.txt"):
        texts_of(tmp_path)


def test_a_folder_of_several_kinds_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.txt")
    write(tmp_path / "b.csv")
    with pytest.raises(ValueError, match=r"files of several kinds \(\.csv, \.txt\)"):
        texts_of(tmp_path)


def test_a_parquet_file_whose_text_is_not_utf8_is_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    bad = pa.StringArray.from_buffers(1, pa.array([0, 3], pa.int32()).buffers()[1], pa.py_buffer(b"a\xe9b"))
    pq.write_table(pa.table({"text": bad}), tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"Row 0 of '.*train\.parquet' can not be read: .*[Uu][Tt][Ff]-?8"):
        texts_of(tmp_path)
