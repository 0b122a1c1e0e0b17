"""Result files: JSON of the last run, CSV and markdown with a row for each, refused before work when unwritable."""

import csv
import json
import math

import pytest
import torch
from datasets import Dataset

from bd3lm_hf.evaluation.results import (
    FIELDS,
    check_outputs,
    config_identity,
    data_identity,
    digest,
    library_versions,
    markdown,
    tokenizer_identity,
    weights_digest,
    write_results,
)
from bd3lm_hf.modeling.modeling_bd3lm import BD3LMForMaskedLM


RESULT = {
    **dict.fromkeys(FIELDS),
    "model": "folder/demo",
    "dataset": "ptb",
    "split": "validation",
    "estimator": "stratified",
    "num_samples": 4,
    "bound": True,
    "nll": 4.0,
    "standard_error": 0.01,
    "bits_per_token": 5.7708,
    "bits_per_byte": None,
    "perplexity": math.exp(4),
    "num_tokens": 120,
    "seed": 1,
    "seconds": 2.5,
}
ROW = (
    "| demo | ptb (validation split) | stratified estimate of the bound, 4 noise samples | &le; 54.60 "
    "| 4.0000 &plusmn; 0.0100 | 5.7708 | unknown |"
)


def test_json_holds_the_last_result_and_no_nan(tmp_path):
    path = tmp_path / "result.json"
    write_results(path, [RESULT])
    write_results(path, [{**RESULT, "standard_error": math.nan}])
    assert json.loads(path.read_text()) == {**RESULT, "standard_error": None}
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]


def test_json_of_a_suite_is_a_list(tmp_path):
    write_results(tmp_path / "x.json", [RESULT, {**RESULT, "dataset": "lambada"}], "zero-shot")
    report = json.loads((tmp_path / "x.json").read_text())
    assert report["suite"] == "zero-shot"
    assert [row["dataset"] for row in report["results"]] == ["ptb", "lambada"]


def test_csv_grows_by_a_row_behind_one_header(tmp_path):
    path = tmp_path / "results.csv"
    for seed in (1, 2):
        write_results(path, [{**RESULT, "seed": seed}])
    rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
    assert [row["seed"] for row in rows] == ["1", "2"]
    assert float(rows[0]["perplexity"]) == RESULT["perplexity"] and rows[0]["bits_per_byte"] == ""
    check_outputs([path])


def test_markdown_rows_join_the_table_that_ends_the_file(tmp_path):
    path = tmp_path / "results.md"
    write_results(path, [RESULT])
    write_results(path, [{**RESULT, "model": "other", "bound": False}])
    lines = path.read_text().splitlines()
    assert len(lines) == 4 and lines[2].startswith(ROW)
    assert lines[3].startswith("| other |") and "&le;" not in lines[3]
    assert path.read_text().splitlines()[:3] == markdown([RESULT]).splitlines()


def test_markdown_behind_other_text_is_a_new_table(tmp_path):
    path = tmp_path / "notes.md"
    path.write_text("# Notes\n\n| a | b |\n|---|---|\n| 1 | 2 |\n")
    write_results(path, [RESULT])
    lines = path.read_text().splitlines()
    assert lines[4:6] == ["| 1 | 2 |", ""] and lines[6].startswith("| model |") and lines[8].startswith(ROW)


def test_names_with_markup_stay_text_in_their_cell(tmp_path):
    harmful = "a|b\n<script>*x*</script> `c` [d](e)"
    line = markdown([{**RESULT, "model": harmful.replace("/", ":"), "dataset": harmful}]).splitlines()[2]
    assert line.count(" | ") == len(markdown([]).splitlines()[0].split(" | ")) - 1
    assert r"a\|b \<script\>\*x\*" in line and r"\[d\](e)" in line


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("result.txt", r"--output .*result.txt: the name of a result ends in one of .json, .csv, .md"),
        ("result", "the name of a result ends in one of"),
        ("no/folder/x.json", "--output .*no/folder/x.json"),
        ("folder.json", "is a folder: name a file"),
        ("other.csv", "other.csv is a table with other columns: name another file"),
    ],
)
def test_a_file_that_could_not_be_written_is_refused(tmp_path, name, message):
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=message):
        check_outputs([tmp_path / "fine.json", tmp_path / name])


def test_a_file_without_permission_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("bd3lm_hf.evaluation.results.os.access", lambda *arguments: False)
    with pytest.raises(ValueError, match="--output .*permission"):
        check_outputs([tmp_path / "x.json"])


# --- hashes of what decides a number ---------------------------------------------------------------------------------


def rows(count: int = 5, change: int | None = None) -> Dataset:
    ids = [[number, 7, 8] for number in range(count)]
    if change is not None:
        ids[change][1] = 9
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def test_a_saved_and_loaded_model_has_the_same_configuration(tiny_model, tmp_path):
    before = config_identity(tiny_model.config)
    tiny_model.save_pretrained(tmp_path)
    assert config_identity(tiny_model.config) == before
    assert config_identity(BD3LMForMaskedLM.from_pretrained(tmp_path).config) == before


def test_the_weights_have_one_digest_wherever_they_are_kept(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    assert weights_digest(BD3LMForMaskedLM.from_pretrained(tmp_path)) == weights_digest(tiny_model)


def test_a_changed_weight_type_or_name_changes_the_digest(tiny_model):
    found = {weights_digest(tiny_model), weights_digest(torch.nn.Linear(2, 2, bias=False).to(torch.bfloat16))}
    with torch.no_grad():
        next(tiny_model.parameters()).view(-1)[3] += 1e-3
    found.add(weights_digest(tiny_model))
    found.add(weights_digest(tiny_model.to(torch.bfloat16)))
    assert len(found) == 4


def test_a_configuration_is_what_the_model_computes(tiny_config):
    before = digest(config_identity(tiny_config))
    tiny_config._name_or_path, tiny_config.architectures = "elsewhere", ["X"]
    assert digest(config_identity(tiny_config)) == before
    tiny_config.block_size = 8
    assert digest(config_identity(tiny_config)) != before


def test_every_sequence_counts_unless_a_sample_is_asked_for():
    assert data_identity(rows()) == data_identity(rows())
    assert data_identity(rows(change=3)) != data_identity(rows())
    assert data_identity(rows(6), sample=3) == data_identity(rows(6, change=3), sample=3)
    assert data_identity(rows(6), sample=3) != data_identity(rows(6, change=2), sample=3)


def test_a_stream_says_itself_what_it_is():
    assert data_identity(iter([])) == {"kind": "a stream"}


def test_a_tokenizer_is_its_vocabulary(tiny_tokenizer):
    before = tokenizer_identity(tiny_tokenizer)
    assert before["tokens"] == len(tiny_tokenizer)
    tiny_tokenizer.add_tokens(["<new>"])
    assert tokenizer_identity(tiny_tokenizer) != before
    assert tokenizer_identity(None) == {}


def test_the_versions_are_those_that_are_loaded():
    versions = library_versions()
    assert versions["torch"] == torch.__version__
    assert set(versions) == {"bd3lm_hf", "torch", "transformers", "datasets", "python"}
