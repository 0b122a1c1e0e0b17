"""The help pages of `bd3lm train` and `bd3lm compare`, which answer without torch.

The fields of a run are those of dataclasses, ours and transformers' `TrainingArguments`. Importing either takes
seconds, as it loads torch, so their names, defaults and help texts are read from the source instead.
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
    """A field of a dataclass as its source describes it."""

    name: str
    default: str  # empty if there is none to show, or only running the code would tell
    text: str


def fields_in_source(path: Path) -> dict[str, list[FieldHelp]]:
    """Return the fields of every class of a file that are declared by `field(default=..., metadata=...)`."""
    classes = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)]
    return {node.name: [_field(line) for line in node.body if isinstance(line, ast.AnnAssign)] for node in classes}


def _field(line: ast.AnnAssign) -> FieldHelp:
    assert isinstance(line.target, ast.Name)
    arguments = {word.arg: word.value for word in line.value.keywords} if isinstance(line.value, ast.Call) else {}
    default, metadata = arguments.get("default"), arguments.get("metadata")
    texts = {}
    if isinstance(metadata, ast.Dict):
        texts = {_constant(key): _constant(value) for key, value in zip(metadata.keys, metadata.values, strict=True)}
    return FieldHelp(line.target.id, _constant(default), " ".join(texts.get("help", "").split()))


def _constant(node: ast.expr | None) -> str:
    """Return a literal as text; empty for None and for what is not a literal."""
    try:
        value = None if node is None else ast.literal_eval(node)
    except ValueError:
        return ""
    return "" if value is None else str(value)


def refused_names(path: Path = _OURS) -> set[str]:
    """Return the keys of the table `REFUSED_FIELDS`, which the page leaves out."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "REFUSED_FIELDS":
            assert isinstance(node.value, ast.Dict)
            return {_constant(key) for key in node.value.keys}
    raise AssertionError(f"{path} has no table REFUSED_FIELDS")


def train_help() -> str:
    """Return the page of `bd3lm train`: our fields by group, then those inherited from transformers."""
    program = "python training/train.py" if Path(sys.argv[0]).name == "train.py" else "bd3lm train"
    lines = [
        f"usage: {program} [RECIPE] [--FIELD VALUE ...]",
        "",
        "  RECIPE  a YAML file of fields, or the name of one that ships:",
        f"          {_shipped(RECIPES)}. Default: {DEFAULT_RECIPE}.",
        "  A field on the command line overrides the recipe. Dashes and underscores are both accepted.",
    ]
    classes, refused = fields_in_source(_OURS), refused_names()
    ours = {item.name for group in _GROUPS.values() for name in group for item in classes[name]}
    for title, group in _GROUPS.items():
        lines += ["", f"{title}:"]
        lines += [line for name in group for line in _page(classes[name], leave_out=refused)]
    lines += ["", "-" * 79, "inherited from transformers' TrainingArguments (see its documentation):"]
    return "\n".join([*lines, *_page(_inherited(), leave_out=ours | refused)])


def _inherited() -> list[FieldHelp]:
    found = find_spec("transformers")  # of a package without parents: nothing is imported
    assert found is not None and found.submodule_search_locations is not None
    return fields_in_source(Path(found.submodule_search_locations[0]) / "training_args.py")["TrainingArguments"]


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
    """Return the page of `bd3lm compare`."""
    return f"""\
usage: bd3lm compare [RECIPE] [--models NAME ...] [--seeds N ...] [--FIELD VALUE ...]

Train several models on the same text for the same number of tokens, let each write texts that a judge scores, and
print one table. A run that is complete is not repeated.

  RECIPE         a YAML file that names the models and the fields in which they differ, or the name of one that ships:
                 {_shipped(COMPARISONS)}. Default: paper.
  --models       the models of the recipe to compare; by default all of them
  --seeds        seeds of the runs
  --num_texts    texts that each model writes
  --text_length  tokens of a text
  --judge        a model of the comparison, or a checkpoint, that scores the texts
  --output_dir   folder of the runs and of comparison.json
  --FIELD        any field of a run, see `bd3lm train --help`

Dashes and underscores are both accepted."""
