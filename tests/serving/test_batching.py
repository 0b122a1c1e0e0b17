"""Rows join and leave a batch, and each gets the text that it would get alone."""

import copy
import gc
import threading
import tracemalloc

import pytest
import torch
from decoders import tiny_decoder
from generating import make_family
from shared_models import tiny_ssdlm
from transformers import LlamaConfig, LlamaForCausalLM

from bd3lm_hf.modeling.windows_bd3lm import DecodingNetwork
from bd3lm_hf.serving import batching
from bd3lm_hf.serving.batching import Batcher
from bd3lm_hf.serving.requests import Request


class Letters:
    """A tokenizer with one token per character."""

    def decode(self, ids, skip_special_tokens=True):
        return "".join(chr(40 + number) for number in ids)


class Caller:
    """A request whose end can be waited for."""

    def __init__(self, model, prompt, count, seed=0, **fields):
        config = copy.deepcopy(model.generation_config)
        for name, value in {"max_new_tokens": count, "do_sample": True, "eos_token_id": None, **fields}.items():
            setattr(config, name, value)
        self.ended, self.error, self.shown = threading.Event(), None, []
        self.after_first_text = None
        self.request = Request(prompt, config, seed, self._show, self._end)

    def _show(self, text):
        self.shown.append(text)
        if len(self.shown) == 1 and self.after_first_text is not None:
            self.after_first_text()

    def _end(self, error):
        self.error = error
        self.ended.set()

    def wait(self):
        assert self.ended.wait(60)
        return self.request.text


def run(batcher, *callers) -> list[str]:
    """Submit requests together, and return their texts."""
    for caller in callers:
        batcher.submit(caller.request)
    return [caller.wait() for caller in callers]


@pytest.fixture
def serve():
    batchers = []

    def make(model, **options):
        batchers.append(Batcher(model, Letters(), **options))
        return batchers[-1]

    yield make
    for batcher in batchers:
        batcher.close()


# Prompts within a block and of several, texts that outgrow the window of 32 tokens, and one that ends in a block.
CALLS = [([1, 2, 3], 50), ([5] * 13, 7), (list(range(9)), 60), ([7], 33)]


MODELS = {
    "bd3lm": lambda make_model: make_model(pad_token_id=0),
    "exact window": lambda make_model: with_field(make_model(pad_token_id=0), "window", "exact"),
    "time-conditioned": lambda make_model: make_model(pad_token_id=0, time_conditioning=True),
    "confidence": lambda make_model: with_field(make_model(pad_token_id=0), "sampler", "confidence"),
    "qwen3": lambda make_model: tiny_decoder("qwen3", eos_token_id=None),
    "llama": lambda make_model: tiny_decoder("llama", eos_token_id=None, context="token", alignment="shifted"),
    "gpt2": lambda make_model: tiny_decoder("gpt2", eos_token_id=None, alignment="shifted_noisy"),
    "ssdlm": lambda make_model: tiny_ssdlm(model_length=32, eos_token_id=None),
    "ssdlm, previous block": lambda make_model: with_field(
        tiny_ssdlm(model_length=32, eos_token_id=None), "context", "previous_block"
    ),
    "one block": lambda make_model: make_model(pad_token_id=0, block_size=32),
    "ar": lambda make_model: make_family("ar", model_length=32),
}


def with_field(model, name, value):
    setattr(model.generation_config, name, value)
    return model


@pytest.mark.parametrize("name", list(MODELS))
def test_a_text_does_not_depend_on_other_requests(make_model, serve, name):
    model = MODELS[name](make_model)
    batcher = serve(model)

    def callers():
        return [Caller(model, *call, seed=seed) for seed, call in enumerate(CALLS)]

    alone = [run(batcher, caller)[0] for caller in callers()]
    together = callers()
    assert run(batcher, *together) == alone
    assert [caller.error for caller in together] == [None] * 4
    assert [len(text) for text in alone] == [count for _, count in CALLS]
    assert all("".join(caller.shown) == text for caller, text in zip(together, alone, strict=True))
    assert [caller.request.finish_reason for caller in together] == ["length"] * 4
    # Each joins while the previous one is being generated.
    staggered = callers()
    for caller, next_one in zip(staggered, staggered[1:], strict=False):
        caller.after_first_text = lambda request=next_one.request: batcher.submit(request)
    batcher.submit(staggered[0].request)
    assert [caller.wait() for caller in staggered] == alone


