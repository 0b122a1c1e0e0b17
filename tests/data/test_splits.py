"""Each file belongs to a split; documents are held out by a hash, in whole files and in streams."""

import hashlib
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, DatasetDict

from bd3lm_hf.data.documents import find_schema, load_text
from bd3lm_hf.data.splits import HELD_OUT, files_by_split, held_out_score, hold_out, members


TEXTS = [f"document {i}: naïve" for i in range(40)]
CARD = """---
configs:
- config_name: {0}
  data_files:
  - {{split: train, path: a/*.jsonl}}
  - {{split: test, path: b/x.jsonl}}
- config_name: de
  data_files: b/*.jsonl
---
"""


def put(path: Path, *texts: str) -> Path:
    """Write texts as rows of a JSON lines file, or as a text file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = texts if path.suffix in (".txt", ".md") else [json.dumps({"text": text}) for text in texts]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def texts_of(path: Path, split: str = "train", **settings) -> list[str]:
    return [row["text"] for row in load_text(str(path), split=split, **settings)]


def splits_of(root: Path) -> dict[str, list[str]]:
    found = files_by_split(str(root), "train")
    return {split: sorted(Path(file).relative_to(root).as_posix() for file in files) for split, files in found.items()}


@pytest.mark.parametrize(
    ("split", "word"),
    [
        *[("train", word) for word in ("train", "training")],
        *[("validation", word) for word in ("validation", "valid", "val", "dev", "heldout", "held-out", "hold_out")],
        *[("test", word) for word in ("test", "testing", "eval", "evaluation", "testset")],
    ],
)
@pytest.mark.parametrize("mark", [".", "-", "_", " ", "3", "("])
def test_words_between_marks_name_a_split(tmp_path: Path, split: str, word: str, mark: str) -> None:
    names = [
        f"{word}{mark}x.txt",
        f"my{mark}{word}.txt",
        f"c4{mark}{word.upper()}.00000-of-00001.txt",
        f"{word}/nested/x.txt",
        f"of{mark}{word}/x.txt",
    ]
    for name in names:
        put(tmp_path / name, "x")
    assert splits_of(tmp_path) == {split: sorted(names)}


@pytest.mark.parametrize("name", ["contest.txt", "latest-strain.txt", "devel.txt", "mytests/evaluate.txt"])
def test_words_inside_words_do_not_name_a_split(tmp_path: Path, name: str) -> None:
    put(tmp_path / name, "x")
    put(tmp_path / "test.txt", "x")
    assert splits_of(tmp_path) == {"train": [name], "test": ["test.txt"]}


def test_a_capital_begins_a_word(tmp_path: Path) -> None:
    for name in ("myTrain.txt", "myTest.txt", "MyDevSet.txt"):
        put(tmp_path / name, "x")
    assert splits_of(tmp_path) == {"train": ["myTrain.txt"], "test": ["myTest.txt"], "validation": ["MyDevSet.txt"]}


def test_broken_links_are_refused_and_links_to_folders_named(tmp_path: Path, caplog) -> None:
    put(tmp_path / "elsewhere/a.jsonl", "a")
    put(tmp_path / "data/train-0.jsonl", "a")
    (tmp_path / "data/more").symlink_to(tmp_path / "elsewhere")
    assert splits_of(tmp_path / "data") == {"train": ["train-0.jsonl"]}
    assert "not followed: more" in caplog.text
    (tmp_path / "data/train-1.jsonl").symlink_to(tmp_path / "gone.jsonl")
    with pytest.raises(ValueError, match=r"broken links: train-1\.jsonl"):
        splits_of(tmp_path / "data")


def test_a_folder_of_the_exact_name_wins_over_the_file_and_the_file_over_other_folders(tmp_path: Path) -> None:
    for name in ("train/eval-methods.txt", "test/train of thought.txt", "my-test/train.txt", "train-data/valid.txt"):
        put(tmp_path / name, "x")
    assert splits_of(tmp_path) == {
        "train": ["my-test/train.txt", "train/eval-methods.txt"],
        "test": ["test/train of thought.txt"],
        "validation": ["train-data/valid.txt"],
    }
    put(tmp_path / "train-dev.txt", "x")
    with pytest.raises(ValueError, match=r"'train-dev\.txt'.*\(train, validation\): rename"):
        splits_of(tmp_path)


def test_hidden_files_and_descriptions_are_not_data(tmp_path: Path) -> None:
    ignored = [".hidden.jsonl", "._train.jsonl", ".cache/old.jsonl", "__MACOSX/train.jsonl", "dataset_infos.json"]
    ignored += ["state.json", "dataset_dict.json", "config.json", "sub/metadata.json"]
    ignored += ["README.md", "license.txt", "~$train.jsonl"]
    for name in ignored:
        put(tmp_path / name, "no data")
    put(tmp_path / "data/train-00000-of-00001.jsonl", "a")
    for name in ("state.json", "dataset_dict.json"):
        (tmp_path / name).unlink()  # they mark a saved dataset
    assert splits_of(tmp_path) == {"train": ["data/train-00000-of-00001.jsonl"]}


def test_a_card_decides_the_files_and_configurations(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(CARD.format("en"))
    put(tmp_path / "a/validation.jsonl", "a")
    put(tmp_path / "b/x.jsonl", "b")
    with pytest.raises(ValueError, match=r"\(en, de\).*--dataset_config"):
        load_text(str(tmp_path))
    with pytest.raises(ValueError, match="'fr'.* en, de"):
        load_text(str(tmp_path), config_name="fr")
    assert files_by_split(str(tmp_path), "train", "en").keys() == {"train", "test"}
    assert texts_of(tmp_path, "test", config_name="en") == ["b"]
    (tmp_path / "README.md").write_text(CARD.format("default"))
    assert texts_of(tmp_path, "test") == ["b"]
    (tmp_path / "README.md").write_text("# Without configurations\n")
    assert splits_of(tmp_path) == {"validation": ["a/validation.jsonl"], "train": ["b/x.jsonl"]}
    with pytest.raises(ValueError, match="config_name is 'en'"):
        load_text(str(tmp_path), config_name="en")


def test_configurations_without_files_and_broken_cards_are_refused(tmp_path: Path) -> None:
    put(tmp_path / "en/train.jsonl", "a")
    put(tmp_path / "de/train.jsonl", "b")
    assert splits_of(tmp_path) == {"train": ["de/train.jsonl", "en/train.jsonl"]}
    described = "dataset_info:\n- config_name: en\n- config_name: de"
    for card, named in ((described, "(de, en)"), ("configs: [", "README"), ("configs: [en, de]", "README")):
        (tmp_path / "README.md").write_text(f"---\n{card}\n---\n")
        with pytest.raises(ValueError, match=re.escape(named)):
            splits_of(tmp_path)
    (tmp_path / "README.md").unlink()
    (tmp_path / "dataset_infos.json").write_text('{"en": {}, "de": {}}')
    with pytest.raises(ValueError, match="de, en.*name one"):
        splits_of(tmp_path)
    assert splits_of(tmp_path / "en") == {"train": ["train.jsonl"]}


@pytest.mark.parametrize("ending", ["jsonl", "parquet", "txt", "csv"])
def test_a_pointer_of_git_lfs_is_not_data(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"train.{ending}"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(ValueError, match="git lfs pull"):
        load_text(path)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_saved_dataset_is_read(tmp_path: Path, streaming: bool) -> None:
    parts = {"train": Dataset.from_dict({"text": ["a", "b"]}), "valid": Dataset.from_dict({"text": ["c"]})}
    DatasetDict(parts).save_to_disk(str(tmp_path / "both"))
    assert texts_of(tmp_path / "both", streaming=streaming) == ["a", "b"]
    assert texts_of(tmp_path / "both", "validation", streaming=streaming) == ["c"]
    parts["train"].save_to_disk(str(tmp_path / "parts/one"))
    assert len(texts_of(tmp_path / "parts/one")) == 1  # the other is held out
    for kind, columns in (("pandas", None), ("torch", ["number"])):  # the format is saved too
        numbered = parts["train"].add_column("number", [1, 2]).with_format(kind, columns=columns)
        numbered.save_to_disk(str(tmp_path / kind))
        assert {type(text) for text in texts_of(tmp_path / kind, streaming=streaming)} == {str}
    with pytest.raises(ValueError, match="one were written by save_to_disk"):
        load_text(str(tmp_path / "parts"))
    with pytest.raises(ValueError, match="config_name is 'en'"):
        load_text(str(tmp_path / "both"), config_name="en", streaming=streaming)
    (tmp_path / "parts/one/data-00000-of-00001.arrow").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="one'.* save_to_disk, cannot be read"):
        load_text(str(tmp_path / "parts/one"))


def test_paths_without_data_are_refused_with_the_known_endings(tmp_path: Path) -> None:
    (tmp_path / "data.xml").write_text("<a/>")
    for path in (tmp_path / "data.xml", tmp_path):
        with pytest.raises(ValueError, match=r"\.txt, .*\.parquet .*\.gz"):
            load_text(str(path))
    put(tmp_path / "a.txt", "x")
    put(tmp_path / "b.csv", "x")
    with pytest.raises(ValueError, match=r"\(\.csv, \.txt\)"):
        load_text(str(tmp_path))


@pytest.mark.parametrize("ending", ["txt", "json", "jsonl", "csv"])
def test_an_empty_file_is_an_empty_dataset(tmp_path: Path, ending: str) -> None:
    (tmp_path / f"nothing.{ending}").touch()
    with pytest.raises(ValueError, match=rf"nothing\.{ending}' is empty"):
        texts_of(tmp_path / f"nothing.{ending}")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_split_is_named_and_leaves_the_others_usable(tmp_path: Path, streaming: bool, content: str) -> None:
    put(tmp_path / "train.jsonl", *TEXTS)
    (tmp_path / "test.jsonl").write_text(content)
    with pytest.raises(ValueError, match=r"'test' .*test\.jsonl.*\(train\)"):
        load_text(str(tmp_path), split="test", streaming=streaming)
    assert find_schema(str(tmp_path)).names == ("text",)
    assert set(texts_of(tmp_path, streaming=streaming)) < set(TEXTS)


def test_a_text_file_is_one_document_cut_into_three(tmp_path: Path, monkeypatch) -> None:
    path = put(tmp_path / "book.txt", *TEXTS)
    pieces = [texts_of(path, split) for split in ("train", "validation", "test")]
    assert [len(piece) for piece in pieces] == [1, 1, 1]
    assert "".join(piece[0] for piece in pieces) == path.read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for name in (path, "./book.txt", tmp_path):  # the last is a folder with nothing else
        with pytest.raises(ValueError, match=r"book\.txt' is one document"):
            load_text(str(name), streaming=True)
    with pytest.raises(ValueError, match=r"book\.txt' is one document"):
        load_text("text8", source="book.txt", streaming=True)
    put(tmp_path / "test.txt", "a test")
    assert texts_of(tmp_path, "test", streaming=True) == ["a test\n"]
    put(tmp_path / "valid.txt", "held out")
    assert texts_of(tmp_path, streaming=True) == [path.read_text(encoding="utf-8")]


def test_a_folder_of_text_files_has_one_document_per_file(tmp_path: Path) -> None:
    for i, text in enumerate(TEXTS):
        put(tmp_path / f"part {i}.{'md' if i % 2 else 'txt'}", text, "second line")
    found = [text for split in ("train", "validation", "test") for text in texts_of(tmp_path, split)]
    assert sorted(found) == sorted(f"{text}\nsecond line\n" for text in TEXTS)


@pytest.mark.parametrize("skip_bad_rows", [False, True])
def test_a_file_that_changed_is_read_again(tmp_path: Path, skip_bad_rows: bool) -> None:
    put(tmp_path / "validation.jsonl", "x")
    for word in ("old", "new"):  # of the same size
        put(tmp_path / "train.jsonl", word)
        os.utime(tmp_path / "train.jsonl", (0, 1_000 * len(word) + (word == "new")))
        assert texts_of(tmp_path, skip_bad_rows=skip_bad_rows) == [word]


# Held-out documents


BOTH = ["validation", "test"]
DOCUMENTS = [f"document {i}" for i in range(1000)]


def parts(texts: list[str], missing: list[str]) -> dict[str, list[str]]:
    dataset = Dataset.from_dict({"text": texts})
    return {split: hold_out(dataset, split, missing)["text"][:] for split in ("train", *missing)}


def test_the_score_is_the_first_six_bytes_of_the_hash() -> None:
    assert held_out_score("abc") == int(hashlib.sha256(b"abc").hexdigest()[:12], 16) / 16**12
    assert held_out_score("abc") == pytest.approx(0xBA7816BF8F01 / 2**48)


@pytest.mark.parametrize("missing", [BOTH, ["validation"]])
def test_the_parts_have_every_document_once_in_order_streamed_or_not(missing: list[str]) -> None:
    found = parts(DOCUMENTS, missing)
    assert sorted(text for part in found.values() for text in part) == sorted(DOCUMENTS)
    assert all(part == sorted(part, key=DOCUMENTS.index) for part in found.values())
    assert all(0.5 * HELD_OUT < len(found[name]) / len(DOCUMENTS) < 1.5 * HELD_OUT for name in missing)
    stream = Dataset.from_dict({"text": DOCUMENTS}).to_iterable_dataset()
    assert {split: [row["text"] for row in hold_out(stream, split, missing)] for split in found} == found


def test_the_part_of_a_document_does_not_depend_on_the_others() -> None:
    assert set(parts(DOCUMENTS[:500], BOTH)["validation"]) == set(parts(DOCUMENTS, BOTH)["validation"]) & set(
        DOCUMENTS[:500]
    )


def test_a_split_that_is_not_missing_is_left_alone() -> None:
    dataset = Dataset.from_dict({"text": DOCUMENTS})
    assert hold_out(dataset, "test", ["validation"]) is dataset
    assert hold_out(dataset, "train", []) is dataset


@pytest.mark.parametrize("count", range(3, 12))
@pytest.mark.parametrize("shift", [0.0, 0.9])
def test_every_part_gets_one_of_three_or_more_documents(count: int, shift: float) -> None:
    scores = np.random.default_rng(count).random(count) * 0.04 + shift  # all below, or all above the thresholds
    sizes = {split: len(members(scores, split, BOTH)) for split in ("train", *BOTH)}
    assert min(sizes.values()) >= 1
    assert sum(sizes.values()) == count


def test_a_single_document_is_cut_at_line_ends() -> None:
    text = "".join(f"line {i}\n" for i in range(1000))
    found = {split: "".join(part) for split, part in parts([text], BOTH).items()}
    assert found["train"] + found["validation"] + found["test"] == text
    assert all(part.startswith("line ") and part.endswith("\n") for part in found.values())
    assert len(found["train"]) / len(text) == pytest.approx(0.9, abs=0.01)
    assert len(found["validation"]) / len(text) == pytest.approx(0.05, abs=0.01)


def test_a_single_line_is_cut_exactly_as_text8_is() -> None:
    found = parts(["a" * 900 + "b" * 50 + "c" * 50], BOTH)
    assert found == {"train": ["a" * 900], "validation": ["b" * 50], "test": ["c" * 50]}
    assert parts(["a" * 950 + "b" * 50], ["validation"]) == {"train": ["a" * 950], "validation": ["b" * 50]}
