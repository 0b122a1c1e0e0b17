"""The cache of finished blocks: written once, read without a copy, and interchangeable with a `DynamicCache`."""

import pytest
import torch
from generating import batch_of, make_family, prompts_of
from transformers import DynamicCache, QuantizedCache, StaticCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from bd3lm_hf.modeling.cache_bd3lm import (
    BlockCache,
    BlockCacheLayer,
    StaticSlots,
    StepCache,
    cache_maker,
    clear,
    set_length,
)
from bd3lm_hf.modeling.configuration_bd3lm import BD3LMConfig


def states(tokens: int, seed: int = 0, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    key, value = (torch.randn(batch, 3, tokens, 8, generator=generator) for _ in range(2))
    return key, value


CONFIG = BD3LMConfig(vocab_size=48, block_size=4, model_length=32, hidden_dim=32, n_blocks=2, n_heads=2)
KINDS = [BlockCache, DynamicCache, StaticCache]


def new_cache(kind: type):
    return StaticCache(CONFIG, max_cache_len=36) if kind is StaticCache else kind()


@pytest.fixture(params=KINDS)
def cache(request):
    return new_cache(request.param)


def test_only_committed_tokens_are_kept(cache):
    first, step, block = states(4, 1), states(6, 2), states(4, 3)
    seen = StepCache(cache, 0).update(*first, 0)  # the cache is empty and stays empty
    assert torch.equal(seen[0], first[0]) and torch.equal(seen[1], first[1]) and cache.get_seq_length() == 0
    StepCache(cache, 4).update(*first, 0)
    # Two of six tokens are finished, the others are read once and leave no trace.
    seen = StepCache(cache, 2).update(*step, 0)
    for got, a, b in zip(seen, first, step, strict=True):
        assert torch.equal(got, torch.cat([a, b], dim=2))
    assert cache.get_seq_length() == 6
    seen = StepCache(cache, 0).update(*block, 0)
    for got, a, b, c in zip(seen, first, step, block, strict=True):
        assert torch.equal(got, torch.cat([a, b[:, :, :2], c], dim=2))
    assert cache.get_seq_length() == 6


def test_reading_copies_no_finished_token():
    cache = BlockCache()
    StepCache(cache, 8).update(*states(8), 0)
    StepCache(cache, 0).update(*states(4, 1), 0)
    address = cache.layers[0].keys.data_ptr()
    for step in range(20):
        keys, values = StepCache(cache, 0).update(*states(4, step), 0)
        assert keys.data_ptr() == cache.layers[0].keys.data_ptr() == address
        assert values.data_ptr() == cache.layers[0].values.data_ptr()


@pytest.mark.parametrize(
    "change",
    [
        lambda cache: cache.crop(-3),
        lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
        lambda cache: cache.batch_repeat_interleave(3),
        lambda cache: cache.batch_select_indices(torch.tensor([1])),
    ],
    ids=["crop", "reorder", "repeat", "select"],
)
def test_cache_operations_of_transformers_equal_those_on_a_dynamic_cache(change):
    cache, reference = BlockCache(), DynamicCache()
    for layer in range(2):
        for step in range(2):
            new = states(5, 10 * layer + step)
            for ours, theirs in zip(cache.update(*new, layer), reference.update(*new, layer), strict=True):
                assert torch.equal(ours, theirs)
    change(cache)
    change(reference)
    assert cache.get_seq_length() == reference.get_seq_length()
    batch = reference.layers[0].keys.shape[0]
    for layer in range(2):
        new = states(4, 99, batch=batch)
        got = StepCache(cache, 4).update(*new, layer)
        expected = StepCache(reference, 4).update(*new, layer)
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


@pytest.mark.parametrize("kind", [BlockCache, DynamicCache])
def test_a_cache_of_left_padded_rows_gives_the_logits_of_the_rows_alone(tiny_model, kind):
    ids = torch.randint(3, 47, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :4] = 0
    with torch.no_grad():
        cache = kind()
        tiny_model(ids[:, :8], attention_mask=mask[:, :8], past_key_values=cache, use_cache=True)
        last = tiny_model(ids[:, 8:], attention_mask=mask, past_key_values=cache, use_cache=False).logits
        for row, start in enumerate((4, 0)):
            alone = tiny_model(ids[row : row + 1, start:]).logits[0, -4:]
            torch.testing.assert_close(last[row], alone, rtol=0, atol=1e-5)


# --- The caches that generate accepts --------------------------------------------------------------------------------


def cache_with(tokens: int, cache=None, rows: int = 1) -> DynamicCache:
    cache = DynamicCache() if cache is None else cache
    for layer in range(2):
        cache.update(torch.zeros(rows, 2, tokens, 16), torch.zeros(rows, 2, tokens, 16), layer)
    return cache


def cache_of(kind: type, *layers):
    """Return a cache made without its constructor, which for some needs another library."""
    cache = kind.__new__(kind)
    cache.offloading, cache.layers = False, list(layers)
    return cache


@pytest.mark.parametrize(
    ("cache", "lengths", "message"),
    [
        (cache_with(6), [9], "holds 6 tokens: a cache can be continued only if it holds whole blocks"),
        (cache_with(4, rows=2), [9, 5], "padded as they were"),
        (cache_with(12), [9], "holds 12 tokens but the prompt has 9: pass the whole text"),
        (cache_with(8), [7], "holds 8 tokens but the prompt has 7"),
        (cache_with(4), [9, 9], "holds 1 rows but the batch has 2.*batch_repeat_interleave"),
        (StaticCache(CONFIG, max_cache_len=12), [9], "2 layers for 1 rows of 12 tokens.*needs .* rows of 16"),
        (StaticCache(CONFIG, max_cache_len=35), [32], r"rows of 35 tokens.*needs .* rows of 36: .*max_cache_len=36"),
        (StaticCache(BD3LMConfig(), max_cache_len=36), [9], "StaticCache of 12 layers .* needs 2 layers"),
        (cache_with(4, StaticCache(CONFIG, max_cache_len=36)), [9, 9], "for 1 rows .* needs 2 layers for 2 rows"),
        (cache_of(QuantizedCache), [9], "is a QuantizedCache, which cannot hold finished blocks"),
        (cache_of(DynamicCache, DynamicSlidingWindowLayer(sliding_window=8)), [9], "DynamicCache, which cannot hold"),
        (DynamicCache(offloading=True), [9], "is a DynamicCache with offloading, which cannot hold finished blocks"),
    ],
)
def test_a_cache_that_does_not_fit_is_refused(make_model, cache, lengths, message):
    with pytest.raises(ValueError, match=message):
        make_model().generate(**batch_of(prompts_of(lengths), "left"), max_new_tokens=4, past_key_values=cache)


@pytest.mark.parametrize("family", ["bd3lm", "ar"])
def test_a_cache_of_another_text_batch_or_model_is_refused(family):
    model, (prompt, other) = make_family(family, model_length=32), prompts_of([9, 9])
    with torch.no_grad():
        cache = model(prompt[None, :8], use_cache=True).past_key_values
    for ids in (other[None], torch.stack([prompt, prompt])):
        with pytest.raises(ValueError, match="another text than row 0|1 rows but the batch has 2"):
            model.generate(ids, max_new_tokens=3, past_key_values=cache)
    with pytest.raises(ValueError, match="1 rows but the batch has 2"):
        model(torch.stack([prompt, prompt])[:, 8:], past_key_values=cache, use_cache=False)
    with pytest.raises(ValueError, match="2 layers but the model has 1"):
        make_family(family, n_blocks=1)(prompt[None, 8:], past_key_values=cache, use_cache=False)
    with pytest.raises(ValueError, match="tokens but the prompt has"):
        model.generate(prompt[None, :7], max_new_tokens=3, past_key_values=cache)
    first = model.generate(prompt[None], max_new_tokens=3, past_key_values=cache, return_dict_in_generate=True)
    assert torch.equal(first.sequences, model.generate(prompt[None], max_new_tokens=3))
    longer = torch.cat([other[None], first.sequences[:, 9:], other[None]], dim=1)
    with pytest.raises(ValueError, match="another text than row 0"):
        model.generate(longer, max_new_tokens=3, past_key_values=first.past_key_values)
    both = torch.stack([prompt, other])
    with torch.no_grad():
        cache = model(both[:, :8], use_cache=True).past_key_values
    cache.batch_select_indices(torch.tensor([1, 0]))
    swapped = model.generate(both.flip(0), max_new_tokens=3, past_key_values=cache)
    assert torch.equal(swapped, model.generate(both.flip(0), max_new_tokens=3))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_padded_rows_are_continued_if_they_begin_at_the_same_columns(make_model, kind):
    model, batch = make_model(pad_token_id=0), batch_of(prompts_of([9, 5]), "left")
    whole = model.generate(**batch, max_new_tokens=11, do_sample=False)
    returned = {"cache_implementation": kind, "return_dict_in_generate": True}
    first = model.generate(**batch, max_new_tokens=7, do_sample=False, **returned)
    assert first.past_key_values.row_start.tolist() == [0, 4]
    mask = torch.cat([batch["attention_mask"], torch.ones(2, 7, dtype=torch.long)], dim=1)
    options = {"max_new_tokens": 4, "do_sample": False, "past_key_values": first.past_key_values}
    assert torch.equal(model.generate(first.sequences, attention_mask=mask, **options), whole)
    rows = {"input_ids": first.sequences.flip(0), "attention_mask": mask.flip(0)}
    with pytest.raises(ValueError, match="padded as they were"):
        model.generate(**rows, **options)


def test_a_row_that_ends_in_a_block_that_others_finished_is_continued(make_model):
    model, batch = make_model(block_size=8, pad_token_id=0), batch_of(prompts_of([7, 2]), "left")
    static = {"cache_implementation": "static", "return_dict_in_generate": True}
    first = model.generate(**batch, max_new_tokens=3, do_sample=False, **static)
    longer = torch.cat([first.sequences, torch.stack(prompts_of([3, 3], seed=1))], dim=1)
    mask = torch.cat([batch["attention_mask"], torch.ones(2, 6, dtype=torch.long)], dim=1)
    options = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
    continued = model.generate(longer, past_key_values=first.past_key_values, **options)
    assert torch.equal(continued, model.generate(longer, **options))


@pytest.mark.parametrize("name", ["offloaded", "quantized", "sliding_window"])
def test_a_cache_that_block_diffusion_cannot_use_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"cache_implementation='{name}' does not fit.*use_cache=False"):
        cache_maker(name)


