"""Quality over forwards: generative perplexity of texts by how many tokens a sampler writes per pass of the network.

A sampler that reveals several tokens in one pass draws them as if they were independent. What that costs is measured
by a judge, a language model that scores the texts; how varied they stay, by the entropy of their tokens.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from bd3lm_hf.data import load_text, pack
from bd3lm_hf.evaluation.perplexity import SequenceScore, summarize
from bd3lm_hf.evaluation.reference_model import ReferenceModel, load_reference_model, reference_model_of
from bd3lm_hf.evaluation.text_metrics import mean_entropy
from bd3lm_hf.generation.generate_cli import FIELDS, whole_number
from bd3lm_hf.generation.text_generation import GeneratedText, generate_batch
from bd3lm_hf.output_files import check_output_file
from bd3lm_hf.reports.plotting import check_matplotlib, draw_speed_quality
from bd3lm_hf.seeds import derived_seed


#: The field that makes a sampler bolder, and its values by default: one token per forward first.
CURVES: dict[str, tuple[str, tuple[float | None, ...]]] = {
    "first_hitting": ("num_denoising_steps", (None, 2, 1)),
    "confidence": ("confidence_threshold", (1.0, 0.9, 0.7, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01, 0.003, 0.0)),
    "entropy_bound": ("entropy_bound", (0.0, 1.0, 2.0, 4.0, 8.0)),
}


_PICTURES = (".png", ".svg", ".pdf")


#: Fields that are the same for all settings.
_SHARED = ("temperature", "nucleus_p")


class Point(NamedTuple):
    """How good and how fast the texts of one setting are."""

    sampler: str
    setting: dict[str, Any]  # fields of the generation config
    tokens_per_forward: float  # of a text that is written alone
    perplexity: float  # generative: exp of the mean nll under the judge
    standard_error: float  # of the log of the perplexity
    entropy: float  # of the token frequencies within a text, nats, mean over texts
    seconds: float
    scores: list[SequenceScore]


class Ratio(NamedTuple):
    """A perplexity over another one."""

    value: float
    standard_error: float  # of the value


def quality_curve(
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
) -> list[Point]:
    """Write texts with each setting of each sampler, and score them.

    All texts have the same length: an end token does not end them, as in packed training text.

    Args:
        curves: sampler -> fields of `generate`, from the most cautious setting on.
        prompts: token ids to continue, all of one length, a text for each; by default `num_samples` texts from
            nothing.
        new_tokens: of a text; by default as many as fit into the model's window.
        generation: further fields of `generate`, the same for all.

    Raises:
        ValueError: a model without samplers, a text longer than its window, or too few texts for a standard error.
    """
    if not hasattr(model.generation_config, "output_trace"):
        raise ValueError(f"a {type(model).__name__} has no samplers to compare: name a block-diffusion model.")
    window = model.config.model_length
    if prompts is None:
        prompts = [[model.generation_config.bos_token_id]] * num_samples
    room = window - len(prompts[0]) if prompts else 0
    new_tokens = room if new_tokens is None else new_tokens
    if not 0 < new_tokens <= room:
        raise ValueError(
            f"new_tokens={new_tokens}: behind {window - room} tokens the model's window has room for {room}."
        )
    if len(prompts) < 2:
        raise ValueError(f"{len(prompts)} texts give no standard error: ask for at least 2.")
    wanted = [(sampler, dict(setting)) for sampler, settings in curves.items() for setting in settings]
    points = []
    for sampler, setting in tqdm(wanted, desc="settings", disable=not progress, leave=False):
        fields = {**generation, **{name: value for name, value in setting.items() if value is not None}}
        started = time.perf_counter()
        texts = _texts(model, prompts, new_tokens, batch_size, seed, sampler=sampler, **fields)
        seconds = time.perf_counter() - started
        scores = judge.score(texts, seed=seed, batch_size=batch_size)
        result = summarize(scores)
        entropy = mean_entropy([text.written for text in texts])
        speed = len(texts) * new_tokens / sum(text.forwards for text in texts)
        points.append(
            Point(sampler, setting, speed, result.perplexity, result.standard_error, entropy, seconds, scores)
        )
    return points


def _texts(
    model: Any, prompts: Sequence[list[int]], new_tokens: int, batch_size: int, seed: int, **fields: Any
) -> list[GeneratedText]:
    """A text for each prompt, which the seed and its number decide."""
    texts: list[GeneratedText] = []
    for first in range(0, len(prompts), batch_size):
        given = prompts[first : first + batch_size]
        seeds = [derived_seed(seed, first + number) for number in range(len(given))]
        texts += generate_batch(model, given, new_tokens, seeds=seeds, **fields)
    return texts


def compare_curves(point: Point, baseline: Point) -> Ratio:
    """The perplexity of a point over that of a baseline with as many texts.

    The error is that of the difference of two ratio estimates over pairs of texts, sqrt(n / (n - 1) sum_i d_i^2) with
    d_i = (nll_i - nll m_i) / sum m - (the same of the baseline), to first order.
    """
    residuals = []
    for one in (point, baseline):
        total, mean = sum(score.num_tokens for score in one.scores), math.log(one.perplexity)
        residuals.append([(score.nll - mean * score.num_tokens) / total for score in one.scores])
    count, value = len(point.scores), point.perplexity / baseline.perplexity
    spread = math.fsum((mine - theirs) ** 2 for mine, theirs in zip(*residuals, strict=True))
    return Ratio(value, value * math.sqrt(count / (count - 1) * spread))


def speed_quality_table(points: Sequence[Point]) -> str:
    """Markdown; the first point of all, and the first of each sampler, are what the others are compared with."""
    lines = [
        "| sampler | setting | tokens per forward | perplexity | over the first row | over its sampler's first "
        "| entropy |",
        "|---|---|---|---|---|---|---|",
    ]
    firsts: dict[str, Point] = {}
    for point in points:
        first = firsts.setdefault(point.sampler, point)
        ratios = [compare_curves(point, points[0]), compare_curves(point, first)]
        told = [f"{ratio.value:.3f} +- {ratio.standard_error:.3f}" for ratio in ratios]
        error = point.perplexity * point.standard_error
        lines.append(
            f"| {point.sampler} | {label(point)} | {point.tokens_per_forward:.2f} | {point.perplexity:.2f} +- "
            f"{error:.2f} | {told[0]} | {told[1]} | {point.entropy:.2f} |"
        )
    return "\n".join(lines)


def label(point: Point) -> str:
    """The setting in words."""
    return ", ".join(f"{name} {value}" for name, value in point.setting.items() if value is not None) or "default"


def plot_speed_quality(points: Sequence[Point], path: Path, *, judge: str) -> None:
    """Draw generative perplexity and entropy over the tokens of a forward pass, a curve per sampler.

    Raises:
        ValueError: if matplotlib is not installed.
    """
    check_matplotlib()
    drawing = draw_speed_quality([point._asdict() for point in points], judge, "speed and quality of the samplers")
    drawing.savefig(path, dpi=144)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `bd3lm quality`, without those that every verb has."""
    parser.add_argument("--judge", help="folder or hub name of the model that scores the texts; by default the writer")
    parser.add_argument("--num-samples", type=whole_number(2), default=64, help="texts per setting")
    parser.add_argument("--dataset", help="held-out text whose beginnings are continued; by default from nothing")
    parser.add_argument("--prompt-tokens", type=whole_number(1), default=32, help="length of such a beginning")
    parser.add_argument("--new-tokens", type=whole_number(1), help="of a text; by default the model's window")
    parser.add_argument("--batch-size", type=whole_number(1), default=16)
    parser.add_argument("--greedy", action="store_true", help="take the most likely tokens; needs --dataset")
    for name in _SHARED:
        kind, text = FIELDS[name]
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=1.0, help=text)
    for sampler, (name, values) in CURVES.items():
        text = f"for {sampler}, the most cautious first ({' '.join(str(v) for v in values if v is not None)})"
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=FIELDS[name][0], nargs="*", default=list(values), help=text
        )
    parser.add_argument("--plot", type=Path, help="picture of the curves (.png, .svg or .pdf)")
    parser.add_argument("--output", type=Path, help="JSON file for the points")


