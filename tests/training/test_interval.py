"""The search for the clipped interval: parity, candidates, both ways of measuring, processes, the trainer's hook."""

import functools
import json
import math
import warnings

import pytest
import tiny_runs
import torch
from datasets import Dataset
from published import GOLDEN
from shared_models import tiny_bd3lm
from transformers.utils import logging

from bd3lm_hf.checkpoints import NotFiniteError
from bd3lm_hf.modeling.configuration_bd3lm import ARConfig
from bd3lm_hf.modeling.modeling_ar import ARForCausalLM
from bd3lm_hf.modeling.modeling_bd3lm import BD3LMForMaskedLM
from bd3lm_hf.training import interval as interval_module
from bd3lm_hf.training.arguments import BD3LMTrainingArguments
from bd3lm_hf.training.interval import (
    WHOLE,
    candidate_intervals,
    check_searchable,
    first_smallest,
    parse_interval,
    published_intervals,
    search_intervals,
    sum_moments,
    variance_of_sums,
)
from bd3lm_hf.training.loss_moments import BlockMoments
from bd3lm_hf.training.trainer import BD3LMTrainer


RECORDED = "05_clip_search"
PUBLISHED = json.loads((GOLDEN / RECORDED / "config.json").read_text())
model_of = functools.partial(tiny_bd3lm, std=0.3)


def rows_of(count: int, length: int = 32) -> list[list[int]]:
    return tiny_runs.rows_of(count, length)["input_ids"][:]


# --- Parity with the published search --------------------------------------------------------------------------------


def test_candidates_equal_the_published_ones(recorded):
    found = published_intervals(PUBLISHED["clip_search_widths"], PUBLISHED["clip_search_delta"])
    assert torch.equal(torch.tensor(found, dtype=torch.float64), recorded["intervals"])
    assert found == [tuple(pair) for pair in PUBLISHED["candidates_block_size_gt_1"]] == candidate_intervals(4)
    assert candidate_intervals(1) == [tuple(pair) for pair in PUBLISHED["candidates_block_size_1"]]


def variances_of(block_nll: torch.Tensor) -> torch.Tensor:
    """Return the statistic of the search, `(candidates, batches)`, for published losses of single draws."""
    batches = block_nll.double().flatten(2).unbind(1)
    moments = [BlockMoments(torch.ones_like(batch), batch, batch.square()) for batch in batches]
    return torch.stack([variance_of_sums(sum_moments(batch)) for batch in moments], dim=1).float()


@pytest.mark.parametrize("prefix", ["", "syn."])
def test_variances_and_the_chosen_interval_equal_the_published_ones(recorded, prefix):
    variances = variances_of(recorded[f"{prefix}block_nll"])
    torch.testing.assert_close(variances.sum(1), recorded[f"{prefix}var_sum"], rtol=1e-5, atol=0)
    chosen = candidate_intervals(4)[first_smallest(variances.sum(1))]
    assert torch.equal(torch.tensor(chosen), recorded[f"{prefix}selected"])
    if not prefix:
        torch.testing.assert_close(variances.mean(1), recorded["var_logged"], rtol=1e-5, atol=0)


# --- Candidates ------------------------------------------------------------------------------------------------------


def test_widths_are_searched_next_to_own_intervals_only_on_request():
    own = [(0.3, 0.8)]
    assert candidate_intervals(4, own=own) == [WHOLE, (0.30000001192092896, 0.800000011920929)]
    assert len(candidate_intervals(4, own=own, widths=[0.9])) == 1 + 3 + 1
    assert len(candidate_intervals(4, own=own, widths=[0.5])) == 1 + 11  # it is one of them


def test_candidates_are_what_a_model_would_hold(tiny_model):
    for low, high in candidate_intervals(4, own=[(0.0, 0.7), (0.123, 0.456)])[1:]:
        tiny_model.set_interval(low, high)
        assert tiny_model.interval() == (low, high)
    assert candidate_intervals(4, own=[(0, 0.5)])[1] == (0.0010000000474974513, 0.5)  # raised to the lowest level


def test_published_intervals_that_reach_beyond_one_are_not_searched():
    assert max(high for _, high in published_intervals([0.33])) > 1
    found = candidate_intervals(4, widths=[0.33])
    assert max(high for _, high in found) <= 1
    assert len(found) == len(published_intervals([0.33])) - 1


