"""`bd3lm compare`: train several models on the same text for the same number of tokens, and put them in one table.

1. Read the recipe: the models, the seeds, and the fields that all runs share.
2. Train each model with each seed; completed runs are not repeated.
3. Generate samples with each, and score them with a reference model, the judge.
4. Print the table and write it next to the runs.
"""

import argparse
import functools
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import yaml
from transformers.utils import logging

from bd3lm_hf.checkpoints import load_model
from bd3lm_hf.console import ArgumentParser, integer, markdown_table, with_underscores
from bd3lm_hf.evaluation.generative import mean_entropy
from bd3lm_hf.evaluation.perplexity import summarize
from bd3lm_hf.evaluation.reference_model import load_reference_model
from bd3lm_hf.generation.text_generation import GeneratedText, generate_texts
from bd3lm_hf.run_folder import RESULTS_NAME, is_run_folder
from bd3lm_hf.tokenization import load_tokenizer
from bd3lm_hf.training.arguments import ModelArguments
from bd3lm_hf.training.command_help import COMPARISONS
from bd3lm_hf.training.command_line import field_names, find_recipe, parse_arguments
from bd3lm_hf.training.initial_model import model_class
from bd3lm_hf.training.train import run
from bd3lm_hf.user_files import has_mark, read_yaml, write_atomically


logger = logging.get_logger("bd3lm_hf.compare")

PAPER = "paper"

TABLE_NAME = "comparison.json"
# Distinguishes our recipe of a run from a foreign file of that name.
_RECIPE_HEADER = "# Written by bd3lm compare: the fields of this run."
_TEXTS_PER_BATCH = 16
_OWN_FIELDS = ("seeds", "num_texts", "text_length", "judge", "output_dir")


class Plan(NamedTuple):
    """The runs to compare, and how to compare them."""

    models: Mapping[str, Mapping[str, Any]]  # name -> the fields in which it differs
    seeds: Sequence[int]
    num_texts: int
    text_length: int  # tokens
    judge: str  # one of the models, or a checkpoint
    common: Mapping[str, Any]  # fields of every run
    folder: Path


class ComparedModel(NamedTuple):
    """One model with one seed."""

    model: str
    seed: int
    perplexity: float | None  # of held-out text; None without a likelihood
    exact: bool  # whether the perplexity is exact, not an upper bound
    training_tokens: int
    training_tokens_per_second: float | None  # None if the run was too short to log it
    generative_perplexity: float  # of its samples, under the judge
    entropy: float  # of the token frequencies of a sample, mean over samples, nats
    forwards_per_token: float  # of a sample that is generated alone
    batch_forwards_per_token: float  # of its batch, which ends with its slowest row
    seconds_per_token: float  # in batches
    dataset: str  # of the perplexity, with its split
    estimator: str


def read_plan(argv: Sequence[str]) -> Plan:
    """Read `[recipe] [--field value ...]`; `--models` and `--seeds` take several values.

    Raises:
        ValueError: if the recipe cannot be read, does not name a model, or a model starts from one that is not trained
            before it.
        SystemExit: if a flag or its value is wrong.
    """
    words = [with_underscores(word) for word in argv]
    name = words.pop(0) if words and not words[0].startswith("-") else PAPER
    path = find_recipe(name, COMPARISONS)
    recipe = read_yaml(path)
    models = recipe.pop("models", None) if isinstance(recipe, dict) else None
    if not isinstance(models, dict) or not models or not all(isinstance(model, dict) for model in models.values()):
        raise ValueError(f"the recipe {path} names no models: write `models:` with one `name: {{field: value}}` each.")
    # The recipe's own fields come first, as words, so that one parser checks both.
    own = {name: recipe.pop(name) for name in _OWN_FIELDS if name in recipe}
    listed = {name: value if isinstance(value, list) else [value] for name, value in own.items()}
    from_recipe = [word for name, values in listed.items() for word in (f"--{name}", *map(str, values))]
    given = vars(_make_parser().parse_args([*from_recipe, *words]))
    chosen = given.pop("models") or list(models)
    seeds, num_texts, text_length, judge, folder = (given.pop(name) for name in _OWN_FIELDS)
    # Everything else is a field of the runs, which check it before any training.
    common = recipe | {name: values if len(values) > 1 else values[0] for name, values in given.items()}
    for name in chosen:
        if name not in models:
            raise ValueError(f"--models {name}: the recipe {path} has {', '.join(models)}.")
    for number, name in enumerate(chosen):
        start = models[name].get("init_from")
        if start in models and start not in chosen[:number]:
            raise ValueError(f"{name} starts from {start} (init_from): name {start} before it.")
    models = {name: models[name] for name in chosen}
    judge = judge or next(iter(models))
    if judge in models:
        kind = model_class({**common, **models[judge]}.get("model_type", ModelArguments.model_type))
        if not kind.has_likelihood:
            raise ValueError(
                f"--judge {judge} has no likelihood to score texts by: name another model of the comparison."
            )
    return Plan(models, seeds, num_texts, text_length, judge, common, folder)


