"""Compiled denoising steps: one per shape for all calls, in buffers that calls reuse, with several threads too."""

import gc
import threading
import weakref

import pytest
import torch
from decoders import tiny_decoder
from generating import assert_same, batch_of, generate, make_family, prompts_of
from transformers.generation import CompileConfig

from bd3lm_hf.modeling import windows_bd3lm
from bd3lm_hf.modeling.cache_bd3lm import OwnStaticCache, StaticBuffers


pytestmark = pytest.mark.usefixtures("fresh_compiler")


@pytest.fixture
def model():
    """Return a model of one layer, which compiles in half the time of two."""
    return make_family("bd3lm", model_length=32, n_blocks=1)


@pytest.fixture
def graphs():
    return []


@pytest.fixture
def compiled(graphs):
    """Return options of `generate` for a step whose graphs are counted."""

    def backend(graph, inputs, **options):
        graphs.append(graph)
        return graph

    config = CompileConfig(backend=backend, fullgraph=True)
    return {"cache_implementation": "static", "compile_config": config, "do_sample": False, "max_new_tokens": 20}


# (prompts of unequal length, new tokens), of one shape each for a number of rows; some outgrow the window.
CALLS = [([13], 9), ([6], 61), ([1, 6, 13, 32], 61), ([5], 30), ([5, 5, 9, 9], 30)]


def prompts(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 40, (rows, 9), generator=torch.Generator().manual_seed(seed))


def plain(model, ids: torch.Tensor, **options) -> torch.Tensor:
    return model.generate(ids, do_sample=False, max_new_tokens=20, cache_implementation="dynamic", **options)


def test_a_step_is_compiled_once_for_all_calls_of_as_many_rows(model, compiled, graphs):
    counts = []
    for lengths, tokens in CALLS:
        batch = {**batch_of(prompts_of(lengths)), "max_new_tokens": tokens}
        assert_same(generate(model, **{**compiled, **batch}), generate(model, **batch))
        counts.append(len(graphs))
    assert counts == [2, 2, 4, 4, 4]  # with and without a block to write


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", ["bd3lm", "qwen3", "gpt2"])
def test_a_step_compiled_by_another_backend_generates_the_same_text(model, family, backend):
    if family != "bd3lm":
        model = tiny_decoder(family, context="token", alignment="shifted")
    batch, config = {"input_ids": prompts(2), "max_new_tokens": 40}, CompileConfig(backend=backend, fullgraph=True)
    compiled = generate(model, **batch, cache_implementation="static", compile_config=config)
    assert_same(compiled, generate(model, **batch))


def test_more_shapes_than_torch_allows_for_one_function_stay_compiled(model, compiled, graphs):
    with torch._dynamo.config.patch(recompile_limit=2):
        for rows in range(1, 5):
            model.generate(prompts(rows), **{**compiled, "max_new_tokens": 8})
    assert len(graphs) == 8


def test_threads_that_generate_at_the_same_time_do_not_disturb_each_other(model, compiled):
    texts = {}
    threads = [
        threading.Thread(target=lambda seed=seed: texts.update({seed: model.generate(prompts(2, seed), **compiled)}))
        for seed in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(3):
        assert torch.equal(texts[seed], plain(model, prompts(2, seed)))


def test_a_cache_that_a_caller_holds_is_not_reused(model, compiled):
    first = model.generate(prompts(2), return_dict_in_generate=True, **compiled)
    held = [layer.keys.clone() for layer in first.past_key_values.layers]
    model.generate(prompts(2, seed=1), **compiled)
    assert all(torch.equal(a, layer.keys) for a, layer in zip(held, first.past_key_values.layers, strict=True))
    longer = model.generate(first.sequences, past_key_values=first.past_key_values, **compiled)
    assert torch.equal(longer, plain(model, first.sequences))
    assert first.past_key_values.layers[0].is_initialized


def test_buffers_of_inference_mode_are_not_used_outside_it(model, compiled):
    with torch.inference_mode():
        inside = model.generate(prompts(2), **compiled)
    assert torch.equal(inside, model.generate(prompts(2), **compiled))


def test_a_call_does_not_see_what_earlier_ones_left_in_the_buffers(model, compiled):
    ids = prompts(2)
    expected = plain(model, ids)
    head, weight = model.get_output_embeddings(), model.backbone.blocks[0].attn_qkv.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(float("nan"))
        model.generate(ids, **compiled)
        weight.copy_(kept)
    assert head.weight.isfinite().all() and torch.equal(model.generate(ids, **compiled), expected)


def test_free_buffers_are_bounded_and_the_most_recently_used_are_kept(tiny_config):
    one = torch.empty(1, 2, 0, 16)
    cache = OwnStaticCache(tiny_config)
    size = 2 * 2 * 2 * cache.size * 16 * 4  # layers, keys and values, heads, slots, width, bytes
    buffers = StaticBuffers(most_bytes=3 * size)
    addresses = {}
    for rows in (1, 2, 4, 1):
        cache = OwnStaticCache(tiny_config)
        buffers.take(cache, one.expand(rows, -1, -1, -1))
        addresses.setdefault(rows, []).append(cache.layers[0].keys.data_ptr())
        buffers.give_back(cache)
        assert not cache.layers[0].is_initialized
    assert buffers.num_bytes <= 3 * size  # those of four rows were dropped when those of one row came back
    cache = OwnStaticCache(tiny_config)
    buffers.take(cache, one)
    assert cache.layers[0].keys.data_ptr() == addresses[1][-1] and not cache.layers[0].keys.any()


def test_a_deleted_or_training_model_keeps_no_buffers(make_model, compiled):
    model = make_model(n_blocks=1)
    model.generate(prompts(2), **compiled)
    assert windows_bd3lm.static_buffers(model).num_bytes
    assert not windows_bd3lm.static_buffers(model.train()).num_bytes
    model.eval().generate(prompts(2), **compiled)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
