"""Progress of a long command: a bar on a terminal, in a log file a line per minute with the time that is left."""

import sys

from tqdm.auto import tqdm


_SECONDS_BETWEEN_LINES = 60


def progress_bar(name: str, total: int, *, initial: int = 0, unit: str = "text", disable: bool = False) -> tqdm:
    """Return a bar on standard error, to be used in a `with` statement and updated by counts of finished items.

    Args:
        initial: how many were finished by an earlier run.
        unit: one item.
    """
    # In a log file nothing is erased, so a command of less than a minute writes nothing there.
    wait = 0 if sys.stderr.isatty() else _SECONDS_BETWEEN_LINES
    return tqdm(
        total=total,
        initial=initial,
        desc=name,
        unit=unit,
        leave=False,
        disable=disable,
        delay=wait,
        mininterval=max(0.1, wait),
        maxinterval=float("inf") if wait else 10,
    )
