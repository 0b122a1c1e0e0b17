"""The training loss since the last log, and the flow of a run, in a form that a resumed run continues.

transformers forgets what it has summed since the last log when a run is resumed, so that the first loss of the log
would differ from the uninterrupted run's wherever a save does not coincide with a log.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class RunningLoss:
    """Sums of the losses of optimizer steps: since the last log, and since the start of the run.

    Args:
        device: where the losses live.
        gather: gives every process the numbers of all of them, `(1,)` -> `(processes,)`.
    """

    def __init__(self, device: torch.device, gather: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.gather = gather
        self.sum = torch.zeros(1, device=device)  # of this process
        self.logged_step = 0
        self.logged_total = 0.0  # mean over the processes, summed over the steps up to logged_step

    def add(self, loss: torch.Tensor) -> None:
        """Add the share of one micro-batch in the loss of its optimizer step; a scalar."""
        self.sum += loss

    def mean_since_last_log(self, step: int) -> float:
        """Mean loss of the steps since the last call, over all processes; `step` is the number of steps so far."""
        total = self.gather(self.sum).mean().item()
        mean = total / max(1, step - self.logged_step)
        self.logged_total += total
        self.logged_step = step
        self.sum.zero_()
        return mean

    def mean_of_run(self, step: int) -> float:
        """Mean loss of all steps of the run so far, over all processes."""
        return (self.logged_total + self.gather(self.sum).mean().item()) / max(1, step)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as JSON; the same on every process."""
        sums = self.gather(self.sum).tolist()
        return {"sums": sums, "logged_step": self.logged_step, "logged_total": self.logged_total}

    def load_state_dict(self, state: dict[str, Any], process: int, processes: int) -> None:
        """Go on where a checkpoint was saved. With another number of processes each takes the mean of the sums."""
        sums = state["sums"]
        self.sum.fill_(sums[process] if len(sums) == processes else sum(sums) / len(sums))
        self.logged_step, self.logged_total = state["logged_step"], state["logged_total"]


class ResumableFlow(TrainerCallback):
    """What has to happen at other moments than transformers has it for a resumed run to be the uninterrupted one.

    A save that falls on the last step of an epoch, or of the run, waits for what is logged and evaluated there: a run
    that resumes from it starts with the next epoch and would never catch up.
    """

    def __init__(self) -> None:
        self.waiting = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Log, evaluate and save as often as the arguments say; a resumed state says what they were before."""
        state.compute_steps(args, state.max_steps)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Put the save off."""
        if control.should_save and (float(state.epoch).is_integer() or state.global_step >= state.max_steps):
            control.should_save, self.waiting = False, True
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Save."""
        if self.waiting:
            control.should_save, self.waiting = True, False
        return control


__all__ = ["ResumableFlow", "RunningLoss"]
