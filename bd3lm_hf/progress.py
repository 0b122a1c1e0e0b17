"""Show how far a long command is: a bar on a terminal, elsewhere an estimate and a line per minute."""

import sys
import time

from tqdm.auto import tqdm


_SECONDS_BETWEEN_LINES = 60


class ProgressReport:
    """Report progress on standard error.

    Args:
        name: what is being done.
        total: number of items.
        initial: how many were finished by an earlier run.
        unit: what an item is called.
        disable: report nothing.
    """

    def __init__(self, name: str, total: int, *, initial: int = 0, unit: str = "text", disable: bool = False) -> None:
        self.name, self.total, self.unit = name, total, unit
        self.done = self._initial = initial
        self._started = self._last = time.monotonic()
        self._lines = not disable and not sys.stderr.isatty()
        self._bar = tqdm(
            total=total, initial=initial, desc=name, unit=unit, leave=False, disable=disable or self._lines
        )
        self._has_estimate = False

    def update(self, count: int = 1) -> None:
        """Count finished items, and report if it is time."""
        self.done += count
        self._bar.update(count)
        now = time.monotonic()
        left = (now - self._started) / max(1, self.done - self._initial) * (self.total - self.done)
        # The first items give the estimate; a command of less than a minute reports nothing.
        is_due = now - self._last >= _SECONDS_BETWEEN_LINES or (
            not self._has_estimate and left >= _SECONDS_BETWEEN_LINES
        )
        if self._lines and is_due and self.done < self.total:
            print(
                f"{self.name}: {self.done} of {self.total} {self.unit}s, about {_duration(left)} left",
                file=sys.stderr,
                flush=True,
            )
            self._has_estimate, self._last = True, now

    def __enter__(self) -> "ProgressReport":
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
