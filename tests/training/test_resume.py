"""Runs that are really killed, by SIGKILL in the middle of what they do, and resumed in a new process."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from kill_driver import rows_of

from bd3lm_hf.training.examples import EpochOrder


DRIVER = Path(__file__).parents[1] / "kill_driver.py"
LAUNCH = DRIVER.parent.parent / "training" / "launch" / "cpu2.yaml"


class Driver:
    """Carries out plans of kills, each in one interpreter, and gives what came of each case."""

    def __init__(self, folder: Path) -> None:
        self.parent, self.folder, self.errors, self.calls = folder, folder, "", 0

    def __call__(self, plan: list[list[dict]]) -> list[dict]:
        # A folder of its own, or a case would go on from the same one of an earlier plan.
        self.calls += 1
        self.folder = self.parent / str(self.calls)
        done = subprocess.run([sys.executable, DRIVER, self.folder, json.dumps(plan)], capture_output=True, text=True)
        self.errors = done.stderr
        assert done.returncode == 0, self.errors[-5000:]
        outcomes = json.loads(done.stdout)
        for kills, outcome in zip(plan, outcomes, strict=True):
            assert len(outcome["statuses"]) == len(kills) + 1
            assert outcome["statuses"][-1] == 0, self.errors[-5000:]
        return outcomes


@pytest.fixture
def run_plan(tmp_path) -> Driver:
    return Driver(tmp_path)


def check_is_the_whole_run(outcome: dict, whole: dict) -> None:
    for part in ("log", "weights", "files"):
        assert outcome[part] == whole[part]


def test_a_run_that_was_killed_or_found_the_disk_full_resumes_to_the_very_bits_of_the_whole_one(run_plan):
    kills = [
        # before any checkpoint is complete
        [{"event": "half of optimizer.pt"}],
        # at the end of an epoch
        [{"event": "half of optimizer.pt", "occurrence": 2}],
        # complete, but not under its name; and again at once
        [{"event": "os.rename checkpoint-9"}, {"event": 1}],
        # while an old checkpoint is removed
        [{"event": "os.remove run.json"}],
        # after the last step, while the model is published
        [{"event": "os.rename model.safetensors"}],
    ]
    # Bytes that the weights do not fit into; then some that they do, but not the optimizer's state.
    full_disks = [[{"file_bytes": 60_000}], [{"file_bytes": 200_000}]]
    whole, *outcomes = run_plan([[], *kills, *full_disks])
    # Logs, evaluations and saves (every 3 steps) do not coincide.
    assert [entry["step"] for entry in whole["log"] if "loss" in entry] == [2, 4, 6, 8, 10, 12, 14]
    assert [entry["step"] for entry in whole["log"] if "eval_nll" in entry] == [6, 12, 15]
    assert [name for name in whole["files"] if name.startswith("checkpoint")] == ["checkpoint-12", "checkpoint-15"]
    starts = [None, "checkpoint-3", "checkpoint-6", "checkpoint-9", "checkpoint-15", "checkpoint-3", "checkpoint-3"]
    assert [outcome["resumed_from"] for outcome in outcomes] == starts
    for outcome, case in zip(outcomes, [*kills, *full_disks], strict=True):
        assert set(outcome["statuses"][:-1]) == {2 if case in full_disks else -9}
        check_is_the_whole_run(outcome, whole)
    sizes = [run_plan.folder / "0" / "checkpoint-12" / name for name in ("model.safetensors", "optimizer.pt")]
    assert 60_000 < sizes[0].stat().st_size < 200_000 < sizes[1].stat().st_size
    for kind in ("SafetensorError", "RuntimeError"):
        assert f"cannot save checkpoint-6 in {run_plan.folder}" in run_plan.errors
        assert f"({kind}" in run_plan.errors


@pytest.mark.slow
def test_a_run_killed_at_every_step_of_saving_resumes_exactly(run_plan):
    (whole,) = run_plan([[]])
    # From the third save, the first that also removes an old checkpoint, to the fourth; then the model at the end.
    places = ("os.mkdir checkpoint-9", "os.mkdir checkpoint-12", "os.mkdir model")
    start, stop, final = (whole["events"].index(name) + 1 for name in places)
    numbers = (*range(start, stop), *range(final, len(whole["events"]) + 1, 3))
    for outcome in run_plan([[{"event": number}] for number in numbers]):
        assert outcome["statuses"][0] == -9
        check_is_the_whole_run(outcome, whole)


@pytest.mark.slow
def test_a_run_killed_again_and_again_at_any_moment_resumes_exactly(run_plan):
    moments = random.Random(0)
    plan = [[{"seconds": moments.uniform(0.05, 2.0)} for _ in range(3)] for _ in range(10)]
    whole, *outcomes = run_plan([[], *plan])
    assert any(status == -9 for outcome in outcomes for status in outcome["statuses"])
    for outcome in outcomes:
        check_is_the_whole_run(outcome, whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("process", "event", "start"),
    [
        (1, "half of rng_state_1.pth", "checkpoint-3"),
        (0, "half of optimizer.pt", "checkpoint-3"),
        (0, "os.rename checkpoint-6", "checkpoint-3"),
    ],
)
def test_two_processes_of_which_one_is_killed_resume_exactly(two_processes, whole_of_two, process, event, start):
    name = event.replace(" ", "-").replace(".", "-")
    kill = {"process": process, "event": event, "occurrence": 2 if event.startswith("half") else 1}
    assert two_processes(name, kill).returncode != 0
    done = two_processes(name, {})
    assert done.returncode == 0, done.stderr
    outcome = two_processes.outcome(name)
    assert outcome["resumed_from"] == start
    check_is_the_whole_run(outcome, whole_of_two)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_on_one_of_two_processes_stops_both(two_processes, whole_of_two):
    done = two_processes("diverged", {"process": 1, "nan_after": 4})
    assert done.returncode != 0
    # The second process reads every second batch: with one sequence each, its first of step 5 has place 4 * 4 + 1.
    row = EpochOrder(rows_of(22, 0), seed=5, group_size=4).permutation(0)[17].item()
    message = f"the loss is NaN or infinite at step 5, in the batch of training sequences {row}: training stopped"
    assert done.stderr.count(message) == 2
    assert f"The last good checkpoint is {two_processes.folder / 'diverged' / 'checkpoint-3'}." in done.stderr
    assert two_processes("diverged", {}).returncode == 0
    check_is_the_whole_run(two_processes.outcome("diverged"), whole_of_two)


class TwoProcesses:
    """Trains in two processes; each call is one launch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, name: str, kill: dict) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", LAUNCH]
        command += ["--main_process_port", "0", DRIVER, self.folder / name, json.dumps(kill)]
        return subprocess.run(list(map(str, command)), capture_output=True, text=True)

    def outcome(self, name: str) -> dict:
        return json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> TwoProcesses:
    return TwoProcesses(tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def whole_of_two(two_processes) -> dict:
    """The uninterrupted run of two processes."""
    done = two_processes("whole", {})
    assert done.returncode == 0, done.stderr
    return two_processes.outcome("whole")
