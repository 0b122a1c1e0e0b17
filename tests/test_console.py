"""Printing: secrets are masked, control characters escaped, and long commands show their progress."""

import sys

import pytest

from bd3lm_hf.console import mask_secrets, one_line, progress_bar


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


@pytest.mark.parametrize(("terminal", "seconds", "shown"), [(True, 1, True), (False, 1, False), (False, 61, True)])
def test_a_bar_is_shown_at_once_in_a_terminal_and_after_a_minute_elsewhere(
    monkeypatch, capsys, terminal, seconds, shown
):
    clock = [0.0]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    with progress_bar("scoring", 30, initial=10, unit="sequence") as bar:
        clock[0] = bar.start_t
        monkeypatch.setattr(bar, "_time", lambda: clock[0])
        clock[0] += seconds
        bar.update()
    assert ("scoring:  37%" in capsys.readouterr().err) == shown
    with progress_bar("scoring", 30, disable=True) as bar:
        bar.update()
    assert capsys.readouterr().err == ""
