import json
from dataclasses import replace
from pathlib import Path

import pytest
from datasets import Dataset, IterableDataset, load_dataset

from bd3lm_hf.data import documents
from bd3lm_hf.data.documents import load_text
from bd3lm_hf.data.sources import DATASETS, DatasetSpec, detokenizer
from bd3lm_hf.data.splits import held_out_score


HUB = sorted({row.name for row in DATASETS.values() if row.path})
RAW = 'The team \'s captain , who was 21 , said : " we won ! " It rained .'


def local_copy(folder: Path, spec: DatasetSpec, rows: int = 6) -> str:
    """A tiny sample with the columns of the source: a parquet file for each of its splits."""
    for name in set(spec.splits.values()) or {"train", "validation", "test"}:
        texts = [f"{RAW} {name} {i}" for i in range(rows)]
        table = Dataset.from_dict({"label": range(rows), spec.text_column or "text": texts})
        table.to_parquet(folder / f"{name}-00000-of-00001.parquet")
    return str(folder)


def test_openwebtext_validates_on_its_last_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = local_copy(tmp_path, DATASETS["openwebtext"])
    with pytest.raises(ValueError, match="6 documents.* last 100000 "):
        load_text("openwebtext", source=source)
    monkeypatch.setitem(documents.DATASETS, "openwebtext", replace(DATASETS["openwebtext"], tail=2))
    with pytest.raises(ValueError, match="last 2 documents .*documents="):  # a stream does not know how many it has
        load_text("openwebtext", source=source, streaming=True)
    assert [text[-1] for text in load_text("openwebtext", source=source)["text"]] == list("0123")
    assert [text[-1] for text in load_text("openwebtext", split="validation", source=source)["text"]] == list("45")


