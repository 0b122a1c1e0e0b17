"""All figures and their style: curves over the steps, the search for the interval, quality against speed."""

import io
import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers.utils import logging

from bd3lm_hf.reports.run_reader import Named, Run, finite
from bd3lm_hf.run_folder import CURVE_NAME
from bd3lm_hf.user_files import write_atomically


logger = logging.get_logger("bd3lm_hf.train")


#: Distinct in every common form of colour blindness, with a contrast of at least 3:1; line styles differ too.
COLOURS = ("#0072b2", "#c4500a", "#007a5e", "#a84f86", "#82660a", "#4a4fa8", "#5f6368")
_LINES, MARKERS = ("-", "--", "-.", ":"), "os^Dv"

#: Text, axes and grid. In the page these and the colours above are CSS variables that follow the reader's scheme.
INK, SOFT, GRID = "#1d2129", "#646b79", "#e2dfd8"
VARIABLES = {INK: "ink", SOFT: "soft", GRID: "line", **{colour: f"c{n}" for n, colour in enumerate(COLOURS)}}
FACE = 7.5, 3.9  # inches

_MAX_SEARCHES = 6  # heat maps per run, including those of its first and last search


class Figure(NamedTuple):
    """A drawing and its caption."""

    name: str  # of its file, without the extension
    caption: str
    drawn: Any  # a figure of matplotlib


def check_matplotlib() -> None:
    """Check that matplotlib is installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ValueError("plots need matplotlib: pip install 'bd3lm-hf[plots]'.") from error


def line_style(index: int) -> dict[str, Any]:
    """Return the colour and dashes of the line with this index."""
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": _LINES[index % len(_LINES)]}


def plain_label(name: str) -> str:
    """Return a name that matplotlib neither reads as a formula nor hides."""
    escaped = name.replace("$", r"\$")
    return f" {escaped}" if escaped.startswith("_") else escaped


def new_drawing(width: float, height: float) -> Any:
    """Return an empty figure of matplotlib, with sizes in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def dress(axes: Any) -> None:
    """Apply the style of all figures to axes."""
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.patch.set_visible(False)
    axes.tick_params(which="both", colors=SOFT, labelsize=9)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(SOFT)


def plain_ticks(axis: Any) -> None:
    """Write the ticks of a logarithmic axis as plain numbers."""
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("{x:g}")


def add_legend(axes: Any) -> None:
    """Add a legend above the axes, where it covers no line."""
    handles, labels = axes.get_legend_handles_labels()
    columns = 1 if len(labels) < 4 else 2 if len(labels) < 9 else 3
    axes.figure.legend(
        handles, labels, loc="outside upper left", ncols=columns, frameon=False, fontsize=9, labelcolor=INK
    )


def as_svg(figure: Figure) -> str:
    """Return an SVG element that takes its colours from the page."""
    text = rendered(figure, "svg").decode()
    text = text[text.index("<svg") :]
    text = re.sub(r'<g id="[^"]*">', "<g>", text)  # ids that several figures on a page would share
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    width, height = re.search(r'width="([\d.]+)pt" height="([\d.]+)pt"', text).groups()  # type: ignore[union-attr]
    return text.replace(f'width="{width}pt" height="{height}pt"', 'role="img"', 1)


def rendered(figure: Figure, kind: str) -> bytes:
    """Return an SVG without a background, or a PNG with a white one."""
    import matplotlib

    file = io.BytesIO()
    # Two calls return the same bytes: no date, and ids that depend on the figure only.
    settings: Any = {"svg.hashsalt": figure.name, "svg.fonttype": "none", "font.family": "DejaVu Sans"}
    how: dict[str, Any] = {"metadata": {"Date": None}, "transparent": True} if kind == "svg" else {"dpi": 144}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # names in a script that the font lacks
        figure.drawn.savefig(file, format=kind, **how)
        figure.drawn.set_layout_engine("none")  # the layout is done; the other format shares it
    return file.getvalue()


# Curves over the optimizer steps


