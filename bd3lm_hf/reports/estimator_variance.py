"""Variance of estimates of the likelihood for their time: the standard error over noise seeds, on the same text.

A mean over k estimates has a k-th of the variance and costs k times the seconds. So variance times seconds compares
estimators at equal cost, and its root is the standard error that one second buys.
"""

import math
import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from bd3lm_hf.checkpoints import load_model
from bd3lm_hf.data import load_text, pack
from bd3lm_hf.evaluation.perplexity import check_estimator, perplexity
from bd3lm_hf.tokenization import check_tokenizer_fits, load_tokenizer


class Setting(NamedTuple):
    """An estimator and its number of noise samples."""

    estimator: str
    num_samples: int = 1

    def __str__(self) -> str:
        return self.estimator if self.num_samples == 1 else f"{self.estimator}, {self.num_samples} noise samples"


class EstimatorVariance(NamedTuple):
    """Spread of the mean NLL of a text under one setting."""

    setting: Setting
    nll: float  # mean over seeds, nats per token
    deviation: float  # over seeds, nats per token; the standard error of one estimate
    seconds: float  # of one estimate, median; CPU time on a CPU
    num_seeds: int

    @property
    def error_of_a_second(self) -> float:
        """Standard error of the mean of as many estimates as fit into a second."""
        return self.deviation * math.sqrt(self.seconds)


def estimator_variance(
    model: Any, sequences: Sequence[Any], settings: Sequence[Setting], *, num_seeds: int, batch_size: int = 8
) -> list[EstimatorVariance]:
    """Score the sequences with each setting and `num_seeds` seeds, in turn.

    Raises:
        ValueError: if there are fewer than 2 seeds, or the model does not have an estimator.
    """
    if num_seeds < 2:
        raise ValueError(f"{num_seeds} seeds have no standard error: give at least 2.")
    for setting in settings:
        check_estimator(model, *setting)
    clock = time.process_time if model.device.type == "cpu" else time.perf_counter
    found: list[list[float]] = [[] for _ in settings]
    seconds: list[list[float]] = [[] for _ in settings]
    for seed in range(num_seeds):
        for index, (estimator, num_samples) in enumerate(settings):
            started = clock()
            result = perplexity(
                model, sequences, estimator=estimator, num_samples=num_samples, batch_size=batch_size, seed=seed
            )
            seconds[index].append(clock() - started)
            found[index].append(result.nll)
    return [
        EstimatorVariance(setting, statistics.mean(nlls), statistics.stdev(nlls), statistics.median(spent), num_seeds)
        for setting, nlls, spent in zip(settings, found, seconds, strict=True)
    ]


def variance_table(results: Sequence[EstimatorVariance]) -> str:
    """Return a markdown table; variance at equal cost is relative to the first line."""
    first = results[0]
    lines = [
        "| estimator | nats per token | standard error | seconds | standard error of one second | variance x time |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        cost = (result.error_of_a_second / first.error_of_a_second) ** 2 if first.deviation else math.nan
        lines.append(
            f"| {result.setting} | {result.nll:.4f} | {result.deviation:.4f} | {result.seconds:.3f} | "
            f"{result.error_of_a_second:.4f} | {cost:.3f} |"
        )
    return "\n".join(lines)


def read_estimator(text: str) -> Setting:
    """Return the setting that a text means: `"stratified:4"` has four noise samples.

    Raises:
        ValueError: if the colon is not followed by an integer >= 1.
    """
    estimator, colon, number = text.partition(":")
    if not colon:
        return Setting(estimator)
    if not number.isdecimal() or int(number) < 1:
        raise ValueError(f"--estimators {text}: expected an integer >= 1 after the colon.")
    return Setting(estimator, int(number))


def measure_variance(
    folder: str, dataset: str, settings: Sequence[str], *, batch_size: int, batches: int, repeats: int
) -> list[EstimatorVariance]:
    """Measure estimates of a checkpoint's likelihood on held-out sequences, spread over a dataset.

    Raises:
        ValueError: if checkpoint, tokenizer, dataset or an estimator cannot be used, or a number is below 1.
    """
    if min(batch_size, batches) < 1:
        raise ValueError(f"--batch-size {batch_size} --batches {batches}: give at least 1 of each.")
    wanted = [read_estimator(text) for text in settings]
    model, tokenizer = load_model(folder).eval(), load_tokenizer(folder)
    check_tokenizer_fits(tokenizer, model.config)
    rows = pack(load_text(dataset, split="validation"), tokenizer, length=model.config.model_length, drop_last=True)
    count = batch_size * batches
    if len(rows) < count:
        raise ValueError(f"{dataset} has {len(rows)} held-out sequences, fewer than {count}: give fewer batches.")
    chosen = [rows[index * len(rows) // count] for index in range(count)]
    return estimator_variance(model, chosen, wanted, num_seeds=repeats, batch_size=batch_size)
