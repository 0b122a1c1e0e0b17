"""The benchmark measures what it says."""

import time

import pytest
import torch

from bd3lm_hf import benchmark


def test_the_ratio_is_our_time_over_the_rivals():
    result = benchmark.compare(lambda: time.sleep(0.04), lambda: time.sleep(0.01), repeats=3)
    assert 1.5 < result.ratio < 5.0
    assert result.spread[0] <= result.ratio <= result.spread[1]
    assert result.ours > result.rival


def test_both_tasks_run_and_leave_no_gradient(tiny_model):
    benchmark_vocab = benchmark.VOCAB_SIZE
    try:
        benchmark.VOCAB_SIZE = tiny_model.config.vocab_size
        benchmark.training_step(tiny_model, 8)
    finally:
        benchmark.VOCAB_SIZE = benchmark_vocab
    assert all(parameter.grad is None for parameter in tiny_model.parameters())
    tiny_model.generation_config.eos_token_id = None
    benchmark.generation(tiny_model, 5)


def test_peak_memory_counts_bytes():
    before = benchmark.peak_of_process()
    block = torch.ones(100_000_000 // 4)
    assert benchmark.peak_of_process() - before < 0.2
    assert benchmark.peak_of_process() >= block.numel() * 4 / 1e9


def test_an_unknown_model_is_refused():
    with pytest.raises(ValueError, match="no model called 'bert'"):
        benchmark.build("bert")


def test_no_repeats_are_refused():
    with pytest.raises(ValueError, match="--repeats 0 --threads 2: give at least 1"):
        benchmark.main(["--repeats", "0"])
