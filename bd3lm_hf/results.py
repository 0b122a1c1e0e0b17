"""Results of evaluations as files: JSON (the last run), CSV and markdown (a row for each)."""

import csv
import io
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bd3lm_hf.samples import check_output


#: What is known of every result, in the order of the columns of a CSV file.
FIELDS = (
    *("model", "dataset", "split", "suite", "estimator", "num_samples", "bound", "nll", "standard_error"),
    *("bits_per_token", "bits_per_byte", "perplexity", "num_tokens", "num_sequences", "seconds", "seed"),
    *("length", "packing", "insert_eos", "insert_special", "max_sequences", "batch_size", "processes", "device"),
    *("dtype", "model_class", "config_sha256", "weights_sha256", "tokenizer_sha256", "data_sha256"),
    *("bd3lm_hf", "torch", "transformers", "datasets", "python"),
)
#: Of a markdown table: title, and how a result says it.
_COLUMNS: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "model": lambda row: Path(row["model"]).name,
    "data set": lambda row: f"{row['dataset']} ({row['split']})",
    "estimator": lambda row: _estimator(row),
    "perplexity": lambda row: f"{'&le; ' if row['bound'] else ''}{_number(row['perplexity'], 2)}",
    "nats per token": lambda row: f"{_number(row['nll'], 4)} &plusmn; {_number(row['standard_error'], 4)}",
    "bits per token": lambda row: _number(row["bits_per_token"], 4),
    "bits per byte": lambda row: _number(row["bits_per_byte"], 4),
    "tokens": lambda row: str(row["num_tokens"]),
    "seed": lambda row: str(row["seed"]),
    "seconds": lambda row: _number(row["seconds"], 1),
}


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table; a perplexity that is an upper bound has a sign."""
    return "\n".join([*_head(), *map(_row, rows)])


def check_outputs(paths: Sequence[Path]) -> None:
    """Refuse files that could not be written, before any work.

    Raises:
        ValueError: names the file and the remedy.
    """
    for path in paths:
        if path.suffix.lower() not in _WRITERS:
            raise ValueError(f"--output {path}: the name of a result ends in one of {', '.join(_WRITERS)}.")
        check_output(path, "--output")
        if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
            raise ValueError(f"--output {path} can not be written: you lack the permission.")
        if path.suffix.lower() == ".csv" and path.exists() and path.stat().st_size:
            with path.open(encoding="utf-8", newline="") as file:
                head = next(csv.reader(file), [])
            if tuple(head) != FIELDS:
                raise ValueError(f"--output {path} is a table with other columns: name another file.")


def write_results(path: Path, rows: Sequence[Mapping[str, Any]], suite: str | None = None) -> None:
    """Write results into a file, whose kind its name tells.

    Args:
        suite: the rows belong to this suite, and a JSON file holds them as a list.
    """
    _WRITERS[path.suffix.lower()](path, rows, suite)


def _write_json(path: Path, rows: Sequence[Mapping[str, Any]], suite: str | None) -> None:
    cleaned = [{name: _finite(value) for name, value in row.items()} for row in rows]
    report: Any = {"suite": suite, "results": cleaned} if suite is not None else cleaned[0]
    text = json.dumps(report, indent=2, allow_nan=False)
    part = path.with_name(path.name + ".part")
    part.write_text(text + "\n", encoding="utf-8")
    part.replace(path)  # an interrupt leaves the old file or the new one


def _append_csv(path: Path, rows: Sequence[Mapping[str, Any]], suite: str | None) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
    if not path.exists() or not path.stat().st_size:
        writer.writeheader()
    writer.writerows({name: _finite(row.get(name)) for name in FIELDS} for row in rows)
    with path.open("a", encoding="utf-8", newline="") as file:
        file.write(text.getvalue())


def _append_markdown(path: Path, rows: Sequence[Mapping[str, Any]], suite: str | None) -> None:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    # Rows join the table that ends the file; behind anything else a table begins.
    last = next((place for place in reversed(range(len(lines))) if not lines[place].startswith("|")), -1)
    joins = lines[last + 1 : last + 3] == _head()
    added = [*([] if joins else [*([""] if lines else []), *_head()]), *map(_row, rows)]
    with path.open("a", encoding="utf-8") as file:
        file.write("\n".join(added) + "\n")


_WRITERS = {".json": _write_json, ".csv": _append_csv, ".md": _append_markdown}


def _head() -> list[str]:
    return ["| " + " | ".join(_COLUMNS) + " |", "|" + "---|" * len(_COLUMNS)]


def _row(result: Mapping[str, Any]) -> str:
    return "| " + " | ".join(say(result).replace("|", "/") for say in _COLUMNS.values()) + " |"


def _estimator(row: Mapping[str, Any]) -> str:
    draws = row["num_samples"]
    return str(row["estimator"]) if draws is None or draws == 1 else f"{row['estimator']}, {draws} draws"


def _number(value: float | None, places: int) -> str:
    return "unknown" if value is None or math.isnan(value) else f"{value:.{places}f}"


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


__all__ = ["FIELDS", "check_outputs", "markdown", "write_results"]
