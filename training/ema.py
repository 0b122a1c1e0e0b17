"""An exponential moving average of the weights, as published: shadow -= (1 - d) (shadow - weight) after every step.

With warm-up the decay of update n, counted from 1, is d = min(decay, (1 + n) / (10 + n)). Evaluation, text samples and
the saved model use the average. Training continues from the raw weights: a checkpoint contains both, so that a resumed
run repeats an uninterrupted one. `weights.json` in every saved folder says which weights it contains.

torch's `AveragedModel` does not work here: it keeps a second model in the precision of the weights, frozen ones
included, copies the weights in its first update, and does not support sharded weights.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers.utils import logging

from bd3lm_hf.modeling.layers_bd3lm import is_sharded
from bd3lm_hf.run_folder import EMA_NAME, WEIGHTS_NAME
from bd3lm_hf.training.arguments import BD3LMTrainingArguments


logger = logging.get_logger("bd3lm_hf.train")


class WeightAverage:
    """The averages of a model's trainable weights, in float32; for sharded weights the part of this process.

    Buffers are not averaged: the model keeps its interval of noise levels.

    Args:
        model: prepared for training, so that its parameters are those that the optimizer changes.
        decay: between 0 and 1.
        warmup: start with a lower decay, so that the average soon forgets the initial weights.
    """

    def __init__(self, model: nn.Module, *, decay: float, warmup: bool = True) -> None:
        self.model, self.decay, self.warmup, self.updates = model, decay, warmup, 0
        reshard(model)
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.shadows = {name: local_part(p).float().clone() for name, p in self.parameters.items()}

    def decay_of(self, update: int) -> float:
        return min(self.decay, (1 + update) / (10 + update)) if self.warmup else self.decay

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the weights, after an optimizer step."""
        self.updates += 1
        # The average is kept in float32: with decay 0.9999 an update is lost in the rounding of bfloat16.
        weights = [local_part(p).float() for p in self.parameters.values()]
        torch._foreach_lerp_(list(self.shadows.values()), weights, 1 - self.decay_of(self.updates))

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Put the averages into the model, and restore its own weights afterwards, even after an error."""
        reshard(self.model)
        weights = [local_part(p) for p in self.parameters.values()]
        raw = [tensor.clone() for tensor in weights]
        try:
            for weight, shadow in zip(weights, self.shadows.values(), strict=True):
                weight.copy_(shadow)
            yield
        finally:
            reshard(self.model)
            for weight, own in zip(weights, raw, strict=True):
                weight.copy_(own)

    def save(self, folder: str | Path, *, write: bool = True) -> None:
        """Write `ema.safetensors`. All processes must call this; only those with `write` write.

        The file contains the averages by parameter name and, as metadata, the number of updates.
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
        """Continue from the averages that [`save`] wrote, with the decay of this run.

        Raises:
            ValueError: if the folder has no averages, or those of another model.
        """
        path = Path(folder, EMA_NAME)
        if not path.is_file():
            raise ValueError(
                f"the checkpoint {folder} holds no {EMA_NAME}: its run kept no average, so --ema_decay {self.decay} "
                f"cannot continue from it. Resume with --ema_decay 0, or start a new run with --init_from {folder}."
            )
        with safe_open(path, framework="pt") as file:
            saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            if saved != {name: tuple(parameter.shape) for name, parameter in self.parameters.items()}:
                raise ValueError(
                    f"{path} has averages of other weights than this run trains: resume with the model of that "
                    f"checkpoint."
                )
            for name, shadow in self.shadows.items():
                shadow.copy_(part_like(file.get_tensor(name).to(shadow.device), self.parameters[name]))
            self.updates = int((file.metadata() or {})["updates"])


