"""What an interval search leaves behind: numbers for the log, a line of JSON and a plot in the run's folder."""

import json
import math
from pathlib import Path
from typing import Any

from transformers.utils import logging

from bd3lm_hf.training.interval import Interval, IntervalSearch


logger = logging.get_logger("bd3lm_hf.interval")

SEARCH_NAME = "interval_search.jsonl"
PLOT_NAME = "interval_search.png"


def interval_metrics(found: IntervalSearch) -> dict[str, float]:
    """The numbers of a search that a log follows over a run. Variances are of a block's mean loss, in nats squared."""
    low, high = found.interval
    variances = found.variances.tolist()
    return {
        "interval_min": float(low),
        "interval_max": float(high),
        "interval_variance": variances[found.best],
        "interval_variance_full": variances[0],
        "interval_search_runtime": found.seconds,
    }


def record_search(found: IntervalSearch, folder: str | Path, *, step: int, adopted: bool) -> None:
    """Append the search to `interval_search.jsonl` and draw `interval_search.png`.

    Lines of this step or a later one, which a run wrote before it was cut off and resumed, are replaced. Without
    matplotlib there is no plot, and one warning says so.

    Args:
        adopted: whether the model draws from the winner from now on.
    """
    path = Path(folder) / SEARCH_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    earlier = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    lines = [line for line in earlier if json.loads(line)["step"] < step]
    lines.append(json.dumps({"step": step, "adopted": adopted, **_entry(found)}))
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    try:
        plot_search(found, path.with_name(PLOT_NAME), title=f"Interval search at step {step}")
    except ImportError:
        logger.warning_once(f"no {PLOT_NAME}: matplotlib is not installed. The numbers are in {path}.")


def _entry(found: IntervalSearch) -> dict[str, Any]:
    errors = [error if math.isfinite(error) else None for error in found.standard_errors.tolist()]
    rows = zip(found.candidates, found.variances.tolist(), errors, strict=True)
    return {
        "interval": found.interval,
        "batches": found.batch_variances.shape[1],
        "blocks": found.num_blocks,
        "noisy_passes_per_batch": found.noisy_passes,
        "seconds": round(found.seconds, 3),
        "candidates": [
            {"interval": interval, "variance": variance, "standard_error": error} for interval, variance, error in rows
        ],
    }


def plot_search(found: IntervalSearch, path: str | Path, *, title: str = "Interval search") -> None:
    """Draw the variance over the lower end of the interval, a line for each width; bars are standard errors.

    Raises:
        ImportError: matplotlib, of the extra `plots`, is not installed.
    """
    from matplotlib.figure import Figure

    variances, errors = found.variances.tolist(), found.standard_errors.nan_to_num().tolist()
    widths: dict[float, list[int]] = {}
    for index, (low, high) in enumerate(found.candidates[1:], start=1):
        widths.setdefault(round(float(high) - float(low), 2), []).append(index)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.axhline(variances[0], color="0.4", linestyle="--", label=f"{_name(found.candidates[0])}, the whole interval")
    for width, members in sorted(widths.items()):
        members.sort(key=lambda index: found.candidates[index])
        axes.errorbar(
            [found.candidates[index][0] for index in members],
            [variances[index] for index in members],
            [errors[index] for index in members],
            marker="o",
            markersize=4,
            linewidth=1.2,
            capsize=2,
            label=f"width {width:g}",
        )
    low, lowest = float(found.interval[0]), variances[found.best]
    chosen = f"chosen: {_name(found.interval)}, variance {lowest:.3g}"
    axes.plot([low], [lowest], marker="*", markersize=16, color="black", linestyle="none", zorder=3, label=chosen)
    if min(variances) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_xlabel("lower end of the interval of noise levels")
    axes.set_ylabel("variance of the loss of a block (nats$^2$)")
    axes.set_title(title)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def _name(interval: Interval) -> str:
    low, high = (f"{end:.3g}" for end in interval)
    return f"[{low}, {high}]"


__all__ = ["PLOT_NAME", "SEARCH_NAME", "interval_metrics", "plot_search", "record_search"]
