"""The state of a batch: rows aligned by blocks, each ended by its own stop rule, the published ones included."""

import json
import math
from pathlib import Path

import pytest
import torch
from published import published_length
from shared_models import tiny_bd3lm
from transformers.generation import StoppingCriteria, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from bd3lm_hf.modeling.decoding_state_bd3lm import (
    BlockCriteria,
    EntropyStopCriteria,
    SecondEosCriteria,
    SequenceBuffer,
    StopRules,
    token_entropy,
)
from bd3lm_hf.modeling.generation_config_bd3lm import BD3LMGenerationConfig


RECORDED = "07_samplers"
GOLDEN = Path(__file__).parents[1] / "golden" / "07_samplers"
CASES = json.loads((GOLDEN / "config.json").read_text())["stop_cases"]
GOLDEN_EOS = 95
EOS, PAD, MASK = 1, 2, 47
IDS = torch.tensor([[2, 2, 2, 2, 2, 9], [3, 4, 5, 6, 7, 8]])
REAL = torch.tensor([[0, 0, 0, 0, 0, 1], [1, 1, 1, 1, 1, 1]])


def test_blocks_of_all_rows_end_at_the_same_columns():
    buffer = SequenceBuffer.from_prompts(IDS, REAL, 4, 4, MASK)
    assert buffer.token_ids.tolist() == [[MASK] * 4 + [9] + [MASK] * 7, [3, 4, 5, 6, 7, 8] + [MASK] * 6]
    assert buffer.row_start.tolist() == [4, 0]
    assert buffer.position_ids(0, 12).tolist() == [[0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7], list(range(12))]
    assert buffer.position_ids(5, 7).tolist() == [[1, 2], [5, 6]]
    assert buffer.key_valid.tolist() == [[False] * 4 + [True] * 8, [True] * 12]
    assert list(buffer.blocks()) == [4, 8]


def test_rows_with_equally_many_whole_blocks_need_no_mask():
    buffer = SequenceBuffer.from_prompts(IDS[:, 1:], torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]), 3, 4, MASK)
    assert buffer.key_valid is None
    assert buffer.position_ids(0, 8).tolist() == [list(range(8))]


@pytest.mark.parametrize("new_tokens", [1, 2, 3, 4, 5])
def test_the_buffer_ends_with_the_block_of_the_last_token(new_tokens):
    buffer = SequenceBuffer.from_prompts(IDS[1:], None, new_tokens, 4, MASK)
    assert buffer.token_ids.shape[1] == (8 if new_tokens <= 2 else 12)


def stop_rules(text: list[list[int]], criteria: list, new_tokens: int = 8, **config) -> StopRules:
    """Return rules for rows whose prompt is one token, in blocks of 4 that are all filled."""
    rows = torch.tensor(text)
    buffer = SequenceBuffer.from_prompts(torch.full((len(rows), 1), 9), None, new_tokens, 4, MASK)
    buffer.token_ids[:, 1 : 1 + rows.shape[1]] = rows
    config = BD3LMGenerationConfig(**{"pad_token_id": PAD, **config})
    return StopRules(StoppingCriteriaList(criteria), buffer.token_ids[:, :1], buffer, config)


def test_each_row_ends_at_its_own_end_token_and_is_padded_after_it():
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


def test_a_block_criterion_sees_the_new_tokens_of_every_row_and_ends_them_all():
    class Witness(BlockCriteria):
        seen: list = []

        def end_block(self, new_tokens, finished):
            self.seen.append((new_tokens, finished))
            return len(self.seen) == 2

    criteria = [EosTokenCriteria(EOS), Witness()]
    stop = stop_rules([[5, EOS, 6, 7, 8, 9, 10], [5, 6, 7, 8, 9, 10, 11]], criteria)
    stop.update(0)
    assert not stop.all_finished
    stop.update(4)
    assert Witness.seen == [([[5, EOS], [5, 6, 7]], [True, False]), ([[], [8, 9, 10, 11]], [True, False])]
    assert stop.all_finished and stop.new_tokens()[1].tolist() == [5, 6, 7, 8, 9, 10, 11]


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


