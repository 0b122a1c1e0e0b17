"""Quality against forward passes: what is counted, which model judges, and how far two settings differ."""

import json
import math
import sys
from unittest.mock import Mock

import pytest
import torch
from shared_models import tiny_gpt2
from test_cli import assert_refused

from bd3lm_hf.data import load_text, pack
from bd3lm_hf.evaluation.perplexity import SequenceScore, summarize
from bd3lm_hf.evaluation.reference_model import ReferenceModel
from bd3lm_hf.reports.speed_quality import (
    Point,
    compare_curves,
    quality_points,
    speed_quality_table,
    text_sequences,
)


def quality_curve(*arguments, **options) -> list[Point]:
    return list(quality_points(*arguments, **options))


CURVES = {
    "first_hitting": [{"num_denoising_steps": None}, {"num_denoising_steps": 1}],
    "confidence": [{"confidence_threshold": 1.0}, {"confidence_threshold": 0.0}],
}


def point(nll: list[float], counts: list[int], sampler: str = "first_hitting", **setting) -> Point:
    scores = [SequenceScore(row, *pair) for row, pair in enumerate(zip(nll, counts, strict=True))]
    result = summarize(scores)
    return Point(sampler, setting, 1.0, 1.0, result.perplexity, result.standard_error, 2.0, 1.0, scores)


def test_bolder_settings_generate_more_tokens_per_forward(tiny_model):
    points = quality_curve(
        tiny_model, CURVES, ReferenceModel(tiny_model), num_samples=3, new_tokens=15, batch_size=2, do_sample=True
    )
    assert [(one.sampler, one.setting) for one in points] == [(s, c) for s, cs in CURVES.items() for c in cs]
    # 15 tokens after the first one: four blocks, the first of which has 3 of them.
    assert [one.tokens_per_forward for one in points] == [1.0, 15 / 4, 1.0, 15 / 4]
    for one in points:
        assert len(one.scores) == 3 and {score.num_tokens for score in one.scores} == {15}
        assert one.perplexity == pytest.approx(summarize(one.scores).perplexity)
        assert 0 < one.entropy <= math.log(16)


def test_tokens_per_forward_do_not_depend_on_the_batch(tiny_model):
    curves = {"confidence": [{"confidence_threshold": 0.04}]}
    options = {"num_samples": 4, "new_tokens": 31, "do_sample": False}
    judge = ReferenceModel(tiny_model)
    ones, fours = (quality_curve(tiny_model, curves, judge, batch_size=size, **options)[0] for size in (1, 4))
    assert ones.tokens_per_forward == fours.tokens_per_forward > 1
    assert ones.perplexity == pytest.approx(fours.perplexity, rel=1e-5)


def test_given_tokens_are_continued_and_not_scored(tiny_model):
    prompts = [[0, 5, 6, 7, 8], [0, 9, 10, 11, 12]]
    judge = ReferenceModel(tiny_model)
    judge.score = Mock(wraps=judge.score)
    (one,) = quality_curve(tiny_model, {"first_hitting": [{}]}, judge, prompts=prompts, new_tokens=6)
    assert [text.ids[: text.num_given] for text in judge.score.call_args.args[0]] == prompts
    assert [score.num_tokens for score in one.scores] == [6, 6]


def test_a_model_without_samplers_is_refused():
    with pytest.raises(ValueError, match="a GPT2LMHeadModel has no samplers to compare: name a block-diffusion model"):
        quality_curve(tiny_gpt2(), CURVES, ReferenceModel(tiny_gpt2()))


def test_the_error_of_a_ratio_is_that_of_pairs_of_texts():
    generator = torch.Generator().manual_seed(0)
    base = 20 + 3 * torch.randn(400, generator=generator)
    shift = 1 + 0.5 * torch.randn(400, generator=generator)
    counts = [10] * 400
    ratio, error = compare_curves(point((base + shift).tolist(), counts), point(base.tolist(), counts))
    assert ratio == pytest.approx(math.exp(shift.mean().item() / 10), rel=1e-6)
    # What both share cancels: only the shift has an error.
    assert error == pytest.approx(ratio * shift.std().item() / 10 / 20, rel=1e-3)


def test_the_table_compares_with_the_first_row_and_with_each_samplers_first():
    points = [
        point([10.0, 12.0], [5, 5]),
        point([20.0, 22.0], [5, 5], "confidence", confidence_threshold=1.0),
        point([15.0, 17.0], [5, 5], "confidence", confidence_threshold=0.5),
    ]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in speed_quality_table(points).splitlines()]
    assert cells[0][:5] == ["sampler", "setting", "tokens per forward", "in a batch", "perplexity"]
    assert cells[2][1] == "default" and cells[2][5] == cells[2][6] == "1.000 +- 0.000"
    assert cells[4][1] == "confidence_threshold 0.5"
    assert cells[4][5].startswith(f"{math.exp(1):.3f}") and cells[4][6].startswith(f"{math.exp(-1):.3f}")


FEW = ("--num-samples", 2, "--new-tokens", 7, "--num-denoising-steps", 4, 1, "--entropy-bound")
TWO = (*FEW, "--confidence-threshold", 1, 0)


def test_the_command_prints_a_table_and_draws_a_curve(bd3lm, model_folder, tmp_path):
    picture, data = tmp_path / "quality.png", tmp_path / "quality.json"
    code, out, _ = bd3lm("quality", "--model", model_folder, *TWO, "--plot", picture, "--output", data)
    assert code == 0
    assert out.startswith(
        "judge: the model itself (exact bound); 2 texts per setting, temperature 1, nucleus_p 1\n| sampler |"
    )
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000
    report = json.loads(data.read_text())
    assert [one["sampler"] for one in report["points"]] == ["first_hitting"] * 2 + ["confidence"] * 2
    assert f"{report['points'][0]['perplexity']:.2f} +- " in out


def test_the_command_takes_another_judge(bd3lm, model_folder, gpt2_folder):
    code, out, _ = bd3lm("quality", "--model", model_folder, *TWO, "--judge", gpt2_folder)
    assert code == 0 and out.startswith("judge: gpt2;")


def test_the_command_continues_held_out_text(bd3lm, model_folder, text_file):
    arguments = ["--dataset", text_file, "--prompt-tokens", 6, "--greedy", "--confidence-threshold"]
    code, out, _ = bd3lm("quality", "--model", model_folder, *FEW, *arguments)
    assert code == 0 and "2 texts per setting, greedy" in out
    assert out.count("| first_hitting |") == 2 and "confidence" not in out


def test_sequences_are_spread_over_the_text_and_without_padding(tiny_tokenizer, text_file):
    whole = pack(load_text(str(text_file)), tiny_tokenizer, length=16, drop_last=True)["input_ids"][:]
    for count in (3, len(whole)):
        found = text_sequences(str(text_file), tiny_tokenizer, split="train", length=16, count=count)
        assert found == [whole[index * len(whole) // count] for index in range(count)]


def test_without_matplotlib_a_plot_is_refused_before_any_work(monkeypatch, bd3lm, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    refused = bd3lm("quality", "--model", "nowhere/at/all", "--plot", tmp_path / "q.png")
    assert_refused(refused, "matplotlib: pip install 'bd3lm-hf[plots]'")
