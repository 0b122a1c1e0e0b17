"""The command line of a run: a recipe plus overrides, from a YAML file and `--field value` words."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, get_type_hints

import yaml
from transformers import CONFIG_MAPPING, HfArgumentParser, IntervalStrategy
from transformers.utils import logging

from bd3lm_hf.console import unknown, with_home, with_underscores
from bd3lm_hf.run_folder import RECIPE_HEADER
from bd3lm_hf.training.arguments import BD3LMTrainingArguments, DataArguments, LoraArguments, ModelArguments
from bd3lm_hf.training.command_help import DEFAULT_RECIPE, RECIPES, train_help
from bd3lm_hf.training.initial_model import SHAPE_FIELDS
from bd3lm_hf.user_files import read_yaml, write_atomically


logger = logging.get_logger("bd3lm_hf.train")

_GROUPS: dict[str, Any] = {
    "model": ModelArguments,
    "data": DataArguments,
    "adapters": LoraArguments,
    "training": BD3LMTrainingArguments,
}

_MODEL_FIELDS = [item.name for item in fields(ModelArguments)]
# Beginnings of the training fields that only concern the likelihood of blocks.
_LIKELIHOOD_FIELDS = ("interval_", "final_estimator", "eval_estimator")
_INIT_FLAGS = ("--init_from", "--model_name_or_path")
# Fields without effect while their strategy is `no`.
_STRATEGY_FIELDS = {
    "save_strategy": ("save_steps", "save_total_limit", "save_only_model"),
    "eval_strategy": ("eval_steps",),
}


class RunArguments(NamedTuple):
    """Everything that defines a run."""

    model: ModelArguments
    data: DataArguments
    lora: LoraArguments
    training: BD3LMTrainingArguments
    given: dict[str, Any]  # fields that differ from the defaults, as they were written


class _Parser(HfArgumentParser):
    """An `HfArgumentParser` that raises `ValueError` instead of printing its usage and exiting."""

    given: dict[str, Any]

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        # Recorded here, before the dataclasses derive further values, which a recipe must not repeat.
        namespace, rest = super().parse_known_args(args, namespace)
        defaults = vars(super().parse_known_args([])[0])
        self.given = {name: value for name, value in vars(namespace).items() if value != defaults[name]}
        return namespace, rest

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def field_names() -> list[str]:
    """Return the names of all fields that a recipe or the command line can set."""
    return [item.name for group in _GROUPS.values() for item in fields(group) if item.init]


def parse_arguments(argv: Sequence[str]) -> RunArguments:
    """Read `[recipe.yaml] [--field value ...]`; the command line overrides the recipe, the recipe the defaults.

    Args:
        argv: arguments without the program's name. The recipe is a file or the name of a built-in one, by default
            `demo`. If the recipe is for another model type than the command line asks for, fields that the types do
            not share are left out, with a warning.

    Raises:
        ValueError: if the recipe is unreadable, a field is unknown (the nearest one is named), a value is invalid, or
            fields contradict one another.
    """
    argv = [with_underscores(word) for word in argv]
    if {"-h", "--help"} & set(argv):
        print(train_help())
        raise SystemExit(0)
    named = bool(argv) and not argv[0].startswith("-")
    name = argv.pop(0) if named else DEFAULT_RECIPE
    recipe = read_recipe(name)
    flags = {word.partition("=")[0] for word in argv if word.startswith("--")}
    if not named and flags & set(_INIT_FLAGS):
        # The sizes of the demo's network would contradict those of the loaded one.
        recipe = {name: value for name, value in recipe.items() if name not in _MODEL_FIELDS}
    if "--dataset" in flags and not Path(name).is_file():
        recipe.pop("sample_prompt", None)  # the prompt of a built-in recipe suits its own dataset only
    recipe = fit_to_type(recipe, argv)
    words = [word for name, value in recipe.items() for word in _as_words(name, value)] + argv
    arguments = _parse(with_home(words))
    _check(arguments, set(recipe), {flag.removeprefix("--") for flag in flags})
    return arguments


def _parse(words: list[str]) -> RunArguments:
    parser = _Parser(list(_GROUPS.values()), allow_abbrev=False, add_help=False)
    try:
        found: Any = parser.parse_args_into_dataclasses(words, return_remaining_strings=True, look_for_args_file=False)
    except (TypeError, AttributeError, ImportError) as error:  # transformers checks some values only by using them
        raise ValueError(f"a field has an invalid value: {error}") from error
    model, data, lora, training, rest = found
    if rest:
        raise ValueError(unknown(rest[0], [f"--{name}" for name in field_names()], "argument"))
    return RunArguments(model, data, lora, training, parser.given)


def _check(arguments: RunArguments, recipe: Iterable[str], flags: Iterable[str]) -> None:
    """Refuse fields that contradict one another across groups, or have no effect."""
    training = arguments.training
    if arguments.data.streaming and training.max_steps < 1:
        raise ValueError("--streaming reads text of unknown length, which has no epochs to count: set --max_steps.")
    if arguments.lora.lora_r is not None and training.interval_search:
        raise ValueError(
            f"--interval_search with --lora_r {arguments.lora.lora_r}: an adapter does not keep the interval. Choose "
            f"it with --sampling_eps_min and --sampling_eps_max, or train all weights."
        )
    for strategy, dependent in _STRATEGY_FIELDS.items():
        # The command line may switch off what a recipe sets up, but neither may contradict itself.
        given = set(flags) | (set() if strategy in flags else set(recipe))
        idle = [name for name in dependent if name in given]
        if getattr(training, strategy) == IntervalStrategy.NO and idle:
            raise ValueError(
                f"--{idle[0]} {getattr(training, idle[0])} has no effect with --{strategy} no: leave it out, or set "
                f"--{strategy} steps."
            )


def fit_to_type(recipe: dict[str, Any], argv: Sequence[str]) -> dict[str, Any]:
    """Return the fields of a recipe that fit the model type of the command line, if it differs from the recipe's.

    Fields of the network that the type does not have or does not share (`unshared_fields` of its configuration) are
    left out with a warning; so are fields for the likelihood of blocks if it does not share `block_size`. Fields of
    the command line itself are kept.

    Args:
        argv: the command line after the recipe.
    """
    requested = _requested_type(argv)
    if requested in (None, recipe.get("model_type", ModelArguments.model_type)) or requested not in CONFIG_MAPPING:
        return recipe
    config_class: Any = CONFIG_MAPPING[requested]
    unshared = getattr(config_class, "unshared_fields", ())
    own = ("model_type", "init_from", "attn_implementation")
    dropped = [
        name
        for name in recipe
        if name in unshared
        or (name in _MODEL_FIELDS and name not in own and not _has_field(config_class, name))
        or ("block_size" in unshared and name.startswith(_LIKELIHOOD_FIELDS))
    ]
    if dropped:
        logger.warning(
            f"--model_type {requested} ignores fields that the recipe sets for another model type: "
            f"{', '.join(dropped)}."
        )
    return {name: value for name, value in recipe.items() if name not in dropped}


def _has_field(config_class: Any, name: str) -> bool:
    stock = SHAPE_FIELDS.get(name) or name  # as a new decoder of transformers names it
    return any(hasattr(config_class, known) or known in config_class.attribute_map for known in (name, stock))


def _requested_type(argv: Sequence[str]) -> str | None:
    """Return the last `--model_type` of a command line."""
    parser = _Parser((), allow_abbrev=False, add_help=False)
    parser.add_argument("--model_type")
    return parser.parse_known_args([*argv])[0].model_type


def find_recipe(name_or_path: str, folder: Path) -> Path:
    """Return the path of a YAML file, or of the built-in recipe of that name in `folder`.

    Raises:
        ValueError: if there is neither.
    """
    shipped = {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    path = Path(name_or_path)
    if not path.is_file() and name_or_path not in shipped:
        raise ValueError(
            f"no recipe {name_or_path!r}: give a YAML file or one of {', '.join(shipped)}. Fields are set "
            f"with --field value."
        )
    return path if path.is_file() else shipped[name_or_path]


def read_recipe(name_or_path: str) -> dict[str, Any]:
    """Return the fields that a recipe sets.

    Args:
        name_or_path: a YAML file, or the name of a built-in recipe.

    Raises:
        ValueError: if there is no such recipe, it is not a YAML mapping, a field does not exist, or its value has the
            wrong type.
    """
    path = find_recipe(name_or_path, RECIPES)
    recipe = read_yaml(path) or {}
    if not isinstance(recipe, dict):
        raise ValueError(f"the recipe {path} is a {type(recipe).__name__}: write one `field: value` per line.")
    kinds = {name: kind for group in _GROUPS.values() for name, kind in get_type_hints(group).items()}
    known = field_names()
    for name, value in recipe.items():
        if name not in known:
            raise ValueError(f"the recipe {path} has {unknown(str(name), known, 'field')}")
        _check_kind(path, name, value, kinds[name])
    return recipe


def _check_kind(path: Path, name: str, value: Any, kind: Any) -> None:
    """Refuse a value that the command line could not express for this field: YAML reads `yes` and `no` as booleans."""
    accepted = str(kind)
    # A list is written as several words, so its items must be plain.
    nested = isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value)
    if nested or (isinstance(value, (dict, list)) and type(value).__name__ not in accepted):
        raise ValueError(f"the recipe {path}: {name} takes another kind of value than {value!r}.")
    # `--resume_from_checkpoint true` resumes from the last checkpoint.
    if isinstance(value, bool) and "bool" not in accepted and name != "resume_from_checkpoint":
        raise ValueError(
            f"the recipe {path}: {name} is {value}, which is neither text nor a number: write it in quotes."
        )


def write_recipe(arguments: RunArguments, path: str | Path) -> None:
    """Write the fields that were set as a recipe that repeats the run in another folder."""
    left_out = ("output_dir", "overwrite_output_dir", "resume_from_checkpoint")
    given = {name: value for name, value in arguments.given.items() if name not in left_out}
    text = yaml.safe_dump(given, sort_keys=False, allow_unicode=True)
    write_atomically(path, f"{RECIPE_HEADER}\n{text}")


def _as_words(name: str, value: Any) -> list[str]:
    """Return a recipe's field as command-line words, so one parser checks both; `null` leaves the default."""
    if value is None:
        return []
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    if isinstance(value, (dict, bool)):
        return [f"--{name}={json.dumps(value)}"]
    return [f"--{name}={value}"]
