"""The measurements of the GPU check: each part times its work against a rival in the same process.

A part is a function `(settings) -> iterator of rows`. It yields each row as soon as it is known, so that a later
failure loses nothing.
"""

import contextlib
import fcntl
import functools
import gc
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from bd3lm_hf import BD3LMConfig, BD3LMForMaskedLM
from bd3lm_hf.modeling.noise_bd3lm import draw_noise
from bd3lm_hf.training.callbacks import peak_tflops_of, training_flops


ROOT = Path(__file__).resolve().parents[2]
VOCAB_SIZE = 50_304  # a multiple of 64, as the head's products want it on tensor cores


class Settings(NamedTuple):
    """Device and size of the check.

    Attributes:
        tiny: run every line of it on a CPU.
        alone: whether this process need not wait for others with its timing.
    """

    device: str = "cuda"
    tiny: bool = False
    output: Path = Path("gpu-check")
    alone: bool = True

    @property
    def sizes(self) -> dict[str, int]:
        """Width, layers and heads of both models; the first is the paper's and GPT-2's."""
        return {"width": 32, "layers": 1, "heads": 2} if self.tiny else {"width": 768, "layers": 12, "heads": 12}

    @property
    def vocab_size(self) -> int:
        return 128 if self.tiny else VOCAB_SIZE

    @property
    def repeats(self) -> int:
        return 1 if self.tiny else 7


class Row(NamedTuple):
    """One line of the tables."""

    what: str
    ours: float | None
    rival: float | None = None
    rival_name: str = ""
    unit: str = "s"
    ratio: float | None = None
    goal: str = ""
    met: bool | None = None
    note: str = ""


def bd3lm(settings: Settings, block_size: int = 4, length: int = 1024, **fields: Any) -> BD3LMForMaskedLM:
    """Return our network with random weights and no dropout, in float32, on the device."""
    size = settings.sizes
    torch.manual_seed(0)
    sizes = {"hidden_dim": size["width"], "n_blocks": size["layers"], "n_heads": size["heads"], "model_length": length}
    fields |= {"vocab_size": settings.vocab_size, "block_size": block_size, "dropout": 0.0, "eos_token_id": None}
    model = BD3LMForMaskedLM(BD3LMConfig(**sizes, **fields))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.02)  # the zeros of a fresh model would make some products cheaper
    if settings.device == "cuda":
        model.set_attn_implementation("auto")  # as in training
    return model.to(settings.device)


