"""`bd3lm`: exit code 0 only on success, errors in one line."""

import signal
import subprocess
import sys
import types
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from bd3lm_hf import BD3LMConfig, cli
from bd3lm_hf.console import ArgumentParser, with_home


# Their flags are fields of classes of transformers, or those of lm_eval; they have their own help page.
PARSED_WITH_TORCH = {"train", "compare", "harness"}


def assert_refused(result: tuple[int, str, str], *parts: str) -> None:
    code, _, err = result
    lines = err.strip().splitlines()
    assert code == 2
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    for part in parts:
        assert part in lines[0]


# --- damaged checkpoints ---------------------------------------------------------------------------------------------


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def changed_weights(change):
    """Return a function that changes the weights of a folder."""

    def save_changed(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return save_changed


BIAS, TABLE = "backbone.output_layer.linear.bias", "backbone.vocab_embed.embedding"


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (lambda x: [p.unlink() for p in x.glob("token*")], ["has no tokenizer"]),
        (lambda x: cut(x / "model.safetensors", 4000), ["SafetensorError", "name a complete checkpoint"]),
        (lambda x: cut(x / "model.safetensors", 4), ["SafetensorError", "name a complete checkpoint"]),
        (lambda x: (x / "model.safetensors").unlink(), ["no file named model.safetensors"]),
        (lambda x: (x / "config.json").unlink(), ["config.json"]),
        (lambda x: (x / "config.json").write_text("{"), ["config.json"]),
        (lambda x: BD3LMConfig.from_pretrained(x, mask_token_id=100).save_pretrained(x), ["mask_token_id is 100"]),
        (changed_weights(lambda w: w.pop(BIAS)), [f"1 missing weights ({BIAS})", "checkpoint of another model"]),
        (
            changed_weights(lambda w: w.update(x=torch.zeros(1))),
            ["1 unexpected weights (x)", "checkpoint of another model"],
        ),
        (changed_weights(lambda w: w.update({TABLE: torch.zeros(3, 3)})), [f"1 mismatched weights ({TABLE})"]),
        (changed_weights(lambda w: w[TABLE].fill_(torch.nan)), [f"{TABLE} in", "are NaN or infinite"]),
    ],
)
def test_a_damaged_checkpoint_is_refused(bd3lm, model_folder, damage, parts):
    damage(model_folder)
    assert_refused(bd3lm("generate", "--model", model_folder), *parts)


def test_a_tokenizer_can_come_from_elsewhere(bd3lm, model_folder, tiny_tokenizer, tmp_path):
    for path in model_folder.glob("token*"):
        path.unlink()
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    arguments = ["generate", "--model", model_folder, "--tokenizer", tmp_path / "tokenizer", "--max-new-tokens", 3]
    assert bd3lm(*arguments)[0] == 0


def test_a_missing_model_is_refused(bd3lm, tmp_path):
    assert_refused(bd3lm("generate", "--model", tmp_path / "nowhere"), "there is no such folder")
    assert_refused(bd3lm("generate", "--model", "owner/nothing"), "--model owner/nothing")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert_refused(bd3lm("generate", "--model", tmp_path / "model.gguf"), "is a file", "folder")


# --- the command itself ----------------------------------------------------------------------------------------------