class AverageCallback(TrainerCallback):
    """Keep the average of a Trainer's model; `average` is set once training has begun."""

    def __init__(self, decay: float, warmup: bool) -> None:
        self.decay, self.warmup = decay, warmup
        self.average: WeightAverage | None = None

    def start(self, model: Any) -> WeightAverage:
        self.average = WeightAverage(model, decay=self.decay, warmup=self.warmup)
        return self.average

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Start, unless a checkpoint's average is being continued."""
        if self.average is None or not state.global_step:
            self.start(kwargs["model"])

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Update, unless the loss scaler of float16 skipped the step."""
        if self.average is not None and not getattr(kwargs["optimizer"], "step_was_skipped", False):
            self.average.update()


class AveragingTrainer(Trainer):
    """transformers' Trainer with an average of the weights, also under DDP, FSDP2 and DeepSpeed ZeRO-2.

    Args:
        as in transformers' `Trainer`; `args` is a [`BD3LMTrainingArguments`], whose `ema_decay` and `ema_warmup` are
        used here.
    """

    args: BD3LMTrainingArguments
    model: Any

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.averaging = AverageCallback(self.args.ema_decay, self.args.ema_warmup) if self.args.ema_decay else None
        if self.averaging is not None:
            self.add_callback(self.averaging)
        self._evaluated: Any = None  # the model with averaged weights, while they are in use

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator, refuse kinds of sharding that would fail later, and keep noise in float32."""
        super().create_accelerator_and_postprocess()
        if self.is_fsdp_enabled:
            prepare_fsdp(self.accelerator.state.fsdp_plugin)
        stage = self.accelerator.state.deepspeed_plugin.zero_stage if self.is_deepspeed_enabled else 0
        if stage == 3 and self.args.ema_decay:
            raise ValueError(
                f"--ema_decay {self.args.ema_decay} is not supported with DeepSpeed ZeRO-3, which keeps the weights "
                f"outside torch's parameters: use FSDP2 (training/launch/fsdp2.yaml) or ZeRO-2, or --ema_decay 0."
            )

    @property
    def average(self) -> WeightAverage | None:
        """The average of the weights, once training has begun; None without `ema_decay`."""
        return None if self.averaging is None else self.averaging.average

    @contextmanager
    def averaged_weights(self) -> Iterator[Any]:
        """Yield the model to evaluate, with the averaged weights; restore the raw weights even after an error.

        It is the trained model itself, or if its weights are sharded a whole copy, which each process can use alone.
        Without an average it has the raw weights. All processes must enter together.
        """
        if self._evaluated is not None:
            yield self._evaluated
            return
        with self._swapped():
            model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
            sharded = has_shards(model)
            if self.model_wrapped is self.model and not sharded:
                # FSDP and DeepSpeed leave the model on the CPU until training begins.
                model.to(self.args.device)
            self._evaluated = whole_model(model) if sharded else model
            # Callbacks get the model that is evaluated.
            self.callback_handler.model, trained = self._evaluated, self.callback_handler.model
            try:
                yield self._evaluated
            finally:
                self._evaluated, self.callback_handler.model = None, trained

    def _swapped(self) -> Any:
        return nullcontext() if self.average is None else self.average.swapped()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # The Trainer calls this with a checkpoint to resume from, once the model is prepared.
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        if self.averaging is not None:
            self.averaging.start(self.model).load(checkpoint)
        elif Path(checkpoint, EMA_NAME).is_file():
            logger.warning(f"{checkpoint} has averaged weights, which this run drops: it has no --ema_decay.")

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.average is not None and self.state.best_model_checkpoint is not None:
            self.average.load(self.state.best_model_checkpoint)

    def save_raw_weights(self, folder: str) -> None:
        """Write the model with its raw weights, from which training continues, and the average next to it."""
        self._save_weights(folder, None)
        if self.average is not None:
            self.average.save(folder, write=self.args.should_save)

    def save_averaged_weights(self, folder: str) -> None:
        """Write the model with the averaged weights, or the raw ones without an average."""
        with self._swapped():
            self._save_weights(folder, self.average)

    def _save_weights(self, folder: str, average: WeightAverage | None) -> None:
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if has_shards(model):
            # Not the Trainer's way: FSDP2 renames the model's class, and its code would not be found and saved.
            trained, self.model = self.model, whole_model(model)
            try:
                self._save(folder)
            finally:
                self.model = trained
        else:
            super().save_model(folder, _internal_call=True)
        if self.args.should_save:
            content: dict[str, Any] = {"weights": "raw", "step": self.state.global_step}
            if average is not None:
                content |= {"weights": "average", "ema_decay": average.decay, "ema_warmup": average.warmup}
                content |= {"ema_updates": average.updates}
            Path(folder, WEIGHTS_NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


# Sharded weights (FSDP2, DeepSpeed ZeRO-3). All processes must call the functions that gather them


def has_shards(model: nn.Module) -> bool:
    """Return whether any weight of a model is sharded over several processes."""
    return any(map(is_sharded, model.modules()))


def reshard(model: nn.Module) -> None:
    """Drop gathered copies of weights: FSDP2 keeps some after a forward pass, and they would miss later changes."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def prepare_fsdp(plugin: Any) -> None:
    """Make accelerate's FSDP plugin keep noise, loss and sums of gradients in float32.

    Raises:
        ValueError: if the plugin has version 1, which flattens the weights.
    """
    if plugin.fsdp_version != 2:
        raise ValueError(
            f"fsdp_version {plugin.fsdp_version} is not supported: use 2, as in training/launch/fsdp2.yaml."
        )
    if plugin.mixed_precision_policy is not None:
        # Only the network computes in low precision.
        float32: dict[str, Any] = {"cast_forward_inputs": False, "output_dtype": None, "reduce_dtype": torch.float32}
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, **float32)


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return the part of a tensor that this process holds, sharing its memory."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def part_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return the part of a whole tensor that this process would hold if it were sharded as `like` is."""
    if isinstance(like, DTensor):
        tensor = distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
    return local_part(tensor)


def whole(part: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return the whole tensor, gathered from parts that are sharded as `like` is."""
    if not isinstance(like, DTensor):
        return part
    shape, stride = like.shape, like.stride()
    return DTensor.from_local(part, like.device_mesh, like.placements, shape=shape, stride=stride).full_tensor()


def whole_model(model: Any) -> Any:
    """Return a copy of a sharded model with whole weights, which runs without the other processes.

    It takes the memory of the weights, a fraction of what training takes with gradients and moments.

    Raises:
        ValueError: if the model is wrapped, for example by PEFT.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"a {type(model).__name__} cannot be evaluated while its weights are sharded over processes: train it "
            f"with DDP (training/launch/ddp.yaml)."
        )
    reshard(model)
    # `fully_shard` replaces the class of a model with a subclass, which could not be saved.
    plain: Any = next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))
    # Allocate nothing for weights that are replaced below.
    with torch.device("meta"):
        copy: Any = plain(model.config)
    copy.generation_config = model.generation_config
    for name, parameter in model.named_parameters():
        with _gathered(parameter):
            tensor = whole(local_part(parameter), parameter)
            tensor = tensor if isinstance(parameter, DTensor) else tensor.clone()
        owner, _, leaf = name.rpartition(".")
        copy.get_submodule(owner)._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    for name, buffer in model.named_buffers():
        owner, _, leaf = name.rpartition(".")
        copy.get_submodule(owner)._buffers[leaf] = buffer.clone()
    return copy.train(model.training)


def _gathered(parameter: nn.Parameter) -> Any:
    """Return a context in which a weight sharded by ZeRO-3 is whole."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    # deepspeed is not a requirement of ours, but a model has such weights only if it is installed.
    return import_module("deepspeed").zero.GatheredParameters([parameter])
