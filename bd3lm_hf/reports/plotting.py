"""Figures of a report: curves of runs, the noise interval and its variances, quality over forwards; SVG and PNG."""

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bd3lm_hf.reports.run_reader import Named, Run, finite, smoothed


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
    """Refuse to draw without matplotlib.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ValueError("a report needs matplotlib: pip install 'bd3lm-hf[plots]'.") from error


def curves(runs: Sequence[Run]) -> list[Figure]:
    """Loss, held-out likelihood and speed over the steps, all runs in one figure each."""
    wanted = (
        (_training_loss, "training-loss", "Training loss; thin lines are the logged values, thick ones their mean."),
        (
            _held_out,
            "held-out",
            "Negative log-likelihood of held-out text while training; bands are one standard error.",
        ),
        (_speed, "speed", "Speed of training, without evaluation and saving."),
    )
    figures = []
    for draw, name, caption in wanted:
        figure, axes = _axes()
        if draw(axes, runs):
            axes.set_xlabel("optimizer steps")
            axes.set_xlim(left=0)
            _legend(axes)
            figures.append(Figure(name, caption, figure))
    return figures


def _training_loss(axes: Any, runs: Sequence[Run]) -> bool:
    bounds = []
    for index, run in enumerate(runs):
        steps, values = _points(run, "loss")
        if not len(steps):
            continue
        style = _style(index)
        axes.plot(steps, values, color=style["color"], alpha=0.3, linewidth=1)
        one = {"marker": "o"} if len(steps) == 1 else {}
        axes.plot(steps, smoothed(values), **style, **one, linewidth=1.9, label=_label(run.name))
        # The first steps of a fresh model would flatten everything after them.
        settled = values[len(values) // 20 :]
        bounds += [settled.min(), settled.max()]
    if bounds:
        margin = 0.05 * (max(bounds) - min(bounds)) + 1e-9
        axes.set_ylim(min(bounds) - margin, max(bounds) + margin)
    axes.set_ylabel("loss (nats per token)")
    return bool(bounds)


def _held_out(axes: Any, runs: Sequence[Run]) -> bool:
    found = False
    for index, run in enumerate(runs):
        for name in (name for name in run.series if name.startswith("eval_") and name.endswith("nll")):
            steps, values = _points(run, name)
            if not len(steps):
                continue
            found = True
            part = name.removeprefix("eval_").removesuffix("nll").strip("_")
            label = _label(run.name + (f", {part}" if part else ""))
            axes.plot(steps, values, **_style(index), marker=_MARKERS[index % 5], markersize=4, label=label)
            _, errors = _points(run, f"{name.removesuffix('nll')}standard_error")
            if len(errors) == len(values):
                band = {"color": _style(index)["color"], "alpha": 0.15, "linewidth": 0}
                axes.fill_between(steps, values - errors, values + errors, **band)
    axes.set_ylabel("negative log-likelihood\n(nats per token)")
    return found


def _speed(axes: Any, runs: Sequence[Run]) -> bool:
    most = 0.0
    for index, run in enumerate(runs):
        steps, values = _points(run, "tokens_per_second")
        if len(steps):
            one = {"marker": "o"} if len(steps) == 1 else {}
            axes.plot(steps, values, **_style(index), **one, label=_label(run.name))
            most = max(most, values.max())
    if most:
        axes.set_ylim(0, 1.12 * most)
    axes.set_ylabel("tokens per second")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    return most > 0


def intervals(runs: Sequence[Run]) -> Figure | None:
    """The interval of mask rates that each run drew from, over its steps."""
    figure, axes = _axes()
    for index, run in enumerate(runs):
        if not run.searches:
            continue
        steps = [search["step"] for search in run.searches]
        low, high = zip(*(search["interval"] for search in run.searches), strict=True)
        style = _style(index)
        axes.fill_between(steps, low, high, step="post", color=style["color"], alpha=0.1, linewidth=0)
        axes.step(steps, low, where="post", marker=_MARKERS[index % 5], markersize=4, **style, label=_label(run.name))
        axes.step(steps, high, where="post", marker=_MARKERS[index % 5], markersize=4, **style)
    if not axes.lines:
        return None
    axes.set_ylim(-0.02, 1.04)
    axes.set_xlim(left=0)
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("mask rate (share of a block's tokens)")
    _legend(axes)
    return Figure(
        "interval", "The interval of mask rates that each search found best: its lower and upper end.", figure
    )


def variances(run: Run, number: int) -> Figure | None:
    """Heat maps of the variance of the loss over lower end and width, one for each of some searches."""
    if not run.searches:
        return None
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure as Drawing

    count = min(len(run.searches), _MOST_SEARCHES)
    shown = [run.searches[place] for place in np.linspace(0, len(run.searches) - 1, count).round().astype(int)]
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
        axes.plot(*_place(search["interval"]), marker="*", markersize=13, color="white", markeredgecolor="black")
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


def _grid(search: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lower ends, widths, and variances `(widths, lower ends)` with NaN where no interval was tried."""
    tried = {_place(each["interval"]): finite(each, "variance") for each in search["candidates"]}
    low, width = (np.array(sorted({place[side] for place in tried})) for side in (0, 1))
    table = [[tried.get((left, across)) for left in low.tolist()] for across in width.tolist()]
    return low, width, np.array(table, dtype=float)


