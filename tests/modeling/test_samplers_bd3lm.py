"""Which masked position is revealed when: orders, hitting times, grids, thresholds, bounds."""

import collections
import math
from types import SimpleNamespace

import pytest
import torch

from bd3lm_hf.modeling.generation_config_bd3lm import BD3LMGenerationConfig
from bd3lm_hf.modeling.noise_bd3lm import noise_schedule
from bd3lm_hf.modeling.samplers_bd3lm import SAMPLERS, RevealState, Sampler, hitting_times


RECORDED = "07_samplers"
MASKED = torch.tensor([[True, False, True, True], [False, False, False, False], [True, True, True, True]])


def make(name: str, noise: str = "loglinear", timed: bool = False, **fields) -> Sampler:
    model_config = SimpleNamespace(noise=noise, time_conditioning=timed)
    return SAMPLERS[name](BD3LMGenerationConfig(**fields), model_config)


def state_of(masked: torch.Tensor, **fields) -> RevealState:
    generator = torch.Generator().manual_seed(fields.pop("seed", 0))
    requested = fields.pop("requested", torch.ones_like(masked))
    return RevealState(masked.clone(), requested, **{"generator": generator, **fields})


def positions_of(sampler: Sampler, state: RevealState) -> list[list[int]]:
    """Return the positions of each step, if all predictions are accepted."""
    positions = []
    for step in sampler.steps(state):
        state.masked.view(-1)[step.positions] = False
        positions.append(step.positions.tolist())
    return positions


# --- All samplers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("fields", [{}, {"do_sample": False}, {"left_to_right": True}], ids=str)
def test_every_masked_position_is_revealed_once_and_no_other(name, fields):
    positions = sum(positions_of(make(name, num_denoising_steps=3), state_of(MASKED, **fields)), [])
    assert sorted(positions) == MASKED.flatten().nonzero().flatten().tolist()


@pytest.mark.parametrize("name", SAMPLERS)
def test_nothing_masked_takes_no_step_and_from_left_to_right_nothing_after_the_requested_positions_does(name):
    assert not positions_of(make(name), state_of(torch.zeros(2, 4, dtype=torch.bool)))
    assert not positions_of(make(name), state_of(MASKED, requested=torch.zeros_like(MASKED)))
    requested = torch.tensor([[True, True, False, False]])
    state = state_of(torch.ones(1, 4, dtype=torch.bool), requested=requested, left_to_right=True)
    assert sorted(sum(positions_of(make(name), state), [])) == [0, 1]


# --- First hitting ---------------------------------------------------------------------------------------------------


