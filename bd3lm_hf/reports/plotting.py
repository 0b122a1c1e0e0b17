"""Every picture: curves of training runs, the noise interval and its variances, quality over forward passes."""

import io
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers.utils import logging

from bd3lm_hf.output_files import write_atomically
from bd3lm_hf.reports.run_reader import Named, Run, finite, series_of, smoothed
from bd3lm_hf.run_folder import CURVE_NAME


logger = logging.get_logger("bd3lm_hf.train")


#: Distinct in every common form of colour blindness, with a contrast of 3:1 and more; lines differ in form as well.
COLOURS = ("#0072b2", "#c4500a", "#007a5e", "#a84f86", "#82660a", "#4a4fa8", "#5f6368")


_LINES, _MARKERS = ("-", "--", "-.", ":"), "os^Dv"


#: Text, axes and grid. In the page these, and the colours above, are variables that follow the reader's scheme.
_INK, _SOFT, _GRID = "#1d2129", "#646b79", "#e2dfd8"


VARIABLES = {_INK: "ink", _SOFT: "soft", _GRID: "line", **{colour: f"c{n}" for n, colour in enumerate(COLOURS)}}


_MOST_SEARCHES = 6  # heat maps of a run, its first and last search among them


_FACE = 7.5, 3.9  # inches


class Figure(NamedTuple):
    """A drawing and what it shows."""

    name: str  # of its file, without the ending
    caption: str
    drawn: Any  # of matplotlib


