"""Read the files of training runs, evaluations, comparisons and quality curves; no model is loaded.

A run may still be training, or have been killed: whatever exists is read, and what is missing is named.
"""

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import CONFIG_NAME

from bd3lm_hf.data.sources import DEFAULT_DATASET
from bd3lm_hf.evaluation.results import describe_estimator
from bd3lm_hf.modeling.likelihood_bd3lm import LikelihoodMixin
from bd3lm_hf.run_folder import RECIPE_NAME, RESULTS_NAME, SAMPLE_HEAD, SAMPLES_NAME, SEARCH_NAME
from bd3lm_hf.user_files import read_json, read_yaml


_STATES = "checkpoint-*/trainer_state.json"
_RUN_FILES = (RECIPE_NAME, RESULTS_NAME, SEARCH_NAME, _STATES)  # a folder with any of them is a run

# List of `Material` -> fields that identify the result files it collects, the most specific first.
_KINDS = {
    "qualities": {"judge", "points"},
    "suites": {"suite", "results"},
    "generated": {"generative_perplexity"},
    "evaluations": {"dataset", "perplexity", "nll"},
}
_MAX_BYTES = 2**30  # of a file of a run; its log has an entry for every logged step
_COMPARED = {"model", "seed", "perplexity", "generative_perplexity"}


def finite(row: Mapping[str, Any], name: str) -> float | None:
    """Return a number of a row, or None if it is missing, null or not finite."""
    value = row.get(name)
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def describe_setting(setting: Mapping[str, Any]) -> str:
    """Return the fields of a sampler that are set, for a table."""
    return ", ".join(f"{name} {value}" for name, value in setting.items() if value is not None) or "default"


class RunSample(NamedTuple):
    """A text that a model generated."""

    origin: str  # the step or the number of the text
    text: str


@dataclass
class Run:
    """A training run: the content of its folder."""

    name: str
    folder: Path
    recipe: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    log: Sequence[Mapping[str, Any]] = ()  # the entries of a `TrainerState`
    searches: list[dict[str, Any]] = field(default_factory=list)
    samples: list[RunSample] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)  # a sentence about each missing part

    @functools.cached_property
    def series(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """The steps and the values of every logged number; where a step was logged twice, the later entry wins."""
        found: dict[str, dict[int, float]] = {}
        for entry in self.log:
            for name, value in entry.items():
                if name not in ("step", "epoch") and isinstance(value, (int, float)):
                    found.setdefault(name, {})[int(entry.get("step", 0))] = float(value)
        return {
            name: (np.array(sorted(points)), np.array([points[step] for step in sorted(points)]))
            for name, points in found.items()
        }

    @property
    def is_exact(self) -> bool:
        """Whether the model's scores are exact likelihoods rather than bounds, according to its class."""
        try:
            kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[self.config["model_type"]]]
        except KeyError:
            return False
        if not issubclass(kind, LikelihoodMixin):
            return False
        return self.config.get("block_size", kind.config_class.block_size) == 1

    @property
    def held_out(self) -> str:
        """Dataset and split of the scores during training."""
        dataset = f"{self.recipe.get('dataset', DEFAULT_DATASET)} (validation split)"  # a recipe omits defaults
        return str(self.results.get("held_out") or self.recipe.get("validation_dataset") or dataset)

    def estimator(self, *, final: bool) -> str:
        """Describe the estimator of the evaluations during training, or of the final one."""
        if final and self.results.get("estimator"):
            return str(self.results["estimator"])
        name = self.recipe.get("eval_estimator", "stratified")
        if final:
            name = self.recipe.get("final_estimator") or name
        return describe_estimator(name, self.recipe.get("eval_num_samples"), bound=not self.is_exact)


class Named(NamedTuple):
    """The name and the content of a result file."""

    name: str
    content: Any


@dataclass
class Material:
    """Everything that a report shows."""

    runs: list[Run] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    comparisons: list[Named] = field(default_factory=list)
    qualities: list[Named] = field(default_factory=list)
    generated: list[Named] = field(default_factory=list)
    samples: list[Named] = field(default_factory=list)  # lists of `RunSample`


def read_material(paths: Sequence[Path]) -> Material:
    """Read run folders, folders of runs or result files, and result files.

    Raises:
        ValueError: if no path is named, a path does not exist or has nothing to report, or a file is damaged.
    """
    if not paths:
        raise ValueError("name at least one run: the output folder of a training run, or a result file (.json).")
    for path in paths:
        if not path.exists():
            raise ValueError(f"{path}: there is no such file or folder.")
    material = Material()
    for found in dict.fromkeys(inside.resolve() for path in paths for inside in _expand(path)):
        _read_into(material, found)
    names = [run.name for run in material.runs]
    for run in material.runs:
        if names.count(run.name) > 1:
            run.name = f"{run.folder.parent.name}/{run.name}"
    return material


