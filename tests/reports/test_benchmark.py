"""The benchmark measures what it claims to measure; variances are split into those of text and noise."""

from types import SimpleNamespace

import pytest
import torch

from bd3lm_hf.cli import run_verb
from bd3lm_hf.evaluation.perplexity import perplexity
from bd3lm_hf.modeling.modeling_bd3lm import BD3LMForMaskedLM
from bd3lm_hf.reports import benchmark
from bd3lm_hf.reports.benchmark import (
    EstimatorVariance,
    GradientVariance,
    TimedPair,
    estimator_variance,
    gradient_table,
    gradient_variance,
    read_estimator,
    variance_table,
)


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


def test_the_gain_of_a_batch_is_in_tokens_per_second(monkeypatch, capsys):
    # A batch of 8 that takes as long as 2 texts generates 4 times as many tokens per second.
    seconds = lambda task, *_: TimedPair(2.0 if "batch_size" in task.keywords else 1.0, 1.0, 1.0, (1, 1))  # noqa: E731
    monkeypatch.setattr(benchmark, "build", lambda name: None)
    monkeypatch.setattr(benchmark, "compare_times", seconds)
    run_verb("bench", ["--lengths", "--new-tokens", "64", "--batch-sizes", "8", "--threads", "1"])
    assert "| tokens per second, batch 8 over batch 1 | 4.00 | 8.00 | 0.50 | |" in capsys.readouterr().out


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
        ours, stock, rival = (benchmark.build(name) for name in ("bd3lm_qwen3", "qwen3", "gpt2"))
    assert ours.state_dict().keys() == stock.state_dict().keys()
    assert (ours.config.hidden_size, ours.config.vocab_size, ours.config.block_size) == (768, 50304, 4)
    assert sum(parameter.numel() for parameter in rival.parameters()) // 10**6 == 125  # 124 M and 1,024 more positions
    assert rival.config.attn_pdrop == 0 and rival.generation_config.eos_token_id is None
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


@pytest.fixture
def sequences() -> list[list[int]]:
    return torch.randint(3, 47, (6, 32), generator=torch.Generator().manual_seed(0)).tolist()


def test_the_deviation_is_that_of_the_library_s_estimates_over_seeds(tiny_model, sequences):
    settings = {"published": ("published", 1), "two": ("stratified", 2), "exact": ("exact", 1)}
    results = estimator_variance(tiny_model, sequences, settings, num_seeds=4)
    for (estimator, draws), result in zip(settings.values(), results, strict=True):
        options = {"estimator": estimator, "num_samples": draws}
        nlls = [perplexity(tiny_model, sequences, seed=seed, **options).nll for seed in range(4)]
        assert result.deviation == pytest.approx(torch.tensor(nlls).std().item(), rel=1e-3, abs=1e-6)
        assert result.nll == pytest.approx(sum(nlls) / 4)
        assert result.seconds > 0
    assert results[2].deviation == 0


def test_four_times_the_seconds_at_half_the_error_are_the_same_precision():
    one = EstimatorVariance("stratified", 4.0, 0.2, 1.0)
    four = EstimatorVariance("stratified:4", 4.0, 0.1, 4.0)
    assert one.error_of_a_second == pytest.approx(four.error_of_a_second)
    lines = variance_table([one, four, EstimatorVariance("exact", 4.0, 0.0, 9.0)]).splitlines()
    assert lines[3] == "| stratified:4 | 4.0000 | 0.1000 | 4.000 | 0.2000 | 1.000 |"
    assert lines[4].endswith("| 0.0000 | 0.000 |") and len(lines) == 5
    # A first line without an error has nothing to compare with.
    lines = variance_table([EstimatorVariance("exact", 4.0, 0.0, 1.0)] * 2).splitlines()
    assert all(line.endswith("| nan |") for line in lines[2:])


def test_a_setting_is_an_estimator_and_its_draws():
    assert (read_estimator("exact"), read_estimator("stratified:4")) == (("exact", 1), ("stratified", 4))
    for text in ("stratified:", "stratified:0", "stratified:many", "stratified:-1"):
        with pytest.raises(ValueError, match=f"--estimators {text}: .*>= 1"):
            read_estimator(text)


def test_one_seed_and_an_unsupported_estimator_are_refused(tiny_model, sequences):
    with pytest.raises(ValueError, match="1 seeds give no standard error"):
        estimator_variance(tiny_model, sequences, {"exact": ("exact", 1)}, num_seeds=1)
    with pytest.raises(ValueError, match="estimator='magic' .* BD3LMForMaskedLM"):
        estimator_variance(tiny_model, sequences, {"magic": ("magic", 1)}, num_seeds=2)


class Known(torch.nn.Module):
    """Its gradient is the mean of the ids plus the mean of the uniform token noise: both variances are known."""

    config = SimpleNamespace(num_blocks=lambda length: -(-length // 4))

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2))

    def forward(self, input_ids, labels, block_noise, token_noise, count_noise):
        return SimpleNamespace(loss=self.weight.sum() * (input_ids.float().mean() + token_noise.mean()))


def test_the_parts_of_a_known_variance_are_found():
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(0, 3, (2, 8), generator=generator) for _ in range(400)]
    results = gradient_variance(Known(), batches, [1, 4], repeats=5)
    for result, draws in zip(results, (1, 4), strict=True):
        expected = 2 / 12 / (2 * 8 * draws)  # two equal parameters
        assert result.noise == pytest.approx(expected, abs=4 * result.noise_error)
        assert result.noise_error < 0.1 * expected
        assert result.data == pytest.approx(2 * (2 / 3) / 16, rel=0.3)
    assert results[0].data == results[1].data
    assert results[0].time_ratio == 1.0 and results[1].seconds > 0


def test_a_variance_needs_two_of_each_and_a_clean_stream_that_draws_share(tiny_config):
    tiny_config.time_conditioning = True
    for batches, draws, repeats, message in (
        (1, [1], 5, "1 batches of 5 noise seeds have no variance"),
        (3, [1], 1, "3 batches of 1 noise seeds have no variance"),
        (2, [1, 2], 2, "noise_draws=2 needs time_conditioning=False"),
    ):
        with pytest.raises(ValueError, match=message):
            gradient_variance(BD3LMForMaskedLM(tiny_config), [torch.full((2, 8), 5)] * batches, draws, repeats=repeats)


def test_the_table_multiplies_variance_and_time():
    results = [GradientVariance(1, 0.1, 1.0, 8.0, 0.5, 2.0), GradientVariance(4, 0.2, 2.0, 2.0, 0.1, 2.0)]
    text = gradient_table(results).splitlines()
    assert text[2] == "| 1 | 0.100 | 1.00 | 8 +- 0.5 | 2 | 1.00 | 1.00 |"
    assert text[3] == "| 4 | 0.200 | 2.00 | 2 +- 0.1 | 2 | 0.50 | 0.80 |"


@pytest.mark.parametrize("words", [["--estimators", "published", "exact"], ["--noise-draws", "1", "2"]])
def test_bench_measures_a_checkpoint(bd3lm, model_folder, text_file, words):
    of_text = ["--model", model_folder, "--dataset", text_file, "--batches", 2, "--repeats", 2, "--threads", 1]
    code, out, _ = bd3lm("bench", *words, *of_text, "--batch-size", 1)
    first_cells = [line.split(" | ")[0] for line in out.strip().splitlines()[-2:]]
    assert code == 0 and first_cells == [f"| {word}" for word in words[1:]]