@pytest.mark.parametrize(("name", "kind"), [(None, BlockCache), ("dynamic", BlockCache), ("static", StaticCache)])
def test_a_cache_is_made_by_name(name, kind):
    cache = cache_maker(name)(CONFIG)
    assert isinstance(cache, kind) and cache.get_seq_length() == 0
    if kind is StaticCache:
        assert [layer.max_cache_len for layer in cache.layers] == [36, 36]


# --- Any number of tokens --------------------------------------------------------------------------------------------


def test_a_cache_that_drops_tokens_as_it_grows_keeps_its_buffers():
    # A window of 64 tokens slides over 8,000: the buffers neither grow nor move, and few tokens are moved in them.
    cache, reference = BlockCache(), None
    addresses, moved = set(), 0
    for step in range(2000):
        key, value = states(4, step, batch=1)
        begin = cache.layers[0]._begin if step else 0
        StepCache(cache, 4).update(key, value, 0)
        layer = cache.layers[0]
        moved += layer.get_seq_length() if layer._begin < begin else 0
        reference = key if reference is None else torch.cat([reference, key], dim=2)[:, :, -64:]
        if layer.get_seq_length() > 60:
            layer.drop_first(4)
        if step > 200:
            addresses.add(tuple(buffer.data_ptr() for buffer in layer._buffers))
            assert layer._buffers[0].shape[2] <= 2 * 64 + 256
        if step % 97 == 0:
            assert torch.equal(layer.keys, reference[:, :, -layer.get_seq_length() :])
    assert len(addresses) == 1
    assert 0 < moved < 8000 / 2


