"""Rows of any length lie so that their blocks end together, and each ends where a rule says."""

import time

import pytest
import torch
from transformers.generation import MaxTimeCriteria, StoppingCriteria, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from bd3lm_hf.modeling.decoding_state_bd3lm import SequenceBuffer, StopRules
from bd3lm_hf.modeling.generation_config_bd3lm import BD3LMGenerationConfig


MASK, PAD, EOS = 47, 2, 1
IDS = torch.tensor([[2, 2, 2, 2, 2, 9], [3, 4, 5, 6, 7, 8]])
REAL = torch.tensor([[0, 0, 0, 0, 0, 1], [1, 1, 1, 1, 1, 1]])


def test_blocks_of_all_rows_end_at_the_same_columns():
    canvas = SequenceBuffer.from_prompts(IDS, REAL, 4, 4, MASK)
    assert canvas.token_ids.tolist() == [
        [MASK] * 4 + [9] + [MASK] * 7,
        [3, 4, 5, 6, 7, 8] + [MASK] * 6,
    ]
    assert canvas.row_start.tolist() == [4, 0]
    assert canvas.position_ids(0, 12).tolist() == [[0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7], list(range(12))]
    assert canvas.position_ids(5, 7).tolist() == [[1, 2], [5, 6]]
    assert canvas.key_valid.tolist() == [[False] * 4 + [True] * 8, [True] * 12]
    assert list(canvas.blocks()) == [4, 8]


def test_either_side_of_padding_gives_the_same_canvas():
    left = SequenceBuffer.from_prompts(IDS, REAL, 4, 4, MASK)
    ids = torch.tensor([[9, 2, 2, 2, 2, 2], [3, 4, 5, 6, 7, 8]])
    right = SequenceBuffer.from_prompts(ids, REAL.flip(1), 4, 4, MASK)
    assert torch.equal(left.token_ids, right.token_ids) and torch.equal(left.row_start, right.row_start)


def test_rows_with_equally_many_whole_blocks_need_no_mask():
    canvas = SequenceBuffer.from_prompts(IDS[:, 1:], torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]), 3, 4, MASK)
    assert canvas.key_valid is None
    assert canvas.position_ids(0, 8).tolist() == [list(range(8))]


@pytest.mark.parametrize("new_tokens", [1, 2, 3, 4, 5])
def test_the_canvas_ends_with_the_block_of_the_last_token(new_tokens):
    canvas = SequenceBuffer.from_prompts(IDS[1:], None, new_tokens, 4, MASK)
    assert canvas.token_ids.shape[1] == (8 if new_tokens <= 2 else 12)


def test_new_tokens_are_read_from_behind_each_prompt():
    canvas = SequenceBuffer.from_prompts(IDS, REAL, 4, 4, MASK)
    canvas.token_ids = torch.arange(24).view(2, 12)
    assert canvas.new_token_ids(4).tolist() == [[5, 6, 7, 8], [18, 19, 20, 21]]


def stop_rules(text: list[list[int]], criteria: list, new_tokens: int = 8, **config) -> StopRules:
    """Rules for rows whose prompt is one token, in blocks of 4 that are all written."""
    rows = torch.tensor(text)
    canvas = SequenceBuffer.from_prompts(torch.full((len(rows), 1), 9), None, new_tokens, 4, MASK)
    canvas.token_ids[:, 1 : 1 + rows.shape[1]] = rows
    config = BD3LMGenerationConfig(**{"pad_token_id": PAD, **config})
    return StopRules(StoppingCriteriaList(criteria), canvas.token_ids[:, :1], canvas, config)


def test_each_row_ends_at_its_own_end_token_and_is_padded_behind_it():
    stop = stop_rules([[5, EOS, 6, 7, 8, 9, 10, 11], [5, 6, 7, 8, EOS, 9, EOS, 11]], [EosTokenCriteria(EOS)])
    assert stop.update(0).tolist() == [5, EOS]
    assert stop.finished.tolist() == [True, False]
    assert stop.update(4).tolist() == []
    assert stop.all_finished
    assert stop.new_tokens().tolist() == [[5, EOS, PAD, PAD, PAD], [5, 6, 7, 8, EOS]]
    assert stop.buffer.token_ids[0, 3:].eq(PAD).all()


def test_a_row_ends_at_its_length_whatever_the_length_criterion_says():
    stop = stop_rules([[5, 6, 7, 8, 9, 10, 11]], [MaxLengthCriteria(max_length=3)], new_tokens=5)
    assert stop.update(0).tolist() == [5, 6, 7]
    assert not stop.all_finished
    assert stop.update(4).tolist() == [8, 9]
    assert stop.all_finished


def test_when_time_is_up_the_block_that_is_written_counts():
    stop = stop_rules([[5, 6, 7, 8, 9, 10]], [MaxTimeCriteria(0.0, initial_timestamp=time.time() - 1)])
    assert stop.update(0).tolist() == [5, 6, 7]
    assert stop.all_finished


def test_a_criterion_sees_each_text_token_by_token():
    class Witness(StoppingCriteria):
        seen: list[list[int]] = []

        def __call__(self, input_ids, scores, **kwargs):
            self.seen.append(input_ids[0].tolist())
            return torch.zeros(len(input_ids), dtype=torch.bool)

    stop = stop_rules([[5, 6, 7, 8, 9, 10]], [Witness()], new_tokens=4)
    stop.update(0)
    stop.update(4)
    assert Witness.seen == [[9, 5], [9, 5, 6], [9, 5, 6, 7], [9, 5, 6, 7, 8]]


def test_the_end_token_pads_where_no_padding_token_is_known():
    stop = stop_rules([[EOS, 6, 7], [5, 6, EOS]], [EosTokenCriteria(EOS)], pad_token_id=None, eos_token_id=[EOS, 3])
    stop.update(0)
    assert stop.new_tokens().tolist() == [[EOS, EOS, EOS], [5, 6, EOS]]


def test_rows_that_may_stop_apart_need_a_padding_token():
    with pytest.raises(ValueError, match="no token to pad them with: set pad_token_id"):
        stop_rules([[5], [6]], [EosTokenCriteria(EOS)], pad_token_id=None)


def test_rows_of_one_length_need_no_padding_token():
    stop = stop_rules([[5, 6, 7], [6, 7, 8]], [MaxLengthCriteria(9)], new_tokens=2, pad_token_id=None)
    stop.update(0)
    assert stop.new_tokens().tolist() == [[5, 6], [6, 7]]


@pytest.mark.parametrize("new_tokens", [1, 3, 4, 5, 9])
@pytest.mark.parametrize("stride", [1, 2, 3, 4])
def test_overlapping_blocks_write_every_column_once(stride, new_tokens):
    prompts = torch.tensor([[9, 9, 9, 9], [2, 9, 9, 9]])
    canvas = SequenceBuffer.from_prompts(prompts, (prompts != 2).long(), new_tokens, 4, MASK, stride)
    times = torch.zeros(canvas.token_ids.shape, dtype=torch.long)
    for begin in canvas.blocks():
        times[:, begin : begin + 4] += canvas.new_positions(begin)
    for row in range(2):
        end = int(canvas.prompt_end_cpu[row])
        assert not times[row, :end].any() and (times[row, end : end + new_tokens] == 1).all()
        alone = SequenceBuffer.from_prompts(prompts[row : row + 1, row:], None, new_tokens, 4, MASK, stride)
        assert canvas.first_block - int(canvas.row_start[row]) == alone.first_block
