"""Score a dataset, or each dataset of a suite: load the sequences, estimate the likelihood, write the results."""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import PartialState
from datasets import Dataset, disable_progress_bars
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from bd3lm_hf.checkpoints import find_device, how_to_adapt
from bd3lm_hf.console import load_model_and_tokenizer
from bd3lm_hf.data.documents import find_schema, load_rows, load_text, spec_of
from bd3lm_hf.data.instructions import encode_rows
from bd3lm_hf.data.packing import bytes_per_token, evenly_spaced, pack
from bd3lm_hf.data.schemas import TextRow
from bd3lm_hf.data.sources import ENDINGS, PUBLISHED, SUITES, DatasetSpec, Flags, exists, find_spec
from bd3lm_hf.evaluation.eval_cli import FIXED_SAMPLES, check
from bd3lm_hf.evaluation.generative import check_files, evaluate_samples
from bd3lm_hf.evaluation.perplexity import Perplexity, Protocol, check_estimator, summarize
from bd3lm_hf.evaluation.reference_model import sliding_windows
from bd3lm_hf.evaluation.results import (
    FIELDS,
    ScoresFile,
    check_outputs,
    config_identity,
    data_identity,
    describe_estimator,
    digest,
    library_versions,
    markdown,
    score_shared,
    tokenizer_identity,
    weights_digest,
    write_results,
)
from bd3lm_hf.user_files import lock_output


logger = logging.get_logger("bd3lm_hf.evaluation")

_OUR_FLAGS = Flags(packing="contiguous", insert_special=False)


class Target(NamedTuple):
    """A dataset to score."""

    name: str
    source: str | None  # overrides the source in the table of datasets
    flags: Flags


class ScoringSequences(NamedTuple):
    """The sequences of a dataset to score."""

    rows: Any  # a sequence of mappings with `input_ids` and optional `labels`
    bytes_per_token: float | None  # None if they are not running text
    about: dict[str, Any]  # the split, and how it was cut into sequences


def run(arguments: argparse.Namespace) -> None:
    """Run `bd3lm eval`: score datasets, or generated text."""
    check(arguments)
    if arguments.generative:
        check_files(arguments)
        evaluate_samples(arguments, *load_model_and_tokenizer(arguments))
        return
    # Unknown datasets and outputs that cannot be written are refused before a model is loaded.
    targets = _targets(arguments)
    check_outputs(arguments.output, overwrite=arguments.overwrite)
    processes = PartialState(cpu=find_device(arguments.device).type == "cpu")
    # Moving from cpu to cpu:0 would copy the weights to other addresses, which changes the rounding of products.
    if processes.num_processes > 1 and processes.device.type != "cpu":
        arguments.device = processes.device  # each has its own
    file = None
    with ExitStack() as stack:
        if arguments.output and processes.is_main_process:
            path = arguments.output[0].with_suffix(".scores.jsonl")
            stack.enter_context(lock_output(path, "--output"))
            file = ScoresFile(path, restart=arguments.restart)
        score_datasets(targets, arguments, *load_model_and_tokenizer(arguments), file)


def score_datasets(
    targets: list[Target],
    arguments: argparse.Namespace,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    file: ScoresFile | None,
) -> None:
    """Score datasets; the first process prints and writes the results.

    1. Check that the model supports the estimator.
    2. Load the sequences of every dataset, so a missing dataset is reported before any is scored.
    3. Score, and print each result.
    4. Write the results.
    """
    # 1. The model
    check_likelihood(model, arguments.model)
    try:
        check_estimator(model, arguments.estimator, arguments.num_samples or 1)
    except ValueError as error:
        raise ValueError(f"--estimator {arguments.estimator} does not fit: {error}") from error
    if not sys.stderr.isatty():
        disable_progress_bars()
    processes = PartialState()
    is_first = processes.is_main_process
    # 2. The sequences
    length = arguments.length or model.config.model_length
    if is_first and arguments.window is None and length > model.config.model_length:
        logger.warning(
            f"--length {length} is longer than the model's window of {model.config.model_length} tokens: "
            f"tokens attend to the whole sequence. Pass --window {model.config.model_length} to score windows."
        )
    with processes.local_main_process_first():
        loaded = _load(targets, arguments, model, tokenizer, length)
    # 3. The scores
    about = _about_model(arguments, model, tokenizer) | {"length": length, "processes": processes.num_processes}
    results = []
    for target, sequences in zip(targets, loaded, strict=True):
        score, data_hash = _score(arguments, model, sequences, about, file)
        result = {"dataset": target.name, **sequences.about, **about, **data_hash, **score._asdict()}
        results.append({name: result.get(name) for name in FIELDS})
        if is_first and arguments.suite is None:
            print(_table(score, result))
    if not is_first:
        return
    # 4. The results
    if arguments.suite is not None:
        print(f"sequences of {length} tokens (the paper: {SUITES[arguments.suite].length})")
        print(markdown(results))
    for path in arguments.output:
        write_results(path, results, arguments.suite)


