import json
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerControl, TrainerState

from bd3lm_hf.training.trainer_state import ResumableFlow, RunningLoss


def alone() -> RunningLoss:
    return RunningLoss(torch.device("cpu"), lambda x: x)


def of_two(other: float) -> RunningLoss:
    """The first of two processes, the other having summed `other`."""
    return RunningLoss(torch.device("cpu"), lambda x: torch.cat([x, torch.tensor([other])]))


def test_the_mean_is_over_the_steps_since_the_last_log():
    losses = alone()
    for loss in (1.0, 2.0, 6.0):
        losses.add(torch.tensor(loss))
    assert losses.mean_since_last_log(3) == 3.0
    losses.add(torch.tensor(5.0))
    assert losses.mean_of_run(4) == 3.5
    assert losses.mean_since_last_log(4) == 5.0
    assert losses.mean_of_run(4) == 3.5


def test_a_restored_sum_goes_on_to_the_bit():
    values = torch.rand(9, generator=torch.Generator().manual_seed(0)) * 5
    whole, part, rest = alone(), alone(), alone()
    for value in values:
        whole.add(value)
    for value in values[:5]:
        part.add(value)
    rest.load_state_dict(json.loads(json.dumps(part.state_dict())), 0, 1)
    for value in values[5:]:
        rest.add(value)
    assert rest.mean_since_last_log(9) == whole.mean_since_last_log(9)
    assert rest.mean_of_run(9) == whole.mean_of_run(9)


def test_each_process_gets_its_own_sum_back_and_another_number_of_them_the_mean():
    losses = of_two(7.0)
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
