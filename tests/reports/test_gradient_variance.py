"""The variance of a gradient is taken apart into that of the text and that of the noise."""

from types import SimpleNamespace

import pytest
import torch

from bd3lm_hf import cli
from bd3lm_hf.modeling.configuration_bd3lm import BD3LMConfig
from bd3lm_hf.modeling.modeling_bd3lm import BD3LMForMaskedLM
from bd3lm_hf.reports.variance import GradientVariance, gradient_batches, gradient_table, gradient_variance


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
        expected = 2 / 12 / (2 * 8 * draws)  # of two equal parameters
        assert result.noise == pytest.approx(expected, abs=4 * result.noise_error)
        assert result.noise_error < 0.1 * expected
        assert result.data == pytest.approx(2 * (2 / 3) / 16, rel=0.3)
    assert results[0].data == results[1].data
    assert results[0].time_ratio == 1.0 and results[1].seconds > 0


def test_more_draws_lower_the_variance_of_the_noise(tiny_model):
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(3, 47, (4, 16), generator=generator) for _ in range(6)]
    one, four = gradient_variance(tiny_model, batches, [1, 4], repeats=8)
    assert four.noise < 0.4 * one.noise
    assert all(parameter.grad is None for parameter in tiny_model.parameters())


@pytest.mark.parametrize(("batches", "repeats"), [(1, 5), (3, 1)])
def test_a_variance_needs_two_of_each(tiny_model, batches, repeats):
    with pytest.raises(ValueError, match=f"{batches} batches of {repeats} noise seeds have no variance"):
        gradient_variance(tiny_model, [torch.full((2, 8), 5)] * batches, [1], repeats=repeats)


def test_the_table_multiplies_variance_and_time():
    text = gradient_table(
        [GradientVariance(1, 0.1, 1.0, 8.0, 0.5, 2.0), GradientVariance(4, 0.2, 2.0, 2.0, 0.1, 2.0)]
    ).splitlines()
    assert text[2] == "| 1 | 0.100 | 1.00 | 8 +- 0.5 | 2 | 1.00 | 1.00 |"
    assert text[3] == "| 4 | 0.200 | 2.00 | 2 +- 0.1 | 2 | 0.50 | 0.80 |"


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("Every masked token is revealed once; every revealed token stays as it is.\n" * 200)
    return path


def test_batches_are_spread_over_the_text(tiny_tokenizer, text_file):
    batches = gradient_batches(str(text_file), tiny_tokenizer, length=16, size=2, count=3)
    assert [tuple(batch.shape) for batch in batches] == [(2, 16)] * 3
    assert len({tuple(row) for batch in batches for row in batch.tolist()}) > 1
    with pytest.raises(ValueError, match="too few for 1000 batches of 2: give fewer or smaller batches"):
        gradient_batches(str(text_file), tiny_tokenizer, length=16, size=2, count=1000)


@pytest.fixture
def checkpoint(tiny_tokenizer, randomize, tmp_path):
    sizes = {"block_size": 4, "model_length": 16, "hidden_dim": 16, "n_blocks": 1, "n_heads": 2, "cond_dim": 8}
    config = BD3LMConfig(vocab_size=len(tiny_tokenizer), mask_token_id=tiny_tokenizer.mask_token_id, **sizes)
    randomize(BD3LMForMaskedLM(config)).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_the_command_line_measures_a_checkpoint(checkpoint, text_file, capsys):
    words = ["bench", "--noise-draws", "1", "2", "--model", checkpoint, "--dataset", str(text_file), "--threads", "1"]
    assert cli.main([*words, "--batch-size", "2", "--batches", "3", "--repeats", "2"]) == 0
    rows = capsys.readouterr().out.strip().splitlines()
    assert [row.split(" | ")[0] for row in rows[-2:]] == ["| 1", "| 2"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--noise-draws", "1"], "name its folder with --model"),
        (["--noise-draws", "0", "--model", "x"], "--noise-draws 0 --batch-size 8: give at least 1"),
        (["--noise-draws", "2", "--model", "./nowhere"], "--model ./nowhere: there is no such folder"),
    ],
)
def test_what_can_not_be_measured_is_one_line_and_exit_code_2(capsys, words, message):
    assert cli.main(["bench", "--threads", "1", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_draws_that_share_no_clean_stream_are_refused(tiny_config, randomize):
    tiny_config.time_conditioning = True
    model = randomize(BD3LMForMaskedLM(tiny_config))
    with pytest.raises(ValueError, match="noise_draws=2 needs time_conditioning=False"):
        gradient_variance(model, [torch.full((2, 8), 5)] * 2, [1, 2], repeats=2)