def check_matplotlib() -> None:
    """Check that matplotlib is installed.

    Raises:
        ValueError: if it is not.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ValueError("pictures need matplotlib: pip install 'bd3lm-hf[plots]'.") from error


class Line(NamedTuple):
    """Values over the optimizer steps."""

    label: str
    steps: np.ndarray
    values: np.ndarray
    errors: np.ndarray | None = None  # one standard error


def draw_lines(axes: Any, lines: Sequence[Line], *, smooth: bool = False, final: str = "{:.4g}") -> None:
    """Draw lines with bands of one standard error, and write each final value to the right of the axes.

    Args:
        smooth: draw the values thinly and their running mean on top.
        final: format of the final value.
    """
    for index, line in enumerate(lines):
        style = _style(index)
        marker = _MARKERS[index % len(_MARKERS)] if len(line.steps) < 30 else None
        if smooth:
            axes.plot(line.steps, line.values, color=style["color"], alpha=0.3, linewidth=1)
        values = smoothed(line.values) if smooth else line.values
        axes.plot(line.steps, values, **style, marker=marker, markersize=4, linewidth=1.8, label=_label(line.label))
        if line.errors is not None:
            band = {"color": style["color"], "alpha": 0.15, "linewidth": 0}
            axes.fill_between(line.steps, values - line.errors, values + line.errors, **band)
    axes.set_xlim(left=0, right=1.02 * max([1, *(line.steps[-1] for line in lines)]))
    axes.set_xlabel("optimizer steps")
    _write_final_values(axes, [smoothed(line.values)[-1] if smooth else line.values[-1] for line in lines], final)


def _write_final_values(axes: Any, values: Sequence[float], form: str) -> None:
    """Write values at their height outside of the axes, where they cross neither lines nor one another."""
    to_axes = axes.transData + axes.transAxes.inverted()
    heights = [float(to_axes.transform((0, value))[1]) for value in values]
    lowest = -np.inf
    for index in np.argsort(heights):
        lowest = max(heights[index], lowest + 0.06)
        axes.annotate(
            form.format(values[index]),
            (1.01, lowest),
            xycoords="axes fraction",
            va="center",
            fontsize=8,
            color=_style(int(index))["color"],
            annotation_clip=False,
        )


def curves(runs: Sequence[Run]) -> list[Figure]:
    """Draw loss, held-out likelihood and speed over the steps, all runs in one figure each."""
    figures = []
    for draw, name, caption in (
        (_training_loss, "training-loss", "Training loss; thin lines are the logged values, thick ones their mean."),
        (_held_out, "held-out", "Negative log-likelihood of held-out text in training; bands are one standard error."),
        (_speed, "speed", "Speed of training, without evaluation and saving."),
    ):
        figure, axes = _axes()
        if draw(axes, runs):
            _legend(axes)
            figures.append(Figure(name, caption, figure))
    return figures


def _training_loss(axes: Any, runs: Sequence[Run]) -> bool:
    lines = _lines(runs, "loss")
    if lines:
        # The first steps of a fresh model would flatten everything after them.
        settled = np.concatenate([line.values[len(line.values) // 20 :] for line in lines])
        margin = 0.05 * (settled.max() - settled.min()) + 1e-9
        axes.set_ylim(settled.min() - margin, settled.max() + margin)
        axes.set_ylabel("loss (nats per token)")
        draw_lines(axes, lines, smooth=True)
    return bool(lines)


def _held_out(axes: Any, runs: Sequence[Run]) -> bool:
    lines = []
    for run in runs:
        for name in (name for name in run.series if name.startswith("eval_") and name.endswith("nll")):
            part = name.removeprefix("eval_").removesuffix("nll").strip("_")
            found = _lines([run], name, errors=f"{name.removesuffix('nll')}standard_error")
            lines += [line._replace(label=", ".join(filter(None, (run.name, part)))) for line in found]
    if lines:
        axes.set_ylabel("negative log-likelihood\n(nats per token)")
        draw_lines(axes, lines)
    return bool(lines)


def _speed(axes: Any, runs: Sequence[Run]) -> bool:
    lines = _lines(runs, "tokens_per_second")
    if lines:
        axes.set_ylim(0, 1.12 * max(1, *(line.values.max() for line in lines)))
        axes.set_ylabel("tokens per second")
        axes.yaxis.set_major_formatter("{x:,.0f}")
        draw_lines(axes, lines, final="{:,.0f}")
    return bool(lines)


def _interval(axes: Any, runs: Sequence[Run]) -> bool:
    for index, run in enumerate(runs):
        if not run.searches:
            continue
        steps = [search["step"] for search in run.searches]
        low, high = zip(*(search["interval"] for search in run.searches), strict=True)
        style = {**_style(index), "where": "post", "marker": _MARKERS[index % len(_MARKERS)], "markersize": 4}
        axes.fill_between(steps, low, high, step="post", color=style["color"], alpha=0.1, linewidth=0)
        axes.step(steps, low, **style, label=_label(run.name))
        axes.step(steps, high, **style)
    axes.set_ylim(-0.02, 1.04)
    axes.set_xlim(left=0)
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("mask rate (share of a block's tokens)")
    return bool(axes.lines)


def intervals(runs: Sequence[Run]) -> Figure | None:
    """Draw the interval of mask rates that each run drew from, over its steps."""
    figure, axes = _axes()
    if not _interval(axes, runs):
        return None
    _legend(axes)
    return Figure(
        "interval", "The interval of mask rates that each search found best: its lower and upper end.", figure
    )


_PANELS = (
    (_training_loss, "training loss"),
    (_held_out, "held-out negative log-likelihood"),
    (_interval, "interval of noise levels"),
    (_speed, "speed"),
)


def write_training_curve(log_history: Sequence[Mapping[str, Any]], folder: str | Path, *, title: str = "") -> None:
    """Write the logged numbers of a run as JSON and, if matplotlib is installed, as a picture.

    Args:
        log_history: the entries of a `TrainerState`; those of a resumed run reach back to its start.
        folder: gets `training_curve.json` and `training_curve.png`.
        title: line above the picture.
    """
    folder = Path(folder)
    run = Run(name="", folder=folder, series=series_of(log_history))
    content = {name: {"steps": x.tolist(), "values": y.tolist()} for name, (x, y) in run.series.items()}
    write_atomically(folder / CURVE_NAME, json.dumps(content) + "\n")
    picture = Path(CURVE_NAME).with_suffix(".png").name
    try:
        check_matplotlib()
    except ValueError:
        logger.warning(f"{picture} is not drawn without matplotlib: pip install 'bd3lm-hf[plots]'.")
        return
    from matplotlib.figure import Figure as Drawing

    if {"interval_min", "interval_max"} <= run.series.keys():
        (steps, low), (_, high) = run.series["interval_min"], run.series["interval_max"]
        run.searches = [{"step": s, "interval": ends} for s, *ends in zip(steps, low, high, strict=True)]
    drawing = Drawing(figsize=(11, 6.6), layout="constrained")
    drawn = 0
    for draw, name in _PANELS:
        axes = drawing.add_subplot(2, 2, drawn + 1)
        if draw(axes, [run]):
            _dress(axes)
            axes.set_title(name, loc="left")
            drawn += 1
        else:
            axes.remove()
    if not drawn:
        return
    drawing.suptitle(title.replace("$", r"\$"), fontsize=11)
    drawing.savefig(folder / picture, dpi=144)


def variances(run: Run, number: int) -> Figure | None:
    """Draw heat maps of the variance of the loss over lower end and width, one for each of some searches."""
    if not run.searches:
        return None
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure as Drawing

    count = min(len(run.searches), _MOST_SEARCHES)
    shown = [run.searches[index] for index in np.linspace(0, len(run.searches) - 1, count).round().astype(int)]
    values = [value for search in shown for value in _grid(search)[2].ravel() if np.isfinite(value) and value > 0]
    if not values:
        return None
    columns = min(3, count)
    rows = -(-count // columns)
    drawing = Drawing(figsize=(2.35 * columns + 1.1, 2.3 * rows + 0.5), layout="constrained")
    every: Any = drawing.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    norm = LogNorm(min(values), max(max(values), min(values) * 1.01))
    mesh: Any = None
    for axes, search in zip(every.ravel(), shown, strict=False):
        low, width, variance = _grid(search)
        mesh = axes.pcolormesh(low, width, variance, norm=norm, cmap="viridis", shading="nearest")
        axes.plot(
            *_low_and_width(search["interval"]), marker="*", markersize=13, color="white", markeredgecolor="black"
        )
        kept = "" if search.get("adopted", True) else ", not adopted"
        axes.set_title(f"step {search['step']:,}{kept}", fontsize=9, color=_INK)
    for axes in every.ravel():
        _dress(axes)
        axes.grid(visible=False)
    for axes in every.ravel()[count:]:
        axes.set_visible(False)
    drawing.supxlabel("lower end of the interval (mask rate)", fontsize=10, color=_INK)
    drawing.supylabel("width of the interval", fontsize=10, color=_INK)
    bar = drawing.colorbar(mesh, ax=every, shrink=0.9)
    bar.set_label("variance of a block's loss (nats²)", color=_INK)
    bar.ax.tick_params(which="both", colors=_SOFT, labelsize=8)
    bar.ax.yaxis.set_major_formatter("{x:g}")
    bar.ax.yaxis.set_minor_formatter("{x:g}")
    bar.outline.set_edgecolor(_GRID)
    caption = f"{run.name}: variance of the loss for each interval of mask rates; the star is the one that was chosen."
    return Figure(f"variance-{number}", caption, drawing)


def draw_interval_search(
    candidates: Sequence[Sequence[float]], variances: Sequence[float], errors: Sequence[float], best: int, title: str
) -> Any:
    """Return a drawing of the variance over the lower end of the interval, a line for each width.

    Args:
        candidates: intervals of mask rates, the whole one first.
        errors: standard errors of the variances.
        best: index of the chosen interval.
    """
    from matplotlib.figure import Figure as Drawing

    drawing = Drawing(figsize=(8, 5), dpi=144, layout="constrained")
    axes = drawing.subplots()
    _dress(axes)
    names = [f"[{low:.3g}, {high:.3g}]" for low, high in candidates]
    axes.axhline(variances[0], color=_SOFT, linestyle="--", label=f"{names[0]}, the whole interval")
    by_width: dict[float, list[int]] = {}
    for index, interval in enumerate(candidates[1:], start=1):
        by_width.setdefault(_low_and_width(interval)[1], []).append(index)
    for number, (width, members) in enumerate(sorted(by_width.items())):
        members.sort(key=lambda index: candidates[index][0])
        low, variance, error = zip(*((candidates[i][0], variances[i], errors[i]) for i in members), strict=True)
        style = {**_style(number), "marker": "o", "markersize": 4, "linewidth": 1.2, "capsize": 2}
        axes.errorbar(low, variance, error, label=f"width {width:g}", **style)
    chosen = f"chosen: {names[best]}, variance {variances[best]:.3g}"
    star: dict[str, Any] = {"marker": "*", "markersize": 16, "color": _INK, "linestyle": "none", "zorder": 3}
    axes.plot([candidates[best][0]], [variances[best]], label=chosen, **star)
    if min(variances) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_xlabel("lower end of the interval of noise levels")
    axes.set_ylabel("variance of the loss of a block (nats²)")
    axes.set_title(title)
    _legend(axes)
    return drawing


def _grid(search: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return lower ends, widths, and variances `(widths, lower ends)` with NaN where no interval was tried."""
    tried = {_low_and_width(each["interval"]): finite(each, "variance") for each in search["candidates"]}
    low, width = (np.array(sorted({key[side] for key in tried})) for side in (0, 1))
    table = [[tried.get((left, across)) for left in low.tolist()] for across in width.tolist()]
    return low, width, np.array(table, dtype=float)


