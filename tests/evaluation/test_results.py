"""Result files: JSON of the last run, CSV and markdown with a row for each, refused before work when unwritable."""

import csv
import json
import math

import pytest

from bd3lm_hf.evaluation.results import FIELDS, check_outputs, markdown, write_results


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
