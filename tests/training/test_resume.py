"""Runs killed by SIGKILL at any moment resume exactly; other runs are refused."""

import json
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from kill_driver import make_trainer
from peft import LoraConfig, get_peft_model
from tiny_runs import rows_of
from transformers import TrainerControl, TrainerState

from bd3lm_hf.run_folder import check_same_run
from bd3lm_hf.training.callbacks import ResumableFlow, RunningLoss


DRIVER = Path(__file__).parents[1] / "kill_driver.py"
LAUNCH = DRIVER.parent.parent / "training" / "launch" / "cpu2.yaml"


class Driver:
    """Carry out plans of kills, each in one interpreter, and return the outcome of each case."""

    def __init__(self, folder: Path) -> None:
        self.parent, self.folder, self.errors, self.calls = folder, folder, "", 0

    def __call__(self, plan: list[list[dict]]) -> list[dict]:
        # A separate folder, or a case would resume from the same case of an earlier plan.
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
    # Too few bytes for the weights; then enough for them, but not for the optimizer's state.
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
    assert done.stderr.count("the loss is NaN or infinite at step 5: training stopped") == 2
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


# Another run is refused


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a run with its checkpoint after two steps."""
    folder = tmp_path_factory.mktemp("saved")
    make_trainer(folder, max_steps=2, eval_strategy="no", save_steps=2).train()
    return folder


def test_a_run_may_change_its_length_its_layout_and_what_it_reports(saved, tmp_path, caplog):
    layout = {"max_steps": 4, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    reports = {"logging_steps": 1, "eval_strategy": "steps", "eval_steps": 4, "save_strategy": "no"}
    trainer = make_trainer(tmp_path / "elsewhere", **layout, **reports, report_to="none")
    trainer.train(str(saved / "checkpoint-2"))
    assert trainer.state.global_step == 4
    assert "the run is resumed with another length: max_steps was 2 and is 4" in caplog.text


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"learning_rate": 0.5}, "training: learning_rate was 0.01 and is 0.5"),
        ({"weight_decay": 0.5}, "training: weight_decay was 0.0 and is 0.5"),
        ({"lr_scheduler_type": "linear"}, "training: lr_scheduler_type was cosine and is linear"),
        ({"ema_decay": 0.8}, "training: ema_decay was 0.9 and is 0.8"),
        ({"ema_warmup": False}, "training: ema_warmup was True and is False"),
        ({"warmup_steps": 1}, "training: warmup_steps was 3 and is 1"),
        ({"seed": 6}, "training: seed was 5 and is 6; training: data_seed was 5 and is 6"),
        ({"data_seed": 6}, "training: data_seed was 5 and is 6"),
        ({"per_device_train_batch_size": 4}, "training: global batch size was 4 and is 8"),
        ({"gradient_accumulation_steps": 3}, "training: global batch size was 4 and is 6"),
    ],
)
def test_a_run_with_another_optimisation_is_refused(saved, tmp_path, change, difference):
    trainer = make_trainer(tmp_path, **change)
    message = f"checkpoint-2 belongs to another run: {difference}. Restore the old values, or start a new run"
    with pytest.raises(ValueError, match=message):
        trainer.train(str(saved / "checkpoint-2"))


def test_another_model_is_refused_before_its_weights_are_touched(saved, tmp_path):
    trainer = make_trainer(tmp_path)
    config = trainer.model.config
    for name, value in (("block_size", 8), ("hidden_dim", 64), ("dropout", 0.0), ("noise", "square")):
        setattr(config, name, value)
    message = "model: block_size was 4 and is 8; .*hidden_dim was 32 and is 64.*--init_from .*checkpoint-2"
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    with pytest.raises(ValueError, match=message) as error:
        trainer.train(str(saved / "checkpoint-2"))
    assert "dropout was 0.1 and is 0.0" in str(error.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())


def test_other_adapters_are_another_model(tmp_path):
    trainer = make_trainer(tmp_path)
    identities = []
    for rank in (2, 4):
        trainer.model = get_peft_model(make_trainer(tmp_path).model, LoraConfig(r=rank, target_modules=["attn_qkv"]))
        identities.append(trainer.fingerprint())
    with pytest.raises(ValueError, match="model: parameters was .* and is .*; model: trained parameters was"):
        check_same_run("here", *identities)


def test_other_sequences_are_refused(saved, tmp_path):
    fewer, other = rows_of(21), rows_of(22, seed=3)
    labelled = Dataset.from_list([{**row, "labels": [-100] + row["labels"][1:]} for row in rows_of(22)])
    for rows, message in (
        (fewer, "data: sequences was 22 and is 21; data: sha256 of the sequences was"),
        (other, "another run: data: sha256 of the sequences was"),
        (labelled, "another run: data: sha256 of the sequences was"),
    ):
        trainer = make_trainer(tmp_path)
        trainer.train_dataset = rows
        with pytest.raises(ValueError, match=message):
            trainer.train(str(saved / "checkpoint-2"))


def test_another_vocabulary_is_another_run(tmp_path, tiny_tokenizer):
    trainer = make_trainer(tmp_path)
    trainer.processing_class = tiny_tokenizer
    old = trainer.fingerprint()
    check_same_run("here", old, trainer.fingerprint())
    tiny_tokenizer(["a", "a longer text"], padding=True, truncation=True, max_length=3)
    check_same_run("here", old, trainer.fingerprint())  # what a call stores is not part of it
    tiny_tokenizer.add_tokens(["<new>"])
    with pytest.raises(ValueError, match="tokenizer: tokens was 320 and is 321; tokenizer: sha256 of the vocabulary"):
        check_same_run("here", old, trainer.fingerprint())


def test_an_identity_is_json_and_survives_a_newer_library_and_a_moved_interval(tmp_path):
    trainer = make_trainer(tmp_path)
    identity = trainer.fingerprint()
    assert json.loads(json.dumps(identity)) == identity
    trainer.model.config.sampling_eps_min = 0.3
    trainer.model.sampling_eps_min.fill_(0.3)
    check_same_run("here", identity, trainer.fingerprint())
    newer = json.loads(json.dumps(identity))
    newer["model"]["field_of_a_later_version"] = 1
    check_same_run("here", identity, newer)
    check_same_run("here", newer, identity)


# The running loss and the flow of a resumed run


def alone() -> RunningLoss:
    return RunningLoss(torch.device("cpu"), lambda x: x)


def test_the_mean_is_over_the_steps_since_the_last_log():
    losses = alone()
    for loss in (1.0, 2.0, 6.0):
        losses.add(torch.tensor(loss))
    assert losses.mean_since_last_log(3) == 3.0
    losses.add(torch.tensor(5.0))
    assert losses.mean_of_run(4) == 3.5
    assert losses.mean_since_last_log(4) == 5.0
    assert losses.mean_of_run(4) == 3.5


def test_each_process_gets_its_own_sum_back_and_another_number_of_them_the_mean():
    losses = RunningLoss(torch.device("cpu"), lambda x: torch.cat([x, torch.tensor([7.0])]))
    losses.add(torch.tensor(3.0))
    state = losses.state_dict()
    assert state["sums"] == [3.0, 7.0]
    assert losses.mean_since_last_log(2) == 2.5
    for process, processes, own in ((0, 2, 3.0), (1, 2, 7.0), (0, 1, 5.0), (2, 4, 5.0)):
        restored = alone()
        restored.load_state_dict(state, process, processes)
        assert restored.sum.item() == own


def test_the_arguments_say_how_often_a_resumed_run_logs_evaluates_and_saves():
    state = TrainerState(max_steps=40, logging_steps=1, eval_steps=2, save_steps=3)
    args = SimpleNamespace(logging_steps=5, eval_steps=None, save_steps=0.25)
    ResumableFlow().on_train_begin(args, state, TrainerControl())
    assert (state.logging_steps, state.eval_steps, state.save_steps) == (5, 2, 10)


@pytest.mark.parametrize(("epoch", "step", "waits"), [(1.5, 9, False), (2.0, 12, True), (2.5, 15, True)])
def test_a_save_at_the_end_of_an_epoch_or_of_the_run_waits_for_its_evaluation(epoch, step, waits):
    callback, state = ResumableFlow(), SimpleNamespace(epoch=epoch, global_step=step, max_steps=15)
    control = callback.on_step_end(None, state, TrainerControl(should_save=True))
    assert control.should_save is not waits
    assert callback.on_epoch_end(None, state, TrainerControl()).should_save is waits
    assert callback.on_epoch_end(None, state, TrainerControl()).should_save is False
