"""Speed and memory of block diffusion beside a named rival, in one run: `python -m bd3lm_hf.reports.benchmark`.

The rival is transformers' GPT-2 with its 124 M parameters; ours has the same width and depth, 170 M with its head.
With `--decoder qwen3` it is the stock decoder, and ours is block diffusion on the same weights.
Absolute times drift with the machine, so both are timed in turn and the figure to quote is the median of the pairwise
ratios. Peak memory is that of a fresh process which does one thing only. `--noise-draws 1 2 4 --model M` measures
instead what several draws of noise for each clean pass do to the gradient (see `gradients.py`), and `--estimators
published stratified:4 exact --model M` how precise estimates of its likelihood are (see `precision.py`).

How much the gradient of a training step varies, where it comes from, and what several noise draws do about it.

A step's gradient is random twice: in the text of its batch, and in the noise of that text. More draws of noise for
each clean pass lower the second part only. What a method costs is variance times seconds: averaging k steps divides
the variance by k and takes k times as long.

How precise an estimate of the likelihood is for its time: the standard error over noise seeds, on the same text.

A mean over k estimates has a k-th of the variance and costs k times the seconds. So variance times seconds compares
estimators at equal cost, and its root is the standard error that one second buys.
"""

import argparse
import functools
import math
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from bd3lm_hf.checkpoints import load_model
from bd3lm_hf.data import load_text, pack
from bd3lm_hf.evaluation.perplexity import check_estimator, perplexity
from bd3lm_hf.modeling.configuration_bd3lm import BD3LMConfig
from bd3lm_hf.modeling.modeling_bd3lm import BD3LMForMaskedLM
from bd3lm_hf.modeling.modeling_bd3lm_decoders import DECODERS
from bd3lm_hf.modeling.noise_bd3lm import draw_noise
from bd3lm_hf.reports import benchmark
from bd3lm_hf.reports.reports_cli import bench_parser
from bd3lm_hf.tokenization import check_tokenizer_fits, load_tokenizer


VOCAB_SIZE = 50258
DECODER_VOCAB_SIZE = 50304


BATCH_SIZE = 2


class TimedPair(NamedTuple):
    """Our time over the rival's."""

    ours: float  # seconds, median
    rival: float  # seconds, median
    ratio: float  # median of the pairwise ratios
    spread: tuple[float, float]  # least and greatest ratio


def build(name: str, block_size: int = 4) -> PreTrainedModel:
    """`"bd3lm"`, `"gpt2"`, a decoder or block diffusion on one (`"qwen3"`, `"bd3lm_qwen3"`), with random weights.

    All have 12 layers of width 768 and no dropout (so they do the same work).
    """
    torch.manual_seed(0)
    if name == "gpt2":
        config = GPT2Config(vocab_size=VOCAB_SIZE, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        config.n_positions = 2048  # a prompt and 1,024 tokens behind it
        rival = GPT2LMHeadModel(config)
        rival.generation_config.eos_token_id = None
        rival.generation_config.pad_token_id = 0
        return rival
    if name != "bd3lm":
        return _build_decoder(name)
    model = BD3LMForMaskedLM(BD3LMConfig(vocab_size=VOCAB_SIZE, block_size=block_size, dropout=0.0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.02)  # a fresh model's zeros would make some products cheaper
    return model


def _build_decoder(name: str) -> PreTrainedModel:
    family = name.removeprefix("bd3lm_")
    if family not in DECODERS:
        raise ValueError(f"no model called {name!r} to measure: choose bd3lm, gpt2, or one of {', '.join(DECODERS)}.")
    model_class = DECODERS[family] if name != family else DECODERS[family].__bases__[-1]
    sizes = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 12}
    sizes |= {"head_dim": 64, "intermediate_size": 3072, "max_position_embeddings": 2048}
    known = {field: value for field, value in sizes.items() if hasattr(model_class.config_class, field)}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0) if family == "gpt2" else {}
    special = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    return model_class(model_class.config_class(vocab_size=DECODER_VOCAB_SIZE, **known, **dropout, **special))


