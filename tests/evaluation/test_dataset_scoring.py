"""`bd3lm eval` prints what the library computes, and refuses wrong arguments before any work."""

import csv
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from generating import make_family
from shared_models import special_ids
from test_cli import assert_refused
from two_processes import evaluation_of

from bd3lm_hf import cli
from bd3lm_hf.console import load_model_and_tokenizer
from bd3lm_hf.data import load_text, pack
from bd3lm_hf.data.sources import SUITES
from bd3lm_hf.evaluation import dataset_scoring
from bd3lm_hf.evaluation.perplexity import perplexity
from bd3lm_hf.modeling.modeling_bd3lm import BD3LMForMaskedLM


@pytest.fixture
def run(bd3lm, model_folder, text_file, tmp_path):
    """A function `(*arguments) -> result` that scores the text file with the model."""

    def score(*arguments, model=model_folder, data=text_file, name="result") -> dict:
        output = tmp_path / f"{name}.json"
        given = ["--model", model, "--dataset", data, "--output", output, *arguments]
        code, out, err = bd3lm("eval", *given)
        assert code == 0, err
        return {**json.loads(output.read_text()), "out": out}

    return score


def save(family: str, tokenizer, folder: Path, **fields) -> Path:
    fields |= {"vocab_size": len(tokenizer), "model_length": 32, **special_ids(tokenizer)}
    make_family(family, **fields).float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# --- What it says ----------------------------------------------------------------------------------------------------


def test_eval_prints_and_writes_what_the_library_computes(run, model_folder, text_file):
    result = run("--estimator", "exact")
    assert f"{result['perplexity']:.4f}" in result["out"] and "(exact bound)" in result["out"]
    assert result["estimator"] == "exact" and result["split"] == "validation" and result["length"] == 32
    arguments = cli.make_verb_parser("eval").parse_args(["--model", str(model_folder)])
    model, tokenizer = load_model_and_tokenizer(arguments)
    rows = pack(load_text(str(text_file), split="validation"), tokenizer, length=32)
    expected = perplexity(model, rows, estimator="exact")
    assert result["nll"] == expected.nll
    assert result["standard_error"] == expected.standard_error
    assert result["num_tokens"] == expected.num_tokens and result["bits_per_byte"] > 0
    assert result["bits_per_token"] == pytest.approx(result["nll"] / math.log(2))


def test_eval_scores_at_most_max_sequences(run):
    result = run("--split", "train", "--max-sequences", 3, "--num-samples", 2)
    assert result["num_sequences"] <= 3 and result["num_samples"] == 2
    assert run("--split", "train", "--max-sequences", 1)["standard_error"] is None  # NaN is not valid JSON


def test_two_runs_give_equal_numbers_and_record_what_they_depend_on(run):
    results = [run("--seed", seed, name=name) for name, seed in (("a", 1), ("b", 1), ("c", 2))]
    differences = {key for key in results[0] if results[0][key] != results[1][key]}
    assert differences <= {"seconds", "out"}
    assert results[2]["nll"] != results[0]["nll"] and results[2]["weights_sha256"] == results[0]["weights_sha256"]
    for name in ("config", "weights", "tokenizer", "data"):
        assert len(results[0][f"{name}_sha256"]) == 16
    assert results[0]["torch"] == torch.__version__ and results[0]["dtype"] == "float32"
    assert results[0]["seed"] == 1 and results[0]["device"] == "cpu"


def test_an_interrupted_run_continues_even_if_another_ran_in_between(
    bd3lm, model_folder, text_file, tmp_path, monkeypatch, run
):
    expected = run("--split", "train", "--batch-size", 2, name="whole")
    output = tmp_path / "x.json"
    given = ["eval", "--model", model_folder, "--dataset", text_file, "--split", "train", "--batch-size", 2]
    lengths, score = [], BD3LMForMaskedLM.token_nll

    def recording(self, ids, *arguments, **named):
        lengths.append(len(ids))
        if len(lengths) == 4 and not done:
            raise KeyboardInterrupt
        return score(self, ids, *arguments, **named)

    done = False
    monkeypatch.setattr(BD3LMForMaskedLM, "token_nll", recording)
    assert bd3lm(*given, "--output", output)[0] == 130
    assert lengths == [1, 2, 2, 2]  # the check of the estimator, two batches, and the one that was lost
    done = True
    other = tmp_path / "x.csv"  # with the same file of scores
    assert bd3lm(*given, "--output", other, "--seed", 1)[0] == 0 and not output.exists()
    lengths.clear()
    assert bd3lm(*given, "--output", output)[0] == 0
    assert json.loads(output.read_text())["nll"] == expected["nll"]
    assert sum(lengths[1:]) == expected["num_sequences"] - 4
    lengths.clear()
    assert bd3lm(*given, "--output", output, "--restart")[0] == 0
    assert sum(lengths[1:]) == expected["num_sequences"]


