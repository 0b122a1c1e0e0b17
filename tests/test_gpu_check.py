"""The GPU check itself, on a CPU: the same code at a size that takes seconds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch


CHECK = Path(__file__).parent / "gpu" / "check.py"


@pytest.fixture(scope="module")
def check(tmp_path_factory):
    output = tmp_path_factory.mktemp("gpu-check")
    command = [sys.executable, str(CHECK), "--tiny", "--device", "cpu", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    return done, output


def test_every_part_runs_on_a_cpu_and_writes_its_rows(check):
    done, output = check
    rows = json.loads((output / "gpu-check.json").read_text())["rows"]
    failed = [row for row in rows if row["what"].endswith(("failed", "not finish", "not run"))]
    assert not failed and done.returncode in (0, 1), done.stderr
    parts = {row["part"] for row in rows}
    assert parts == {"tests", "training", "generation", "attention", "likelihood", "launchers", "runs"}
    tests = next(row for row in rows if row["what"] == "tests marked gpu")
    assert tests["met"], (output / "tests.txt").read_text()
    assert all(row["note"] or row["ours"] is not None for row in rows)
    tables = (output / "gpu-check.md").read_text()
    assert tables.count("### ") == len(parts)


def test_a_part_that_takes_too_long_is_ended_and_named(tmp_path):
    from gpu.check import Settings, run_limited

    (row,) = run_limited("training", Settings("cpu", True, tmp_path), seconds=0.5)
    assert not row["met"] and "0 s" in row["note"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_machine_without_a_gpu_is_named():
    done = subprocess.run([sys.executable, str(CHECK)], capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and "--device cuda" in done.stderr
