"""Print a run: a summary before the first step, and the table and `results.json` at its end."""

import itertools
import json
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import accelerate
import torch
import transformers
from accelerate.utils import broadcast_object_list
from transformers.utils import logging

import bd3lm_hf
from bd3lm_hf.data.streaming import PackedStream
from bd3lm_hf.evaluation.perplexity import HeldOutLoss, Perplexity
from bd3lm_hf.output_files import write_atomically
from bd3lm_hf.reports.training_figures import write_training_curve
from bd3lm_hf.run_folder import RESULTS_NAME
from bd3lm_hf.training.arguments import DataArguments
from bd3lm_hf.training.command_line import RunArguments
from bd3lm_hf.training.inputs import TrainingSequences
from bd3lm_hf.training.sharding import num_parameters
from bd3lm_hf.training.trainer import BD3LMTrainer


logger = logging.get_logger("bd3lm_hf.train")

_COMPARED_SEQUENCES = 100_000  # enough to notice duplicates; a corpus may have millions
_FEW_HELD_OUT = 10
_MAX_SECONDS_BEFORE = 20.0
_MAX_SHARE_BEFORE = 0.1  # of the time of training


@dataclass
class TrainResult:
    """The outcome of a run; written to `results.json` in the output folder by the main process."""

    output_dir: str
    world_size: int
    global_batch_size: int
    steps: int
    seed: int
    losses: list[dict[str, float]] = field(default_factory=list)  # the trainer's log
    held_out: str = ""  # dataset and split of the scores
    estimator: str = ""  # what the scores are: the likelihood itself, its bound, or an estimate of the bound
    before: Perplexity | HeldOutLoss | None = None
    after: Perplexity | HeldOutLoss | None = None
    unigram_perplexity: float | None = None
    text: str | None = None
    seconds: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)


# Before the first step


