"""Quality against speed: generative perplexity by how many tokens a sampler reveals per forward pass.

A sampler that reveals several tokens in one forward pass samples them as if they were independent. The perplexity of
the texts under a reference model measures what that costs; the entropy of their tokens, how varied they remain.
"""

import argparse
import io
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from datasets import disable_progress_bars
from transformers import PreTrainedTokenizerBase

from bd3lm_hf.console import load_model_and_tokenizer, markdown_table, progress_bar
from bd3lm_hf.data import load_text, pack
from bd3lm_hf.data.packing import evenly_spaced
from bd3lm_hf.evaluation.generative import mean_entropy
from bd3lm_hf.evaluation.perplexity import SequenceScore, summarize
from bd3lm_hf.evaluation.reference_model import ReferenceModel, load_reference_model
from bd3lm_hf.generation.text_generation import generate_texts
from bd3lm_hf.reports.figures import check_matplotlib, draw_speed_quality
from bd3lm_hf.reports.reports_cli import CURVES, SHARED_FIELDS, check_quality
from bd3lm_hf.reports.run_reader import describe_setting
from bd3lm_hf.user_files import write_atomically


class Point(NamedTuple):
    """Quality and speed of the texts of one setting."""

    sampler: str
    setting: dict[str, Any]  # fields of the generation config
    tokens_per_forward: float  # of a text that is generated alone
    tokens_per_batch_forward: float  # of the batches: every row waits for the slowest
    perplexity: float  # generative: exp of the mean nll under the judge
    standard_error: float  # of the log of the perplexity
    entropy: float  # of the token frequencies within a text, nats, mean over texts
    seconds: float
    scores: list[SequenceScore]


def quality_points(
    model: Any,
    curves: Mapping[str, Sequence[Mapping[str, Any]]],
    judge: ReferenceModel,
    *,
    prompts: Sequence[list[int]] | None = None,
    num_samples: int = 64,
    new_tokens: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    **generation: Any,
) -> Iterator[Point]:
    """Generate texts with each setting of each sampler, and score them.

    All texts have the same length: an end token does not end them, as in packed training text.

    Args:
        curves: sampler -> fields of `generate`, the slowest setting first.
        prompts: token ids to continue, all of the same length, one text each; by default `num_samples` texts begin
            with the BOS token.
        new_tokens: tokens per text; by default as many as fit into the model's window.
        generation: further fields of `generate`, the same for all settings.

    Raises:
        ValueError: if the model has no samplers, or a text is longer than its window.
    """
    if not hasattr(model.generation_config, "output_trace"):
        raise ValueError(f"a {type(model).__name__} has no samplers to compare: name a block-diffusion model.")
    if prompts is None:
        prompts = [[model.generation_config.bos_token_id]] * num_samples
    window = model.config.model_length
    room = window - len(prompts[0])
    new_tokens = room if new_tokens is None else new_tokens
    if not 0 < new_tokens <= room:
        raise ValueError(
            f"new_tokens={new_tokens}: after {len(prompts[0])} given tokens the model's window of {window} tokens "
            f"has room for {room}. Give shorter prompts (--prompt-tokens) or ask for fewer tokens (--new-tokens)."
        )
    settings = [(sampler, dict(setting)) for sampler, settings in curves.items() for setting in settings]
    batches: dict[str, Any] = {"batch_size": batch_size, "seed": seed}
    with progress_bar("quality", len(settings), unit="setting") as bar:
        for sampler, setting in settings:
            fields = {**generation, **{name: value for name, value in setting.items() if value is not None}}
            started = time.perf_counter()
            texts = generate_texts(model, prompts, new_tokens, **batches, sampler=sampler, **fields)
            seconds = time.perf_counter() - started
            scores = judge.score(texts, **batches)
            result = summarize(scores)
            yield Point(
                sampler=sampler,
                setting=setting,
                tokens_per_forward=len(texts) * new_tokens / sum(text.forwards for text in texts),
                tokens_per_batch_forward=len(texts) * new_tokens / sum(text.batch_forwards for text in texts),
                perplexity=result.perplexity,
                standard_error=result.standard_error,
                entropy=mean_entropy([text.new_ids for text in texts]),
                seconds=seconds,
                scores=scores,
            )
            bar.update()


def compare_curves(point: Point, baseline: Point) -> tuple[float, float]:
    """Return the perplexity of a point relative to a baseline with as many texts, and its standard error.

    The error is that of the difference of two ratio estimates over pairs of texts, sqrt(n / (n - 1) sum_i d_i^2) with
    d_i = (nll_i - nll m_i) / sum m - (the same of the baseline), to first order.
    """
    residuals = []
    for one in (point, baseline):
        total, mean = sum(score.num_tokens for score in one.scores), math.log(one.perplexity)
        residuals.append([(score.nll - mean * score.num_tokens) / total for score in one.scores])
    count, value = len(point.scores), point.perplexity / baseline.perplexity
    spread = math.fsum((ours - base) ** 2 for ours, base in zip(*residuals, strict=True))
    return value, value * math.sqrt(count / (count - 1) * spread)