def training_step(model: PreTrainedModel, length: int) -> None:
    """Forward and backward pass over a batch of two texts."""
    model.train()
    tokens = torch.randint(0, VOCAB_SIZE - 1, (BATCH_SIZE, length), generator=torch.Generator().manual_seed(0))
    model(input_ids=tokens, labels=tokens).loss.backward()
    model.zero_grad(set_to_none=True)


def generation(model: Any, new_tokens: int, batch_size: int = 1) -> None:
    """Sample texts of exactly `new_tokens` tokens behind a prompt of one block; both models cache."""
    model.eval()
    prompt = torch.arange(1, 5).expand(batch_size, -1)
    written = model.generate(prompt, max_new_tokens=new_tokens, do_sample=True, top_k=0)
    assert written.shape == (batch_size, 4 + new_tokens)


def compare_times(ours: Callable[[], None], rival: Callable[[], None], repeats: int) -> TimedPair:
    """Time two tasks in turn, after one turn that does not count."""
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


def batch_gain(model: PreTrainedModel, new_tokens: int, batch_size: int, repeats: int) -> float:
    """Tokens per second of a batch over those of a single text, the median of pairs."""
    alone = functools.partial(generation, model, new_tokens)
    return batch_size / compare_times(functools.partial(alone, batch_size), alone, repeats).ratio


