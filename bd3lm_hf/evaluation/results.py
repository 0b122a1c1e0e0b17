"""Identify evaluation runs, keep their scores on disk, and write tables of their results.

The identity of a run is everything that its numbers depend on, as hashes and named values: model, weights, vocabulary,
text. Sequences are scored by several processes and their scores kept on disk, so an interrupted evaluation continues
where it stopped. Results are written as JSON (the last run), CSV and markdown (one row per run).
"""

import csv
import hashlib
import io
import itertools
import json
import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence, Sized
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

import bd3lm_hf
from bd3lm_hf.console import escape_markdown, markdown_table, progress_bar
from bd3lm_hf.evaluation.perplexity import Protocol, SequenceScore, batches_of, score_batch
from bd3lm_hf.user_files import JsonLinesFile, check_output_file, is_json_with, write_atomically


_DIGITS = 16

# Fields of a configuration that do not change what a model computes, only where it comes from and how it runs. The
# clipping interval is excluded too: interval search changes it during training, and it is stored with the weights.
_IGNORED_CONFIG = {
    *("_name_or_path", "architectures", "attn_backend", "auto_map", "dtype", "torch_dtype", "return_dict"),
    *("output_attentions", "output_hidden_states", "use_cache", "requires_transformers", "transformers_version"),
    *("sampling_eps_min", "sampling_eps_max"),
}


def config_identity(config: Any) -> dict[str, Any]:
    """Return the fields of a configuration that determine what the model computes."""
    return {name: value for name, value in config.to_dict().items() if name not in _IGNORED_CONFIG}


def tokenizer_identity(tokenizer: Any) -> dict[str, Any]:
    """Return the size and hash of the vocabulary; empty without a tokenizer."""
    if tokenizer is None or not hasattr(tokenizer, "get_vocab"):
        return {}
    vocabulary = sorted(tokenizer.get_vocab().items())
    return {
        "tokens": len(vocabulary),
        "sha256 of the vocabulary": digest([vocabulary, sorted(tokenizer.all_special_ids)]),
    }


