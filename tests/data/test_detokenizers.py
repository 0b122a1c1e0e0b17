import json
from pathlib import Path

import pytest

from bd3lm_hf.data.sources import DETOKENIZERS, detokenizer


GOLDEN = json.loads((Path(__file__).parents[1] / "golden/10_data/detokenize.json").read_text(encoding="utf-8"))
CASES = [(corpus, case["input"], case["output"]) for corpus, cases in GOLDEN.items() for case in cases]


@pytest.mark.parametrize(("corpus", "text", "expected"), CASES)
def test_every_detokenizer_gives_the_published_text(corpus: str, text: str, expected: str) -> None:
    assert detokenizer(corpus)(text) == expected


def test_every_detokenizer_has_golden_cases() -> None:
    assert set(GOLDEN) == set(DETOKENIZERS)


@pytest.mark.parametrize("corpus", sorted(DETOKENIZERS))
def test_plain_text_is_left_alone(corpus: str) -> None:
    text = "Plain text, with marks: none; of them spaced (at all)."
    assert detokenizer(corpus)(text).lstrip("\n") == text


def test_an_unknown_detokenizer_lists_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"'nltk'; there are: wikitext, ptb, lm1b"):
        detokenizer("nltk")
