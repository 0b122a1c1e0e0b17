import json
from pathlib import Path

import pytest

from bd3lm_hf.data.documents import load_text
from bd3lm_hf.data.sources import (
    DATASETS,
    DETOKENIZERS,
    PACKINGS,
    PUBLISHED,
    SUITES,
    DatasetSpec,
    Flags,
    detokenizer,
    find_spec,
)


NAMES = sorted({row.name for row in DATASETS.values()})


def test_the_table_has_every_published_dataset() -> None:
    assert {
        "python-docs", "python-source", "openwebtext", "lm1b", "text8", "wikitext2", "wikitext103", "ptb", "lambada",
        "ag_news", "scientific_papers_arxiv", "scientific_papers_pubmed",
    } == set(NAMES)  # fmt: skip
    assert all(row.detokenizer is None or row.detokenizer in DETOKENIZERS for row in DATASETS.values())
    assert find_spec("OWT").name == find_spec("openwebtext-split").name == "openwebtext"
    assert find_spec("scientific-papers_arxiv").name == find_spec("arxiv").name == "scientific_papers_arxiv"


def test_an_unknown_name_suggests_the_nearest_one() -> None:
    with pytest.raises(ValueError, match=r"'wikitex2'.*'wikitext2'.*owner/name"):
        load_text("wikitex2")
    with pytest.raises(ValueError, match=r"'qqq'.*python-docs, python-source, openwebtext"):
        load_text("qqq")


@pytest.mark.parametrize("path", ["./missing", "missing.txt", "/no/such/folder", "~/missing.jsonl"])
def test_a_missing_file_is_reported_as_missing(path: str) -> None:
    with pytest.raises(ValueError, match="no file or folder '(.*missing.*|/no/)"):
        load_text(path)
    with pytest.raises(ValueError, match="'lm1b'"):
        load_text("lm1b", source=path)


GOLDEN = json.loads((Path(__file__).parents[1] / "golden/10_data/detokenize.json").read_text(encoding="utf-8"))
CASES = [(corpus, case["input"], case["output"]) for corpus, cases in GOLDEN.items() for case in cases]


@pytest.mark.parametrize(("corpus", "text", "expected"), CASES)
def test_every_detokenizer_gives_the_published_text(corpus: str, text: str, expected: str) -> None:
    assert detokenizer(corpus)(text) == expected


@pytest.mark.parametrize("corpus", sorted(DETOKENIZERS))
def test_plain_text_is_not_changed(corpus: str) -> None:
    text = "Plain text, with marks: none; of them spaced (at all)."
    assert detokenizer(corpus)(text).lstrip("\n") == text


def test_every_detokenizer_has_golden_cases_and_an_unknown_one_lists_the_known_ones() -> None:
    assert set(GOLDEN) == set(DETOKENIZERS)
    with pytest.raises(ValueError, match=r"'nltk'.* wikitext, ptb, lm1b"):
        DatasetSpec("mine", detokenizer="nltk")


def test_every_published_evaluation_is_one_of_a_known_dataset():
    for name, flags in [*PUBLISHED.items(), *SUITES["zero-shot"].sets.items()]:
        spec = find_spec(name)
        assert spec.name == name
        assert flags.split in spec.splits and flags.packing in PACKINGS


def test_in_domain_flags_are_those_of_the_dataset_or_the_published_defaults():
    assert PUBLISHED["openwebtext"] == Flags("validation", "published", True, False)
    assert PUBLISHED["lm1b"] == Flags("test", "published", True, True)
    assert Flags() == Flags("validation", "published", True, True)