def test_at_block_size_one_the_full_mask_is_the_other_candidate():
    assert candidate_intervals(1, widths=[0.5]) == [WHOLE, (1, 1)]
    assert candidate_intervals(1, own=[(0.5, 1.0)]) == [WHOLE, (0.5, 1.0)]


def test_an_interval_is_read_from_text():
    assert parse_interval("0.3-0.8") == (0.3, 0.8) and parse_interval("1e-3 - 1") == (1e-3, 1.0)
    with pytest.raises(ValueError, match="write two numbers, as in 0.3-0.8"):
        parse_interval(".5-1.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"widths": [0.5, 0.0]}, "interval_search_widths 0.0: give widths above 0 and up to 1"),
        ({"widths": [1.5]}, "interval_search_widths 1.5"),
        ({"step": 1e-9}, "interval_search_step 1e-09: .* at least 0.001"),
        ({"step": math.nan}, "interval_search_step nan"),
        ({"own": [(0.8, 0.3)]}, "interval_candidates 0.8-0.3: write the lower end first"),
        ({"own": [(0.3, 1.2)]}, "interval_candidates 0.3-1.2: .*inside \\[0, 1\\]"),
        ({"own": [(0.0, 0.0)]}, "interval_candidates 0.0-0.0"),
    ],
)
def test_candidates_that_are_not_intervals_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        candidate_intervals(4, **arguments)


def test_a_candidate_that_no_mask_rate_meets_is_refused_by_name_and_the_published_ones_are_met():
    candidates = candidate_intervals(4, own=[(0.3, 0.8), (0.55, 0.7)])
    check_searchable(model_of(), candidates)
    with pytest.raises(ValueError, match=r"the interval \[0.55\d*, 0.69\d*\] contains no mask rate k / 4"):
        check_searchable(model_of(resample=True), candidates)
    for size in (1, 2, 4, 8, 16, 32):
        check_searchable(model_of(resample=True, block_size=size), candidate_intervals(size))


def test_a_model_without_an_interval_or_independent_masks_is_refused():
    for model in (
        model_of(var_min=False),
        ARForCausalLM(ARConfig(vocab_size=8, hidden_dim=8, n_heads=2, n_blocks=1)),
    ):
        with pytest.raises(ValueError, match=f"this {type(model).__name__} has none: use .* with var_min=True"):
            check_searchable(model, [WHOLE])
    with pytest.raises(ValueError, match="masking='exact_k'.*--masking independent"):
        check_searchable(model_of(masking="exact_k"), [WHOLE])


def test_a_candidate_with_a_constant_weight_is_warned_about(monkeypatch):
    warnings = []
    monkeypatch.setattr(logging.get_logger("bd3lm_hf.interval"), "warning", warnings.append)
    check_searchable(model_of(), [WHOLE, (0.6, 0.9), (1.0, 1.0)])
    assert len(warnings) == 1 and "interval_candidates 0.6-0.9 start above 0.5" in warnings[0]


# --- The statistic ---------------------------------------------------------------------------------------------------


def test_the_first_of_equals_is_chosen_and_non_finite_variances_are_refused():
    assert first_smallest(torch.tensor([3.0, 1.0, 2.0, 1.0])) == 1
    with pytest.raises(NotFiniteError, match="of 1 of 3 intervals are NaN or infinite"):
        first_smallest(torch.tensor([1.0, math.nan, 2.0]))


def test_the_expected_variance_of_independent_losses_is_that_of_draws():
    generator = torch.Generator().manual_seed(0)
    mean, spread = torch.rand(6, generator=generator).double() * 3, torch.rand(6, generator=generator).double() + 0.5
    draws = mean + spread * torch.randn(200_000, 6, generator=generator, dtype=torch.float64)
    moments = BlockMoments(torch.ones(1, 6), mean.unsqueeze(0), (mean**2 + spread**2).unsqueeze(0))
    expected = variance_of_sums(sum_moments(moments))
    assert draws.var(1).mean().item() == pytest.approx(expected.item(), rel=5e-3)


def test_moments_that_all_miss_alike_do_not_change_the_variance_of_a_constant():
    for missed in (0.9, 1.0, 1.1):
        loss = torch.full((1, 50), 3.0, dtype=torch.float64)
        sums = sum_moments(BlockMoments(torch.full_like(loss, missed), loss * missed, loss**2 * missed))
        assert variance_of_sums(sums).item() == pytest.approx(0, abs=0.2 if missed != 1 else 1e-9)