def peak_memory(name: str, length: int) -> float:
    """Peak resident memory in GB (10^9 bytes) of a fresh process that takes two training steps."""
    code = (
        f"import torch; torch.set_num_threads({torch.get_num_threads()}); "
        "from bd3lm_hf.reports import benchmark as b; "
        f"m = b.build({name!r}); [b.training_step(m, {length}) for _ in range(2)]; print(b.peak_of_process())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def peak_of_process() -> float:
    """Peak resident memory of this process in GB."""
    status = Path("/proc/self/status")
    if status.is_file():
        # getrusage would count the parent's peak too: Linux hands it on to a child.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def main(argv: list[str] | None = None) -> None:
    """Measure what the arguments ask for and print it."""
    arguments = bench_parser().parse_args(argv)
    if arguments.repeats < 1 or arguments.threads < 1:
        raise ValueError(f"--repeats {arguments.repeats} --threads {arguments.threads}: give at least 1 of each.")
    if min([*arguments.lengths, *arguments.new_tokens, *arguments.batch_sizes], default=1) < 1:
        raise ValueError("--lengths, --new-tokens and --batch-sizes: give whole numbers of at least 1.")
    torch.set_num_threads(arguments.threads)
    if arguments.noise_draws is None and arguments.estimators is None:
        compare_with_rival(arguments)
        return
    if arguments.noise_draws is not None and arguments.estimators is not None:
        raise ValueError("--noise-draws and --estimators are two measurements: take one at a time.")
    flag = "--noise-draws" if arguments.estimators is None else "--estimators"
    if arguments.model is None:
        raise ValueError(f"{flag} measures a trained model: name its folder with --model.")
    options = {name: getattr(arguments, name) for name in ("batch_size", "batches", "repeats")}
    where = (arguments.model, arguments.dataset)
    print(f"torch {torch.__version__}, {arguments.threads} CPU threads, {arguments.model}, {options}")
    if arguments.estimators is None:
        print(benchmark.gradient_table(benchmark.measure_gradients(*where, arguments.noise_draws, **options)))
    else:
        print(benchmark.variance_table(benchmark.measure_variance(*where, arguments.estimators, **options)))


def compare_with_rival(arguments: argparse.Namespace) -> None:
    """Print a table of ratios, in markdown."""
    decoder = arguments.decoder
    names = ("bd3lm", "gpt2") if decoder is None else (f"bd3lm_{decoder}", decoder)
    titles = ("BD3-LM", "GPT-2") if decoder is None else names
    ours, rival = (build(name) for name in names)
    print(f"torch {torch.__version__}, {arguments.threads} CPU threads, float32, 12 layers of width 768, block size 4")
    print(f"| task | {titles[0]} | {titles[1]} | ratio | least - greatest |\n|---|---|---|---|---|")
    for name, length, task in tasks(arguments):
        repeats = arguments.repeats if length < 1024 else -(-arguments.repeats // 2)
        result = compare_times(functools.partial(task, ours), functools.partial(task, rival), repeats)
        spread = f"{result.spread[0]:.2f} - {result.spread[1]:.2f}"
        print(f"| {name}, s | {result.ours:.2f} | {result.rival:.2f} | {result.ratio:.2f} | {spread} |", flush=True)
    for size in arguments.batch_sizes if arguments.new_tokens else []:
        gains = [batch_gain(model, arguments.new_tokens[0], size, arguments.repeats) for model in (ours, rival)]
        name = f"tokens per second, batch {size} over batch 1"
        print(f"| {name} | {gains[0]:.2f} | {gains[1]:.2f} | {gains[0] / gains[1]:.2f} | |", flush=True)
    for length in arguments.lengths[:1]:
        mine, theirs = (peak_memory(name, length) for name in names)
        print(f"| peak memory of training, 2 x {length}, GB | {mine:.2f} | {theirs:.2f} | {mine / theirs:.2f} | |")


def tasks(arguments: argparse.Namespace) -> Iterator[tuple[str, int, Callable[[PreTrainedModel], None]]]:
    """Name, length and work of what is timed beside the rival."""
    for length in arguments.lengths:
        yield f"training step, 2 x {length}", length, functools.partial(training_step, length=length)
    for count in arguments.new_tokens:
        yield f"writing {count} tokens", count, functools.partial(generation, new_tokens=count)
    for size in arguments.batch_sizes if arguments.new_tokens else []:
        count = arguments.new_tokens[0]
        written = functools.partial(generation, new_tokens=count, batch_size=size)
        yield f"writing {size} x {count} tokens", count, written


if __name__ == "__main__":
    main()


class GradientVariance(NamedTuple):
    """Traces of covariances of the gradient of one step, at one number of draws for each clean pass."""

    draws: int
    seconds: float  # of a step, forward and backward; median
    time_ratio: float  # to the first number of draws; median over steps taken in turn
    noise: float  # over the noise, at a fixed batch
    noise_error: float  # its standard error, over batches
    data: float  # over batches, of the gradient averaged over all noise; the same for every number of draws


class _Sums:
    """Running sums of the gradients at one number of noise samples."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.within: list[float] = []  # per batch, unbiased
        self.between = 0.0  # sum over batches of |sum of gradients|^2
        self.total: torch.Tensor | float = 0.0


def gradient_variance(
    model: Any, batches: Sequence[torch.Tensor], draws: Sequence[int], *, repeats: int, seed: int = 0
) -> list[GradientVariance]:
    """Measure on every batch `repeats` times for each number of draws, in turn.

    Analysis of variance: the variance within batches is that of the noise; the variance of the batches' means is that
    of the data and 1 / repeats of the noise's. Dropout, if the model has any, counts as noise.

    Args:
        model: with weights that are worth a gradient: a fresh model's head is zero, and passes none on.
        batches: token ids `(batch, length)`, at least 2.
        repeats: noise seeds of each batch, at least 2.

    Raises:
        ValueError: too few batches or repeats.
    """
    if len(batches) < 2 or repeats < 2:
        raise ValueError(f"{len(batches)} batches of {repeats} noise seeds have no variance: give at least 2 of each.")
    model.train()
    generator = torch.Generator().manual_seed(seed)
    _gradient(model, batches[0], max(draws), generator)  # warms up, and does not count
    sums = [_Sums() for _ in draws]
    for ids in batches:
        of_batch: list[torch.Tensor | float] = [0.0] * len(draws)
        squares = [0.0] * len(draws)
        for _ in range(repeats):
            for place, count in enumerate(draws):
                started = time.perf_counter()
                gradient = _gradient(model, ids, count, generator)
                sums[place].seconds.append(time.perf_counter() - started)
                of_batch[place] = of_batch[place] + gradient
                squares[place] += _square(gradient)
        for own, vector, square in zip(sums, of_batch, squares, strict=True):
            own.within.append((square - _square(vector) / repeats) / (repeats - 1))
            own.between += _square(vector)
            own.total = own.total + vector
    return _analyse(draws, sums, len(batches), repeats)


def _analyse(draws: Sequence[int], sums: list[_Sums], batches: int, repeats: int) -> list[GradientVariance]:
    noise = [statistics.mean(own.within) for own in sums]
    of_means = [(own.between - _square(own.total) / batches) / (batches - 1) / repeats**2 for own in sums]
    data = statistics.mean(mean - within / repeats for mean, within in zip(of_means, noise, strict=True))
    return [
        GradientVariance(
            count,
            statistics.median(own.seconds),
            statistics.median(mine / first for mine, first in zip(own.seconds, sums[0].seconds, strict=True)),
            within,
            statistics.stdev(own.within) / batches**0.5,
            data,
        )
        for count, own, within in zip(draws, sums, noise, strict=True)
    ]


def _gradient(model: Any, ids: torch.Tensor, draws: int, generator: torch.Generator) -> torch.Tensor:
    """The gradient of one training step, all parameters in one vector."""
    batch, length = ids.shape
    noise = draw_noise(batch, model.config.num_blocks(length), length, num_noise_samples=draws, generator=generator)
    model.zero_grad(set_to_none=True)
    model(input_ids=ids, labels=ids, **noise._asdict()).loss.backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])
    model.zero_grad(set_to_none=True)
    return gradient


def _square(vector: torch.Tensor | float) -> float:
    return float(torch.as_tensor(vector).double().square().sum())


def gradient_batches(dataset: str, tokenizer: Any, *, length: int, size: int, count: int) -> list[torch.Tensor]:
    """`count` batches `(size, length)` of training text, spread over the dataset.

    Raises:
        ValueError: the text is too short.
    """
    rows = pack(load_text(dataset, split="train"), tokenizer, length=length)
    whole = [ids for ids in rows["input_ids"] if len(ids) == length]
    if len(whole) < size * count:
        raise ValueError(
            f"{dataset} has {len(whole)} sequences of {length} tokens, too few for {count} batches of {size}: give "
            f"fewer or smaller batches, or more text."
        )
    step = len(whole) // (size * count)
    chosen = torch.tensor(whole[: step * size * count : step])
    # Neighbours in the text are alike: deal them to different batches.
    return list(chosen.view(size, count, length).unbind(1))


def gradient_table(results: Sequence[GradientVariance]) -> str:
    """In markdown, beside the first number of draws."""
    first = results[0]
    lines = [
        "| draws | s/step | time | noise variance | data variance | noise variance x time | total variance x time |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        noise = result.noise / first.noise
        total = (result.noise + result.data) / (first.noise + first.data)
        lines.append(
            f"| {result.draws} | {result.seconds:.3f} | {result.time_ratio:.2f} | {result.noise:.4g} +- "
            f"{result.noise_error:.2g} | {result.data:.4g} | {noise * result.time_ratio:.2f} | "
            f"{total * result.time_ratio:.2f} |"
        )
    return "\n".join(lines)


def measure_gradients(
    folder: str, dataset: str, draws: Sequence[int], *, batch_size: int, batches: int, repeats: int
) -> list[GradientVariance]:
    """[`gradient_variance`] of a checkpoint on a dataset.

    Raises:
        ValueError: a checkpoint, tokenizer or dataset that cannot be used, or numbers below 1.
    """
    if min(*draws, batch_size) < 1:
        raise ValueError(f"--noise-draws {' '.join(map(str, draws))} --batch-size {batch_size}: give at least 1.")
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    check_tokenizer_fits(tokenizer, model.config)
    length = model.config.model_length
    texts = gradient_batches(dataset, tokenizer, length=length, size=batch_size, count=batches)
    return gradient_variance(model, texts, draws, repeats=repeats)


class Setting(NamedTuple):
    """An estimator and its number of draws."""

    estimator: str
    num_samples: int = 1

    def __str__(self) -> str:
        return self.estimator if self.num_samples == 1 else f"{self.estimator}, {self.num_samples} draws"


class EstimatorVariance(NamedTuple):
    """Spread of the mean NLL of a text under one setting."""

    setting: Setting
    nll: float  # mean over seeds, nats per token
    deviation: float  # over seeds, nats per token; the standard error of one estimate
    seconds: float  # of one estimate, median; CPU time on a CPU
    num_seeds: int

    @property
    def error_of_a_second(self) -> float:
        """The standard error of the mean of as many estimates as fit into a second."""
        return self.deviation * math.sqrt(self.seconds)


def estimator_variance(
    model: Any, sequences: Sequence[Any], settings: Sequence[Setting], *, num_seeds: int, batch_size: int = 8
) -> list[EstimatorVariance]:
    """Score the sequences with each setting and `num_seeds` seeds, in turn.

    Raises:
        ValueError: fewer than 2 seeds, or an estimator that the model does not have.
    """
    if num_seeds < 2:
        raise ValueError(f"{num_seeds} seeds have no standard error: give at least 2.")
    for setting in settings:
        check_estimator(model, *setting)
    clock = time.process_time if model.device.type == "cpu" else time.perf_counter
    found: list[list[float]] = [[] for _ in settings]
    seconds: list[list[float]] = [[] for _ in settings]
    for seed in range(num_seeds):
        for place, (estimator, num_samples) in enumerate(settings):
            started = clock()
            result = perplexity(
                model, sequences, estimator=estimator, num_samples=num_samples, batch_size=batch_size, seed=seed
            )
            seconds[place].append(clock() - started)
            found[place].append(result.nll)
    return [
        EstimatorVariance(setting, statistics.mean(nlls), statistics.stdev(nlls), statistics.median(spent), num_seeds)
        for setting, nlls, spent in zip(settings, found, seconds, strict=True)
    ]


def variance_table(results: Sequence[EstimatorVariance]) -> str:
    """In markdown; variance at equal cost relative to the first line."""
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
    """`"stratified:4"` is four draws.

    Raises:
        ValueError: no number behind the colon, or one below 1.
    """
    estimator, colon, number = text.partition(":")
    if not colon:
        return Setting(estimator)
    if not number.isdecimal() or int(number) < 1:
        raise ValueError(f"--estimators {text}: behind the colon goes a number of draws of at least 1.")
    return Setting(estimator, int(number))


def measure_variance(
    folder: str, dataset: str, settings: Sequence[str], *, batch_size: int, batches: int, repeats: int
) -> list[EstimatorVariance]:
    """[`measure_precision`] of a checkpoint on held-out sequences, spread over a dataset.

    Raises:
        ValueError: a checkpoint, tokenizer, dataset or estimator that cannot be used, or numbers below 1.
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
    chosen = [rows[place * len(rows) // count] for place in range(count)]
    return estimator_variance(model, chosen, wanted, num_seeds=repeats, batch_size=batch_size)


__all__ = [
    "EstimatorVariance",
    "GradientVariance",
    "Setting",
    "estimator_variance",
    "gradient_batches",
    "gradient_table",
    "gradient_variance",
    "measure_gradients",
    "measure_variance",
    "read_estimator",
    "variance_table",
]