@pytest.mark.parametrize("tail", [1, 3, 4, 5, 9])
def test_the_tail_of_a_stream_reads_only_the_last_files(tmp_path: Path, tail: int) -> None:
    for i in range(5):  # two documents per file
        lines = [json.dumps({"text": f"{i}{j}"}) for j in "ab"]
        (tmp_path / f"train-{i}.jsonl").write_text("\n".join(lines))
    spec = replace(DATASETS["openwebtext"], path=str(tmp_path), tail=tail, documents=10)
    for unread in range(5 - -(-tail // 2)):
        (tmp_path / f"train-{unread}.jsonl").write_text("broken on purpose")
    found = [row["text"] for row in load_text(spec, split="validation", streaming=True)]
    assert found == [f"{i}{j}" for i in range(5) for j in "ab"][-tail:]
    with pytest.raises(ValueError, match="10 documents.* last 10 "):
        load_text(replace(spec, tail=10), streaming=True)


def test_a_single_file_can_replace_a_dataset_with_one_split(tmp_path: Path) -> None:
    path = tmp_path / "lambada_test.jsonl"
    path.write_text('{"text": "“Go,” he said "}\n')
    assert load_text("lambada", split="test", source=str(path))["text"][:] == ['\n"Go," he said']


@pytest.mark.parametrize("end", ["", "\n"])
def test_text8_is_cut_into_90_5_and_5_per_cent(tmp_path: Path, end: str) -> None:
    (tmp_path / "text8.txt").write_text(" a" * 450 + " b" * 25 + " c" * 25 + end)
    source = str(tmp_path / "text8.txt")
    # The published pieces of 256 characters.
    assert load_text("text8", source=source)["text"][:] == [" a" * 128] * 3 + [" a" * 66]
    assert load_text("text8", split="validation", source=source)["text"][:] == [" b" * 25]
    assert load_text("text8", split="test", source=source)["text"][:] == [" c" * 25 + end]


@pytest.fixture(scope="module")
def docs() -> dict[str, Dataset]:
    return {split: load_text("python-docs", split=split) for split in ("train", "validation", "test")}


def test_the_embedded_corpus_is_split_by_the_names_of_its_documents(docs: dict[str, Dataset]) -> None:
    by_name = documents.python_docs()
    by_text = {document.text: document.name for document in by_name}
    for split, low, high in (("train", 0.1, 1.0), ("validation", 0.0, 0.05), ("test", 0.05, 0.1)):
        scores = [held_out_score(by_text[text]) for text in docs[split]["text"]]
        assert len(scores) >= 20
        assert all(low <= score < high for score in scores)
    assert sum(map(len, docs.values())) == len(by_name)
    stream = load_text("python-docs", split="validation", streaming=True)
    assert isinstance(stream, IterableDataset)
    assert [row["text"] for row in stream] == docs["validation"]["text"][:]


@pytest.mark.parametrize(("name", "advice"), [("someone/something", "python-docs"), ("ptb", "parquet copy")])
def test_a_hub_dataset_that_cannot_be_loaded_says_what_to_do(monkeypatch, name: str, advice: str) -> None:
    def offline(*args, **kwargs):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(documents, "load_dataset", offline)
    with pytest.raises(ValueError, match=rf"{name}.*no route to the hub.*{advice}"):
        load_text(name)


#: The other columns of the hub's repositories, with an example of each.
OTHER_COLUMNS = {
    "ag_news": {"label": 2},
    "scientific_papers_arxiv": {"abstract": "An abstract.", "section_names": "introduction\nmethod"},
    "scientific_papers_pubmed": {"abstract": "An abstract.", "section_names": "introduction\nmethod"},
}


def repository(folder: Path, spec: DatasetSpec) -> None:
    """A tiny copy of a hub repository in its own layout: a folder per configuration, a folder per split."""
    configuration = spec.data_dir or spec.config or "."
    metadata = []
    for split in sorted(set(spec.splits.values()) or {"train"}):
        file = folder / configuration / split / "0000.parquet"
        texts = [f"{RAW} {split} {i}" for i in range(6)] if spec.splits else [" text8" * 1000]
        other = OTHER_COLUMNS.get(spec.name, {})
        columns = {spec.text_column: texts} | {name: [value] * len(texts) for name, value in other.items()}
        file.parent.mkdir(parents=True)
        Dataset.from_dict(columns).to_parquet(file)
        metadata.append(f"  - split: {split}\n    path: {configuration}/{split}/*.parquet\n")
    if spec.config:
        card = f"---\nconfigs:\n- config_name: {spec.config}\n  data_files:\n{''.join(metadata)}---\n"
        (folder / "README.md").write_text(card)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """Replace the hub by the test's folder; return the requested arguments."""
    asked: dict = {}

    def load(path: str, **settings):
        asked.update(settings, path=path)
        return load_dataset(str(tmp_path), **{**settings, "revision": None})

    monkeypatch.setattr(documents, "load_dataset", load)
    return asked


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", [name for name in HUB if DATASETS[name.replace("_", "-")].splits])
def test_every_row_reads_its_hub_repository(tmp_path: Path, monkeypatch, hub, name: str, streaming: bool) -> None:
    spec = DATASETS[name.replace("_", "-")]
    if spec.tail:
        spec = replace(spec, tail=2, documents=6)
        monkeypatch.setitem(documents.DATASETS, name.replace("_", "-"), spec)
    repository(tmp_path, spec)
    clean = detokenizer(spec.detokenizer) if spec.detokenizer else str
    for split, origin in spec.splits.items():
        texts = [row["text"] for row in load_text(name, split=split, streaming=streaming)]
        expected = [clean(f"{RAW} {origin} {i}") for i in range(6)]
        if spec.tail:
            expected = expected[:-2] if split == "train" else expected[-2:]
        assert texts == expected
    wanted = {"path": spec.path, "name": spec.config, "data_dir": spec.data_dir, "revision": spec.revision}
    assert {key: hub[key] for key in wanted} == wanted


def test_text8_from_the_hub_is_cut_unless_it_already_has_splits(tmp_path: Path, hub: dict) -> None:
    repository(tmp_path, DATASETS["text8"])
    assert [sum(map(len, load_text("text8", split=split)["text"])) for split in documents.SPLITS] == [5400, 300, 300]
    for split, text in (("validation", "v" * 300), ("test", "t" * 10)):
        (tmp_path / split).mkdir()
        Dataset.from_dict({"text": [text]}).to_parquet(tmp_path / split / "0000.parquet")
    for streaming in (False, True):
        parts = {split: load_text("text8", split=split, streaming=streaming) for split in documents.SPLITS}
        lengths = {split: [len(row["text"]) for row in part] for split, part in parts.items()}
        assert lengths == {"train": [256] * 23 + [112], "validation": [256, 44], "test": [10]}


def test_any_hub_name_and_configuration_are_passed_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    Dataset.from_dict({"body": [f"text {i}" for i in range(50)]}).to_parquet(tmp_path / "train.parquet")
    asked = {}
    load = lambda path, **settings: asked.update(settings, path=path) or load_dataset(str(tmp_path))  # noqa: E731
    monkeypatch.setattr(documents, "load_dataset", load)
    train, held_out = (load_text("owner/set", split=s, config_name="small") for s in ("train", "validation"))
    assert (asked["path"], asked["name"]) == ("owner/set", "small")
    assert set(train["text"]).isdisjoint(held_out["text"])
    with pytest.raises(ValueError, match="'small'.*'python-docs'"):
        load_text("python-docs", config_name="small")


def rows(folder: Path, columns: dict) -> str:
    Dataset.from_dict(columns).to_parquet(folder / "train.parquet")
    Dataset.from_dict(columns).to_parquet(folder / "validation.parquet")
    return str(folder)


@pytest.mark.parametrize("streaming", [False, True])
def test_an_unknown_column_lists_the_columns(tmp_path: Path, streaming: bool) -> None:
    path = rows(tmp_path, {"title": ["a"], "body": ["b"], "year": [1]})
    with pytest.raises(ValueError, match="'text2'.*title, body, year"):
        load_text(path, text_column="text2", streaming=streaming)
    with pytest.raises(ValueError, match="text_column.*title, body, year"):
        load_text(path, streaming=streaming)
    with pytest.raises(ValueError, match="'year' .* int64"):
        load_text(path, text_column="year", streaming=streaming)
    assert [row["text"] for row in load_text(path, text_column="body", streaming=streaming)] == ["b"]
    path = rows(tmp_path, {"year": [1], "body": ["b"]})  # the only column of strings is the text
    assert [row["text"] for row in load_text(path, streaming=streaming)] == ["b"]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_row_without_text_is_named_and_skipped_on_request(tmp_path: Path, hub: dict, streaming: bool) -> None:
    path = rows(tmp_path, {"text": ["a", "b", None, "d"]})
    for name, origin in ((path, r"'.*train\.parquet'"), ("owner/set", "the split 'train' of 'owner/set'")):
        with pytest.raises(ValueError, match=rf"Row 2 of {origin} .*null.*skip_bad_rows=True"):
            list(load_text(name, streaming=streaming))
        kept = load_text(name, streaming=streaming, skip_bad_rows=True)
        assert [row["text"] for row in kept] == ["a", "b", "d"]


def test_what_is_held_out_depends_on_what_the_source_has(tmp_path: Path) -> None:
    texts = [f"document {i}" for i in range(100)]
    Dataset.from_dict({"text": texts[:2]}).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="'test' of .* is empty"):
        load_text(str(tmp_path), split="test")
    Dataset.from_dict({"text": texts}).to_parquet(tmp_path / "train.parquet")
    assert 85 <= len(load_text(str(tmp_path))) <= 94
    assert len(load_text(str(tmp_path), split="test")) >= 1
    Dataset.from_dict({"text": ["t"]}).to_parquet(tmp_path / "test.parquet")
    assert len(load_text(str(tmp_path))) + len(load_text(str(tmp_path), split="validation")) == 100
    assert load_text(str(tmp_path), split="test")["text"][:] == ["t"]
    Dataset.from_dict({"text": ["v"]}).to_parquet(tmp_path / "validation.parquet")
    assert load_text(str(tmp_path))["text"][:] == texts
    (tmp_path / "test.parquet").unlink()
    assert load_text(str(tmp_path))["text"][:] == texts


def test_a_split_that_the_source_lacks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'test'.*: train, validation"):
        load_text(rows(tmp_path, {"text": ["a"]}), split="test")
    with pytest.raises(ValueError, match="'dev'.*: train, validation, test"):
        load_text("python-docs", split="dev")
    with pytest.raises(ValueError, match="'lambada' .*'train'.*: validation, test"):
        load_text("lambada", source=local_copy(tmp_path / "copy", DATASETS["lambada"]))


def test_detokenized_text_is_cached(tmp_path: Path) -> None:
    source = local_copy(tmp_path, DATASETS["ptb"])
    files = [load_text("ptb", source=source).cache_files[0]["filename"] for _ in range(2)]
    assert files[0] == files[1]
    assert load_text("ptb", source=source)["text"][0].startswith("The team's captain")