@pytest.mark.parametrize("estimator", ["published", "stratified"])
def test_two_processes_give_the_result_of_one(bd3lm, two_processes, tmp_path, estimator):
    folder, results = two_processes
    assert [result["eval"] for result in results] == [[0, 0, 0], [0, 0, 0]]
    shared = json.loads((folder / f"eval-{estimator}.json").read_text())
    assert bd3lm(*evaluation_of(folder, tmp_path / "alone.json", "--estimator", estimator))[0] == 0
    alone = json.loads((tmp_path / "alone.json").read_text())
    assert shared["processes"] == 2 and shared["num_sequences"] > 12
    assert {name for name in alone if alone[name] != shared[name]} == {"processes", "seconds"}
    scores = (folder / f"eval-{estimator}.scores.jsonl").read_text().splitlines()
    written = [score for line in scores for score in json.loads(line).get("scores", ())]
    assert sorted(row for row, _, _ in written) == list(range(shared["num_sequences"]))
    # Scored again from a file with the scores of the first rounds.
    resumed = json.loads((folder / "eval-resumed.json").read_text())
    assert resumed["nll"] == json.loads((folder / "eval-stratified.json").read_text())["nll"]
    lines = [(folder / f"eval-{name}.scores.jsonl").read_text().splitlines() for name in ("stratified", "resumed")]
    assert lines[0][:3] == lines[1][:3] and len(lines[0]) == len(lines[1])


def test_the_likelihood_of_an_autoregressive_model_is_exact(run, tiny_tokenizer, tmp_path):
    result = run("--split", "train", model=save("ar", tiny_tokenizer, tmp_path / "ar"))
    assert result["estimator"] == "exact" and not result["bound"] and result["num_samples"] is None
    assert result["model_class"] == "ARForCausalLM" and "exact likelihood" in result["out"]


# --- The published protocol and the suite ----------------------------------------------------------------------------


def test_the_published_protocol_cuts_texts_as_published_by_default(run):
    result = run("--estimator", "published")
    found = {name: result[name] for name in ("packing", "insert_eos", "insert_special", "num_samples")}
    assert found == {"packing": "published", "insert_eos": True, "insert_special": True, "num_samples": None}
    said = run("--estimator", "published", "--packing", "contiguous", "--no-insert-special", name="said")
    assert (said["packing"], said["insert_special"], said["insert_eos"]) == ("contiguous", False, True)
    ours = run(name="ours")
    assert (ours["packing"], ours["insert_special"], ours["estimator"]) == ("contiguous", False, "stratified")
    assert run("--estimator", "published", name="again")["nll"] == result["nll"] != said["nll"]


def test_a_name_of_the_table_has_its_flags_even_if_a_folder_is_called_so(tmp_path, monkeypatch):
    (tmp_path / "owt").mkdir()
    monkeypatch.chdir(tmp_path)
    words = ["--model", "x", "--dataset", "owt", "--estimator", "published"]
    (target,) = dataset_scoring._targets(cli.make_verb_parser("eval").parse_args(words))
    assert not target.flags.insert_special  # as for OpenWebText


WORDS = "The quick brown fox jumps over the lazy dog, and the lazy dog sleeps on. " * 3


@pytest.fixture
def copies(tmp_path) -> Path:
    """Tiny copies of the suite's datasets, with the columns, files and splits of their sources."""
    folder = tmp_path / "copies"
    columns = {"ptb": "sentence", "scientific_papers_pubmed": "article", "scientific_papers_arxiv": "article"}
    others = {"scientific_papers_pubmed": {"abstract": "no"}, "scientific_papers_arxiv": {"abstract": "no"}}
    for number, name in enumerate(SUITES["zero-shot"].sets):
        split = SUITES["zero-shot"].sets[name].split
        rows = [{columns.get(name, "text"): f"{number} {WORDS}", **others.get(name, {})} for _ in range(4)]
        if name == "ag_news":
            rows = [{**row, "label": 1} for row in rows]
        (folder / name).mkdir(parents=True)
        text = "\n".join(map(json.dumps, rows))
        (folder / name / f"{split}.jsonl").write_text(text)
        (folder / name / "train.jsonl").write_text(text.replace("quick", "slow"))
    # A copy can also be a file.
    for name in ("lambada", "lm1b"):
        shutil.move(folder / name / "test.jsonl", folder / f"{name}.jsonl")
        shutil.rmtree(folder / name)
    return folder