def check_likelihood(model: Any, name: str) -> None:
    """Refuse a model without a likelihood."""
    if not hasattr(model, "token_nll"):
        raise ValueError(
            f"--model {name} is a {type(model).__name__} without token_nll, which bd3lm eval needs. "
            f"{how_to_adapt(name)}"
        )
    if not model.has_likelihood:
        raise ValueError(
            f"--model {name} is a {type(model).__name__}, which has no likelihood: score the text that it generates "
            f"with bd3lm eval --generative."
        )


# The datasets and their sequences


def _targets(arguments: argparse.Namespace) -> list[Target]:
    """Return the datasets to score.

    Raises:
        ValueError: if a name is unknown (with the nearest known one), or copies are missing (with all of them).
    """
    if arguments.suite is None:
        name = spec_of(arguments.dataset).name
        base = PUBLISHED.get(name, Flags()) if arguments.estimator == "published" else _OUR_FLAGS
        return [Target(arguments.dataset, arguments.dataset_source, _flags(arguments, base))]
    sets = SUITES[arguments.suite].sets
    names = [find_spec(name).name for name in arguments.sets or sets]
    foreign = [name for name in names if name not in sets]
    if foreign:
        raise ValueError(f"--sets {' '.join(foreign)}: the datasets of {arguments.suite} are {', '.join(sets)}.")
    folder = arguments.suite_source
    copies = {name: None if folder is None else _copy(folder, name) for name in names}
    missing = [name for name, path in copies.items() if path is None and folder is not None]
    if missing:
        raise ValueError(
            f"--suite-source {folder} has no copy of {', '.join(missing)}: add a folder of that name, or a file of "
            f"that name with one of the endings {', '.join(ENDINGS)}. Or score only the others with --sets."
        )
    return [Target(name, copies[name], _flags(arguments, sets[name])) for name in names]


def _copy(folder: Path, name: str) -> str | None:
    candidates = [folder / name, *(folder / f"{name}{ending}" for ending in ENDINGS)]
    return next((str(path) for path in candidates if path.exists()), None)


def _flags(arguments: argparse.Namespace, base: Flags) -> Flags:
    """Return `base`, overridden by the flags that the user set."""
    chosen = {name: getattr(arguments, name, None) for name in Flags._fields}
    return base._replace(**{name: value for name, value in chosen.items() if value is not None})


def _load(
    targets: list[Target], arguments: argparse.Namespace, model: Any, tokenizer: PreTrainedTokenizerBase, length: int
) -> list[ScoringSequences]:
    loaded, reasons = [], []
    for target in targets:
        try:
            loaded.append(_sequences(target, arguments, model, tokenizer, length))
        except ValueError as error:
            if len(targets) == 1:
                raise
            reasons.append(f"{target.name} ({error})")
    if reasons:
        raise ValueError(
            f"Cannot load {len(reasons)} of the {len(targets)} datasets in suite {arguments.suite}; nothing was "
            f"scored. Use --sets to score the others. {'; '.join(reasons)}"
        )
    return loaded


def _sequences(
    target: Target, arguments: argparse.Namespace, model: Any, tokenizer: PreTrainedTokenizerBase, length: int
) -> ScoringSequences:
    """Load one dataset. Of prompts with completions and of messages, only the model's part is scored."""
    flags = target.flags
    source = {"config_name": arguments.dataset_config, "source": target.source}
    options = {"split": flags.split, "skip_bad_rows": arguments.skip_bad_rows, **source}
    dataset: str | DatasetSpec = target.name
    # A file that replaces a dataset of the table is the split to score.
    if target.source is not None and Path(target.source).is_file() and not exists(target.name):
        spec = find_spec(target.name)
        dataset = replace(spec, splits={flags.split: "train"}) if spec.splits else spec
    schema = TextRow() if arguments.text_column else find_schema(dataset, **source)
    if not isinstance(schema, TextRow):
        block_size = model.config.block_size
        examples = load_rows(dataset, schema, **options)
        rows = encode_rows(examples, schema, tokenizer, length=length, block_size=block_size)
        return ScoringSequences(_select(rows, arguments), None, {"split": flags.split})
    documents = load_text(dataset, text_column=arguments.text_column, **options)
    packed = pack(documents, tokenizer, length=length, **{k: v for k, v in flags._asdict().items() if k != "split"})
    size = bytes_per_token(documents, tokenizer, insert_eos=flags.insert_eos)
    # All tokens but the first of a sequence are scored, and the end token that packing added has no bytes.
    text_share = (length - 2) / (length - 1) if flags.insert_special else 1.0
    return ScoringSequences(_select(packed, arguments), size * text_share, flags._asdict())