def _low_and_width(interval: Sequence[float]) -> tuple[float, float]:
    """Return lower end and width of an interval, without the errors of its floats."""
    return round(interval[0], 2), round(interval[1] - interval[0], 2)


def speed_quality_figure(named: Named, number: int) -> Figure | None:
    """Draw generative perplexity and entropy over the tokens of a forward pass, a curve per sampler."""
    points = [point for point in named.content["points"] if finite(point, "perplexity") is not None]
    if not points:
        return None
    caption = (
        f"{named.name}: the cost of writing several tokens at once. Bars are one standard error; lower is better."
    )
    return Figure(f"quality-{number}", caption, draw_speed_quality(points, named.content["judge"], named.name))


def draw_speed_quality(points: Sequence[Mapping[str, Any]], reference: str, title: str) -> Any:
    """Return a drawing of generative perplexity (log axis) and, if it was measured, of entropy below.

    Args:
        points: measurements as a result file of `bd3lm quality` has them.
        reference: name of the reference model.
    """
    from matplotlib.figure import Figure as Drawing

    entropies = [finite(point, "entropy") for point in points]
    with_entropy = any(entropy is not None for entropy in entropies)
    width, height = _FACE
    drawing = Drawing(figsize=(width, height * (1.5 if with_entropy else 1)), layout="constrained")
    grid = drawing.subplots(1 + with_entropy, 1, sharex=True, squeeze=False, height_ratios=(2, 1)[: 1 + with_entropy])
    axes = grid[0, 0]
    first = points[0]["perplexity"]
    axes.axhspan(first, 1.05 * first, color=_GRID, alpha=0.6, zorder=0, label="within 5 % of the first point")
    for index, sampler in enumerate(dict.fromkeys(point["sampler"] for point in points)):
        mine = [point for point in points if point["sampler"] == sampler]
        style = {**_style(index), "marker": _MARKERS[index % len(_MARKERS)], "markersize": 5}
        tokens = [point["tokens_per_forward"] for point in mine]
        axes.errorbar(
            tokens,
            [point["perplexity"] for point in mine],
            yerr=[point["perplexity"] * (finite(point, "standard_error") or 0.0) for point in mine],
            capsize=3,
            label=_label(sampler),
            **style,
        )
        if with_entropy:
            entropy = [np.nan if (value := finite(point, "entropy")) is None else value for point in mine]
            grid[1, 0].plot(tokens, entropy, **style)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_ylabel(f"generative perplexity\nunder {_label(reference)}")
    axes.set_title(_label(title), loc="left", fontsize=11, color=_INK)
    for each in grid[:, 0]:
        _dress(each)
        each.margins(x=0.08)
    if with_entropy:
        grid[1, 0].set_ylabel("entropy (nats)")
    grid[-1, 0].set_xlabel("tokens per forward pass")
    _legend(axes)
    return drawing


