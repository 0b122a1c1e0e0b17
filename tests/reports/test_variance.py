"""The standard error of an estimate for its time."""

import math

import pytest
import torch

from bd3lm_hf.cli import run_verb
from bd3lm_hf.evaluation.perplexity import perplexity
from bd3lm_hf.reports.variance import (
    EstimatorVariance,
    Setting,
    estimator_variance,
    read_estimator,
    variance_table,
)


@pytest.fixture
def sequences() -> list[list[int]]:
    return torch.randint(3, 47, (6, 32), generator=torch.Generator().manual_seed(0)).tolist()


def test_the_deviation_is_that_of_the_library_s_estimates_over_seeds(tiny_model, sequences):
    settings = [Setting("published"), Setting("stratified", 2), Setting("exact")]
    results = estimator_variance(tiny_model, sequences, settings, num_seeds=4)
    for (estimator, draws), result in zip(settings, results, strict=True):
        nlls = [
            perplexity(tiny_model, sequences, estimator=estimator, num_samples=draws, seed=seed).nll
            for seed in range(4)
        ]
        assert result.deviation == pytest.approx(torch.tensor(nlls).std().item(), rel=1e-3, abs=1e-6)
        assert result.nll == pytest.approx(sum(nlls) / 4)
        assert result.seconds > 0 and result.num_seeds == 4
    assert results[2].deviation == 0


def test_stratified_beats_published_at_equal_cost(tiny_model, sequences):
    # One draw each: the passes are the same, so that the deviations compare at equal cost.
    results = estimator_variance(
        tiny_model, sequences, [Setting("published"), Setting("stratified")], num_seeds=12, batch_size=6
    )
    assert results[1].deviation < results[0].deviation / 2


def test_four_times_the_seconds_at_half_the_error_are_the_same_precision():
    one = EstimatorVariance(Setting("stratified"), 4.0, 0.2, 1.0, 8)
    four = EstimatorVariance(Setting("stratified", 4), 4.0, 0.1, 4.0, 8)
    assert one.error_of_a_second == pytest.approx(four.error_of_a_second)
    lines = variance_table([one, four, EstimatorVariance(Setting("exact"), 4.0, 0.0, 9.0, 8)]).splitlines()
    assert lines[3] == "| stratified, 4 noise samples | 4.0000 | 0.1000 | 4.000 | 0.2000 | 1.000 |"
    assert lines[4].endswith("| 0.0000 | 0.000 |") and len(lines) == 5


def test_a_first_line_without_an_error_has_nothing_to_compare_with():
    lines = variance_table([EstimatorVariance(Setting("exact"), 4.0, 0.0, 1.0, 8)] * 2).splitlines()
    assert all(line.endswith("| nan |") for line in lines[2:])
    assert math.isnan(float(lines[2].split("|")[-2]))


def test_a_setting_is_an_estimator_and_its_draws():
    assert read_estimator("exact") == Setting("exact") == ("exact", 1)
    assert read_estimator("stratified:4") == Setting("stratified", 4)


@pytest.mark.parametrize("text", ["stratified:", "stratified:0", "stratified:many", "stratified:-1"])
def test_draws_that_are_none_are_refused(text):
    with pytest.raises(ValueError, match=f"--estimators {text}: .*>= 1"):
        read_estimator(text)


def test_one_seed_and_an_estimator_that_the_model_has_not_are_refused(tiny_model, sequences):
    with pytest.raises(ValueError, match="1 seeds have no standard error: give at least 2"):
        estimator_variance(tiny_model, sequences, [Setting("exact")], num_seeds=1)
    with pytest.raises(ValueError, match="estimator='magic' .* BD3LMForMaskedLM"):
        estimator_variance(tiny_model, sequences, [Setting("magic")], num_seeds=2)


def test_bench_measures_a_checkpoint(model_folder, text_file, capsys):
    threads = ["--threads", str(torch.get_num_threads())]
    of_text = ["--model", str(model_folder), "--dataset", str(text_file), "--batch-size", "1", "--batches", "1"]
    run_verb("bench", ["--estimators", "published", "exact", *of_text, "--repeats", "2", *threads])
    lines = capsys.readouterr().out.strip().splitlines()
    assert [line.split(" | ")[0] for line in lines[3:]] == ["| published", "| exact"]
    with pytest.raises(ValueError, match="held-out sequences, fewer than 90: give fewer batches"):
        run_verb("bench", ["--estimators", "exact", *of_text[:-1], "90", *threads])
    with pytest.raises(ValueError, match="--batch-size 0 --batches 1: give at least 1 of each"):
        run_verb("bench", ["--estimators", "exact", *of_text, "--batch-size", "0", *threads])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--estimators", "exact"], "--estimators measures a trained model: name its folder with --model"),
        (["--estimators", "exact", "--noise-draws", "2"], "two measurements: take one at a time"),
    ],
)
def test_bench_refuses_what_it_can_not_measure(arguments, message):
    with pytest.raises(ValueError, match=message):
        run_verb("bench", [*arguments, "--threads", str(torch.get_num_threads())])