class Line(NamedTuple):
    """Values over the optimizer steps."""

    label: str
    steps: np.ndarray
    values: np.ndarray
    errors: np.ndarray | None = None  # one standard error


def draw_lines(axes: Any, lines: Sequence[Line], *, smooth: bool = False, last: str = "{:.4g}") -> None:
    """Draw lines with bands of one standard error; their labels end with the last values.

    Args:
        smooth: draw the values thinly and their running mean on top.
        last: format of the last value.
    """
    for index, line in enumerate(lines):
        style = line_style(index)
        marker = MARKERS[index % len(MARKERS)] if len(line.steps) < 30 else None
        if smooth:
            axes.plot(line.steps, line.values, color=style["color"], alpha=0.3, linewidth=1)
        values = smoothed(line.values) if smooth else line.values
        label = f"{plain_label(line.label)}, last {last.format(values[-1])}"
        style |= {"marker": marker, "markersize": 4, "linewidth": 1.8, "label": label}
        axes.plot(line.steps, values, **style)
        if line.errors is not None:
            band = {"color": style["color"], "alpha": 0.15, "linewidth": 0}
            axes.fill_between(line.steps, values - line.errors, values + line.errors, **band)
    axes.set_xlim(left=0)
    axes.set_xlabel("optimizer steps")


