"""`bd3lm generate`: every sample is written once, as soon as it is finished, with the settings that it came from."""

import io
import json
import os
import sys
import types
from pathlib import Path

import pytest
import torch
from test_cli import assert_refused
from test_denoising_trace import replay
from transformers import AutoTokenizer

from bd3lm_hf.generation import generate_cli
from bd3lm_hf.generation.generate_cli import read_prompts
from bd3lm_hf.generation.text_generation import without_padding
from bd3lm_hf.generation.write_samples import SEPARATOR
from bd3lm_hf.modeling.generation_ssdlm import CONTEXTS, PROJECTIONS
from bd3lm_hf.modeling.modeling_bd3lm import BD3LMForMaskedLM
from bd3lm_hf.modeling.samplers_bd3lm import SAMPLERS, SAMPLING_DTYPES, SCORE_SAMPLERS
from bd3lm_hf.seeds import derived_seed
from bd3lm_hf.user_files import lock_output


@pytest.fixture
def generate(bd3lm, model_folder):
    """A function that calls `bd3lm generate` with the tiny model."""
    return lambda *arguments: bd3lm("generate", "--model", model_folder, *arguments)


def rows_of(path: Path) -> list[dict]:
    # Only at newlines: a text can contain other line separators.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


# --- texts -----------------------------------------------------------------------------------------------------------


def test_a_text_can_start_without_a_prompt(generate, tmp_path):
    output = tmp_path / "samples.jsonl"
    assert generate("--max-new-tokens", 8, "--nucleus-p", 0.9, "--num-samples", 3, "--output", output)[0] == 0
    rows = rows_of(output)
    assert [row["prompt"] for row in rows] == [None] * 3 and len({row["text"] for row in rows}) == 3
    assert {row["num_prompt_tokens"] for row in rows} == {1}  # the BOS token


def test_the_text_is_what_the_library_generates(generate, model_folder, tmp_path):
    output = tmp_path / "samples.jsonl"
    arguments = ["--prompt", "The lazy dog", "--prompt", "A", "--max-new-tokens", 10, "--seed", 5, "--top-k", 9]
    assert generate(*arguments, "--temperature", 0.8, "--output", output)[0] == 0
    model, tokenizer = BD3LMForMaskedLM.from_pretrained(model_folder), AutoTokenizer.from_pretrained(model_folder)
    inputs = tokenizer(["The lazy dog", "A"], padding=True, padding_side="left", return_tensors="pt")
    options = {"do_sample": True, "max_new_tokens": 10, "temperature": 0.8, "top_k": 9}
    generators = [torch.Generator().manual_seed(derived_seed(5, index)) for index in range(2)]
    written = model.generate(**inputs, return_dict_in_generate=True, generator=generators, **options)
    rows = rows_of(output)
    assert [row["text"] for row in rows] == tokenizer.batch_decode(written.sequences, skip_special_tokens=True)
    assert {row["batch_forwards"] for row in rows} == {written.num_forward_passes}
    assert all(0 < row["forwards"] <= row["batch_forwards"] for row in rows)


def test_the_choices_equal_those_of_the_library():
    tables = {"sampler": {**SAMPLERS, **SCORE_SAMPLERS}, "sampling_dtype": SAMPLING_DTYPES}
    tables |= {"context": CONTEXTS, "projection": PROJECTIONS}
    assert {name: values for name, (values, _) in generate_cli.CHOICES.items()} == {
        name: tuple(table) for name, table in tables.items()
    }


# --- the samples file ------------------------------------------------------------------------------------------------


def test_a_line_has_the_text_and_how_it_was_generated(generate, model_folder, tmp_path):
    output = tmp_path / "samples.jsonl"
    arguments = ["--prompt", "The fox", "--max-new-tokens", 6, "--seed", 7, "--temperature", 0.5, "--batch-size", 2]
    code, out, _ = generate(*arguments, "--output", output)
    assert code == 0 and out == f"1 samples in {output}\n"
    (row,) = rows_of(output)
    assert row["prompt"] == "The fox" and row["text"].startswith("The fox")
    assert row["index"] == 0 and row["seed"] == 7 and row["model"] == str(model_folder)
    assert row["num_prompt_tokens"] > 0 and 0 < row["num_tokens"] <= 6 and row["seconds"] > 0
    assert row["tokens_per_forward"] == row["num_tokens"] / row["forwards"]
    settings = {"model": str(model_folder), "seed": 7, "max_new_tokens": 6, "do_sample": True, "temperature": 0.5}
    assert row["settings"] == settings


