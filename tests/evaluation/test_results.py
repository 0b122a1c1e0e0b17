"""Result files are refused before work when unwritable; kept scores continue an interrupted run."""

import csv
import json
import math
import sys

import pytest
import torch
from datasets import Dataset

from bd3lm_hf import TokenNLL
from bd3lm_hf.evaluation.perplexity import Protocol, SequenceScore
from bd3lm_hf.evaluation.results import (
    FIELDS,
    ScoresFile,
    check_outputs,
    config_identity,
    data_identity,
    digest,
    markdown,
    score_shared,
    tokenizer_identity,
    weights_digest,
    write_results,
)
from bd3lm_hf.modeling.modeling_bd3lm import BD3LMForMaskedLM


RESULT = {**dict.fromkeys(FIELDS), "model": "folder/demo", "dataset": "ptb", "split": "validation", "seed": 1}
RESULT |= {"estimator": "stratified", "num_samples": 4, "bound": True, "nll": 4.0, "standard_error": 0.01}
RESULT |= {"bits_per_token": 5.7708, "perplexity": math.exp(4), "num_tokens": 120, "seconds": 2.5}
ROW = (
    "| demo | ptb (validation split) | stratified estimate of the bound, 4 noise samples | &le; 54.60 "
    "| 4.0000 &plusmn; 0.0100 | 5.7708 | unknown |"
)


def test_csv_grows_by_a_row_below_one_header(tmp_path):
    path = tmp_path / "results.csv"
    for seed in (1, 2):
        write_results(path, [{**RESULT, "seed": seed}])
    rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
    assert [row["seed"] for row in rows] == ["1", "2"]
    assert float(rows[0]["perplexity"]) == RESULT["perplexity"] and rows[0]["bits_per_byte"] == ""
    check_outputs([path])


@pytest.mark.parametrize("name", ["results.csv", "results.md"])
def test_a_row_is_not_appended_to_an_unfinished_line(tmp_path, name):
    path = tmp_path / name
    for _ in range(2):
        write_results(path, [RESULT])
    expected = path.read_text()
    path.unlink()
    write_results(path, [RESULT])
    path.write_text(path.read_text().rstrip("\n"))  # as an editor may save it
    write_results(path, [RESULT])
    assert path.read_text() == expected


def test_markdown_rows_are_appended_to_the_table_at_the_end_of_the_file(tmp_path):
    path = tmp_path / "results.md"
    write_results(path, [RESULT])
    write_results(path, [{**RESULT, "model": "other", "bound": False}])
    lines = path.read_text().splitlines()
    assert len(lines) == 4 and lines[2].startswith(ROW)
    assert lines[3].startswith("| other |") and "&le;" not in lines[3]
    assert path.read_text().splitlines()[:3] == markdown([RESULT]).splitlines()


def test_markdown_after_other_text_is_a_new_table(tmp_path):
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
        ("result", "--output .*result: the name of a result must end in one of .json, .csv, .md"),
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
    monkeypatch.setattr("os.access", lambda *arguments: False)
    with pytest.raises(ValueError, match="--output .*permission"):
        check_outputs([tmp_path / "x.json"])


def rows(count: int = 5, change: int | None = None) -> Dataset:
    ids = [[number, 7, 8] for number in range(count)]
    if change is not None:
        ids[change][1] = 9
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def test_a_saved_and_loaded_model_has_the_same_configuration_and_weights(tiny_model, tmp_path):
    before = config_identity(tiny_model.config)
    tiny_model.save_pretrained(tmp_path)
    loaded = BD3LMForMaskedLM.from_pretrained(tmp_path)
    assert config_identity(tiny_model.config) == config_identity(loaded.config) == before
    assert weights_digest(loaded) == weights_digest(tiny_model)


def test_a_changed_weight_type_or_name_changes_the_digest(tiny_model):
    found = {weights_digest(tiny_model), weights_digest(torch.nn.Linear(2, 2, bias=False).to(torch.bfloat16))}
    with torch.no_grad():
        next(tiny_model.parameters()).view(-1)[3] += 1e-3
    found.add(weights_digest(tiny_model))
    found.add(weights_digest(tiny_model.to(torch.bfloat16)))
    assert len(found) == 4


