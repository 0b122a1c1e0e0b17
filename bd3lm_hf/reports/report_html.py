"""The page of a report: sections, tables and samples as HTML. Every text of a file is escaped here."""

import html
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import resources
from typing import Any, NamedTuple

from bd3lm_hf.reports.plotting import Figure, as_svg
from bd3lm_hf.reports.run_reader import Material, Named, Run, RunSample, finite


_MOST_SAMPLES = 8  # of a file of samples


_LONGEST_SAMPLE = 4000  # characters


_NONE = "&ndash;"


class Cell(NamedTuple):
    """A cell of a table. A number has a value to compare, and a text to show."""

    text: str  # HTML
    value: float | None = None
    is_number: bool = False


class Column(NamedTuple):
    """A column and, where its numbers compete, which of two is better."""

    title: str
    best: Callable[[Iterable[float]], float] | None = None  # min or max
    is_number: bool = False


def page(material: Material, figures: Mapping[str, Sequence[Figure]]) -> str:
    """The whole page.

    Args:
        figures: by section: `curves`, `noise` and `quality`.
    """
    sections = [
        ("perplexity", "Perplexity of held-out text", _perplexity(material)),
        ("curves", "Training", _figures(figures["curves"])),
        ("noise", "Noise interval", _noise(figures["noise"])),
        ("comparison", "Comparison", "".join(map(_comparison, material.comparisons))),
        ("generated", "Quality of what is written", _generated(material.generated)),
        ("quality", "Quality over forwards", _quality(material.qualities, figures["quality"])),
        ("samples", "Samples", _samples(material)),
        ("configuration", "Configuration", _configuration(material.runs)),
        ("versions", "Versions and seeds", _versions(material)),
    ]
    shown = [section for section in sections if section[2]]
    links = "".join(f'<a href="#{name}">{title}</a>' for name, title, _ in shown)
    content = "\n".join(f'<section id="{name}">\n<h2>{title}</h2>\n{body}\n</section>' for name, title, body in shown)
    lede = (
        f'<p class="lede">{_lede(material)}</p>\n<nav aria-label="sections">{links}</nav>\n{_missing(material.runs)}'
    )
    fields = {"TITLE": html.escape(_title(material)), "LEDE": lede, "CONTENT": content}
    template = resources.files("bd3lm_hf.reports").joinpath("report.html").read_text(encoding="utf-8")
    # In one pass: what a text of a file holds is no field of the template.
    return re.sub("@(TITLE|LEDE|CONTENT)@", lambda found: fields[found[1]], template)


