"""Tokens are chosen exactly: samples have the model's distribution, processors see their own text."""

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation import RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper
from writing import MASK, batch_of, new_tokens, prompts_of, write

from bd3lm_hf.modeling.decoding_bd3lm import BlockWriter
from bd3lm_hf.modeling.decoding_state_bd3lm import SequenceBuffer
from bd3lm_hf.modeling.generation_config_bd3lm import BD3LMGenerationConfig


class Witness(LogitsProcessor):
    """Remembers the contexts it was shown, and leaves the scores alone."""

    def __init__(self) -> None:
        self.contexts: list[torch.Tensor] = []

    def __call__(self, input_ids, scores):
        self.contexts.append(input_ids.clone())
        return scores


def test_a_processor_that_reads_the_text_sees_all_of_it(make_model):
    model, witness = make_model(block_size=8), Witness()
    prompt = prompts_of([6])[0][None]
    output = write(model, input_ids=prompt, do_sample=True, logits_processor=[witness])
    assert [context.shape[1] for context in witness.contexts] == list(range(6, 17))
    assert all(torch.equal(context, output.sequences[:, : context.shape[1]]) for context in witness.contexts)


@pytest.mark.parametrize(
    ("processor", "in_order"), [(TemperatureLogitsWarper(0.7), False), (RepetitionPenaltyLogitsProcessor(1.1), True)]
)
def test_only_processors_that_read_the_text_fix_the_order(make_model, processor, in_order):
    model, canvas = make_model(), SequenceBuffer.from_prompts(torch.ones(1, 4, dtype=torch.long), None, 4, 4, MASK)
    config = BD3LMGenerationConfig(do_sample=True)
    writer = BlockWriter(model, canvas, canvas.token_ids[:, :4], LogitsProcessorList([processor]), config)
    assert writer.left_to_right is in_order


def test_rows_at_different_places_are_processed_at_their_own(make_model):
    class ByLength(LogitsProcessor):
        """Forces the token that says how long the text is so far."""

        def __call__(self, input_ids, scores):
            return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([input_ids.shape[1]]), 0.0)

    output = write(make_model(), **batch_of(prompts_of([1, 6, 8, 11]), "left"), logits_processor=[ByLength()])
    assert new_tokens(output).tolist() == [list(range(11, 22))] * 4


def test_constraints_that_leave_no_token_are_an_error(make_model):
    with pytest.raises(ValueError, match="forbid every token.*loosen the constraints"):
        write(make_model(), input_ids=prompts_of([4])[0][None], prefix_allowed_tokens_fn=lambda row, ids: [MASK])