def gpt2(settings: Settings, length: int = 1024) -> GPT2LMHeadModel:
    """Return transformers' GPT-2 of the same width and depth, without dropout, with sdpa attention."""
    size = settings.sizes
    torch.manual_seed(0)
    sizes = {"n_embd": size["width"], "n_layer": size["layers"], "n_head": size["heads"], "n_positions": 2 * length}
    ids = {"vocab_size": settings.vocab_size, "bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}
    config = GPT2Config(**sizes, **ids, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return GPT2LMHeadModel._from_config(config, attn_implementation="sdpa").to(settings.device)


class Textbook(nn.Module):
    """Block diffusion as a textbook writes it: both streams in one sequence, a dense mask, all logits."""

    def __init__(self, settings: Settings, block_size: int, length: int) -> None:
        super().__init__()
        size = settings.sizes
        self.heads, width = size["heads"], size["width"]
        self.embed = nn.Embedding(settings.vocab_size, width)
        self.positions = nn.Embedding(length, width)
        linear = {
            "qkv": (width, 3 * width),
            "out": (width, width),
            "up": (width, 4 * width),
            "down": (4 * width, width),
        }
        self.layers = nn.ModuleList()
        for _ in range(size["layers"]):
            norms = {name: nn.LayerNorm(width) for name in ("norm1", "norm2")}
            self.layers.append(nn.ModuleDict(norms | {name: nn.Linear(*sizes) for name, sizes in linear.items()}))
        self.head = nn.Linear(width, settings.vocab_size)
        block = torch.arange(length) // block_size
        clean, own, earlier = block[:, None] >= block, block[:, None] == block, block[:, None] > block
        mask = torch.cat([torch.cat([clean, torch.zeros_like(own)], 1), torch.cat([earlier, own], 1)])
        self.register_buffer("mask", mask)

    def forward(self, x_0: torch.Tensor, x_t: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Return the weighted cross-entropy of the noisy stream, `weights` `(batch, length)`."""
        batch, length = x_0.shape
        position = torch.arange(length, device=x_0.device).repeat(2)
        hidden = self.embed(torch.cat([x_0, x_t], 1)) + self.positions(position)
        for layer in self.layers:
            qkv = layer["qkv"](layer["norm1"](hidden)).view(batch, 2 * length, 3, self.heads, -1)
            query, key, value = qkv.permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=self.mask)
            hidden = hidden + layer["out"](mixed.transpose(1, 2).flatten(2))
            hidden = hidden + layer["down"](F.gelu(layer["up"](layer["norm2"](hidden))))
        logits = self.head(hidden[:, length:]).float()
        losses = F.cross_entropy(logits.flatten(0, 1), x_0.flatten(), reduction="none")
        return (losses * weights.flatten()).sum() / x_0.numel()


def synchronize(settings: Settings) -> None:
    """Wait for the device, so that a clock sees its work."""
    if settings.device.startswith("cuda"):
        torch.cuda.synchronize()


def timed(settings: Settings, work: Callable[[], Any]) -> float:
    """Return the seconds of one call of `work`."""
    synchronize(settings)
    started = time.perf_counter()
    work()
    synchronize(settings)
    return time.perf_counter() - started


def warm_up(settings: Settings, *works: Callable[[], Any], times: int = 3) -> None:
    """Call each work until it is compiled."""
    for work in works:
        for _ in range(1 if settings.tiny else times):
            work()
    release_memory(settings)


@contextlib.contextmanager
def quiet(settings: Settings) -> Iterator[None]:
    """Wait until nothing else runs on the device, and keep it to this process."""
    if settings.alone:
        yield
        return
    (settings.output / f"compiled-{os.getpid()}").touch()
    while not (settings.output / "ready").exists():  # the check makes it when only timing is left
        time.sleep(0.1)
    with (settings.output / "timing").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def medians(settings: Settings, *works: Callable[[], Any]) -> list[float]:
    """Return the median seconds of each work, timed in turn."""
    turns = [[timed(settings, work) for work in works] for _ in range(settings.repeats)]
    return [statistics.median(times) for times in zip(*turns, strict=True)]


def compiled(settings: Settings, module: nn.Module) -> Any:
    """Return `module` compiled; the tiny check traces it without generating code, which would take minutes."""
    return torch.compile(module, backend="eager" if settings.tiny else "inductor", dynamic=False)


def noisy_batch(settings: Settings, ids: torch.Tensor, block_size: int) -> dict[str, torch.Tensor]:
    """Return a batch with its noise, as the collator of our training makes it."""
    noise = draw_noise(len(ids), -(-ids.shape[1] // block_size), ids.shape[1], device=settings.device)
    return {"input_ids": ids, "labels": ids, **noise._asdict()}


def training_step(settings: Settings, module: nn.Module, batch: dict[str, Any]) -> Callable[[], None]:
    """Return a function that takes one bfloat16 optimizer step with fused AdamW."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)
    run = compiled(settings, module.train())

    def step() -> None:
        with torch.autocast(torch.device(settings.device).type, torch.bfloat16):
            output = run(**batch)
        loss = output if isinstance(output, torch.Tensor) else output.loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def peak_memory(settings: Settings, module: nn.Module, step: Callable[[], None]) -> float | None:
    """Return the peak device memory of a step in GB (10^9 bytes), without other models; None on a CPU."""
    if not settings.device.startswith("cuda"):
        step()
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    own = 3 * sum(weight.nbytes for weight in module.parameters())  # the weights and the two moments of AdamW
    others = torch.cuda.memory_allocated() - own
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - others) / 1e9


def release_memory(settings: Settings) -> None:
    """Give back what no tensor holds."""
    gc.collect()
    if settings.device.startswith("cuda"):
        torch.cuda.empty_cache()


def graphs() -> int:
    """Return how many graphs torch.compile has made in this process."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def measure_training(settings: Settings) -> Iterator[Row]:
    """Time the training step against GPT-2's, with its memory, MFU and recompilations."""
    batch, length = (2, 16) if settings.tiny else (16, 1024)
    ids = torch.randint(0, settings.vocab_size - 1, (batch, length), device=settings.device)
    rival = gpt2(settings, length)
    their_step = training_step(settings, rival, {"input_ids": ids, "labels": ids})
    models = {size: bd3lm(settings, size, length) for size in ((4,) if settings.tiny else (4, 16))}
    steps = {size: training_step(settings, models[size], noisy_batch(settings, ids, size)) for size in models}
    warm_up(settings, their_step, *steps.values())
    peak = peak_tflops_of(torch.cuda.get_device_name()) if settings.device.startswith("cuda") else 0.0
    with quiet(settings):
        for size, step in steps.items():
            before = graphs()
            seconds, theirs = medians(settings, step, their_step)
            ratio, what = seconds / theirs, f"training step, {batch} x {length}, bf16, compiled, block {size}"
            yield Row(what, seconds, theirs, "GPT-2", "s", ratio, "<= 1.6", ratio <= 1.6)
            if peak:
                mfu = (training_flops(models[size], batch, length) or 0) / seconds / (peak * 1e12)
                yield Row(f"MFU of it, block {size}", mfu, unit="", goal=">= 0.40", met=mfu >= 0.4)
            memory, their_memory = peak_memory(settings, models[size], step), peak_memory(settings, rival, their_step)
            if memory is not None and their_memory is not None:
                ratio, what = memory / their_memory, f"peak memory, block {size}"
                yield Row(what, memory, their_memory, "GPT-2", "GB", ratio, "<= 1.3", ratio <= 1.3)
            made = graphs() - before
            yield Row(f"graphs compiled after warm-up, block {size}", made, unit="", goal="0", met=made == 0)


def measure_attention(settings: Settings, length: int) -> Iterator[Row]:
    """Time the training step against the doubled sequence with a dense mask."""
    block_size, batch = 4, 16384 // length
    if settings.tiny:
        batch, length = 2, length // 128
    ids = torch.randint(0, settings.vocab_size - 1, (batch, length), device=settings.device)
    masked = torch.rand(batch, length, device=settings.device) < 0.5
    noisy = {"x_0": ids, "x_t": ids.masked_fill(masked, settings.vocab_size - 1), "weights": 2.0 * masked}
    ours, textbook = bd3lm(settings, block_size, length), Textbook(settings, block_size, length)
    steps = (
        training_step(settings, ours, noisy_batch(settings, ids, block_size)),
        training_step(settings, textbook.to(settings.device), noisy),
    )
    warm_up(settings, *steps)
    with quiet(settings):
        seconds, theirs = medians(settings, *steps)
    gain, what = theirs / seconds, f"training step, {batch} x {length}, block {block_size}: dense mask / ours"
    yield Row(what, seconds, theirs, "doubled sequence, dense sdpa mask", "s", gain, ">= 3", gain >= 3)


def measure_generation(settings: Settings) -> Iterator[Row]:
    """Time generation against GPT-2 with a static, compiled cache, and compiled against eager; batch 1, 8 and 64."""
    new_tokens = 8 if settings.tiny else 1024
    dtype = torch.float32 if settings.tiny else torch.bfloat16
    ours = bd3lm(settings, 4, 4 + new_tokens).to(dtype).eval()
    rival = gpt2(settings, new_tokens).to(dtype).eval()
    cuda = settings.device.startswith("cuda")
    static = {"cache_implementation": "static"} if cuda else {}  # which transformers compiles on a GPU only

    def write(model: Any, batch: int, count: int, **options: Any) -> None:
        prompt = torch.arange(1, 5, device=settings.device).expand(batch, -1)
        text = model.generate(prompt, max_new_tokens=count, do_sample=True, top_k=0, **{**static, **options})
        assert text.shape == (batch, 4 + count)

    batches, samplers = (1, 2, 64) if settings.tiny else (1, 8, 64), ("first_hitting", "confidence")
    for batch in batches:
        write(rival, batch, new_tokens)
        for sampler in samplers:
            write(ours, batch, min(new_tokens, 64), sampler=sampler)
    alone: dict[str, float] = {}
    with quiet(settings):
        for batch in batches:
            theirs = timed(settings, lambda batch=batch: write(rival, batch, new_tokens))
            for sampler in samplers:
                seconds = timed(
                    settings, lambda batch=batch, sampler=sampler: write(ours, batch, new_tokens, sampler=sampler)
                )
                ratio, what = seconds / theirs, f"{batch} x {new_tokens} tokens, {sampler}"
                goal, met = ("<= 1", ratio <= 1) if batch == 1 else ("", None)
                yield Row(what, seconds, theirs, "GPT-2, static cache", "s", ratio, goal, met)
                gain, what = batch * alone.setdefault(sampler, seconds) / seconds, f"{sampler}, batch 64 over batch 1"
                if batch == 64:
                    yield Row(f"tokens/s, {what}", gain, unit="x", goal=">= 30", met=gain >= 30)
        count = min(new_tokens, 128)
        seconds = timed(settings, lambda: write(ours, 1, count))
        eager = timed(settings, lambda: write(ours, 1, count, cache_implementation="dynamic"))
        gain = eager / seconds
        yield Row(f"{count} tokens, eager / compiled", seconds, eager, "ours, eager", "s", gain, ">= 4", gain >= 4)


def measure_likelihood(settings: Settings) -> Iterator[Row]:
    """Time the exact and the stratified bound against one noise sample."""
    batch, length = (2, 16) if settings.tiny else (64, 1024)
    model = bd3lm(settings, 4, length).to(torch.float32 if settings.tiny else torch.bfloat16).eval()
    ids = torch.randint(0, settings.vocab_size - 1, (batch, length), device=settings.device)

    def score(estimator: str, num_samples: int = 1) -> None:
        generator = torch.Generator().manual_seed(0)
        # 8 sequences at a time, as `bd3lm eval` does
        for part in ids.split(8):
            model.token_nll(part, estimator=estimator, num_samples=num_samples, generator=generator)

    estimates = (("sampled",), ("exact",), ("stratified",), ("stratified", 2))
    works = [functools.partial(score, *estimate) for estimate in estimates]
    warm_up(settings, *works, times=1)
    with quiet(settings):
        one, exact, single, double = medians(settings, *works)
    what = f"exact bound, block 4, {batch} x {length}"
    yield Row(what, exact, one, "one draw", "s", exact / one, "<= 9", exact / one <= 9)
    extra = (double - single) / one
    yield Row("one more stratified draw", double - single, one, "one draw", "s", extra, "<= 0.6", extra <= 0.6)


def has(*libraries: str) -> str | None:
    """Return why a part that needs `libraries` cannot run here; None if it can."""
    missing = [name for name in libraries if importlib.util.find_spec(name) is None]
    return f"not run: {', '.join(missing)} not installed" if missing else None


def run_training(
    settings: Settings, name: str, fields: list[str], launcher: list[str] | None = None
) -> dict[str, Any]:
    """Run `training/train.py` in a process of its own and return its `results.json`.

    Raises:
        RuntimeError: if it fails, with the error that it printed; all of it is in `NAME.log`.
    """
    folder = settings.output / name
    script = str(ROOT / "training" / "train.py")
    command = [sys.executable, *(launcher or []), script, *fields, "--output_dir", str(folder)]
    log = folder.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run([*command, "--overwrite_output_dir", "true"], stdout=file, stderr=file, cwd=ROOT)
    if done.returncode:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        # The error itself; a launcher prints many lines after it.
        told = next((line for line in lines if re.match(r"(\[rank\d+\]: )?\w+(\.\w+)*Error: ", line)), lines[-1])
        raise RuntimeError(f"exit code {done.returncode}, see {log.name}: {told}")
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def small_run(settings: Settings, steps: int) -> list[str]:
    """Return the fields of a run that takes seconds, on text made here."""
    text = settings.output / "text.txt"
    text.parent.mkdir(parents=True, exist_ok=True)
    text.write_text("The quick brown fox jumps over the lazy dog, line by line.\n" * 400, encoding="utf-8")
    sizes = "--vocab_size 300 --hidden_dim 64 --n_blocks 2 --n_heads 2 --cond_dim 16 --model_length 32 --block_size 4"
    return ["--dataset", str(text), *sizes.split(), "--max_steps", str(steps), "--eval_strategy", "no"]


def measure_runs(settings: Settings) -> Iterator[Row]:
    """Train BD3-LM and AR on the same text, side by side, and compare their held-out perplexities."""
    if missing := has("datasets"):
        yield Row("BD3-LM and AR on python-source", None, note=missing)
        return

    def train(model_type: str) -> Row:
        if settings.tiny:
            fields = small_run(settings, 2)
        else:
            fields = [str(ROOT / "training/recipes/python-source.yaml"), "--bf16", "true", "--max_steps", "1500"]
            fields += ["--eval_steps", "500", "--save_steps", "1500", "--logging_steps", "50", "--sample_tokens", "0"]
            fields += ["--torch_compile", "true", "--dataloader_num_workers", "4"]
        started = time.perf_counter()
        results = run_training(settings, f"run-{model_type}", [*fields, "--model_type", model_type])
        note = f"{time.perf_counter() - started:.0f} s while other parts ran"
        return Row(f"held-out perplexity, {model_type}", results["after"]["perplexity"], unit="", note=note)

    with ThreadPoolExecutor() as pool:
        yield from pool.map(train, ("bd3lm",) if settings.tiny else ("bd3lm", "ar"))


def measure_launchers(settings: Settings) -> Iterator[Row]:
    """Run 20 steps under each launch configuration, in one process each, side by side."""
    names = ("ddp", "fsdp2", "deepspeed_zero2", "deepspeed_zero3")
    fields = small_run(settings, 20)

    def launch(name: str) -> Row:
        missing = has("datasets", *(["deepspeed"] if "deepspeed" in name else []))
        if not settings.device.startswith("cuda"):
            missing = "not run: needs a CUDA device"
        if missing:
            return Row(f"20 steps, {name}", None, note=missing)
        config, port = str(ROOT / "training" / "launch" / f"{name}.yaml"), str(29500 + names.index(name))
        launcher = ["-m", "accelerate.commands.launch", "--config_file", config, "--num_processes", "1"]
        started = time.perf_counter()
        try:
            results = run_training(settings, name, fields, [*launcher, "--main_process_port", port])
        except RuntimeError as error:
            return Row(f"20 steps, {name}", None, goal="20 steps", met=False, note=str(error))
        seconds = time.perf_counter() - started
        return Row(f"20 steps, {name}", seconds, goal="20 steps", met=results["steps"] == 20)

    with ThreadPoolExecutor() as pool:
        yield from pool.map(launch, names)