def _lines(runs: Sequence[Run], name: str, *, errors: str = "") -> list[Line]:
    """Return what the runs logged under a name, without values that are not finite."""
    lines = []
    for run in runs:
        steps, values = run.series.get(name, (np.array([]), np.array([])))
        kept = np.isfinite(values)
        if kept.any():
            _, deviations = run.series.get(errors, (None, np.array([])))
            band = deviations[kept] if len(deviations) == len(values) else None
            lines.append(Line(run.name, steps[kept], values[kept], band))
    return lines


def _style(index: int) -> dict[str, Any]:
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": _LINES[index % len(_LINES)]}


def _label(name: str) -> str:
    """Return a name that matplotlib neither reads as a formula nor hides."""
    escaped = name.replace("$", r"\$")
    return f" {escaped}" if escaped.startswith("_") else escaped


def _axes() -> tuple[Any, Any]:
    from matplotlib.figure import Figure as Drawing

    figure = Drawing(figsize=_FACE, layout="constrained")
    axes = figure.add_subplot()
    _dress(axes)
    return figure, axes


def _dress(axes: Any) -> None:
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.patch.set_visible(False)
    axes.tick_params(which="both", colors=_SOFT, labelsize=9)
    axes.xaxis.label.set_color(_INK)
    axes.yaxis.label.set_color(_INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_SOFT)


