"""Held-out documents are chosen by a hash, in whole files and in streams."""

import hashlib

import numpy as np
import pytest
from datasets import Dataset

from bd3lm_hf.data.splits import HELD_OUT, held_out_score, hold_out, members


BOTH = ["validation", "test"]
TEXTS = [f"document {i}" for i in range(1000)]


def parts(texts: list[str], missing: list[str]) -> dict[str, list[str]]:
    dataset = Dataset.from_dict({"text": texts})
    return {split: hold_out(dataset, split, missing)["text"][:] for split in ("train", *missing)}


def test_the_score_is_the_first_six_bytes_of_the_hash() -> None:
    assert held_out_score("abc") == int(hashlib.sha256(b"abc").hexdigest()[:12], 16) / 16**12
    assert held_out_score("abc") == pytest.approx(0xBA7816BF8F01 / 2**48)


@pytest.mark.parametrize("missing", [BOTH, ["validation"]])
def test_the_parts_have_every_document_once_in_order_streamed_or_not(missing: list[str]) -> None:
    found = parts(TEXTS, missing)
    assert sorted(text for part in found.values() for text in part) == sorted(TEXTS)
    assert all(part == sorted(part, key=TEXTS.index) for part in found.values())
    assert all(0.5 * HELD_OUT < len(found[name]) / len(TEXTS) < 1.5 * HELD_OUT for name in missing)
    stream = Dataset.from_dict({"text": TEXTS}).to_iterable_dataset()
    assert {split: [row["text"] for row in hold_out(stream, split, missing)] for split in found} == found


def test_the_part_of_a_document_does_not_depend_on_the_others() -> None:
    assert set(parts(TEXTS[:500], BOTH)["validation"]) == set(parts(TEXTS, BOTH)["validation"]) & set(TEXTS[:500])


def test_a_split_that_is_not_missing_is_left_alone() -> None:
    dataset = Dataset.from_dict({"text": TEXTS})
    assert hold_out(dataset, "test", ["validation"]) is dataset
    assert hold_out(dataset, "train", []) is dataset


@pytest.mark.parametrize("count", range(3, 12))
@pytest.mark.parametrize("shift", [0.0, 0.9])
def test_every_part_gets_one_of_three_or_more_documents(count: int, shift: float) -> None:
    scores = np.random.default_rng(count).random(count) * 0.04 + shift  # all below, or all above the thresholds
    sizes = {split: len(members(scores, split, BOTH)) for split in ("train", *BOTH)}
    assert min(sizes.values()) >= 1
    assert sum(sizes.values()) == count


def test_two_documents_are_one_for_training_and_one_for_validation() -> None:
    found = {split: len(part) for split, part in parts(["a", "b"], BOTH).items()}
    assert found == {"train": 1, "validation": 1, "test": 0}


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
