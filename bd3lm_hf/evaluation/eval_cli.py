"""`bd3lm eval`: how well a model predicts a data set, or each set of a suite; its flags, its checks and its work."""

import argparse
import os
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from bd3lm_hf.data.documents import find_schema, load_rows, load_text
from bd3lm_hf.data.instructions import encode_rows
from bd3lm_hf.data.packing import PACKINGS, bytes_per_token, evenly_spaced, pack
from bd3lm_hf.data.schemas import TextRow
from bd3lm_hf.data.sources import ENDINGS, SUITES, Flags, exists, find_spec, published_flags
from bd3lm_hf.evaluation.perplexity import Perplexity, Protocol, check_estimator, summarize
from bd3lm_hf.evaluation.results import (
    FIELDS,
    Processes,
    ScoresFile,
    check_outputs,
    config_identity,
    data_identity,
    digest,
    library_versions,
    markdown,
    score_shared,
    tokenizer_identity,
    weights_digest,
    write_results,
)
from bd3lm_hf.generation.generate_cli import whole_number


#: Estimators, and what they are.
ESTIMATORS: Mapping[str, str] = {
    "stratified": "ours: unbiased, low variance (default)",
    "exact": "all masks of each block, up to blocks of 8",
    "sampled": "the paper's draw, for each sequence on its own",
    "published": "the paper's protocol, with the data set's published flags (default of a suite)",
}


#: What the estimators that take no number of draws say to one.
_FIXED_DRAWS = {"exact": "draws no noise", "published": "is one draw of noise"}


#: How texts are cut for the estimators that have a way of their own.
_FLAGS = {"published": published_flags}


_OURS = Flags(packing="contiguous", insert_special=False)


#: What a suite decides for each of its sets.
_OF_A_DATASET = ("dataset", "dataset_config", "dataset_source", "text_column", "split")


_OF_A_SUITE = ("suite_source", "sets")


class Target(NamedTuple):
    """A data set to score."""

    name: str
    source: str | None  # to read in place of the table's
    flags: Flags


class ScoringSequences(NamedTuple):
    """What is scored of a data set."""

    rows: Dataset
    bytes_per_token: float | None  # None where they are no running text
    about: dict[str, Any]  # the split and how it was cut


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `bd3lm eval`, without those that every verb has."""
    what = parser.add_argument_group("what is scored")
    what.add_argument("--dataset", help="name, file, folder or hub name")
    what.add_argument("--split", help="train, validation (default) or test")
    what.add_argument("--dataset-config", help="configuration of a hub data set")
    what.add_argument("--dataset-source", help="file, folder or hub name to read in place of the table's source")
    what.add_argument("--text-column", help="column of the text, where it is not obvious")
    what.add_argument("--skip-bad-rows", action="store_true", help="skip rows that can not be read, with a warning")
    told = "; ".join(f"{name}: {suite.about}" for name, suite in SUITES.items())
    what.add_argument("--suite", choices=tuple(SUITES), help=f"several data sets in one table ({told})")
    what.add_argument("--sets", nargs="+", metavar="NAME", help="of the suite, these sets only")
    what.add_argument("--suite-source", type=Path, help="folder of local copies: a folder or file for each set")
    what.add_argument(
        "--packing", choices=tuple(PACKINGS), help="how sequences are cut (contiguous, unless published)"
    )
    what.add_argument("--insert-eos", action=argparse.BooleanOptionalAction, default=None, help="end documents (yes)")
    what.add_argument(
        *("--insert-special",),
        action=argparse.BooleanOptionalAction,
        default=None,
        help="put begin and end token around sequences (no, unless published)",
    )
    what.add_argument("--length", type=whole_number(1), help="tokens of a sequence; the model's own length by default")
    what.add_argument("--max-sequences", type=whole_number(1), help="at most so many, spread over the data set")
    how = parser.add_argument_group("how")
    told = "; ".join(f"{name}: {about}" for name, about in ESTIMATORS.items())
    how.add_argument("--estimator", choices=tuple(ESTIMATORS), help=told)
    how.add_argument("--num-samples", type=whole_number(1), help="noise draws per sequence (1)")
    how.add_argument("--batch-size", type=whole_number(1), default=8)
    where = parser.add_argument_group("results")
    where.add_argument(
        *("--output",),
        type=Path,
        nargs="+",
        default=[],
        help="files: .json is replaced, .csv and .md get a row for each data set; the scores of sequences are kept "
        "beside the first (NAME.scores.jsonl), and a run that was interrupted goes on from them",
    )
    where.add_argument("--restart", action="store_true", help="drop the scores that are kept, and begin anew")


def check(arguments: argparse.Namespace) -> None:
    """Refuse what can not be done before a model is loaded, fill in what was left open, and join the processes.

    Raises:
        ValueError: names the argument and the remedy.
    """
    suite = arguments.suite is not None
    if suite == (arguments.dataset is not None):
        raise ValueError("name what to score: either a --dataset or a --suite.")
    for name in _OF_A_DATASET if suite else _OF_A_SUITE:
        if getattr(arguments, name) is not None:
            flag, other = f"--{name.replace('_', '-')}", "--dataset" if suite else "--suite"
            raise ValueError(f"{flag} goes with {other}: leave it out.")
    if arguments.estimator is None:
        arguments.estimator = "published" if suite else next(iter(ESTIMATORS))
    if arguments.num_samples not in (None, 1) and arguments.estimator in _FIXED_DRAWS:
        raise ValueError(
            f"--num-samples {arguments.num_samples}: --estimator {arguments.estimator} "
            f"{_FIXED_DRAWS[arguments.estimator]}; leave the number out, or use --estimator stratified."
        )
    _targets(arguments)
    check_outputs(arguments.output)
    if arguments.restart and not arguments.output:
        raise ValueError("--restart drops the scores beside a result: name it with --output.")
    if arguments.output:
        ScoresFile(_scores_path(arguments), restart=arguments.restart)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        state = PartialState(cpu=arguments.device.type == "cpu")
        # A move from cpu to cpu:0 copies the weights, to other addresses, where products round otherwise.
        arguments.device = arguments.device if state.device.type == "cpu" else state.device


def run(arguments: argparse.Namespace, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Score, print the results and write them; with several processes the first one does."""
    check_likelihood(model, arguments.model)
    check_estimator(model, arguments.estimator, arguments.num_samples or 1)
    processes = _processes()
    targets, length = _targets(arguments), arguments.length or model.config.model_length
    with PartialState().local_main_process_first() if processes.size > 1 else nullcontext():
        texts = _load(targets, arguments, model, tokenizer, length)
    first = processes.rank == 0
    file = ScoresFile(_scores_path(arguments), restart=arguments.restart) if arguments.output and first else None
    about = _about_model(arguments, model, tokenizer) | {"length": length, "processes": processes.size}
    rows = []
    for target, text in zip(targets, texts, strict=True):
        result, of_data = _score(arguments, model, text, about, file, processes)
        row = {"dataset": target.name, **text.about, **about, **of_data, **result._asdict()}
        rows.append({name: row.get(name) for name in FIELDS})
        if first and arguments.suite is None:
            print(_table(result, row))
    if not first:
        return
    if arguments.suite is not None:
        print(f"sequences of {length} tokens; the paper's have {SUITES[arguments.suite].length}")
        print(markdown(rows))
    for path in arguments.output:
        write_results(path, rows, arguments.suite)


