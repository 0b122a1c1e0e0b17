"""The autoregressive baseline: parity with the published one, exact likelihood, cache, padding."""

import pytest
import torch
from generating import MASK, PAD, make_family
from published import published

from bd3lm_hf import ARConfig, ARForCausalLM


RECORDED = "06_ar"


@pytest.fixture
def model() -> ARForCausalLM:
    return make_family("ar")


def test_logits_are_the_published_ones(recorded):
    model = published(RECORDED, ARForCausalLM, ARConfig)
    torch.testing.assert_close(model(recorded["x0"]).logits, recorded["logits"], atol=1e-5, rtol=0)


def test_likelihoods_and_loss_are_the_published_ones(recorded):
    model = published(RECORDED, ARForCausalLM, ARConfig)
    ids, mask = recorded["x0"], recorded["attention_mask"].long()
    score = model.token_nll(ids, mask)
    torch.testing.assert_close(score.nll[:, 1:], recorded["nlls"], atol=1e-5, rtol=0)
    assert torch.equal(score.mask[:, 1:], recorded["token_mask"])
    assert not score.mask[:, 0].any() and not score.nll[:, 0].any()
    for training in (False, True):
        loss = model.train(training)(ids, attention_mask=mask, labels=ids).loss
        torch.testing.assert_close(loss, recorded["loss"], atol=1e-5, rtol=0)


def test_the_loss_equals_that_of_full_logits(model):
    ids = torch.randint(0, 11, (3, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, :4] = -100
    logits = model(ids).logits
    logits = logits.float().index_fill(2, torch.tensor([MASK]), -torch.inf)
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(model(ids, labels=labels).loss, expected, atol=1e-5, rtol=0)
    half = model(ids, labels=labels, num_items_in_batch=2 * (labels[:, 1:] != -100).sum()).loss
    torch.testing.assert_close(half, expected / 2, atol=1e-5, rtol=0)


def test_only_the_requested_logits_are_computed(model):
    ids = torch.randint(0, 11, (2, 7), generator=torch.Generator().manual_seed(3))
    whole = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, whole[:, -2:])
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([0, 3])).logits, whole[:, [0, 3]])


def test_labels_without_a_text_are_refused(model):
    with pytest.raises(ValueError, match="labels need input_ids"):
        model(inputs_embeds=torch.zeros(1, 4, 32), labels=torch.zeros(1, 4, dtype=torch.long))


# --- Generation ------------------------------------------------------------------------------------------------------

PROMPTS = torch.tensor([[11, 12, 13, 14, 15], [6, 7, 8, 9, 10]])


@torch.no_grad()
def continued(model, prompt: list[int], count: int) -> list[int]:
    """Return greedy text by rereading the last `model_length` tokens for each new one."""
    text = list(prompt)
    for _ in range(count):
        logits = model(torch.tensor([text[-model.config.model_length :]])).logits[0, -1]
        logits[[MASK, PAD]] = -torch.inf
        text.append(int(logits.argmax()))
    return text


def test_tokens_are_counted_until_their_row_ends(model):
    def write(**arguments):
        sampling = {"do_sample": True, "temperature": 2.0, "generator": torch.Generator().manual_seed(0)}
        return model.generate(PROMPTS, max_new_tokens=12, return_dict_in_generate=True, **sampling, **arguments)

    free = write(eos_token_id=None, pad_token_id=2)
    assert free.tokens_per_forward == 1.0
    first, second = free.sequences[:, 5:].tolist()
    end = next(token for token in first if token not in second)
    output = write(eos_token_id=end, pad_token_id=2)
    assert output.num_forward_passes == 12
    assert output.tokens_per_forward == pytest.approx((first.index(end) + 1 + 12) / 2 / 12)


def test_padding_is_never_generated_unless_it_ends_a_text(model):
    with torch.no_grad():
        model.get_output_embeddings().bias[2] = 50.0
    for end in (None, 5):
        assert not (model.generate(PROMPTS, max_new_tokens=8, pad_token_id=2, eos_token_id=end)[:, 5:] == 2).any()
    assert (model.generate(PROMPTS, max_new_tokens=8, pad_token_id=2, eos_token_id=2)[:, 5:] == 2).all()


@pytest.mark.parametrize("fields", [{"window": "exact"}, {"use_cache": False}], ids=lambda fields: next(iter(fields)))
def test_a_text_beyond_the_window_equals_recomputation(model, fields):
    written = model.generate(PROMPTS, max_new_tokens=30, **fields)
    assert written.tolist() == [continued(model, row, 30) for row in PROMPTS.tolist()]


def test_a_cached_window_slides_and_is_exact_until_it_does(model):
    output = model.generate(PROMPTS, max_new_tokens=30, return_dict_in_generate=True)
    assert output.sequences.shape == (2, 35) and output.num_forward_passes == 30
    assert output.past_key_values.get_seq_length() == 0  # its keys were rotated at positions that no later prompt has
    assert output.sequences[:, :17].tolist() == [continued(model, row, 12) for row in PROMPTS.tolist()]


def test_a_cached_window_of_one_layer_equals_recomputation():
    # Keys of the first layer depend on their own token only, so here a cached key is exact at any position.
    model = make_family("ar", n_blocks=1)
    written = model.generate(PROMPTS, max_new_tokens=40)
    assert written.tolist() == [continued(model, row, 40) for row in PROMPTS.tolist()]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sampler": "confidence"}, "sampler='confidence' is for denoising models"),
        ({"num_denoising_steps": 2}, "num_denoising_steps=2 is for denoising models"),
        ({"window_stride": 2}, "window_stride=2 is for denoising models"),
        ({"sampling_dtype": "float64"}, "sampling_dtype='float64' is for denoising models"),
        ({"do_sample": True, "generator": [torch.Generator()] * 2}, "cannot use a generator per row"),
        ({"cache_implementation": "static"}, "cache_implementation='static' is not supported by the autoregressive"),
    ],
)
def test_unsupported_options_are_refused(model, fields, message):
    with pytest.raises(ValueError, match=message):
        model.generate(PROMPTS, max_new_tokens=2, **fields)


def test_infilling_is_not_offered(model):
    assert not hasattr(model, "infill")
    with pytest.raises(ValueError, match=r"mask_token_id=47.*blanks in it\. If"):
        model.generate(PROMPTS.index_fill(1, torch.tensor([2]), 47), max_new_tokens=2)