def test_only_fields_that_change_the_model_identify_a_configuration(tiny_config):
    before = digest(config_identity(tiny_config))
    tiny_config._name_or_path, tiny_config.architectures = "elsewhere", ["X"]
    assert digest(config_identity(tiny_config)) == before
    tiny_config.block_size = 8
    assert digest(config_identity(tiny_config)) != before


def test_every_sequence_is_hashed_unless_a_sample_is_requested():
    assert data_identity(rows()) == data_identity(rows())
    assert data_identity(rows(change=3)) != data_identity(rows())
    assert data_identity(rows(6), sample=3) == data_identity(rows(6, change=3), sample=3)
    assert data_identity(rows(6), sample=3) != data_identity(rows(6, change=2), sample=3)
    assert data_identity(iter([])) == {"kind": "a stream"}


def test_a_tokenizer_is_identified_by_its_vocabulary(tiny_tokenizer):
    before = tokenizer_identity(tiny_tokenizer)
    assert before["tokens"] == len(tiny_tokenizer)
    tiny_tokenizer.add_tokens(["<new>"])
    assert tokenizer_identity(tiny_tokenizer) != before
    assert tokenizer_identity(None) == {}


RUN = {"weights": "a", "seed": 0}
OTHER = {"weights": "b", "seed": 0}


class CountingModel:
    """Gives every token its id as loss, counts batches, and fails at a given one."""

    def __init__(self, dies_at: int | None = None) -> None:
        self.batches, self.dies_at = [], dies_at

    def token_nll(self, input_ids, attention_mask, **arguments):
        self.batches.append(input_ids[:, 0].tolist())
        if len(self.batches) == self.dies_at:
            raise KeyboardInterrupt
        return TokenNLL(input_ids.float(), attention_mask.float())


@pytest.fixture
def path(tmp_path):
    return tmp_path / "x.scores.jsonl"


@pytest.fixture
def sequences() -> list[list[int]]:
    return [[number, 1, 2] if number % 3 else [number, 5] for number in range(10)]


def score(model, sequences, **arguments):
    protocol = Protocol("exact", 1, 0, len(sequences))
    return score_shared(model, sequences, protocol, batch_size=2, identity=RUN, **arguments)


def test_a_bar_shows_the_progress_and_where_the_run_continued(path, sequences, capsys, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        score(CountingModel(dies_at=4), sequences, file=ScoresFile(path))
    capsys.readouterr()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    score(CountingModel(), sequences, file=ScoresFile(path), progress=True)
    assert "scoring:  60%" in capsys.readouterr().err
    score(CountingModel(), sequences)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_an_incomplete_line_after_a_kill_is_cut_off(path, sequences, cut):
    with pytest.raises(KeyboardInterrupt):
        score(CountingModel(dies_at=4), sequences, file=ScoresFile(path))
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    expected = score(CountingModel(), sequences).scores
    assert score(CountingModel(), sequences, file=ScoresFile(path)).scores == expected
    assert all(json.loads(line)["run"] for line in path.read_text().splitlines())


def test_a_file_keeps_the_scores_of_several_runs_unless_restarted(path):
    file = ScoresFile(path)
    for run, nll in ((RUN, 1.5), (OTHER, 2.5)):
        file.begin(run)
        file.append([SequenceScore(0, nll, 3)], 0.5)
    with path.open("a") as other:
        other.write(json.dumps({"run": digest(RUN), "finished": True}) + "\n")  # as earlier versions wrote
    again = ScoresFile(path)
    assert again.begin(RUN) == ({0: SequenceScore(0, 1.5, 3)}, 0.5)
    assert again.begin(OTHER) == ({0: SequenceScore(0, 2.5, 3)}, 0.5)
    new = ScoresFile(path, restart=True)
    assert len(path.read_text().splitlines()) == 5  # nothing is lost until there is a replacement
    assert new.begin(OTHER).scores == {}
    assert [json.loads(line)["identity"] for line in path.read_text().splitlines()] == [OTHER]


@pytest.mark.parametrize(
    "content", ["text\n", "[1]\n", '{"run": "x"}\n', '{"run": "x", "scores": [[0, 1.0, 2]], "seconds": 1}\n', "3\n"]
)
def test_a_file_that_is_not_a_scores_file_is_refused(path, content):
    path.write_text(content)
    with pytest.raises(ValueError, match="line 1"):
        ScoresFile(path)
