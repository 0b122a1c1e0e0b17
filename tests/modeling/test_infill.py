"""Mask tokens anywhere in a text are filled in place, block by block, each block jointly."""

import pytest
import torch
from generating import MASK, PAD, batch_of, make_family
from transformers import LogitsProcessor

from bd3lm_hf.modeling.modeling_bd3lm import BD3LMForMaskedLM
from bd3lm_hf.modeling.samplers_bd3lm import SAMPLERS


M = MASK
NO_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
TEXTS = [  # blocks of 4: gaps inside, at either end, over a border, over a whole block; one text without any
    [5, M, 7, 8, 9, 10, M, 12, 13],
    [M, 6, 7, M, M, 10, 11, 12, M, M],
    [3, 4, 5, 6, M, M, M, M, 9, 10, 11],
    [9, 8, 7],
    [M],
    [M] * 12,
]
TENSORS = [torch.tensor(text) for text in TEXTS]


@pytest.fixture(scope="module")
def model() -> BD3LMForMaskedLM:
    return make_family("bd3lm", model_length=32)


def filled_by_hand(model, text: list[int]) -> list[int]:
    """Fill from left to right, one greedy token per forward pass over the text up to the end of its block."""
    text, size = list(text), model.config.block_size
    for position in range(len(text)):
        if text[position] == MASK:
            seen = torch.tensor([text[: position // size * size + size]])
            logits = model(seen).logits[0, position]
            logits[[MASK, PAD]] = -torch.inf
            text[position] = int(logits.argmax())
    return text


@pytest.mark.parametrize("block_size", [1, 4, 8])
@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str)
@torch.no_grad()
def test_a_text_is_filled_as_by_hand(block_size, options):
    model = make_family("bd3lm", model_length=32, block_size=block_size)
    for text in TEXTS:
        filled = model.infill(torch.tensor([text]), **options)
        assert filled.tolist() == [filled_by_hand(model, text)]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("family", "options"), [*(("bd3lm", {"sampler": sampler}) for sampler in SAMPLERS), ("mdlm", {}), ("sedd", {})]
)
def test_a_row_of_a_batch_is_filled_as_if_alone(family, options, side):
    model, batch = make_family(family, model_length=12), batch_of(TENSORS, side)
    filled = model.infill(**batch, **options)
    assert filled.shape == batch["input_ids"].shape
    for row, real, text in zip(filled, batch["attention_mask"].bool(), TEXTS, strict=True):
        assert torch.equal(row[real], model.infill(torch.tensor([text]), **options)[0])
        assert (row[~real] == PAD).all() and not (row == MASK).any()


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("remask", [0.0, 0.7])
def test_given_tokens_stay_and_every_gap_is_filled(model, sampler, remask):
    batch = batch_of(TENSORS, "left")
    filled = model.infill(**batch, sampler=sampler, remask_fraction=remask, do_sample=True)
    given = batch["input_ids"] != MASK
    assert torch.equal(filled[given], batch["input_ids"][given])
    assert not torch.isin(filled[~given], torch.tensor([MASK, PAD])).any()


def test_blocks_without_a_gap_cost_no_pass(model):
    text = [5, 6, 7, 8, 9, M, M, 12, 13, 14, 15, 16, M, 18, 19, 20, 21]
    output = model.infill(torch.tensor([text]), return_dict_in_generate=True)
    assert output.num_forward_passes == 3 and output.tokens_per_forward == 1.0
    nothing = model.infill(torch.tensor([[5, 6, 7]]), return_dict_in_generate=True)
    assert nothing.num_forward_passes == 0 and nothing.sequences.tolist() == [[5, 6, 7]]


def test_padding_is_inferred_where_no_mask_is_given_and_a_text_may_fill_the_window(model):
    batch = batch_of(TENSORS, "left")
    assert torch.equal(model.infill(batch["input_ids"]), model.infill(**batch))
    ids = torch.full((2, 32), 5)
    ids[:, ::3] = MASK
    assert not (model.infill(ids) == MASK).any()


def test_processors_read_each_text_from_its_first_token(model):
    class Witness(LogitsProcessor):
        contexts: list[list[list[int]]] = []

        def __call__(self, input_ids, scores):
            self.contexts.append(input_ids.tolist())
            return scores

    batch = batch_of([torch.tensor([5, 6, M, 7, M]), torch.tensor([8, M])])
    filled = model.infill(**batch, logits_processor=[Witness()]).tolist()
    assert [len(context[0]) for context in Witness.contexts] == [2, 1, 4]
    assert Witness.contexts[0][0] == filled[0][:2]
    assert Witness.contexts[1][1] == filled[1][-2:-1]
    assert Witness.contexts[2][0] == filled[0][:4]


def test_a_trace_shows_the_gaps_only(model):
    batch = batch_of(TENSORS, "left")
    output = model.infill(**batch, return_dict_in_generate=True, output_trace=True)
    assert len(output.trace) == output.num_forward_passes
    seen = torch.zeros_like(batch["input_ids"])
    for step in output.trace:
        for row, position in step.revealed.nonzero().tolist():
            column = int(step.columns[row, position])
            assert output.sequences[row, column] == step.tokens[row, position]
            seen[row, column] += 1
    assert torch.equal(seen, (batch["input_ids"] == MASK).long())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 3}, "infill does not take max_new_tokens: it replaces mask tokens"),
        ({"num_beams": 2, "stop_strings": ["a"]}, "infill does not take num_beams, stop_strings"),
        ({"output_scores": True}, "does not take output_scores"),
        ({"labels": torch.ones(1, 3)}, "does not take labels"),
        ({"samplr": "confidence"}, "samplr"),
        ({"sampler": "magic"}, "sampler='magic' is unknown"),
        ({"attention_mask": torch.ones(1, 2)}, r"attention_mask of shape \(1, 2\) does not fit"),
        ({"attention_mask": torch.zeros(1, 3)}, "empty prompt"),
        ({"attention_mask": [[1, 1, 1]]}, "attention_mask is a list"),
        ({"input_ids": torch.tensor([5, M])}, r"input_ids of shape \(2,\): pass texts of shape \(batch, length\)"),
        ({"input_ids": torch.tensor([[5, 48, M]])}, "contains the id 48, outside the vocabulary"),
        ({"input_ids": torch.full((1, 33), M)}, "the prompt has 33 tokens, more than the model's window"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_texts_that_cannot_be_filled_are_refused(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.infill(**{"input_ids": torch.tensor([[5, M, 7]]), **arguments})