def test_only_rows_that_can_end_at_different_lengths_need_a_padding_token():
    with pytest.raises(ValueError, match="set pad_token_id"):
        stop_rules([[5], [6]], [EosTokenCriteria(EOS)], pad_token_id=None)
    stop = stop_rules([[5, 6, 7], [6, 7, 8]], [MaxLengthCriteria(9)], new_tokens=2, pad_token_id=None)
    stop.update(0)
    assert stop.new_tokens().tolist() == [[5, 6], [6, 7]]


@pytest.mark.parametrize("new_tokens", [1, 3, 4, 5, 9])
@pytest.mark.parametrize("stride", [1, 2, 3, 4])
def test_overlapping_blocks_fill_every_column_once(stride, new_tokens):
    prompts = torch.tensor([[9, 9, 9, 9], [2, 9, 9, 9]])
    buffer = SequenceBuffer.from_prompts(prompts, (prompts != 2).long(), new_tokens, 4, MASK, stride)
    times = torch.zeros(buffer.token_ids.shape, dtype=torch.long)
    for begin in buffer.blocks():
        times[:, begin : begin + 4] += buffer.new_positions(begin)
    for row in range(2):
        end = int(buffer.prompt_end_cpu[row])
        assert not times[row, :end].any() and (times[row, end : end + new_tokens] == 1).all()
        alone = SequenceBuffer.from_prompts(prompts[row : row + 1, row:], None, new_tokens, 4, MASK, stride)
        assert buffer.first_block - int(buffer.row_start[row]) == alone.first_block


# --- The published cases ---------------------------------------------------------------------------------------------

SINGLE = [case for case in CASES if "batch" not in case["what"]]
LONG = [case for case in SINGLE if "shorter" not in case["what"]]


@pytest.mark.parametrize("case", LONG, ids=lambda case: case["what"])
def test_a_single_text_stops_where_the_published_one_does(recorded, case):
    name, var_length = f"stop.{case['case']}", case["var_length"]
    ids = recorded[f"{name}.in"].long()
    criteria = [EntropyStopCriteria(4.0)] + [SecondEosCriteria(GOLDEN_EOS)] * var_length
    assert StoppingCriteriaList(criteria)(ids, None).tolist() == [bool(recorded[f"{name}.stop"])]
    torch.testing.assert_close(token_entropy(ids[:, -256:])[0].float(), recorded[f"{name}.entropy"], atol=1e-5, rtol=0)
    if var_length:  # otherwise the published sampler discards the text instead of truncating it
        kept = published_length(ids, eos_token_id=GOLDEN_EOS)
        assert kept.tolist() == [int(recorded[f"{name}.out_len"])]


def test_a_text_shorter_than_the_window_is_not_scored(recorded):
    # In the published code its negative length counts from the end, but the sampler never checks so early.
    ids = recorded["stop.10.in"].long()
    assert EntropyStopCriteria(4.0)(ids, None).tolist() == [False]
    assert published_length(ids).tolist() == [200]
    assert EntropyStopCriteria(4.0)(ids.repeat(1, 2)[:, :256], None).tolist() == [False]
    assert EntropyStopCriteria(4.0)(ids.repeat(1, 2)[:, :257], None).tolist() == [True]


def test_rows_of_a_batch_are_scored_one_by_one(recorded):
    # In the published code the end tokens of all rows count together, and so do the frequencies.
    ends = recorded["stop.11.in"].long()
    assert bool(recorded["stop.11.stop"])
    assert SecondEosCriteria(GOLDEN_EOS)(ends, None).tolist() == [False, False]
    repetitive = recorded["stop.12.in"].long()
    assert EntropyStopCriteria(4.0)(repetitive, None).tolist() == [True, False]


# --- Each rule -------------------------------------------------------------------------------------------------------


