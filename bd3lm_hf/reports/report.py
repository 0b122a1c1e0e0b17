"""`bd3lm report`: write a page of tables, figures and samples from the results of runs and evaluations.

bd3lm report RUN... [--output report.html]

RUN is the folder of a training run, finished or not; a folder of runs or result files; or a result file of eval,
quality or compare (.json), or of samples (.jsonl). The page needs no other file; its figures are also written as PNG.
The template `report.html` renders and escapes the sections of the page.

A table is made from records, which are mappings, and columns, each of which names a field of the records. Columns
without any value are left out.
"""

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from jinja2 import Environment, StrictUndefined

from bd3lm_hf.evaluation.results import describe_estimator
from bd3lm_hf.reports.figures import (
    Figure,
    as_svg,
    check_matplotlib,
    curves,
    intervals,
    rendered,
    speed_quality_figure,
    variances,
)
from bd3lm_hf.reports.run_reader import Material, Named, Run, RunSample, describe_setting, finite, read_material
from bd3lm_hf.user_files import check_output_file, has_mark, write_atomically


def write_report(paths: Sequence[Path], output: Path, *, overwrite: bool = False) -> list[Path]:
    """Read the results and write the page and its figures, `<name of the page>-<figure>.png`.

    Equal inputs give equal bytes: nothing in the page depends on the time.

    Returns:
        The files, the page first.

    Raises:
        ValueError: if the output cannot be written, matplotlib is missing, or a file cannot be read (see
            `read_material`).
    """
    is_ours = has_mark(b'<meta name="generator" content="bd3lm_hf')
    check_output_file(output, "--output", is_ours=is_ours, overwrite=overwrite)
    if output.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--output {output}: a report is an HTML page, so its name must end in .html.")
    check_matplotlib()
    material = read_material(paths)
    try:
        figures = draw(material)
        text = page(material, figures)
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ValueError(  # fields are read only while drawing, long after their file was opened
            f"{', '.join(map(str, paths))}: results are damaged or not ours: a field is missing or has the wrong type "
            f"({type(error).__name__}: {error})."
        ) from error
    write_atomically(output, text)
    written = [output]
    for figure in (figure for group in figures.values() for figure in group):
        written.append(output.with_name(f"{output.stem}-{figure.name}.png"))
        write_atomically(written[-1], rendered(figure, "png"))
    return written


def draw(material: Material) -> dict[str, list[Figure]]:
    """Return every figure that has data, by section of the page."""
    noise = [intervals(material.runs), *(variances(run, n) for n, run in enumerate(material.runs, start=1))]
    samplers = [speed_quality_figure(named, number) for number, named in enumerate(material.qualities, start=1)]
    return {
        "curves": curves(material.runs),
        "noise": [figure for figure in noise if figure is not None],
        "quality": [figure for figure in samplers if figure is not None],
    }


def run(arguments: argparse.Namespace) -> None:
    """Run `bd3lm report`."""
    written = write_report(arguments.runs, arguments.output, overwrite=arguments.overwrite)
    count = len(written) - 1
    print(f"{written[0]}, and {count} figure{'' if count == 1 else 's'} as {written[0].stem}-*.png")


_MAX_SAMPLES = 8  # per samples file
_LONGEST_SAMPLE = 4000  # characters
# Fields of a result that record what produced it.
_HASHES = ("config_sha256", "weights_sha256", "model_weights", "tokenizer_sha256", "data_sha256")
_ORIGIN = (
    *("seed", "seconds", "processes", "device", "dtype", "bd3lm_hf", "torch", "transformers", "datasets", "python"),
    *_HASHES,
)

Record = Mapping[str, Any]


class Cell(NamedTuple):
    """A cell of a table; its number competes with the others in its column."""

    text: str
    value: float | None = None
    is_best: bool = False


class Column(NamedTuple):
    """A column of a table."""

    title: str
    field: str  # of a record
    form: str = ""  # format of the numbers; empty for text
    best: Callable[[Iterable[float]], float] | None = None  # min or max, to mark the best number
    error: str = ""  # field with the standard error
    scale: float = 1.0


