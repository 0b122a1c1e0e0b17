"""The style of all figures, curves over training steps, and quality against tokens per forward pass."""

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bd3lm_hf.reports.run_reader import Named, finite


#: Distinct in every common form of colour blindness, with a contrast of at least 3:1; line styles differ too.
COLOURS = ("#0072b2", "#c4500a", "#007a5e", "#a84f86", "#82660a", "#4a4fa8", "#5f6368")
_LINES, MARKERS = ("-", "--", "-.", ":"), "os^Dv"

#: Text, axes and grid. In the page these and the colours above are CSS variables that follow the reader's scheme.
INK, SOFT, GRID = "#1d2129", "#646b79", "#e2dfd8"
VARIABLES = {INK: "ink", SOFT: "soft", GRID: "line", **{colour: f"c{n}" for n, colour in enumerate(COLOURS)}}
FACE = 7.5, 3.9  # inches


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
        style = line_style(index)
        marker = MARKERS[index % len(MARKERS)] if len(line.steps) < 30 else None
        if smooth:
            axes.plot(line.steps, line.values, color=style["color"], alpha=0.3, linewidth=1)
        values = smoothed(line.values) if smooth else line.values
        axes.plot(
            line.steps, values, **style, marker=marker, markersize=4, linewidth=1.8, label=plain_label(line.label)
        )
        if line.errors is not None:
            band = {"color": style["color"], "alpha": 0.15, "linewidth": 0}
            axes.fill_between(line.steps, values - line.errors, values + line.errors, **band)
    axes.set_xlim(left=0, right=1.02 * max([1, *(line.steps[-1] for line in lines)]))
    axes.set_xlabel("optimizer steps")
    _write_final_values(axes, [smoothed(line.values)[-1] if smooth else line.values[-1] for line in lines], final)


def _write_final_values(axes: Any, values: Sequence[float], form: str) -> None:
    """Write values at their height to the right of the axes, where they overlap neither lines nor each other."""
    axes.get_ylim()  # updates the limits, on which the transformation depends
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
            color=line_style(int(index))["color"],
            annotation_clip=False,
        )


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
    from matplotlib.figure import Figure as Drawing

    entropies = [finite(point, "entropy") for point in points]
    with_entropy = any(entropy is not None for entropy in entropies)
    width, height = FACE
    drawing = Drawing(figsize=(width, height * (1.5 if with_entropy else 1)), layout="constrained")
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
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
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


def line_style(index: int) -> dict[str, Any]:
    """Return the colour and dashes of the line with this index."""
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": _LINES[index % len(_LINES)]}


def plain_label(name: str) -> str:
    """Return a name that matplotlib neither reads as a formula nor hides."""
    escaped = name.replace("$", r"\$")
    return f" {escaped}" if escaped.startswith("_") else escaped


def new_axes() -> tuple[Any, Any]:
    """Return a figure of the usual size and its axes."""
    from matplotlib.figure import Figure as Drawing

    figure = Drawing(figsize=FACE, layout="constrained")
    axes = figure.add_subplot()
    dress(axes)
    return figure, axes


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


def add_legend(axes: Any) -> None:
    """Add a legend above the axes, where it covers no line."""
    handles, labels = axes.get_legend_handles_labels()
    columns = 1 if len(labels) < 4 else 2 if len(labels) < 9 else 3
    axes.figure.legend(
        handles, labels, loc="outside upper left", ncols=columns, frameon=False, fontsize=9, labelcolor=INK
    )


def as_svg(figure: Figure) -> str:
    """Return an SVG element that takes its colours from the page."""
    text = _saved(figure, "svg").decode()
    text = text[text.index("<svg") :]
    text = re.sub(r'<g id="[^"]*">', "<g>", text)  # ids that several figures on a page would share
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    width, height = re.search(r'width="([\d.]+)pt" height="([\d.]+)pt"', text).groups()  # type: ignore[union-attr]
    return text.replace(f'width="{width}pt" height="{height}pt"', 'role="img"', 1)


def as_png(figure: Figure) -> bytes:
    """Return a PNG with a white background."""
    return _saved(figure, "png")


def _saved(figure: Figure, kind: str) -> bytes:
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


def smoothed(values: np.ndarray) -> np.ndarray:
    """Return the running mean over a twentieth of the values, over fewer near the start and the end."""
    count, sums = len(values), np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(count)
    half = np.minimum(index, count // 40)
    stop = np.minimum(count, index + half + 1)
    return (sums[stop] - sums[index - half]) / (stop - index + half)