# --- Both ways of measuring ------------------------------------------------------------------------------------------


def test_shared_draws_and_a_pass_per_interval_agree_within_their_standard_error():
    changes = {"block_size": 16, "resample": True, "noise": "square_root", "n_blocks": 1, "hidden_dim": 16}
    model, rows = model_of(**changes), rows_of(96)
    ways = {}
    for method, seeds in (("shared", 2), ("published", 6)):
        found = [search_intervals(model, rows, method=method, batch_size=24, seed=seed) for seed in range(seeds)]
        ways[method] = torch.cat([search.batch_variances for search in found], dim=1)
    shared, published = ways["shared"], ways["published"]
    assert (shared.shape, published.shape) == ((36, 8), (36, 24))
    difference = shared.mean(1) - published.mean(1)
    error = (shared.var(1) / shared.shape[1] + published.var(1) / published.shape[1]).sqrt()
    # Losses near the level 1e-3 are rare and weigh up to 1000: a few thousand draws do not show their own spread.
    common = torch.tensor([low >= 0.01 for low, _ in candidate_intervals(4)])
    assert (difference / error)[common].abs().max() < 4
    # By the published statistic, the interval of shared draws is worse by less than two standard errors, if at all.
    best = {method: first_smallest(variances.sum(1)) for method, variances in ways.items()}
    gap = published[best["shared"]] - published[best["published"]]
    assert best["shared"] == best["published"] or gap.mean() < 2 * gap.std() / gap.numel() ** 0.5
    # One search with shared draws is more precise than a published one, with a third of the passes.
    assert (shared.std(1) / published.std(1)).median() < 0.5


def test_the_exact_likelihood_is_chosen_at_block_size_one():
    found = search_intervals(model_of(block_size=1, resample=True), rows_of(8))
    assert (found.interval, found.noisy_passes) == ((1, 1), 1)
    assert found.variances[1] < 0.1 * found.variances[0]


def test_a_search_is_repeated_by_its_seed_and_changes_nothing():
    model, rows = model_of(dropout=0.5).train(), rows_of(6)
    before, state = model.interval(), torch.get_rng_state()
    first, second, other = (search_intervals(model, rows, batch_size=4, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.batch_variances, second.batch_variances)
    assert not torch.equal(first.batch_variances, other.batch_variances)
    assert model.training and model.interval() == before
    assert torch.equal(torch.get_rng_state(), state)


def test_a_batch_is_a_run_of_sequences_and_only_so_many_are_looked_at(tiny_model):
    rows = rows_of(10)
    whole = search_intervals(tiny_model, rows, batch_size=4)
    some = search_intervals(tiny_model, rows, batch_size=4, max_batches=2)
    assert whole.batch_variances.shape == (36, 3)
    assert torch.equal(whole.batch_variances[:, :2], some.batch_variances)


def test_a_time_conditioned_model_is_measured_interval_by_interval_and_told(monkeypatch):
    messages = []
    monkeypatch.setattr(interval_module.logger, "warning_once", messages.append)
    model = model_of(time_conditioning=True)
    found = search_intervals(model, rows_of(4))
    assert found.noisy_passes == 36
    assert len(messages) == 1 and "time_conditioning=True" in messages[0]
    plain = search_intervals(model, rows_of(4), method="published")
    assert torch.equal(found.batch_variances, plain.batch_variances)
    assert len(messages) == 1  # the user who sets it needs no warning


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        (4, {"method": "both"}, "interval_search_method 'both': choose one of shared, published"),
        (4, {"batch_size": 0}, "batch_size=0: give a whole number"),
        (4, {"max_batches": 0}, "max_batches=0: give a whole number"),
        (0, {}, "held-out sequences"),
        (1, {}, "at least two blocks with something to score"),
    ],
)
def test_a_search_that_cannot_be_made_is_refused(tiny_model, rows, arguments, message):
    with pytest.raises(ValueError, match=message):
        search_intervals(tiny_model, rows_of(rows, length=4 if rows == 1 else 32), **arguments)


# --- Several processes, see also two_processes.py --------------------------------------------------------------------


