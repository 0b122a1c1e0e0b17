"""The files of a run that ends, is stopped, diverges or fills the disk."""

import json
import os
import signal
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from kill_driver import AfterStep, poison
from tiny_runs import assert_same_weights, losses_of, trained
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from bd3lm_hf.checkpoints import NotFiniteError, check_finite_weights
from bd3lm_hf.modeling.modeling_bd3lm import BD3LMForMaskedLM
from bd3lm_hf.run_folder import SaveError
from bd3lm_hf.training.callbacks import TrainingStopped
from bd3lm_hf.training.trainer import BD3LMTrainer, TrainingDivergedError


class _Signal(TrainerCallback):
    """Sends this process a signal during a step."""

    def __init__(self, signum: int, step: int) -> None:
        self.signum, self.step = signum, step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), self.signum)


# In an epoch of two steps, and in its last.
@pytest.mark.parametrize(("signum", "code", "step"), [(signal.SIGINT, 130, 1), (signal.SIGTERM, 143, 2)])
def test_a_signal_ends_a_run_with_a_checkpoint_to_resume_from(make_trainer, tmp_path, signum, code, step):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    whole = trained(make_trainer(max_steps=5, output_dir=str(tmp_path / "whole")))
    stopped = make_trainer(max_steps=5)
    stopped.add_callback(_Signal(signum, step))
    with pytest.raises(TrainingStopped, match=f"checkpoint-{step + 1}.*--resume_from_checkpoint true") as error:
        stopped.train()
    assert error.value.exit_code == code
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    rest = make_trainer(max_steps=5)
    rest.train(resume_from_checkpoint=True)
    assert losses_of(rest) == losses_of(whole)


def test_signals_are_left_alone_on_request(make_trainer):
    trainer = make_trainer(save_on_signal=False)
    trainer.add_callback(_Signal(signal.SIGINT, 1))
    with pytest.raises(KeyboardInterrupt) as error:
        trainer.train()
    assert not isinstance(error.value, TrainingStopped)


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(make_trainer, tmp_path):
    trainer = make_trainer(max_steps=5, save_strategy="steps", save_steps=2)
    trainer.add_callback(AfterStep(3, poison))
    message = "the loss is NaN or infinite at step 4: .*last good checkpoint is .*checkpoint-2.* --learning_rate"
    with pytest.raises(TrainingDivergedError, match=message):
        trainer.train()
    last = get_last_checkpoint(str(tmp_path / "run"))
    assert Path(last).name == "checkpoint-2"
    check_finite_weights(BD3LMForMaskedLM.from_pretrained(last), last)


def test_a_gradient_that_is_not_finite_stops_the_run(make_trainer):
    trainer = make_trainer()
    parameter = next(trainer.model.parameters())
    parameter.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(TrainingDivergedError, match="the gradient is NaN or infinite at step 1.*No checkpoint had"):
        trainer.train()


def test_weights_that_are_not_finite_are_refused_before_training(tiny_config, make_trainer):
    model = BD3LMForMaskedLM(tiny_config)
    model.get_output_embeddings().bias.data[3] = float("inf")
    with pytest.raises(NotFiniteError, match=r"1 of 48 values of .*bias in the model to train are NaN"):
        make_trainer(model=model)


def test_a_model_without_the_two_methods_is_refused():
    with pytest.raises(ValueError, match="a Linear has no `token_nll`"):
        BD3LMTrainer(model=torch.nn.Linear(2, 2))


def test_a_checkpoint_loads_by_itself_and_nothing_unfinished_stays(make_trainer, tmp_path):
    folder = tmp_path / "run"
    for name in ("checkpoint-3", "checkpoint-9", "model"):  # left by a killed run
        (folder / ".incomplete" / name).mkdir(parents=True)
        (folder / ".incomplete" / name / "rng_state_1.pth").write_text("foreign")
    trainer = trained(make_trainer(max_steps=4, save_strategy="steps", save_steps=1, save_total_limit=2))
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-3", "checkpoint-4"]
    assert json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text())["global_step"] == 4
    assert_same_weights(trainer.model, BD3LMForMaskedLM.from_pretrained(folder / "checkpoint-4"))
    assert {"modeling_bd3lm.py", "generation_config.json"} <= {path.name for path in folder.glob("checkpoint-4/*")}
    trainer.save_model()
    assert not (folder / ".incomplete").exists() and not list(folder.rglob("rng_state_1.pth"))


fail = Mock(side_effect=OSError(28, "No space left on device"))
STAGES = (
    "transformers.modeling_utils.PreTrainedModel.save_pretrained",
    "transformers.trainer.Trainer._save_optimizer_and_scheduler",
    "transformers.trainer.Trainer._save_rng_state",
    "transformers.TrainerState.save_to_json",
    "bd3lm_hf.training.trainer.mark_complete",
    "bd3lm_hf.training.trainer.publish_folder",
)


def test_a_full_disk_at_any_stage_leaves_the_last_checkpoint_and_no_debris(make_trainer, tmp_path, monkeypatch):
    make_trainer(max_steps=1, save_strategy="steps", save_steps=1).train()
    last = tmp_path / "run" / "checkpoint-1"
    before = {path.name: path.read_bytes() for path in last.iterdir()}
    for stage in STAGES:
        trainer = make_trainer(max_steps=3, save_strategy="steps", save_steps=1)
        with monkeypatch.context() as patch:
            patch.setattr(stage, fail)
            with pytest.raises(SaveError, match=r"cannot save checkpoint-2.*No space left.*checkpoint-1; "):
                trainer.train(resume_from_checkpoint=True)
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-1"], stage
        assert {path.name: path.read_bytes() for path in last.iterdir()} == before, stage


def test_a_model_that_cannot_be_saved_or_is_not_finite_leaves_the_old_one(make_trainer, tmp_path, monkeypatch):
    trainer, weights = make_trainer(), tmp_path / "run" / "model.safetensors"
    trainer.save_model()
    before = weights.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("transformers.modeling_utils.safe_save_file", fail)
        with pytest.raises(SaveError, match="cannot save the model in .*No checkpoint had been saved yet"):
            trainer.save_model()
    next(trainer.model.parameters()).data.view(-1)[0] = float("nan")
    with pytest.raises(NotFiniteError, match="the model after step 0"):
        trainer.save_model()
    assert weights.read_bytes() == before


def test_a_resumed_run_does_not_repeat_its_first_evaluation(make_trainer):
    options = {"max_steps": 2, "eval_on_start": True, "eval_strategy": "steps", "eval_steps": 2}
    whole = trained(make_trainer(save_strategy="steps", save_steps=1, **options))
    rest = make_trainer(save_strategy="no", **options)
    rest.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-1"))
    steps = [[entry["step"] for entry in run.state.log_history if "eval_nll" in entry] for run in (whole, rest)]
    assert steps == [[0, 2], [0, 2]]
