"""Trains a tiny model in processes that are killed with SIGKILL and started again; `test_resume.py` runs this script.

    python kill_driver.py FOLDER PLAN > outcomes.json
    accelerate launch kill_driver.py FOLDER KILL       one training, as one of several processes

This process imports everything once and computes nothing; each training is a fork of it, which costs no import.
A plan is a JSON list of cases, each a list of kills; a case ends with a training that nobody kills. A kill is
`{"event": name, "occurrence": n}`, at the n-th step of that name of writing to the folder, `{"event": n}`, at the
n-th step of any name, or `{"seconds": s}`; `{"process": p}` beside it chooses one of several. `{"file_bytes": n}` does
not kill, but lets no file grow beyond n bytes after step 4, as a full disk would; `{"nan_after": n}` puts NaN into
weights after step n.
"""

import hashlib
import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import transformers.modeling_utils
from shared_models import TINY
from tiny_runs import rows_of
from transformers import TrainerCallback, set_seed

from bd3lm_hf.modeling.configuration_bd3lm import BD3LMConfig
from bd3lm_hf.modeling.modeling_bd3lm import BD3LMForMaskedLM
from bd3lm_hf.run_folder import SaveError, last_complete_checkpoint, recover_output_dir
from bd3lm_hf.training.arguments import BD3LMTrainingArguments
from bd3lm_hf.training.trainer import BD3LMTrainer, TrainingDivergedError


# Saves and logs do not coincide; saves fall into the middle and on the end of epochs; the learning rate moves; dropout
# draws from the global random state; an epoch of 22 sequences ends with a filled-up step.
ARGUMENTS = {"max_steps": 15, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "seed": 5}
ARGUMENTS |= {"learning_rate": 1e-2, "lr_scheduler_type": "cosine", "warmup_steps": 3, "ema_decay": 0.9}
ARGUMENTS |= {"logging_steps": 2, "eval_strategy": "epoch", "save_strategy": "steps", "save_steps": 3}
ARGUMENTS |= {"save_total_limit": 2, "disable_tqdm": True, "use_cpu": True}
SPEED = {"tokens_per_second", "tflops_per_second", "eval_runtime", "train_runtime"}
SPEED |= {"train_samples_per_second", "train_steps_per_second"}


class MoveInterval(TrainerCallback):
    """Stands in for the search: moves the interval of noise levels at each evaluation."""

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        model.sampling_eps_min.fill_(0.01 * state.global_step)
        model.sampling_eps_max.fill_(1 - 0.01 * state.global_step)


class AfterStep(TrainerCallback):
    """Calls a function with the model after a step."""

    def __init__(self, step: int, call: Callable[[torch.nn.Module], None]) -> None:
        self.step, self.call = step, call

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            self.call(model)


def poison(model: torch.nn.Module) -> None:
    """Put NaN into weights."""
    next(model.parameters()).data.fill_(float("nan"))


def make_trainer(folder: Path, **arguments) -> BD3LMTrainer:
    args = BD3LMTrainingArguments(**{**ARGUMENTS, **arguments, "output_dir": str(folder)})
    set_seed(args.seed)
    return BD3LMTrainer(
        model=BD3LMForMaskedLM(BD3LMConfig(**{**TINY, "dropout": 0.1})),
        args=args,
        train_dataset=rows_of(22),
        eval_dataset=rows_of(2, seed=1),
        callbacks=[MoveInterval()],
    )


class Events:
    """Counts the steps of writing to a folder, and kills this process at one of them.

    Steps are opened, made, renamed and removed files and folders, and weights and tensors that are half written.
    """

    def __init__(self, folder: Path, event: int | str = 0, occurrence: int = 1) -> None:
        self.folder, self.event, self.occurrence, self.seen = str(folder), event, occurrence, []
        sys.addaudithook(self._audit)
        torch.save = self._halved(torch.save)
        transformers.modeling_utils.safe_save_file = self._halved(transformers.modeling_utils.safe_save_file)

    def _audit(self, event, arguments):
        written = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        if written or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            self._tick(event, arguments[0])

    def _halved(self, save):
        def save_and_maybe_cut(content, path, *arguments, **keywords):
            result = save(content, path, *arguments, **keywords)
            self._tick("half of", path)
            return result

        return save_and_maybe_cut

    def _tick(self, event, path):
        # Removing a tree names its files relative to an open folder.
        path = os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else ""
        if os.path.isabs(path) and not path.startswith(self.folder):
            return
        self.seen.append(f"{event} {os.path.basename(path)}")
        named = self.seen[-1] == self.event and self.seen.count(self.event) == self.occurrence
        if named or len(self.seen) == self.event:
            if event == "half of":
                os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)


def train(folder: Path, kill: dict, **arguments) -> None:
    """Train, or go on from the last complete checkpoint, and write what came out."""
    place = {name: kill[name] for name in ("event", "occurrence") if name in kill}
    process = int(os.environ.get("RANK", "0"))
    events = Events(folder, **(place if kill.get("process", 0) == process else {}))
    if process == 0:
        recover_output_dir(folder)
    checkpoint = last_complete_checkpoint(folder)
    trainer = make_trainer(folder, **arguments)
    if "file_bytes" in kill:
        # As on a full disk, with the system's own errors, files cannot grow.
        limits = (kill["file_bytes"], resource.RLIM_INFINITY)
        trainer.add_callback(AfterStep(4, lambda model: resource.setrlimit(resource.RLIMIT_FSIZE, limits)))
    if "nan_after" in kill and kill["process"] == process:
        trainer.add_callback(AfterStep(kill["nan_after"], poison))
    try:
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    except (SaveError, TrainingDivergedError) as error:
        print(error, file=sys.stderr)
        os._exit(2)
    trainer.save_model()
    weights = hashlib.sha256()
    for name, tensor in sorted(trainer.model.state_dict().items()):
        weights.update(name.encode() + tensor.numpy().tobytes())
    logs = [{k: v for k, v in entry.items() if k not in SPEED} for entry in trainer.state.log_history]
    outcome = {
        "resumed_from": checkpoint and checkpoint.name,
        "log": logs,
        "weights": weights.hexdigest(),
        "events": events.seen,
        "files": sorted(path.name for path in folder.iterdir()),
    }
    if process == 0:
        folder.with_suffix(".json").write_text(json.dumps(outcome), encoding="utf-8")


def in_a_fork(function, *arguments, seconds: float | None = None, **keywords) -> int:
    """Call in a process of its own, killed after some seconds if given; its exit status, negative for a signal."""
    child = os.fork()
    if not child:
        os.dup2(2, 1)
        try:
            function(*arguments, **keywords)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(folder: Path, plan: list[list[dict]]) -> list[dict]:
    """Carry out a plan."""
    outcomes = []
    for number, kills in enumerate(plan):
        case = folder / str(number)
        statuses = [in_a_fork(train, case, kill, seconds=kill.get("seconds")) for kill in kills]
        statuses.append(in_a_fork(train, case, {}))
        outcome = json.loads(case.with_suffix(".json").read_text(encoding="utf-8"))
        outcomes.append({"statuses": statuses, **outcome})
    return outcomes


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, wanted = Path(sys.argv[1]).resolve(), json.loads(sys.argv[2])
    if "RANK" in os.environ:
        train(folder, wanted, per_device_train_batch_size=1)
    else:
        print(json.dumps(main(folder, wanted)))