class Network:
    """Counts forward passes and the tokens that go through them."""

    def __init__(self, monkeypatch):
        self.passes = self.tokens = 0
        forward = DecodingNetwork.hidden

        def hidden(network, input_ids, *args, **kwargs):
            self.passes += 1
            self.tokens += input_ids.numel()
            return forward(network, input_ids, *args, **kwargs)

        monkeypatch.setattr(DecodingNetwork, "hidden", hidden)

    def of(self, batcher, callers):
        self.passes = self.tokens = 0
        run(batcher, *callers)
        return self.passes, self.tokens


def test_a_batch_takes_the_passes_of_its_longest_text_and_reads_nothing_twice(make_model, serve, monkeypatch):
    model = make_model(pad_token_id=0, model_length=256)
    batcher, network = serve(model), Network(monkeypatch)
    prompts = [[1] * (1 + 5 * row) for row in range(8)]
    alone = [network.of(batcher, [Caller(model, prompt, 48, seed)]) for seed, prompt in enumerate(prompts)]
    # A row that begins within a block may need one step more than the others; the prompts are read one by one.
    passes, tokens = network.of(batcher, [Caller(model, prompt, 48, seed) for seed, prompt in enumerate(prompts)])
    longest = max(count for count, _ in alone)
    assert passes <= longest + 4 + len(prompts)
    assert sum(count for count, _ in alone) > 6 * passes
    assert tokens <= 1.1 * sum(count for _, count in alone)


def test_the_next_requests_of_answered_clients_begin_together(make_model, serve, monkeypatch):
    monkeypatch.setattr(batching, "_PATIENCE", 1e6)
    monkeypatch.setattr(batching, "_MAX_PATIENCE", 60)  # more than any thread takes to send a request
    model = make_model(pad_token_id=0)
    batcher, network = serve(model), Network(monkeypatch)

    def callers():
        return [Caller(model, [1, 2], 8, seed) for seed in range(3)]

    def submit(three):
        for caller in three:
            batcher.submit(caller.request)

    first, second = callers(), callers()
    with batcher._changed:  # so that the three of the first round begin together
        submit(first)
    for caller in first:
        caller.wait()
    passes = network.passes
    timer = threading.Timer(0.05, submit, [second[1:]])
    batcher.submit(second[0].request)
    timer.start()
    for caller in second:
        caller.wait()
    assert network.passes == 2 * passes


def test_groups_that_take_turns_keep_their_caches(make_model, serve, monkeypatch):
    # Within one window, so that nothing is read again when a group has its next turn.
    model = make_model(pad_token_id=0, model_length=256)
    batcher, read = serve(model), []
    monkeypatch.setattr(batching.RowGroup, "_read", lambda group, tokens: read.append(tokens))

    def callers():
        return [Caller(model, [1, 2], 120, seed=1), Caller(model, [3], 120, do_sample=False)]

    alone = [run(batcher, caller)[0] for caller in callers()]
    first, second = callers()
    first.after_first_text = lambda: batcher.submit(second.request)
    batcher.submit(first.request)
    assert [first.wait(), second.wait()] == alone and not read


def test_one_request_with_other_settings_does_not_wait_for_a_long_one(make_model, serve):
    model = make_model(pad_token_id=0)
    batcher = serve(model)
    long, short = Caller(model, [1], 100_000), Caller(model, [2], 40, do_sample=False)
    long.after_first_text = lambda: batcher.submit(short.request)
    batcher.submit(long.request)
    short.wait()
    assert long.request.finish_reason is None
    long.request.cancelled.set()
    long.wait()


def test_hundreds_of_requests_leave_nothing_behind(make_model, serve):
    model = make_model(pad_token_id=0)
    batcher = serve(model, max_batch_size=25)

    def serve_some(count):
        callers = [Caller(model, [1 + number % 40] * (1 + number % 9), 5, number) for number in range(count)]
        for first in range(0, count, 50):
            run(batcher, *callers[first : first + 50])
        del callers
        gc.collect()
        return sum(type(thing) in (torch.Tensor, torch.Generator, Request) for thing in gc.get_objects())

    before = serve_some(60)
    tracemalloc.start()
    serve_some(40)
    start, _ = tracemalloc.get_traced_memory()
    after = serve_some(440)
    end, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert after <= before + 8 and end - start < 100_000
    found = batcher.statistics()
    assert (found["requests_running"], found["requests_waiting"], found["requests_finished"]) == (0, 0, 540)


