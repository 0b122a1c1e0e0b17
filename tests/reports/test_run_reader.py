"""Whatever a run has written is read, and damaged files are named with the line."""

import json
import math

import numpy as np
import pytest
from test_report import write_run
from transformers import TrainerControl, TrainerState

from bd3lm_hf.reports.figures import smoothed
from bd3lm_hf.reports.run_reader import Run, RunSample, finite, read_material, read_run
from bd3lm_hf.training import callbacks
from bd3lm_hf.training.arguments import BD3LMTrainingArguments


def test_a_finished_run_is_read_from_its_results(tmp_path):
    run = read_run(write_run(tmp_path / "run", text="the end"))
    assert run.series["loss"][1].tolist() == [3.5, 3.0, 2.5]
    assert (run.held_out, run.is_exact, run.missing) == ("python-docs (validation split)", False, [])
    assert run.estimator(final=False) == "stratified estimate of the bound, 1 noise sample"
    assert run.estimator(final=True) == "exact bound"
    run.recipe["eval_num_samples"] = 4
    assert run.estimator(final=False) == "stratified estimate of the bound, 4 noise samples"
    assert [search["step"] for search in run.searches] == [10, 20]
    assert [sample.text for sample in run.samples] == ["early words", "the end"]


def test_the_samples_of_a_run_are_those_that_its_callback_writes(tmp_path, monkeypatch):
    text_of = lambda *_, prompt, max_new_tokens, **__: f"{prompt} text\n\nof {max_new_tokens}"  # noqa: E731
    monkeypatch.setattr(callbacks, "sample_text", text_of)
    sampler = callbacks.SampleCallback(None)
    args = BD3LMTrainingArguments(str(tmp_path), sample_prompt="The", sample_tokens=4)
    for step in (5, 10, 15, 10):  # the last one after the run was resumed from step 5
        sampler.on_evaluate(args, TrainerState(global_step=step), TrainerControl(), model=None)
    (tmp_path / "recipe.yaml").write_text("seed: 0\n", encoding="utf-8")
    text = "The text\n\nof 4"
    assert read_run(tmp_path).samples == [RunSample("at step 5", text), RunSample("at step 10", text)]


@pytest.mark.parametrize(
    ("config", "is_exact"),
    [
        ({"model_type": "ar"}, True),
        ({"model_type": "bd3lm", "block_size": 1}, True),
        ({"model_type": "bd3lm", "block_size": 4}, False),
        ({"model_type": "mdlm"}, False),
        ({"model_type": "of another library"}, False),
        ({}, False),
    ],
)
def test_a_likelihood_is_exact_where_the_class_of_the_model_says_so(tmp_path, config, is_exact):
    assert Run("a run", tmp_path, config=config).is_exact is is_exact


def test_a_run_that_still_trains_shows_its_last_checkpoint(tmp_path):
    (tmp_path / "recipe.yaml").write_text("seed: 1\n", encoding="utf-8")
    for step in (5, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        state = {"log_history": [{"loss": 4.0, "step": 5}, {"loss": 3.0, "step": 10}][: step // 5]}
        (folder / "trainer_state.json").write_text(json.dumps(state), encoding="utf-8")
    run = read_run(tmp_path)
    assert run.series["loss"][0].tolist() == [5, 10]
    absent = "results.json is missing: the run is still training or was stopped"
    assert run.missing == [absent, "the curves end at checkpoint-10"]


def test_a_search_that_is_being_written_is_left_out_and_missing_results_are_named(tmp_path):
    (tmp_path / "interval_search.jsonl").write_text('{"step": 10}\n{"step": 20, "int', encoding="utf-8")
    run = read_run(tmp_path)
    assert run.searches == [{"step": 10}]
    assert len(run.missing) == 2 and run.missing[0].startswith("results.json is missing")


def test_a_folder_of_runs_and_results_is_all_of_them(tmp_path):
    for name in ("b", "a"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "recipe.yaml").write_text("seed: 1\n", encoding="utf-8")
    row = {"model": "a", "seed": 1, "perplexity": 9.0, "generative_perplexity": 8.0}
    (tmp_path / "comparison.json").write_text(json.dumps([row]), encoding="utf-8")
    (tmp_path / "other.json").write_text("{}", encoding="utf-8")
    material = read_material([tmp_path, tmp_path / "a"])
    assert [run.name for run in material.runs] == ["a", "b"]
    assert [named.name for named in material.comparisons] == ["comparison"]


def test_runs_with_the_same_name_are_distinguished(tmp_path):
    folders = [tmp_path / parent / "run" for parent in ("x", "y")]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "recipe.yaml").write_text("seed: 1\n", encoding="utf-8")
    assert [run.name for run in read_material(folders).runs] == ["x/run", "y/run"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("results.json", '{"steps": 3,\n "losses": oops}', r"results.json is not valid JSON: .*line 2"),
        ("interval_search.jsonl", '{"step": 1}\n{"step"\n{}\n', r"interval_search.jsonl, line 2 is not valid JSON"),
        ("recipe.yaml", "seed: 1\nmodel: [3\n", r"recipe.yaml, line 3"),
    ],
)
def test_a_broken_file_of_a_run_is_named_with_its_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_material([tmp_path])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("samples.jsonl", b'{"text": "a"}\n\xff\n', r"samples\.jsonl, line 2 is not valid JSON: 'utf-8'"),
        ("config.json", b'{"model_type": "bd3lm"}', r"config\.json is not a result file"),
        ("prompts.jsonl", b'{"prompt": "a"}\n', r"prompts\.jsonl contains no samples"),
        ("numbers.jsonl", b"3\n", r"numbers\.jsonl contains no samples"),
        ("nowhere", None, "nowhere: there is no such file or folder"),
        ("", None, r"is not a run.*recipe\.yaml, results\.json"),
    ],
)
def test_what_cannot_be_reported_on_is_refused(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_material([tmp_path / name])
    with pytest.raises(ValueError, match="name at least one run"):
        read_material([])


def test_a_value_that_is_not_a_number_is_not_shown_as_one():
    row = {"a": 1, "b": math.nan, "c": None, "d": "3"}
    assert [finite(row, name) for name in "abcde"] == [1.0, None, None, None, None]


def test_a_step_that_was_logged_twice_counts_once(tmp_path):
    log = [{"loss": 4.0, "step": 2}, {"loss": 3.0, "step": 1}, {"loss": 5.0, "step": 2}]
    steps, values = Run("a run", tmp_path, log=log).series["loss"]
    assert (steps.tolist(), values.tolist()) == ([1, 2], [3.0, 5.0])


def test_the_smoothed_loss_does_not_lag():
    line = np.arange(200.0)
    np.testing.assert_allclose(smoothed(line)[:-5], line[:-5])
    assert smoothed(line)[-1] == np.mean(line[-6:])
    assert np.std(smoothed(np.tile([0.0, 1.0], 200))) < 0.1