def check_likelihood(model: Any, name: str) -> None:
    """Refuse a model that has no likelihood.

    Raises:
        ValueError: says what can be measured instead.
    """
    if not hasattr(model, "token_nll"):
        raise ValueError(f"--model {name} is a {type(model).__name__}, which this package can not score.")
    if not model.has_likelihood:
        raise ValueError(
            f"--model {name} is a {type(model).__name__}, which has no likelihood: judge what it writes with "
            f"bd3lm eval --generative."
        )


def _processes() -> Processes:
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes()
    state = PartialState()
    return Processes(state.process_index, state.num_processes)


def _scores_path(arguments: argparse.Namespace) -> Path:
    first: Path = arguments.output[0]
    return first.with_suffix(".scores.jsonl")


def _targets(arguments: argparse.Namespace) -> list[Target]:
    """The data sets to score, whose names are known.

    Raises:
        ValueError: an unknown name (with the nearest), or copies that are missing, all at once.
    """
    if arguments.suite is None:
        name = arguments.dataset if exists(arguments.dataset) else find_spec(arguments.dataset).name
        base = _FLAGS.get(arguments.estimator, lambda name: _OURS)(name)
        return [Target(arguments.dataset, arguments.dataset_source, _flags(arguments, base))]
    sets = SUITES[arguments.suite].sets
    names = [find_spec(name).name for name in arguments.sets or sets]
    foreign = [name for name in names if name not in sets]
    if foreign:
        raise ValueError(f"--sets {' '.join(foreign)}: the suite {arguments.suite} has {', '.join(sets)}.")
    folder = arguments.suite_source
    copies = {name: None if folder is None else _copy(folder, name) for name in names}
    missing = [name for name, path in copies.items() if path is None and folder is not None]
    if missing:
        raise ValueError(
            f"--suite-source {folder} has no copy of {', '.join(missing)}: a copy is a folder of that name, or a file "
            f"of that name and one of {', '.join(ENDINGS)}. Or name the others with --sets."
        )
    return [Target(name, copies[name], _flags(arguments, sets[name])) for name in names]


def _copy(folder: Path, name: str) -> str | None:
    places = [folder / name, *(folder / f"{name}{ending}" for ending in ENDINGS)]
    return next((str(place) for place in places if place.exists()), None)


def _flags(arguments: argparse.Namespace, base: Flags) -> Flags:
    """What the user says, and else `base`."""
    said = {name: getattr(arguments, name) for name in Flags._fields}
    return base._replace(**{name: value for name, value in said.items() if value is not None})


