"""Messages of the command line are one line, and show neither secrets nor control characters."""

import pytest

from bd3lm_hf.argument_parser import ArgumentParser, mask_secrets, one_line, with_home


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
def test_ordinary_words_stay(text):
    assert mask_secrets(text) == text


def test_control_characters_and_line_ends_cannot_forge_output():
    assert one_line("bad\nname \x1b[2K\rintact é") == "bad name \\x1b[2K intact é"


def test_a_parser_error_is_one_masked_line_with_exit_code_2(capsys):
    with pytest.raises(SystemExit) as stop:
        ArgumentParser(prog="bd3lm push").parse_args([f"--tokne={SECRET}", "a\nb"])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and SECRET not in err
    assert err.startswith("error: ") and "bd3lm push --help" in err


def test_the_home_folder_is_found_wherever_a_path_begins_with_it(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    words = ["~/recipe.yaml", "--dataset=~/text", "--output", "~/out", "--prompt", "~/x is a path", "--text=~/x"]
    expanded = ["/home/me/recipe.yaml", "--dataset=/home/me/text", "--output", "/home/me/out", *words[4:]]
    assert with_home(words) == expanded
