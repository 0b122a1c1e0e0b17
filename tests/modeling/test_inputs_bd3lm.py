"""The arguments that callers and collators pass to forward, loss and token_nll."""

import functools
import math

import pytest
import torch
from decoders import tiny_decoder
from generating import FAMILIES, make_family
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from shared_models import tiny_ssdlm
from transformers import DataCollatorWithFlattening


DOCUMENTS = [[0, 5, 6, 7, 8], [0, 9, 10], [0, 11, 12, 13, 14, 15, 16]]


def model_of(family: str):
    return make_family(family, model_length=32).float()


def apart() -> tuple[torch.Tensor, torch.Tensor]:
    """Return the documents as separate rows, and their mask."""
    width = max(map(len, DOCUMENTS))
    ids = torch.tensor([document + [2] * (width - len(document)) for document in DOCUMENTS])
    return ids, torch.tensor([[1] * len(d) + [0] * (width - len(d)) for d in DOCUMENTS])


@pytest.fixture
def packed():
    return DataCollatorWithFlattening()([{"input_ids": document} for document in DOCUMENTS])


def options_of(family: str, rows: int) -> dict:
    return {"timesteps": torch.full((rows,), 0.5)} if family == "sedd" else {}


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_are_read_and_scored_as_if_alone(family, packed):
    model, (ids, mask) = model_of(family), apart()
    inputs = {"input_ids": packed["input_ids"], "position_ids": packed["position_ids"]}
    with torch.no_grad():
        together = model(**inputs, **options_of(family, 1)).logits[0]
        rows = model(ids, mask, **options_of(family, 3)).logits
        torch.testing.assert_close(together, rows[mask.bool()], rtol=0, atol=1e-5)
        # Positions that a row has anyway change nothing.
        given = {**options_of(family, 3), "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        assert torch.equal(model(ids, mask, **given).logits, rows)
    together = model.token_nll(**inputs, generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(mask == 0, -100)
    rows = model.token_nll(ids, mask, generator=torch.Generator().manual_seed(0), labels=labels)
    torch.testing.assert_close(together.nll[0], rows.nll[mask.bool()])
    assert torch.equal(together.mask[0], rows.mask[mask.bool()])


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_of_a_padding_free_batch_is_that_of_its_documents(family, mode, packed):
    model, (ids, mask) = getattr(model_of(family), mode)(), apart()
    if family in ("bd3lm", "mdlm"):
        model.train().set_interval(1.0, 1.0)  # every token is masked, whatever the noise
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, 0] = -100  # as the collator separates documents
    losses = []
    for batch in (packed, {"input_ids": ids, "attention_mask": mask, "labels": labels}):
        torch.manual_seed(0)
        losses.append(model(**batch).loss)
    torch.testing.assert_close(*losses)


# --- Arguments that nobody reads -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*FAMILIES, "ssdlm"])
@pytest.mark.parametrize("part", ["head", "backbone"])
def test_an_unknown_argument_is_refused_with_the_known_ones(family, part):
    model, ids = (tiny_ssdlm() if family == "ssdlm" else model_of(family)), torch.arange(3, 11).unsqueeze(0)
    called = model if part == "head" or family == "ssdlm" else model.backbone
    with pytest.raises(ValueError, match="'attn_mask': it takes input_ids, attention_mask"):
        called(ids, attn_mask=torch.ones_like(ids))


@pytest.mark.parametrize("shape", [(1, 8), (2, 7), (2, 9), (2, 1, 8), (2, 1, 8, 8), (8,)])
@pytest.mark.parametrize("family", [*FAMILIES, "ssdlm"])
def test_a_mask_of_another_shape_is_refused(family, shape):
    model, ids = (tiny_ssdlm() if family == "ssdlm" else model_of(family)), torch.arange(3, 19).view(2, 8)
    mask = torch.ones(shape, dtype=torch.long)
    calls = [lambda: model(ids, mask, labels=ids)]
    if len(shape) == 2:  # transformers refuses others
        calls.append(lambda: model.generate(ids, attention_mask=mask, max_new_tokens=2))
    if family != "ssdlm":
        calls += [lambda: model(ids, mask, **options_of(family, 2)), lambda: model.token_nll(ids, mask)]
    for call in calls:
        with pytest.raises(ValueError, match=rf"attention_mask of shape \({shape[0]},"):
            call()


@pytest.mark.parametrize("name", ["clean_input_ids", "timesteps", "inputs_embeds", "past_key_values"])
def test_the_loss_refuses_what_it_would_ignore(name):
    ids = torch.arange(3, 11).unsqueeze(0)
    with pytest.raises(ValueError, match=name):
        model_of("bd3lm")(ids, labels=ids, **{name: ids})
    with pytest.raises(ValueError, match="labels need input_ids"):
        model_of("bd3lm")(labels=ids, **{name: ids})


@pytest.mark.parametrize(
    "method",
    [PromptTuningConfig, PrefixTuningConfig, lambda **common: PromptEncoderConfig(encoder_hidden_size=8, **common)],
)
@pytest.mark.parametrize("family", ["bd3lm", "ar"])
def test_prompt_methods_are_refused_by_name(family, method):
    sizes = {"token_dim": 32, "num_transformer_submodules": 1, "num_layers": 2, "num_attention_heads": 2}
    with pytest.raises(ValueError, match="LoRA"):
        get_peft_model(model_of(family), method(task_type="CAUSAL_LM", num_virtual_tokens=4, **sizes))


@pytest.mark.parametrize("family", ["bd3lm", "llama"])
def test_masks_that_number_documents_and_positions_that_do_not_fit_are_refused(make_model, family):
    model = make_model() if family == "bd3lm" else tiny_decoder("llama")
    ids = torch.arange(3, 11).expand(2, -1)
    numbered = torch.tensor([[1, 1, 1, 1, 2, 2, 2, 2]] * 2)
    for call in (model, model.token_nll, lambda ids, **given: model.generate(ids, max_new_tokens=2, **given)):
        with pytest.raises(ValueError, match="attention_mask contains 2.*position_ids"):
            call(ids, attention_mask=numbered)
    padded = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]] * 2)
    for position_ids, mask in (
        (torch.arange(3, 11)[None], None),
        (torch.arange(-1, 7)[None], None),
        (torch.arange(8)[None], padded),
        (torch.arange(8), None),
        (torch.arange(8).expand(3, 2, 8), None),
    ):
        for call in (model, functools.partial(model, labels=ids), model.token_nll):
            with pytest.raises(ValueError, match="position_ids"):
                call(ids, attention_mask=mask, position_ids=position_ids)
    packed, generators = torch.arange(8)[None] % 4, [torch.Generator() for _ in ids]
    with pytest.raises(ValueError, match=f"list of {len(ids)}, and position_ids"):
        model.token_nll(ids, position_ids=packed, generator=generators)
    with pytest.raises(ValueError, match="generation does not take position_ids"):
        model.generate(ids, position_ids=torch.arange(8)[None], max_new_tokens=2)
    with pytest.raises(ValueError, match="bd3lm train"):
        model.loss_function(logits=model(ids).logits, labels=ids, vocab_size=48)