@pytest.mark.parametrize("method", ["shared", "published"])
@pytest.mark.parametrize("processes", [2, 3])
def test_a_shared_search_equals_one_process(monkeypatch, processes, method):
    model, rows = model_of(n_blocks=1), rows_of(7)  # the last batch is uneven
    alone = search_intervals(model, rows, method=method, batch_size=4)
    parts: list[torch.Tensor] = []
    monkeypatch.setattr(interval_module, "gather_object", lambda part: (parts.extend(part), list(parts))[1])
    for process in range(processes):
        found = search_intervals(model, rows, method=method, batch_size=4, share=(process, processes))
    assert len(parts) == processes
    torch.testing.assert_close(found.batch_variances, alone.batch_variances, rtol=1e-4, atol=1e-6)
    assert (found.interval, found.num_blocks) == (alone.interval, alone.num_blocks)


# --- The trainer's hook ----------------------------------------------------------------------------------------------


@pytest.fixture
def trainer_of(make_trainer):
    """A function that makes a trainer which searches after every second of its four steps."""
    search = {"interval_search": True, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 4}
    shape = {"hidden_dim": 16, "n_blocks": 1}
    return lambda **arguments: make_trainer(model=model_of(**shape), **{**search, **arguments})


def searches_of(trainer: BD3LMTrainer) -> list[dict]:
    return [entry for entry in trainer.state.log_history if "interval_min" in entry]


def test_a_training_step_draws_from_the_adopted_interval(trainer_of, monkeypatch):
    trainer = trainer_of(interval_candidates=["0.45-0.95"], eval_steps=1, max_steps=2)
    seen, inner = [], BD3LMForMaskedLM.interval
    monkeypatch.setattr(BD3LMForMaskedLM, "interval", lambda self: (seen.append(inner(self)), seen[-1])[1])
    trainer.train()
    assert seen[0][0] == pytest.approx(1e-3)
    assert seen[-1] == (pytest.approx(0.45), pytest.approx(0.95))


def test_an_adopted_interval_travels_with_weights_and_config_and_into_a_resumed_run(trainer_of, tmp_path):
    whole = trainer_of(output_dir=str(tmp_path / "whole"), save_strategy="steps", save_steps=2)
    whole.train()
    first, last = searches_of(whole)
    assert (first["step"], last["step"]) == (2, 4)
    assert whole.model.interval() == (last["interval_min"], last["interval_max"])
    assert whole.model.interval() in candidate_intervals(4)[1:]
    assert all(0 < entry["interval_variance"] < entry["interval_variance_full"] for entry in (first, last))
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    loaded = BD3LMForMaskedLM.from_pretrained(checkpoint)
    assert loaded.interval() == (first["interval_min"], first["interval_max"])
    assert (loaded.config.sampling_eps_min, loaded.config.sampling_eps_max) == loaded.interval()
    rest = trainer_of()
    rest.train(resume_from_checkpoint=str(checkpoint))
    for name in ("interval_min", "interval_max", "interval_variance"):
        assert searches_of(rest)[-1][name] == last[name]
    tiny_runs.assert_same_weights(whole.model, rest.model)


def test_a_fixed_interval_is_searched_and_kept_and_only_training_searches(trainer_of):
    trainer = trainer_of(interval_search_fixed=True, max_steps=2)
    before = trainer.model.interval()
    trainer.evaluate()
    assert not searches_of(trainer)
    trainer.train()
    assert len(searches_of(trainer)) == 1 and trainer.model.interval() == before


def test_of_several_held_out_sets_the_first_is_searched_also_in_bfloat16(trainer_of):
    trainer = trainer_of(bf16=True, max_steps=2)
    several = {name: Dataset.from_dict({"input_ids": rows_of(6)}) for name in ("one", "two")}
    trainer.eval_dataset = several
    searched, inner = [], trainer.search_interval
    trainer.search_interval = lambda sequences: (searched.append(sequences), inner(sequences))[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    assert [sequences is several["one"] for sequences in searched] == [True]
    assert math.isfinite(searches_of(trainer)[0]["interval_variance"])


def test_a_search_that_cannot_be_is_refused_before_training(tmp_path):
    arguments = BD3LMTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, eval_strategy="steps", eval_steps=1, interval_search=True
    )
    with pytest.raises(ValueError, match="this BD3LMForMaskedLM has none"):
        BD3LMTrainer(model=model_of(var_min=False), args=arguments)
    arguments.interval_candidates = ["0.55-0.7"]
    with pytest.raises(ValueError, match="contains no mask rate k / 4"):
        BD3LMTrainer(model=model_of(resample=True), args=arguments)
