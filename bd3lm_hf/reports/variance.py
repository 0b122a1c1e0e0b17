"""Variance against time, for likelihood estimates and for the gradient of a training step.

A mean over k estimates or steps has 1/k of the variance and takes k times as long. So variance times seconds compares
methods at equal cost, and its root is the standard error that one second buys.

A gradient has two sources of randomness: the text of its batch and the noise on that text. More noise samples for each
clean pass reduce only the second.
"""

import math
import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from bd3lm_hf.checkpoints import load_model
from bd3lm_hf.data import load_text, pack
from bd3lm_hf.data.packing import evenly_spaced
from bd3lm_hf.evaluation.perplexity import check_estimator, perplexity
from bd3lm_hf.modeling.noise_bd3lm import draw_noise
from bd3lm_hf.printing import markdown_table
from bd3lm_hf.tokenization import check_tokenizer_fits, load_tokenizer


# Estimates of the likelihood


class Setting(NamedTuple):
    """An estimator and its number of noise samples."""

    estimator: str
    num_samples: int = 1

    def __str__(self) -> str:
        return self.estimator if self.num_samples == 1 else f"{self.estimator}, {self.num_samples} noise samples"


class EstimatorVariance(NamedTuple):
    """The spread of the mean NLL under one setting."""

    setting: Setting
    nll: float  # mean over seeds, nats per token
    deviation: float  # over seeds, nats per token; the standard error of one estimate
    seconds: float  # per estimate, median; CPU time on a CPU
    num_seeds: int

    @property
    def error_of_a_second(self) -> float:
        """Standard error of a mean of as many estimates as fit into one second."""
        return self.deviation * math.sqrt(self.seconds)


def estimator_variance(
    model: Any, sequences: Sequence[Any], settings: Sequence[Setting], *, num_seeds: int, batch_size: int = 8
) -> list[EstimatorVariance]:
    """Score the sequences with each setting and `num_seeds` seeds, in turn.

    Raises:
        ValueError: if there are fewer than 2 seeds, or the model does not have an estimator.
    """
    if num_seeds < 2:
        raise ValueError(f"{num_seeds} seeds give no standard error: use at least 2.")
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
    head = ("estimator", "nats per token", "standard error", "seconds", "standard error of one second")
    rows = []
    for result in results:
        cost = (result.error_of_a_second / first.error_of_a_second) ** 2 if first.deviation else math.nan
        cells = [f"{result.nll:.4f}", f"{result.deviation:.4f}", f"{result.seconds:.3f}"]
        rows.append([str(result.setting), *cells, f"{result.error_of_a_second:.4f}", f"{cost:.3f}"])
    return markdown_table([*head, "variance x time"], rows)


def read_estimator(text: str) -> Setting:
    """Parse a setting: `"stratified:4"` has four noise samples.

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
    """Measure estimates of a checkpoint's likelihood on held-out sequences, spread over a dataset."""
    if min(batch_size, batches) < 1:
        raise ValueError(f"--batch-size {batch_size} --batches {batches}: give at least 1 of each.")
    parsed = [read_estimator(text) for text in settings]
    model, tokenizer = _load(folder)
    rows = pack(load_text(dataset, split="validation"), tokenizer, length=model.config.model_length, drop_last=True)
    count = batch_size * batches
    if len(rows) < count:
        raise ValueError(f"{dataset} has {len(rows)} held-out sequences, fewer than {count}: give fewer batches.")
    chosen = list(evenly_spaced(rows, count))
    return estimator_variance(model.eval(), chosen, parsed, num_seeds=repeats, batch_size=batch_size)


def _load(folder: str) -> tuple[Any, PreTrainedTokenizerBase]:
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    check_tokenizer_fits(tokenizer, model.config)
    return model, tokenizer


# The gradient of a training step


class GradientVariance(NamedTuple):
    """Traces of the gradient's covariance for one number of noise samples."""

    draws: int  # noise samples per clean pass
    seconds: float  # per step, forward and backward; median
    time_ratio: float  # relative to the first number of noise samples; median over steps taken in turn
    noise: float  # over the noise, at a fixed batch
    noise_error: float  # its standard error, over batches
    data: float  # over batches, of the gradient averaged over all noise; the same for every number of noise samples


