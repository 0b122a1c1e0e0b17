"""The passes of a decode: one per step, the same with and without cache, alone and in a batch, beyond the window."""

from pathlib import Path

import pytest
import torch
from transformers import DynamicCache
from writing import MASK, batch_of, new_tokens, prompts_of, write

from bd3lm_hf.modeling.cache_bd3lm import BlockCache
from bd3lm_hf.modeling.decoding_bd3lm import BlockForward


GOLDEN = Path(__file__).parents[1] / "golden" / "01_bd3lm"
LENGTHS = [1, 3, 4, 7, 8, 13, 16]  # shorter than a block, whole blocks, ending inside one


@pytest.mark.parametrize("block_size", [1, 4, 8])
@pytest.mark.parametrize("side", ["left", "right"])
def test_cache_and_batch_change_no_logit_and_no_token(make_model, block_size, side):
    model = make_model(block_size=block_size)
    prompts = prompts_of(LENGTHS)
    cached = write(model, **batch_of(prompts, side))
    uncached = write(model, **batch_of(prompts, side), use_cache=False)
    assert torch.equal(cached.sequences, uncached.sequences)
    assert len(new_tokens(cached).unique()) > 10  # a text that says something
    for ours, theirs in zip(cached.logits, uncached.logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    for row, prompt in enumerate(prompts):
        alone = write(model, input_ids=prompt[None])
        assert torch.equal(new_tokens(alone)[0], new_tokens(cached)[row])
        for ours, theirs in zip(cached.logits, alone.logits, strict=True):
            torch.testing.assert_close(ours[row], theirs[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_every_attention_implementation_writes_the_same_text(make_model, implementation):
    model = make_model()
    batch = batch_of(prompts_of([1, 6, 12]), "left")
    expected = write(model, **batch)
    model.set_attn_implementation(implementation)
    for use_cache in (True, False):
        output = write(model, **batch, use_cache=use_cache)
        assert torch.equal(output.sequences, expected.sequences)
        for ours, theirs in zip(output.logits, expected.logits, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("sampled", [False, True])
def test_a_time_conditioned_model_writes_a_row_as_if_it_stood_alone(make_model, sampled):
    model = make_model(time_conditioning=True)
    prompts = prompts_of([1, 6, 12])
    output = write(model, **batch_of(prompts, "left"), do_sample=sampled)
    assert output.past_key_values is None
    if sampled:
        assert not (new_tokens(output) == MASK).any()
        return
    for row, prompt in enumerate(prompts):
        assert torch.equal(new_tokens(write(model, input_ids=prompt[None]))[0], new_tokens(output)[row])


@pytest.mark.parametrize("block_size", [1, 4, 8])
def test_a_token_costs_one_pass_and_the_prompt_one(make_model, monkeypatch, block_size):
    model = make_model(block_size=block_size)
    lengths = []
    run = model.backbone.run

    def counted(inputs_embeds, *args, **kwargs):
        lengths.append(inputs_embeds.shape[1])
        return run(inputs_embeds, *args, **kwargs)

    monkeypatch.setattr(model.backbone, "run", counted)
    output = write(model, input_ids=prompts_of([16])[0][None], max_new_tokens=14)
    assert output.num_forward_passes == 14
    assert output.tokens_per_forward == 1.0
    # The prompt alone, then one pass per token; the first one of a block also writes the block before it.
    assert lengths == [16] + [2 * block_size if i and i % block_size == 0 else block_size for i in range(14)]


def test_a_denoising_step_copies_no_cache(make_model, monkeypatch):
    model = make_model()
    cache, places = BlockCache(), []
    forward = BlockForward.logits

    def watched(self, *args):
        logits = forward(self, *args)
        places.append([buffer.data_ptr() for layer in cache.layers for buffer in layer._buffers])
        return logits

    monkeypatch.setattr(BlockForward, "logits", watched)
    write(model, input_ids=prompts_of([5])[0][None], max_new_tokens=20, past_key_values=cache)
    assert len(places) == 20
    assert all(place == places[0] for place in places)


def ending_apart(model, prompt: torch.Tensor, tokens: int) -> int:
    """A token that ends at least half of the greedy texts, but not all, before their last block."""
    texts = new_tokens(write(model, input_ids=prompt, max_new_tokens=tokens))[:, : tokens - 4]
    counts = {token: int((texts == token).any(1).sum()) for token in texts.unique().tolist()}
    return next(token for token, count in counts.items() if len(prompt) / 2 <= count < len(prompt))


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"use_cache": False}, {"window": "exact"}, {"past_key_values": DynamicCache}, {"sampler": "confidence"}],
    ids=lambda options: next(iter(options), "default"),
)
def test_finished_rows_leave_the_network_and_change_nothing(make_model, monkeypatch, options, sampled):
    model, prompt = make_model(), torch.stack(prompts_of([6] * 8))
    stop, sizes = ending_apart(model, prompt, 50), []
    run = model.backbone.run

    def counted(inputs_embeds, *args, **kwargs):
        sizes.append(inputs_embeds.shape[0])
        return run(inputs_embeds, *args, **kwargs)

    def generate() -> torch.Tensor:
        given = {name: value() if isinstance(value, type) else value for name, value in options.items()}
        generator = torch.Generator().manual_seed(0)
        return model.generate(
            prompt,
            max_new_tokens=50,
            eos_token_id=[stop, 46],
            do_sample=sampled,
            generator=generator,
            temperature=0.05 if sampled else None,
            **given,
        )

    monkeypatch.setattr(model.backbone, "run", counted)
    compact, saved = generate(), sizes.copy()
    sizes.clear()
    monkeypatch.setattr(BlockForward, "drop_finished", lambda self, finished: None)
    assert torch.equal(compact, generate())
    assert len(saved) == len(sizes) and set(sizes) == {8}
    # Half of the rows or more go at a time, and none comes back.
    assert saved[-1] <= 4 and saved == sorted(saved, reverse=True)
    assert all(later == earlier or 2 * later <= earlier for earlier, later in zip(saved, saved[1:], strict=False))


def test_rows_of_unequal_prompts_leave_the_network_too(make_model):
    model = make_model()
    prompts = prompts_of([1, 6, 13, 32, 9, 5])
    batch = batch_of(prompts, "left")
    texts = new_tokens(write(model, **batch, max_new_tokens=50))
    stop = next(t for t in texts.unique().tolist() if 3 <= int((texts[:, :40] == t).any(1).sum()) < 6)
    output = write(model, **batch, max_new_tokens=50, eos_token_id=stop)
    for row, text in enumerate(texts.tolist()):
        end = text.index(stop) + 1 if stop in text else 50
        expected = text[:end] + [2] * (50 - end)
        assert new_tokens(output)[row].tolist() == expected[: len(output.logits)]
    assert output.past_key_values.get_seq_length() == 0  # it lacks rows


@pytest.mark.parametrize("name", ["dynamic", "static"])
def test_a_cache_that_lacks_rows_comes_back_empty_and_can_be_used_again(make_model, name):
    model, prompt = make_model(), torch.stack(prompts_of([6] * 4))
    stop = ending_apart(model, prompt, 18)
    first = write(model, input_ids=prompt, max_new_tokens=18, eos_token_id=stop, cache_implementation=name)
    if name == "static":  # it keeps all its rows
        assert first.past_key_values.get_seq_length() == 20
        return
    assert first.past_key_values.get_seq_length() == 0
    again = write(model, input_ids=first.sequences, max_new_tokens=4, past_key_values=first.past_key_values)
    assert torch.equal(again.sequences, write(model, input_ids=first.sequences, max_new_tokens=4).sequences)


def test_a_time_conditioned_model_leaves_rows_out_too(make_model):
    model, prompt = make_model(time_conditioning=True), torch.stack(prompts_of([6] * 4))
    stop = ending_apart(model, prompt, 30)
    output = new_tokens(write(model, input_ids=prompt, max_new_tokens=30, eos_token_id=stop))
    for row, text in enumerate(prompt):
        alone = new_tokens(write(model, input_ids=text[None], max_new_tokens=30, eos_token_id=stop))[0]
        assert torch.equal(output[row, : len(alone)], alone) and (output[row, len(alone) :] == 2).all()
