"""`BD3LMTrainer`: transformers' Trainer for models with the methods `token_nll` and `generate`.

It adds noise that does not depend on the layout of a run, stopping when a number is no longer finite or a signal
arrives, checkpoints that appear only when they are complete, and exact resuming. The average of the weights is in
`ema.py`, evaluation by likelihood in `evaluating_trainer.py`, uploads are in `uploads.py`.
"""

import json
import math
import signal
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, seed_worker
from transformers.utils import logging

from bd3lm_hf.checkpoints import NotFiniteError, check_finite_weights
from bd3lm_hf.data.streaming import PackedStream, read_position, write_position
from bd3lm_hf.evaluation.results import config_identity, data_identity, tokenizer_identity
from bd3lm_hf.modeling.inputs_bd3lm import check_labels, check_text
from bd3lm_hf.run_folder import (
    check_same_run,
    checkpoint_to_resume,
    clear_staging,
    last_complete_checkpoint,
    mark_complete,
    publish_files,
    publish_folder,
    read_completion_mark,
    remove_old_checkpoints,
    saving,
    staging_folder,
)
from bd3lm_hf.training.arguments import BD3LMTrainingArguments
from bd3lm_hf.training.callbacks import (
    ResumableFlow,
    RunningLoss,
    SignalCallback,
    SpeedMeter,
    TrainingStopped,
    num_parameters,
    peak_tflops_of,
    training_flops,
)
from bd3lm_hf.training.evaluating_trainer import EvaluatingTrainer
from bd3lm_hf.training.examples import (
    NOISE,
    BlockSizeCallback,
    BlockSizeSchedule,
    EndlessStream,
    EpochOrder,
    EpochSampler,
    NoiseCollator,
    PaddingCollator,
)
from bd3lm_hf.training.interval import check_searchable
from bd3lm_hf.training.uploads import UploadingTrainer


logger = logging.get_logger("bd3lm_hf.train")

POSITION_NAME = "stream.npz"  # in a checkpoint: the position at which the stream of training text continues

_HASHED_SEQUENCES = 1024

