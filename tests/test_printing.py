"""Printing: secrets are masked, control characters escaped, and long commands report their progress."""

import sys

import pytest

from bd3lm_hf import printing
from bd3lm_hf.printing import ProgressReport, mask_secrets, one_line


SECRET = "hf_" + "abcDEF123456"


@pytest.mark.parametrize(
    "text",
    [
        f"unrecognized arguments: --tokne {SECRET}",
        f"unrecognized arguments: --hub-token={SECRET}",
        f"argument --private: ignored explicit argument '{SECRET}'",
        f"Authorization: Bearer {SECRET}",
        "--api-key plainsecret123",
        "--hub_token=plainsecret123",
        "bearer plainsecret123",
    ],
)
def test_secrets_are_masked_wherever_they_occur(text):
    masked = mask_secrets(text)
    assert "***" in masked and SECRET not in masked and "plainsecret123" not in masked


def test_the_token_of_this_machine_is_masked_whatever_it_looks_like(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "no-known-prefix")
    assert mask_secrets("refused: no-known-prefix") == "refused: ***"


@pytest.mark.parametrize("text", ["--tokenizer gpt2", "--max-new-tokens 12", "the token ids reach 320", "hf_"])
def test_ordinary_words_are_kept(text):
    assert mask_secrets(text) == text


def test_control_characters_and_line_ends_cannot_forge_output():
    assert one_line("bad\nname \x1b[2K\rintact é") == "bad name \\x1b[2K intact é"


@pytest.fixture
def lines_of(monkeypatch, capsys):
    """A function `(seconds per item, items) -> lines` with a clock that only items advance."""

    def run(seconds: float, total: int, **options) -> list[str]:
        clock = [0.0]
        monkeypatch.setattr(printing.time, "monotonic", lambda: clock[0])
        monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
        with ProgressReport("scoring", total, unit="sequence", **options) as report:
            for _ in range(total - options.get("initial", 0)):
                clock[0] += seconds
                report.update()
        return capsys.readouterr().err.splitlines()

    return run


def test_the_first_line_is_an_estimate_and_each_minute_has_one(lines_of):
    lines = lines_of(10, 30)
    assert "1 of 30 sequences, about 5 min left" in lines[0]
    assert [line.split()[1] for line in lines] == ["1", "7", "13", "19", "25"]
    assert "about 2 min left" in lines_of(10, 30, initial=16)[0]  # what an earlier run did takes no time
    assert lines_of(1, 30) == lines_of(10, 30, disable=True) == []  # a short command and a silent one