def _load(
    targets: list[Target], arguments: argparse.Namespace, model: Any, tokenizer: PreTrainedTokenizerBase, length: int
) -> list[ScoringSequences]:
    """The sequences of all data sets, so that one that can not be had is known before any is scored.

    Raises:
        ValueError: names every data set of a suite that can not be had, with its reason.
    """
    texts, reasons = [], []
    for target in targets:
        try:
            texts.append(_sequences(target, arguments, model, tokenizer, length))
        except ValueError as error:
            if len(targets) == 1:
                raise
            reasons.append(f"{target.name} ({error})")
    if reasons:
        raise ValueError(
            f"{len(reasons)} of {len(targets)} sets of the suite {arguments.suite} can not be had, so that none is "
            f"scored; name the others with --sets. {'; '.join(reasons)}"
        )
    return texts


def _sequences(
    target: Target, arguments: argparse.Namespace, model: Any, tokenizer: PreTrainedTokenizerBase, length: int
) -> ScoringSequences:
    """Of a prompt and its completion, or of messages, what the model would have to write is scored."""
    flags = target.flags
    place = {"config_name": arguments.dataset_config, "source": target.source}
    how = {"split": flags.split, "skip_bad_rows": arguments.skip_bad_rows, **place}
    schema = TextRow() if arguments.text_column else find_schema(target.name, **place)
    if not isinstance(schema, TextRow):
        rows = encode_rows(
            load_rows(target.name, schema, **how), schema, tokenizer, length=length, block_size=model.config.block_size
        )
        return ScoringSequences(evenly_spaced(rows, arguments.max_sequences), None, {"split": flags.split})
    documents = load_text(target.name, text_column=arguments.text_column, **how)
    packed = pack(documents, tokenizer, length=length, **{k: v for k, v in flags._asdict().items() if k != "split"})
    size = bytes_per_token(documents, tokenizer, insert_eos=flags.insert_eos).bytes_per_token
    # Of the tokens of a sequence all but the first are scored, and an end token that packing put there has no bytes.
    text = (length - 2) / (length - 1) if flags.insert_special else 1.0
    return ScoringSequences(evenly_spaced(packed, arguments.max_sequences), size * text, flags._asdict())


def _about_model(arguments: argparse.Namespace, model: Any, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Of a result, what is the same for all data sets."""
    names = ("model", "suite", "seed", "batch_size", "max_sequences")
    exact = model.exact_likelihood
    # An autoregressive model needs no estimate; the published protocol decides more than that.
    estimator = "exact" if exact and arguments.estimator not in _FLAGS else arguments.estimator
    return {
        **{name: getattr(arguments, name) for name in names},
        "estimator": estimator,
        "num_samples": None if estimator in _FIXED_DRAWS else arguments.num_samples or 1,
        "bound": not exact,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "model_class": type(model).__name__,
        "config_sha256": digest(config_identity(model.config)),
        "weights_sha256": weights_digest(model),
        "tokenizer_sha256": digest(tokenizer_identity(tokenizer)),
        **library_versions(),
    }


#: Of a result, what decides the scores.
_DECIDES = (
    *("model_class", "config_sha256", "weights_sha256", "dtype", "tokenizer_sha256", "length"),
    *("estimator", "num_samples", "seed"),
)


def _score(
    arguments: argparse.Namespace,
    model: Any,
    text: ScoringSequences,
    about: Mapping[str, Any],
    file: ScoresFile | None,
    processes: Processes,
) -> tuple[Perplexity, dict[str, Any]]:
    """The result of one data set, and what is said of its text."""
    of_data = data_identity(text.rows)
    said = {"data_sha256": digest(of_data)}
    progress = score_shared(
        model,
        text.rows,
        Protocol(arguments.estimator, arguments.num_samples or 1, arguments.seed, len(text.rows)),
        batch_size=arguments.batch_size,
        identity={**{name: about[name] for name in _DECIDES}, **said, "sequences": len(text.rows)},
        file=file,
        processes=processes,
        progress=processes.rank == 0 and sys.stderr.isatty(),
    )
    scores = progress.scores.values()
    return summarize(scores, bytes_per_token=text.bytes_per_token, seconds=progress.seconds), said


def _table(result: Perplexity, about: Mapping[str, Any]) -> str:
    """What a reader wants to know."""
    bound = "an upper bound" if about["bound"] else "the likelihood itself"
    rows = [
        ("perplexity", f"{result.perplexity:.4f} ({bound}, {about['estimator']})"),
        ("nats per token", f"{result.nll:.5f} +- {result.standard_error:.5f}"),
        ("bits per token", f"{result.bits_per_token:.5f}"),
        ("bits per byte", "unknown" if result.bits_per_byte is None else f"{result.bits_per_byte:.5f}"),
        ("scored tokens", f"{result.num_tokens} in {result.num_sequences} sequences"),
        ("seconds", f"{result.seconds:.1f}"),
    ]
    return "\n".join(f"{name:<16}{value}" for name, value in rows)


__all__ = ["ESTIMATORS", "Target", "add_arguments", "check", "check_likelihood", "run"]
