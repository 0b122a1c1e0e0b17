"""An exponential moving average of the weights, as published: shadow -= (1 - d) (shadow - weight) after every step.

With warm-up the decay of update n, counted from 1, is d = min(decay, (1 + n) / (10 + n)). Evaluation, text samples and
the exported model use the average; training goes on from the weights themselves.

torch's `AveragedModel` keeps a second model in the precision of the weights, frozen ones included, copies the weights
in its first update, and can not be made of sharded weights.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from bd3lm_hf.training.sharding import local_part, part_like, reshard, whole


EMA_NAME = "ema.safetensors"  # in a checkpoint, beside the weights that training goes on from
WEIGHTS_NAME = "weights.json"  # in every saved folder: which weights these are


class WeightAverage:
    """The averages of a model's trainable weights, in float32; of sharded weights the part of this process.

    Buffers are not averaged: the model keeps the two of its interval as they are.

    Args:
        model: prepared for training, so that its parameters are those that the optimizer changes.
        decay: between 0 and 1.
        warmup: start with a lower decay, so that the average soon forgets the initial weights.
    """

    def __init__(self, model: nn.Module, *, decay: float, warmup: bool = True) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"ema_decay={decay} is no decay: give a number between 0 and 1, for example 0.9999.")
        self.model, self.decay, self.warmup, self.updates = model, decay, warmup, 0
        reshard(model)
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.shadows = {name: local_part(p).float().clone() for name, p in self.parameters.items()}

    def decay_of(self, update: int) -> float:
        """The decay of an update, counted from 1."""
        return min(self.decay, (1 + update) / (10 + update)) if self.warmup else self.decay

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the weights, after an optimizer step."""
        self.updates += 1
        weights = [local_part(p).float() for p in self.parameters.values()]
        torch._foreach_lerp_(list(self.shadows.values()), weights, 1 - self.decay_of(self.updates))

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Have the averages in the model, and its own weights again afterwards, whatever happened in between."""
        reshard(self.model)
        weights = {name: local_part(p) for name, p in self.parameters.items()}
        raw = {name: tensor.clone() for name, tensor in weights.items()}
        try:
            self._fill(weights, self.shadows)
            yield
        finally:
            reshard(self.model)
            self._fill(weights, raw)

    @staticmethod
    @torch.no_grad()
    def _fill(weights: dict[str, torch.Tensor], values: dict[str, torch.Tensor]) -> None:
        for name, tensor in weights.items():
            tensor.copy_(values[name])

    def save(self, folder: str | Path, *, write: bool = True) -> None:
        """Write `ema.safetensors`; all processes take part, those that should `write` do.

        It holds the averages by the names of their parameters and, as metadata, the number of updates.
        """
        tensors = {}
        for name, shadow in self.shadows.items():
            tensor = whole(shadow, self.parameters[name])
            if write:
                tensors[name] = tensor.cpu().contiguous()
        if write:
            metadata = {"updates": str(self.updates), "decay": repr(self.decay), "warmup": json.dumps(self.warmup)}
            save_file(tensors, Path(folder, EMA_NAME), metadata=metadata)

    def load(self, folder: str | Path) -> None:
        """Go on from what [`save`] wrote; the decay stays that of this run.

        Raises:
            ValueError: the folder has no averages, or those of another model.
        """
        path = Path(folder, EMA_NAME)
        if not path.is_file():
            raise ValueError(
                f"the checkpoint {folder} holds no {EMA_NAME}: its run kept no average, so --ema_decay {self.decay} "
                f"can not go on from it. Resume with --ema_decay 0, or start a new run with --init_from {folder}."
            )
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            if names != set(self.shadows):
                other = sorted(names ^ set(self.shadows))
                listed = ", ".join(other[:8]) + (", ..." if len(other) > 8 else "")
                raise ValueError(
                    f"{path} holds averages of other weights than this run trains; they differ in {listed}: resume "
                    f"with the model of that checkpoint."
                )
            for name, shadow in self.shadows.items():
                tensor, parameter = file.get_tensor(name), self.parameters[name]
                if tensor.shape != parameter.shape:
                    raise ValueError(
                        f"{path} holds an average of {name} of shape {tuple(tensor.shape)}, but this run trains one "
                        f"of {tuple(parameter.shape)}: resume with the model of that checkpoint."
                    )
                shadow.copy_(part_like(tensor.to(shadow.device), parameter))
            self.updates = int((file.metadata() or {})["updates"])


class AverageCallback(TrainerCallback):
    """Keeps the average of the model that a Trainer trains, under `average` once training has begun."""

    def __init__(self, decay: float, warmup: bool) -> None:
        self.decay, self.warmup = decay, warmup
        self.average: WeightAverage | None = None

    def start(self, model: Any) -> WeightAverage:
        """Begin at the weights of `model`."""
        self.average = WeightAverage(model, decay=self.decay, warmup=self.warmup)
        return self.average

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin, unless a checkpoint's average is being continued."""
        if self.average is None or not state.global_step:
            self.start(kwargs["model"])

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Update, unless the loss scaler of float16 skipped the step."""
        if self.average is not None and not getattr(kwargs["optimizer"], "step_was_skipped", False):
            self.average.update()


def describe_weights(average: WeightAverage | None, step: int) -> dict[str, Any]:
    """Content of `weights.json`: `weights` is "average" or "raw", the `step` of training, and what the average is."""
    if average is None:
        return {"weights": "raw", "step": step}
    settings = {"ema_decay": average.decay, "ema_warmup": average.warmup, "ema_updates": average.updates}
    return {"weights": "average", "step": step, **settings}


__all__ = ["EMA_NAME", "WEIGHTS_NAME", "AverageCallback", "WeightAverage", "describe_weights"]