def _select(rows: Dataset, arguments: argparse.Namespace) -> Any:
    """Return at most `--max-sequences` rows, evenly spaced, cut into windows if `--window` is set."""
    rows = evenly_spaced(rows, arguments.max_sequences)
    if arguments.window is None:
        return rows
    return [window for row in rows for window in split_into_windows(row, arguments.window)]


def split_into_windows(row: Mapping[str, Sequence[int]], size: int) -> Iterator[dict[str, list[int]]]:
    """Yield windows of at most `size` tokens that move by half of it; each token is scored once."""
    for begin, end, first in sliding_windows(len(row["input_ids"]), size):
        window = {name: list(row[name][begin:end]) for name in ("input_ids", "attention_mask")}
        yield {**window, "labels": [-100] * (first - begin) + list(row["labels"][first:end])}


# Scores and results


def _about_model(arguments: argparse.Namespace, model: Any, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the part of a result that is the same for all datasets."""
    names = ("model", "suite", "seed", "batch_size", "max_sequences")
    is_exact = model.exact_likelihood
    # An autoregressive model is always exact, but the published protocol changes more than the estimate.
    estimator = "exact" if is_exact and arguments.estimator != "published" else arguments.estimator
    return {
        **{name: getattr(arguments, name) for name in names},
        "estimator": estimator,
        "num_samples": None if estimator in FIXED_SAMPLES else arguments.num_samples or 1,
        "bound": not is_exact,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "model_class": type(model).__name__,
        "config_sha256": digest(config_identity(model.config)),
        "weights_sha256": weights_digest(model),
        "tokenizer_sha256": digest(tokenizer_identity(tokenizer)),
        **library_versions(),
    }


# The fields of a result that determine the scores.
_SCORE_FIELDS = (
    *("model_class", "config_sha256", "weights_sha256", "dtype", "tokenizer_sha256", "length"),
    *("estimator", "num_samples", "seed"),
)


def _score(
    arguments: argparse.Namespace,
    model: Any,
    sequences: ScoringSequences,
    about: Mapping[str, Any],
    file: ScoresFile | None,
) -> tuple[Perplexity, dict[str, Any]]:
    """Return the result of one dataset, and the hash of its sequences."""
    data_hash = {"data_sha256": digest(data_identity(sequences.rows))}
    count = len(sequences.rows)
    progress = score_shared(
        model,
        sequences.rows,
        Protocol(arguments.estimator, arguments.num_samples or 1, arguments.seed, count),
        batch_size=arguments.batch_size,
        identity={**{name: about[name] for name in _SCORE_FIELDS}, **data_hash, "sequences": count},
        file=file,
        progress=PartialState().is_main_process,
    )
    scores = progress.scores.values()
    return summarize(scores, bytes_per_token=sequences.bytes_per_token, seconds=progress.seconds), data_hash


def _table(score: Perplexity, about: Mapping[str, Any]) -> str:
    kind = describe_estimator(about["estimator"], about["num_samples"], bound=about["bound"])
    rows = [
        ("perplexity", f"{score.perplexity:.4f} ({kind})"),
        ("nats per token", f"{score.nll:.5f} +- {score.standard_error:.5f}"),
        ("bits per token", f"{score.bits_per_token:.5f}"),
        ("bits per byte", "unknown" if score.bits_per_byte is None else f"{score.bits_per_byte:.5f}"),
        ("scored tokens", f"{score.num_tokens} in {score.num_sequences} sequences"),
        ("dataset", f"{about['dataset']}, split {about['split']}"),
        ("seconds", f"{score.seconds:.1f}"),
    ]
    return "\n".join(f"{name:<16}{value}" for name, value in rows)