TEXT = torch.arange(5, 13)[None].repeat(2, 1)


def model_of_any(family: str):
    return tiny_ssdlm() if family == "ssdlm" else tiny_decoder(family) if family == "llama" else model_of(family)


@pytest.mark.parametrize(
    ("ids", "labels", "message"),
    [
        (TEXT.float(), TEXT, "input_ids of dtype torch.float32.*long"),
        (TEXT, TEXT.float(), "labels of dtype torch.float32.*long"),
        (TEXT.tolist(), TEXT, "input_ids is a list.*return_tensors"),
        (TEXT.numpy(), None, "input_ids is a ndarray.*return_tensors"),
        ({"input_ids": TEXT}, None, "input_ids is a dict.*batch"),
        (TEXT[0], TEXT[0], r"input_ids of shape \(8,\).*unsqueeze"),
        (TEXT[:0], TEXT[:0], r"input_ids of shape \(0, 8\)"),
    ],
)
@pytest.mark.parametrize("family", [*FAMILIES, "ssdlm", "llama"])
def test_inputs_that_are_not_a_batch_of_tokens_are_refused(family, ids, labels, message):
    model = model_of_any(family)
    if labels is not None:
        with pytest.raises(ValueError, match=message):
            model(ids, labels=labels)
    if message.startswith("input_ids"):
        verbs = ("generate",) if family == "ssdlm" else ("forward", "token_nll", "generate")
        for verb in verbs:
            with pytest.raises(ValueError, match=message):
                getattr(model, verb)(ids)


@pytest.mark.parametrize("family", [*FAMILIES, "ssdlm", "llama"])
def test_32_bit_ids_give_the_results_of_64_bit_ids(family):
    model = model_of_any(family).eval()  # without dropout
    noise = {} if family == "ar" else {"block_noise": torch.full((2, model.config.num_blocks(8)), 0.7)}
    noise |= {"count_noise": torch.full((2, 2), 0.5)} if family == "ssdlm" else {}
    noise |= {"token_noise": torch.full((2, 8), 0.3)} if noise and family != "ssdlm" else {}
    losses = [model(ids, labels=ids, **noise).loss for ids in (TEXT, TEXT.int())]
    assert torch.equal(*losses)
    source = torch.Generator()
    if family != "ssdlm":
        scores = [model.token_nll(ids, generator=source.manual_seed(0)).nll for ids in (TEXT, TEXT.int())]
        assert torch.equal(*scores)
    written = [model.generate(ids, max_new_tokens=3, generator=source.manual_seed(0)) for ids in (TEXT, TEXT.int())]
    assert torch.equal(*written) and written[1].dtype == torch.int64


@pytest.mark.parametrize(("value", "message"), [(0.5, "0.5:"), (math.nan, "nan:"), (-1e4, "-10000:")])
def test_a_mask_with_other_values_than_0_and_1_is_refused(value, message):
    with pytest.raises(ValueError, match=f"attention_mask contains {message}"):
        model_of("bd3lm")(TEXT, attention_mask=torch.full((2, 8), value))


@pytest.mark.parametrize(
    ("family", "size"),
    [("bd3lm", 5), ("bd3lm", 0), ("bd3lm", 4.0), ("ar", 2), ("mdlm", 16), ("sedd", 8), ("ssdlm", 32), ("llama", 5)],
)
def test_a_block_size_that_is_changed_later_is_checked_on_use(family, size):
    model = model_of_any(family)
    model.config.block_size = size
    calls = [lambda: model(TEXT, labels=TEXT), lambda: model(TEXT), lambda: model.generate(TEXT, max_new_tokens=2)]
    for call in [*calls, lambda: model.token_nll(TEXT)] if family != "ssdlm" else calls:
        with pytest.raises(ValueError, match=f"block_size={size}"):
            call()


@pytest.mark.parametrize("value", [lambda **_: None, torch.nn.CrossEntropyLoss()])
@pytest.mark.parametrize("family", [*FAMILIES, "ssdlm", "llama"])
def test_a_loss_function_cannot_be_assigned(family, value):
    model = model_of_any(family)
    with pytest.raises(ValueError, match="loss_function"):
        model.loss_function = value