def _make_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="bd3lm compare", allow_abbrev=False, add_help=False)
    parser.add_argument("--models", nargs="+")
    parser.add_argument("--seeds", nargs="+", type=int, required=True)
    parser.add_argument("--num_texts", type=integer(1), required=True)
    parser.add_argument("--text_length", type=integer(2), required=True)  # the first token of a text is given
    parser.add_argument("--judge")
    parser.add_argument("--output_dir", type=Path, default=Path("bd3lm-comparison"))
    for name in field_names():
        if name != "output_dir":
            parser.add_argument(f"--{name}", nargs="+", type=yaml.safe_load, default=argparse.SUPPRESS)
    return parser


def compare_models(plan: Plan) -> list[ComparedModel]:
    """Train the models that have no complete run, generate samples with all models, and score them."""
    _check_files(plan)
    _check_runs(plan)
    if plan.judge not in plan.models:
        load_judge(plan.judge, load_tokenizer(plan.judge))  # an error now, not after the training
    results: dict[tuple[str, int], dict[str, Any]] = {}
    for seed in plan.seeds:
        for name in plan.models:
            results[name, seed] = _trained(plan, name, seed)
            logger.warning("run %d of %d is complete", len(results), len(plan.seeds) * len(plan.models))
    rows: list[ComparedModel] = []
    for (name, seed), result in results.items():
        folder = str(_folder(plan, name, seed))
        judge = str(_folder(plan, plan.judge, seed)) if plan.judge in plan.models else plan.judge
        reference = load_judge(judge, load_tokenizer(folder))
        model = load_model(folder).eval()
        samples = generate_samples(model, plan.num_texts, plan.text_length, seed=seed)
        tokens_of_one = plan.text_length - 1
        new_tokens = len(samples) * tokens_of_one
        firsts = samples[::_TEXTS_PER_BATCH]  # one of each batch
        tokens = _steps(plan, results, name, seed) * result["global_batch_size"] * model.config.model_length
        rows.append(
            ComparedModel(
                model=name,
                seed=seed,
                perplexity=result["after"].get("perplexity"),
                exact=model.exact_likelihood,
                training_tokens=tokens,
                training_tokens_per_second=_speed(result),
                generative_perplexity=summarize(reference.score(samples)).perplexity,
                entropy=mean_entropy([text.ids for text in samples]),
                forwards_per_token=sum(text.forwards for text in samples) / new_tokens,
                batch_forwards_per_token=sum(text.batch_forwards for text in firsts) / (len(firsts) * tokens_of_one),
                seconds_per_token=sum(text.seconds for text in samples) / new_tokens,
                dataset=result["held_out"],
                estimator=result["estimator"],
            )
        )
        # After every model, so that an interrupted comparison keeps its results.
        write_atomically(plan.folder / TABLE_NAME, json.dumps([row._asdict() for row in rows], indent=2) + "\n")
    return rows


def _folder(plan: Plan, name: str, seed: int) -> Path:
    return plan.folder / f"{name}-seed{seed}"


def _fields(plan: Plan, name: str, seed: int) -> dict[str, Any]:
    """Return the recipe of a run."""
    fields = {**plan.common, **plan.models[name], "seed": seed}
    if fields.get("init_from") in plan.models:
        fields["init_from"] = str(_folder(plan, fields["init_from"], seed))
    return fields


def _check_files(plan: Plan) -> None:
    """Refuse to replace files that no comparison wrote."""
    marked = has_mark(_RECIPE_HEADER.encode())
    table = plan.folder / TABLE_NAME
    recipes = [_folder(plan, name, seed).with_suffix(".yaml") for seed in plan.seeds for name in plan.models]
    foreign = [recipe for recipe in recipes if recipe.exists() and not marked(recipe)]
    foreign += [table] if table.exists() and not _is_table(table) else []
    if foreign:
        raise ValueError(
            f"{', '.join(map(str, foreign))}: not written by bd3lm compare. Name another --output_dir, or remove it."
        )


