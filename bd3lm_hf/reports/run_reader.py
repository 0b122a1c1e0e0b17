"""Read the files of training runs, evaluations, comparisons and quality curves; no model is loaded.

A run may still be training, or have been killed: what exists is read, and what is missing is named.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import CONFIG_NAME

from bd3lm_hf.modeling.likelihood_bd3lm import LikelihoodMixin
from bd3lm_hf.run_folder import CURVE_NAME, RECIPE_NAME, RESULTS_NAME, SAMPLES_NAME, SEARCH_NAME
from bd3lm_hf.yaml_files import read_yaml


Series = dict[str, tuple[np.ndarray, np.ndarray]]  # name -> steps, values


def series_of(log_history: Sequence[Mapping[str, Any]]) -> Series:
    """Return every logged number over the steps; where a step was logged twice, the later entry counts."""
    found: dict[str, dict[int, float]] = {}
    for entry in log_history:
        for name, value in entry.items():
            if name not in ("step", "epoch") and isinstance(value, (int, float)):
                found.setdefault(name, {})[int(entry.get("step", 0))] = float(value)
    return {
        name: (np.array(sorted(points)), np.array([points[step] for step in sorted(points)]))
        for name, points in found.items()
    }


def smoothed(values: np.ndarray) -> np.ndarray:
    """Return the running mean over a twentieth of the values, over fewer at the start and the end."""
    count, sums = len(values), np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(count)
    half = np.minimum(index, count // 40)
    stop = np.minimum(count, index + half + 1)
    return (sums[stop] - sums[index - half]) / (stop - index + half)


_STATES = "checkpoint-*/trainer_state.json"


#: Any of them tells that a folder is a run.
_SIGNS = (RECIPE_NAME, RESULTS_NAME, CURVE_NAME, SEARCH_NAME, _STATES)


_SAMPLE_HEAD, _SAMPLE_TAIL = "--- sample at step ", " ---"


class RunSample(NamedTuple):
    """A text that a model wrote."""

    origin: str  # which text it is
    text: str


@dataclass
class Run:
    """A training run."""

    name: str
    folder: Path
    recipe: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    series: Series = field(default_factory=dict)
    searches: list[dict[str, Any]] = field(default_factory=list)
    samples: list[RunSample] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)  # sentences

    @property
    def is_exact(self) -> bool:
        """Whether the model's likelihood is exact and no bound, as its class says."""
        try:
            kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[self.config["model_type"]]]
        except KeyError:
            return False
        if not issubclass(kind, LikelihoodMixin):
            return False
        return self.config.get("block_size", kind.config_class.block_size) == 1  # blocks of one token

    @property
    def estimator(self) -> str | None:
        """Likelihood estimator used after training, from the recipe; None if it is not set."""
        if self.is_exact:
            return "exact"
        name = self.recipe.get("final_estimator") or self.recipe.get("eval_estimator")
        draws = self.recipe.get("eval_num_samples", 1)
        return f"{name}, {draws} draws" if name and draws != 1 else name


class Named(NamedTuple):
    """The content of a result file, and what to call it."""

    name: str
    content: Any


@dataclass
class Material:
    """All that a report is made of."""

    runs: list[Run] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    comparisons: list[Named] = field(default_factory=list)
    qualities: list[Named] = field(default_factory=list)
    generated: list[Named] = field(default_factory=list)
    samples: list[Named] = field(default_factory=list)  # lists of `RunSample`


def read_material(paths: Sequence[Path]) -> Material:
    """Read folders of runs, folders that hold such folders or result files, and result files.

    Raises:
        ValueError: nothing is named; a path that does not exist or holds nothing to report on; a file that is broken,
            with the place where it is.
    """
    if not paths:
        raise ValueError("name at least one run: the output folder of a training run, or a result file (.json).")
    for path in paths:
        if not path.exists():
            raise ValueError(f"{path}: there is no such file or folder.")
    material, seen = Material(), set()
    for path in paths:
        for found in _expanded(path):
            if found.resolve() not in seen:
                seen.add(found.resolve())
                _read_into(material, found)
    _make_names_unique(material.runs)
    return material


def is_run(folder: Path) -> bool:
    """Whether a training run wrote to this folder."""
    return folder.is_dir() and any(next(folder.glob(sign), None) is not None for sign in _SIGNS)


def _expanded(path: Path) -> list[Path]:
    """Return the runs and result files that a path means."""
    if path.is_file():
        # A result file inside a run folder means the run.
        return (
            [path.parent] if path.name in (RESULTS_NAME, CURVE_NAME, SEARCH_NAME) and is_run(path.parent) else [path]
        )
    if is_run(path):
        return [path]
    inside = sorted(path.iterdir())
    found = [child for child in inside if is_run(child)]
    found += [child for child in inside if child.is_file() and child.suffix == ".json" and _kind(_read_json(child))]
    if not found:
        raise ValueError(
            f"{path} is no run: it has none of {', '.join(_SIGNS)}, and holds neither a folder that has, nor a result "
            f"file (.json) of eval, quality or compare."
        )
    return found


def _read_into(material: Material, path: Path) -> None:
    if path.is_dir():
        material.runs.append(read_run(path))
    elif path.suffix == ".jsonl":
        rows, _ = _read_lines(path)
        if not rows or not all(isinstance(row.get("text"), str) for row in rows):
            raise ValueError(f"{path} holds no samples: its lines have no `text`.")
        texts = [RunSample(f"sample {row.get('index', number)}", row["text"]) for number, row in enumerate(rows)]
        material.samples.append(Named(path.stem, texts))
    else:
        content = _read_json(path)
        add = _kind(content)
        if add is None:
            raise ValueError(
                f"{path} is no result that a report knows: name a result file of eval, quality or compare (.json), "
                f"samples (.jsonl), or the folder of a run."
            )
        add(material, Named(path.stem, content))


