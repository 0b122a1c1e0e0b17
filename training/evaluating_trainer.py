"""`EvaluatingTrainer`: evaluation by likelihood instead of logits, with noise that depends on the sequence alone.

Held-out sequences are scored with `model.token_nll` and the same noise each time, so evaluations can be compared to
find the best checkpoint. `compute_metrics` and `predict` receive the NLL of every token and the mask of scored tokens.
"""

import time
from typing import Any

import numpy
import torch
from accelerate.utils import gather_object
from transformers.trainer_utils import EvalPrediction, IntervalStrategy, PredictionOutput

from bd3lm_hf.evaluation.perplexity import (
    HeldOutLoss,
    Perplexity,
    SequenceScore,
    TokenScores,
    score_sequences,
    score_tokens,
    sequence_losses,
    summarize,
    summarize_losses,
)
from bd3lm_hf.training.ema import AveragingTrainer
from bd3lm_hf.training.interval import IntervalSearch, interval_metrics, record_search, search_intervals


class EvaluatingTrainer(AveragingTrainer):
    """A Trainer that evaluates by likelihood, or by loss if the model has no likelihood (`has_likelihood = False`).

    Args:
        bytes_per_token: mean UTF-8 bytes per token of the held-out text, for bits per byte.

    Raises:
        ValueError: if `compute_metrics` is given for a model without a likelihood, or `preprocess_logits_for_metrics`
            is given.
    """

    data_seed: int
    eval_dataset: Any

    def __init__(
        self, model: Any = None, *arguments: Any, bytes_per_token: float | None = None, **keywords: Any
    ) -> None:
        if keywords.get("preprocess_logits_for_metrics") is not None:
            raise ValueError(
                "preprocess_logits_for_metrics gets no logits here: compute_metrics receives the NLL of every token "
                "and the mask of scored tokens. Leave it out."
            )
        if keywords.get("compute_metrics") is not None and not model.has_likelihood:
            raise ValueError(f"compute_metrics needs the NLL of tokens, which a {type(model).__name__} does not have.")
        super().__init__(model, *arguments, **keywords)
        self.bytes_per_token = bytes_per_token

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Score held-out sequences with the averaged weights, on all processes; log nll, perplexity and bits.

        For a model without a likelihood only the loss is logged. With `compute_metrics`, its metrics are logged too.

        During training, `args.interval_search` then searches the interval of noise levels on the (first) held-out set
        of the run.

        Args:
            eval_dataset: sequences, a mapping of names to sequences, or one such name; `self.eval_dataset` by default.
            ignore_keys: unused, as the model returns no outputs here.

        Raises:
            ValueError: if there is nothing to evaluate on.
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
            with_tokens = self.compute_metrics is not None
            metrics = self._measure(dataset, metric_key_prefix, with_tokens=with_tokens).metrics or {}
            if self.args.interval_search and self.is_in_train and dataset is self._first_eval_dataset():
                self.search_interval(dataset)
            self.log(metrics)
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def predict(
        self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """Score sequences token by token with the averaged weights, on all processes.

        Returns:
            `predictions` is the pair (NLL in nats, mask of scored tokens), both `(sequences, length)` and padded on
            the right; `label_ids` has the labels, -100 where nothing is scored; `metrics` as in [`evaluate`].
        """
        with self.averaged_weights():
            output = self._measure(test_dataset, metric_key_prefix, with_tokens=True)
        self.control = self.callback_handler.on_predict(self.args, self.state, self.control, output.metrics)
        return output

    def _measure(self, dataset: Any, prefix: str, *, with_tokens: bool) -> PredictionOutput:
        started = time.perf_counter()
        predictions: Any = None
        labels: Any = None
        if with_tokens:
            tokens = self._shared(score_tokens, dataset, estimator=self.args.eval_estimator)
            # Scored from the tokens that compute_metrics receives, so that both describe the same forward passes.
            scores = [SequenceScore(t.index, sum(t.nll), len(t.nll) - t.labels.count(-100)) for t in tokens]
            result: Any = self._summarize(scores, time.perf_counter() - started)
            predictions, labels = _stack(tokens)
        else:
            result = self.score(dataset)
        metrics = _metrics(result)
        if self.compute_metrics is not None and predictions is not None:
            metrics |= self.compute_metrics(EvalPrediction(predictions=predictions, label_ids=labels))
        named = {
            name if name.startswith(f"{prefix}_") else f"{prefix}_{name}": value for name, value in metrics.items()
        }
        return PredictionOutput(predictions, labels, named)

    def score(self, sequences: Any, *, estimator: str | None = None, indices: Any = None) -> Perplexity | HeldOutLoss:
        """Return the perplexity of `sequences` under the averaged weights; processes share the work and the result.

        For a model without a likelihood, return the loss.

        Args:
            estimator: as in `token_nll`; `args.eval_estimator` by default. Unused for a loss.
            indices: score these sequences only. The noise of a sequence depends on its index, not on the others.
        """
        started = time.perf_counter()
        if self.model.has_likelihood:
            estimator = estimator or self.args.eval_estimator
            scores = self._shared(score_sequences, sequences, indices=indices, estimator=estimator)
        else:
            scores = self._shared(sequence_losses, sequences, indices=indices)
        return self._summarize([SequenceScore(*score) for score in scores], time.perf_counter() - started)

    def check_estimator(self, name: str) -> None:
        """Score one held-out sequence per process, so that an estimator that does not fit fails before training.

        Args:
            name: the training argument that names the estimator.

        Raises:
            ValueError: if the estimator does not fit the model.
        """
        dataset, estimator = self._first_eval_dataset(), getattr(self.args, name)
        if not self.model.has_likelihood:
            return
        indices = range(min(self.args.world_size, len(dataset)))
        try:
            # Not summarized: these sequences may have no scored token.
            self._shared(score_sequences, dataset, indices=indices, estimator=estimator)
        except ValueError as error:
            raise ValueError(f"--{name} {estimator} does not fit: {error}") from error

    def check_evaluation(self) -> None:
        """Check the estimator and `metric_for_best_model` before training; both are first used after many steps.

        Raises:
            ValueError: if the estimator does not fit the model, or evaluation has no such metric.
        """
        args = self.args
        if args.eval_strategy == IntervalStrategy.NO or self.eval_dataset is None:
            return
        self.check_estimator("eval_estimator")
        if type(self).evaluate is not EvaluatingTrainer.evaluate:
            return  # a subclass may have metrics of its own
        metrics = list(_metrics(self._summarize([SequenceScore(0, 0.0, 1)], 0.0)))
        if isinstance(self.eval_dataset, dict):
            metrics = [f"{part}_{name}" for part in self.eval_dataset for name in metrics]
        chosen = args.metric_for_best_model
        if chosen and self.compute_metrics is None and chosen.removeprefix("eval_") not in metrics:
            raise ValueError(f"--metric_for_best_model {chosen}: choose one of {', '.join(metrics)}.")

    def _shared(self, measure: Any, sequences: Any, *, indices: Any = None, **options: Any) -> list[Any]:
        """Measure some sequences (by default all) on all processes together; every process gets all scores."""
        args = self.args
        indices = range(len(sequences)) if indices is None else indices
        options |= {
            # Every world_size-th sequence, so that processes have equal work even if lengths are sorted.
            "indices": indices[args.process_index :: args.world_size],
            "num_samples": args.eval_num_samples,
            "batch_size": args.eval_batch_size,
            "seed": self.data_seed,
            "progress": self.is_world_process_zero() and not args.disable_tqdm,
        }
        with self.averaged_weights() as model, self.accelerator.autocast():
            scores = measure(model, sequences, **options)
        # Sorted by index, so that sums do not depend on the number of processes.
        return sorted(gather_object(scores)) if args.world_size > 1 else scores

    def _summarize(self, scores: list[SequenceScore], seconds: float) -> Perplexity | HeldOutLoss:
        if not self.model.has_likelihood:
            return summarize_losses(scores, seconds=seconds)
        return summarize(scores, bytes_per_token=self.bytes_per_token, seconds=seconds)

    def _first_eval_dataset(self) -> Any:
        several = isinstance(self.eval_dataset, dict)
        return next(iter(self.eval_dataset.values())) if several else self.eval_dataset

    def search_interval(self, sequences: Any) -> IntervalSearch:
        """Choose the interval of noise levels by the losses of `sequences`; every process adopts and returns the same.

        The losses are those of the averaged weights, as published; the trained model adopts the interval, unless
        `args.interval_search_fixed` is set. The winner and its variance are logged, and every candidate's variance is
        written to the output folder. A batch of the statistic is one evaluation batch of all processes together.
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
                seed=self.data_seed,
                share=(args.process_index, args.world_size),
            )
        if not args.interval_search_fixed:
            trained = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
            if args.torch_compile and trained.interval() != found.interval:
                # The interval is part of the compiled code, and torch gives up after 8 versions of it.
                torch.compiler.reset()
            trained.set_interval(*found.interval)
        self.log(interval_metrics(found))
        if self.is_world_process_zero():
            record_search(found, args.output_dir, step=self.state.global_step, adopted=not args.interval_search_fixed)
        return found


def _stack(tokens: list[TokenScores]) -> tuple[tuple[Any, Any], Any]:
    """Return NLL and mask, and the labels, as arrays `(sequences, longest)`, padded on the right."""
    width = max((len(t.nll) for t in tokens), default=0)
    nll = numpy.array([t.nll + [0.0] * (width - len(t.nll)) for t in tokens], dtype=numpy.float32)
    labels = numpy.array([t.labels + [-100] * (width - len(t.nll)) for t in tokens], dtype=numpy.int64)
    return (nll, labels != -100), labels


def _metrics(result: Perplexity | HeldOutLoss) -> dict[str, float]:
    """Return the logged numbers of an evaluation."""
    measured = {"standard_error": result.standard_error, "runtime": result.seconds}
    if isinstance(result, HeldOutLoss):
        return {"loss": result.loss, **measured}
    bits = {} if result.bits_per_byte is None else {"bits_per_byte": result.bits_per_byte}
    return {"loss": result.nll, "nll": result.nll, "ppl": result.perplexity, **measured, **bits}