def check(arguments: argparse.Namespace) -> None:
    """Refuse what can not be done, before a model is loaded.

    Raises:
        ValueError: names the argument and the remedy.
    """
    if arguments.greedy and arguments.dataset is None:
        raise ValueError("--greedy writes the same text again and again from nothing: name a --dataset to continue.")
    for name in ("plot", "output"):
        if getattr(arguments, name) is not None:
            check_output_file(getattr(arguments, name), f"--{name}")
    if arguments.plot is not None:
        check_matplotlib()
        if arguments.plot.suffix.lower() not in _PICTURES:
            raise ValueError(f"--plot {arguments.plot}: a picture's name ends in one of {', '.join(_PICTURES)}.")


def run(arguments: argparse.Namespace, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Measure, print the table, write picture and data."""
    judge, name = _judge(arguments, model, tokenizer)
    curves = {
        sampler: [{field: value} for value in getattr(arguments, field)] for sampler, (field, _) in CURVES.items()
    }
    how = {"do_sample": False} if arguments.greedy else {name: getattr(arguments, name) for name in _SHARED}
    points = quality_curve(
        model,
        curves,
        judge,
        prompts=_prompts(arguments, tokenizer),
        num_samples=arguments.num_samples,
        new_tokens=arguments.new_tokens,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        progress=sys.stderr.isatty(),
        **{"do_sample": True, **how},
    )
    told = ["greedy"] if arguments.greedy else [f"{name} {value:g}" for name, value in how.items()]
    print(f"judge: {name}; {len(points[0].scores)} texts per setting, {', '.join(told)}")
    print(speed_quality_table(points))
    if arguments.plot is not None:
        plot_speed_quality(points, arguments.plot, judge=name)
    if arguments.output is not None:
        rows = [{key: value for key, value in point._asdict().items() if key != "scores"} for point in points]
        names = ("model", "seed", "dataset", "prompt_tokens", "greedy", *_SHARED)
        report = {"judge": name, **{key: getattr(arguments, key) for key in names}, "points": rows}
        arguments.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _prompts(arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> list[list[int]] | None:
    """Beginnings of held-out sequences, spread over the data set."""
    if arguments.dataset is None:
        return None
    rows = pack(load_text(arguments.dataset, split="validation"), tokenizer, length=arguments.prompt_tokens)
    if len(rows) < arguments.num_samples:
        raise ValueError(
            f"--num-samples {arguments.num_samples}: the data set has {len(rows)} sequences of "
            f"{arguments.prompt_tokens} tokens; ask for fewer."
        )
    return [
        list(rows[number * len(rows) // arguments.num_samples]["input_ids"]) for number in range(arguments.num_samples)
    ]


def _judge(
    arguments: argparse.Namespace, model: Any, tokenizer: PreTrainedTokenizerBase
) -> tuple[ReferenceModel, str]:
    if arguments.judge is None:
        judge = reference_model_of(model)
        return judge, f"the model itself ({judge.estimator} bound)"
    how = {"device": model.device, "trust_remote_code": arguments.trust_remote_code}
    judge = load_reference_model(arguments.judge, tokenizer, **how, as_text=False, score_end=True)
    return judge, Path(arguments.judge).name


__all__ = ["CURVES", "Point", "Ratio", "compare_curves", "plot_speed_quality", "quality_curve", "speed_quality_table"]