def _kind(content: Any) -> Callable[[Material, Named], None] | None:
    """Return how to add a result file, by its fields, or None if it is not one."""
    if isinstance(content, list):
        is_comparison = bool(content) and all(isinstance(row, dict) and row.keys() >= _COMPARED for row in content)
        return (lambda material, named: material.comparisons.append(named)) if is_comparison else None
    fields = content.keys() if isinstance(content, dict) else set()
    return next((add for known, add in _KINDS if known <= fields), None)


_COMPARED = {"model", "seed", "perplexity", "generative_perplexity"}


_KINDS: tuple[tuple[set[str], Callable[[Material, Named], None]], ...] = (
    ({"judge", "points"}, lambda material, named: material.qualities.append(named)),
    ({"suite", "results"}, lambda material, named: material.evaluations.extend(named.content["results"])),
    ({"generative_perplexity"}, lambda material, named: material.generated.append(named)),
    ({"dataset", "perplexity", "nll"}, lambda material, named: material.evaluations.append(named.content)),
)


def read_run(folder: Path) -> Run:
    """Read the folder of a run.

    Raises:
        ValueError: if a file is broken, other than by having been cut off.
    """
    run = Run(name=folder.resolve().name, folder=folder)
    run.recipe = _read_recipe(folder / RECIPE_NAME)
    run.config = _whole(folder / CONFIG_NAME, run)
    run.results = _whole(folder / RESULTS_NAME, run)
    run.series = _read_series(folder, run)
    if (folder / SEARCH_NAME).is_file():
        run.searches, cut_off = _read_lines(folder / SEARCH_NAME)
        if cut_off:
            run.missing.append(f"the last line of {SEARCH_NAME} is half-written")
    run.samples = _read_samples(folder / SAMPLES_NAME)
    if run.results.get("text"):
        run.samples.append(RunSample("from the saved folder, after training", run.results["text"]))
    return run


def _read_series(folder: Path, run: Run) -> Series:
    """Return the log of a finished run, otherwise that of its last checkpoint."""
    if "losses" in run.results:
        return series_of(run.results["losses"])
    if not (folder / RESULTS_NAME).is_file():
        run.missing.append(f"{RESULTS_NAME} is not there: the run is still training, or was stopped")
    states = sorted(folder.glob(_STATES), key=lambda path: (len(path.parent.name), path.parent.name))
    if states:
        run.missing.append(f"the curves reach to {states[-1].parent.name}")
        return series_of(_whole(states[-1], run).get("log_history", []))
    curve = _whole(folder / CURVE_NAME, run)
    if not curve:
        run.missing.append("there are no curves yet: it has saved no checkpoint")
        return {}
    log = [
        {"step": step, name: value}
        for name, points in curve.items()
        for step, value in zip(points["steps"], points["values"], strict=True)
    ]
    return series_of(log)


def _read_recipe(path: Path) -> dict[str, Any]:
    content = read_yaml(path) if path.is_file() else {}
    return content if isinstance(content, dict) else {}


def _read_samples(path: Path) -> list[RunSample]:
    """Return the samples that a run wrote at its evaluations."""
    samples: list[RunSample] = []
    lines: list[str] = []
    for line in _text_of(path).splitlines() if path.is_file() else []:
        if line.startswith(_SAMPLE_HEAD) and line.endswith(_SAMPLE_TAIL):
            step = line.removeprefix(_SAMPLE_HEAD).removesuffix(_SAMPLE_TAIL)
            samples.append(RunSample(f"at step {step}", ""))
            lines = []
        elif samples:
            lines.append(line)
            samples[-1] = samples[-1]._replace(text="\n".join(lines))
    return samples


def _whole(path: Path, run: Run) -> dict[str, Any]:
    """Return the object in a file of a run; empty if the file is missing or cut off, which is noted."""
    if not path.is_file():
        return {}
    text = _text_of(path)
    if not text.strip().endswith("}"):
        run.missing.append(f"{path.relative_to(run.folder)} is half-written")
        return {}
    content = _parse(text, path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}, line 1: a JSON object is expected.")
    return content


def _read_json(path: Path) -> Any:
    return _parse(_text_of(path), path)


def _read_lines(path: Path) -> tuple[list[dict[str, Any]], bool]:
    """Return the objects of a file of JSON lines, and whether its last line is cut off and left out."""
    lines = _text_of(path).split("\n")
    cut_off = bool(lines.pop())  # empty if the last line is complete
    rows = [_parse(line, path, number) for number, line in enumerate(lines, start=1) if line.strip()]
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: a JSON object is expected.")
    return rows, cut_off


def _parse(text: str, path: Path, line: int = 1) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = line + error.lineno - 1
        raise ValueError(f"{path}, line {place}: this is no JSON ({error.msg}). Repair or remove the file.") from error


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: this is not UTF-8.") from error


def _make_names_unique(runs: Sequence[Run]) -> None:
    """Runs of one name bear that of their parent folder as well, and a number if that does not tell them apart."""
    for rename in (
        lambda run, _: f"{run.folder.resolve().parent.name}/{run.name}",
        lambda run, n: f"{run.name} ({n})",
    ):
        names = [run.name for run in runs]
        for number, run in enumerate(runs, start=1):
            if names.count(run.name) > 1:
                run.name = rename(run, number)


def finite(row: Mapping[str, Any], name: str) -> float | None:
    """Return a number of a row, or None if it is missing, null or not finite."""
    value = row.get(name)
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


__all__ = [
    "Material",
    "Named",
    "Run",
    "RunSample",
    "Series",
    "finite",
    "is_run",
    "read_material",
    "read_run",
    "series_of",
    "smoothed",
]
