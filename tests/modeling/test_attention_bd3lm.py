"""The attention plans: every fast plan equals the rule, nothing leaks, and padding changes nothing."""

from types import SimpleNamespace

import pytest
import torch
from noisy_text import random_ids, some_masked
from plain_network import plain_logits
from torch.nn.attention.flex_attention import create_mask

from bd3lm_hf.modeling import attention_bd3lm
from bd3lm_hf.modeling.attention_bd3lm import Tile, block_causal_plan, two_stream_plan
from bd3lm_hf.modeling.inputs_bd3lm import token_layout
from bd3lm_hf.modeling.modeling_bd3lm import BD3LMForMaskedLM


CPU = torch.device("cpu")
IMPLEMENTATIONS = ["eager", "sdpa", "flex_attention"]
LENGTHS = [1, 3, 4, 7, 32, 45]


@pytest.fixture
def small_tiles(monkeypatch):
    """Set tiles of 8 queries, so that short sequences have several."""
    monkeypatch.setattr(attention_bd3lm, "_TILE", 8)


def config_of(block_size: int, implementation: str) -> SimpleNamespace:
    return SimpleNamespace(block_size=block_size, _attn_implementation=implementation)


def padded_mask(length: int) -> torch.Tensor:
    """Return rows without padding, with padding on the left and on the right, `(3, length)`."""
    mask = torch.ones(3, length, dtype=torch.long)
    mask[1, : length // 3] = 0
    mask[2, length - length // 3 :] = 0
    return mask


def dense(tiles: tuple[Tile, ...], rows: int, queries: int, keys: int) -> torch.Tensor:
    """Return what tiles allow, bool `(rows, queries, keys)`; each query must be in exactly one tile."""
    allowed = torch.zeros(rows, queries, keys, dtype=torch.bool)
    served = torch.zeros(queries, dtype=torch.long)
    for tile in tiles:
        start, stop = tile.queries
        served[start:stop] += 1
        columns = torch.cat([torch.arange(*keys_range) for keys_range in tile.keys])
        if tile.mask is None:
            seen = torch.ones(1, 1, stop - start, len(columns), dtype=torch.bool)
        elif isinstance(tile.mask, torch.Tensor):
            seen = tile.mask == 0
        else:
            seen = create_mask(tile.mask.mask_mod, rows, 1, stop - start, len(columns), device="cpu")
        assert seen.shape[-2:] == (stop - start, len(columns))
        allowed[:, start:stop, columns] = seen[:, 0].expand(rows, -1, -1)
    assert (served == 1).all()
    return allowed


def rule(attention_mask: torch.Tensor, block_size: int, num_noise_samples: int) -> torch.Tensor:
    """Return the published rule over `[x_0 ; x_t ; ...]`, given the blocks of two tokens; padding sees nothing."""
    real = attention_mask.bool()
    block = (real.long().cumsum(1) - 1) // block_size
    earlier, own = block[:, :, None] > block[:, None, :], block[:, :, None] == block[:, None, :]
    streams = range(num_noise_samples)
    clean = [earlier | own, *(torch.zeros_like(own) for _ in streams)]
    noisy = [[earlier, *(own & (other == stream) for other in streams)] for stream in streams]
    allowed = torch.cat([torch.cat(row, dim=2) for row in (clean, *noisy)], dim=1)
    real = real.repeat(1, 1 + num_noise_samples)
    return allowed & real[:, :, None] & real[:, None, :]


# --- Plans equal the rule --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("block_size", [1, 4, 6, 8, 16])
@pytest.mark.parametrize("padded", [False, True])
def test_the_two_stream_plan_equals_the_rule(implementation, block_size, padded, small_tiles):
    # Reading a flex mask pair by pair is slow.
    for length in LENGTHS if implementation != "flex_attention" else [11]:
        for num_noise_samples in (1, 2) if length < 45 else (1,):
            given = padded_mask(length) if padded else torch.ones(1, length)
            layout = token_layout(given if padded else None, length, block_size, device=CPU)
            arguments = (layout, config_of(block_size, implementation), torch.float32)
            plan = two_stream_plan(*arguments, num_noise_samples=num_noise_samples)
            cached = two_stream_plan(*arguments, num_noise_samples=num_noise_samples, clean_cached=True)
            expected, total = rule(given, block_size, num_noise_samples), (1 + num_noise_samples) * length
            real = given.bool().repeat(1, 1 + num_noise_samples)
            rows = len(given)
            assert plan.skip == length and cached.skip == 0
            assert torch.equal(dense(plan.tiles, rows, total, total)[real], expected[real])
            noisy = expected[:, length:][real[:, length:]]
            for tiles in (plan.last_tiles, cached.tiles, cached.last_tiles):
                assert torch.equal(dense(tiles, rows, num_noise_samples * length, total)[real[:, length:]], noisy)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("block_size", [1, 4, 8, 16])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("past", [0, 8, 10])
def test_the_block_causal_plan_equals_the_rule_after_any_cache(implementation, block_size, padded, past, small_tiles):
    for length in (1, 4, 7, 24) if implementation != "flex_attention" else (7,):
        given = padded_mask(past + length) if padded else torch.ones(1, past + length)
        seen = (given, past + length) if padded else (None, length)
        layout = token_layout(*seen, block_size, past=past, device=CPU)
        plan = block_causal_plan(layout, length, config_of(block_size, implementation), torch.float32)
        expected = rule(given, block_size, 0)[:, past:]
        real = given.bool()[:, past:]
        assert torch.equal(dense(plan.tiles, len(given), length, past + length)[real], expected[real])


def test_sdpa_reads_no_key_that_no_query_of_its_tile_sees(small_tiles):
    layout = token_layout(None, 64, 4, device=CPU)
    plan = two_stream_plan(layout, config_of(4, "sdpa"), torch.float32)
    pairs = sum((t.queries[1] - t.queries[0]) * sum(b - a for a, b in t.keys) for t in plan.tiles)
    assert pairs < 0.45 * (2 * 64) ** 2


# --- Two streams equal the doubled sequence --------------------------------------------------------------------------


def doubled_logits(model: BD3LMForMaskedLM, x_t: torch.Tensor, x_0: torch.Tensor) -> torch.Tensor:
    """Return the logits of x_t as published: `[x_t ; x_0]` is one sequence under a dense mask."""
    length = x_t.shape[1]
    position = torch.arange(2 * length)
    clean, block = position >= length, position % length // model.config.block_size
    q, k = (slice(None), None), (None, slice(None))
    diagonal = (clean[q] == clean[k]) & (block[q] == block[k])
    offset = ~clean[q] & clean[k] & (block[q] > block[k])
    causal = clean[q] & clean[k] & (block[q] >= block[k])
    ids = torch.cat([x_t, x_0], dim=1)
    return plain_logits(model, ids, position % length, diagonal | offset | causal)[:, :length]


@pytest.mark.parametrize(
    ("implementation", "block_size", "length"),
    [(name, 4, length) for name in ("eager", "sdpa") for length in (4, 7, 32, 45)]
    + [("flex_attention", 4, 160), ("sdpa", 1, 29), ("sdpa", 8, 29), ("sdpa", 16, 29)],
)
def test_two_streams_equal_a_doubled_sequence(
    tiny_model, implementation, block_size, length, small_tiles, interpreted
):
    # Flex attention has tiles of its own, of 128 tokens.
    x_0 = random_ids(2, length)
    x_t = some_masked(x_0)
    tiny_model.set_attn_implementation(implementation)
    tiny_model.config.block_size = block_size
    with torch.no_grad():
        logits = tiny_model(input_ids=x_t, clean_input_ids=x_0).logits
    torch.testing.assert_close(logits, doubled_logits(tiny_model, x_t, x_0), rtol=0, atol=1e-5)


# --- Padding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_row_of_only_padding_gives_finite_numbers(tiny_model, implementation):
    tiny_model.set_attn_implementation(implementation)
    ids, mask = random_ids(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[0] = 0
    with torch.no_grad():
        assert tiny_model(ids, attention_mask=mask).logits.isfinite().all()
        assert tiny_model(input_ids=ids, clean_input_ids=ids, attention_mask=mask).logits.isfinite().all()
        assert tiny_model.token_nll(ids, mask).nll.isfinite().all()


def test_attentions_are_whole_matrices_whose_rows_sum_to_one(tiny_model):
    tiny_model.set_attn_implementation("eager")
    ids = random_ids(2, 10)
    with torch.no_grad():
        output = tiny_model(ids, output_attentions=True)
        two = tiny_model(input_ids=some_masked(ids), clean_input_ids=ids, output_attentions=True)
    for weights in output.attentions:
        assert weights.shape == (2, 2, 10, 10)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 10))
        assert not weights[:, :, :4, 4:].any()
    assert [tuple(weights.shape[2:]) for weights in two.attentions] == [(20, 20), (10, 20)]


def test_attentions_that_an_implementation_does_not_return_are_reported(tiny_model, caplog):
    assert tiny_model(random_ids(1, 8), output_attentions=True).attentions is None
    assert "output_attentions=True has no effect with sdpa" in caplog.text


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
def test_packed_documents_have_the_logits_of_each_alone(tiny_model, attention, interpreted):
    tiny_model.set_attn_implementation(attention)
    ids, clean = torch.randint(3, 47, (2, 13)), torch.randint(3, 47, (2, 13))
    packed = torch.tensor([[*range(6), *range(7)]])
    with torch.no_grad():
        for extra in ({}, {"clean_input_ids": clean}):
            together = tiny_model(ids, position_ids=packed, **extra).logits
            for part in (slice(0, 6), slice(6, 13)):
                own = {name: value[:, part] for name, value in extra.items()}
                alone = tiny_model(ids[:, part], **own).logits
                torch.testing.assert_close(together[:, part], alone, atol=1e-5, rtol=1e-4)