def test_tokens_move_to_new_buffers_where_they_would_overwrite_themselves():
    layer, (key, value) = BlockCacheLayer(), states(1000)
    layer.append(key, value, 1000)
    layer.drop_first(100)  # the room that this frees is smaller than the tokens that remain
    address = layer._buffers[0].data_ptr()
    keys, values = layer.append(*states(300, 1), 300)
    assert layer._buffers[0].data_ptr() != address
    assert torch.equal(keys[:, :, :900], key[:, :, 100:]) and torch.equal(values[:, :, :900], value[:, :, 100:])


def test_tokens_can_be_dropped_and_rows_selected():
    cache, (key, value) = BlockCache(), states(16, batch=3)
    StepCache(cache, 16).update(key, value, 0)
    layer = cache.layers[0]
    layer.drop_first(4)
    cache.batch_select_indices(torch.tensor([2, 0]))
    assert torch.equal(layer.keys, key[[2, 0], :, 4:]) and torch.equal(layer.values, value[[2, 0], :, 4:])
    layer.drop_first(4)
    new = states(4, 1, batch=2)
    seen = StepCache(cache, 4).update(*new, 0)
    assert torch.equal(seen[1], torch.cat([value[[2, 0], :, 8:], new[1]], dim=2))


def test_rows_can_be_dropped_before_a_token_is_committed():
    cache = BlockCache()
    StepCache(cache, 0).update(*states(4, batch=4), 0)
    cache.batch_select_indices(torch.tensor([1, 3]))
    key, value = states(4, 1, batch=2)
    seen = StepCache(cache, 4).update(key, value, 0)
    assert torch.equal(seen[0], key) and torch.equal(cache.layers[0].values, value)


@pytest.mark.parametrize("kind", KINDS)
def test_an_emptied_cache_can_be_filled_again_and_a_static_one_shortened(kind):
    cache = new_cache(kind)
    for layer in range(2):
        StepCache(cache, 8).update(*states(8, batch=2), layer)
    if kind is StaticCache:
        set_length(cache, 4)
        assert int(cache.get_seq_length()) == 4
    clear(cache)
    assert cache.get_seq_length() == 0
    batch = 2 if kind is StaticCache else 5  # a cache that grows then fits a batch of any size
    key, value = states(4, 1, batch=batch)
    for layer in range(2):
        seen = StepCache(cache, 4).update(key, value, layer)
        assert torch.equal(seen[0], key) and torch.equal(seen[1], value)


def test_tokens_are_written_to_the_given_slots():
    cache = StaticCache(CONFIG, max_cache_len=36)
    StepCache(cache, 8).update(*states(8, 1), 0)
    key, value = states(4, 2)
    slots = torch.tensor([35, 0, 8, 3])
    keys, values = StaticSlots(cache, slots).update(key, value, 0)
    assert keys.data_ptr() == cache.layers[0].keys.data_ptr()
    assert torch.equal(keys[:, :, slots], key) and torch.equal(values[:, :, slots], value)
    assert torch.equal(keys[:, :, 1:3], states(8, 1)[0][:, :, 1:3])