def summary_at_start(
    arguments: RunArguments, trainer: BD3LMTrainer, sequences: TrainingSequences, resume: str | None
) -> str:
    """Describe a run before its first step, and warn about duplicates and a tiny held-out set."""
    training, data, model = arguments.training, arguments.data, trainer.model
    parameters, trained = num_parameters(model), num_parameters(model, only_trainable=True)
    length = model.config.model_length
    batch = trainer.get_total_train_batch_size(training)
    precision = "bfloat16" if training.bf16 else "float16" if training.fp16 else "float32"
    if training.max_steps > 0:
        steps = training.max_steps
    else:
        steps = round(training.num_train_epochs * -(-len(cast(Any, sequences.train)) // batch))
    start = resume or (
        f"the weights of {arguments.model.init_from}" if arguments.model.init_from else "random weights"
    )
    lines = {
        "model": f"{model.config.model_type}, {parameters:,} parameters"
        + ("" if trained == parameters else f", {trained:,} of them trained"),
        "text": f"{data.dataset}: {_describe_training(sequences.train, length)}",
        "held out": f"{len(sequences.validation):,} sequences of {held_out_text(data)}",
        "steps": f"{steps:,} of {batch:,} sequences ({batch * length:,} tokens)",
        "device": f"{training.device}, {precision}, {training.world_size} process(es)",
        "from": start,
        "to": training.output_dir,
    }
    if len(sequences.validation) < _FEW_HELD_OUT:
        logger.warning(
            f"the held-out set has {len(sequences.validation)} sequence(s), so its perplexity is hardly more than a "
            f"guess: name more text with --validation_dataset."
        )
    return "\n".join(f"{name:<10}{text}" for name, text in lines.items())


def held_out_text(data: DataArguments) -> str:
    """Return the dataset and the split of the held-out text."""
    return data.validation_dataset or f"{data.dataset} (validation split)"


def _describe_training(rows: Any, length: int) -> str:
    if isinstance(rows, PackedStream):
        return f"a stream of sequences of {length} tokens"
    # Duplicates often come from a corpus that is read twice.
    compared = min(len(rows), _COMPARED_SEQUENCES)
    distinct = len({tuple(row["input_ids"]) for row in itertools.islice(rows, compared)})
    if distinct < compared:
        logger.warning(
            f"{compared - distinct:,} of {compared:,} training sequences are copies of others: the model sees them "
            f"more often than the rest."
        )
    of_first = "" if compared == len(rows) else f" among the first {compared:,}"
    return f"{len(rows):,} sequences of up to {length} tokens, {distinct:,} distinct{of_first}"


def score_before(trainer: BD3LMTrainer, sequences: TrainingSequences, estimator: str) -> Perplexity | HeldOutLoss:
    """Score the held-out sequences, or as many as fit into 20 s and a tenth of the run; all with `eval_on_start`.

    They are spread over the whole set, and each has the noise that it has in a score of all.
    """
    rows, args = sequences.validation, trainer.args
    count = min(len(rows), args.eval_batch_size * args.world_size)
    if not args.eval_on_start and count < len(rows):
        result = trainer.score(rows, estimator=estimator, indices=_spread(len(rows), count))
        # The first score shows how fast the model is; it decides how many more sequences fit into the budget.
        budget = min(_MAX_SECONDS_BEFORE, _MAX_SHARE_BEFORE * _training_seconds(trainer, sequences))
        decided = [max(count, min(len(rows), int(count * budget / max(result.seconds, 1e-9))))]
        broadcast_object_list(decided)  # processes measure different times
        if decided[0] == count:
            return result
        count = decided[0]
    else:
        count = len(rows)
    return trainer.score(rows, estimator=estimator, indices=_spread(len(rows), count))


def _spread(total: int, count: int) -> list[int]:
    return [i * total // count for i in range(count)]


def _training_seconds(trainer: BD3LMTrainer, sequences: TrainingSequences) -> float:
    """Estimate the time of training: a step costs about three forward passes, of which one is timed here."""
    args, model = trainer.args, trainer.model
    # A stream has no known length, and the timing below needs a likelihood: assume a long run.
    if isinstance(sequences.train, PackedStream) or not model.has_likelihood:
        return float("inf")
    batch = min(args.per_device_train_batch_size * args.world_size, len(sequences.train))
    started = time.perf_counter()
    trainer.score(sequences.train, estimator="sampled", indices=list(range(batch)))
    forward = time.perf_counter() - started
    steps: float = args.max_steps
    if steps < 1:
        steps = args.num_train_epochs * len(sequences.train) / trainer.get_total_train_batch_size(args)
    return 3 * forward * steps * args.gradient_accumulation_steps


# At the end


def report(result: TrainResult) -> None:
    """Write `results.json` and the curve, and print the table and a sample."""
    result.versions = {module.__name__: module.__version__ for module in (bd3lm_hf, torch, transformers, accelerate)}
    content = asdict(result)
    for name in ("before", "after"):
        score = getattr(result, name)
        content[name] = None if score is None else score._asdict()
    folder = Path(result.output_dir)
    write_atomically(folder / RESULTS_NAME, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    write_training_curve(result.losses, folder, title=f"{folder.name}: {result.held_out}", results=content)
    print(table(result))
    if result.text is not None:
        print(f"\nText from the saved folder:\n{result.text}")
    print(f"\n{result.steps} steps in {result.seconds:.0f} s. Model, code and tokenizer are in {result.output_dir}")


def table(result: TrainResult) -> str:
    """Return the held-out perplexity before and after training next to the unigram baseline; or the loss."""
    if isinstance(result.after, HeldOutLoss):
        return _table_of_losses(result)
    rows = [("held-out text", "perplexity", "bits/byte", "nll +- s.e.", "sequences")]
    for name, score in (("before training", result.before), ("after training", result.after)):
        if isinstance(score, Perplexity):
            bits = "" if score.bits_per_byte is None else f"{score.bits_per_byte:.3f}"
            nll = _with_error(score.nll, score.standard_error)
            rows.append((name, f"{score.perplexity:.1f}", bits, nll, f"{score.num_sequences:,}"))
    if result.unigram_perplexity is not None:
        rows.append(("unigram baseline", f"{result.unigram_perplexity:.1f}", "", "", ""))
    lines = [f"{name:<18}{ppl:>12}{bits:>12}{nll:>18}{count:>12}".rstrip() for name, ppl, bits, nll, count in rows]
    return "\n".join([*lines, f"({result.estimator}; {result.held_out})"])


def _with_error(value: float, error: float) -> str:
    return f"{value:.3f}" if math.isnan(error) else f"{value:.3f} +- {error:.3f}"


def _table_of_losses(result: TrainResult) -> str:
    lines = [f"{'held-out text':<18}{'loss +- s.e.':>18}"]
    for name, score in (("before training", result.before), ("after training", result.after)):
        if isinstance(score, HeldOutLoss):
            lines.append(f"{name:<18}{_with_error(score.loss, score.standard_error):>18}")
    lines.append(
        "No perplexity: this kind of model has no likelihood, and its loss does not compare with that of "
        "another. Score its samples with `bd3lm eval --generative`."
    )
    return "\n".join(lines)
