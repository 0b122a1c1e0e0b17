"""`AveragingTrainer`: which weights a run evaluates and saves. The average or the raw ones, whole if they are sharded.

Evaluation, text samples and the saved model use the average; a checkpoint holds the raw weights and the average beside
them, so that training goes on exactly. `weights.json` in every saved folder says which weights lie there.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.utils import logging

from bd3lm_hf.training.arguments import BD3LMTrainingArguments
from bd3lm_hf.training.ema import EMA_NAME, WEIGHTS_NAME, AverageCallback, WeightAverage, describe_weights
from bd3lm_hf.training.sharding import has_shards, prepare_fsdp, whole_model


logger = logging.get_logger("bd3lm_hf.train")


class AveragingTrainer(Trainer):
    """transformers' Trainer with an average of the weights, under DDP, FSDP2 and DeepSpeed ZeRO-2 as well.

    Args:
        As in transformers' `Trainer`; `args` is a [`BD3LMTrainingArguments`], of which `ema_decay` and `ema_warmup`
        are read here.
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
        """As in transformers; refuses ways of sharding that would fail later, and keeps noise in float32."""
        super().create_accelerator_and_postprocess()
        if self.is_fsdp_enabled:
            prepare_fsdp(self.accelerator.state.fsdp_plugin)
        stage = self.accelerator.state.deepspeed_plugin.zero_stage if self.is_deepspeed_enabled else 0
        if stage == 3 and self.args.ema_decay:
            raise ValueError(
                f"--ema_decay {self.args.ema_decay} is not kept under DeepSpeed ZeRO-3, whose weights lie outside of "
                f"torch's parameters: use FSDP2 (training/launch/fsdp2.yaml) or ZeRO-2, or pass --ema_decay 0."
            )

    @property
    def average(self) -> WeightAverage | None:
        """The average of the weights, once training has begun; None without `ema_decay`."""
        return None if self.averaging is None else self.averaging.average

    @contextmanager
    def averaged_weights(self) -> Iterator[Any]:
        """Use the averaged weights; yields the model to evaluate, and puts the raw weights back whatever happens.

        It is the trained model itself, or with sharded weights a whole copy, which every process may use without the
        others. Without an average the weights are the raw ones. All processes enter together.
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
            # Callbacks get the weights that are evaluated.
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
            logger.warning(f"{checkpoint} holds averaged weights, which this run drops: it has no --ema_decay.")

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.average is not None and self.state.best_model_checkpoint is not None:
            self.average.load(self.state.best_model_checkpoint)

    def save_raw_weights(self, folder: str) -> None:
        """Write the model with the weights that training goes on from, and the average beside it."""
        self._save_weights(folder, None)
        if self.average is not None:
            self.average.save(folder, write=self.args.should_save)

    def save_averaged_weights(self, folder: str) -> None:
        """Write the model with the averaged weights; the raw ones if there is no average."""
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
            content = describe_weights(average, self.state.global_step)
            Path(folder, WEIGHTS_NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


__all__ = ["AveragingTrainer"]