def test_the_suite_is_one_table_with_the_published_flags(bd3lm, model_folder, copies, tmp_path):
    outputs = [tmp_path / f"x.{kind}" for kind in ("json", "csv", "md")]
    given = ["eval", "--model", model_folder, "--suite", "zero-shot", "--suite-source", copies, "--output", *outputs]
    code, out, err = bd3lm(*given)
    assert code == 0, err
    report = json.loads(outputs[0].read_text())
    assert report["suite"] == "zero-shot"
    names = list(SUITES["zero-shot"].sets)
    assert [row["dataset"] for row in report["results"]] == names
    for row in report["results"]:
        assert (row["packing"], row["insert_eos"], row["insert_special"]) == ("published", False, True)
        assert row["estimator"] == "published" and row["suite"] == "zero-shot" and row["num_sequences"] > 2
    assert {row["dataset"] for row in report["results"] if row["split"] == "test"} == {"lm1b", "lambada", "ag_news"}
    assert len({row["data_sha256"] for row in report["results"]}) == 8
    table = outputs[2].read_text()
    assert "sequences of 32 tokens (the paper: 1024)" in out and table.strip() in out
    assert len(table.splitlines()) == 10 and "| ptb (validation split) |" in table and table.count("| &le; ") == 8
    rows = list(csv.DictReader(outputs[1].read_text().splitlines()))
    assert [row["nll"] for row in rows] == [str(row["nll"]) for row in report["results"]]
    # A single dataset with the same flags gives the same result.
    flags = ["--packing", "published", "--no-insert-eos", "--insert-special", "--estimator", "published"]
    alone = ["--dataset", "ptb", "--dataset-source", copies / "ptb", "--output", tmp_path / "ptb.json"]
    assert bd3lm("eval", "--model", model_folder, *alone, *flags)[0] == 0
    assert json.loads((tmp_path / "ptb.json").read_text())["nll"] == report["results"][0]["nll"]


def test_datasets_and_estimator_of_a_suite_can_be_chosen(bd3lm, model_folder, copies, tmp_path):
    given = ["--suite", "zero-shot", "--suite-source", copies, "--sets", "lambada", "ptb", "--estimator", "exact"]
    assert bd3lm("eval", "--model", model_folder, *given, "--output", tmp_path / "x.json")[0] == 0
    rows = json.loads((tmp_path / "x.json").read_text())["results"]
    assert [(row["dataset"], row["estimator"], row["packing"]) for row in rows] == [
        ("lambada", "exact", "published"),
        ("ptb", "exact", "published"),
    ]


def test_datasets_that_cannot_be_loaded_are_named_before_any_is_scored(bd3lm, model_folder, copies, monkeypatch):
    (copies / "wikitext2" / "validation.jsonl").write_text(json.dumps({"body": "x"}))
    (copies / "ag_news" / "test.jsonl").write_text(json.dumps({"text": ""}))
    monkeypatch.setattr(dataset_scoring, "score_shared", lambda *a, **b: pytest.fail("something was scored"))
    result = bd3lm("eval", "--model", model_folder, "--suite", "zero-shot", "--suite-source", copies)
    assert_refused(result, "2 of the 8 datasets", "wikitext2 (", "ag_news (", "--sets")


def test_copies_that_are_missing_are_named_before_the_model_is_loaded(bd3lm, copies):
    for name in ("ag_news", "ptb"):
        shutil.rmtree(copies / name)
    result = bd3lm("eval", "--model", "nowhere", "--suite", "zero-shot", "--suite-source", copies)
    assert_refused(result, "has no copy of ptb, ag_news:", "--sets")