def speed_quality_table(points: Sequence[Point]) -> str:
    """Return a markdown table that compares each point with the first of all and the first of its sampler."""
    head = ("sampler", "setting", "tokens per forward", "in a batch", "perplexity", "over the first row")
    rows = []
    firsts: dict[str, Point] = {}
    for point in points:
        first = firsts.setdefault(point.sampler, point)
        ratios = [compare_curves(point, points[0]), compare_curves(point, first)]
        cells = [
            point.sampler,
            describe_setting(point.setting),
            f"{point.tokens_per_forward:.2f}",
            f"{point.tokens_per_batch_forward:.2f}",
            f"{point.perplexity:.2f} +- {point.perplexity * point.standard_error:.2f}",
            *("{:.3f} +- {:.3f}".format(*ratio) for ratio in ratios),
            f"{point.entropy:.2f}",
        ]
        rows.append(cells)
    return markdown_table([*head, "over its sampler's first", "entropy"], rows)


def plot_speed_quality(points: Sequence[Point], path: Path, *, judge: str) -> None:
    """Draw generative perplexity and entropy against tokens per forward pass, one curve per sampler."""
    title = f"quality against speed: {len(points[0].scores)} samples per setting"
    drawing = draw_speed_quality([point._asdict() for point in points], judge, title)
    kind = path.suffix.lower().removeprefix(".")
    content = io.BytesIO()
    # The command recognises its own files by their author.
    metadata = {"Software" if kind == "png" else "Creator": "bd3lm_hf"}
    drawing.savefig(content, format=kind, dpi=144, metadata=metadata)
    write_atomically(path, content.getvalue())


def run(arguments: argparse.Namespace) -> None:
    """Run `bd3lm quality`: measure every setting of each sampler, print the table, and write the plot and the data."""
    check_quality(arguments)
    if arguments.plot is not None:
        check_matplotlib()
    model, tokenizer = load_model_and_tokenizer(arguments)
    if arguments.judge is None:
        reference = ReferenceModel(model)
        name = f"the model itself ({reference.estimator} bound)"
    else:
        options = {"device": model.device, "trust_remote_code": arguments.trust_remote_code}
        reference = load_reference_model(arguments.judge, tokenizer, **options, as_text=False, score_end=True)
        name = Path(arguments.judge).name
    curves = {
        sampler: [{field: value} for value in getattr(arguments, field)] for sampler, (field, _) in CURVES.items()
    }
    fields = {"do_sample": not arguments.greedy}
    if not arguments.greedy:
        fields |= {field: getattr(arguments, field) for field in SHARED_FIELDS}
    prompts = None
    if arguments.dataset is not None:
        size = {"length": arguments.prompt_tokens, "count": arguments.num_samples}
        prompts = text_sequences(arguments.dataset, tokenizer, split="validation", **size)
    points = []
    for point in quality_points(
        model,
        curves,
        reference,
        prompts=prompts,
        num_samples=arguments.num_samples,
        new_tokens=arguments.new_tokens,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        **fields,
    ):
        points.append(point)
        if arguments.output is not None:
            _write_points(arguments, points, name)  # if the command is stopped, finished settings are kept
    shown = ["greedy"] if arguments.greedy else [f"{field} {fields[field]:g}" for field in SHARED_FIELDS]
    print(f"judge: {name}; {len(points[0].scores)} texts per setting, {', '.join(shown)}")
    print(speed_quality_table(points))
    if arguments.plot is not None:
        plot_speed_quality(points, arguments.plot, judge=name)


def _write_points(arguments: argparse.Namespace, points: Sequence[Point], judge: str) -> None:
    rows = [{key: value for key, value in point._asdict().items() if key != "scores"} for point in points]
    names = ("model", "seed", "num_samples", "dataset", "prompt_tokens", "greedy", *SHARED_FIELDS)
    report = {"judge": judge, **{key: getattr(arguments, key) for key in names}, "points": rows}
    write_atomically(arguments.output, json.dumps(report, indent=2) + "\n")


def text_sequences(
    dataset: str, tokenizer: PreTrainedTokenizerBase, *, split: str, length: int, count: int
) -> list[list[int]]:
    """Return the token ids of `count` sequences of a split, spread over it.

    Raises:
        ValueError: if it has fewer.
    """
    if not sys.stderr.isatty():
        disable_progress_bars()
    rows = pack(load_text(dataset, split=split), tokenizer, length=length, drop_last=True)
    if len(rows) < count:
        raise ValueError(
            f"--dataset {dataset}: its {split} split has {len(rows)} sequences of {length} tokens, fewer than the "
            f"{count} requested: ask for fewer, or name a larger dataset."
        )
    return evenly_spaced(rows, count)["input_ids"][:]
