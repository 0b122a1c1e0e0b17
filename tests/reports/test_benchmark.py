"""The benchmark measures what it claims to measure."""

from types import SimpleNamespace

import pytest
import torch

from bd3lm_hf.cli import run_verb
from bd3lm_hf.reports import benchmark


@pytest.fixture
def sleep(monkeypatch):
    """A function that advances the benchmark's clock by some seconds."""
    now = [0.0]
    monkeypatch.setattr(benchmark, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    return lambda seconds: now.append(now.pop() + seconds)


def test_the_ratio_is_our_time_over_the_rivals(sleep):
    seconds = iter([5.0, 5.0, 1.0, 1.0, 1.0, 3.0, 1.0, 2.0])
    task = lambda: sleep(next(seconds))  # noqa: E731
    result = benchmark.compare_times(task, task, repeats=3)
    assert (result.ours, result.rival, result.ratio) == (2.0, 1.0, 2.0)
    assert result.spread == (1.0, 3.0)


def test_the_gain_of_a_batch_is_in_tokens_per_second(monkeypatch, sleep):
    # A batch of 8 that takes as long as 2 texts writes 4 times as many tokens per second.
    monkeypatch.setattr(benchmark, "generation", lambda model, count, size=1: sleep(1 if size == 1 else 2))
    assert benchmark.batch_gain(None, 64, 8, repeats=3) == 4.0


def test_one_table_has_all_figures(monkeypatch, tiny_model, capsys):
    tiny_model.generation_config.eos_token_id = None
    monkeypatch.setattr(benchmark, "build", lambda name: tiny_model)
    monkeypatch.setattr(benchmark, "VOCAB_SIZE", tiny_model.config.vocab_size)
    monkeypatch.setattr(benchmark, "peak_memory", lambda name, length: 1.0)
    options = ["--lengths", "8", "--new-tokens", "5", "9", "--batch-sizes", "2", "3", "--repeats", "1"]
    threads = torch.get_num_threads()
    run_verb("bench", [*options, "--threads", str(threads)])
    lines = capsys.readouterr().out.strip().split("\n")
    assert [line.split(" | ")[0].strip("| ") for line in lines[3:]] == [
        "training step, 2 x 8, s",
        "generating 5 tokens, s",
        "generating 9 tokens, s",
        "generating 2 x 5 tokens, s",
        "generating 3 x 5 tokens, s",
        "tokens per second, batch 2 over batch 1",
        "tokens per second, batch 3 over batch 1",
        "peak memory of training, 2 x 8, GB",
    ]
    assert {line.count("|") for line in lines[1:]} == {6}
    assert all(parameter.grad is None for parameter in tiny_model.parameters())


def test_a_decoder_is_measured_next_to_its_stock_class(monkeypatch, capsys):
    built = []
    monkeypatch.setattr(benchmark, "build", lambda name: built.append(name))
    run_verb("bench", ["--decoder", "qwen3", "--lengths", "--new-tokens", "--batch-sizes", "--threads", "1"])
    assert built == ["bd3lm_qwen3", "qwen3"] and "| task | bd3lm_qwen3 | qwen3 |" in capsys.readouterr().out
    monkeypatch.undo()
    with torch.device("meta"):
        ours, stock = benchmark.build("bd3lm_qwen3"), benchmark.build("qwen3")
    assert ours.state_dict().keys() == stock.state_dict().keys()
    assert (ours.config.hidden_size, ours.config.vocab_size, ours.config.block_size) == (768, 50304, 4)
    with pytest.raises(ValueError, match="'mamba'.*qwen3"):
        benchmark.build("mamba")


def test_peak_memory_is_that_of_two_training_steps(monkeypatch, tiny_model, capsys):
    steps = []

    def run(command, **options):
        exec(command[-1], {})  # otherwise in a separate process
        return SimpleNamespace(stdout=capsys.readouterr().out)

    monkeypatch.setattr(benchmark.subprocess, "run", run)
    monkeypatch.setattr(benchmark, "build", {"bd3lm": tiny_model}.get)
    monkeypatch.setattr(benchmark, "training_step", lambda model, length: steps.append((model, length)))
    assert benchmark.peak_memory("bd3lm", 8) == pytest.approx(benchmark.peak_of_process(), rel=0.1)
    assert steps == [(tiny_model, 8)] * 2


def test_peak_memory_counts_bytes():
    before = benchmark.peak_of_process()
    block = torch.ones(100_000_000 // 4)
    assert benchmark.peak_of_process() - before < 0.2
    assert benchmark.peak_of_process() >= block.numel() * 4 / 1e9


def test_a_batch_of_nothing_and_no_repeats_are_refused():
    with pytest.raises(ValueError, match="--batch-sizes: give whole numbers of at least 1"):
        run_verb("bench", ["--batch-sizes", "0"])
    with pytest.raises(ValueError, match="--repeats 0 --threads 2: give at least 1"):
        run_verb("bench", ["--repeats", "0"])