# --- Bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--dataset", "nowhere.txt"), "There is no file or folder 'nowhere.txt'"),
        (("--dataset", "python-doc"), "Did you mean 'python-docs'?"),
        (("--dataset", "TEXT", "--batch-size", 0), "--batch-size: expected an integer >= 1, got '0'"),
        (("--dataset", "TEXT", "--num-samples", 0), "--num-samples: expected an integer >= 1, got '0'"),
        (("--dataset", "TEXT", "--num-samples", "many"), "--num-samples: expected an integer >= 1, got 'many'"),
        (("--dataset", "TEXT", "--max-sequences", 0), "--max-sequences: expected an integer >= 1"),
        (("--dataset", "TEXT", "--length", -1), "--length: expected an integer >= 1, got '-1'"),
        (("--dataset", "TEXT", "--output", "no/folder/f.json"), "--output no/folder/f.json"),
        (("--dataset", "TEXT", "--output", "f.yaml"), "end in one of .json, .csv, .md"),
        (("--dataset", "TEXT", "--estimator", "magic"), "invalid choice: 'magic'"),
        (("--dataset", "TEXT", "--estimator", "exact", "--num-samples", 2), "--num-samples 2"),
        (("--dataset", "TEXT", "--estimator", "published", "--num-samples", 2), "--num-samples 2"),
        (("--dataset", "TEXT", "--device", "abacus"), "--device abacus"),
        (("--dataset", "TEXT", "--suite", "zero-shot"), "either a --dataset or a --suite"),
        (("--dataset", "TEXT", "--sets", "ptb"), "--sets applies only to a --suite"),
        (("--dataset", "TEXT", "--restart"), "--restart"),
        (("--suite", "zero-shot", "--split", "test"), "--split applies only to a --dataset"),
        (("--suite", "zero-shot", "--sets", "ptb", "lambda"), "Did you mean 'lambada'?"),
        (("--suite", "zero-shot", "--sets", "python-docs"), "--sets python-docs: the datasets of zero-shot are ptb, "),
        (("--suite", "one-shot"), "invalid choice: 'one-shot'"),
        ((), "either a --dataset or a --suite"),
    ],
)
def test_eval_refuses_bad_arguments_before_it_looks_at_the_model(bd3lm, text_file, arguments, part):
    arguments = [text_file if argument == "TEXT" else argument for argument in arguments]
    assert_refused(bd3lm("eval", "--model", "nowhere", *arguments), part)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--split", "night"), "split is 'night'"),
        (("--text-column", "body"), "body"),
        (("--length", 4000), "fewer than one sequence of 4000"),
        (("--length", 600, "--estimator", "published"), "fewer than one sequence of 598"),
    ],
)
def test_eval_refuses_text_that_it_cannot_score(bd3lm, model_folder, text_file, arguments, part):
    assert_refused(bd3lm("eval", "--model", model_folder, "--dataset", text_file, *arguments), part)


def test_a_file_next_to_the_output_without_scores_is_refused(bd3lm, model_folder, text_file, tmp_path):
    (tmp_path / "x.scores.jsonl").write_text("notes\n")
    result = bd3lm("eval", "--model", "nowhere", "--dataset", text_file, "--output", tmp_path / "x.json")
    assert_refused(result, "x.scores.jsonl: line 1")


def test_a_model_without_a_likelihood_gets_advice_on_what_can_be_measured(bd3lm, model_folder, text_file, monkeypatch):
    monkeypatch.setattr(BD3LMForMaskedLM, "has_likelihood", False, raising=False)
    result = bd3lm("eval", "--model", model_folder, "--dataset", text_file)
    assert_refused(result, "is a BD3LMForMaskedLM, which has no likelihood", "bd3lm eval --generative")


def test_an_exact_sum_of_too_many_passes_is_refused(bd3lm, tiny_tokenizer, text_file, tmp_path, monkeypatch):
    folder = save("bd3lm", tiny_tokenizer, tmp_path / "b16", block_size=16)
    monkeypatch.setattr(dataset_scoring, "load_text", lambda *a, **b: pytest.fail("the text was read"))
    result = bd3lm("eval", "--model", folder, "--dataset", text_file, "--estimator", "exact")
    assert_refused(result, "--estimator exact", "2^16 - 1", "block_size=16", "stratified")


def test_long_sequences_are_scored_in_windows_on_request(run):
    lengths = ([64], [64, "--window", 32], [32])
    whole, windows, short = (run("--estimator", "exact", "--length", *length) for length in lengths)
    assert whole["num_tokens"] == windows["num_tokens"]  # every token once
    assert len({whole["nll"], windows["nll"], short["nll"]}) == 3
    assert run("--estimator", "exact", "--length", 32, "--window", 32)["nll"] == short["nll"]


def test_padding_is_hidden_in_windows_too(tiny_model):
    ids = [5, 6, 7, 8, 9, 10]
    row = {"input_ids": ids + [0] * 10, "labels": ids + [-100] * 10, "attention_mask": [1] * 6 + [0] * 10}
    windows = list(dataset_scoring.split_into_windows(row, 16))
    found = [perplexity(tiny_model, rows, estimator="exact").nll for rows in ([row], windows, [ids])]
    assert found == pytest.approx([found[2]] * 3)