def test_help_and_wrong_flags_need_nothing_slow():
    slow = ("torch", "transformers", "datasets", "evaluate", "peft", "accelerate", "pyarrow")
    code = f"""
import contextlib, io, sys
from bd3lm_hf.cli import VERBS, main
for verb in VERBS:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        codes = [main([verb, "--help"]), main([]), main(["--version"]), main(["no-such-verb"])]
        if verb not in {PARSED_WITH_TORCH}:
            codes.append(main([verb, "--no-such-flag", "hf_abcdefgh"]))
    assert set(codes[:3]) == {{0}} and set(codes[3:]) == {{2}}, (verb, codes)
    assert "hf_abcdefgh" not in err.getvalue() and f"bd3lm {{verb}}" in out.getvalue(), verb
    print(*[f"{{verb}}: {{name}}" for name in {slow} if name in sys.modules], end="")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("", "")


@pytest.fixture
def stand_in(monkeypatch):
    """A function `(main, verb="verb") -> None` that makes `bd3lm verb` call `main`."""

    def replace(main, verb="verb"):
        monkeypatch.setattr(cli, "VERBS", {verb: cli.Verb("stand_in:main", "")})
        monkeypatch.setitem(sys.modules, "stand_in", types.SimpleNamespace(main=main))

    return replace


def test_the_words_after_a_verb_are_passed_to_it(bd3lm, stand_in):
    seen = []
    for verb, (words, expected) in {
        "train": (["recipe.yaml", "--max_steps", "3"], ["recipe.yaml", "--max_steps", "3"]),
        "bench": (["--new_tokens=3", "--", "--a_b"], ["--new-tokens=3", "--", "--a_b"]),
    }.items():
        stand_in(seen.append, verb)
        assert bd3lm(verb, *words)[0] == 0 and seen.pop() == expected


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


def test_eval_of_generated_text_has_its_own_flags(bd3lm, tmp_path):
    refused = bd3lm("eval", "--model", tmp_path, "--judge", "gpt2")
    assert_refused(refused, "--judge")
    assert "--judge" in bd3lm("eval", "--generative", "--help")[1] and "--suite" in bd3lm("eval", "--help")[1]


def test_a_verb_is_needed(bd3lm):
    assert_refused(bd3lm("dream"), "'dream'")
    code, out, err = bd3lm()
    assert code == 0 and not err and [verb for verb in cli.VERBS if f"  {verb} " in out] == list(cli.VERBS)
    assert bd3lm("--version")[1].startswith("bd3lm ")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("--length 0:\n\tsay more"), 2, "error: --length 0: say more\n"),
        (FileNotFoundError(2, "No such file", "x"), 2, "error: [Errno 2] No such file: 'x'\n"),
        (OverflowError("too large"), 2, "error: OverflowError: too large\n"),
        (yaml.YAMLError("a\ttab"), 2, "error: YAMLError: a tab\n"),
        (SafetensorError("header"), 2, "error: SafetensorError: header\n"),
        (RuntimeError("DefaultCPUAllocator: not enough memory"), 2, None),
        (ValueError("--token hf_abcdefgh and \x1b[2K"), 2, "error: --token *** and \\x1b[2K\n"),
        (ZeroDivisionError("over"), 1, "error: ZeroDivisionError: over (--traceback shows where)\n"),
        (SystemExit("stopped"), 2, "error: stopped\n"),
        (SystemExit(143), 143, ""),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_every_error_of_every_verb_is_one_line(bd3lm, stand_in, error, code, line):
    stand_in(Mock(side_effect=error))
    found, out, err = bd3lm("verb")
    assert (found, out) == (code, "") and (err == line if line is not None else err.count("\n") == 1)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("swallowed", [False, True])
def test_a_signal_ends_a_verb_only_while_it_runs(bd3lm, stand_in, number, code, swallowed):
    cleaned, before = [], signal.getsignal(number)

    def run(words):
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt:
            if not swallowed:
                raise
        finally:
            cleaned.append(True)
        raise RecursionError("numpy was left half imported")

    stand_in(run)
    assert bd3lm("verb") == (code, "", "") and cleaned
    assert signal.getsignal(number) is before


def test_the_traceback_is_shown_on_request(stand_in):
    stand_in(Mock(side_effect=ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        cli.main(["verb", "--traceback"])


def test_our_own_warnings_are_shown_and_a_closed_pipe_is_not_an_error(gpt2_folder):
    command = f"{sys.executable} -m bd3lm_hf.cli generate --model {gpt2_folder} --num-samples 40 --batch-size 1"
    shell = ["bash", "-c", f"set -o pipefail; {command} --prompt A --max-new-tokens 2 | head -1"]
    result = subprocess.run(shell, capture_output=True, text=True, timeout=300)
    assert result.returncode == 141 and result.stdout.count("\n") == 1
    # The only line names the class, and how to train a block-diffusion model from it.
    assert result.stderr.count("\n") == 1 and "GPT2LMHeadModel" in result.stderr and "--init_from" in result.stderr
