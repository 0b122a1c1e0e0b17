"""`BD3LMTrainer`: transformers' Trainer for models with the verbs `token_nll` and `generate`.

It adds what needs a loop: noise that does not depend on the layout of a run, evaluation by likelihood, an early stop
when numbers are no longer finite, checkpoints that appear only when they are complete, and exact resume from them. The
average of the weights is in `averaging.py`.
"""

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy, TrainOutput, seed_worker

from bd3lm_hf.checkpoints import NotFiniteError, check_finite_weights
from bd3lm_hf.data.streaming import PackedStream, read_position, write_position
from bd3lm_hf.evaluation.perplexity import (
    HeldOutLoss,
    Perplexity,
    SequenceScore,
    score_sequences,
    sequence_losses,
    summarize,
    summarize_losses,
)
from bd3lm_hf.run_folder import (
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
    warn_if_disk_is_full,
)
from bd3lm_hf.training.arguments import BD3LMTrainingArguments
from bd3lm_hf.training.callbacks import SpeedMeter, peak_flops, training_flops
from bd3lm_hf.training.ema import AveragingTrainer
from bd3lm_hf.training.examples import NOISE, EndlessStream, EpochOrder, EpochSampler, NoiseCollator, PaddingCollator
from bd3lm_hf.training.interval import (
    IntervalSearch,
    check_searchable,
    interval_metrics,
    record_search,
    search_intervals,
)
from bd3lm_hf.training.trainer_state import ResumableFlow, RunningLoss, check_same_run, run_fingerprint
from bd3lm_hf.training.uploads import UploadingTrainer


POSITION_NAME = "stream.npz"  # in a checkpoint: where the stream of training text goes on


class TrainingDivergedError(NotFiniteError):
    """A loss or a gradient is no longer a finite number."""


