"""A trace replays how a text came about, and says where each of its places stands in the result."""

import pytest
import torch

from bd3lm_hf.modeling.configuration_bd3lm import BD3LMConfig
from bd3lm_hf.modeling.decoding_bd3lm import Trace
from bd3lm_hf.modeling.decoding_state_bd3lm import SequenceBuffer
from bd3lm_hf.modeling.modeling_bd3lm import BD3LMForMaskedLM
from bd3lm_hf.modeling.samplers_bd3lm import SAMPLERS


MASK, PAD = 47, 2
RAGGED = torch.tensor([[2, 2, 2, 2, 2, 9], [2, 2, 11, 12, 13, 14], [3, 4, 5, 6, 7, 8]])


@pytest.fixture
def model(tiny_config, randomize) -> BD3LMForMaskedLM:
    config = BD3LMConfig(**{**tiny_config.to_diff_dict(), "eos_token_id": None, "mask_token_id": None})
    return randomize(BD3LMForMaskedLM(config), std=0.3).eval()


def traced(model, ids, **arguments):
    arguments = {"max_new_tokens": 9, "do_sample": True, "generator": torch.Generator().manual_seed(0), **arguments}
    return model.generate(
        ids, attention_mask=(ids != PAD).long(), return_dict_in_generate=True, output_trace=True, **arguments
    )


def replayed(output, width: int) -> torch.Tensor:
    """The result, put together from the trace alone."""
    replay = torch.full_like(output.sequences, -1)
    for step in output.trace:
        for row, columns in enumerate(step.columns.tolist()):
            for place, column in enumerate(columns):
                if 0 <= column < replay.shape[1]:
                    replay[row, column] = step.tokens[row, place]
    return replay


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("ids", [RAGGED, RAGGED.flip(1)], ids=["left", "right"])
@pytest.mark.parametrize("remask", [0.0, 0.5])
def test_a_trace_replays_the_text(model, sampler, ids, remask):
    output = traced(model, ids, sampler=sampler, remask_fraction=remask, confidence_threshold=0.05)
    assert len(output.trace) == output.num_forward_passes
    replay = replayed(output, 6)
    assert torch.equal(replay[:, 6:], output.sequences[:, 6:])
    seen = replay[:, :6] >= 0  # the prompt's part of the first block
    assert torch.equal(replay[:, :6][seen], output.sequences[:, :6][seen])
    assert int(seen.sum()) == 1 + 0 + 2


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_step_shows_what_it_revealed_and_how_likely_it_was(model, sampler):
    output = traced(model, RAGGED, sampler=sampler, output_scores=True, confidence_threshold=0.05)
    before = None
    for step in output.trace:
        assert step.tokens.shape == step.revealed.shape == step.confidence.shape == step.columns.shape == (3, 4)
        assert step.revealed.any() and not (step.tokens[step.revealed] == MASK).any()
        if before is not None and before.block == step.block:
            changed = before.tokens != step.tokens
            assert torch.equal(changed, step.revealed)
        assert torch.equal(step.confidence > 0, step.revealed)
        for row, place in step.revealed.nonzero().tolist():
            column = int(step.columns[row, place]) - 6
            if column < 9:
                expected = output.scores[column][row].softmax(-1)[step.tokens[row, place]]
                torch.testing.assert_close(step.confidence[row, place], expected)
        before = step


def test_what_is_masked_once_more_is_seen_to_be(model):
    steps = [step for step in traced(model, RAGGED[2:], remask_fraction=0.5).trace if step.block == 8]
    known = torch.stack([step.tokens[0] != MASK for step in steps]).sum(1)
    assert known.tolist() == [1, 2, 3, 4, 3, 4]


def test_a_trace_is_made_only_when_it_is_asked_for(model):
    output = model.generate(RAGGED, max_new_tokens=4, return_dict_in_generate=True)
    assert output.trace is None
    with pytest.raises(ValueError, match="output_trace=True needs return_dict_in_generate=True"):
        model.generate(RAGGED, max_new_tokens=4, output_trace=True)


@pytest.mark.parametrize(
    ("real", "continued", "expected"),
    [
        ([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]], True, [[-1, -1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6]]),
        ([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], True, [[-1, -1, 0, 1, 2, 5, 6], [0, 1, 2, 3, 4, 5, 6]]),
        ([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], False, [[-1, -1, 0, 1, 2, -1, -1], [0, 1, 2, 3, 4, -1, -1]]),
    ],
)
def test_columns_of_the_canvas_are_found_in_the_result(real, continued, expected):
    real = torch.tensor(real).bool()
    token_ids = torch.zeros(2, 7, dtype=torch.long)
    blanks = None if continued else token_ids.bool()
    buffer = SequenceBuffer(token_ids, torch.tensor([2, 0]), real.sum(1), 0, 7, 1, None, blanks)
    assert Trace(buffer, real.long(), real).columns.tolist() == expected
