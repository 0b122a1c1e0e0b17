"""Streams of transformers' handlers become events in OpenAI's format."""

import asyncio
import json

import pytest


pytest.importorskip("fastapi")

from fastapi import HTTPException  # noqa: E402

from bd3lm_hf.serving.openai_api import error_content, openai_events  # noqa: E402


ROLE = {"choices": [{"index": 0, "delta": {"role": "assistant"}}]}
TEXT = {"choices": [{"index": 0, "delta": {"content": "naïve\n\n"}}]}
FAULT = {"error": json.dumps(error_content(400, "top_k"))}


class Handler:
    """Stream events, several per part, and record when a client disconnects."""

    def __init__(self, *parts):
        self.parts, self.closed = parts, False

    async def stream(self):
        try:
            for part in self.parts:
                yield "".join(f"data: {json.dumps(event)}\n\n" for event in part)
        finally:
            self.closed = True


async def read(handler, most=100):
    events, read = await openai_events(handler.stream(), False), []
    async for event in events:
        read.append(event)
        if len(read) == most:
            break
    await events.aclose()
    return read


def test_a_failure_before_the_first_token_is_the_response():
    with pytest.raises(HTTPException, match="top_k") as caught:
        asyncio.run(read(Handler([ROLE], [FAULT])))
    assert caught.value.status_code == 400


def test_a_failure_after_it_is_an_event():
    role, text, fault, done = asyncio.run(read(Handler([ROLE, TEXT], [FAULT])))
    assert json.loads(text.removeprefix("data: "))["choices"][0]["delta"]["content"] == "naïve\n\n"
    assert json.loads(fault.removeprefix("data: "))["error"] == error_content(400, "top_k")
    assert (role.count("\n\n"), text.count("\n\n"), done) == (1, 1, "data: [DONE]\n\n")


def test_a_client_that_leaves_closes_the_stream_of_the_handler():
    handler = Handler([ROLE], [TEXT], [TEXT])
    assert len(asyncio.run(read(handler, most=2))) == 2
    assert handler.closed
