"""The GPU check itself, on a CPU: the same code at a size that takes seconds."""

import json

import pytest
import torch
from gpu.check import PARTS, Process, Settings, main, run_parts


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu-check")
    assert main(["--tiny", "--device", "cpu", "--output", str(folder)]) in (0, 1)  # 1: its times miss the goals
    return folder


def test_every_part_runs_on_a_cpu_and_writes_its_rows(output):
    rows = json.loads((output / "gpu-check.json").read_text())["rows"]
    assert not [row for row in rows if row["what"].endswith(("failed", "not finish", "not run"))]
    assert {row["part"] for row in rows} == set(PARTS)
    tests = next(row for row in rows if row["what"] == "tests marked gpu")
    assert tests["met"], (output / "tests.txt").read_text()
    assert all(row["note"] or row["ours"] is not None for row in rows)
    tables = (output / "gpu-check.md").read_text()
    assert tables.count("### ") == len(PARTS)


def test_a_part_that_takes_too_long_is_ended_and_named(tmp_path):
    (row,) = Process("training", Settings("cpu", True, tmp_path), seconds=0.5).rows()
    assert not row["met"] and "0 s" in row["note"]


def test_what_is_timed_waits_for_what_is_not(tmp_path):
    results = run_parts(["likelihood", "launchers"], Settings("cpu", True, tmp_path), budget=120)
    assert {row["part"] for row in next(results)} == {"launchers"} and not (tmp_path / "ready").exists()
    rows = next(results)
    assert [row["part"] for row in rows] == ["likelihood"] * 2 and all(row["ours"] is not None for row in rows)
    assert len(list(tmp_path.glob("compiled-*"))) == 1 and not list(results)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_machine_without_a_gpu_is_named(capsys):
    with pytest.raises(SystemExit, match="2"):
        main([])
    assert "--device cuda" in capsys.readouterr().err
