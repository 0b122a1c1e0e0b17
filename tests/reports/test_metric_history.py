"""A log becomes numbers over the steps."""

import numpy as np

from bd3lm_hf.reports.metric_history import series_of, smoothed


def test_a_step_that_was_logged_twice_counts_once():
    steps, values = series_of([{"loss": 4.0, "step": 2}, {"loss": 3.0, "step": 1}, {"loss": 5.0, "step": 2}])["loss"]
    assert (steps.tolist(), values.tolist()) == ([1, 2], [3.0, 5.0])


def test_the_smoothed_loss_does_not_lag():
    line = np.arange(200.0)
    np.testing.assert_allclose(smoothed(line)[:-5], line[:-5])
    assert smoothed(line)[-1] == np.mean(line[-6:])
    assert np.std(smoothed(np.tile([0.0, 1.0], 200))) < 0.1
