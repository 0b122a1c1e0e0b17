"""Responses in OpenAI's format, and checks before a request reaches an endpoint.

Failures are reported without a traceback. Where transformers' handlers differ from OpenAI's API, their answers are
changed:

- A stream ends with the event `[DONE]`.
- With `stream_options={"include_usage": true}` the token counts come in a separate event without choices. Otherwise
  they are in the last event with a choice, as transformers sends them.
- Fields of a choice without a value are null, not missing.
- An error is an object. Before the first token it is the response itself, with its status.
"""

import asyncio
import contextlib
import json
import secrets
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from fastapi import FastAPI, HTTPException
from fastapi import Request as HTTPRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from jinja2 import TemplateError

from bd3lm_hf.serving.batching import QueueFullError, ServerStoppedError


# Wrong path and wrong method, for which the router raises its own exception.
_REFUSED_BY_ROUTER = (404, 405)
# Raised by `generate`, the tokenizer and the chat template for invalid fields of a request.
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
    """Return an error in OpenAI's format."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"message": message, "type": kind, "param": None, "code": status}


def error_response(status: int, message: str) -> JSONResponse:
    """Return an error as a response."""
    headers = {"Retry-After": "1"} if status == 429 else None
    return JSONResponse({"error": error_content(status, message)}, status, headers)


def add_error_handlers(app: FastAPI) -> None:
    """Make an application answer every failure in this format."""

    async def answer(_request: HTTPRequest, error: Exception) -> JSONResponse:
        return error_response(*describe(error))

    faults = (HTTPException, RequestValidationError, QueueFullError, ServerStoppedError, *_BAD_INPUT, Exception)
    for kind in (*_REFUSED_BY_ROUTER, *faults):
        app.add_exception_handler(kind, answer)


_DONE = "data: [DONE]\n\n"


def with_nulls(answer: dict[str, Any]) -> dict[str, Any]:
    """Add null fields that clients expect to the choices of an answer or of one event, and return it."""
    for choice in answer["choices"]:
        choice.setdefault("finish_reason", None)
        choice.setdefault("logprobs", None)
    return answer


async def openai_events(parts: AsyncGenerator[str, None], include_usage: bool) -> AsyncIterator[str]:
    """Return the event stream of an answer once its first text, or its end, has arrived.

    Args:
        parts: the stream of a transformers handler.
        include_usage: whether the token counts get a separate event.

    Raises:
        HTTPException: if the request fails before its first text.
    """
    events, begun = _parsed(parts), []
    async for event in events:
        if "error" in event:
            raise HTTPException(event["error"]["code"], event["error"]["message"])
        begun.append(event)
        if not _is_opening(event):
            break
    return _event_stream(begun, events, include_usage)


async def _parsed(parts: AsyncGenerator[str, None]) -> AsyncGenerator[dict[str, Any], None]:
    # Closing the stream with this generator tells the handler that the client has disconnected.
    async with contextlib.aclosing(parts):
        async for part in parts:
            for line in filter(None, part.split("\n\n")):
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    event["error"] = json.loads(event["error"])
                yield event


def _is_opening(event: dict[str, Any]) -> bool:
    """Return whether this is the first event of a chat, which only names the role of the speaker."""
    choice = event["choices"][0]
    return "role" in choice.get("delta", {}) and choice.get("finish_reason") is None


async def _event_stream(
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


# Checks before a request reaches an endpoint: API key, size and JSON


_MAX_BYTES = 10 * 2**20  # of a request
_OPEN_PATHS = ("/health",)  # need no key


class Access:
    """ASGI middleware that checks each request before the application sees it.

    It also stops the work for a client that disconnects. Neither FastAPI nor uvicorn does so for an answer that is not
    streamed.

    Args:
        app: the application.
        api_key: the key that every request must carry; None disables the check.
    """

    def __init__(self, app: Any, api_key: str | None = None) -> None:
        self.app, self.api_key = app, api_key

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if self.api_key is not None and scope["path"] not in _OPEN_PATHS and not self._has_key(scope):
            message = "the API key is missing or wrong: send it as 'Authorization: Bearer KEY'."
            await error_response(401, message)(scope, receive, send)
            return
        body = await _read(receive)
        if body is None:
            await error_response(413, f"the request has more than {_MAX_BYTES:,} bytes.")(scope, receive, send)
            return
        if scope["method"] == "POST" and (fault := _fault(body)) is not None:
            await error_response(400, fault)(scope, receive, send)
            return
        await self._answer(body, scope, receive, send)

    def _has_key(self, scope: Any) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"").removeprefix(b"Bearer ").strip()
        return secrets.compare_digest(given, (self.api_key or "").encode())

    async def _answer(self, body: bytes, scope: Any, receive: Any, send: Any) -> None:
        """Run the application until it has answered, the client disconnects, or the server shuts down."""
        messages: asyncio.Queue[Any] = asyncio.Queue()
        messages.put_nowait({"type": "http.request", "body": body, "more_body": False})
        answer = asyncio.create_task(self.app(scope, messages.get, send))
        left = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait({answer, left}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            pass  # by uvicorn, after its grace period; re-raising it would log a traceback
        finally:
            left.cancel()
            if not answer.done():
                answer.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await answer


async def _read(receive: Any) -> bytes | None:
    """Return the body of a request, or None if it is too long.

    The rest of a long body is read and dropped: a client that is still sending when its connection is closed never
    sees the answer.
    """
    parts, size = [], 0
    while True:
        message = await receive()
        part = message.get("body", b"")
        size += len(part)
        if size <= _MAX_BYTES:
            parts.append(part)
        if message["type"] == "http.disconnect" or not message.get("more_body"):
            return b"".join(parts) if size <= _MAX_BYTES else None


async def _disconnected(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _fault(body: bytes) -> str | None:
    """Return what is wrong with the body of a request."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return "the request is not valid JSON."
    return None if isinstance(content, dict) else "the request must be a JSON object."
