"""`bd3lm`: exit code 0 only on success, errors in one line."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bd3lm_hf import cli


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


def change_weights(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (lambda x: [p.unlink() for p in x.glob("token*")], ["holds no tokenizer"]),
        (lambda x: cut(x / "model.safetensors", 4000), ["SafetensorError", "name a complete checkpoint"]),
        (lambda x: cut(x / "model.safetensors", 4), ["SafetensorError", "name a complete checkpoint"]),
        (lambda x: (x / "model.safetensors").unlink(), ["no file named model.safetensors"]),
        (lambda x: (x / "config.json").unlink(), ["config.json"]),
        (lambda x: (x / "config.json").write_text("{"), ["config.json"]),
        (
            lambda x: change_weights(x, lambda w: w.pop("backbone.output_layer.linear.bias")),
            ["1 missing weights (backbone.output_layer.linear.bias)", "checkpoint of another model"],
        ),
        (
            lambda x: change_weights(x, lambda w: w.update(other=torch.zeros(1))),
            ["1 unexpected weights (other)", "checkpoint of another model"],
        ),
        (
            lambda x: change_weights(x, lambda w: w.update({"backbone.vocab_embed.embedding": torch.zeros(3, 3)})),
            ["1 mismatched weights (backbone.vocab_embed.embedding)"],
        ),
        (
            lambda x: change_weights(x, lambda w: w["backbone.vocab_embed.embedding"].fill_(torch.nan)),
            ["backbone.vocab_embed.embedding in", "are NaN or infinite"],
        ),
    ],
    ids=[
        "tokenizer",
        "weights",
        "header",
        "no weights",
        "no config",
        "config",
        "missing",
        "unexpected",
        "shape",
        "nan",
    ],
)
@pytest.mark.parametrize("verb", ["eval", "generate"])
def test_a_damaged_checkpoint_is_refused(bd3lm, model_folder, text_file, damage, parts, verb):
    damage(model_folder)
    arguments = ["--dataset", text_file] if verb == "eval" else []
    assert_refused(bd3lm(verb, "--model", model_folder, *arguments), *parts)


def test_a_tokenizer_of_another_model_is_refused(bd3lm, model_folder):
    config = json.loads((model_folder / "config.json").read_text())
    (model_folder / "config.json").write_text(json.dumps({**config, "mask_token_id": 100}))
    assert_refused(bd3lm("generate", "--model", model_folder), "mask_token_id is 100")


def test_a_tokenizer_can_come_from_elsewhere(bd3lm, model_folder, tiny_tokenizer, tmp_path):
    for path in model_folder.glob("token*"):
        path.unlink()
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    arguments = ["generate", "--model", model_folder, "--tokenizer", tmp_path / "tokenizer", "--max-new-tokens", 3]
    assert bd3lm(*arguments)[0] == 0


def test_a_model_that_is_nowhere_is_refused(bd3lm, tmp_path):
    assert_refused(bd3lm("generate", "--model", tmp_path / "nowhere"), "there is no such folder")
    assert_refused(bd3lm("generate", "--model", "owner/nothing"), "can not be loaded")


# --- the command itself ----------------------------------------------------------------------------------------------


def test_bench_gets_the_rest_of_the_line(bd3lm):
    code, out, _ = bd3lm("bench", "--help")
    assert code == 0 and out.startswith("usage: bd3lm bench")
    assert bd3lm("bench", "--repeats", "many")[0] == 2


def test_train_gets_the_rest_of_the_line(bd3lm, monkeypatch):
    seen = []
    train = types.SimpleNamespace(main=seen.append)
    monkeypatch.setattr(
        cli.importlib, "import_module", lambda name: train if name == "bd3lm_hf.training.train" else None
    )
    assert bd3lm("train", "recipe.yaml", "--max_steps", 3)[0] == 0
    assert seen == [["recipe.yaml", "--max_steps", "3"]]


def test_eval_of_texts_is_another_module_with_its_own_flags(bd3lm, monkeypatch, model_folder):
    seen = []
    generative = types.SimpleNamespace(
        add_arguments=lambda parser: parser.add_argument("--judge"),
        check=lambda arguments: seen.append(arguments.judge),
        run=lambda arguments, model, tokenizer: seen.append(type(model).__name__),
    )
    monkeypatch.setitem(sys.modules, "bd3lm_hf.evaluation.generative", generative)
    assert bd3lm("eval", "--model", model_folder, "--generative", "--judge", "gpt2")[0] == 0
    assert seen == ["gpt2", "BD3LMForMaskedLM"]
    assert_refused(bd3lm("eval", "--model", model_folder, "--judge", "gpt2"), "unrecognized arguments: --judge")


def test_train_reports_its_own_errors(bd3lm):
    code, _, err = bd3lm("train", "nowhere.yaml")
    assert code == 2 and err.startswith("error: ") and "nowhere.yaml" in err


@pytest.mark.parametrize(("arguments", "part"), [((), "required: VERB"), (("dream",), "invalid choice: 'dream'")])
def test_a_verb_is_needed(bd3lm, arguments, part):
    assert_refused(bd3lm(*arguments), part)


def test_help_lists_the_verbs_that_exist(bd3lm):
    code, out, _ = bd3lm("--help")
    assert code == 0
    verbs = ("train", "compare", "eval", "generate", "quality", "bench", "convert", "push", "verify")
    assert [verb for verb in verbs if f"  {verb} " in out] == list(verbs)


def test_an_unexpected_failure_is_not_called_bad_input(bd3lm, monkeypatch, model_folder):
    def fail(*arguments):
        raise ZeroDivisionError("over\nnothing")

    monkeypatch.setattr(cli, "load", fail)
    assert bd3lm("generate", "--model", model_folder)[::2] == (1, "error: ZeroDivisionError: over nothing\n")
    with pytest.raises(ZeroDivisionError):
        cli.main(["generate", "--model", str(model_folder), "--traceback"])


def test_an_interrupt_ends_quietly(bd3lm, monkeypatch, model_folder):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "load", interrupt)
    assert bd3lm("generate", "--model", model_folder) == (130, "", "")


def test_the_command_runs_in_a_process_of_its_own(model_folder, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parent.parent)}
    command = [sys.executable, "-m", "bd3lm_hf.cli", "generate", "--model"]
    good, bad = (
        subprocess.run([*command, folder, "--max-new-tokens", "4"], capture_output=True, text=True, env=environment)
        for folder in (model_folder, tmp_path / "nowhere")
    )
    assert good.returncode == 0 and good.stdout.strip()
    assert bad.returncode == 2 and not bad.stdout
    assert bad.stderr.startswith("error: ") and "Traceback" not in bad.stderr
