"""State by which a resumed run repeats an uninterrupted one: its fingerprint, its losses, and when it saves.

The fingerprint holds everything that decides the numbers of a run: the model, its vocabulary, the sequences, the
global batch, the seed and the optimisation. (The optimizer's state holds the old learning rate, so a new one would
silently be ignored.) The length of a run, its layout on processes, and what it logs, evaluates and saves may change.
The interval of noise levels is excluded: interval search changes it during training, and it is stored with the
weights.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from bd3lm_hf.evaluation.results import config_identity, data_identity, tokenizer_identity
from bd3lm_hf.training.arguments import BD3LMTrainingArguments
from bd3lm_hf.training.sharding import num_parameters


logger = logging.get_logger("bd3lm_hf.train")

_HASHED_SEQUENCES = 1024

_TRAINING = (
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args"),
    *("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "label_smoothing_factor"),
    "neftune_noise_alpha",
)

# Schedules that take the number of all steps. A run may be prolonged, but their learning rates then change.
_LENGTH = ("max_steps", "num_train_epochs")


def run_fingerprint(
    model: Any, args: BD3LMTrainingArguments, rows: Any, tokenizer: Any, *, global_batch_size: int, data_seed: int
) -> dict[str, Any]:
    """Return the fingerprint of a run as JSON: sections of named values.

    Args:
        rows: the training sequences, sized or a stream.
        tokenizer: or None.
        global_batch_size: sequences of one optimizer step.
    """
    config = config_identity(model.config) | {"parameters": num_parameters(model)}
    config |= {"trained parameters": num_parameters(model, only_trainable=True)}
    training = {name: getattr(args, name, None) for name in _TRAINING}
    training |= {"global batch size": global_batch_size, "seed": args.seed, "data_seed": data_seed}
    if args.ema_decay:  # a run without an average has no file of it to resume from
        training |= {"ema_decay": args.ema_decay, "ema_warmup": args.ema_warmup}
    fingerprint = {
        "model": config,
        "tokenizer": tokenizer_identity(tokenizer),
        "data": data_identity(rows, sample=_HASHED_SEQUENCES),
        "training": training,
        "length": {name: getattr(args, name) for name in _LENGTH},
    }
    return json.loads(json.dumps(fingerprint, default=str))  # as it is read back from a file


def check_same_run(checkpoint: str | Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Refuse to resume from the checkpoint of another run. A run of another length gets its own message.

    Args:
        old: fingerprint in the checkpoint.
        new: fingerprint of the run that resumes from it.

    Raises:
        ValueError: if they differ; the message has both values.
    """
    sections = ("model", "tokenizer", "data", "training")
    # The length may differ: a run may be prolonged.
    differences = [text for section in sections for text in _compare(section, old, new)]
    if differences:
        more = f", and {len(differences) - 6} more" if len(differences) > 6 else ""
        raise ValueError(
            f"{checkpoint} belongs to another run: {'; '.join(differences[:6])}{more}. Go on with the old values, or "
            f"start a new run from its weights with --init_from {checkpoint} and another --output_dir."
        )
    for text in _compare("length", old, new):
        logger.warning(f"the run is resumed with another {text}. Schedules that depend on it change.")


def _compare(section: str, old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    # A field that only one of two versions of a library has is not a difference.
    before, now = old.get(section, {}), new.get(section, {})
    return [
        f"{section}: {name} was {before[name]} and is {now[name]}"
        for name in before
        if name in now and before[name] != now[name]
    ]


class RunningLoss:
    """Sum the losses of optimizer steps: since the last log, and since the start of the run.

    transformers loses the sum since the last log when a run is resumed. The first loss of its log would then differ
    from that of the uninterrupted run wherever a save does not coincide with a log.

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
        """Add the part of one micro-batch in the loss of its optimizer step, a scalar."""
        self.sum += loss

    def mean_since_last_log(self, step: int) -> float:
        """Return the mean loss of the steps since the last call, over all processes, after `step` steps."""
        # One synchronisation per log, not per step.
        total = self.gather(self.sum).mean().item()
        mean = total / max(1, step - self.logged_step)
        self.logged_total += total
        self.logged_step = step
        self.sum.zero_()
        return mean

    def mean_of_run(self, step: int) -> float:
        """Return the mean loss of all `step` steps of the run so far, over all processes."""
        return (self.logged_total + self.gather(self.sum).mean().item()) / max(1, step)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, as JSON; the same on every process."""
        sums = self.gather(self.sum).tolist()
        return {"sums": sums, "logged_step": self.logged_step, "logged_total": self.logged_total}

    def load_state_dict(self, state: dict[str, Any], process: int, processes: int) -> None:
        """Continue from a checkpoint. With another number of processes each takes the mean of the sums."""
        sums = state["sums"]
        self.sum.fill_(sums[process] if len(sums) == processes else sum(sums) / len(sums))
        self.logged_step, self.logged_total = state["logged_step"], state["logged_total"]


class ResumableFlow(TrainerCallback):
    """Delay saving until the same step is logged and evaluated, so that a resumed run repeats an uninterrupted one.

    A save that falls on the last step of an epoch, or of the run, waits for what is logged and evaluated there: a run
    that resumes from it starts with the next epoch and would never catch up.
    """

    def __init__(self) -> None:
        self.waiting = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Log, evaluate and save as often as the arguments say, not as often as the resumed state does."""
        state.compute_steps(args, state.max_steps)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Delay the save."""
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
