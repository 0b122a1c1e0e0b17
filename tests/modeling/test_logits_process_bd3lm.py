"""Logits processors over many positions: the nucleus, and contexts that fit."""

import pytest
import torch
from transformers.generation import (
    LogitsProcessor,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from bd3lm_hf.modeling.decoding_state_bd3lm import SequenceBuffer
from bd3lm_hf.modeling.logits_process_bd3lm import NucleusLogitsProcessor, PositionProcessors


RECORDED = "07_samplers"
EXAMPLE = torch.tensor([[0.5, 0.3, 0.15, 0.05]])


def kept(scores: torch.Tensor) -> set[int]:
    return set((scores[0] > -torch.inf).nonzero().flatten().tolist())


@pytest.mark.parametrize("p", [0.9, 0.5])
def test_the_nucleus_is_the_published_one(recorded, p):
    logits, ids, expected = recorded["nucleus.logits"], recorded["nucleus.x"], recorded[f"nucleus.filtered_{p}"]
    scores = logits.flatten(0, 1).clone()
    scores[:, 96] = -torch.inf  # the mask token has probability zero
    probabilities = NucleusLogitsProcessor(p)(None, scores).softmax(-1).view_as(logits)
    for row, column in (ids == 96).nonzero().tolist():
        if (row, column) == (1, 1):
            # A flat position: which of the equal values are kept depends on how they are sorted.
            assert (probabilities[row, column] > 0).sum() == (expected[row, column] > 0).sum()
        else:
            torch.testing.assert_close(probabilities[row, column], expected[row, column], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("p", "ours", "theirs"), [(0.9, {0, 1}, {0, 1, 2}), (0.7, {0}, {0, 1}), (0.01, {0}, {0})])
def test_the_nucleus_drops_the_token_that_crosses_p_and_top_p_keeps_it(p, ours, theirs):
    assert kept(NucleusLogitsProcessor(p)(None, EXAMPLE.log())) == ours
    assert kept(TopPLogitsWarper(p)(None, EXAMPLE.log())) == theirs


def test_a_flat_distribution_keeps_as_many_tokens_as_p_allows():
    scores = torch.zeros(1, 8)
    assert [len(kept(NucleusLogitsProcessor(p)(None, scores))) for p in (0.1, 0.126, 0.5, 0.99)] == [1, 1, 4, 7]
    assert kept(NucleusLogitsProcessor(0.5)(None, torch.tensor([[1.0] + [-torch.inf] * 7]))) == {0}


# --- Many positions at once -----------------------------------------------------------------------------------------


class Recorder(LogitsProcessor):
    """Record the arguments, and add the width of the context to all scores."""

    def __init__(self, reads_text: bool = True) -> None:
        self.reads_text = reads_text
        self.seen: list[tuple[list[list[int]], torch.Size]] = []

    def __call__(self, input_ids, scores):
        self.seen.append((input_ids.tolist(), scores.shape))
        return scores + input_ids.shape[1]


def processors_of(*processors) -> PositionProcessors:
    """Return processors for two rows: a prompt of 2 and new tokens 10, 11, ..., and a prompt of 5 and 20, 21, ..."""
    prompt = torch.tensor([[2, 2, 2, 8, 9], [3, 4, 5, 6, 7]])
    buffer = SequenceBuffer.from_prompts(prompt, (prompt != 2).long(), 4, 4, 47)
    buffer.token_ids[0, 6:], buffer.token_ids[1, 5:] = torch.arange(10, 16), torch.arange(20, 27)
    return PositionProcessors(LogitsProcessorList(processors), buffer, prompt)


def test_a_reader_is_called_once_per_column_with_whole_rows():
    recorder = Recorder()
    scores = processors_of(recorder)(torch.zeros(3, 6), torch.tensor([0, 1, 1]), torch.tensor([2, 0, 2]))
    assert recorder.seen == [
        ([[2, 2, 2, 8, 9], [3, 4, 5, 6, 7]], (2, 6)),
        ([[2, 2, 2, 8, 9, 10, 11], [3, 4, 5, 6, 7, 20, 21]], (2, 6)),
    ]
    assert scores.tolist() == [[7.0] * 6, [5.0] * 6, [7.0] * 6]


def test_a_processor_that_reads_the_length_gets_that_of_each_position():
    process = processors_of(MinLengthLogitsProcessor(7, 1, device="cpu"))
    scores = process(torch.zeros(3, 6), torch.tensor([0, 1, 1]), torch.tensor([1, 0, 2]))
    assert scores[:, 1].isneginf().tolist() == [True, True, False]


@pytest.mark.parametrize(
    ("processor", "reading", "forbidding"),
    [
        (TemperatureLogitsWarper(0.7), False, False),
        (NucleusLogitsProcessor(0.9), False, False),
        (SuppressTokensLogitsProcessor([5], device="cpu"), False, True),
        (MinLengthLogitsProcessor(7, 1, device="cpu"), False, True),
        (RepetitionPenaltyLogitsProcessor(1.2), True, True),
        (Recorder(), True, True),
        (Recorder(reads_text=False), False, True),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_unknown_processor_is_assumed_to_read_the_text(processor, reading, forbidding):
    processors = processors_of(processor)
    assert (bool(processors.text_readers), processors.can_forbid_all) == (reading, forbidding)
