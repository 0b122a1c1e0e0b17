"""Texts scored by a reference model: resumed after a kill, the same for any batch size, never mixed with others."""

import json
import math

import pytest
import torch
from test_cli import assert_refused

from bd3lm_hf.checkpoints import load_model
from bd3lm_hf.evaluation import generative
from bd3lm_hf.evaluation.generative import (
    MAX_REDRAWS,
    distinct,
    has_low_entropy,
    mean_repetition,
    summary,
    text_entropy,
)
from bd3lm_hf.evaluation.perplexity import summarize
from bd3lm_hf.evaluation.reference_model import load_reference_model
from bd3lm_hf.generation.text_generation import GeneratedText


NUMBERS = ("generative_perplexity", "standard_error", "mean_perplexity", "scored_tokens", "entropy", "distinct_1")
NUMBERS += ("distinct_2", "distinct_3", "repetition_4", "lengths", "forwards_per_token")


@pytest.fixture
def scored(bd3lm, model_folder, gpt2_folder, tmp_path, monkeypatch):
    """A function `(*arguments) -> (exit code, report or None, stdout, stderr)`, in a separate folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        given = ("--model", model_folder, "--judge", gpt2_folder, "--num-samples", 5, "--length", 16)
        code, out, err = bd3lm("eval", "--generative", *given, "--output", "result.json", *arguments)
        path = tmp_path / "result.json"
        return code, json.loads(path.read_text()) if path.exists() else None, out, err

    return run


def lines(tmp_path, name="samples.jsonl"):
    return [json.loads(line) for line in (tmp_path / name).read_text(encoding="utf-8").split("\n")[:-1]]


def test_texts_are_written_scored_counted_and_kept(scored, gpt2_folder, tiny_tokenizer, tmp_path):
    code, report, out, err = scored("--batch-size", 2)
    assert code == 0, err
    rows = lines(tmp_path)
    assert [row["index"] for row in rows] == list(range(5)) and "5 samples in samples.jsonl" in out
    texts = [GeneratedText(row["ids"], 1) for row in rows]
    assert all(len(text.ids) == 16 and text.ids[0] == 0 for text in texts)
    judge = load_reference_model(str(gpt2_folder), tiny_tokenizer, as_text=True, score_end=False)
    result = summarize(judge.score(texts))
    assert report["generative_perplexity"] == pytest.approx(result.perplexity, rel=1e-5)
    assert report["standard_error"] == pytest.approx(result.standard_error, rel=1e-3)
    assert report["scored_tokens"] == result.num_tokens == sum(row["scored_tokens"] for row in rows)
    each = [math.exp(row["nll"] / row["scored_tokens"]) for row in rows]
    assert report["mean_perplexity"] == pytest.approx(sum(each) / 5)
    assert report["entropy"] == pytest.approx(sum(text_entropy(text.ids) for text in texts) / 5)
    written = [text.new_ids for text in texts]
    assert report["distinct_2"] == distinct(written, 2) and report["repetition_4"] == mean_repetition(written)
    assert report["lengths"] == {"mean": 15, "median": 15, "shortest": 15, "longest": 15}
    assert report["forwards_per_token"] == 1.0
    assert report["seconds"] == pytest.approx(sum(row["seconds"] for row in rows))
    assert (report["seed"], report["length"], report["judge_estimator"]) == (0, 16, "exact")
    assert f"generative perplexity   {result.perplexity:.2f} +- " in out and "torch" in report


def test_a_killed_run_continues_and_gives_the_results_of_an_uninterrupted_one(scored, tmp_path, monkeypatch):
    expected = scored("--samples", "whole.jsonl")[1]  # in one batch
    write, calls = generative.generate_batch, []

    def killed(*arguments, **options):
        calls.append(len(arguments[1]))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return write(*arguments, **options)

    monkeypatch.setattr(generative, "generate_batch", killed)
    assert scored("--batch-size", 2)[0] == 130
    path = tmp_path / "samples.jsonl"
    path.write_bytes(path.read_bytes()[:-20])  # as if the second line was being written during the kill
    code, report, out, _ = scored("--batch-size", 3)
    assert code == 0 and calls == [2, 2, 3, 1] and "5 samples in samples.jsonl, 1 from an earlier run" in out
    for name in NUMBERS:
        assert report[name] == pytest.approx(expected[name], rel=1e-5), name
    more = scored("--num-samples", 7)[1]
    assert more["num_samples"] == 7 and len(lines(tmp_path)) == 7 and calls == [2, 2, 3, 1, 2]
    assert scored("--num-samples", 5)[1]["generative_perplexity"] == report["generative_perplexity"]


def test_texts_of_a_changed_run_are_refused(scored, model_folder, tmp_path):
    assert scored()[0] == 0
    before = (tmp_path / "samples.jsonl").read_bytes()
    for change, part in (
        (("--seed", 1), "seed is 0 there and 1 now"),
        (("--length", 9), "length is 16 there and 9 now"),
        (("--nucleus-p", 0.9), "nucleus_p is None there and 0.9 now"),
        (("--judge", model_folder), "judge is "),
    ):
        code, _, _, err = scored(*change)
        assert code == 2 and part in err and err.startswith("error: --samples samples.jsonl: line 1 was written with")
    model = load_model(str(model_folder))
    with torch.no_grad():
        model.get_output_embeddings().bias.add_(torch.arange(320) / 100)
    model.save_pretrained(model_folder)
    code, _, _, err = scored()
    assert code == 2 and "model_weights is " in err
    assert (tmp_path / "samples.jsonl").read_bytes() == before
    assert scored("--overwrite")[0] == 0


@pytest.mark.parametrize("unfit", [("--sampler", "analytic"), ("--context", "all"), ("--window-stride", 4)])
def test_a_refused_run_keeps_the_samples_that_it_would_have_overwritten(scored, tmp_path, unfit):
    assert scored()[0] == 0
    before = (tmp_path / "samples.jsonl").read_bytes()
    code, _, _, err = scored("--overwrite", *unfit)
    assert code == 2 and unfit[0].strip("-").replace("-", "_") in err
    assert (tmp_path / "samples.jsonl").read_bytes() == before


def test_an_end_token_ends_a_text_only_with_variable_length(scored, model_folder, tmp_path):
    model = load_model(str(model_folder))
    with torch.no_grad():
        model.get_output_embeddings().bias[1] += 6
    model.save_pretrained(model_folder)
    fixed = scored("--samples", "fixed.jsonl")[1]
    ended = scored("--variable-length")[1]
    assert fixed["lengths"]["shortest"] == 15 > ended["lengths"]["shortest"]
    for whole, text in zip(lines(tmp_path, "fixed.jsonl"), lines(tmp_path), strict=True):
        assert text["ids"] == whole["ids"][: len(text["ids"])]
        assert text["ids"][-1] == 1 or len(text["ids"]) == 16


def test_a_diffusion_model_can_be_the_judge(scored, model_folder):
    code, report, _, _ = scored("--judge", model_folder)
    assert code == 0 and report["judge_estimator"] == "exact" and report["generative_perplexity"] > 1


def test_a_single_text_has_no_standard_error():
    row = {"index": 0, "nll": 2.0, "scored_tokens": 2, "ids": [0, 5, 5], "num_prompt_tokens": 1, "seconds": 1.0}
    row |= {"forwards": 2, "batch_forwards": 2, "entropy": 0.5, "reference_entropy": 0.5, "redraws": 0}
    found = summary([{**row, "settings": {}}])
    assert found["standard_error"] is None and found["generative_perplexity"] == pytest.approx(math.e)
    assert found["distinct_3"] is None and found["repetition_4"] is None and found["seconds_per_token"] == 0.5


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--judge", "./nowhere"), "--judge ./nowhere: there is no such folder"),
        (("--samples", "no/folder/s.jsonl"), "--samples no/folder/s.jsonl: the folder"),
        (("--output", "no/folder/r.json"), "--output no/folder/r.json: the folder"),
        (("--num-samples", 0), "--num-samples: expected an integer >= 1, got '0'"),
        (("--length", 1), "--length: expected an integer >= 2, got '1'"),
        (("--dataset", "python-docs"), "unrecognized arguments: --dataset"),
    ],
)
def test_bad_input_is_refused_before_a_text_is_written(scored, monkeypatch, arguments, part):
    monkeypatch.setattr(generative, "generate_batch", None)
    code, report, out, err = scored(*arguments)
    assert code == 2 and not out and report is None
    assert err.startswith("error: ") and err.count("\n") == 1 and part in err


def test_a_judge_is_required_and_must_be_complete(bd3lm, model_folder, gpt2_folder, monkeypatch):
    monkeypatch.setattr(generative, "generate_batch", None)
    words = ("eval", "--generative", "--model", model_folder)
    assert_refused(bd3lm(*words), "--generative needs a --judge: the folder or hub name of a language model")
    (gpt2_folder / "model.safetensors").write_bytes(b"nothing")
    assert_refused(bd3lm(*words, "--judge", gpt2_folder), f"--judge {gpt2_folder}")


def test_a_model_without_a_bos_token_is_refused(scored, model_folder, monkeypatch):
    monkeypatch.setattr(generative, "generate_batch", None)
    for name in ("generation_config.json", "config.json"):
        path = model_folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), "bos_token_id": None}))
    code, _, _, err = scored()
    assert code == 2 and "has no bos_token_id to start a text from: set it in its generation config" in err


def test_texts_of_low_entropy_are_generated_again_a_limited_number_of_times(scored, tmp_path):
    window = ["--entropy-stop-window", 8, "--num-samples", 3]
    _, plain, _, _ = scored("--samples", "plain.jsonl", *window[2:])
    once = {row["index"]: row["ids"] for row in lines(tmp_path, "plain.jsonl")}
    # No text of 8 tokens has more than ln 8 nats: each is generated again until the last attempt.
    code, report, out, _ = scored("--samples", "never.jsonl", "--entropy-stop", 9, *window)
    assert code == 0 and (report["redrawn"], report["low_entropy"]) == (3, 3) and "3 texts, 3 of them" in out
    assert {row["redraws"] for row in lines(tmp_path, "never.jsonl")} == {MAX_REDRAWS}
    # A bound between the entropies of the texts changes only those below it.
    entropies = {index: text_entropy(ids[-8:]) for index, ids in once.items()}
    bound = sorted(entropies.values())[-1] - 1e-4
    code, report, _, _ = scored("--samples", "some.jsonl", "--entropy-stop", bound, *window)
    for row in lines(tmp_path, "some.jsonl"):
        assert (row["ids"] == once[row["index"]]) == (entropies[row["index"]] >= bound) == (row["redraws"] == 0)
    assert report["entropy_stop"] == pytest.approx(bound) and "entropy_stop" not in plain
    settings = {"entropy_stop": 4.0, "entropy_stop_window": 8}  # as published, a text is longer than the window
    assert [has_low_entropy([1] * count, settings) for count in (7, 8, 9)] == [False, False, True]
