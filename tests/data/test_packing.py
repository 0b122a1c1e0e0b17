import json
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from tokenizers.processors import TemplateProcessing

from bd3lm_hf.data import packing
from bd3lm_hf.data.packing import PackingLayout, bytes_per_token, evenly_spaced, pack, pack_published, tokenize
from bd3lm_hf.tokenization import train_tokenizer


GOLDEN = Path(__file__).parents[1] / "golden/10_data"
WORDS = ["block", "diffusion", "writes", "text,", "naïve", "and", "in", "any", "order;", ""]
TEXTS = [" ".join(WORDS[i % 9 :] * (i % 7)) for i in range(57)]  # some are empty


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, vocab_size=300)


@pytest.fixture
def documents() -> Dataset:
    return Dataset.from_dict({"text": TEXTS})


def on_disk(folder: Path) -> Dataset:
    Dataset.from_dict({"text": TEXTS}).save_to_disk(str(folder))
    return Dataset.load_from_disk(str(folder))


def stream_of(texts: list[str], tokenizer) -> list[int]:
    """All tokens in one stream: every document that is not empty, followed by an end token."""
    return [token for text in texts if text for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]


def unpacked(packed: Dataset) -> list[int]:
    pairs = (pair for row in packed for pair in zip(row["input_ids"], row["attention_mask"], strict=True))
    return [token for token, mask in pairs if mask]


@pytest.mark.parametrize("case", json.loads((GOLDEN / "packing.json").read_text()))
def test_published_packing_gives_the_golden_sequences(case: dict) -> None:
    settings = json.loads((GOLDEN / "config.json").read_text())
    ends = [(settings["bos"],), (settings["eos"],)] if case["insert_special_tokens"] else [(), ()]
    rows = pack_published(case["input_ids"], PackingLayout(settings["block_size"], *ends, padding=0))
    assert rows == case["output_input_ids"]
    assert all(len(row) == case["attention_mask_length"] for row in rows)


@pytest.mark.parametrize("length", [1, 7, 16, 1000])
def test_packing_loses_no_token(documents: Dataset, tokenizer, length: int) -> None:
    assert unpacked(pack(documents, tokenizer, length=length)) == stream_of(TEXTS, tokenizer)


def test_the_last_sequence_is_padded_on_the_right_and_not_scored_or_dropped(documents: Dataset, tokenizer) -> None:
    packed = pack(documents, tokenizer, length=16)
    used = len(stream_of(TEXTS, tokenizer)) % 16
    assert 0 < used < 16
    last = packed[-1]
    assert last["attention_mask"] == [1] * used + [0] * (16 - used)
    assert last["labels"] == last["input_ids"][:used] + [-100] * (16 - used)
    assert last["input_ids"][used:] == [tokenizer.pad_token_id] * (16 - used)
    full = packed.select(range(len(packed) - 1))
    assert all(row["labels"] == row["input_ids"] and row["attention_mask"] == [1] * 16 for row in full)
    assert pack(documents, tokenizer, length=16, drop_last=True).to_dict() == full.to_dict()


def test_special_tokens_enclose_every_sequence(documents: Dataset, tokenizer) -> None:
    packed = pack(documents, tokenizer, length=16, insert_special=True)
    rows = [[t for t, mask in zip(r["input_ids"], r["attention_mask"], strict=True) if mask] for r in packed]
    assert all(row[0] == tokenizer.bos_token_id and row[-1] == tokenizer.eos_token_id for row in rows)
    assert [token for row in rows for token in row[1:-1]] == stream_of(TEXTS, tokenizer)


def test_packing_does_not_depend_on_workers_or_batch_sizes(tmp_path: Path, tokenizer, monkeypatch) -> None:
    documents = on_disk(tmp_path)
    once = pack(documents, tokenizer, length=16).to_dict()
    assert pack(documents, tokenizer, length=16, num_proc=2).to_dict() == once
    monkeypatch.setattr(packing, "_ROWS_PER_BATCH", 5)
    monkeypatch.setattr(packing, "_VERSION", -1)  # bypass the cache
    assert pack(documents, tokenizer, length=16).to_dict() == once


