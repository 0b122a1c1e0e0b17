"""Error messages of the command line are one line without secrets and control characters."""

import pytest

from bd3lm_hf.argument_parser import ArgumentParser, with_home


SECRET = "hf_" + "abcDEF123456"


def test_a_parser_error_is_one_masked_line_with_exit_code_2_and_the_nearest_flag(capsys):
    parser = ArgumentParser(prog="bd3lm push")
    parser.add_argument("--token")
    with pytest.raises(SystemExit) as stop:
        parser.parse_args([f"--tokne={SECRET}", "a\nb"])
    err = capsys.readouterr().err
    assert "did you mean --token?" in err
    assert stop.value.code == 2 and err.count("\n") == 1 and SECRET not in err
    assert err.startswith("error: ") and "bd3lm push --help" in err


def test_a_leading_tilde_of_a_path_is_expanded_wherever_it_is(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    words = ["~/recipe.yaml", "--dataset=~/text", "--output", "~/out", "--prompt", "~/x is a path", "--text=~/x"]
    expanded = ["/home/me/recipe.yaml", "--dataset=/home/me/text", "--output", "/home/me/out", *words[4:]]
    assert with_home(words) == expanded