class BD3LMTrainer(UploadingTrainer, AveragingTrainer):
    """Trainer of language models whose loss is a sum over noisy tokens divided by `num_items_in_batch`.

    Training examples come in a seeded order and carry their noise (see `training/examples.py`), so a run depends on
    the seed and the global batch only. Evaluation scores the held-out sequences with `model.token_nll`, or, where a
    model says `has_likelihood = False`, with its training loss.

    Args:
        bytes_per_token: mean UTF-8 bytes of a token of the held-out text, for bits per byte.
        Everything else is as in transformers' `Trainer`; `args` is a [`BD3LMTrainingArguments`].

    Raises:
        ValueError: the model has no `token_nll` or no `generate`, or holds weights that are not finite.
    """

    args: BD3LMTrainingArguments
    model: Any
    data_collator: Any
    eval_dataset: Any

    def __init__(
        self,
        model: PreTrainedModel | Any = None,
        args: BD3LMTrainingArguments | None = None,
        data_collator: Any = None,
        *arguments: Any,
        bytes_per_token: float | None = None,
        **keywords: Any,
    ) -> None:
        for verb in ("token_nll", "generate"):
            if not hasattr(model, verb):
                raise ValueError(f"a {type(model).__name__} has no `{verb}`: train a language model of this package.")
        check_finite_weights(model, "the model to train")
        if args is not None and args.interval_search:
            check_searchable(model, args.interval_list(model.config.block_size))
        pad_token_id = model.config.pad_token_id
        collator = data_collator or PaddingCollator(0 if pad_token_id is None else pad_token_id)
        super().__init__(model, args, collator, *arguments, **keywords)
        self.bytes_per_token = bytes_per_token
        self.order: EpochOrder | EndlessStream | None = None
        self._stream_folder: str | None = None  # checkpoint that a stream goes on from
        self.speed = SpeedMeter(peak_flops(self.args) * self.args.world_size)
        self.add_callback(self.speed)
        self.add_callback(ResumableFlow())
        self.losses = RunningLoss(self.args.device, self.accelerator.gather)
        self._identity: dict[str, Any] = {}
        self._finite: list[torch.Tensor] = []  # per micro-batch of the current optimizer step
        self._staging = False

    # Examples and their noise

    def get_train_dataloader(self) -> DataLoader:
        """Loader of the training examples in their seeded order, each with its noise."""
        group_size = self.get_total_train_batch_size(self.args)
        sampler: EpochSampler | None = None
        if isinstance(self.train_dataset, PackedStream):
            self.order = self._make_stream(self.train_dataset, group_size)
        else:
            self.order = EpochOrder(self.train_dataset, seed=self._data_seed, group_size=group_size)
            sampler = EpochSampler(self.order)
        config = self.model.config
        collate = NoiseCollator(
            self.data_collator,
            seed=self._data_seed,
            group_size=group_size,
            num_blocks=config.num_blocks,
            length=config.max_position_embeddings,
            draws=self.model.num_noise_samples,
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
            # A loader draws a seed when it begins. A run that goes on begins anew, and must not miss that number.
            loader.base_dataloader.generator = torch.Generator()
        return loader

    def _make_stream(self, sequences: PackedStream, group_size: int) -> EndlessStream:
        """The stream, read by the main process alone, which deals every batch to the others."""
        if self.args.dataloader_num_workers:
            raise ValueError(
                f"--dataloader_num_workers {self.args.dataloader_num_workers}: a stream is read by the main process, "
                "which knows its position for the checkpoint; leave it out."
            )
        stream = EndlessStream(sequences, group_size=group_size)
        if self._stream_folder is not None and self.args.process_index == 0:
            stream.go_on(read_position(Path(self._stream_folder, POSITION_NAME)))
        return stream

    @property
    def _data_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        # DeepSpeed's precision is not for the noise: bfloat16 has 128 numbers in [0.5, 1), and levels would collide.
        noise = {name: inputs[name].to(self.args.device) for name in NOISE if name in inputs}
        return {**super()._prepare_inputs(inputs), **noise}

    # Numbers that are not finite

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
        """One micro-batch, forward and backward; remembers whether its loss is a number."""
        self.speed.tokens += inputs["input_ids"].numel() * self.args.world_size
        self.speed.flops += self.floating_point_ops(inputs) * self.args.world_size
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.losses.add(loss)
        self._finite.append(torch.isfinite(loss).all())
        return loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Operations of the forward and backward pass of one micro-batch; see `training/flops.py`."""
        flops = training_flops(self.model, *inputs["input_ids"].shape)
        return super().floating_point_ops(inputs) if flops is None else flops

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        # The Trainer calls this between clipping and the optimizer's step, so stopping here keeps the weights.
        norm = super()._get_grad_norm(model, grad_norm)
        self._stop_if_not_finite(norm)
        return norm

    def _stop_if_not_finite(self, norm: torch.Tensor | float | None) -> None:
        finite = torch.stack(self._finite)
        self._finite = []
        # Every process takes part and reads the same answer, so all of them stop together.
        finite = self.accelerator.gather(finite).view(self.args.world_size, -1)
        if not bool(finite.all()):
            process, batch = (~finite).nonzero()[0].tolist()
            self._stop("the loss", batch * self.args.world_size + process, 1)
        # With float16 an overflowing gradient is routine: the loss scaler skips that step.
        if norm is not None and not self.args.fp16 and not math.isfinite(float(norm)):
            self._stop("the gradient", 0, finite.numel())

    def _stop(self, what: str, first_batch: int, batches: int) -> None:
        assert self.order is not None
        step = self.state.global_step
        first = step * self.order.group_size + first_batch * self._train_batch_size
        rows = self.order.rows_at(first, batches * self._train_batch_size)
        listed = ", ".join(map(str, rows[:16])) + (", ..." if len(rows) > 16 else "")
        raise TrainingDivergedError(
            f"{what} is NaN or infinite at step {step + 1}, in the batch of training sequences {listed}: training "
            f"stopped before the weights changed. {self._last_good()} Lower --learning_rate (now "
            f"{self.args.learning_rate}), or look at these sequences."
        )

    def _last_good(self) -> str:
        last = last_complete_checkpoint(self.args.output_dir)
        return f"The last good checkpoint is {last}." if last else "No checkpoint had been saved yet."

    # Resuming

    def train(self, resume_from_checkpoint: str | bool | None = None, *arguments: Any, **keywords: Any) -> TrainOutput:
        """Train, from the start or from a complete checkpoint of the same run.

        Args:
            resume_from_checkpoint: a checkpoint folder, or True for the last complete one of `args.output_dir`.

        Raises:
            ValueError: there is no complete checkpoint, or it belongs to another run; the message names what differs.
        """
        self.losses = RunningLoss(self.args.device, self.accelerator.gather)
        self._identity = run_fingerprint(
            self.model,
            self.args,
            self.train_dataset,
            self.processing_class,
            global_batch_size=self.get_total_train_batch_size(self.args),
            data_seed=self._data_seed,
        )
        checkpoint = None
        if resume_from_checkpoint:
            checkpoint = str(checkpoint_to_resume(resume_from_checkpoint, self.args.output_dir))
            seal = read_completion_mark(checkpoint)
            check_same_run(checkpoint, seal, self._identity)
            self.losses.load_state_dict(seal["losses"], self.args.process_index, self.args.world_size)
            self.args.eval_on_start = False  # that was before the checkpoint
        if isinstance(self.train_dataset, PackedStream):
            self._stream_folder = checkpoint
            self.args.ignore_data_skip = True  # a stream goes on at the position that the checkpoint holds
        if self.args.save_strategy != SaveStrategy.NO and self.args.should_save:
            warn_if_disk_is_full(self.args.output_dir, needed=self._checkpoint_bytes)
        return super().train(checkpoint, *arguments, **keywords)

    def _run_epoch(self, *arguments: Any, **keywords: Any) -> None:
        # The Trainer finds out after a step that a run is over; one that resumes at its end must not take one more.
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*arguments, **keywords)
        else:
            self.control.should_training_stop = True

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        check_finite_weights(self.model, str(resume_from_checkpoint))

    # Evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Score held-out sequences with the averaged weights, on all processes; logs nll, perplexity and bits.

        Of a model without a likelihood it logs the loss alone.

        In training, with `args.interval_search`, the interval of noise levels is then searched on the (first) held-out
        set of the run.

        Args:
            eval_dataset: sequences, a mapping of names to sequences, or one such name; `self.eval_dataset` by default.
            ignore_keys: unused, as the model returns no outputs here.

        Raises:
            ValueError: there is nothing to evaluate on.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            dataset = self.eval_dataset[dataset]
        if dataset is None:
            raise ValueError("evaluation needs held-out sequences: pass eval_dataset.")
        if isinstance(dataset, dict):
            metrics: dict[str, float] = {}
            for name, part in dataset.items():
                metrics |= self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}")
            return metrics
        with self.averaged_weights():
            return self._evaluate_on(dataset, metric_key_prefix)

    def _evaluate_on(self, dataset: Any, prefix: str) -> dict[str, float]:
        result = self.score(dataset)
        if self.args.interval_search and self.is_in_train and dataset is self._interval_dataset():
            self.search_interval(dataset)
        metrics = {f"{prefix}_{name}": value for name, value in _metrics(result).items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def score(self, sequences: Any, *, estimator: str | None = None) -> Perplexity | HeldOutLoss:
        """Perplexity of `sequences` under the averaged weights, shared among all processes; each gets the result.

        Of a model without a likelihood it is the loss.

        Args:
            estimator: as in `token_nll`; `args.eval_estimator` by default. A loss has none.
        """
        args = self.args
        started = SpeedMeter.now()
        shared: dict[str, Any] = {
            "indices": range(args.process_index, len(sequences), args.world_size),
            "num_samples": args.eval_num_samples,
            "batch_size": args.eval_batch_size,
            "seed": self._data_seed,
            "progress": self.is_world_process_zero() and not args.disable_tqdm,
        }
        with self.averaged_weights() as model, self.accelerator.autocast():
            likely = model.has_likelihood
            if likely:
                scores = score_sequences(model, sequences, estimator=estimator or args.eval_estimator, **shared)
            else:
                scores = sequence_losses(model, sequences, **shared)
        scores = [SequenceScore(*score) for score in gather_object(scores)] if args.world_size > 1 else scores
        seconds = SpeedMeter.now() - started
        if not likely:
            return summarize_losses(scores, seconds=seconds)
        return summarize(scores, bytes_per_token=self.bytes_per_token, seconds=seconds)

    def _interval_dataset(self) -> Any:
        several = isinstance(self.eval_dataset, dict)
        return next(iter(self.eval_dataset.values())) if several else self.eval_dataset

    def search_interval(self, sequences: Any) -> IntervalSearch:
        """Choose the interval of noise levels by the losses of `sequences`; every process adopts and gets the same.

        The losses are those of the averaged weights, as published; the trained model adopts the interval.
        Logs the winner and its variance, and writes every candidate's to the output folder. A batch of the statistic
        is one evaluation batch of all processes together. With `args.interval_search_fixed` the model keeps its own.
        """
        args = self.args
        with self.averaged_weights() as model, self.accelerator.autocast():
            found = search_intervals(
                model,
                sequences,
                candidates=args.interval_list(model.config.block_size),
                method=args.interval_search_method,
                batch_size=args.eval_batch_size * args.world_size,
                max_batches=args.interval_search_batches,
                seed=self._data_seed,
                share=(args.process_index, args.world_size),
            )
        if not args.interval_search_fixed:
            self.accelerator.unwrap_model(self.model, keep_torch_compile=False).set_interval(*found.interval)
        self.log(interval_metrics(found))
        if self.is_world_process_zero():
            record_search(found, args.output_dir, step=self.state.global_step, adopted=not args.interval_search_fixed)
        return found

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the training speed since the last log, and with losses that resuming does not change."""
        if "loss" in logs:
            logs["loss"] = self.losses.mean_since_last_log(self.state.global_step)
            logs |= self.speed.since_last_log()
        if "train_loss" in logs:
            logs["train_loss"] = self.losses.mean_of_run(self.state.global_step)
        if isinstance(self.order, EndlessStream):
            # The Trainer counts from where the run went on. A stream has no epochs it could know of.
            self.state.epoch = self.state.global_step / self.state.max_steps
        super().log(logs, start_time)

    # Saving

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save model, code, tokenizer and generation config; old files stay until the new ones are complete.

        These are the averaged weights, a checkpoint's (`_internal_call`) the raw ones; `weights.json` says which.
        """
        if _internal_call:
            check_finite_weights(self.model, f"the model after step {self.state.global_step}")
            self.save_raw_weights(str(output_dir))
            return
        self.write_model(output_dir or self.args.output_dir)
        if self.args.push_to_hub:
            self.upload_model("Model save")

    def write_model(self, folder: str | Path) -> None:
        """As [`save_model`], without an upload."""
        check_finite_weights(self.model, f"the model after step {self.state.global_step}")
        target = Path(folder)
        staging = staging_folder(target) / "model"
        with saving("the model", target, needed=self._checkpoint_bytes):
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
        with saving(target.name, folder, needed=self._checkpoint_bytes):
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
                resumable = not self.args.save_only_model
                mark_complete(staged, {**self._identity, "losses": losses, "resumable": resumable})
                publish_folder(staged, target)
                keep = {str(target), str(self.state.best_model_checkpoint)}
                remove_old_checkpoints(folder, limit=self.args.save_total_limit, keep=keep)
                clear_staging(folder)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(target))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # The Trainer would send the staging folder, which is gone before the upload is done.
        if not self._staging:
            super()._push_from_checkpoint(checkpoint_folder)

    def _empty_staging(self, folder: Path) -> None:
        # What a killed run left there must not get into this one's files.
        if self.args.should_save:
            clear_staging(folder)
        self.accelerator.wait_for_everyone()

    @property
    def _checkpoint_bytes(self) -> int:
        """About what a checkpoint takes: the weights, and float32 moments and averages of those that are trained."""
        weights = sum(parameter.numel() * parameter.element_size() for parameter in self.model.parameters())
        trained = sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)
        return weights + (8 if self.averaging is None else 12) * trained


def _metrics(result: Perplexity | HeldOutLoss) -> dict[str, float]:
    """What is logged of an evaluation."""
    measured = {"standard_error": result.standard_error, "runtime": result.seconds}
    if isinstance(result, HeldOutLoss):
        return {"loss": result.loss, **measured}
    bits = {} if result.bits_per_byte is None else {"bits_per_byte": result.bits_per_byte}
    return {"loss": result.nll, "nll": result.nll, "ppl": result.perplexity, **measured, **bits}


__all__ = ["BD3LMTrainer", "TrainingDivergedError"]