def _place(interval: Sequence[float]) -> tuple[float, float]:
    """Lower end and width of an interval, without the errors of its floats."""
    return round(interval[0], 2), round(interval[1] - interval[0], 2)


def speed_quality_figure(named: Named, number: int) -> Figure | None:
    """A curve per sampler: generative perplexity over the tokens that a pass of the network writes."""
    points = [point for point in named.content["points"] if finite(point, "perplexity") is not None]
    if not points:
        return None
    figure, axes = _axes()
    first = points[0]["perplexity"]
    axes.axhspan(first, 1.05 * first, color=_GRID, alpha=0.6, zorder=0, label="within 5 % of the first point")
    for index, sampler in enumerate(dict.fromkeys(point["sampler"] for point in points)):
        mine = [point for point in points if point["sampler"] == sampler]
        axes.errorbar(
            [point["tokens_per_forward"] for point in mine],
            [point["perplexity"] for point in mine],
            yerr=[point["perplexity"] * (finite(point, "standard_error") or 0.0) for point in mine],
            marker=_MARKERS[index % 5],
            markersize=5,
            capsize=3,
            label=_label(sampler),
            **_style(index),
        )
    axes.set_xlabel("tokens per forward pass")
    axes.set_ylabel("generative perplexity")
    axes.margins(x=0.08)
    _legend(axes)
    caption = f"{named.name}: what writing several tokens at once costs. Bars are one standard error. Lower is better."
    return Figure(f"quality-{number}", caption, figure)


def _points(run: Run, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of what was logged, finite ones."""
    steps, values = run.series.get(name, (np.array([]), np.array([])))
    kept = np.isfinite(values)
    return steps[kept], values[kept]


def _style(index: int) -> dict[str, Any]:
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": _LINES[index % len(_LINES)]}


def _label(name: str) -> str:
    """A name that matplotlib neither reads as a formula nor hides."""
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
    """An SVG element that takes its colours from the page."""
    text = _saved(figure, "svg").decode()
    text = text[text.index("<svg") :]
    text = re.sub(r'<g id="[^"]*">', "<g>", text)  # names that several figures of a page would share
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    width, height = re.search(r'width="([\d.]+)pt" height="([\d.]+)pt"', text).groups()  # type: ignore[union-attr]
    return text.replace(f'width="{width}pt" height="{height}pt"', 'role="img"', 1)


def as_png(figure: Figure) -> bytes:
    """A picture on white."""
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
        figure.drawn.set_layout_engine("none")  # the places are found; the other format shares them
    return file.getvalue()


__all__ = [
    "COLOURS",
    "Figure",
    "VARIABLES",
    "as_png",
    "as_svg",
    "check_matplotlib",
    "curves",
    "intervals",
    "speed_quality_figure",
    "variances",
]
