import json
import sys
from unittest.mock import Mock

import pytest
import torch

from bd3lm_hf.training import interval
from bd3lm_hf.training.interval import PLOT_NAME, SEARCH_NAME, IntervalSearch, candidate_intervals, record_search


def search_of(batches: int = 3, candidates=None) -> IntervalSearch:
    candidates = candidates or candidate_intervals(4)
    generator = torch.Generator().manual_seed(0)
    spread = 1 + 0.1 * torch.rand(len(candidates), batches, generator=generator)
    centre = torch.tensor([[2 + 20 * (low - 0.4) ** 2] for low, _ in candidates])
    return IntervalSearch(candidates, (spread * centre).double(), 96, 4, 1.5)


def lines_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / SEARCH_NAME).read_text(encoding="utf-8").splitlines()]


def test_a_search_is_a_line_with_every_candidate(tmp_path):
    found = search_of()
    record_search(found, tmp_path / "run", step=10, adopted=True)
    (line,) = lines_of(tmp_path / "run")
    assert (line["step"], line["adopted"], line["blocks"], line["batches"]) == (10, True, 96, 3)
    assert tuple(line["interval"]) == found.interval
    assert [tuple(entry["interval"]) for entry in line["candidates"]] == found.candidates
    assert [entry["variance"] for entry in line["candidates"]] == found.variances.tolist()
    assert all(entry["standard_error"] > 0 for entry in line["candidates"])
    record_search(search_of(batches=1), tmp_path / "run", step=20, adopted=False)
    assert lines_of(tmp_path / "run")[1]["candidates"][0]["standard_error"] is None  # unknown


def test_a_resumed_run_replaces_the_lines_it_writes_again(tmp_path):
    for step in (10, 20, 30):
        record_search(search_of(), tmp_path, step=step, adopted=True)
    record_search(search_of(), tmp_path, step=20, adopted=False)
    assert [(line["step"], line["adopted"]) for line in lines_of(tmp_path)] == [(10, True), (20, False)]


def test_a_kill_while_a_search_is_written_leaves_the_earlier_ones(tmp_path, monkeypatch):
    record_search(search_of(), tmp_path, step=10, adopted=True)
    before = lines_of(tmp_path)
    monkeypatch.setattr("os.replace", Mock(side_effect=KeyboardInterrupt))  # the last thing that happens to a new file
    with pytest.raises(KeyboardInterrupt):
        record_search(search_of(), tmp_path, step=20, adopted=True)
    assert lines_of(tmp_path) == before


@pytest.mark.parametrize("candidates", [None, [(1e-3, 1), (1, 1)], [(1e-3, 1), (0.3, 0.8), (0.45, 0.95), (0.4, 0.6)]])
@pytest.mark.parametrize("batches", [1, 3])
def test_the_plot_shows_a_line_for_each_width_and_the_winner(tmp_path, monkeypatch, candidates, batches):
    figure_class = pytest.importorskip("matplotlib.figure").Figure
    seen, inner = [], figure_class.savefig
    monkeypatch.setattr(figure_class, "savefig", lambda self, *a, **k: (seen.append(self), inner(self, *a, **k)))
    found = search_of(batches, candidates)
    record_search(found, tmp_path, step=7, adopted=True)
    assert (tmp_path / PLOT_NAME).read_bytes().startswith(b"\x89PNG")
    (axes,) = seen[0].axes
    texts = [text.get_text() for text in seen[0].legends[0].get_texts()]
    widths = {round(high - low, 2) for low, high in found.candidates[1:]}
    assert sum(text.startswith("width") for text in texts) == len(widths)
    assert axes.get_title() == "step 7: [{:.3g}, {:.3g}]".format(*found.interval)
    record_search(found._replace(batch_variances=0 * found.batch_variances), tmp_path, step=8, adopted=True)
    assert len(seen) == 2  # variances of zero can be plotted


def test_without_matplotlib_the_numbers_stay_and_a_warning_says_so(tmp_path, monkeypatch):
    messages = []
    monkeypatch.setattr(interval.logger, "warning_once", messages.append)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    record_search(search_of(), tmp_path, step=10, adopted=True)
    assert not (tmp_path / PLOT_NAME).exists() and len(lines_of(tmp_path)) == 1
    assert "matplotlib is not installed" in messages[0]