def smoothed(values: np.ndarray) -> np.ndarray:
    """Return the running mean over a twentieth of the values, over fewer near the start and the end."""
    count, sums = len(values), np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(count)
    half = np.minimum(index, count // 40)
    stop = np.minimum(count, index + half + 1)
    return (sums[stop] - sums[index - half]) / (stop - index + half)


def curves(runs: Sequence[Run]) -> list[Figure]:
    """Draw loss, held-out likelihood and speed over the steps, one figure each with all runs."""
    about = "; ".join(dict.fromkeys(f"{run.held_out}, {run.estimator(final=False)}" for run in runs))
    held_out = f"Negative log-likelihood of held-out text during training: {about}. Bands are one standard error."
    loss = "Training loss; thin lines are the logged values, thick ones their mean."
    found = [
        _over_steps(_training_loss, runs, "training-loss", loss),
        _over_steps(_held_out, runs, "held-out", held_out),
        _over_steps(_speed, runs, "speed", "Training speed, without evaluation and saving."),
    ]
    return [figure for figure in found if figure is not None]


def intervals(runs: Sequence[Run]) -> Figure | None:
    """Draw the interval of mask rates of each run over its steps."""
    caption = "The interval of mask rates that each search found best: its lower and upper end."
    return _over_steps(_interval, runs, "interval", caption)


def _over_steps(
    draw: Callable[[Any, Sequence[Run]], None], runs: Sequence[Run], name: str, caption: str
) -> Figure | None:
    drawing = new_drawing(*FACE)
    axes = drawing.add_subplot()
    dress(axes)
    draw(axes, runs)
    if not axes.lines:
        return None
    add_legend(axes)
    return Figure(name, caption, drawing)


def _training_loss(axes: Any, runs: Sequence[Run]) -> None:
    if lines := _lines(runs, "loss"):
        # The high losses of the first steps would flatten the rest of the curve.
        settled = np.concatenate([line.values[len(line.values) // 20 :] for line in lines])
        margin = 0.05 * (settled.max() - settled.min()) + 1e-9
        axes.set_ylim(settled.min() - margin, settled.max() + margin)
        axes.set_ylabel("loss (nats per token)")
        draw_lines(axes, lines, smooth=True)


def _held_out(axes: Any, runs: Sequence[Run]) -> None:
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


def _draw_ends(axes: Any, run: Run, colour: str) -> None:
    """Mark the scores at step 0 and after training."""
    ends = ((0, run.results.get("before")), (run.results.get("steps"), run.results.get("after")))
    points = [(step, nll) for step, score in ends if step is not None and (nll := finite(score or {}, "nll"))]
    if points:
        style: dict[str, Any] = {"color": colour, "marker": "D", "markerfacecolor": "none", "linestyle": ""}
        about = ", ".join(filter(None, (run.name, "before and after training", run.estimator(final=True))))
        axes.plot(*zip(*points, strict=True), **style, clip_on=False, label=plain_label(about))


def _speed(axes: Any, runs: Sequence[Run]) -> None:
    if lines := _lines(runs, "tokens_per_second"):
        axes.set_ylim(0, 1.12 * max(1, *(line.values.max() for line in lines)))
        axes.set_ylabel("tokens per second")
        axes.yaxis.set_major_formatter("{x:,.0f}")
        draw_lines(axes, lines, last="{:,.0f}")


def _interval(axes: Any, runs: Sequence[Run]) -> None:
    ends = zip(_lines(runs, "interval_min"), _lines(runs, "interval_max"), strict=True)
    for index, (low, high) in enumerate(ends):
        style = {**line_style(index), "where": "post", "marker": MARKERS[index % len(MARKERS)], "markersize": 4}
        area = {"step": "post", "color": style["color"], "alpha": 0.1, "linewidth": 0}
        axes.fill_between(low.steps, low.values, high.values, **area)
        axes.step(low.steps, low.values, **style, label=plain_label(low.label))
        axes.step(high.steps, high.values, **style)
    axes.set_ylim(-0.02, 1.04)
    axes.set_xlim(left=0)
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("mask rate (share of a block's tokens)")


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
    run = Run(name=folder.resolve().name, folder=folder, log=log_history, results=dict(results or {}))
    content = {name: {"steps": x.tolist(), "values": y.tolist()} for name, (x, y) in run.series.items()}
    write_atomically(folder / CURVE_NAME, json.dumps(content) + "\n")
    picture = Path(CURVE_NAME).with_suffix(".png").name
    try:
        check_matplotlib()
    except ValueError:
        logger.warning(f"{picture} is not drawn without matplotlib: pip install 'bd3lm-hf[plots]'.")
        return
    drawing = new_drawing(11, 6.6)
    for draw, name in _PANELS:
        axes = drawing.add_subplot(2, 2, len(drawing.axes) + 1)
        draw(axes, [run])
        if not axes.lines:
            axes.remove()
            continue
        dress(axes)
        axes.set_title(name, loc="left")
        axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    if not drawing.axes:
        return
    drawing.suptitle(title.replace("$", r"\$"), fontsize=11)
    drawing.savefig(folder / picture, dpi=144)


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


# The search for the interval


def variances(run: Run, number: int) -> Figure | None:
    """Draw the loss variance of the intervals that a run compared, in at most `_MAX_SEARCHES` of its searches."""
    if not run.searches:
        return None
    count = min(len(run.searches), _MAX_SEARCHES)
    shown = [run.searches[index] for index in np.linspace(0, len(run.searches) - 1, count).round().astype(int)]
    caption = f"{run.name}: variance of the loss for each interval of mask rates; the star marks the chosen one."
    return Figure(f"variance-{number}", caption, draw_searches(shown))


def draw_searches(searches: Sequence[Mapping[str, Any]]) -> Any:
    """Return a drawing with a panel per search: variance against the lower end of the interval, one line per width.

    Args:
        searches: lines of `interval_search.jsonl`; the first candidate of each is the whole interval.
    """
    columns = min(3, len(searches))
    rows = -(-len(searches) // columns)
    drawing = new_drawing(8, 2.5 + 2.5 * rows)
    panels = drawing.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for axes, search in zip(panels, searches, strict=False):
        _draw_search(axes, search)
    for axes in panels[len(searches) :]:
        axes.set_visible(False)
    if all(each["variance"] > 0 for search in searches for each in search["candidates"]):
        panels[0].set_yscale("log")
        for axes in panels:
            plain_ticks(axes.yaxis)
    drawing.supxlabel("lower end of the interval (mask rate)", fontsize=10, color=INK)
    drawing.supylabel("variance of a block's loss (nats²)", fontsize=10, color=INK)
    add_legend(panels[0])
    return drawing


def _draw_search(axes: Any, search: Mapping[str, Any]) -> None:
    dress(axes)
    whole, *others = search["candidates"]
    axes.axhline(whole["variance"], color=SOFT, linestyle="--", label="the whole interval")
    by_width: dict[float, list[Mapping[str, Any]]] = {}
    for each in sorted(others, key=lambda each: each["interval"][0]):
        low, high = each["interval"]
        by_width.setdefault(round(high - low, 2), []).append(each)
    for number, (width, members) in enumerate(sorted(by_width.items())):
        style = {**line_style(number), "marker": "o", "markersize": 4, "linewidth": 1.2, "capsize": 2}
        axes.errorbar(
            [each["interval"][0] for each in members],
            [each["variance"] for each in members],
            [each["standard_error"] or 0.0 for each in members],
            label=f"width {width:g}",
            **style,
        )
    best = next(each for each in search["candidates"] if each["interval"] == search["interval"])
    star: dict[str, Any] = {"marker": "*", "markersize": 16, "color": INK, "linestyle": "none", "zorder": 3}
    axes.plot([best["interval"][0]], [best["variance"]], label="chosen", **star)
    kept = "" if search.get("adopted", True) else ", not adopted"
    title = "step {:,}: [{:.3g}, {:.3g}]".format(search["step"], *best["interval"])
    axes.set_title(f"{title}{kept}", fontsize=9, color=INK)


# Quality against speed


def speed_quality_figure(named: Named, number: int) -> Figure | None:
    """Draw generative perplexity and entropy against tokens per forward pass, one curve per sampler."""
    points = [point for point in named.content["points"] if finite(point, "perplexity") is not None]
    if not points:
        return None
    caption = (
        f"{named.name}: the cost of generating several tokens at once. Bars are one standard error; lower is better."
    )
    return Figure(f"quality-{number}", caption, draw_speed_quality(points, named.content["judge"], named.name))


def draw_speed_quality(points: Sequence[Mapping[str, Any]], reference: str, title: str) -> Any:
    """Return a drawing of generative perplexity (log axis) and, if it was measured, of entropy below it.

    Args:
        points: measurements, as in a result file of `bd3lm quality`.
        reference: name of the reference model.
    """
    entropies = [finite(point, "entropy") for point in points]
    with_entropy = any(entropy is not None for entropy in entropies)
    width, height = FACE
    drawing = new_drawing(width, height * (1.5 if with_entropy else 1))
    grid = drawing.subplots(1 + with_entropy, 1, sharex=True, squeeze=False, height_ratios=(2, 1)[: 1 + with_entropy])
    axes = grid[0, 0]
    first = points[0]["perplexity"]
    axes.axhspan(first, 1.05 * first, color=GRID, alpha=0.6, zorder=0, label="within 5 % of the first point")
    for index, sampler in enumerate(dict.fromkeys(point["sampler"] for point in points)):
        mine = [point for point in points if point["sampler"] == sampler]
        style = {**line_style(index), "marker": MARKERS[index % len(MARKERS)], "markersize": 5}
        tokens = [point["tokens_per_forward"] for point in mine]
        axes.errorbar(
            tokens,
            [point["perplexity"] for point in mine],
            yerr=[point["perplexity"] * (finite(point, "standard_error") or 0.0) for point in mine],
            capsize=3,
            label=plain_label(sampler),
            **style,
        )
        if with_entropy:
            entropy = [np.nan if (value := finite(point, "entropy")) is None else value for point in mine]
            grid[1, 0].plot(tokens, entropy, **style)
    axes.set_yscale("log")
    plain_ticks(axes.yaxis)
    axes.set_ylabel(f"generative perplexity\nunder {plain_label(reference)}")
    axes.set_title(plain_label(title), loc="left", fontsize=11, color=INK)
    for each in grid[:, 0]:
        dress(each)
        each.margins(x=0.08)
    if with_entropy:
        grid[1, 0].set_ylabel("entropy (nats)")
    grid[-1, 0].set_xlabel("tokens per forward pass")
    add_legend(axes)
    return drawing