def test_a_file_grows_by_samples_of_several_prompts_and_by_prompts(generate, tmp_path):
    output = tmp_path / "s.jsonl"
    arguments = ["--prompt", "The fox", "--prompt", "A", "--max-new-tokens", 8, "--output", output]
    assert generate(*arguments, "--num-samples", 2)[0] == 0
    before = output.read_bytes()
    code, out, _ = generate(*arguments, "--num-samples", 3)
    assert code == 0 and out == f"6 samples in {output}, 4 from an earlier run\n"
    assert output.read_bytes().startswith(before)
    whole = tmp_path / "whole.jsonl"
    assert generate(*arguments[:-1], whole, "--num-samples", 3)[0] == 0
    texts, expected = ({(row["prompt"], row["text"]) for row in rows_of(path)} for path in (output, whole))
    assert texts == expected
    assert generate(*arguments, "--prompt", "Every", "--num-samples", 3)[0] == 0
    rows = rows_of(output)
    prompts = [*["The fox"] * 2, *["A"] * 2, "The fox", "A", *["Every"] * 3]
    assert [(row["index"], row["prompt"]) for row in rows] == list(enumerate(prompts))
    assert len({row["text"] for row in rows}) == 9  # every sample has its own seed
    refused = generate("--prompt", "A", "--max-new-tokens", 8, "--output", output)
    assert_refused(refused, "prompt is 'The fox' there", "--overwrite")


def test_a_file_that_another_process_continues_is_refused(generate, tmp_path):
    with lock_output(tmp_path / "samples.jsonl", "--output"):
        assert_refused(generate("--output", tmp_path / "samples.jsonl"), "--output", "in use by another process")


def test_only_the_end_of_a_long_prompt_is_read(generate, tmp_path):
    prompt = "The quick brown fox " * 30
    code, out, err = generate("--prompt", prompt, "--max-new-tokens", 3)
    assert code == 0 and out.startswith(prompt) and not err.startswith("error")
    assert generate("--prompt", prompt, "--max-new-tokens", 3, "--trace", tmp_path / "t.json")[0] == 0


def test_other_settings_need_another_file_or_overwriting(generate, tmp_path):
    output = tmp_path / "samples.jsonl"
    arguments = ["--max-new-tokens", 4, "--output", output]
    assert generate(*arguments, "--seed", 1)[0] == 0
    before = output.read_bytes()
    assert_refused(generate(*arguments, "--seed", 2), "(seed is 1 there and 2 now)")
    assert output.read_bytes() == before
    # The old file is kept if the model refuses, before or during generation.
    for refused in (["--prompt", "A <mask> fox"], ["--sampler", "analytic"]):
        assert generate(*arguments, "--seed", 2, "--overwrite", *refused)[0] == 2
        assert output.read_bytes() == before
    assert generate(*arguments, "--seed", 2, "--overwrite")[0] == 0
    assert [row["seed"] for row in rows_of(output)] == [2]


def test_an_interrupted_run_keeps_its_finished_samples(generate, monkeypatch, tmp_path):
    output, write, calls = tmp_path / "samples.jsonl", BD3LMForMaskedLM.generate, []

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return write(*arguments, **options)

    monkeypatch.setattr(BD3LMForMaskedLM, "generate", interrupted)
    arguments = ["--num-samples", 5, "--batch-size", 1, "--max-new-tokens", 4, "--output", output]
    assert generate(*arguments) == (130, "", f"interrupted: 3 of 5 samples are in {output}\n")
    assert [row["index"] for row in rows_of(output)] == [0, 1, 2]
    assert generate(*arguments)[1] == f"5 samples in {output}, 3 from an earlier run\n"


