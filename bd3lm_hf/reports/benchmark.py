"""`bd3lm bench`: speed and memory of block diffusion next to a named rival, in one run.

The rival is transformers' GPT-2 with its 124 M parameters; ours has the same width and depth, 170 M with its head.
With `--decoder qwen3` the rival is the stock decoder, and ours is block diffusion on it. Absolute times drift with the
machine, so both are timed in turn, and the figure to quote is the median of the pairwise ratios. Peak memory is
measured in a fresh process that does nothing else. `--noise-draws 1 2 4 --model M` instead measures the variance of
the gradient, `--estimators published stratified:4 exact --model M` that of likelihood estimates (`variance.py`).
"""

import argparse
import functools
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from bd3lm_hf.modeling.configuration_bd3lm import BD3LMConfig
from bd3lm_hf.modeling.modeling_bd3lm import BD3LMForMaskedLM
from bd3lm_hf.modeling.modeling_bd3lm_decoders import DECODERS
from bd3lm_hf.reports.variance import gradient_table, measure_gradients, measure_variance, variance_table


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
    """Return a random model: `"bd3lm"`, `"gpt2"`, a decoder (`"qwen3"`) or block diffusion on one (`"bd3lm_qwen3"`).

    All have 12 layers of width 768 and no dropout, so they do the same work.
    """
    torch.manual_seed(0)
    if name == "gpt2":
        config = GPT2Config(vocab_size=VOCAB_SIZE, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        config.n_positions = 2048  # room for a prompt and 1,024 new tokens
        rival = GPT2LMHeadModel(config)
        rival.generation_config.eos_token_id = None
        rival.generation_config.pad_token_id = 0
        return rival
    if name != "bd3lm":
        return _build_decoder(name)
    model = BD3LMForMaskedLM(BD3LMConfig(vocab_size=VOCAB_SIZE, block_size=4, dropout=0.0))
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


def batch_gain(model: PreTrainedModel, new_tokens: int, batch_size: int, repeats: int) -> float:
    """Return the tokens per second of a batch relative to a single text, the median of pairs."""
    alone = functools.partial(generation, model, new_tokens)
    return batch_size / compare_times(functools.partial(alone, batch_size), alone, repeats).ratio


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


def run(arguments: argparse.Namespace) -> None:
    """Run `bd3lm bench`: print the measurements that the arguments select."""
    if arguments.repeats < 1 or arguments.threads < 1:
        raise ValueError(f"--repeats {arguments.repeats} --threads {arguments.threads}: give at least 1 of each.")
    if min([*arguments.lengths, *arguments.new_tokens, *arguments.batch_sizes], default=1) < 1:
        raise ValueError("--lengths, --new-tokens and --batch-sizes: give whole numbers of at least 1.")
    torch.set_num_threads(arguments.threads)
    if arguments.noise_draws is None and arguments.estimators is None:
        compare_with_rival(arguments)
        return
    if arguments.noise_draws is not None and arguments.estimators is not None:
        raise ValueError("--noise-draws and --estimators are separate measurements: choose one.")
    flag = "--noise-draws" if arguments.estimators is None else "--estimators"
    if arguments.model is None:
        raise ValueError(f"{flag} measures a trained model: name its folder with --model.")
    options = {name: getattr(arguments, name) for name in ("batch_size", "batches", "repeats")}
    where = (arguments.model, arguments.dataset)
    print(f"torch {torch.__version__}, {arguments.threads} CPU threads, {arguments.model}, {options}")
    if arguments.estimators is None:
        print(gradient_table(measure_gradients(*where, arguments.noise_draws, **options)))
    else:
        print(variance_table(measure_variance(*where, arguments.estimators, **options)))


def compare_with_rival(arguments: argparse.Namespace) -> None:
    """Print a markdown table of times and ratios."""
    decoder = arguments.decoder
    names = ("bd3lm", "gpt2") if decoder is None else (f"bd3lm_{decoder}", decoder)
    titles = ("BD3-LM", "GPT-2") if decoder is None else names
    ours, rival = (build(name) for name in names)
    print(f"torch {torch.__version__}, {arguments.threads} CPU threads, float32, 12 layers of width 768, block size 4")
    print(f"| task | {titles[0]} | {titles[1]} | ratio | min - max |\n|---|---|---|---|---|")
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
    """Yield the name, the length and the function of each timed task."""
    for length in arguments.lengths:
        yield f"training step, 2 x {length}", length, functools.partial(training_step, length=length)
    for count in arguments.new_tokens:
        yield f"generating {count} tokens", count, functools.partial(generation, new_tokens=count)
    for size in arguments.batch_sizes if arguments.new_tokens else []:
        count = arguments.new_tokens[0]
        task = functools.partial(generation, new_tokens=count, batch_size=size)
        yield f"generating {size} x {count} tokens", count, task


if __name__ == "__main__":
    from bd3lm_hf.cli import main

    sys.exit(main(["bench", *sys.argv[1:]]))