def test_first_hitting_reveals_one_position_per_row_and_step():
    positions = positions_of(make("first_hitting"), state_of(MASKED))
    assert len(positions) == 4
    assert [sorted(position // 4 for position in step) for step in positions] == [[0, 2], [0, 2], [0, 2], [2]]


@pytest.mark.parametrize("fields", [{"do_sample": False}, {"left_to_right": True}], ids=str)
def test_without_sampling_or_for_text_readers_positions_are_revealed_from_left_to_right(fields):
    masked = torch.tensor([[False, True, True, False, True]])
    assert positions_of(make("first_hitting"), state_of(masked, **fields)) == [[1], [2], [4]]


def test_no_step_is_taken_for_positions_that_are_not_requested():
    requested = torch.tensor([[True, True, False, False]])
    lengths = collections.Counter()
    for value in range(200):
        masked = torch.ones(1, 4, dtype=torch.bool)
        positions = sum(positions_of(make("first_hitting"), state_of(masked, requested=requested, seed=value)), [])
        assert positions[-1] in (0, 1) and {0, 1} <= set(positions)
        lengths[len(positions)] += 1
    assert set(lengths) == {2, 3, 4}


@pytest.mark.parametrize(("steps", "sizes"), [(1, [4]), (2, [2, 2]), (3, [2, 1, 1]), (4, [1] * 4), (9, [1] * 4)])
def test_fewer_steps_than_positions_share_them_evenly(steps, sizes):
    masked = torch.ones(1, 4, dtype=torch.bool)
    positions = positions_of(make("first_hitting", num_denoising_steps=steps), state_of(masked))
    assert [len(step) for step in positions] == sizes


def test_the_hitting_time_reproduces_the_published_one(recorded):
    for block, count in ((0, 3), (1, 4)):  # the first block begins with the bos token
        uniform, expected = (recorded[name][recorded["fh.block_index"] == block] for name in ("fh.u_time", "fh.t"))
        times = hitting_times(torch.tensor([[count]]), count, uniform[None])
        torch.testing.assert_close(times[0].float(), expected, atol=1e-6, rtol=0)


def test_without_sampling_the_hitting_time_is_its_mean():
    count = torch.full((100_000, 1), 5)
    uniform = torch.rand(100_000, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = hitting_times(count, 5, uniform).mean(0)
    torch.testing.assert_close(drawn, hitting_times(count[:1], 5)[0], atol=3e-3, rtol=0)


def test_a_time_conditioned_model_gets_the_hitting_times():
    state = state_of(MASKED, do_sample=False)
    chances = torch.stack([step.mask_prob for step in make("first_hitting", timed=True).steps(state)])
    expected = torch.tensor([[3 / 4, 0, 4 / 5], [2 / 4, 0, 3 / 5], [1 / 4, 0, 2 / 5], [0, 0, 1 / 5]])
    torch.testing.assert_close(chances, expected)


# --- Ancestral -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", ["loglinear", "square", "square_root", "log", "cosine"])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_position_is_revealed_with_the_probability_of_its_step(noise, steps):
    sampler, masked = make("ancestral", noise, num_denoising_steps=steps), torch.ones(20_000, 2, dtype=torch.bool)
    when, mask_prob = sampler.hits(state_of(masked))
    left, schedule = 40_000.0, noise_schedule(noise)
    for step in range(steps):
        t, s = (torch.tensor(1 - k / steps, dtype=torch.float64) for k in (step, step + 1))
        stays = float(schedule.move_chance(s) / schedule.move_chance(t)) if step < steps - 1 else 0.0
        here = when == step
        assert abs(int(here.sum()) - left * (1 - stays)) <= 5 * math.sqrt(left * stays * (1 - stays) + 1e-9)
        torch.testing.assert_close(mask_prob[here], torch.full_like(mask_prob[here], float(schedule.move_chance(t))))
        left -= int(here.sum())
    assert left == 0  # nothing is masked in the end


def test_a_row_skips_steps_that_reveal_nothing():
    for value in range(20):
        masked = torch.ones(2, 4, dtype=torch.bool)
        state = state_of(masked, seed=value)
        when, _ = make("ancestral", num_denoising_steps=1000).hits(state_of(masked, seed=value))
        positions = positions_of(make("ancestral", num_denoising_steps=1000), state)
        assert len(positions) == max(len(set(row)) for row in when.tolist())
        for row, of_row in enumerate(when.tolist()):
            mine = [step for step in ([p - 4 * row for p in step if p // 4 == row] for step in positions) if step]
            assert [{of_row[p] for p in step} for step in mine] == [{value} for value in sorted(set(of_row))]


@pytest.mark.parametrize(
    ("steps", "expected"), [(4, [[0, 1], [2, 3], [4, 5], [6, 7]]), (None, [[i] for i in range(8)])]
)
def test_without_sampling_the_steps_share_a_block_evenly(steps, expected):
    masked = torch.ones(1, 8, dtype=torch.bool)
    assert positions_of(make("ancestral", num_denoising_steps=steps), state_of(masked, do_sample=False)) == expected


def test_text_readers_get_the_drawn_steps_from_left_to_right():
    masked = torch.ones(1, 32, dtype=torch.bool)
    when, _ = make("ancestral", num_denoising_steps=5).hits(state_of(masked, left_to_right=True))
    drawn, _ = make("ancestral", num_denoising_steps=5).hits(state_of(masked))
    assert when[0].tolist() == sorted(drawn[0].tolist()) != drawn[0].tolist()


# --- Parallel samplers -----------------------------------------------------------------------------------------------


def scores_of(certainty: list[float], vocab: int = 11) -> torch.Tensor:
    """Return a row of scores per position; its first token has the given probability, the others share the rest."""
    first = torch.tensor(certainty).unsqueeze(1)
    return torch.cat([first, ((1 - first) / (vocab - 1)).expand(-1, vocab - 1)], dim=1).log()


def accepted(sampler: Sampler, masked: list[list[bool]], certainty: list[float], **fields) -> list[bool]:
    """Return which predictions the first step accepts, for the masked positions in reading order."""
    state = state_of(torch.tensor(masked), **fields)
    step, scores = next(iter(sampler.steps(state))), scores_of(certainty)
    return sampler.accept(state, step, torch.zeros(len(scores), dtype=torch.long), scores).tolist()


@pytest.mark.parametrize(
    ("threshold", "masked", "certainty", "expected"),
    [
        (0.8, [[True] * 4], [0.9, 0.7, 0.85, 0.79], [0, 2]),
        (0.8, [[True, False, True, True], [True, True, True, False]], [0.3, 0.5, 0.4, 0.9, 0.2, 0.95], [1, 3, 5]),
        (0.0, [[True] * 3], [0.3, 0.5, 0.4], [0, 1, 2]),
        (1.0, [[True] * 3], [0.3, 0.5, 0.4], [1]),
    ],
)
def test_confidence_reveals_what_exceeds_its_threshold_and_one_at_least(threshold, masked, certainty, expected):
    found = accepted(make("confidence", confidence_threshold=threshold), masked, certainty)
    assert [index for index, is_accepted in enumerate(found) if is_accepted] == expected


@pytest.mark.parametrize("name", ["confidence", "entropy_bound"])
def test_for_text_readers_predictions_are_accepted_from_the_left(name):
    sampler = make(name, confidence_threshold=0.8, entropy_bound=0.025)
    certain = 0.999
    masked = [[True, True, True, True], [False, True, True, True]]
    certainty = [certain, certain, 0.1, certain, 0.1, 0.1, certain]
    assert accepted(sampler, masked, certainty, left_to_right=True)[4:] == [True, False, False]
    run = accepted(sampler, masked, certainty, left_to_right=True)[:4]
    # Two certain tokens and any third one are nearly independent; a fourth would exceed the bound.
    assert run == ([True, True, False, False] if name == "confidence" else [True, True, True, False])


def entropies(certainty: list[float]) -> list[float]:
    return [-(p * math.log(p) + (1 - p) * math.log((1 - p) / 10)) for p in certainty]


@pytest.mark.parametrize("bound", [0.0, 0.1, 0.3, 1.0, 2.5, 100.0])
@pytest.mark.parametrize("in_order", [False, True])
def test_entropy_bound_takes_positions_while_their_mutual_information_is_bounded(bound, in_order):
    certainty = [0.9, 0.5, 0.99, 0.7, 0.999]
    entropy = entropies(certainty)
    order = list(range(5)) if in_order else sorted(range(5), key=lambda position: entropy[position])
    taken, expected = [], [False] * 5
    for position in order:
        taken.append(entropy[position])
        if sum(taken) - max(taken) > bound:
            break
        expected[position] = True
    sampler = make("entropy_bound", entropy_bound=bound)
    assert accepted(sampler, [[True] * 5], certainty, left_to_right=in_order) == expected
    assert expected[order[0]]  # one at least


@pytest.mark.parametrize("name", ["confidence", "entropy_bound"])
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 9])
def test_with_a_number_of_steps_enough_are_accepted_to_finish_in_time(name, steps):
    # Nothing is certain, so a step accepts only the minimum.
    sampler = make(name, num_denoising_steps=steps, confidence_threshold=1.0, entropy_bound=0.0)
    state = state_of(torch.tensor([[True] * 5, [False, True, True, False, False]]))
    sizes = []
    for step in sampler.steps(state):
        scores = scores_of([0.5 - 0.01 * i for i in range(len(step.positions))])
        taken = sampler.accept(state, step, torch.zeros(len(scores), dtype=torch.long), scores)
        state.masked.view(-1)[step.positions] = ~taken
        rows = step.positions[taken] // 5
        sizes.append((int((rows == 0).sum()), int((rows == 1).sum())))
    assert len(sizes) == min(steps, 5)
    for row, count in ((0, 5), (1, 2)):
        left = count
        for step, size in enumerate(sizes):
            assert size[row] == min(left, max(1, -(-left // (steps - step))))
            left -= size[row]
        assert left == 0


def test_a_time_conditioned_model_gets_the_masked_share_of_a_block():
    step = next(iter(make("confidence", timed=True).steps(state_of(MASKED))))
    assert step.mask_prob.tolist() == [0.75, 0.0, 1.0]
