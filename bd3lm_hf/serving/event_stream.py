"""The form of answers, where transformers' handlers differ from OpenAI's interface.

- A streamed answer ends with the event `[DONE]`.
- With `stream_options={"include_usage": true}` the counts are in an event of their own, which has no choices.
  Otherwise they are in the last one that has a choice, as transformers sends them.
- Fields of a choice that have no value are null, not missing.
- An error is an object, and one before the first token is the response itself, with its status.
"""

import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from fastapi import HTTPException


_DONE = "data: [DONE]\n\n"


def with_nulls(answer: dict[str, Any]) -> dict[str, Any]:
    """Return an answer, or one event of it, whose choices have every field that clients read."""
    for choice in answer["choices"]:
        choice.setdefault("finish_reason", None)
        choice.setdefault("logprobs", None)
    return answer


async def openai_events(parts: AsyncGenerator[str, None], include_usage: bool) -> AsyncIterator[str]:
    """Return the events of an answer, once its first text or its end is known.

    Args:
        parts: what a handler of transformers streams.
        include_usage: whether the counts get an event of their own.

    Raises:
        HTTPException: if the request fails before it has any text.
    """
    events, begun = _parsed(parts), []
    async for event in events:
        if "error" in event:
            raise HTTPException(event["error"]["code"], event["error"]["message"])
        begun.append(event)
        if not _is_opening(event):
            break
    return _written(begun, events, include_usage)


async def _parsed(parts: AsyncGenerator[str, None]) -> AsyncGenerator[dict[str, Any], None]:
    # Closed with this generator: that tells the handler that the client has left.
    async with contextlib.aclosing(parts):
        async for part in parts:
            for line in filter(None, part.split("\n\n")):
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    event["error"] = json.loads(event["error"])
                yield event


def _is_opening(event: dict[str, Any]) -> bool:
    """Whether an event only names the role of the speaker, which a chat begins with."""
    choice = event["choices"][0]
    return "role" in choice.get("delta", {}) and choice.get("finish_reason") is None


async def _written(
    begun: list[dict[str, Any]], events: AsyncGenerator[dict[str, Any], None], include_usage: bool
) -> AsyncIterator[str]:
    async with contextlib.aclosing(events):
        for event in begun:
            yield _event_text(event, include_usage)
        async for event in events:
            yield _event_text(event, include_usage)
    yield _DONE


def _event_text(event: dict[str, Any], include_usage: bool) -> str:
    if "error" in event:
        return _data(event)
    usage = event.pop("usage", None) if include_usage else None
    text = _data(with_nulls(event))
    return text if usage is None else text + _data({**event, "choices": [], "usage": usage})


def _data(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
