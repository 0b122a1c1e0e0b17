import json
import sys

import numpy as np
import pytest

from bd3lm_hf.reports.figures import Line, curves, draw_lines, draw_speed_quality, write_training_curve
from bd3lm_hf.reports.run_reader import Run


PNG = b"\x89PNG"


def log_of(steps: int) -> list[dict[str, float]]:
    """A log with everything that a run can log."""
    log: list[dict[str, float]] = []
    for step in range(10, steps + 1, 10):
        speed = {"tokens_per_second": 5000.0 + step % 70, "tflops_per_second": 0.5, "mfu": 0.41}
        log.append({"loss": 3 + 5 / step, "step": step, "epoch": 0.1, **speed})
        if step % 50 == 0:
            log.append({"eval_nll": 3.2, "eval_standard_error": 0.1, "eval_ppl": np.exp(3.2), "step": step})
            log.append({"interval_min": 0.3, "interval_max": 0.8, "interval_variance": 5.0, "step": step})
    return [*log, {"train_loss": 3.1, "step": steps}]


def test_a_curve_holds_every_logged_number_and_a_picture(tmp_path):
    write_training_curve(log_of(100), tmp_path, title="a run")
    curve = json.loads((tmp_path / "training_curve.json").read_text(encoding="utf-8"))
    assert curve["eval_nll"] == {"steps": [50, 100], "values": [3.2, 3.2]}
    assert curve["loss"]["values"][0] == 3.5
    assert {"interval_min", "interval_max", "interval_variance", "tokens_per_second"} < curve.keys()
    assert {"mfu", "train_loss"} < curve.keys()
    assert (tmp_path / "training_curve.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    "log",
    [
        [{"loss": 3.0, "step": 1}],
        [{"eval_nll": 3.0, "eval_ppl": 20.0, "step": 0}],
        [{"eval_one_nll": 3.0, "eval_two_nll": 4.0, "eval_two_standard_error": 0.5, "step": 4}],
        [{"interval_min": 0.0, "interval_max": 1.0, "interval_variance": 0.0, "step": 5}],
        [{"loss": 0.0, "tokens_per_second": 0.0, "tflops_per_second": 1.0, "step": step} for step in range(40)],
    ],
    ids=["one point", "evaluation only", "two held-out sets", "interval only", "nothing but zeros"],
)
def test_a_picture_is_drawn_of_whatever_there_is(tmp_path, log):
    write_training_curve(log, tmp_path)
    assert (tmp_path / "training_curve.png").read_bytes().startswith(PNG)


def test_lines_begin_at_step_0_and_their_labels_end_with_their_last_values():
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    lines = [Line(name, np.array([10, 50]), np.array([5.0, last])) for name, last in (("a", 2.0), ("b", 2.001))]
    draw_lines(axes, lines, last="{:.3f}")
    assert axes.get_xlim()[0] == 0
    assert axes.get_legend_handles_labels()[1] == ["a, last 2.000", "b, last 2.001"]


def test_the_held_out_curve_has_points_at_step_0_and_after_training(tmp_path):
    log = [{"eval_nll": 3.5, "step": 50}, {"eval_nll": 3.0, "step": 100}]
    results = {"before": {"nll": 7.6}, "after": {"nll": 2.9}, "steps": 100, "estimator": "exact bound"}
    run = Run("a run", tmp_path, results=results, log=log)
    (figure,) = curves([run])
    points = {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in figure.drawn.axes[0].lines}
    assert points["a run, before and after training, exact bound"] == [(0, 7.6), (100, 2.9)]
    assert points["a run, stratified estimate of the bound, 1 noise sample, last 3"] == [(50, 3.5), (100, 3.0)]


def test_quality_is_drawn_on_a_log_axis_with_a_title_and_entropy():
    points = [
        {"sampler": "confidence", "tokens_per_forward": n, "perplexity": 10.0 * n, "standard_error": 0.1, "entropy": 4}
        for n in (1, 2, 4)
    ]
    above, below = draw_speed_quality(points, "a judge", "a title").axes
    assert above.get_yscale() == "log" and "a judge" in above.get_ylabel()
    assert above.get_title(loc="left") == "a title" and "entropy" in below.get_ylabel()


def test_an_empty_log_gives_no_picture(tmp_path):
    write_training_curve([], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["training_curve.json"]


def test_without_matplotlib_there_is_a_warning_and_no_picture(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    write_training_curve(log_of(100), tmp_path)
    assert "training_curve.png" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["training_curve.json"]
