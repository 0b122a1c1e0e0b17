"""`bd3lm bench`: speed and memory of block diffusion next to a named rival, in one run.

The rival is transformers' GPT-2 with its 124 M parameters; ours has the same width and depth, 170 M with its head.
With `--decoder qwen3` the rival is the stock decoder, and ours is block diffusion on it. Absolute times drift with the
machine, so both are timed in turn, and the figure to quote is the median of the pairwise ratios. Peak memory is
measured in a fresh process that does nothing else.

`--estimators published stratified:4 exact --model M` instead measures the variance of likelihood estimates,
`--noise-draws 1 2 4 --model M` that of the gradient of a training step. A mean over k estimates or steps has 1/k of
the variance and takes k times as long. So variance times seconds compares methods at equal cost, and its root is the
standard error that one second buys. A gradient has two sources of randomness: the text of its batch and the noise on
that text. More noise samples for each clean pass reduce only the second.
"""

import argparse
import functools
import itertools
import math
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from bd3lm_hf.console import load_model_and_tokenizer, markdown_table
from bd3lm_hf.evaluation.perplexity import check_estimator, perplexity
from bd3lm_hf.modeling.configuration_bd3lm import BD3LMConfig
from bd3lm_hf.modeling.modeling_bd3lm import BD3LMForMaskedLM
from bd3lm_hf.modeling.modeling_bd3lm_decoders import DECODERS
from bd3lm_hf.modeling.noise_bd3lm import draw_noise
from bd3lm_hf.reports.speed_quality import text_sequences


VOCAB_SIZE = 50258
DECODER_VOCAB_SIZE = 50304
BATCH_SIZE = 2


class TimedPair(NamedTuple):
    """Our time relative to the rival's."""

    ours: float  # seconds, median
    rival: float  # seconds, median
    ratio: float  # median of the pairwise ratios
    spread: tuple[float, float]  # smallest and largest ratio


def build(name: str) -> PreTrainedModel:
    """Return a random model: `"bd3lm"`, a decoder (`"gpt2"`, `"qwen3"`) or block diffusion on one (`"bd3lm_qwen3"`).

    All have 12 layers of width 768 and no dropout, so they do the same work.
    """
    torch.manual_seed(0)
    if name == "bd3lm":
        model = BD3LMForMaskedLM(BD3LMConfig(vocab_size=VOCAB_SIZE, block_size=4, dropout=0.0))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0.0, 0.02)  # a fresh model's zeros would make some products cheaper
        return model
    family = name.removeprefix("bd3lm_")
    if family not in DECODERS:
        raise ValueError(f"no model called {name!r} to measure: choose bd3lm or one of {', '.join(DECODERS)}.")
    model_class = DECODERS[family] if name != family else DECODERS[family].__bases__[-1]
    fields: dict[str, Any] = {"vocab_size": VOCAB_SIZE if name == "gpt2" else DECODER_VOCAB_SIZE}
    fields |= {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    sizes: dict[str, Any] = {"hidden_size": 768, "intermediate_size": 3072, "head_dim": 64}
    sizes |= dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), 12)
    sizes |= dict.fromkeys(("max_position_embeddings", "n_positions"), 2048)  # a prompt and 1,024 new tokens
    sizes |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    fields |= {field: value for field, value in sizes.items() if hasattr(model_class.config_class, field)}
    return model_class(model_class.config_class(**fields))


def training_step(model: PreTrainedModel, length: int) -> None:
    """Run the forward and backward pass over a batch of two texts."""
    model.train()
    tokens = torch.randint(0, VOCAB_SIZE - 1, (BATCH_SIZE, length), generator=torch.Generator().manual_seed(0))
    model(input_ids=tokens, labels=tokens).loss.backward()
    model.zero_grad(set_to_none=True)


def generation(model: Any, new_tokens: int, batch_size: int = 1) -> None:
    """Sample texts of exactly `new_tokens` tokens after a prompt of one block; both models use a cache."""
    model.eval()
    prompt = torch.arange(1, 5).expand(batch_size, -1)
    texts = model.generate(prompt, max_new_tokens=new_tokens, do_sample=True, top_k=0)
    assert texts.shape == (batch_size, 4 + new_tokens)