_TRAINING = (
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args"),
    *("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
)

# A resumed run may have another length, but then schedules that depend on it change.
_LENGTH = ("max_steps", "num_train_epochs")


class TrainingDivergedError(NotFiniteError):
    """A loss or a gradient is no longer a finite number."""


class BD3LMTrainer(UploadingTrainer, EvaluatingTrainer):
    """Trainer of language models whose loss is a sum over noisy tokens divided by `num_items_in_batch`.

    Training examples come in a seeded order and carry their noise (see `training/examples.py`), so a run depends on
    the seed and the global batch only. The arguments are those of transformers' `Trainer` and of
    [`EvaluatingTrainer`]; `args` is a [`BD3LMTrainingArguments`].

    Raises:
        ValueError: if the model has no `token_nll` or no `generate`, has non-finite weights, or the loss or the labels
            would not be the model's own (`compute_loss_func`, a collator with `mlm=True`).
    """

    data_collator: Any

    def __init__(
        self,
        model: PreTrainedModel | Any = None,
        args: BD3LMTrainingArguments | None = None,
        data_collator: Any = None,
        *arguments: Any,
        **keywords: Any,
    ) -> None:
        if keywords.get("compute_loss_func") is not None:
            raise ValueError("compute_loss_func: the loss is the model's own, and no other trains it to denoise.")
        if getattr(data_collator, "mlm", False):
            raise ValueError(
                f"{type(data_collator).__name__}(mlm=True) masks the text, which the loss masks again: pass mlm=False."
            )
        for name in ("token_nll", "generate"):
            if not hasattr(model, name):
                raise ValueError(f"a {type(model).__name__} has no `{name}`: train a language model of this package.")
        check_finite_weights(model, "the model to train")
        if args is not None and args.interval_search:
            check_searchable(model, args.interval_list(model.config.block_size))
        pad_token_id = model.config.pad_token_id
        collator = data_collator or PaddingCollator(0 if pad_token_id is None else pad_token_id)
        super().__init__(model, args, collator, *arguments, **keywords)
        self.order: EpochOrder | EndlessStream | None = None
        self._stream_folder: str | None = None  # checkpoint that a stream continues from
        device, peak = self.args.device, self.args.peak_tflops
        if peak is None:
            peak = peak_tflops_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else 0.0
        self.speed = SpeedMeter(peak * 1e12 * self.args.world_size)
        self.add_callback(self.speed)
        self.signals = SignalCallback()
        if self.args.save_on_signal:
            self.add_callback(self.signals)  # before the callback that delays saving
        schedule = self.args.block_size_schedule
        self.schedule = None if schedule is None else BlockSizeSchedule.parse(schedule)
        if self.schedule is not None:
            self.schedule.check(self.model.config)
            self.add_callback(BlockSizeCallback(self.schedule))
        self.add_callback(ResumableFlow())
        self.losses = RunningLoss(self.args.device, self.accelerator.gather)
        self._fingerprint: dict[str, Any] = {}
        self._finite: list[torch.Tensor] = []  # per micro-batch of the current optimizer step
        self._staging = False

    # Examples and their noise

    def get_train_dataloader(self) -> DataLoader:
        """Return the loader of the training examples in their seeded order, each with its noise."""
        group_size = self.get_total_train_batch_size(self.args)
        sampler: EpochSampler | None = None
        if isinstance(self.train_dataset, PackedStream):
            self.order = self._make_stream(self.train_dataset, group_size)
        else:
            self.order = EpochOrder(self.train_dataset, seed=self.data_seed, group_size=group_size)
            sampler = EpochSampler(self.order)
        config = self.model.config
        collate = NoiseCollator(
            self.data_collator,
            config,
            seed=self.data_seed,
            group_size=group_size,
            num_noise_samples=self.model.num_noise_samples,
            check=check_text if self.model.has_likelihood else check_labels,
            schedule=self.schedule,
        )
        workers = self.args.dataloader_num_workers
        loader = DataLoader(
            self.order,
            batch_size=self._train_batch_size,
            sampler=sampler,
            collate_fn=collate,
            num_workers=workers,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type != "cpu",
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            worker_init_fn=partial(seed_worker, num_workers=workers, rank=self.args.process_index),
        )
        loader = self.accelerator.prepare(loader)
        if sampler is None:
            # A loader draws a seed from torch's global generator when it starts. A resumed run starts it once more,
            # and must not draw one number more than an uninterrupted run.
            loader.base_dataloader.generator = torch.Generator()
        return loader

    def _make_stream(self, sequences: PackedStream, group_size: int) -> EndlessStream:
        """Return the stream. Only the main process reads it; it dispatches each batch to the others."""
        if self.args.dataloader_num_workers:
            raise ValueError(
                f"--dataloader_num_workers {self.args.dataloader_num_workers}: a stream is read by the main process, "
                "which knows its position for the checkpoint; leave it out."
            )
        stream = EndlessStream(sequences, group_size=group_size)
        if self._stream_folder is not None and self.args.process_index == 0:
            stream.resume(read_position(Path(self._stream_folder, POSITION_NAME)))
        return stream

    @property
    def data_seed(self) -> int:  # type: ignore[override]
        """The seed of the order of examples and of all noise."""
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        # Keep noise in float32 under DeepSpeed: bfloat16 has 128 numbers in [0.5, 1), and noise levels would collide.
        noise = {name: inputs[name].to(self.args.device) for name in NOISE if name in inputs}
        return {**super()._prepare_inputs(inputs), **noise}

    # Non-finite numbers

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
        """Run one micro-batch, forward and backward, and record whether its loss is finite."""
        # An estimate: batches of other processes may be padded to another length.
        self.speed.tokens += inputs["input_ids"].numel() * self.args.world_size
        self.speed.flops += self.floating_point_ops(inputs) * self.args.world_size
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.losses.add(loss)
        self._finite.append(torch.isfinite(loss).all())
        return loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return the operations of the forward and backward pass of one micro-batch."""
        flops = training_flops(self.model, *inputs["input_ids"].shape)
        return super().floating_point_ops(inputs) if flops is None else flops

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        # The Trainer calls this between clipping and the optimizer's step, so stopping here keeps the weights.
        norm = super()._get_grad_norm(model, grad_norm)
        self._stop_if_not_finite(norm)
        return norm

    def _stop_if_not_finite(self, norm: torch.Tensor | float | None) -> None:
        # Filled on the device: a copy from the host would wait for it.
        signalled = torch.full((), self.signals.received is not None, device=self.args.device)
        flags = torch.stack([torch.stack(self._finite).all(), signalled])
        self._finite = []
        # Every process reads the flags of all processes, so all of them stop together at the same step.
        flags = self.accelerator.gather(flags).view(-1, 2).cpu()
        self.signals.agreed = bool(flags[:, 1].any())
        if not bool(flags[:, 0].all()):
            self._stop("the loss")
        # With float16 an overflowing gradient is routine: the loss scaler skips that step.
        if norm is not None and not self.args.fp16 and not math.isfinite(float(norm)):
            self._stop("the gradient")

    def _stop(self, what: str) -> None:
        last = last_complete_checkpoint(self.args.output_dir)
        saved = f"The last good checkpoint is {last}." if last else "No checkpoint had been saved yet."
        raise TrainingDivergedError(
            f"{what} is NaN or infinite at step {self.state.global_step + 1}: training stopped before the weights "
            f"changed. {saved} Lower --learning_rate (now {self.args.learning_rate})."
        )

    # Resuming

    def train(self, resume_from_checkpoint: str | bool | None = None, *arguments: Any, **keywords: Any) -> TrainOutput:
        """Train, from the start or from a complete checkpoint of the same run.

        Args:
            resume_from_checkpoint: a checkpoint folder, or True for the last complete one of `args.output_dir`.

        Raises:
            ValueError: if no checkpoint is complete, it belongs to another run (with the differences in the message),
                or `args.eval_estimator` or `args.metric_for_best_model` does not fit.
            TrainingStopped: if SIGINT or SIGTERM stopped the run (`args.save_on_signal`); a checkpoint is saved.
        """
        self.losses = RunningLoss(self.args.device, self.accelerator.gather)
        self._fingerprint = self.fingerprint()
        checkpoint = None
        if resume_from_checkpoint:
            checkpoint = str(checkpoint_to_resume(resume_from_checkpoint, self.args.output_dir))
            # The completion mark contains the fingerprint and the losses of the run that wrote the checkpoint.
            mark = read_completion_mark(checkpoint)
            check_same_run(checkpoint, mark, self._fingerprint)
            self.losses.load_state_dict(mark["losses"], self.args.process_index, self.args.world_size)
            self.args.eval_on_start = False  # done before the checkpoint
        if isinstance(self.train_dataset, PackedStream):
            self._stream_folder = checkpoint
            self.args.ignore_data_skip = True  # a stream continues at the position in the checkpoint
        self.check_evaluation()
        try:
            output = super().train(checkpoint, *arguments, **keywords)
        finally:
            self._close_progress_bars()
            self.signals.restore()
        self.stop_if_signalled()
        return output

    def fingerprint(self) -> dict[str, Any]:
        """Return everything that determines the numbers of a run, as JSON: sections of named values.

        The optimizer's state contains the old learning rate, so a new one would silently be ignored. The length of a
        run, its layout over processes, and what it logs, evaluates and saves may change. The interval of noise levels
        is excluded: interval search changes it during training, and it is stored with the weights.
        """
        args, model = self.args, self.model
        parameters = {"parameters": num_parameters(model)}
        parameters |= {"trained parameters": num_parameters(model, only_trainable=True)}
        training = {name: getattr(args, name, None) for name in _TRAINING}
        training |= {"global batch size": self.get_total_train_batch_size(args)}
        training |= {"seed": args.seed, "data_seed": self.data_seed}
        if args.ema_decay:  # a run without an average saves none to resume from
            training |= {"ema_decay": args.ema_decay, "ema_warmup": args.ema_warmup}
        fingerprint = {
            "model": config_identity(model.config) | parameters,
            "tokenizer": tokenizer_identity(self.processing_class),
            "data": data_identity(self.train_dataset, sample=_HASHED_SEQUENCES),
            "training": training,
            "length": {name: getattr(args, name) for name in _LENGTH},
        }
        return json.loads(json.dumps(fingerprint, default=str))  # as it will be read from a file

    def stop_if_signalled(self) -> None:
        """Raise [`TrainingStopped`] if a signal stopped training, or arrived too late to stop it."""
        if not self.signals.agreed and self.signals.received is None:
            return
        last = last_complete_checkpoint(self.args.output_dir)
        saved = f"{last} is saved; continue with --resume_from_checkpoint true" if last else "nothing is saved"
        raise TrainingStopped(
            self.signals.received or signal.SIGTERM, f"training stopped after step {self.state.global_step}: {saved}."
        )

    def _close_progress_bars(self) -> None:
        # An error would be printed at the end of the bar's line.
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ProgressCallback) and callback.training_bar is not None:
                callback.training_bar.close()
                callback.training_bar = None

    def _run_epoch(self, *arguments: Any, **keywords: Any) -> None:
        # The Trainer checks whether a run is over only after a step; a run resumed at its end must not take another.
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*arguments, **keywords)
        else:
            self.control.should_training_stop = True

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        check_finite_weights(self.model, str(resume_from_checkpoint))

    # Logging

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log with the training speed since the last log, and with losses that resuming does not change."""
        if "loss" in logs:
            logs["loss"] = self.losses.mean_since_last_log(self.state.global_step)
            logs |= self.speed.since_last_log()
        if "train_loss" in logs:
            logs["train_loss"] = self.losses.mean_of_run(self.state.global_step)
        if isinstance(self.order, EndlessStream):
            # The Trainer counts epochs from the resumed step, and does not know the epochs of a stream.
            self.state.epoch = self.state.global_step / self.state.max_steps
        super().log(logs, start_time)

    # Saving

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save model, code, tokenizer and generation config; old files stay until the new ones are complete.

        The averaged weights are saved, in a checkpoint (`_internal_call`) the raw ones; `weights.json` says which.
        """
        if _internal_call:
            check_finite_weights(self.model, f"the model after step {self.state.global_step}")
            self.save_raw_weights(str(output_dir))
            return
        self.write_model(output_dir or self.args.output_dir)
        if self.args.push_to_hub:
            self.upload_model("Model save")

    def write_model(self, folder: str | Path) -> None:
        """Save the model as [`save_model`] does, but do not upload it."""
        check_finite_weights(self.model, f"the model after step {self.state.global_step}")
        target = Path(folder)
        staging = staging_folder(target) / "model"
        with saving("the model", target):
            self._empty_staging(target)
            self.save_averaged_weights(str(staging))
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                publish_files(staging, target)
                clear_staging(target)

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return str(staging_folder(folder)) if self._staging else folder

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        # The Trainer writes into `checkpoint-N` file by file; it does so in a staging folder, which is then renamed.
        # A run that is killed while saving leaves no half-written checkpoint to resume from.
        folder = Path(self._get_output_dir(trial))
        target = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staged = staging_folder(folder) / target.name
        with saving(target.name, folder):
            self._empty_staging(folder)
            self._staging = True
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = False
            losses = self.losses.state_dict()
            if isinstance(self.order, EndlessStream) and self.args.process_index == 0:
                write_position(self.order.position(self.state.global_step), staged / POSITION_NAME)
            # Every process writes its own random state, so wait for the slowest.
            self.accelerator.wait_for_everyone()
            if self.state.best_model_checkpoint == str(staged):
                self.state.best_model_checkpoint = str(target)
            if self.args.should_save:
                self.state.save_to_json(str(staged / TRAINER_STATE_NAME))
                # Without optimizer state a checkpoint is only a model: no run can resume from it.
                resumable = not self.args.save_only_model
                mark_complete(staged, {**self._fingerprint, "losses": losses, "resumable": resumable})
                publish_folder(staged, target)
                # The best checkpoint outlives the limit, as in transformers.
                keep = {str(target), str(self.state.best_model_checkpoint)}
                remove_old_checkpoints(folder, limit=self.args.save_total_limit, keep=keep)
                clear_staging(folder)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(target))

    def _empty_staging(self, folder: Path) -> None:
        # Files left there by a killed run must not be published with this one's.
        if self.args.should_save:
            clear_staging(folder)
        self.accelerator.wait_for_everyone()

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # The Trainer also calls this for the staging folder, which is gone before an upload is done.
        if not self._staging:
            super()._push_from_checkpoint(checkpoint_folder)
