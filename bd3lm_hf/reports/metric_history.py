"""Metrics over the optimizer steps, from the log of a run."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


Series = dict[str, tuple[np.ndarray, np.ndarray]]  # name -> steps, values


def series_of(log_history: Sequence[Mapping[str, Any]]) -> Series:
    """Return every logged number over the steps; where a step was logged twice, the later entry counts."""
    found: dict[str, dict[int, float]] = {}
    for entry in log_history:
        for name, value in entry.items():
            if name not in ("step", "epoch") and isinstance(value, (int, float)):
                found.setdefault(name, {})[int(entry.get("step", 0))] = float(value)
    return {
        name: (np.array(sorted(points)), np.array([points[step] for step in sorted(points)]))
        for name, points in found.items()
    }


def smoothed(values: np.ndarray) -> np.ndarray:
    """Return the running mean over a twentieth of the values, over fewer at the start and the end."""
    count, sums = len(values), np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(count)
    half = np.minimum(index, count // 40)
    stop = np.minimum(count, index + half + 1)
    return (sums[stop] - sums[index - half]) / (stop - index + half)