def is_run(folder: Path) -> bool:
    """Return whether a training run wrote to this folder."""
    return folder.is_dir() and any(next(folder.glob(name), None) is not None for name in _RUN_FILES)


def _expand(path: Path) -> list[Path]:
    """Return the runs and result files at a path; a file of a run refers to the run."""
    if path.is_file():
        return [path.parent if path.name in (RESULTS_NAME, SEARCH_NAME) and is_run(path.parent) else path]
    if is_run(path):
        return [path]
    inside = sorted(path.iterdir())
    found = [child for child in inside if is_run(child)]
    results = (child for child in inside if child.is_file() and child.suffix == ".json")
    found += [child for child in results if _kind(_parse(child.read_bytes(), str(child)))]
    if not found:
        raise ValueError(
            f"{path} is not a run and contains none: it has neither {', '.join(_RUN_FILES)} nor a result file (.json) "
            f"of eval, quality or compare."
        )
    return found


def _read_into(material: Material, path: Path) -> None:
    if path.is_dir():
        material.runs.append(read_run(path))
    elif path.suffix == ".jsonl":
        rows = _read_lines(path)
        if not rows or not all(isinstance(row, dict) and isinstance(row.get("text"), str) for row in rows):
            raise ValueError(f"{path} contains no samples: its lines have no `text`.")
        texts = [RunSample(f"sample {row.get('index', number)}", row["text"]) for number, row in enumerate(rows)]
        material.samples.append(Named(path.stem, texts))
    else:
        content = _parse(path.read_bytes(), str(path))
        kind = _kind(content)
        if kind is None:
            raise ValueError(
                f"{path} is not a result file: name one of eval, quality or compare (.json), samples (.jsonl), or the "
                f"folder of a run."
            )
        if kind in ("suites", "evaluations"):
            material.evaluations += content["results"] if kind == "suites" else [content]
        else:
            getattr(material, kind).append(Named(path.stem, content))


def _kind(content: Any) -> str | None:
    """Return the kind of a result file by its fields, or None if it is not one."""
    if isinstance(content, list):
        is_comparison = bool(content) and all(isinstance(row, dict) and row.keys() >= _COMPARED for row in content)
        return "comparisons" if is_comparison else None
    fields = content.keys() if isinstance(content, dict) else set()
    kind = next((kind for kind, known in _KINDS.items() if known <= fields), None)
    return None if kind == "suites" and not isinstance(content["results"], list) else kind


def read_run(folder: Path) -> Run:
    """Read the folder of a run.

    Raises:
        ValueError: if a file is damaged.
    """
    run = Run(name=folder.resolve().name, folder=folder)
    recipe = read_yaml(folder / RECIPE_NAME) if (folder / RECIPE_NAME).is_file() else {}
    run.recipe = recipe if isinstance(recipe, dict) else {}
    run.config, run.results = _read_object(folder / CONFIG_NAME), _read_object(folder / RESULTS_NAME)
    run.log = run.results.get("losses", [])
    if not run.results:
        run.missing.append(f"{RESULTS_NAME} is missing: the run is still training or was stopped")
        states = sorted(folder.glob(_STATES), key=lambda path: (len(path.parent.name), path.parent.name))
        if states:
            run.missing.append(f"the curves end at {states[-1].parent.name}")
            run.log = _read_object(states[-1]).get("log_history", [])
        else:
            run.missing.append("there are no curves: it has not saved a checkpoint yet")
    if (folder / SEARCH_NAME).is_file():
        run.searches = _read_lines(folder / SEARCH_NAME)
    run.samples = _read_samples(folder / SAMPLES_NAME)
    if run.results.get("text"):
        run.samples.append(RunSample("from the saved folder, after training", run.results["text"]))
    return run


def _read_samples(path: Path) -> list[RunSample]:
    """Return the samples that a run wrote at its evaluations."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    _, *parts = SAMPLE_HEAD.split(text)
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return [RunSample(f"at step {step}", text.removesuffix("\n")) for step, text in pairs]


def _read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file of a run, or an empty one if there is no such file."""
    return read_json(path, max_bytes=_MAX_BYTES) if path.is_file() else {}


def _read_lines(path: Path) -> list[Any]:
    """Return the content of a JSON Lines file, except a last line that is still being written and has no newline."""
    lines = enumerate(path.read_bytes().split(b"\n")[:-1], start=1)
    return [_parse(line, f"{path}, line {number}") for number, line in lines if line.strip()]


def _parse(text: bytes, name: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not valid JSON: {error}. Repair or remove the file.") from error
