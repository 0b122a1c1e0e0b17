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

import numpy as np
from datasets import disable_progress_bars
from transformers import PreTrainedTokenizerBase

from bd3lm_hf.argument_parser import load_model_and_tokenizer
from bd3lm_hf.data import load_text, pack
from bd3lm_hf.data.packing import evenly_spaced
from bd3lm_hf.evaluation.generative import mean_entropy
from bd3lm_hf.evaluation.perplexity import SequenceScore, summarize
from bd3lm_hf.evaluation.reference_model import ReferenceModel, load_reference_model, reference_model_of
from bd3lm_hf.generation.text_generation import generate_texts
from bd3lm_hf.printing import markdown_table, progress_bar
from bd3lm_hf.reports.figures import (
    FACE,
    GRID,
    INK,
    MARKERS,
    Figure,
    add_legend,
    check_matplotlib,
    dress,
    line_style,
    new_drawing,
    plain_label,
    plain_ticks,
)
from bd3lm_hf.reports.reports_cli import CURVES, SHARED_FIELDS, check_quality
from bd3lm_hf.reports.run_reader import Named, finite
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
    progress: bool = False,
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
        ValueError: if the model has no samplers, a text is longer than its window, or there are too few texts for a
            standard error.
    """
    if not hasattr(model.generation_config, "output_trace"):
        raise ValueError(f"a {type(model).__name__} has no samplers to compare: name a block-diffusion model.")
    if prompts is None:
        prompts = [[model.generation_config.bos_token_id]] * num_samples
    if len(prompts) < 2:
        raise ValueError(f"{len(prompts)} texts give no standard error: ask for at least 2.")
    num_given = len(prompts[0])
    room = model.config.model_length - num_given
    if room < 1:
        raise ValueError(
            f"prompts of {num_given} tokens fill the model's window of {model.config.model_length}: give shorter ones "
            f"(--prompt-tokens)."
        )
    new_tokens = room if new_tokens is None else new_tokens
    if not 0 < new_tokens <= room:
        raise ValueError(f"new_tokens={new_tokens}: after {num_given} tokens the model's window has room for {room}.")
    settings = [(sampler, dict(setting)) for sampler, settings in curves.items() for setting in settings]
    batches: dict[str, Any] = {"batch_size": batch_size, "seed": seed}
    with progress_bar("quality", len(settings), unit="setting", disable=not progress) as bar:
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
            ", ".join(f"{name} {value}" for name, value in point.setting.items() if value is not None) or "default",
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
    check_matplotlib()
    title = f"quality against speed: {len(points[0].scores)} samples per setting"
    drawing = draw_speed_quality([point._asdict() for point in points], judge, title)
    kind = path.suffix.lower().removeprefix(".")
    content = io.BytesIO()
    # The command recognises its own files by their author.
    metadata = {"Software" if kind == "png" else "Creator": "bd3lm_hf"}
    drawing.savefig(content, format=kind, dpi=144, metadata=metadata)
    write_atomically(path, content.getvalue())


def speed_quality_figure(named: Named, number: int) -> Figure | None:
    """Draw generative perplexity and entropy against tokens per forward pass, one curve per sampler."""
    points = [point for point in named.content["points"] if finite(point, "perplexity") is not None]
    if not points:
        return None
    caption = (
        f"{named.name}: the cost of generating several tokens at once. Bars are one standard error; lower is better."
    )
    return Figure(f"quality-{number}", caption, draw_speed_quality(points, named.content["judge"], named.name))


def draw_speed_quality(points: Sequence[Mapping[str, Any]], reference: str, title: str) -> Any:
    """Return a drawing of generative perplexity (log axis) and, if it was measured, of entropy below it.

    Args:
        points: measurements, as in a result file of `bd3lm quality`.
        reference: name of the reference model.
    """
    entropies = [finite(point, "entropy") for point in points]
    with_entropy = any(entropy is not None for entropy in entropies)
    width, height = FACE
    drawing = new_drawing(width, height * (1.5 if with_entropy else 1))
    grid = drawing.subplots(1 + with_entropy, 1, sharex=True, squeeze=False, height_ratios=(2, 1)[: 1 + with_entropy])
    axes = grid[0, 0]
    first = points[0]["perplexity"]
    axes.axhspan(first, 1.05 * first, color=GRID, alpha=0.6, zorder=0, label="within 5 % of the first point")
    for index, sampler in enumerate(dict.fromkeys(point["sampler"] for point in points)):
        mine = [point for point in points if point["sampler"] == sampler]
        style = {**line_style(index), "marker": MARKERS[index % len(MARKERS)], "markersize": 5}
        tokens = [point["tokens_per_forward"] for point in mine]
        axes.errorbar(
            tokens,
            [point["perplexity"] for point in mine],
            yerr=[point["perplexity"] * (finite(point, "standard_error") or 0.0) for point in mine],
            capsize=3,
            label=plain_label(sampler),
            **style,
        )
        if with_entropy:
            entropy = [np.nan if (value := finite(point, "entropy")) is None else value for point in mine]
            grid[1, 0].plot(tokens, entropy, **style)
    axes.set_yscale("log")
    plain_ticks(axes.yaxis)
    axes.set_ylabel(f"generative perplexity\nunder {plain_label(reference)}")
    axes.set_title(plain_label(title), loc="left", fontsize=11, color=INK)
    for each in grid[:, 0]:
        dress(each)
        each.margins(x=0.08)
    if with_entropy:
        grid[1, 0].set_ylabel("entropy (nats)")
    grid[-1, 0].set_xlabel("tokens per forward pass")
    add_legend(axes)
    return drawing


def run(arguments: argparse.Namespace) -> None:
    """Run `bd3lm quality`: measure every setting of each sampler, print the table, and write the plot and the data."""
    check_quality(arguments)
    if arguments.plot is not None:
        check_matplotlib()
    model, tokenizer = load_model_and_tokenizer(arguments)
    if arguments.judge is None:
        reference = reference_model_of(model)
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
    points = []
    for point in quality_points(
        model,
        curves,
        reference,
        prompts=_prompts(arguments, tokenizer),
        num_samples=arguments.num_samples,
        new_tokens=arguments.new_tokens,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        progress=True,
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


def _prompts(arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> list[list[int]] | None:
    """Return the beginnings of held-out sequences, spread over the dataset."""
    if arguments.dataset is None:
        return None
    if not sys.stderr.isatty():
        disable_progress_bars()
    rows = pack(load_text(arguments.dataset, split="validation"), tokenizer, length=arguments.prompt_tokens)
    if len(rows) < arguments.num_samples:
        raise ValueError(
            f"--num-samples {arguments.num_samples}: the dataset has {len(rows)} sequences of "
            f"{arguments.prompt_tokens} tokens; ask for fewer."
        )
    return [list(row["input_ids"]) for row in evenly_spaced(rows, arguments.num_samples)]
