"""Figures of training: loss, held-out likelihood, speed, and the search for the interval of noise levels."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import logging

from bd3lm_hf.reports.plotting import (
    GRID,
    INK,
    MARKERS,
    SOFT,
    Figure,
    Line,
    add_legend,
    check_matplotlib,
    draw_lines,
    dress,
    line_style,
    new_axes,
    plain_label,
)
from bd3lm_hf.reports.run_reader import Run, finite, series_of
from bd3lm_hf.run_folder import CURVE_NAME
from bd3lm_hf.user_files import write_atomically


logger = logging.get_logger("bd3lm_hf.train")

_MAX_SEARCHES = 6  # heat maps per run, including those of its first and last search


def curves(runs: Sequence[Run]) -> list[Figure]:
    """Draw loss, held-out likelihood and speed over the steps, one figure each with all runs."""
    about = "; ".join(dict.fromkeys(f"{run.held_out}, {run.estimator(final=False)}" for run in runs))
    held_out = f"Negative log-likelihood of held-out text during training: {about}. Bands are one standard error."
    figures = []
    for draw, name, caption in (
        (_training_loss, "training-loss", "Training loss; thin lines are the logged values, thick ones their mean."),
        (_held_out, "held-out", held_out),
        (_speed, "speed", "Training speed, without evaluation and saving."),
    ):
        figure, axes = new_axes()
        if draw(axes, runs):
            add_legend(axes)
            figures.append(Figure(name, caption, figure))
    return figures


def _training_loss(axes: Any, runs: Sequence[Run]) -> bool:
    lines = _lines(runs, "loss")
    if lines:
        # The high losses of the first steps would flatten the rest of the curve.
        settled = np.concatenate([line.values[len(line.values) // 20 :] for line in lines])
        margin = 0.05 * (settled.max() - settled.min()) + 1e-9
        axes.set_ylim(settled.min() - margin, settled.max() + margin)
        axes.set_ylabel("loss (nats per token)")
        draw_lines(axes, lines, smooth=True)
    return bool(lines)


def _held_out(axes: Any, runs: Sequence[Run]) -> bool:
    """Draw the likelihood at each evaluation, and before and after training, where the estimator may differ."""
    lines = []
    for run in runs:
        for name in (name for name in run.series if name.startswith("eval_") and name.endswith("nll")):
            part = name.removeprefix("eval_").removesuffix("nll").strip("_")
            found = _lines([run], name, errors=f"{name.removesuffix('nll')}standard_error")
            about = ", ".join(filter(None, (run.name, part, run.estimator(final=False))))
            lines += [line._replace(label=about) for line in found]
    if lines:
        axes.set_ylabel("negative log-likelihood\n(nats per token)")
        for index, run in enumerate(runs):
            _draw_ends(axes, run, line_style(index)["color"])
        draw_lines(axes, lines)
    return bool(lines)


def _draw_ends(axes: Any, run: Run, colour: str) -> None:
    """Mark the scores at step 0 and after training."""
    ends = ((0, run.results.get("before")), (run.results.get("steps"), run.results.get("after")))
    points = [(step, nll) for step, score in ends if step is not None and (nll := finite(score or {}, "nll"))]
    if points:
        style: dict[str, Any] = {"color": colour, "marker": "D", "markerfacecolor": "none", "linestyle": ""}
        about = ", ".join(filter(None, (run.name, "before and after training", run.estimator(final=True))))
        axes.plot(*zip(*points, strict=True), **style, clip_on=False, label=plain_label(about))


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
        style = {**line_style(index), "where": "post", "marker": MARKERS[index % len(MARKERS)], "markersize": 4}
        axes.fill_between(steps, low, high, step="post", color=style["color"], alpha=0.1, linewidth=0)
        axes.step(steps, low, **style, label=plain_label(run.name))
        axes.step(steps, high, **style)
    axes.set_ylim(-0.02, 1.04)
    axes.set_xlim(left=0)
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("mask rate (share of a block's tokens)")
    return bool(axes.lines)


def intervals(runs: Sequence[Run]) -> Figure | None:
    """Draw the interval of mask rates of each run over its steps."""
    figure, axes = new_axes()
    if not _interval(axes, runs):
        return None
    add_legend(axes)
    return Figure(
        "interval", "The interval of mask rates that each search found best: its lower and upper end.", figure
    )


_PANELS = (
    (_training_loss, "training loss"),
    (_held_out, "held-out negative log-likelihood"),
    (_interval, "interval of noise levels"),
    (_speed, "speed"),
)


def write_training_curve(
    log_history: Sequence[Mapping[str, Any]],
    folder: str | Path,
    *,
    title: str = "",
    results: Mapping[str, Any] | None = None,
) -> None:
    """Write the logged numbers of a run as JSON and, if matplotlib is installed, as a figure.

    Args:
        log_history: the entries of a `TrainerState`; those of a resumed run reach back to its start.
        folder: where `training_curve.json` and `training_curve.png` are written.
        title: title of the figure.
        results: `before`, `after`, `steps` and `estimator` of the run, for the points before and after training.
    """
    folder = Path(folder)
    run = Run(name="", folder=folder, series=series_of(log_history), results=dict(results or {}))
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
            dress(axes)
            axes.set_title(name, loc="left")
            drawn += 1
        else:
            axes.remove()
    if not drawn:
        return
    drawing.suptitle(title.replace("$", r"\$"), fontsize=11)
    drawing.savefig(folder / picture, dpi=144)


def variances(run: Run, number: int) -> Figure | None:
    """Draw heat maps of the loss variance by lower end and width, each for one of at most `_MAX_SEARCHES` searches."""
    if not run.searches:
        return None
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure as Drawing

    count = min(len(run.searches), _MAX_SEARCHES)
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
        axes.set_title(f"step {search['step']:,}{kept}", fontsize=9, color=INK)
    for axes in every.ravel():
        dress(axes)
        axes.grid(visible=False)
    for axes in every.ravel()[count:]:
        axes.set_visible(False)
    drawing.supxlabel("lower end of the interval (mask rate)", fontsize=10, color=INK)
    drawing.supylabel("width of the interval", fontsize=10, color=INK)
    bar = drawing.colorbar(mesh, ax=every, shrink=0.9)
    bar.set_label("variance of a block's loss (nats²)", color=INK)
    bar.ax.tick_params(which="both", colors=SOFT, labelsize=8)
    bar.ax.yaxis.set_major_formatter("{x:g}")
    bar.ax.yaxis.set_minor_formatter("{x:g}")
    bar.outline.set_edgecolor(GRID)
    caption = f"{run.name}: variance of the loss for each interval of mask rates; the star marks the chosen one."
    return Figure(f"variance-{number}", caption, drawing)


def draw_interval_search(
    candidates: Sequence[Sequence[float]], variances: Sequence[float], errors: Sequence[float], best: int, title: str
) -> Any:
    """Return a drawing of the variance against the lower end of the interval, one line per width.

    Args:
        candidates: intervals of mask rates, the whole one first.
        errors: standard errors of the variances.
        best: index of the chosen interval.
    """
    from matplotlib.figure import Figure as Drawing

    drawing = Drawing(figsize=(8, 5), dpi=144, layout="constrained")
    axes = drawing.subplots()
    dress(axes)
    names = [f"[{low:.3g}, {high:.3g}]" for low, high in candidates]
    axes.axhline(variances[0], color=SOFT, linestyle="--", label=f"{names[0]}, the whole interval")
    by_width: dict[float, list[int]] = {}
    for index, interval in enumerate(candidates[1:], start=1):
        by_width.setdefault(_low_and_width(interval)[1], []).append(index)
    for number, (width, members) in enumerate(sorted(by_width.items())):
        members.sort(key=lambda index: candidates[index][0])
        low, variance, error = zip(*((candidates[i][0], variances[i], errors[i]) for i in members), strict=True)
        style = {**line_style(number), "marker": "o", "markersize": 4, "linewidth": 1.2, "capsize": 2}
        axes.errorbar(low, variance, error, label=f"width {width:g}", **style)
    chosen = f"chosen: {names[best]}, variance {variances[best]:.3g}"
    star: dict[str, Any] = {"marker": "*", "markersize": 16, "color": INK, "linestyle": "none", "zorder": 3}
    axes.plot([candidates[best][0]], [variances[best]], label=chosen, **star)
    if min(variances) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_xlabel("lower end of the interval of noise levels")
    axes.set_ylabel("variance of the loss of a block (nats²)")
    axes.set_title(title)
    add_legend(axes)
    return drawing


def _grid(search: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return lower ends, widths, and variances `(widths, lower ends)` with NaN where no interval was tried."""
    tried = {_low_and_width(each["interval"]): finite(each, "variance") for each in search["candidates"]}
    low, width = (np.array(sorted({key[side] for key in tried})) for side in (0, 1))
    table = [[tried.get((left, across)) for left in low.tolist()] for across in width.tolist()]
    return low, width, np.array(table, dtype=float)


def _low_and_width(interval: Sequence[float]) -> tuple[float, float]:
    """Return the lower end and the width of an interval, without rounding errors."""
    return round(interval[0], 2), round(interval[1] - interval[0], 2)


def _lines(runs: Sequence[Run], name: str, *, errors: str = "") -> list[Line]:
    """Return the finite values that the runs logged under a name."""
    lines = []
    for run in runs:
        steps, values = run.series.get(name, (np.array([]), np.array([])))
        kept = np.isfinite(values)
        if kept.any():
            _, deviations = run.series.get(errors, (None, np.array([])))
            band = deviations[kept] if len(deviations) == len(values) else None
            lines.append(Line(run.name, steps[kept], values[kept], band))
    return lines