@pytest.mark.parametrize("count", [20, 60, 130])
def test_greedy_rounds_give_the_text_of_one_call(make_model, serve, count):
    model = make_model(pad_token_id=0, model_length=64)
    caller = Caller(model, [1, 2, 3, 4, 5], count, do_sample=False, window="exact")
    options = {"max_new_tokens": count, "do_sample": False, "window": "exact"}
    whole = model.generate(torch.tensor([[1, 2, 3, 4, 5]]), **options)
    assert run(serve(model), caller)[0] == Letters().decode(whole[0, 5:].tolist())


def test_requests_with_other_settings_wait_and_an_error_ends_one_row_only(make_model, serve):
    model = make_model(pad_token_id=0)
    batcher = serve(model)
    callers = [
        Caller(model, [1], 40),
        Caller(model, [1], 8, sampler="confidence"),
        Caller(model, [10_000], 8),  # outside the vocabulary
        Caller(model, [1], 8),
    ]
    run(batcher, *callers)
    assert isinstance(callers[2].error, ValueError) and "10000" in str(callers[2].error)
    assert [caller.error for caller in (callers[0], callers[1], callers[3])] == [None] * 3


def test_a_model_of_another_library_is_refused_by_name():
    sizes = {"vocab_size": 48, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    with pytest.raises(ValueError, match="LlamaForCausalLM"):
        Batcher(LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=1)), Letters())


class Bytes:
    """A tokenizer with one token per byte, so a character may need several."""

    def decode(self, ids, skip_special_tokens=True):
        return bytes(ids).decode("utf-8", errors="replace")


@pytest.mark.parametrize("size", [1, 3, 7])
def test_a_long_text_is_decoded_in_pieces_without_a_broken_character(make_model, size):
    text, shown = "naïve café, 3 €; " * 60, []
    tokens, more = list(text.encode()), list("€; STOP and more".encode())

    def take(tokens, limit, *stop_strings):
        """Return a request with its reason to finish and its text, after so many tokens at a time."""
        config = copy.deepcopy(make_model(pad_token_id=0).generation_config)
        config.max_new_tokens, config.eos_token_id, config.stop_strings = limit, None, list(stop_strings)
        request = Request([1], config, 0, shown.append)
        shown.clear()
        for first in range(0, len(tokens), size):
            request.take(tokens[first : first + size], Bytes())
        assert request.text == "".join(shown)
        return request, request.finish_reason, request.text

    stops = ("STOP", "€; STOP")
    assert take(tokens, len(tokens), *stops)[1:] == ("length", text)
    assert take([*tokens, *more], len(tokens), *stops)[1:] == ("length", text)
    request, *ended = take([*tokens, *more], 10**6, *stops)
    assert ended == ["stop", text] and request.written == tokens
    # The bytes of its last character can come one by one.
    assert take(list("ab€c".encode()), 10**6, "b€")[1:] == ("stop", "a")
    # Wherever the stop string falls relative to the tokens that are no longer decoded.
    for length in range(250, 264):
        request, *ended = take(list(b"x" * length + b"STOP and more"), 10**6, "STOP")
        assert ended == ["stop", "x" * length] and len(request.written) == length


@pytest.mark.parametrize("field", [{}, {"entropy_stop": 5.0, "entropy_stop_window": 12}, {"stop_at_second_eos": True}])
@pytest.mark.parametrize("name", ["bd3lm", "ar"])
def test_an_end_token_or_a_stopping_criterion_of_generate_ends_the_text(make_model, serve, name, field):
    model = MODELS[name](make_model)
    first, batcher = Caller(model, [1, 2], 40, seed=1), serve(model)
    run(batcher, first)
    end = first.request.written[9]
    again = Caller(model, [1, 2], 400, seed=1, **field, eos_token_id=None if "entropy_stop" in field else end)
    run(batcher, again)
    written = again.request.written
    assert again.request.finish_reason == "stop" and len(written) < 400
    assert written[:10] == first.request.written[: min(10, len(written))]
    assert len(written) > 9 if field else end not in written
