"""Long commands say off a terminal how far they are: an estimate first, then a line per minute."""

import sys

import pytest

from bd3lm_hf import progress
from bd3lm_hf.progress import ProgressReport


@pytest.fixture
def lines_of(monkeypatch, capsys):
    """A function `(seconds per item, items) -> lines` on a clock that only the items move."""

    def run(seconds: float, total: int, **options) -> list[str]:
        clock = [0.0]
        monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
        monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
        with ProgressReport("scoring", total, unit="sequence", **options) as report:
            for _ in range(total - options.get("initial", 0)):
                clock[0] += seconds
                report.update()
        return capsys.readouterr().err.splitlines()

    return run


def test_the_first_line_is_an_estimate_and_each_minute_has_one(lines_of):
    lines = lines_of(10, 30)
    assert "1 of 30 sequences, about 5 min left" in lines[0]
    assert [line.split()[1] for line in lines] == ["1", "7", "13", "19", "25"]


def test_what_an_earlier_run_did_takes_no_time(lines_of):
    assert "about 2 min left" in lines_of(10, 30, initial=16)[0]


@pytest.mark.parametrize(("seconds", "total", "options"), [(1, 30, {}), (10, 30, {"disable": True})])
def test_a_short_command_and_a_silent_one_say_nothing(lines_of, seconds, total, options):
    assert lines_of(seconds, total, **options) == []
