"""Answers in OpenAI's form: failures without a traceback, and events where transformers' handlers differ from it.

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

from fastapi import FastAPI, HTTPException
from fastapi import Request as HTTPRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from jinja2 import TemplateError

from bd3lm_hf.serving.batching import QueueFullError, ServerStoppedError


# A wrong path and a wrong method, which the router refuses by an exception of its own.
_REFUSED_BY_ROUTER = (404, 405)
# What generate, the tokenizer and the chat template say of a request's fields.
_BAD_INPUT = (ValueError, TypeError, KeyError, TemplateError)


def describe(error: BaseException) -> tuple[int, str]:
    """Return the status and the message of a failure."""
    if hasattr(error, "status_code"):
        return error.status_code, str(getattr(error, "detail", error))
    if isinstance(error, RequestValidationError):
        return 422, "the body must be a JSON object, sent with the header 'Content-Type: application/json'."
    if isinstance(error, QueueFullError):
        return 429, str(error)
    if isinstance(error, ServerStoppedError):
        return 503, str(error)
    if isinstance(error, _BAD_INPUT):
        return 400, " ".join(str(error).split())
    return 500, f"the server failed: {type(error).__name__}."


def error_content(status: int, message: str) -> dict[str, Any]:
    """Return what clients of OpenAI's interface read of an error."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"message": message, "type": kind, "param": None, "code": status}


def error_response(status: int, message: str) -> JSONResponse:
    """Return an error as a response."""
    headers = {"Retry-After": "1"} if status == 429 else None
    return JSONResponse({"error": error_content(status, message)}, status, headers)


def add_error_handlers(app: FastAPI) -> None:
    """Let an application answer every failure in this form."""

    async def answer(_request: HTTPRequest, error: Exception) -> JSONResponse:
        return error_response(*describe(error))

    faults = (HTTPException, RequestValidationError, QueueFullError, ServerStoppedError, *_BAD_INPUT, Exception)
    for kind in (*_REFUSED_BY_ROUTER, *faults):
        app.add_exception_handler(kind, answer)


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