def compare_times(ours: Callable[[], None], rival: Callable[[], None], repeats: int) -> TimedPair:
    """Time two tasks in turn, after one warm-up round."""
    times: list[tuple[float, float]] = []
    for _ in range(repeats + 1):
        pair = []
        for task in (rival, ours):
            started = time.perf_counter()
            task()
            pair.append(time.perf_counter() - started)
        times.append((pair[1], pair[0]))
    times = times[1:]
    ratios = [mine / theirs for mine, theirs in times]
    return TimedPair(
        statistics.median(mine for mine, _ in times),
        statistics.median(theirs for _, theirs in times),
        statistics.median(ratios),
        (min(ratios), max(ratios)),
    )


def peak_memory(name: str, length: int) -> float:
    """Return the peak resident memory, in GB (10^9 bytes), of a fresh process that takes two training steps."""
    code = (
        f"import torch; torch.set_num_threads({torch.get_num_threads()}); "
        "from bd3lm_hf.reports import benchmark as b; "
        f"m = b.build({name!r}); [b.training_step(m, {length}) for _ in range(2)]; print(b.peak_of_process())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def peak_of_process() -> float:
    """Return the peak resident memory of this process in GB."""
    status = Path("/proc/self/status")
    if status.is_file():
        # getrusage would include the parent's peak, which a child inherits on Linux.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def compare_with_rival(arguments: argparse.Namespace) -> None:
    """Print a markdown table of times and ratios."""
    decoder = arguments.decoder
    names = ("bd3lm", "gpt2") if decoder is None else (f"bd3lm_{decoder}", decoder)
    titles = ("BD3-LM", "GPT-2") if decoder is None else names
    ours, rival = (build(name) for name in names)
    print(f"torch {torch.__version__}, {arguments.threads} CPU threads, float32, 12 layers of width 768, block size 4")
    print(f"| task | {titles[0]} | {titles[1]} | ratio | min - max |\n|---|---|---|---|---|")
    results: dict[str, TimedPair] = {}
    for name, length, task in tasks(arguments):
        repeats = arguments.repeats if length < 1024 else -(-arguments.repeats // 2)
        result = results[name] = compare_times(functools.partial(task, ours), functools.partial(task, rival), repeats)
        spread = f"{result.spread[0]:.2f} - {result.spread[1]:.2f}"
        print(f"| {name}, s | {result.ours:.2f} | {result.rival:.2f} | {result.ratio:.2f} | {spread} |", flush=True)
    for count, size in itertools.product(arguments.new_tokens[:1], arguments.batch_sizes):
        one, several = results[f"generating {count} tokens"], results[f"generating {size} x {count} tokens"]
        mine, theirs = size * one.ours / several.ours, size * one.rival / several.rival
        name = f"tokens per second, batch {size} over batch 1"
        print(f"| {name} | {mine:.2f} | {theirs:.2f} | {mine / theirs:.2f} | |", flush=True)
    for length in arguments.lengths[:1]:
        mine, theirs = (peak_memory(name, length) for name in names)
        print(f"| peak memory of training, 2 x {length}, GB | {mine:.2f} | {theirs:.2f} | {mine / theirs:.2f} | |")


def tasks(arguments: argparse.Namespace) -> Iterator[tuple[str, int, Callable[[PreTrainedModel], None]]]:
    """Yield the name, the length and the function of each timed task."""
    for length in arguments.lengths:
        yield f"training step, 2 x {length}", length, functools.partial(training_step, length=length)
    for count in arguments.new_tokens:
        yield f"generating {count} tokens", count, functools.partial(generation, new_tokens=count)
    for count, size in itertools.product(arguments.new_tokens[:1], arguments.batch_sizes):
        task = functools.partial(generation, new_tokens=count, batch_size=size)
        yield f"generating {size} x {count} tokens", count, task


# Estimates of the likelihood


class EstimatorVariance(NamedTuple):
    """The spread of the mean NLL under one setting."""

    setting: str  # as the user typed it
    nll: float  # mean over seeds, nats per token
    deviation: float  # over seeds, nats per token; the standard error of one estimate
    seconds: float  # per estimate, median; CPU time on a CPU

    @property
    def error_of_a_second(self) -> float:
        """Standard error of a mean of as many estimates as fit into one second."""
        return self.deviation * math.sqrt(self.seconds)


def estimator_variance(
    model: Any,
    sequences: Sequence[Any],
    settings: Mapping[str, tuple[str, int]],
    *,
    num_seeds: int,
    batch_size: int = 8,
) -> list[EstimatorVariance]:
    """Score the sequences with each setting and `num_seeds` seeds, in turn.

    Args:
        settings: name -> estimator and number of noise samples, as `read_estimator` returns them.

    Raises:
        ValueError: if there are fewer than 2 seeds, or the model does not have an estimator.
    """
    if num_seeds < 2:
        raise ValueError(f"{num_seeds} seeds give no standard error: use at least 2.")
    for estimator, num_samples in settings.values():
        check_estimator(model, estimator, num_samples)
    clock = time.process_time if model.device.type == "cpu" else time.perf_counter
    found: list[list[float]] = [[] for _ in settings]
    seconds: list[list[float]] = [[] for _ in settings]
    for seed in range(num_seeds):
        for index, (estimator, num_samples) in enumerate(settings.values()):
            started = clock()
            result = perplexity(
                model, sequences, estimator=estimator, num_samples=num_samples, batch_size=batch_size, seed=seed
            )
            seconds[index].append(clock() - started)
            found[index].append(result.nll)
    return [
        EstimatorVariance(setting, statistics.mean(nlls), statistics.stdev(nlls), statistics.median(spent))
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
        rows.append([result.setting, *cells, f"{result.error_of_a_second:.4f}", f"{cost:.3f}"])
    return markdown_table([*head, "variance x time"], rows)


def read_estimator(text: str) -> tuple[str, int]:
    """Return the estimator and its number of noise samples: `"stratified:4"` has four.

    Raises:
        ValueError: if the colon is not followed by an integer >= 1.
    """
    estimator, colon, number = text.partition(":")
    if not colon:
        return estimator, 1
    if not number.isdecimal() or int(number) < 1:
        raise ValueError(f"--estimators {text}: expected an integer >= 1 after the colon.")
    return estimator, int(number)


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


# The command


def run(arguments: argparse.Namespace) -> None:
    """Run `bd3lm bench`: print the measurements that the arguments select."""
    torch.set_num_threads(arguments.threads)
    if arguments.noise_draws is None and arguments.estimators is None:
        compare_with_rival(arguments)
        return
    if arguments.model is None:
        flag = "--noise-draws" if arguments.estimators is None else "--estimators"
        raise ValueError(f"{flag} measures a trained model: name its folder with --model.")
    settings = {text: read_estimator(text) for text in arguments.estimators or ()}
    model, tokenizer = load_model_and_tokenizer(arguments)
    size, batches, repeats = arguments.batch_size, arguments.batches, arguments.repeats
    split, length = "validation" if settings else "train", model.config.model_length
    texts = text_sequences(arguments.dataset, tokenizer, split=split, length=length, count=size * batches)
    options = {"batch_size": size, "batches": batches, "repeats": repeats}
    print(f"torch {torch.__version__}, {arguments.threads} CPU threads, {arguments.model}, {options}")
    if settings:
        print(variance_table(estimator_variance(model, texts, settings, num_seeds=repeats, batch_size=size)))
    else:
        # Neighbouring sequences are similar: put them into different batches.
        grouped = torch.tensor(texts).view(size, batches, length).unbind(1)
        print(gradient_table(gradient_variance(model, grouped, arguments.noise_draws, repeats=repeats)))


if __name__ == "__main__":
    from bd3lm_hf.cli import main

    sys.exit(main(["bench", *sys.argv[1:]]))
