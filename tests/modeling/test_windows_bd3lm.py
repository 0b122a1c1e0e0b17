"""The window slides as published, or exactly, in a cache that grows or has a fixed size, at a constant cost."""

import gc
import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from generating import MASK, assert_same, generate, make_family, new_tokens, prompts_of
from plain_network import plain_logits
from published import published_bd3lm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CompileConfig, DynamicCache, LogitsProcessorList, StaticCache

from bd3lm_hf.modeling.cache_bd3lm import BlockCache
from bd3lm_hf.modeling.decoding_bd3lm import BlockWriter
from bd3lm_hf.modeling.decoding_state_bd3lm import SequenceBuffer
from bd3lm_hf.modeling.generation_config_bd3lm import BD3LMGenerationConfig
from bd3lm_hf.modeling.modeling_bd3lm import BD3LMForMaskedLM
from bd3lm_hf.modeling.windows_bd3lm import compiles_by_default


RECORDED = "01_bd3lm"
CACHES = [BlockCache, DynamicCache, StaticCache]


def new_cache(kind: type, model):
    if kind is StaticCache:
        return StaticCache(model.config, max_cache_len=model.config.model_length + model.config.block_size)
    return kind()


# --- Beyond the window -----------------------------------------------------------------------------------------------


def published_text(model: BD3LMForMaskedLM, prompt: torch.Tensor, count: int) -> tuple[torch.Tensor, list]:
    """Return the greedy text of the published cache, and the logits of each new token.

    Its keys and values were computed when their block was finished, so a token sees the window that ended with its own
    block.
    """
    config, text, logits = model.config, prompt, []
    while len(logits) < count:
        stop = (len(text) // config.block_size + 1) * config.block_size
        column, block = torch.arange(stop), torch.arange(stop) // config.block_size
        age = block.unsqueeze(1) - block
        ids = F.pad(text, (0, stop - len(text)), value=config.mask_token_id)
        allowed = (age >= 0) & (age < config.model_length // config.block_size)
        logits.append(plain_logits(model, ids.unsqueeze(0), column, allowed)[0, len(text)])
        logits[-1][[config.mask_token_id, config.pad_token_id]] = -torch.inf
        text = torch.cat([text, logits[-1].argmax().unsqueeze(0)])
    return text[len(prompt) :], logits


@pytest.mark.parametrize("block_size", [1, 4, 8])
@pytest.mark.parametrize("kind", CACHES)
def test_a_text_beyond_the_window_follows_the_published_cache(make_model, block_size, kind):
    model = make_model(block_size=block_size)
    prompt = prompts_of([13])[0]
    output = generate(model, input_ids=prompt[None], max_new_tokens=61, past_key_values=new_cache(kind, model))
    text, logits = published_text(model, prompt, 61)
    assert torch.equal(new_tokens(output)[0], text)
    for ours, theirs in zip(output.logits, logits, strict=True):
        torch.testing.assert_close(ours[0], theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("kind", "window", "name"),
    [
        (BlockCache, "cached", "slide_logits_cache"),
        (StaticCache, "cached", "slide_logits_cache"),
        (BlockCache, "exact", "slide_logits_window"),
        (StaticCache, "exact", "slide_logits_window"),
        (None, "cached", "slide_logits_window"),
    ],
)
def test_the_moving_window_reproduces_the_published_logits(recorded, kind, window, name):
    model, ids = published_bd3lm(16), recorded["adaln.bs16.slide_ids"]
    buffer = SequenceBuffer.from_prompts(ids[:, :32], None, 16, 16, 96)
    buffer.token_ids[:] = ids
    cache, options = None if kind is None else new_cache(kind, model), BD3LMGenerationConfig(window=window)
    writer = BlockWriter(model, buffer, ids[:, :32], LogitsProcessorList(), options, cache)
    with torch.no_grad():
        rows = [writer.forward.logits(32, torch.tensor([position]), torch.ones(1)) for position in range(16)]
    torch.testing.assert_close(torch.stack(rows, 1), recorded[f"adaln.bs16.{name}"], atol=1e-5, rtol=0)


# --- Any length ------------------------------------------------------------------------------------------------------


class Work(TorchDispatchMode):
    """A streamer that counts, after each block, the numbers that operations have written and the tensors in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.written, self.counts, self.memory = 0, [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor, result in zip(tree_leaves(output), function._schema.returns, strict=False):
            is_view = result.alias_info is not None and not result.alias_info.is_write
            if isinstance(tensor, torch.Tensor) and not is_view:
                self.written += tensor.numel()
        return output

    def put(self, value: torch.Tensor) -> None:
        self.counts.append(self.written)
        if len(self.counts) % 30 == 0:
            tensors = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
            self.memory.append(sum(x.untyped_storage().nbytes() for x in tensors))

    def end(self) -> None:
        pass


def generate_long(model, tokens: int, **options) -> None:
    """Generate a text with one pass per block."""
    options |= {"do_sample": True, "sampler": "confidence", "confidence_threshold": 0.0}
    generator = torch.Generator().manual_seed(0)
    text = model.generate(torch.full((1, 5), 7), max_new_tokens=tokens, generator=generator, **options)
    assert text.shape == (1, 5 + tokens)
    assert len(text[0, -500:].unique()) > 20 and not (text == MASK).any()


@pytest.mark.parametrize("name", ["dynamic", "static"])
def test_a_long_text_takes_the_same_work_and_memory_for_every_block(make_model, name):
    model = make_model(block_size=8)
    with Work() as work:
        generate_long(model, 500, cache_implementation=name, streamer=work)
    steps = [later - earlier for earlier, later in itertools.pairwise(work.counts)]
    early, late = (sorted(steps[begin : begin + 25]) for begin in (10, 35))
    assert early[:22] == late[:22]  # now and then the cache moves to the front
    assert work.memory[-1] - work.memory[0] < 5_000


# --- Caches of fixed size --------------------------------------------------------------------------------------------


def test_a_static_cache_larger_than_needed_or_uneven_is_a_ring(make_model):
    model = make_model()
    prompt = prompts_of([13])[0][None]
    expected = generate(model, input_ids=prompt, max_new_tokens=61)
    for slots in (37, 39, 50, 200):
        cache = StaticCache(model.config, max_cache_len=slots)
        assert_same(generate(model, input_ids=prompt, max_new_tokens=61, past_key_values=cache), expected)
    just = StaticCache(model.config, max_cache_len=24)
    assert_same(
        generate(model, input_ids=prompt, max_new_tokens=11, past_key_values=just),
        generate(model, input_ids=prompt, max_new_tokens=11),
    )


@pytest.mark.parametrize(
    ("device", "batch_size", "fields", "expected"),
    [
        ("cuda", 1, {}, True),
        ("cuda", 64, {}, True),
        ("cuda", 65, {}, False),
        ("cuda", 1, {"disable_compile": True}, False),
        ("cpu", 1, {}, False),
    ],
)
def test_small_batches_on_cuda_are_compiled_by_default(monkeypatch, device, batch_size, fields, expected):
    monkeypatch.setattr("bd3lm_hf.modeling.windows_bd3lm.is_triton_available", lambda: True)
    model = SimpleNamespace(device=torch.device(device))
    assert compiles_by_default(model, BD3LMGenerationConfig(**fields), batch_size) is expected
    for unfit in ({"hf_quantizer": 1}, {"hf_device_map": {"a": 0, "b": 1}}):
        model = SimpleNamespace(device=torch.device(device), **unfit)
        assert not compiles_by_default(model, BD3LMGenerationConfig(**fields), batch_size)


def test_compilation_is_requested_and_can_be_disabled(make_model, monkeypatch):
    model, asked = make_model(), []
    monkeypatch.setattr(torch, "compile", lambda function, **options: [asked.append(options), function][1])
    prompt = prompts_of([5])[0][None]
    static, config = {"cache_implementation": "static"}, CompileConfig(mode="default")
    generate(model, input_ids=prompt, **static)
    generate(model, input_ids=prompt, compile_config=config)  # a cache that grows has no fixed shapes
    generate(model, input_ids=prompt, **static, compile_config=config, disable_compile=True)
    assert not asked  # on a CPU, as in transformers, only on request
    generate(model, input_ids=prompt, **static, compile_config=config)
    assert [options["mode"] for options in asked] == ["default"] and asked[0]["dynamic"] is False


# --- The next turn ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CACHES)
def test_a_returned_cache_is_continued(make_model, kind):
    model = make_model()
    prompt = torch.stack(prompts_of([9, 9]))
    whole = generate(model, input_ids=prompt, max_new_tokens=16)
    first = generate(model, input_ids=prompt, max_new_tokens=10, past_key_values=new_cache(kind, model))
    assert isinstance(first.past_key_values, kind)
    assert first.past_key_values.get_seq_length() == 16  # the last block, 16 to 18, is not finished
    second = generate(model, input_ids=first.sequences, max_new_tokens=6, past_key_values=first.past_key_values)
    assert torch.equal(second.sequences, whole.sequences)
    for ours, theirs in zip(second.logits, whole.logits[10:], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("window", ["cached", "exact"])
@pytest.mark.parametrize("kind", CACHES)
def test_a_cache_whose_window_has_moved_comes_back_empty(make_model, kind, window):
    # Its keys were rotated at positions that no later prompt has.
    model = make_model()
    given = {"past_key_values": new_cache(kind, model), "window": window}
    first = generate(model, input_ids=prompts_of([9])[0][None], max_new_tokens=40, **given)
    assert first.past_key_values.get_seq_length() == 0
    tail = first.sequences[:, -24:]
    again = generate(model, input_ids=tail, max_new_tokens=4, past_key_values=first.past_key_values)
    assert torch.equal(again.sequences, generate(model, input_ids=tail, max_new_tokens=4).sequences)


def test_a_cache_holds_what_the_output_shows(make_model):
    # The last row ends inside a block; after its end it holds padding, in the text and in the cache.
    model = make_model(eos_token_id=1)
    prompt = torch.stack(prompts_of([4, 4, 4]))
    plain = new_tokens(generate(model, input_ids=prompt, max_new_tokens=12))
    stop = next(t for t in plain[2, :9].tolist() if t not in plain[:2].flatten().tolist())
    output = generate(model, input_ids=prompt, max_new_tokens=12, eos_token_id=stop)
    assert (output.sequences[2] == 2).any()
    fresh = BlockCache()
    with torch.no_grad():
        model(output.sequences[:, :12], past_key_values=fresh, use_cache=True)
    for ours, theirs in zip(output.past_key_values.layers, fresh.layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, atol=1e-5, rtol=0)


# --- A window that is one block --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mdlm", "sedd"])
@pytest.mark.parametrize("stride", [None, 1, 3, 7])
def test_beyond_a_single_window_a_text_continues_from_its_last_tokens(family, stride):
    # The reference: every window on its own, with its part of the text as prompt.
    model, window, text = make_family(family), 8, torch.tensor([[5, 6, 7]])
    output, step = generate(model, text, max_new_tokens=17, window_stride=stride), stride or window // 2
    num_forward_passes, end = 0, text.shape[1] + 17
    while text.shape[1] < end:
        context = text[:, -(window - step) :] if text.shape[1] >= window else text
        one = generate(model, context, max_new_tokens=min(window - context.shape[1], end - text.shape[1]))
        text = torch.cat([text, new_tokens(one)], dim=1)
        num_forward_passes += one.num_forward_passes
    assert torch.equal(output.sequences, text) and output.num_forward_passes == num_forward_passes