def test_published_packing_ends_empty_documents_too_and_drops_the_remainder(documents: Dataset, tokenizer) -> None:
    rows = pack(documents, tokenizer, length=16, packing="published")["input_ids"]
    tokens = [t for text in TEXTS for t in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    assert [token for row in rows for token in row] == tokens[: len(tokens) // 16 * 16]


def test_published_packing_takes_the_first_id_of_the_encoded_token(documents: Dataset) -> None:
    bert_like = train_tokenizer(TEXTS, vocab_size=300)
    bert_like.add_tokens(["[CLS]", "[SEP]"])
    first = bert_like.convert_tokens_to_ids("[CLS]")
    bert_like.eos_token = "[SEP]"
    bert_like.backend_tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", first), ("[SEP]", first + 1)]
    )
    rows = pack(documents, bert_like, length=16, packing="published", insert_special=True)["input_ids"]
    assert all(row[0] == first and row[-1] == first for row in rows)
    assert first + 1 not in {token for row in rows for token in row}


def test_names_of_special_tokens_in_a_document_are_text(tokenizer) -> None:
    text = f"{tokenizer.mask_token} {tokenizer.eos_token}"
    ids = tokenize(Dataset.from_dict({"text": [text]}), tokenizer, eos=None)[0]["input_ids"]
    assert not {tokenizer.mask_token_id, tokenizer.eos_token_id} & set(ids)
    assert tokenizer.decode(ids) == text


def test_packed_sequences_are_cached_by_all_settings(tmp_path: Path, tokenizer) -> None:
    documents = on_disk(tmp_path)
    others = ({}, {"insert_eos": False}, {"insert_special": True}, {"drop_last": True}, {"packing": "published"})
    settings = [{"length": 17}, *({"length": 16, **other} for other in others)]
    files = [pack(documents, tokenizer, **setting).cache_files[0]["filename"] for setting in settings]
    assert len(set(files)) == len(settings)
    written = [Path(file).stat().st_mtime_ns for file in files]
    tokenizer("a call that leaves its truncation in the tokenizer", truncation=True, max_length=4)
    assert [pack(documents, tokenizer, **setting).cache_files[0]["filename"] for setting in settings] == files
    assert [Path(file).stat().st_mtime_ns for file in files] == written
    other = train_tokenizer(TEXTS, vocab_size=280)
    assert pack(documents, other, length=16).cache_files[0]["filename"] not in files


@pytest.mark.parametrize(("count", "kept"), [(10, 9), (10, 10), (1000, 999), (7, 3), (5, None), (5, 8)])
def test_a_part_has_the_exact_size_and_is_evenly_spaced(count: int, kept: int | None) -> None:
    rows = evenly_spaced(Dataset.from_dict({"row": range(count)}), kept)["row"][:]
    assert len(rows) == min(count, kept or count)
    gaps = np.diff([*rows, count])
    assert rows[0] == 0 and set(gaps) <= {count // len(rows), -(-count // len(rows))}


def test_bytes_per_token_count_utf8_and_end_tokens(documents: Dataset, tokenizer) -> None:
    num_bytes, num_tokens = sum(len(text.encode()) for text in TEXTS), len(stream_of(TEXTS, tokenizer))
    assert num_bytes > sum(map(len, TEXTS))
    assert bytes_per_token(documents, tokenizer) == num_bytes / num_tokens
    without_ends = num_tokens - sum(1 for text in TEXTS if text)
    assert bytes_per_token(documents, tokenizer, insert_eos=False) == num_bytes / without_ends


@pytest.mark.parametrize(
    ("texts", "setting", "message"),
    [
        (["a", "b", "c"], {}, "6 tokens in 3 documents.* 16"),
        (["a", "b", "c"], {"packing": "published"}, "6 tokens in 3 documents.* 16"),
        ([], {}, "0 tokens in 0 documents"),
        (["", ""], {}, "0 tokens in 2 documents"),
        (["abcdefgh", "ijklmnop"], {"length": 12, "packing": "published", "num_proc": 2}, "packing='contiguous'"),
        (TEXTS, {"packing": "random"}, "'random'.*: contiguous, published"),
        (TEXTS, {"length": 0}, "length is 0.* 1 tokens"),
        (TEXTS, {"length": 2, "insert_special": True}, "length is 2.* 3"),
    ],
)
def test_what_gives_no_sequence_is_refused(tokenizer, texts: list[str], setting: dict, message: str) -> None:
    documents = Dataset.from_dict({"text": np.array(texts, dtype=str)})
    with pytest.raises(ValueError, match=message):
        pack(documents, tokenizer, **{"length": 16, **setting})
    if not any(texts):
        with pytest.raises(ValueError, match=f"{len(texts)} documents"):
            bytes_per_token(documents, tokenizer)


def test_datasets_that_cannot_be_packed_are_refused(documents: Dataset, tokenizer) -> None:
    endless = train_tokenizer(TEXTS, vocab_size=300)
    endless.eos_token = None
    for data, reader, message in (
        (Dataset.from_dict({"body": ["a"], "label": [1]}), tokenizer, "'text', .*body, label"),
        (documents, endless, "no eos_token"),
        (documents.to_iterable_dataset(), tokenizer, "streaming.PackedStream"),
    ):
        with pytest.raises(ValueError, match=message):
            pack(data, reader, length=16)
