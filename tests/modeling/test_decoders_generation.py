"""Text from stock decoders: every sampler, cache and alignment generates what recomputing everything would."""

import pytest
import torch
from decoders import BLOCK, FAMILIES, MASK, random_ids, tiny_decoder
from transformers import DynamicCache

from bd3lm_hf.modeling.samplers_bd3lm import SAMPLERS


OBJECTIVES = [("block", "same"), ("block", "shifted"), ("token", "same"), ("token", "shifted")]
every_decoder = pytest.mark.parametrize("family", FAMILIES)


def write(model, ids, **options):
    defaults = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None}
    return model.generate(ids, **{**defaults, **options})


def by_hand(model, ids, tokens):
    """Generate greedily from left to right with whole two-stream passes."""
    stop = ids.shape[1] + tokens
    text = torch.cat([ids, ids.new_full((len(ids), -(-stop // BLOCK) * BLOCK - ids.shape[1]), MASK)], dim=1)
    for column in range(ids.shape[1], stop):
        block = column // BLOCK * BLOCK
        clean = text.masked_fill(torch.arange(text.shape[1]) >= block, 5)
        with torch.no_grad():
            logits = model(input_ids=text, clean_input_ids=clean).logits[:, column]
        logits[:, [MASK, 0]] = -torch.inf
        text[:, column] = logits.argmax(-1)
    return text[:, :stop]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@every_decoder
def test_greedy_text_is_that_of_whole_two_stream_passes(family, attention):
    for context, alignment in OBJECTIVES if attention == "sdpa" else OBJECTIVES[-1:]:
        model, ids = tiny_decoder(family, attention, context=context, alignment=alignment), random_ids(2, 6)
        # A processor that reads the text makes the sampler go from left to right.
        options = {"repetition_penalty": 1.0 + 1e-9}
        expected = by_hand(model, ids, 9)
        static = {"cache_implementation": "static"}
        for cache in ({}, {"use_cache": False}, static, {"past_key_values": DynamicCache()}):
            assert torch.equal(write(model, ids, **options, **cache), expected), (context, alignment, cache)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(("context", "alignment"), OBJECTIVES)
def test_a_batch_of_unequal_prompts_is_each_prompt_alone(sampler, context, alignment):
    model = tiny_decoder("qwen3", context=context, alignment=alignment)
    ids, lengths = random_ids(3, 9), (9, 4, 6)
    mask = torch.tensor([[0] * (9 - n) + [1] * n for n in lengths])
    rows = torch.stack([torch.cat([ids.new_zeros(9 - n), row[:n]]) for row, n in zip(ids, lengths, strict=True)])
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    together = write(model, rows, attention_mask=mask, sampler=sampler, do_sample=True, generator=generators)
    for number, length in enumerate(lengths):
        options = {"do_sample": True, "generator": [torch.Generator().manual_seed(number)]}
        alone = write(model, ids[number : number + 1, :length], sampler=sampler, **options)
        assert torch.equal(together[number, 9:], alone[0, length:])


@pytest.mark.parametrize("window, prompt", [("cached", 2), ("cached", 6), ("exact", 6)])
@pytest.mark.parametrize(("context", "alignment"), OBJECTIVES)
def test_text_beyond_the_window_does_not_depend_on_the_kind_of_cache(context, alignment, window, prompt):
    model, ids = tiny_decoder("llama", context=context, alignment=alignment, model_length=16), random_ids(2, prompt)
    options, kinds = {"max_new_tokens": 30, "window": window}, ("dynamic", "static")
    dynamic, static = (write(model, ids, cache_implementation=kind, **options) for kind in kinds)
    assert torch.equal(dynamic, static)
    if window == "exact":
        assert torch.equal(write(model, ids, max_new_tokens=30, use_cache=False), dynamic)


@pytest.mark.parametrize("alignment", ["same", "shifted"])
def test_a_returned_cache_is_continued(alignment):
    model, ids = tiny_decoder("qwen3", alignment=alignment), random_ids(2, 6)
    first = write(model, ids, max_new_tokens=10, return_dict_in_generate=True)
    assert first.past_key_values.get_seq_length() == 12
    more = write(model, first.sequences, max_new_tokens=8, past_key_values=first.past_key_values)
    assert torch.equal(more, write(model, first.sequences, max_new_tokens=8))


@pytest.mark.parametrize("alignment", ["same", "shifted"])
def test_infill_completes_gaps_in_place(alignment):
    model, ids = tiny_decoder("gpt2", alignment=alignment), random_ids(2, 10)
    gaps = ids.clone()
    gaps[0, 3:6], gaps[1, 8] = MASK, MASK
    filled = model.infill(gaps)
    assert not (filled == MASK).any() and torch.equal(filled[gaps != MASK], ids[gaps != MASK])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_offloaded_weights_score_and_generate_the_same(family, tmp_path):
    model, ids = tiny_decoder(family, alignment="shifted"), random_ids(2, 6)
    model.save_pretrained(tmp_path / "model")
    size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    options = {"device_map": "auto", "max_memory": {"cpu": size // 2}, "offload_folder": str(tmp_path / "disk")}
    offloaded = type(model).from_pretrained(tmp_path / "model", **options)
    assert {"disk", "cpu"} == {str(device) for device in offloaded.hf_device_map.values()}
    assert torch.equal(write(offloaded, ids), write(model, ids))
    expected = model.token_nll(ids, estimator="exact").nll
    torch.testing.assert_close(offloaded.token_nll(ids, estimator="exact").nll, expected)


def test_a_shifted_model_needs_a_block_to_read_after_a_cache_without_hidden_states():
    model, ids, cache = tiny_decoder("llama", alignment="shifted"), random_ids(2, 10), DynamicCache()
    with torch.no_grad():
        model(ids[:, :BLOCK], past_key_values=cache, use_cache=True)
    del cache.clean_hidden  # as in a cache whose rows were concatenated
    with pytest.raises(ValueError, match="holds no hidden state of its last token"):
        write(model, ids[:, :6], past_key_values=cache)
    assert torch.equal(write(model, ids, past_key_values=cache), write(model, ids))


def test_text_beyond_the_learned_positions_is_refused():
    with pytest.raises(ValueError, match="max_length=70"):
        write(tiny_decoder("gpt2"), random_ids(1, 6), max_new_tokens=64)


@pytest.mark.parametrize(("prompt", "tokens", "cached"), [(6, 9, False), (9, 3, False), (4, 4, True), (13, 3, True)])
def test_text_that_grows_past_the_switch_of_longrope_is_not_cached(prompt, tokens, cached):
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 8}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [8.0] * 4}
    model = tiny_decoder("qwen3", rope_parameters=rope)
    ids, options = random_ids(2, prompt), {"max_new_tokens": tokens, "return_dict_in_generate": True}
    options |= {"output_logits": True, "repetition_penalty": 1.0 + 1e-9}
    expected = write(model, ids, **options, use_cache=False)
    for kind in ("dynamic", "static"):
        output = write(model, ids, **options, cache_implementation=kind)
        assert (output.past_key_values is not None) is cached
        torch.testing.assert_close(output.logits, expected.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions_score_and_generate(dtype):
    model, ids = tiny_decoder("llama").to(dtype), random_ids()
    assert torch.isfinite(model.token_nll(ids, estimator="stratified").nll).all()
    assert write(model, ids).shape == (2, 21)
