"""What a trainer logged, as numbers over the optimizer steps."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


Series = dict[str, tuple[np.ndarray, np.ndarray]]  # name -> steps, values


def series_of(log_history: Sequence[Mapping[str, Any]]) -> Series:
    """Every logged number over the steps; where a step was logged twice, the later entry counts."""
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
    """Mean over a twentieth of the values around each, fewer at the start; at the end over those that there are."""
    count, sums = len(values), np.concatenate([[0.0], np.cumsum(values)])
    place = np.arange(count)
    half = np.minimum(place, count // 40)
    stop = np.minimum(count, place + half + 1)
    return (sums[stop] - sums[place - half]) / (stop - place + half)


__all__ = ["Series", "series_of", "smoothed"]