# --- samplers and traces ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "settings", "forwards"),
    [
        (["--sampler", "first_hitting"], {"sampler": "first_hitting"}, 12),
        (["--sampler", "first_hitting", "--num-denoising-steps", 1], {"num_denoising_steps": 1}, 3),
        (["--sampler", "ancestral", "--num-denoising-steps", 1], {"sampler": "ancestral"}, 3),
        (["--sampler", "confidence", "--confidence-threshold", 0], {"confidence_threshold": 0.0}, 3),
        (["--sampler", "confidence", "--confidence-threshold", 1], {"confidence_threshold": 1.0}, 12),
        (["--sampler", "entropy_bound", "--entropy-bound", 99], {"entropy_bound": 99.0}, 3),
        (["--remask-fraction", 0.5, "--sampling-dtype", "float64"], {"remask_fraction": 0.5}, 12 + 3 * 2),
        (["--stop-at-second-eos"], {"stop_at_second_eos": True}, 12),
        (["--entropy-stop", 4, "--entropy-stop-window", 200], {"entropy_stop": 4.0, "entropy_stop_window": 200}, 12),
    ],
)
def test_every_sampler_and_its_fields_can_be_chosen(generate, tmp_path, flags, settings, forwards):
    output = tmp_path / "samples.jsonl"
    # Two blocks of prompt, three blocks to generate.
    assert generate("--prompt", "AAAAAAAA", "--max-new-tokens", 12, *flags, "--output", output)[0] == 0
    (row,) = rows_of(output)
    assert row["num_prompt_tokens"] == 8 and row["num_tokens"] == 12
    assert settings.items() <= row["settings"].items()
    assert row["forwards"] == forwards


def test_a_trace_replays_every_sample_of_a_batch(generate, tmp_path):
    page, data, output = tmp_path / "trace.html", tmp_path / "trace.json", tmp_path / "samples.jsonl"
    arguments = ["--prompt", "The lazy dog", "--prompt", "A", "--num-samples", 2, "--max-new-tokens", 13]
    flags = ["--sampler", "confidence", "--confidence-threshold", 0.01, "--remask-fraction", 0.5, "--temperature", 2]
    code, _, _ = generate(*arguments, *flags, "--trace", page, "--trace", data, "--output", output)
    assert code == 0
    document, rows = json.loads(data.read_text()), rows_of(output)
    assert document["model"] == "model" and document["sampler"] == "confidence" and document["block_size"] == 4
    assert document["settings"]["remask_fraction"] == 0.5 and document["settings"]["seed"] == 0
    assert len(document["samples"]) == 4
    for sample, row in zip(document["samples"], rows, strict=True):
        assert (sample["index"], sample["prompt"]) == (row["index"], row["prompt"])
        assert sample["num_prompt_tokens"] == row["num_prompt_tokens"] and sample["num_tokens"] == row["num_tokens"]
        assert sample["forwards"] <= row["forwards"] <= row["batch_forwards"]
        assert any(not step["forward"] for step in sample["steps"])
        assert replay(sample)[-1] == sample["ids"]
    assert json.dumps(document["samples"][3]["ids"]) in page.read_text()


def test_a_trace_needs_a_model_that_denoises_and_something_to_write(generate, gpt2_folder, bd3lm, tmp_path):
    refused = bd3lm("generate", "--model", gpt2_folder, "--prompt", "A", "--trace", tmp_path / "trace.html")
    assert_refused(refused, "--trace shows denoising steps; a GPT2LMHeadModel does not have them")
    arguments = ["--max-new-tokens", 4, "--output", tmp_path / "samples.jsonl"]
    assert generate(*arguments)[0] == 0
    finished = generate(*arguments, "--trace", tmp_path / "trace.html")
    assert_refused(finished, "all samples are already in", "nothing to trace")
    assert not (tmp_path / "trace.html").exists()


# --- what a person sees ----------------------------------------------------------------------------------------------


def test_several_texts_are_separated_and_a_stream_shows_one_after_the_other(generate):
    arguments = ["--prompt", "A block is", "--prompt", "The", "--num-samples", 2, "--max-new-tokens", 6]
    out = generate(*arguments, "--batch-size", 1)[1]
    assert out.count(f"\n{SEPARATOR}\n") == 3 and not out.startswith(SEPARATOR)
    assert generate(*arguments, "--stream")[1] == out


def test_drafts_are_shown_in_a_terminal_only(generate, monkeypatch):
    arguments = ["--prompt", "A block is", "--max-new-tokens", 6, "--stream"]
    plain = generate(*arguments)[1]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    drafts = generate(*arguments)[1]
    assert "\033" not in plain
    yellow, clear = "\033[33m", "\0338\033[J"
    assert drafts.count(yellow) >= 6 and drafts.count(clear) == drafts.count(yellow)
    assert drafts.split(clear)[-1].strip() in plain  # the last draft is the text