def data_identity(rows: Any, *, sample: int | None = None) -> dict[str, Any]:
    """Return the number and hash of sequences, or the `identity` of a stream.

    Args:
        sample: hash at most this many, evenly spaced; all by default.
    """
    if not isinstance(rows, Sized):
        return {"kind": "a stream", **getattr(rows, "identity", {})}
    hashed = hashlib.sha256()
    # Rounded up, to read at most `sample` rows.
    step = 1 if sample is None else max(1, -(-len(rows) // sample))
    for index in range(0, len(rows), step):
        row = rows[index]  # type: ignore[index]
        for name in ("input_ids", "labels"):
            hashed.update(np.asarray(row.get(name, ()), dtype=np.int64).tobytes())
    return {"kind": "sequences", "sequences": len(rows), "sha256 of the sequences": hashed.hexdigest()[:_DIGITS]}


def weights_digest(model: torch.nn.Module) -> str:
    """Return a hash of the names, dtypes, shapes and values of all weights, sorted by name."""
    hashed = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        # As bytes, because numpy has no bfloat16.
        hashed.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()[:_DIGITS]


def digest(value: Any) -> str:
    """Return a hash of a value as JSON with sorted keys."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]


def library_versions() -> dict[str, str]:
    """Return the library versions that a result can depend on."""
    others = {name: version(name) for name in ("torch", "transformers", "datasets")}
    return {"bd3lm_hf": bd3lm_hf.__version__, **others, "python": platform.python_version()}


# Scores, shared among processes and kept on disk


class Progress(NamedTuple):
    """Progress of an evaluation."""

    scores: dict[int, SequenceScore]  # by index of the sequence
    seconds: float  # time spent on these scores


class ScoresFile(JsonLinesFile):
    """A file of scores: one line with the identity of each run, followed by one line per round of batches.

    It keeps the scores of any number of runs, as a table keeps their results, and any of them can be continued.
    Lock it with `lock_output`: two processes must not write to it at the same time.

    Args:
        restart: discard the content of the file.

    Raises:
        ValueError: if it is not a file of scores.
    """

    def __init__(self, path: Path, *, restart: bool = False) -> None:
        remedy = "move the file away, or name another output"
        super().__init__(path, str(path), first_key="run", remedy=remedy, replace=restart)
        self._progress: dict[str, Progress] = {}
        self._run = ""  # the run that has begun
        for number, entry in self.read_lines():
            try:
                self._take(entry)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise self.foreign_line(number) from error
        if restart:
            self._progress.clear()

    def _take(self, entry: Mapping[str, Any]) -> None:
        run = entry["run"]
        if "identity" in entry:
            self._progress[run] = Progress({}, 0.0)
        elif "finished" not in entry:  # a mark of earlier versions
            scores, seconds = self._progress[run]
            scores |= {
                int(row): SequenceScore(int(row), float(nll), int(count)) for row, nll, count in entry["scores"]
            }
            self._progress[run] = Progress(scores, seconds + entry["seconds"])

    def begin(self, identity: Mapping[str, Any]) -> Progress:
        """Begin or continue the run with this identity, and return its progress."""
        self._run = digest(identity)
        if self._run not in self._progress:
            self._write({"run": self._run, "identity": dict(identity)})
        return self._progress[self._run]

    def append(self, scores: Sequence[SequenceScore], seconds: float) -> None:
        """Add scores of the run."""
        self._write({"run": self._run, "scores": [list(score) for score in scores], "seconds": seconds})

    def _write(self, entry: dict[str, Any]) -> None:
        self.write_line(entry)
        self._take(entry)


def score_shared(
    model: Any,
    sequences: Sequence[Any],
    protocol: Protocol,
    *,
    batch_size: int,
    identity: Mapping[str, Any],
    file: ScoresFile | None = None,
    progress: bool = False,
) -> Progress:
    """Score all sequences in parallel, and return the scores in every process.

    The batches are the same as in a single process, so the number of processes does not even change rounding. A batch
    is scored again if the file lacks any of its scores.

    Args:
        identity: everything that determines the scores, for the file.
        file: the file of the first process; None in the others, or to keep no scores.
    """
    processes = PartialState()
    (begun,) = broadcast_object_list([None if file is None else file.begin(identity)])
    scores, seconds = ({}, 0.0) if begun is None else (dict(begun.scores), begun.seconds)
    done = frozenset(scores)
    batches = batches_of(sequences, range(len(sequences)), batch_size)
    missing = (batch for batch in batches if not done.issuperset(batch.indices))
    with progress_bar("scoring", len(sequences), initial=len(scores), unit="sequence", disable=not progress) as bar:
        # Each round has one batch per process; in the last round some processes may have none.
        while round_batches := list(itertools.islice(missing, processes.num_processes)):
            started = time.perf_counter()
            own = round_batches[processes.process_index : processes.process_index + 1]
            found = gather_object([score for batch in own for score in score_batch(model, batch, protocol)])
            new = [SequenceScore(*score) for score in found if score[0] not in scores]
            spent = time.perf_counter() - started
            if file is not None:
                file.append(new, spent)
            scores |= {score.row: score for score in new}
            seconds += spent
            bar.update(len(new))
    return Progress(scores, seconds)


# Tables of results


#: The fields of every result, in the column order of a CSV file.
FIELDS = (
    *("model", "dataset", "split", "suite", "estimator", "num_samples", "bound", "nll", "standard_error"),
    *("bits_per_token", "bits_per_byte", "perplexity", "num_tokens", "num_sequences", "seconds", "seed"),
    *("length", "packing", "insert_eos", "insert_special", "max_sequences", "batch_size", "processes", "device"),
    *("dtype", "model_class", "config_sha256", "weights_sha256", "tokenizer_sha256", "data_sha256"),
    *("bd3lm_hf", "torch", "transformers", "datasets", "python"),
)

#: Columns of a markdown table: the title -> the cell of a result.
_COLUMNS: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "model": lambda row: escape_markdown(Path(row["model"]).name),
    "dataset": lambda row: escape_markdown(f"{row['dataset']} ({row['split']} split)"),
    "estimator": lambda row: escape_markdown(
        describe_estimator(row["estimator"], row["num_samples"], bound=row["bound"])
    ),
    "perplexity": lambda row: f"{'&le; ' if row['bound'] else ''}{_number(row['perplexity'], 2)}",
    "nats per token": lambda row: f"{_number(row['nll'], 4)} &plusmn; {_number(row['standard_error'], 4)}",
    "bits per token": lambda row: _number(row["bits_per_token"], 4),
    "bits per byte": lambda row: _number(row["bits_per_byte"], 4),
    "sequences": lambda row: escape_markdown(row["num_sequences"]),
    "tokens": lambda row: escape_markdown(row["num_tokens"]),
    "seed": lambda row: escape_markdown(row["seed"]),
    "seconds": lambda row: _number(row["seconds"], 1),
}


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a markdown table, in which perplexities that are upper bounds are marked as such."""
    return markdown_table(list(_COLUMNS), [[cell(row) for cell in _COLUMNS.values()] for row in rows])


def check_outputs(paths: Sequence[Path], *, overwrite: bool = False) -> None:
    """Refuse files that cannot or must not be written, before any work.

    Args:
        overwrite: replace a JSON file that this command did not write.
    """
    for path in paths:
        kind = path.suffix.lower()
        if kind not in _WRITERS:
            raise ValueError(f"--output {path}: the name of a result must end in one of {', '.join(_WRITERS)}.")
        check_output_file(path, "--output", is_ours=_is_result if kind == ".json" else None, overwrite=overwrite)
        if kind == ".csv" and path.exists() and path.stat().st_size:
            with path.open(encoding="utf-8", errors="replace", newline="") as file:
                head = next(csv.reader(file), [])
            if tuple(head) != FIELDS:
                raise ValueError(f"--output {path} is a table with other columns: name another file.")


_is_single, _is_suite = is_json_with("estimator", "nll", "bd3lm_hf"), is_json_with("suite", "results")


def _is_result(path: Path) -> bool:
    return _is_single(path) or _is_suite(path)


def write_results(path: Path, rows: Sequence[Mapping[str, Any]], suite: str | None = None) -> None:
    """Write results in the format that the file name ends in.

    Args:
        suite: the suite of the rows, which JSON then stores as a list.
    """
    _WRITERS[path.suffix.lower()](path, rows, suite)


def _write_json(path: Path, rows: Sequence[Mapping[str, Any]], suite: str | None) -> None:
    cleaned = [{name: _finite(value) for name, value in row.items()} for row in rows]
    report: Any = {"suite": suite, "results": cleaned} if suite is not None else cleaned[0]
    write_atomically(path, json.dumps(report, indent=2, allow_nan=False) + "\n")


def _append_csv(path: Path, rows: Sequence[Mapping[str, Any]], suite: str | None) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
    if not path.exists() or not path.stat().st_size:
        writer.writeheader()
    writer.writerows({name: _finite(row.get(name)) for name in FIELDS} for row in rows)
    _append_lines(path, text.getvalue())


def _append_markdown(path: Path, rows: Sequence[Mapping[str, Any]], suite: str | None) -> None:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    # Append to a table at the end of the file; after anything else, start a new one.
    last = next((number for number in reversed(range(len(lines))) if not lines[number].startswith("|")), -1)
    head, added = markdown([]).splitlines(), markdown(rows).splitlines()
    if lines[last + 1 : last + 3] == head:
        added = added[len(head) :]
    elif lines:
        added = ["", *added]
    _append_lines(path, "\n".join(added) + "\n")


def _append_lines(path: Path, text: str) -> None:
    # An edited file may lack the newline at its end.
    is_complete = not path.exists() or not path.stat().st_size or path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8", newline="") as file:
        file.write(text if is_complete else f"\n{text}")


_WRITERS = {".json": _write_json, ".csv": _append_csv, ".md": _append_markdown}


def describe_estimator(name: Any, num_samples: Any, *, bound: bool) -> str:
    """Describe a score: the likelihood itself, its bound, or an estimate of the bound from noise samples."""
    if not bound:
        return "exact likelihood"
    if name == "exact":
        return "exact bound"
    samples = "1 noise sample" if num_samples in (None, 1) else f"{num_samples} noise samples"
    return f"{name} estimate of the bound, {samples}"


def _number(value: float | None, digits: int) -> str:
    return "unknown" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