def _is_table(path: Path) -> bool:
    """Return whether a file is the table of a comparison."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(rows, list) and all(isinstance(row, dict) and {"model", "seed"} <= row.keys() for row in rows)


def _check_runs(plan: Plan) -> None:
    """Refuse values that any run would refuse, before the first run writes or trains anything."""
    with TemporaryDirectory() as folder:
        for name in plan.models:
            recipe = Path(folder, f"{name}.yaml")
            recipe.write_text(yaml.safe_dump(_fields(plan, name, plan.seeds[0])), encoding="utf-8")
            parse_arguments([str(recipe), "--output_dir", str(_folder(plan, name, plan.seeds[0]))])


def _trained(plan: Plan, name: str, seed: int) -> dict[str, Any]:
    """Return the results of a run, after training it unless it is complete."""
    folder = _folder(plan, name, seed)
    recipe = folder.with_suffix(".yaml")
    fields = _fields(plan, name, seed)
    if (folder / RESULTS_NAME).is_file() and recipe.is_file():
        before = read_yaml(recipe)
        if changed := sorted(k for k in before.keys() | fields.keys() if before.get(k) != fields.get(k)):
            raise ValueError(
                f"{folder} holds a run with another {', '.join(changed)}: name another --output_dir, or remove it."
            )
    else:
        recipe.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(recipe, f"{_RECIPE_HEADER}\n{yaml.safe_dump(fields, sort_keys=False)}")
        overwrite = is_run_folder(folder)  # an incomplete run of ours starts again; a foreign folder is refused
        run([str(recipe), "--output_dir", str(folder), "--overwrite_output_dir", str(overwrite)])
    return json.loads((folder / RESULTS_NAME).read_text(encoding="utf-8"))


def _steps(plan: Plan, results: Mapping[tuple[str, int], Mapping[str, Any]], name: str, seed: int) -> int:
    """Return the training steps of a run's weights, including those of the model that it starts from."""
    start = plan.models[name].get("init_from")
    before = _steps(plan, results, start, seed) if start is not None and start in plan.models else 0
    return before + int(results[name, seed]["steps"])


# A judge with another vocabulary reads the texts with its own tokenizer.
load_judge = functools.partial(load_reference_model, as_text=False, score_end=True)


def _speed(result: Mapping[str, Any]) -> float | None:
    """Return the median training speed of the log in tokens per second; None if it was never logged."""
    speeds = [entry["tokens_per_second"] for entry in result["losses"] if "tokens_per_second" in entry]
    return statistics.median(speeds) if speeds else None


def generate_samples(model: Any, count: int, length: int, *, seed: int) -> list[GeneratedText]:
    """Generate `count` samples of `length` tokens from the BOS token and the whole distribution."""
    ends = model.config.eos_token_id
    # Many decoders have no BOS token: their samples start with EOS, which separates documents.
    begin = model.config.bos_token_id
    if begin is None:
        begin = ends[0] if isinstance(ends, list) else ends
    # Not one by one, since the speed of a batch is compared.
    options: dict[str, Any] = {"batch_size": _TEXTS_PER_BATCH, "one_by_one": False, "do_sample": True}
    return generate_texts(model, [[begin]] * count, length - 1, seed=seed, **options)


def comparison_table(rows: Sequence[ComparedModel]) -> str:
    """Return the comparison as markdown: means over seeds, and the range if there are several."""
    head = ("model", "held-out perplexity", "generative perplexity", "entropy", "forwards per token", "in a batch")
    table = []
    for name in dict.fromkeys(row.model for row in rows):
        mine = [row for row in rows if row.model == name]
        sign = "" if all(row.exact for row in mine) else "<= "
        perplexities = [row.perplexity for row in mine if row.perplexity is not None]
        speeds = [row.training_tokens_per_second for row in mine if row.training_tokens_per_second is not None]
        cells = [
            sign + _spread(perplexities, 1) if perplexities else "none",
            _spread([row.generative_perplexity for row in mine], 1),
            _spread([row.entropy for row in mine], 2),
            _spread([row.forwards_per_token for row in mine], 2),
            _spread([row.batch_forwards_per_token for row in mine], 2),
            _spread([1000 * row.seconds_per_token for row in mine], 2),
            _spread(speeds, 0) if speeds else "unknown",
        ]
        table.append([name, *cells])
    seeds = len({row.seed for row in rows})
    tokens = ", ".join(f"{n:,}" for n in sorted({row.training_tokens for row in rows}))
    scored = "; ".join(dict.fromkeys(f"{row.dataset}, {row.estimator}" for row in rows))
    note = (
        f"Held-out text: {scored}. {tokens} training tokens, {seeds} seed{'s' if seeds > 1 else ''}; `<=` marks an "
        "upper bound, `none` a model without a likelihood."
    )
    return f"{markdown_table([*head, 'ms per token', 'training tokens/s'], table)}\n\n{note}"


def _spread(values: Sequence[float], digits: int) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(values) == 1 or max(values) - min(values) < 10**-digits:
        return mean
    return f"{mean} ({min(values):.{digits}f} - {max(values):.{digits}f})"


def main(argv: Sequence[str]) -> None:
    """Run `bd3lm compare` with these arguments; `bd3lm_hf.cli` reports errors and shows the help."""
    plan = read_plan(argv)
    try:
        rows = compare_models(plan)
    except KeyboardInterrupt:  # its own message advises to resume a run, but here that run starts again
        print("interrupted: complete runs are kept; repeat the command to continue.", file=sys.stderr)
        raise
    print(comparison_table(rows))