class Table(NamedTuple):
    """A table; its first column names the rows."""

    columns: list[tuple[str, bool]]  # title of each, and whether it has numbers
    rows: list[list[Cell]]
    title: str = ""
    note: str = ""
    is_folded: bool = False


class Section(NamedTuple):
    """A section of the page."""

    name: str  # of its anchor
    title: str
    note: str = ""
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    samples: Sequence[tuple[str, list[RunSample], int]] = ()  # title, the last samples, and how many are left out


def page(material: Material, figures: Mapping[str, Sequence[Figure]]) -> str:
    """Return the whole page.

    Args:
        figures: by section: `curves`, `noise` and `quality`.
    """
    sections = [
        Section("perplexity", "Perplexity of held-out text", _PERPLEXITY, tables=_perplexity(material)),
        Section("curves", "Training", figures=figures["curves"]),
        Section("noise", "Interval of noise levels", _NOISE, figures["noise"]),
        Section("comparison", "Comparison", _COMPARED, tables=[*map(_comparison, material.comparisons)]),
        Section("generated", "Quality of generated text", _SCORED, tables=_generated(material.generated)),
        Section("quality", "Quality over speed", "", figures["quality"], [*map(_quality, material.qualities)]),
        Section("samples", "Samples", "Unedited, special tokens left out.", samples=_samples(material)),
        Section("configuration", "Configuration", tables=_configuration(material.runs)),
        Section("versions", "Versions and seeds", tables=_versions(material)),
    ]
    shown = [section for section in sections if section.figures or section.tables or section.samples]
    template = resources.files("bd3lm_hf.reports").joinpath("report.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    title = f"Report of {material.runs[0].name}" if len(material.runs) == 1 else "Report"
    fields = {"title": title, "lede": _best_run(material.runs), "runs": material.runs, "sections": shown}
    return environment.from_string(template).render(fields, as_svg=as_svg) + "\n"


# Tables


def table(columns: Sequence[Column], records: Sequence[Record], *, group: str = "", **texts: Any) -> Table:
    """Return a table in which the best number of each group of records is marked.

    Args:
        group: a field; only records with the same value of it compete. By default all do.
        texts: title, note and `is_folded` of the table.
    """
    kept, cells = [], []
    groups = [str(record.get(group)) for record in records]
    for number, column in enumerate(columns):
        values = [_cell(column, record) for record in records]
        if number == 0 or any(cell.text for cell in values):
            cells.append(_mark_best(values, groups, column.best))
            kept.append((column.title, bool(column.form)))
    return Table(kept, [list(row) for row in zip(*cells, strict=True)], **texts)


def _cell(column: Column, record: Record) -> Cell:
    if not column.form:
        value = record.get(column.field)
        return Cell("" if value is None else str(value))
    number, spread = finite(record, column.field), finite(record, column.error)
    if number is None:
        return Cell("")
    text = f"{number * column.scale:{column.form}}"
    if spread is not None:
        text += f" ± {spread * column.scale:{column.form}}"
    is_bound = column.field == "perplexity" and record.get("bound", False)
    return Cell(f"≤\xa0{text}" if is_bound else text, number)


def _mark_best(cells: list[Cell], groups: list[str], best: Any) -> list[Cell]:
    marked = []
    for cell, group in zip(cells, groups, strict=True):
        rivals = {other.value for other, its_group in zip(cells, groups, strict=True) if its_group == group} - {None}
        is_best = best is not None and len(rivals) > 1 and cell.value == best(rivals)
        marked.append(cell._replace(is_best=is_best))
    return marked


# Sections

_PERPLEXITY = (
    "Lower is better. ≤ marks an upper bound, or an estimate of it from random noise: the model's perplexity is "
    "lower. ± is one standard error. The star marks the lowest of those scored on the same tokens. Perplexities "
    "can be compared within one vocabulary only, bits per byte across vocabularies."
)
_NOISE = (
    "In training, a random share of each block is masked. How much that share varies determines how noisy the loss "
    "is. The search measures the noise for several intervals and keeps the one where it is lowest."
)
_COMPARED = (
    "Models trained on the same text. ≤ marks an upper bound, or an estimate of it. Generative perplexity is that of "
    "their samples under one judge; it means little where the entropy is low, as in text that repeats itself."
)
_SCORED = "Samples scored by a judge. Numbers can be compared under the same judge only."


def _final_score(run: Run) -> dict[str, Any]:
    """Return the score of a run after training, with its dataset and estimator."""
    about = {"model": run.name, "dataset": run.held_out, "estimator": run.estimator(final=True)}
    unigram = finite(run.results, "unigram_perplexity")
    return _scored({**(run.results.get("after") or {}), **about, "bound": not run.is_exact, "unigram": unigram})


def _evaluation(result: Record) -> dict[str, Any]:
    bound = result.get("bound", True) is not False  # a result that does not say may be a bound
    about = {"model": _last_name(result.get("model")), "dataset": f"{result['dataset']} ({result.get('split')} split)"}
    estimator = describe_estimator(result.get("estimator"), result.get("num_samples"), bound=bound)
    return _scored({**result, **about, "estimator": estimator, "bound": bound})


def _scored(record: dict[str, Any]) -> dict[str, Any]:
    text = (record["dataset"], record.get("num_sequences"), record.get("num_tokens"))
    return {**_with_spread(record, "perplexity"), "text": text}


def _with_spread(record: Record, name: str) -> dict[str, Any]:
    """Add the standard error of a perplexity: that of the mean NLL is, to first order, that of its logarithm."""
    value, error = finite(record, name), finite(record, "standard_error")
    return {**record, "spread": None if value is None or error is None else value * error}


def _last_name(path: Any) -> str:
    return PurePath(str(path or "?")).name


def _best_run(runs: Sequence[Run]) -> str:
    """Return a sentence on the run with the lowest perplexity, if all were scored on the same text."""
    scored = [record for record in map(_final_score, runs) if finite(record, "perplexity") is not None]
    if not scored or len({record["text"] for record in scored}) > 1:
        return ""
    best = min(scored, key=lambda record: record["perplexity"])
    value, unigram = best["perplexity"], best["unigram"]
    below = "" if unigram is None else f", {unigram / value:.1f} times below that of a unigram model ({unigram:,.0f})"
    which, bound = "The" if len(runs) == 1 else "The lowest", "at most " if best["bound"] else ""
    return (
        f"{which} perplexity on held-out text is {bound}{value:,.1f} "
        f"({best['model']}: {best['estimator']}, {best['dataset']}){below}."
    )


def _perplexity(material: Material) -> list[Table]:
    """Return one table of the runs' own held-out text and of evaluations."""
    columns = [
        Column("model", "model"),
        Column("dataset", "dataset"),
        Column("estimator", "estimator"),
        Column("perplexity", "perplexity", ",.2f", min, error="spread"),
        Column("nats per token", "nll", ".4f", error="standard_error"),
        Column("bits per byte", "bits_per_byte", ".4f"),
        Column("sequences", "num_sequences", ",.0f"),
        Column("scored tokens", "num_tokens", ",.0f"),
        Column("unigram model", "unigram", ",.1f"),
    ]
    runs = [record for record in map(_final_score, material.runs) if finite(record, "perplexity") is not None]
    records = [*runs, *map(_evaluation, material.evaluations)]
    return [table(columns, records, group="text")] if records else []


def _comparison(named: Named) -> Table:
    columns = [
        Column("model", "model"),
        Column("seed", "seed", ".0f"),
        Column("dataset", "dataset"),
        Column("estimator", "estimator"),
        Column("held-out perplexity", "perplexity", ",.2f", min),
        Column("generative perplexity", "generative_perplexity", ",.2f", min),
        Column("entropy (nats)", "entropy", ".3f"),
        Column("forwards per token", "forwards_per_token", ".3f", min),
        Column("ms per token", "seconds_per_token", ".2f", min, scale=1000),
        Column("training tokens", "training_tokens", ",.0f"),
        Column("training tokens/s", "training_tokens_per_second", ",.0f", max),
    ]
    return table(columns, [{**row, "bound": not row.get("exact")} for row in named.content], title=named.name)


def _generated(results: Sequence[Named]) -> list[Table]:
    columns = [
        Column("model", "model"),
        Column("judge", "judge"),
        Column("texts", "num_samples", ",.0f"),
        Column("scored tokens", "scored_tokens", ",.0f"),
        Column("generative perplexity", "generative_perplexity", ",.2f", min, error="spread"),
        Column("entropy (nats)", "entropy", ".3f", max),
        Column("distinct 2-grams", "distinct_2", ".1%", max),
        Column("repeated 4-grams", "repetition_4", ".1%", min),
        Column("forwards per token", "forwards_per_token", ".3f", min),
    ]
    records = [_with_spread(named.content, "generative_perplexity") for named in results]
    records = [{**record, **{name: _last_name(record.get(name)) for name in ("model", "judge")}} for record in records]
    return [table(columns, records, group="judge")] if records else []


def _quality(named: Named) -> Table:
    columns = [
        Column("sampler", "sampler"),
        Column("setting", "fields"),
        Column("tokens per forward", "tokens_per_forward", ".2f", max),
        Column("generative perplexity", "perplexity", ",.2f", min, error="spread"),
        Column("entropy (nats)", "entropy", ".3f", max),
    ]
    about, points = named.content, []
    for point in about["points"]:
        points.append({**_with_spread(point, "perplexity"), "fields": describe_setting(point["setting"])})
    count = "Samples" if about.get("num_samples") is None else f"{about['num_samples']} samples per setting"
    prompts = "without prompts" if about.get("dataset") is None else f"that continue text of {about['dataset']}"
    note = f"{count} of {_last_name(about.get('model'))} {prompts}, scored by the judge {about['judge']}."
    return table(columns, points, title=named.name, note=note)


def _samples(material: Material) -> list[tuple[str, list[RunSample], int]]:
    """Return the samples of each run and file, the latest first, so the final state comes first."""
    shown = []
    for name, samples in [*((run.name, run.samples) for run in material.runs), *material.samples]:
        if samples:
            kept = [sample._replace(text=_cut(sample.text)) for sample in reversed(samples[-_MAX_SAMPLES:])]
            shown.append((name, kept, len(samples) - len(kept)))
    return shown


def _cut(text: str) -> str:
    more = f" [... {len(text) - _LONGEST_SAMPLE:,} more characters]" if len(text) > _LONGEST_SAMPLE else ""
    return text[:_LONGEST_SAMPLE] + more


def _configuration(runs: Sequence[Run]) -> list[Table]:
    """Return the fields of recipe and model, first those in which the runs differ."""
    values = {run.name: {**run.config, **run.recipe} for run in runs}
    names = sorted({name for own in values.values() for name in own} - {"auto_map", "output_dir"})
    records = [{"": name, **{run: own.get(name) for run, own in values.items()}} for name in names]
    differing = [record for record in records if len({str(value) for value in list(record.values())[1:]}) > 1]
    shared = [record for record in records if record not in differing]
    columns = [Column("field", ""), *(Column(name, name) for name in values)]
    tables = [table(columns, differing, note="Where the runs differ:")] if differing else []
    if shared:
        title = f"{len(shared)} fields{' that all runs share' if len(runs) > 1 else ''}"
        tables.append(table(columns[:2], shared, title=title, is_folded=True))
    return tables


def _versions(material: Material) -> list[Table]:
    """Return the versions and seeds that produced the numbers, with shortened hashes."""
    records: list[dict[str, Any]] = []
    for run in material.runs:
        facts = {
            name: run.results.get(name) for name in ("seed", "steps", "global_batch_size", "world_size", "seconds")
        }
        records.append({"result": run.name, **facts, **(run.results.get("versions") or {})})
    for result in (*material.evaluations, *(named.content for named in material.generated)):
        title = f"{_last_name(result.get('model'))} on {result.get('dataset') or 'samples'}"
        records.append({"result": title, **{name: result.get(name) for name in _ORIGIN}})
    for record in records:
        record |= {name: str(record[name])[:12] for name in _HASHES if record.get(name) is not None}
    names = list(dict.fromkeys(name for record in records for name, value in record.items() if value is not None))
    columns = [Column(name.replace("_", " "), name, ",.0f" if name == "seconds" else "") for name in names]
    return [table(columns, records)] if len(names) > 1 else []
