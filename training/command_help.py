"""The help pages of `bd3lm train` and `bd3lm compare`, printed without importing torch.

The fields of a run are those of our dataclasses and of transformers' `TrainingArguments`. Importing either loads torch
and takes seconds, so their names, defaults and help texts are read from the source instead.
"""

import ast
import sys
import textwrap
from collections.abc import Container
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple


RECIPES = Path(__file__).resolve().parent / "recipes"
COMPARISONS = RECIPES.parent / "comparisons"
DEFAULT_RECIPE = "demo"

_OURS = Path(__file__).resolve().parent / "arguments.py"
# Groups of the page, and the classes whose fields they show.
_GROUPS = {
    "model": ("ModelArguments",),
    "data": ("DataArguments",),
    "adapters": ("LoraArguments",),
    "training": ("BD3LMTrainingArguments", "IntervalSearchArguments"),
}


class FieldHelp(NamedTuple):
    """A field of a dataclass, as described in the source."""

    name: str
    default: str  # empty if there is none, or if it is not a literal
    text: str


def fields_in_source(path: Path) -> dict[str, list[FieldHelp]]:
    """Return the annotated fields of every class in a file, ours with `option(default, text)` or with `field(...)`."""
    classes = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)]
    return {node.name: [_field(line) for line in node.body if isinstance(line, ast.AnnAssign)] for node in classes}


def _field(line: ast.AnnAssign) -> FieldHelp:
    assert isinstance(line.target, ast.Name)
    default = text = None
    if isinstance(line.value, ast.Call) and line.value.args:
        default, text = line.value.args
    elif isinstance(line.value, ast.Call):
        words = {word.arg: word.value for word in line.value.keywords}
        default, metadata = words.get("default"), words.get("metadata")
        if isinstance(metadata, ast.Dict):
            text = dict(zip(map(_constant, metadata.keys), metadata.values, strict=True)).get("help")
    return FieldHelp(line.target.id, _constant(default), " ".join(_constant(text).split()))


def _constant(node: ast.expr | None) -> str:
    """Return a literal as text; empty for None and for any other expression."""
    try:
        value = None if node is None else ast.literal_eval(node)
    except ValueError:
        return ""
    return "" if value is None else str(value)


def refused_names(path: Path = _OURS) -> set[str]:
    """Return the keys of the table `REFUSED_FIELDS`, which the help page omits."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "REFUSED_FIELDS":
            assert isinstance(node.value, ast.Dict)
            return {_constant(key) for key in node.value.keys}
    raise AssertionError(f"{path} has no table REFUSED_FIELDS")


def train_help() -> str:
    """Return the help page of `bd3lm train`: our fields by group, then those inherited from transformers."""
    program = "python training/train.py" if Path(sys.argv[0]).name == "train.py" else "bd3lm train"
    lines = [
        f"usage: {program} [RECIPE] [--FIELD VALUE ...]",
        "",
        "  RECIPE  a YAML file of fields, or the name of a built-in recipe:",
        f"          {_shipped(RECIPES)}. Default: {DEFAULT_RECIPE}.",
        "  A field on the command line overrides the recipe. Dashes and underscores are both accepted.",
    ]
    classes, refused = fields_in_source(_OURS), refused_names()
    ours = {item.name for group in _GROUPS.values() for name in group for item in classes[name]}
    for title, group in _GROUPS.items():
        lines += ["", f"{title}:"]
        lines += [line for name in group for line in _page(classes[name], leave_out=refused)]
    lines += ["", "-" * 79, "inherited from transformers' TrainingArguments (see its documentation):"]
    found = find_spec("transformers")  # imports nothing, since the package is top-level
    assert found is not None and found.submodule_search_locations is not None
    theirs = fields_in_source(Path(found.submodule_search_locations[0]) / "training_args.py")["TrainingArguments"]
    return "\n".join([*lines, *_page(theirs, leave_out=ours | refused)])


def _page(fields: list[FieldHelp], *, leave_out: Container[str]) -> list[str]:
    lines = []
    for item in fields:
        if item.name not in leave_out:
            text = f"{item.text} Default: {item.default}." if item.default else item.text
            lines += [f"  --{item.name}", *textwrap.wrap(text, 100, initial_indent=" " * 8, subsequent_indent=" " * 8)]
    return lines


def _shipped(folder: Path) -> str:
    return ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))


def compare_help() -> str:
    """Return the help page of `bd3lm compare`."""
    return f"""\
usage: bd3lm compare [RECIPE] [--models NAME ...] [--seeds N ...] [--FIELD VALUE ...]

Train several models on the same text for the same number of tokens, score samples of each with a judge, and print one
table. Completed runs are not repeated.

  RECIPE         a YAML file that lists the models and the fields in which they differ, or the name of a built-in one:
                 {_shipped(COMPARISONS)}. Default: paper.
  --models       models of the recipe to compare; by default all of them
  --seeds        seeds of the runs
  --num_texts    samples per model
  --text_length  tokens per sample
  --judge        model of the comparison, or checkpoint, that scores the samples
  --output_dir   folder for the runs and comparison.json
  --FIELD        any field of a run, see `bd3lm train --help`

Dashes and underscores are both accepted."""
