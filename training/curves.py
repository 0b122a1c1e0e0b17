"""`training_curve.json` and `training_curve.png`: what a run logged, over its optimizer steps."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import logging

from bd3lm_hf.output_files import write_atomically
from bd3lm_hf.reports.run_reader import Series, series_of, smoothed


logger = logging.get_logger("bd3lm_hf.train")


Panel = Callable[[Any, Series], None]  # draws into matplotlib axes


CURVE_NAME = "training_curve"


_LOSS, _HELD_OUT, _RATE, _SPEED = "#4878a8", "#c1553b", "#6a8f4f", "#7a6a9a"


def write_training_curve(log_history: Sequence[Mapping[str, Any]], folder: str | Path, *, title: str = "") -> None:
    """Write the logged numbers as JSON and, where matplotlib is installed, as a picture.

    Args:
        log_history: the entries of a `TrainerState`; those of a resumed run reach back to its start.
        folder: gets `training_curve.json` and `training_curve.png`.
        title: line above the picture.
    """
    series = series_of(log_history)
    content = {name: {"steps": steps.tolist(), "values": values.tolist()} for name, (steps, values) in series.items()}
    write_atomically(Path(folder) / f"{CURVE_NAME}.json", json.dumps(content) + "\n")
    panels = _panels(series)
    if not panels:
        return
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning(f"{CURVE_NAME}.png is not drawn without matplotlib: pip install 'bd3lm-hf[plots]'.")
        return
    rows, columns = -(-len(panels) // 2), min(2, len(panels))
    figure = Figure(figsize=(5.5 * columns, 3.3 * rows), layout="constrained")
    grid = figure.add_gridspec(rows, columns)
    last = max(steps[-1] for steps, _ in series.values())
    for index, panel in enumerate(panels):
        alone = columns == 2 and index % 2 == 0 and index == len(panels) - 1
        axes = figure.add_subplot(grid[index // 2, :] if alone else grid[index // 2, index % 2])
        panel(axes, series)
        axes.set_xlim(0, 1.02 * max(1, last))
        axes.set_xlabel("optimizer steps")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    if title:
        figure.suptitle(title, fontsize=11)
    figure.savefig(Path(folder) / f"{CURVE_NAME}.png", dpi=144)


def _panels(series: Series) -> list[Panel]:
    """What there are numbers for."""
    wanted: list[tuple[Panel, bool]] = [
        (_draw_loss, "loss" in series),
        (_draw_held_out, bool(_held_out(series))),
        (_draw_interval, {"interval_min", "interval_max"} <= series.keys()),
        (_draw_speed, "tokens_per_second" in series),
    ]
    return [panel for panel, has_numbers in wanted if has_numbers]


def _draw_loss(axes: Any, series: Series) -> None:
    steps, values = series["loss"]
    axes.plot(steps, values, color=_LOSS, alpha=0.35, linewidth=1, marker="o" if len(steps) == 1 else None)
    axes.plot(steps, smoothed(values), color=_LOSS, linewidth=1.8)
    axes.set_title("training loss", loc="left")
    axes.set_ylabel("nats per token")
    if len(values) >= 20:
        # The first steps of a fresh model would flatten everything after them.
        settled = values[len(values) // 20 :]
        low, high = settled.min(), settled.max()
        axes.set_ylim(low - 0.05 * (high - low) - 1e-9, high + 0.05 * (high - low) + 1e-9)


def _draw_held_out(axes: Any, series: Series) -> None:
    for index, name in enumerate(_held_out(series)):
        steps, values = series[name]
        label = name.removeprefix("eval_").removesuffix("nll").strip("_") or None
        axes.plot(steps, values, marker="o", markersize=4, label=label, **({} if index else {"color": _HELD_OUT}))
        error = series.get(f"{name.removesuffix('nll')}standard_error")
        if error is not None and len(error[1]) == len(values):
            axes.fill_between(steps, values - error[1], values + error[1], alpha=0.2, color=axes.lines[-1].get_color())
        axes.annotate(
            f"ppl {np.exp(values[-1]):.4g}", (steps[-1], values[-1]), (0, 8), textcoords="offset points", ha="right"
        )
    if len(_held_out(series)) > 1:
        axes.legend(frameon=False)
    axes.set_title("held-out negative log-likelihood (bound)", loc="left")
    axes.set_ylabel("nats per token")


def _draw_interval(axes: Any, series: Series) -> None:
    (steps, low), (_, high) = series["interval_min"], series["interval_max"]
    axes.fill_between(steps, low, high, step="post", alpha=0.25, color=_RATE, linewidth=0)
    for values in (low, high):
        axes.step(steps, values, where="post", color=_RATE, marker="o", markersize=3)
    axes.set_ylim(0, 1.02)
    axes.set_title("interval of noise levels", loc="left")
    axes.set_ylabel("mask rate")
    if "interval_variance" in series:
        steps, values = series["interval_variance"]
        other = axes.twinx()
        other.plot(steps, values, color="black", linestyle=":", marker="o", markersize=3)
        other.set_ylabel("variance of the block loss (dotted)")
        other.set_ylim(0, 1.1 * values.max() if values.max() > 0 else 1)
        other.spines[["top"]].set_visible(False)


def _draw_speed(axes: Any, series: Series) -> None:
    steps, values = series["tokens_per_second"]
    axes.plot(steps, values, color=_SPEED, linewidth=1.4, marker="o" if len(steps) == 1 else None)
    axes.axhline(np.median(values), color=_SPEED, linestyle=":", linewidth=1)
    axes.set_ylim(0, 1.15 * values.max() if values.max() > 0 else 1)
    title = "speed"
    if "mfu" in series:
        title += f", median MFU {np.median(series['mfu'][1]):.1%}"
    elif "tflops_per_second" in series:
        flops = np.median(series["tflops_per_second"][1])
        title += f", median {flops:.3g} TFLOP/s" if flops >= 0.1 else f", median {1000 * flops:.3g} GFLOP/s"
    axes.set_title(title, loc="left")
    axes.set_ylabel("tokens per second")
    axes.yaxis.set_major_formatter("{x:,.0f}")


def _held_out(series: Series) -> list[str]:
    return [name for name in series if name.startswith("eval_") and name.endswith("nll")]


__all__ = ["CURVE_NAME", "write_training_curve"]