def _legend(axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    columns = 1 if len(labels) < 4 else 2 if len(labels) < 9 else 3
    axes.figure.legend(
        handles, labels, loc="outside upper left", ncols=columns, frameon=False, fontsize=9, labelcolor=_INK
    )


def as_svg(figure: Figure) -> str:
    """Return an SVG element that takes its colours from the page."""
    text = _saved(figure, "svg").decode()
    text = text[text.index("<svg") :]
    text = re.sub(r'<g id="[^"]*">', "<g>", text)  # names that several figures of a page would share
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    width, height = re.search(r'width="([\d.]+)pt" height="([\d.]+)pt"', text).groups()  # type: ignore[union-attr]
    return text.replace(f'width="{width}pt" height="{height}pt"', 'role="img"', 1)


def as_png(figure: Figure) -> bytes:
    """Return a PNG on white."""
    return _saved(figure, "png")


def _saved(figure: Figure, kind: str) -> bytes:
    import matplotlib

    file = io.BytesIO()
    # Two calls give the same bytes: no date, and names that depend on the figure alone.
    settings: Any = {"svg.hashsalt": figure.name, "svg.fonttype": "none", "font.family": "DejaVu Sans"}
    how: dict[str, Any] = {"metadata": {"Date": None}, "transparent": True} if kind == "svg" else {"dpi": 144}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # of a name in a script that the font lacks
        figure.drawn.savefig(file, format=kind, **how)
        figure.drawn.set_layout_engine("none")  # the layout is done; the other format shares it
    return file.getvalue()


__all__ = [
    "COLOURS",
    "Figure",
    "Line",
    "VARIABLES",
    "as_png",
    "as_svg",
    "check_matplotlib",
    "curves",
    "draw_interval_search",
    "draw_lines",
    "draw_speed_quality",
    "intervals",
    "speed_quality_figure",
    "variances",
    "write_training_curve",
]