def gradient_variance(
    model: Any, batches: Sequence[torch.Tensor], draws: Sequence[int], *, repeats: int
) -> list[GradientVariance]:
    """Measure each batch `repeats` times for each number of noise samples, in turn.

    Analysis of variance: the variance within batches is that of the noise; the variance of the batches' means is that
    of the data plus 1 / repeats of the noise's. Dropout, if the model has any, counts as noise.

    Args:
        model: a trained one; a fresh model's head is zero, so no gradient passes through it.
        batches: token ids `(batch, length)`, at least 2.
        repeats: noise seeds per batch, at least 2.

    Raises:
        ValueError: if there are fewer than 2 batches or repeats.
    """
    if len(batches) < 2 or repeats < 2:
        raise ValueError(f"{len(batches)} batches of {repeats} noise seeds have no variance: use at least 2 of each.")
    model.train()
    generator = torch.Generator().manual_seed(0)
    warm_up = _gradient(model, batches[0], max(draws), generator)  # not timed
    total = warm_up.new_zeros(len(draws), len(warm_up))
    seconds: list[list[float]] = [[] for _ in draws]
    within: list[list[float]] = [[] for _ in draws]  # per batch, unbiased
    between = [0.0] * len(draws)  # sum over batches of |sum of gradients|^2
    for ids in batches:
        of_batch, squares = torch.zeros_like(total), [0.0] * len(draws)
        for _ in range(repeats):
            for index, count in enumerate(draws):
                started = time.perf_counter()
                gradient = _gradient(model, ids, count, generator)
                seconds[index].append(time.perf_counter() - started)
                of_batch[index] += gradient
                squares[index] += _square(gradient)
        for index, square in enumerate(squares):
            within[index].append((square - _square(of_batch[index]) / repeats) / (repeats - 1))
            between[index] += _square(of_batch[index])
        total += of_batch
    noise = list(map(statistics.mean, within))
    spread = [own - _square(vector) / len(batches) for own, vector in zip(between, total, strict=True)]
    of_means = [own / (len(batches) - 1) / repeats**2 for own in spread]
    data = statistics.mean(mean - of_noise / repeats for mean, of_noise in zip(of_means, noise, strict=True))
    return [
        GradientVariance(
            count,
            statistics.median(seconds[index]),
            statistics.median(mine / first for mine, first in zip(seconds[index], seconds[0], strict=True)),
            noise[index],
            statistics.stdev(within[index]) / len(batches) ** 0.5,
            data,
        )
        for index, count in enumerate(draws)
    ]


def _gradient(model: Any, ids: torch.Tensor, draws: int, generator: torch.Generator) -> torch.Tensor:
    """Return the gradient of one training step as one vector over all parameters."""
    batch, length = ids.shape
    noise = draw_noise(batch, model.config.num_blocks(length), length, num_noise_samples=draws, generator=generator)
    model.zero_grad(set_to_none=True)
    model(input_ids=ids, labels=ids, **noise._asdict()).loss.backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])
    model.zero_grad(set_to_none=True)
    return gradient


def _square(vector: torch.Tensor) -> float:
    return float(vector.double().square().sum())


def gradient_batches(dataset: str, tokenizer: Any, *, length: int, size: int, count: int) -> list[torch.Tensor]:
    """Return `count` batches `(size, length)` of training text, spread over the dataset.

    Raises:
        ValueError: if the text is too short.
    """
    whole = pack(load_text(dataset, split="train"), tokenizer, length=length, drop_last=True)["input_ids"]
    if len(whole) < size * count:
        raise ValueError(
            f"{dataset} has {len(whole)} sequences of {length} tokens, too few for {count} batches of {size}: give "
            f"fewer or smaller batches, or more text."
        )
    step = len(whole) // (size * count)
    chosen = torch.tensor(whole[: step * size * count : step])
    # Neighbouring sequences are similar: put them into different batches.
    return list(chosen.view(size, count, length).unbind(1))


def gradient_table(results: Sequence[GradientVariance]) -> str:
    """Return a markdown table; variance times time is relative to the first line."""
    first = results[0]
    head = ("draws", "s/step", "time", "noise variance", "data variance")
    rows = []
    for result in results:
        noise = result.noise / first.noise
        total = (result.noise + result.data) / (first.noise + first.data)
        costs = [f"{variance * result.time_ratio:.2f}" for variance in (noise, total)]
        spread = f"{result.noise:.4g} +- {result.noise_error:.2g}"
        times = [f"{result.seconds:.3f}", f"{result.time_ratio:.2f}"]
        rows.append([str(result.draws), *times, spread, f"{result.data:.4g}", *costs])
    return markdown_table([*head, "noise variance x time", "total variance x time"], rows)


def measure_gradients(
    folder: str, dataset: str, draws: Sequence[int], *, batch_size: int, batches: int, repeats: int
) -> list[GradientVariance]:
    """Measure the variance of a checkpoint's gradient on a dataset."""
    if min(*draws, batch_size) < 1:
        raise ValueError(f"--noise-draws {' '.join(map(str, draws))} --batch-size {batch_size}: give at least 1.")
    model, tokenizer = _load(folder)
    length = model.config.model_length
    texts = gradient_batches(dataset, tokenizer, length=length, size=batch_size, count=batches)
    return gradient_variance(model, texts, draws, repeats=repeats)