def table(columns: Sequence[Column], rows: Sequence[Sequence[Cell]], groups: Sequence[Any] | None = None) -> str:
    """A table whose first column names the rows; the best number of each group of rows is marked.

    Args:
        groups: of each row; numbers compete within a group. All rows are one by default.
    """
    groups = [None] * len(rows) if groups is None else groups
    head = "".join(f"<th{_kind(column.is_number)}>{column.title}</th>" for column in columns)
    lines = []
    for row, group in zip(rows, groups, strict=True):
        rivals = [rival for rival, its in zip(rows, groups, strict=True) if its == group]
        cells = [f'<th scope="row">{row[0].text}</th>']
        for place, (column, cell) in enumerate(zip(columns[1:], row[1:], strict=True), start=1):
            values = [rival[place].value for rival in rivals]
            known = [value for value in values if value is not None]
            is_best = column.best is not None and len(set(known)) > 1 and cell.value == column.best(known)
            mark = '<span role="img" aria-label="best" title="best">&#9733;</span> ' if is_best else ""
            cells.append(f"<td{_kind(cell.is_number, is_best)}>{mark}{cell.text}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    body = f"<thead><tr>{head}</tr></thead>\n<tbody>\n" + "\n".join(lines) + "\n</tbody>"
    return f'<div class="table" tabindex="0"><table>\n{body}</table></div>'


def _kind(is_number: bool, is_best: bool = False) -> str:
    names = " ".join(name for name, holds in (("number", is_number), ("best", is_best)) if holds)
    return f' class="{names}"' if names else ""


def _text(value: Any) -> Cell:
    return Cell(_NONE if value is None or value == "" else html.escape(str(value)))


def _number(value: float | None, form: str, sign: str = "", error: float | None = None) -> Cell:
    if value is None:
        return Cell(_NONE, is_number=True)
    spread = "" if error is None else f" &plusmn; {error:{form}}"
    return Cell(f"{sign}{value:{form}}{spread}", value, is_number=True)


def _title(material: Material) -> str:
    if len(material.runs) == 1:
        return f"Report of {material.runs[0].name}"
    if material.runs:
        return f"Report of {len(material.runs)} training runs"
    if material.evaluations:
        return f"Report of {_count(len(material.evaluations), 'evaluation')}"
    return "Report of results"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _lede(material: Material) -> str:
    """Return a summary sentence: how many runs there are, and the best."""
    told = [
        (len(material.runs), "training run"),
        (len(material.evaluations), "evaluation"),
        (len(material.comparisons), "comparison"),
        (len(material.generated), "evaluation of written texts"),
        (len(material.qualities), "quality curve"),
        (len(material.samples), "file of samples"),
    ]
    plural = {"evaluation of written texts": "evaluations of written texts", "file of samples": "files of samples"}
    parts = [_count(n, noun) if n == 1 or noun not in plural else f"{n} {plural[noun]}" for n, noun in told if n]
    sentences = ["This page shows " + ", ".join(parts) + "."]
    scored = [(value, run) for run in material.runs if (value := finite(_after(run), "perplexity")) is not None]
    if scored and len({str(run.recipe.get("dataset")) for _, run in scored}) == 1:
        value, best = min(scored, key=lambda pair: pair[0])
        gain = finite(best.results, "unigram_perplexity")
        beside = f", {gain / value:.1f} times below that of word frequencies alone ({gain:,.0f})" if gain else ""
        bound = "" if best.is_exact else "at most "
        who = "Its" if len(scored) == len(material.runs) == 1 else "The lowest"
        name = html.escape(best.name)
        sentences.append(f"{who} perplexity on held-out text is {bound}{value:,.1f} (<b>{name}</b>){beside}.")
    return " ".join(sentences)


def _missing(runs: Sequence[Run]) -> str:
    items = [
        f"<li><b>{html.escape(run.name)}</b>: {html.escape('; '.join(run.missing))}</li>"
        for run in runs
        if run.missing
    ]
    return f'<div class="missing" role="note">Not everything is there:<ul>{"".join(items)}</ul></div>' if items else ""


def _after(run: Run) -> Mapping[str, Any]:
    return run.results.get("after") or {}


def _perplexity(material: Material) -> str:
    """Runs' own held-out text and evaluations in one table."""
    columns = [
        Column("model"),
        Column("dataset"),
        Column("estimator"),
        Column("perplexity", min, True),
        Column("nats per token", None, True),
        Column("bits per byte", None, True),
        Column("scored tokens", None, True),
        Column("unigram", None, True),
        Column("below unigram", None, True),
    ]
    rows, groups = [], []
    for run in material.runs:
        score, gain = _after(run), finite(run.results, "unigram_perplexity")
        if finite(score, "perplexity") is not None:
            dataset = run.recipe.get("dataset")
            rows.append(_scored(run.name, dataset, run.estimator, score, not run.is_exact, gain))
            groups.append((dataset, None))
    for row in material.evaluations:
        draws = row.get("num_samples")
        estimator = f"{row.get('estimator')}, {draws} draws" if draws not in (None, 1) else row.get("estimator")
        dataset, name = f"{row['dataset']} ({row.get('split', '?')})", str(row.get("model", "?")).rstrip("/")
        # A result that does not say is a bound: then nothing is claimed that may not hold.
        rows.append(
            _scored(name.rsplit("/", 1)[-1], dataset, estimator, row, row.get("bound", True) is not False, None)
        )
        groups.append((row["dataset"], row.get("split")))
    if not rows:
        return ""
    has_unigram = any(row[7].value is not None for row in rows)
    if not has_unigram:
        columns, rows = columns[:7], [row[:7] for row in rows]
    unigram = (
        " Unigram is the perplexity of word frequencies on the same tokens; beside it stands how many times lower the "
        "model is."
    )
    note = (
        "Lower is better. &le; marks an upper bound: the model's true perplexity is lower. After &plusmn; stands one "
        f"standard error.{unigram if has_unigram else ''} Perplexities compare within one dataset and vocabulary "
        "only, bits per byte across vocabularies. The star marks the lowest of a dataset; between overlapping "
        "standard errors it is no proof."
    )
    return f'<p class="note">{note}</p>\n{table(columns, rows, groups)}'


def _scored(
    name: str, dataset: Any, estimator: Any, score: Mapping[str, Any], is_bound: bool, unigram: float | None
) -> list[Cell]:
    perplexity, error = finite(score, "perplexity"), finite(score, "standard_error")
    # The error is that of the mean nll, so to first order that of the log of the perplexity.
    spread = None if perplexity is None or error is None else perplexity * error
    return [
        _text(name),
        _text(dataset),
        _text(estimator),
        _number(perplexity, ",.1f" if (perplexity or 0) >= 100 else ",.2f", "&le;&nbsp;" if is_bound else "", spread),
        _number(finite(score, "nll"), ".4f", error=error),
        _number(finite(score, "bits_per_byte"), ".4f"),
        _number(finite(score, "num_tokens"), ",.0f"),
        _number(unigram, ",.1f"),
        _number(None if unigram is None or not perplexity else unigram / perplexity, ".2f", "&times;&nbsp;"),
    ]


def _figures(figures: Sequence[Figure]) -> str:
    """Each with its caption, which also names it for those who do not see it."""
    return "\n".join(
        f"<figure>{as_svg(figure).replace('<svg', f'<svg aria-label={_quoted(figure.caption)}', 1)}"
        f"<figcaption>{html.escape(figure.caption)}</figcaption></figure>"
        for figure in figures
    )


def _quoted(text: str) -> str:
    return f'"{html.escape(text)}"'


def _noise(figures: Sequence[Figure]) -> str:
    note = (
        "A block-diffusion model is trained on text of which a random share is masked. How much that share varies "
        "decides how noisy the training loss is. The search measures this noise for several intervals and goes on "
        "with the one where it is lowest."
    )
    return f"<p>{note}</p>\n{_figures(figures)}" if figures else ""


def _comparison(named: Named) -> str:
    columns = [
        Column("model"),
        Column("seed", None, True),
        Column("held-out perplexity", min, True),
        Column("generative perplexity", min, True),
        Column("entropy (nats)", None, True),
        Column("forwards per token", min, True),
        Column("ms per token", min, True),
        Column("training tokens", None, True),
        Column("training tokens/s", max, True),
    ]
    rows = [
        [
            _text(row["model"]),
            _number(finite(row, "seed"), ".0f"),
            _number(finite(row, "perplexity"), ",.2f", "" if row.get("exact") else "&le;&nbsp;"),
            _number(finite(row, "generative_perplexity"), ",.2f"),
            _number(finite(row, "entropy"), ".3f"),
            _number(finite(row, "forwards_per_token"), ".3f"),
            _number(None if (s := finite(row, "seconds_per_token")) is None else 1000 * s, ".2f"),
            _number(finite(row, "training_tokens"), ",.0f"),
            _number(finite(row, "training_tokens_per_second"), ",.0f"),
        ]
        for row in named.content
    ]
    note = (
        "Models trained on the same text. Generative perplexity is that of the texts they wrote, under a judge; it "
        "tells little where the entropy is low, as of texts that repeat themselves."
    )
    return f'<h3>{html.escape(named.name)}</h3>\n<p class="note">{note}</p>\n{table(columns, rows)}'


def _generated(results: Sequence[Named]) -> str:
    columns = [
        Column("model"),
        Column("judge"),
        Column("texts", None, True),
        Column("generative perplexity", min, True),
        Column("entropy (nats)", max, True),
        Column("distinct 2-grams", max, True),
        Column("repeated 4-grams", min, True),
        Column("forwards per token", min, True),
    ]
    rows, groups = [], []
    for _, row in results:
        value, error = finite(row, "generative_perplexity"), finite(row, "standard_error")
        rows.append(
            [
                _text(str(row.get("model", "?")).rstrip("/").rsplit("/", 1)[-1]),
                _text(str(row.get("judge", "?")).rstrip("/").rsplit("/", 1)[-1]),
                _number(finite(row, "num_samples"), ",.0f"),
                _number(value, ",.2f", error=None if value is None or error is None else value * error),
                _number(finite(row, "entropy"), ".3f"),
                _number(finite(row, "distinct_2"), ".1%"),
                _number(finite(row, "repetition_4"), ".1%"),
                _number(finite(row, "forwards_per_token"), ".3f"),
            ]
        )
        groups.append(row.get("judge"))
    note = "Texts that the models wrote, scored by a judge. Figures compare under one judge only."
    return f'<p class="note">{note}</p>\n{table(columns, rows, groups)}' if rows else ""


def _quality(results: Sequence[Named], figures: Sequence[Figure]) -> str:
    columns = [
        Column("sampler"),
        Column("setting"),
        Column("tokens per forward", max, True),
        Column("generative perplexity", min, True),
        Column("entropy (nats)", max, True),
    ]
    parts = [_figures(figures)]
    for named in results:
        rows = []
        for point in named.content["points"]:
            setting = ", ".join(f"{name} {value}" for name, value in point["setting"].items() if value is not None)
            value, error = finite(point, "perplexity"), finite(point, "standard_error")
            spread = None if value is None or error is None else value * error
            rows.append(
                [
                    _text(point["sampler"]),
                    _text(setting or "default"),
                    _number(finite(point, "tokens_per_forward"), ".2f"),
                    _number(value, ",.2f", error=spread),
                    _number(finite(point, "entropy"), ".3f"),
                ]
            )
        judge = html.escape(str(named.content["judge"]))
        head = (
            f'<h3>{html.escape(named.name)}</h3>\n<p class="note">Judge: {judge}. &plusmn; is one standard error.</p>'
        )
        parts.append(f"{head}\n{table(columns, rows)}")
    return "\n".join(parts) if results else ""


def _samples(material: Material) -> str:
    parts = []
    for name, samples in [*((run.name, run.samples) for run in material.runs), *material.samples]:
        if samples:
            parts.append(f"<h3>{html.escape(name)}</h3>\n{_texts(samples)}")
    note = '<p class="note">Unedited, special tokens left out.</p>'
    return "\n".join([note, *parts]) if parts else ""


def _texts(samples: Sequence[RunSample]) -> str:
    """The last text in full, so that the state at the end is seen first; those before it on demand."""
    shown = list(samples[-_MOST_SAMPLES:])
    blocks = [f'<p class="note">{html.escape(origin)}</p><pre>{_cut(text)}</pre>' for origin, text in shown]
    left = len(samples) - len(shown)
    more = f'<p class="note">{left} more are not shown.</p>' if left else ""
    earlier = ""
    if len(blocks) > 1:
        title = _count(len(blocks) - 1, "earlier text")
        earlier = f"<details><summary>{title}</summary>{''.join(blocks[:-1])}{more}</details>"
    return blocks[-1] + earlier


def _cut(text: str) -> str:
    more = f" [... {len(text) - _LONGEST_SAMPLE:,} more characters]" if len(text) > _LONGEST_SAMPLE else ""
    return html.escape(text[:_LONGEST_SAMPLE] + more) or "(empty)"


def _configuration(runs: Sequence[Run]) -> str:
    """Fields of the recipe and the model; those in which the runs differ come first."""
    fields = {run.name: {**run.config, **run.recipe} for run in runs}
    names = sorted({name for of_run in fields.values() for name in of_run} - {"auto_map", "output_dir"})
    differing = [n for n in names if len({str(of_run.get(n)) for of_run in fields.values()}) > 1]
    shared = [name for name in names if name not in differing]
    columns = [Column("field"), *(Column(html.escape(run.name)) for run in runs)]
    parts = []
    if differing:
        rows = [[_text(name), *(_text(fields[run.name].get(name)) for run in runs)] for name in differing]
        parts.append(f'<p class="note">Where the runs differ:</p>\n{table(columns, rows)}')
    if shared:
        rows = [[_text(name), _text(fields[runs[0].name].get(name))] for name in shared]
        title = (
            f"{_count(len(shared), 'field')} that all runs share" if len(runs) > 1 else _count(len(shared), "field")
        )
        parts.append(f"<details><summary>{title}</summary>{table([Column('field'), Column('value')], rows)}</details>")
    return "\n".join(parts)


def _versions(material: Material) -> str:
    """Return the versions and seeds that produced the numbers."""
    rows: list[tuple[str, dict[str, Any]]] = []
    for run in material.runs:
        facts = {name: run.results.get(name) for name in ("seed", "steps", "global_batch_size", "world_size")}
        seconds = finite(run.results, "seconds")
        told = {"seconds": None if seconds is None else f"{seconds:,.0f}", **(run.results.get("versions") or {})}
        rows.append((run.name, {**facts, **told}))
    for result in (*material.evaluations, *(named.content for named in material.generated)):
        name = str(result.get("model", "?")).rstrip("/").rsplit("/", 1)[-1]
        of = result.get("dataset") or "written texts"
        rows.append(
            (f"{name} on {of}", {key: str(result[key])[:12] for key in _ORIGIN if result.get(key) is not None})
        )
    names = list(dict.fromkeys(name for _, facts in rows for name, value in facts.items() if value is not None))
    if not names:
        return ""
    columns = [Column("result"), *(Column(html.escape(name.replace("_", " "))) for name in names)]
    return table(columns, [[_text(name), *(_text(facts.get(column)) for column in names)] for name, facts in rows])


_ORIGIN = (
    *("seed", "seconds", "processes", "device", "dtype", "bd3lm_hf", "torch", "transformers", "datasets", "python"),
    *("config_sha256", "weights_sha256", "model_weights", "tokenizer_sha256", "data_sha256"),
)

__all__ = ["Cell", "Column", "page", "table"]
