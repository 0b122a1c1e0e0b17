"""The passes of a decode: one per step, the same with and without cache, alone and in a batch, beyond the window."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import DynamicCache, LogitsProcessorList, QuantizedCache, StaticCache
from writing import MASK, batch_of, new_tokens, prompts_of, write

from bd3lm_hf.modeling.cache_bd3lm import BlockCache
from bd3lm_hf.modeling.canvas_bd3lm import lay_out
from bd3lm_hf.modeling.configuration_bd3lm import BD3LMConfig
from bd3lm_hf.modeling.decoding_bd3lm import BlockWriter
from bd3lm_hf.modeling.generation_config_bd3lm import BD3LMGenerationConfig
from bd3lm_hf.modeling.layers_bd3lm import apply_rotary
from bd3lm_hf.modeling.modeling_bd3lm import BD3LMForMaskedLM
from bd3lm_hf.modeling.passes_bd3lm import BlockPasses, check_cache


GOLDEN = Path(__file__).parent / "golden" / "01_bd3lm"
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


def modulated(x: torch.Tensor, norm: torch.nn.Module, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-5) * norm.weight * (1 + scale) + shift


class Twin:
    """The published cached decoding in plain torch: keys before rotation, positions counted inside the window."""

    def __init__(self, model: BD3LMForMaskedLM) -> None:
        self.model, self.config = model, model.config
        self.cache = [None] * model.config.n_blocks

    def __call__(self, block: torch.Tensor, store: bool) -> torch.Tensor:
        """Logits `(block, vocab)`."""
        net, config = self.model.backbone, self.config
        conditioning = F.silu(net.sigma_map(torch.zeros(1)))
        x = net.vocab_embed.embedding[block][None]
        for index, layer in enumerate(net.blocks):
            shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = layer.adaLN_modulation(conditioning).chunk(6, dim=-1)
            new = F.linear(modulated(x, layer.norm1, shift_1, scale_1), layer.attn_qkv.weight)
            new = new.unflatten(-1, (3, config.n_heads, config.head_dim))
            old = self.cache[index]
            if old is not None and old.shape[1] + len(block) > config.model_length:
                old = old[:, len(block) :]
            qkv = new if old is None else torch.cat([old, new], dim=1)
            cos, sin = net.rotary_emb(torch.arange(qkv.shape[1])[None], torch.float32)
            query, key = (apply_rotary(qkv[:, :, i], cos, sin).transpose(1, 2) for i in (0, 1))
            weights = (query[:, :, -len(block) :] @ key.transpose(2, 3) / math.sqrt(config.head_dim)).softmax(-1)
            attended = (weights @ qkv[:, :, 2].transpose(1, 2)).transpose(1, 2).flatten(2)
            x = x + gate_1 * F.linear(attended, layer.attn_out.weight)
            x = x + gate_2 * layer.mlp(modulated(x, layer.norm2, shift_2, scale_2))
            if store:
                self.cache[index] = qkv
        final = net.output_layer
        shift, scale = final.adaLN_modulation(conditioning).chunk(2, dim=-1)
        return final.linear(modulated(x, final.norm_final, shift, scale))[0]

    @torch.no_grad()
    def write(self, prompt: torch.Tensor, count: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The greedy text from left to right, and the logits of each new token."""
        size = self.config.block_size
        columns = -(-(len(prompt) + count) // size) * size
        text = F.pad(prompt, (0, columns - len(prompt)), value=self.config.mask_token_id)
        logits = []
        for begin in range(0, columns, size):
            block = text[begin : begin + size]
            for place in (block == self.config.mask_token_id).nonzero().flatten().tolist():
                row = self(block, store=False)[place].clone()
                row[[self.config.mask_token_id, self.config.pad_token_id]] = -torch.inf
                block[place] = row.argmax()
                logits.append(row)
            self(block, store=True)
        return text[len(prompt) : len(prompt) + count], logits[:count]


@pytest.mark.parametrize("block_size", [1, 4, 8])
@pytest.mark.parametrize("cache", [None, DynamicCache])
def test_a_text_beyond_the_window_follows_the_published_cache(make_model, block_size, cache):
    model = make_model(block_size=block_size)
    prompt = prompts_of([13])[0]
    given = {} if cache is None else {"past_key_values": cache()}
    output = write(model, input_ids=prompt[None], max_new_tokens=61, **given)
    text, logits = Twin(model).write(prompt, 61)
    assert torch.equal(new_tokens(output)[0], text)
    for ours, theirs in zip(output.logits, logits, strict=True):
        torch.testing.assert_close(ours[0], theirs, atol=1e-5, rtol=0)


def test_rows_of_a_batch_slide_over_the_window_as_if_they_stood_alone(make_model):
    model = make_model()
    prompts = prompts_of([1, 6, 13, 32])
    output = write(model, **batch_of(prompts, "left"), max_new_tokens=50)
    for row, prompt in enumerate(prompts):
        text, logits = Twin(model).write(prompt, 50)
        assert torch.equal(new_tokens(output)[row], text)
        torch.testing.assert_close(output.logits[-1][row], logits[-1], atol=1e-5, rtol=0)


def test_without_a_cache_each_step_recomputes_the_last_window(make_model):
    model = make_model()
    prompts = prompts_of([6, 13])
    output = write(model, **batch_of(prompts, "left"), max_new_tokens=43, use_cache=False)
    for row, prompt in enumerate(prompts):
        text = torch.cat([prompt, new_tokens(output)[row]])
        last = len(text) - 1
        stop = last // 4 * 4 + 4
        window = F.pad(text[:last], (0, stop - last), value=MASK)[stop - 32 :]
        expected = model(window[None]).logits[0, last - stop]
        expected[[2, MASK]] = -torch.inf
        torch.testing.assert_close(output.logits[-1][row], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("use_cache", "name"), [(True, "slide_logits_cache"), (False, "slide_logits_window")])
def test_the_moving_window_reproduces_the_published_logits(use_cache, name):
    golden = load_file(GOLDEN / "tensors.safetensors")
    config = BD3LMConfig(
        vocab_size=97, model_length=32, block_size=16, hidden_dim=64, cond_dim=16, n_blocks=2, n_heads=4
    )
    model = BD3LMForMaskedLM(config).eval()
    model.load_state_dict(load_file(GOLDEN / "weights.safetensors"))
    ids = golden["adaln.bs16.slide_ids"]
    canvas = lay_out(ids[:, :32], None, 16, 16, 96)
    canvas.text[:] = ids
    cache = BlockCache() if use_cache else None
    writer = BlockWriter(model, canvas, ids[:, :32], LogitsProcessorList(), BD3LMGenerationConfig(), cache)
    with torch.no_grad():
        rows = [writer.passes.logits(32, torch.tensor([place]), torch.ones(1)) for place in range(16)]
    torch.testing.assert_close(torch.stack(rows, 1), golden[f"adaln.bs16.{name}"], atol=1e-5, rtol=0)


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
    forward = BlockPasses.logits

    def watched(self, *args):
        logits = forward(self, *args)
        places.append([buffer.data_ptr() for layer in cache.layers for buffer in layer._buffers])
        return logits

    monkeypatch.setattr(BlockPasses, "logits", watched)
    write(model, input_ids=prompts_of([5])[0][None], max_new_tokens=20, past_key_values=cache)
    assert len(places) == 20
    assert all(place == places[0] for place in places)


@pytest.mark.parametrize("cache_class", [BlockCache, DynamicCache])
def test_a_returned_cache_is_continued(make_model, cache_class):
    model = make_model()
    prompt = torch.stack(prompts_of([9, 9]))
    whole = write(model, input_ids=prompt, max_new_tokens=16)
    first = write(model, input_ids=prompt, max_new_tokens=10, past_key_values=cache_class())
    assert isinstance(first.past_key_values, cache_class)
    assert first.past_key_values.get_seq_length() == 16  # the last block, 16 to 18, is not finished
    second = write(model, input_ids=first.sequences, max_new_tokens=6, past_key_values=first.past_key_values)
    assert torch.equal(second.sequences, whole.sequences)
    for ours, theirs in zip(second.logits, whole.logits[10:], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("cache_class", [BlockCache, DynamicCache])
def test_a_cache_whose_window_has_moved_comes_back_empty(make_model, cache_class):
    # Its keys stand at positions that no later prompt has.
    model = make_model()
    first = write(model, input_ids=prompts_of([9])[0][None], max_new_tokens=40, past_key_values=cache_class())
    assert first.past_key_values.get_seq_length() == 0
    tail = first.sequences[:, -24:]
    again = write(model, input_ids=tail, max_new_tokens=4, past_key_values=first.past_key_values)
    assert torch.equal(again.sequences, write(model, input_ids=tail, max_new_tokens=4).sequences)


def test_a_cache_holds_what_the_output_shows(make_model):
    # The second row ends inside a block; what it holds behind its end is padding, in the text and in the cache.
    model = make_model(eos_token_id=1)
    prompt = torch.stack(prompts_of([4, 4]))
    plain = new_tokens(write(model, input_ids=prompt, max_new_tokens=12))
    stop = next(t for t in plain[1].tolist() if t not in plain[0].tolist())
    output = write(model, input_ids=prompt, max_new_tokens=12, eos_token_id=stop)
    assert (output.sequences[1] == 2).any()
    fresh = BlockCache()
    with torch.no_grad():
        model(output.sequences[:, :12], past_key_values=fresh, use_cache=True)
    for ours, theirs in zip(output.past_key_values.layers, fresh.layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, atol=1e-5, rtol=0)


def cache_with(tokens: int, cache=None, rows: int = 1) -> DynamicCache:
    cache = DynamicCache() if cache is None else cache
    for layer in range(2):
        cache.update(torch.zeros(rows, 2, tokens, 16), torch.zeros(rows, 2, tokens, 16), layer)
    return cache


@pytest.mark.parametrize(
    ("cache", "lengths", "message"),
    [
        (cache_with(6), [9], "holds 6 tokens: a cache can be continued when it holds whole blocks"),
        (cache_with(4, rows=2), [9, 5], "no row of the batch is padded"),
        (cache_with(12), [9], "holds 12 tokens but the prompt has 9: pass the whole text"),
        (cache_with(4), [9, 9], "holds 1 rows but the batch has 2.*batch_repeat_interleave"),
        (StaticCache(BD3LMConfig(), max_cache_len=8), [9], "is a StaticCache, which can not keep finished blocks"),
    ],
)
def test_a_cache_that_does_not_fit_is_refused(make_model, cache, lengths, message):
    with pytest.raises(ValueError, match=message):
        make_model().generate(**batch_of(prompts_of(lengths), "left"), max_new_tokens=4, past_key_values=cache)


def test_a_quantized_cache_is_refused():
    # Made without its constructor: the quantizing backend is another library.
    with pytest.raises(ValueError, match="is a QuantizedCache, which can not keep finished blocks"):
        check_cache(QuantizedCache.__new__(QuantizedCache), None)
