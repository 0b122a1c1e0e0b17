"""Rows join and leave a batch, and each gets the text that it gets alone."""

import copy
import threading

import pytest
import torch

from bd3lm_hf.serving.batching import Batcher, QueueFullError, Request


class Letters:
    """A tokenizer of one character a token."""

    def decode(self, ids, skip_special_tokens=True):
        return "".join(chr(40 + number) for number in ids)


class Caller:
    """A request whose end can be waited for."""

    def __init__(self, model, prompt, count, seed=0, **fields):
        config = copy.deepcopy(model.generation_config)
        for name, value in {"max_new_tokens": count, "do_sample": True, "eos_token_id": None, **fields}.items():
            setattr(config, name, value)
        self.ended, self.error, self.shown = threading.Event(), None, []
        self.request = Request(prompt, config, seed, self.shown.append, self._end)

    def _end(self, error):
        self.error = error
        self.ended.set()

    def wait(self):
        assert self.ended.wait(60)
        return self.request.text


@pytest.fixture
def serve():
    batchers = []

    def make(model, **options):
        batchers.append(Batcher(model, Letters(), **options))
        return batchers[-1]

    yield make
    for batcher in batchers:
        batcher.close()


CALLS = [([1, 2, 3], 50), ([5] * 13, 7), (list(range(9)), 60), ([7], 33)]


def test_a_text_does_not_depend_on_who_else_is_served(make_model, serve):
    model = make_model(pad_token_id=0)
    batcher = serve(model)
    alone = []
    for seed, call in enumerate(CALLS):
        caller = Caller(model, *call, seed=seed)
        batcher.submit(caller.request)
        alone.append(caller.wait())
    callers = [Caller(model, *call, seed=seed) for seed, call in enumerate(CALLS)]
    for caller in callers:
        batcher.submit(caller.request)
    assert [caller.wait() for caller in callers] == alone
    assert [len(text) for text in alone] == [count for _, count in CALLS]
    assert all("".join(caller.shown) == text for caller, text in zip(callers, alone, strict=True))
    assert [caller.request.finish_reason for caller in callers] == ["length"] * 4


@pytest.mark.parametrize("count", [20, 60, 130])
def test_greedy_rounds_give_the_text_of_one_call(make_model, serve, count):
    model = make_model(pad_token_id=0, model_length=64)
    caller = Caller(model, [1, 2, 3, 4, 5], count, do_sample=False, window="exact")
    serve(model).submit(caller.request)
    options = {"max_new_tokens": count, "do_sample": False, "window": "exact"}
    whole = model.generate(torch.tensor([[1, 2, 3, 4, 5]]), **options)
    assert caller.wait() == Letters().decode(whole[0, 5:].tolist())


def test_a_stop_string_ends_a_text_and_is_never_shown(make_model, serve):
    model, batcher = make_model(pad_token_id=0), None
    batcher = serve(model)
    first = Caller(model, [1, 2], 40, seed=1)
    batcher.submit(first.request)
    text = first.wait()
    stop = text[17:20]
    again = Caller(model, [1, 2], 40, seed=1, stop_strings=[stop])
    batcher.submit(again.request)
    assert again.wait() == text[: text.index(stop)] == "".join(again.shown)
    assert again.request.finish_reason == "stop" and len(again.request.written) == text.index(stop)


def test_an_end_token_ends_a_text(make_model, serve):
    model = make_model(pad_token_id=0)
    first = Caller(model, [1, 2], 40, seed=1)
    batcher = serve(model)
    batcher.submit(first.request)
    first.wait()
    end = first.request.written[9]
    again = Caller(model, [1, 2], 40, seed=1, eos_token_id=end)
    batcher.submit(again.request)
    again.wait()
    assert again.request.finish_reason == "stop" and end not in again.request.written


def test_requests_with_other_settings_wait_and_a_fault_is_that_of_one_row(make_model, serve):
    model = make_model(pad_token_id=0)
    batcher = serve(model)
    callers = [
        Caller(model, [1], 40),
        Caller(model, [1], 8, sampler="confidence"),
        Caller(model, [10_000], 8),  # outside the vocabulary
        Caller(model, [1], 8),
    ]
    for caller in callers:
        batcher.submit(caller.request)
    for caller in callers:
        caller.wait()
    assert isinstance(callers[2].error, ValueError) and "10000" in str(callers[2].error)
    assert [caller.error for caller in (callers[0], callers[1], callers[3])] == [None] * 3


def test_a_full_queue_refuses_and_a_cancelled_request_leaves(make_model, serve):
    model = make_model(pad_token_id=0)
    batcher = serve(model, max_batch_size=1, max_waiting=1)
    long, waiting = Caller(model, [1], 4000), Caller(model, [2], 4)
    batcher.submit(long.request)
    while not batcher.statistics()["requests_running"]:
        pass
    batcher.submit(waiting.request)
    with pytest.raises(QueueFullError, match="1 requests are waiting"):
        batcher.submit(Caller(model, [3], 4).request)
    long.request.cancelled.set()
    assert waiting.wait() and long.wait() is not None
    assert len(long.request.written) < 4000