def test_the_entropy_of_a_text_is_that_of_its_frequencies():
    ids = torch.tensor([[3, 3, 3, 3], [3, 4, 3, 4], [3, 4, 5, 6], [9, 3, 9, 9]])
    quarter = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    expected = torch.tensor([0.0, math.log(2), math.log(4), quarter], dtype=torch.float64)
    torch.testing.assert_close(token_entropy(ids), expected)


def test_padding_is_not_text_and_any_of_several_end_tokens_counts():
    ids = torch.tensor([[PAD, PAD, 5, 5, 5], [PAD, 5, 5, 5, 5]])
    padding = ids == PAD
    assert EntropyStopCriteria(0.5, window=3)(ids, None, padding=padding).tolist() == [False, True]
    ends = torch.tensor([[EOS, EOS, 5, EOS, 6], [5, EOS, 5, 5, EOS]])
    assert SecondEosCriteria(EOS)(ends, None).tolist() == [True, True]
    padding = torch.tensor([[1, 1, 0, 0, 0], [0] * 5]).bool()
    assert SecondEosCriteria(EOS)(ends, None, padding=padding).tolist() == [False, True]
    several = SecondEosCriteria([EOS, 7])
    assert several(torch.tensor([[EOS, 5, 7], [7, 5, 6]]), None).tolist() == [True, False]


# --- In generate -----------------------------------------------------------------------------------------------------


def writer_of(token: int, weight: float, eos_token_id: int | None = None):
    """Return a model that generates a token most of the time."""
    model = tiny_bd3lm(eos_token_id=eos_token_id)
    with torch.no_grad():
        model.get_output_embeddings().bias[token] = weight
    return model


def texts(model, ids, **arguments) -> list[list[int]]:
    """Return the new tokens of each row, without padding."""
    arguments = {"do_sample": True, "generator": torch.Generator().manual_seed(0), "max_new_tokens": 24, **arguments}
    output = model.generate(ids, attention_mask=(ids != PAD).long(), **arguments)[:, ids.shape[1] :]
    return [[token for token in row if token != PAD] for row in output.tolist()]


@pytest.mark.parametrize("by_hand", [False, True])
def test_a_degenerate_row_ends_and_the_others_continue(by_hand):
    model = writer_of(5, 30.0)
    diverse = [9, 10, 11, 12, 13, 14, 15, 16]
    ids = torch.tensor([[PAD] * 7 + [9], [PAD] * 3 + [5] * 5, diverse])
    own = {"stopping_criteria": [EntropyStopCriteria(0.6, window=8)]}
    stop = own if by_hand else {"entropy_stop": 0.6, "entropy_stop_window": 8}
    # One different token among eight: 0.38 nats; two: 0.97. A row is checked once it has nine.
    assert [len(row) for row in texts(model, ids, **stop)] == [8, 4, 7]
    assert [len(row) for row in texts(model, ids)] == [24] * 3


@pytest.mark.parametrize("by_hand", [False, True])
def test_a_row_ends_with_its_second_end_token(by_hand):
    model = writer_of(EOS, 3.0, eos_token_id=None if by_hand else EOS)
    ids = torch.tensor([[PAD, PAD, 9, 10], [5, EOS, 7, 8], [5, 6, 7, 8]])
    stop = {"stopping_criteria": [SecondEosCriteria(EOS)]} if by_hand else {"stop_at_second_eos": True}
    plain = texts(model, ids, eos_token_id=None)
    for row, (new, whole) in enumerate(zip(texts(model, ids, **stop), plain, strict=True)):
        needed = 1 if row == 1 else 2
        ends = [position + 1 for position, token in enumerate(whole) if token == EOS]
        assert len(ends) > needed
        assert new == whole[: ends[needed - 1]]


def test_the_second_end_token_needs_one():
    with pytest.raises(ValueError, match="stop_at_second_eos=True needs an end token: set eos_token_id"):
        tiny_bd3lm(eos_token_id=None).generate(torch.tensor([[5]]), max_new_tokens=4, stop_at_second_eos=True)