def test_a_long_run_shows_its_progress_in_a_terminal_only(generate, monkeypatch, tmp_path):
    arguments = ["--num-samples", 3, "--batch-size", 1, "--max-new-tokens", 4, "--output", tmp_path / "s.jsonl"]
    assert generate(*arguments)[2] == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    err = generate(*arguments, "--overwrite")[2]
    assert "generating" in err and "0/3" in err
    assert "generating" not in generate("--max-new-tokens", 4)[2]  # one batch is not a long run


# --- bad input -------------------------------------------------------------------------------------------------------


def test_a_model_without_a_begin_token_needs_a_prompt(generate, model_folder):
    for name in ("config.json", "generation_config.json"):
        fields = json.loads((model_folder / name).read_text())
        (model_folder / name).write_text(json.dumps({**fields, "bos_token_id": None}))
    assert_refused(generate(), "no bos_token_id to start a text from: give a --prompt")
    assert generate("--prompt", "A", "--max-new-tokens", 3)[0] == 0


@pytest.mark.parametrize(
    ("row", "pad", "eos", "count"),
    [
        ([5, 6, 7], 2, 1, 3),
        ([5, 1, 2, 2], 2, 1, 2),
        ([5, 1, 6, 1, 2], 2, 1, 4),  # the second end token ended this one
        ([5, 6, 2, 2], 2, 1, 2),  # a stop string did
        ([5, 1, 1, 1], 1, 1, 2),
        ([5, 1, 1, 1], None, [1, 3], 2),
        ([5, 3, 1, 1], None, [1, 3], 2),
        ([5, 3, 1, 1], 1, [3, 1], 2),  # as Qwen: padding is one of two end tokens
        ([5, 6, 1], 1, 1, 3),
        ([5, 6], None, None, 2),
    ],
)
def test_padding_after_the_end_is_not_a_new_token(row, pad, eos, count):
    config = types.SimpleNamespace(pad_token_id=pad, eos_token_id=eos)
    assert without_padding(row, config) == row[:count]


# --- prompts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "prompts"),
    [
        ("p.txt", "one\ntwo", ["one", "two"]),
        ("p.txt", "\n one\r\n\n  \ntwo \n\n", [" one", "two "]),
        ("p.txt", "\ufeffone\n", ["one"]),
        ("p.txt", "a\u2028b\nc\n", ["a\u2028b", "c"]),
        ("p.jsonl", '{"prompt": "a\\nb", "other": 1}\n\n{"prompt": "c"}\n', ["a\nb", "c"]),
    ],
)
def test_a_file_holds_a_prompt_per_line(tmp_path, name, content, prompts):
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert read_prompts(None, str(tmp_path / name)) == prompts


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("p.txt", b"", "p.txt"),
        ("p.txt", b"\n \n", "p.txt"),
        ("p.txt", b"ab\xff", "byte 2"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt', "line 2 of"),
        ("p.jsonl", b'{"text": "a"}\n', "line 1 of"),
        ("p.jsonl", b'[1]\n{"prompt": 2}\n', "line 1 of"),
        ("p.jsonl", b'{"prompt": " "}\n', "line 1 of"),
        ("p.jsonl", b'{"prompt": "\\ud800"}\n', "line 1 of"),
    ],
)
def test_a_bad_prompt_file_is_refused_with_the_line(tmp_path, name, content, match):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=match):
        read_prompts(None, str(tmp_path / name))


def test_prompts_come_from_the_command_line_or_standard_input(tmp_path, monkeypatch):
    assert read_prompts(["a", "b\nc"], None) == ["a", "b\nc"]
    for texts, file, prompts in ((["-"], None, ["a", "b"]), (None, "-", ["a", "b"]), (None, None, [None])):
        monkeypatch.setattr(sys, "stdin", io.StringIO("a\nb\n"))  # not a real file
        assert read_prompts(texts, file) == prompts
    with (tmp_path / "piped").open("w+") as piped:
        monkeypatch.setattr(sys, "stdin", piped)
        assert read_prompts(None, None) == [None]
        piped.write("a\n")
        piped.seek(0)
        assert read_prompts(None, None) == ["a"]
    for wrong in ("", " ", "\udcff"):
        with pytest.raises(ValueError, match="--prompt 2"):
            read_prompts(["a", wrong], None)
    with pytest.raises(ValueError, match="nowhere.txt"):
        read_prompts(None, "nowhere.txt")


def test_a_silent_pipe_is_not_waited_for(monkeypatch):
    reader, writer = os.pipe()
    with os.fdopen(reader) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert read_prompts(None, None) == [None]
    os.close(writer)
