import json
import re
from pathlib import Path

import pytest
from datasets import Dataset, IterableDataset

from bd3lm_hf.data import documents
from bd3lm_hf.data.schemas import Messages, PromptCompletion, TextRow
from bd3lm_hf.data.streaming import PackedStream
from bd3lm_hf.modeling.configuration_bd3lm import BD3LMConfig
from bd3lm_hf.training.command_line import parse_arguments
from bd3lm_hf.training.inputs import load_documents, make_sequences, make_tokenizer


SENTENCE = "A block is written from noise, token by token. "


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Two hundred small documents."""
    path = tmp_path_factory.mktemp("corpus") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": SENTENCE * (1 + i % 3) + f"Number {i}."}) + "\n" for i in range(200)))
    return path


def inputs(*words: object, length: int = 32):
    """Documents, tokenizer and sequences of a run with these arguments."""
    defaults = ["demo", "--use_cpu", "--vocab_size", 300]
    arguments = parse_arguments([str(word) for word in (*defaults, *words)])
    documents = load_documents(arguments.data)
    tokenizer = make_tokenizer(arguments, documents)
    config = BD3LMConfig(vocab_size=len(tokenizer), block_size=4, model_length=length)
    return documents, tokenizer, make_sequences(arguments, documents, tokenizer, config)


def documents_of(dataset: object, *words: object):
    return load_documents(parse_arguments(["demo", "--dataset", str(dataset), *map(str, words)]).data)


def test_validation_files_are_used_whole_and_without_one_some_documents_are_held_out(corpus, tmp_path):
    (tmp_path / "held_out.txt").write_text("Held out.\n", encoding="utf-8")
    documents = documents_of(corpus, "--validation_dataset", tmp_path / "held_out.txt")
    assert len(documents.train) == 200 and documents.validation["text"][0].strip() == "Held out."
    documents = documents_of(corpus)
    assert 0 < len(documents.validation) < len(documents.train) < 200
    assert set(documents.train["text"]).isdisjoint(documents.validation["text"])


def test_a_source_replaces_the_one_of_the_table(tmp_path):
    for split in ("train", "test"):
        Dataset.from_dict({"text": [f"The {split} 's text ."]}).to_parquet(tmp_path / f"{split}.parquet")
    documents = documents_of("lm1b", "--dataset_source", tmp_path)
    assert documents.train["text"][:] == ["The train's text."]
    assert documents.validation["text"][:] == ["The test's text."]


def test_the_configuration_of_a_hub_dataset_is_asked_for(monkeypatch):
    asked = []

    def hub(path, **settings):
        asked.append((path, settings["name"]))
        raise ConnectionError("offline")

    monkeypatch.setattr(documents, "load_dataset", hub)
    with pytest.raises(ValueError, match="offline"):
        documents_of("owner/set", "--dataset_config", "small", "--data_format", "text")
    assert asked == [("owner/set", "small")]


@pytest.mark.parametrize("split", ["train", "valid"])
def test_end_tokens_and_special_tokens_are_chosen_for_each_split(corpus, split):
    plain = inputs("--dataset", corpus, "--insert_train_eos", "false", "--insert_valid_eos", "false")
    ends = inputs(
        "--dataset", corpus, f"--insert_{split}_special", "true", f"--insert_{split}_eos", "true",
        *(f"--insert_{'valid' if split == 'train' else 'train'}_eos", "false"),
    )  # fmt: skip
    eos = plain[1].eos_token_id
    for name in ("train", "validation"):
        chosen = name.startswith(split)
        rows = getattr(ends[2], name)
        assert all(row["input_ids"][0] == eos for row in rows) is chosen
        assert all(eos not in row["input_ids"] for row in getattr(plain[2], name))
        assert any(eos in row["input_ids"][1:-1] for row in rows) is chosen


def test_published_packing_is_chosen_by_name(corpus):
    sequences = inputs("--dataset", corpus, "--packing", "published")[2]
    assert all(row["attention_mask"] == [1] * 32 for row in sequences.train)  # its remainder is dropped
    assert any(0 in row["attention_mask"] for row in inputs("--dataset", corpus)[2].train)


def test_a_stream_trains_on_its_documents_and_holds_the_others_in_memory(corpus):
    words = ["--dataset", corpus, "--streaming", "true", "--max_eval_samples", 6, "--shuffle_buffer", 0]
    documents, tokenizer, sequences = inputs(*words)
    assert isinstance(documents.train, IterableDataset) and isinstance(sequences.train, PackedStream)
    assert len(sequences.validation) == 6
    whole = inputs("--dataset", corpus, "--tokenizer", "train", "--max_eval_samples", 1000)
    # Held out by the hash of a document, as without a stream, but a stream cannot know the smallest hashes of all.
    assert set(whole[0].validation["text"]).issubset(row["text"] for row in documents.validation)
    ids = [row["input_ids"].tolist() for row in sequences.train]
    first = next(iter(documents.train))["text"]
    assert tokenizer.decode(ids[0]).startswith(first[:20])
    assert sequences.bytes_per_token > 1


def test_a_stream_can_be_validated_on_another_dataset(corpus, tmp_path):
    (tmp_path / "other.jsonl").write_text(json.dumps({"text": SENTENCE * 9}) + "\n")
    words = ["--dataset", corpus, "--streaming", "true", "--validation_dataset", tmp_path / "other.jsonl"]
    documents, _, sequences = inputs(*words)
    assert documents.validation["text"][:] == [SENTENCE * 9]
    assert len(list(sequences.train)) > 100
    assert sum(1 for _ in documents.train) == 200


def test_a_stream_of_prompts_is_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(ValueError, match="prompt and completion.*--streaming"):
        documents_of(tmp_path / "rows.jsonl", "--streaming", "true")


@pytest.fixture
def pairs(tmp_path) -> Path:
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"Count {i}:", "completion": f" {i}, {i + 1} and so on."} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_prompts_and_completions_are_found_by_their_columns(pairs):
    documents, tokenizer, sequences = inputs("--dataset", pairs, "--max_train_samples", 50, length=128)
    assert isinstance(documents.schema, PromptCompletion)
    assert len(sequences.train) == 50 and sequences.bytes_per_token is None  # out of a few more
    for row in sequences.validation:
        first = row["labels"].index(next(label for label in row["labels"] if label != -100))
        assert re.fullmatch(r"Count .*:", tokenizer.decode(row["input_ids"][:first]))
        assert len(row["input_ids"]) % 4 == 0


def test_messages_and_text_are_chosen_by_name(tmp_path, pairs):
    both = tmp_path / "both.jsonl"
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    both.write_text("".join(json.dumps({"text": f"t{i}", "messages": chat}) + "\n" for i in range(40)))
    with pytest.raises(ValueError, match="data_format"):
        documents_of(both)
    for name, schema in (("text", TextRow), ("messages", Messages)):
        documents = documents_of(both, "--data_format", name)
        assert type(documents.schema) is schema and documents.train.column_names == list(schema.names)
    assert documents_of(pairs, "--text_column", "completion").train["text"][0].endswith("so on.")


def test_long_rows_are_refused_or_dropped(pairs):
    rows = pairs.read_text() + json.dumps({"prompt": "Say", "completion": " word" * 200}) + "\n"
    pairs.write_text(rows)
    with pytest.raises(ValueError, match=r"1 of \d+ rows .* 128 "):
        inputs("--dataset", pairs, "--validation_dataset", pairs, length=128)
    sequences = inputs("--dataset", pairs, "--validation_dataset", pairs, "--long_rows", "drop", length=128)[2]
    assert len(sequences.train) == len(sequences.validation) == 60


def test_faulty_rows_are_skipped_on_request(corpus, tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text(corpus.read_text() + '{"text": 7}\n')
    with pytest.raises(ValueError, match=r"Line 201 of .*text\.jsonl' .*int"):
        documents_of(path)
    documents = documents_of(path, "--skip_bad_rows", "true")
    assert len(documents.train) + len(documents.validation) < 201
