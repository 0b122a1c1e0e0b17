"""Checks of a request before an endpoint sees it: the API key, a size limit, and JSON.

It also stops the work for a client that leaves. Neither FastAPI nor uvicorn does that while an answer is not streamed.
"""

import asyncio
import contextlib
import json
import secrets
from typing import Any

from bd3lm_hf.serving.responses import error_response


_MOST_BYTES = 10 * 2**20  # of a request
_OPEN_PATHS = ("/health",)  # need no key


class Access:
    """ASGI middleware in front of an application.

    Args:
        app: the application.
        api_key: which every request must carry; None for none.
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
            await error_response(413, f"the request has more than {_MOST_BYTES:,} bytes.")(scope, receive, send)
            return
        if scope["method"] == "POST" and (fault := _fault(body)) is not None:
            await error_response(400, fault)(scope, receive, send)
            return
        await self._answer(body, scope, receive, send)

    def _has_key(self, scope: Any) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"").removeprefix(b"Bearer ").strip()
        return secrets.compare_digest(given, (self.api_key or "").encode())

    async def _answer(self, body: bytes, scope: Any, receive: Any, send: Any) -> None:
        """Run the application until it has answered, the client has left, or the server shuts down."""
        messages: asyncio.Queue[Any] = asyncio.Queue()
        messages.put_nowait({"type": "http.request", "body": body, "more_body": False})
        answer = asyncio.create_task(self.app(scope, messages.get, send))
        left = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait({answer, left}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            pass  # by uvicorn, after a time of grace; raised again, it would be logged with a traceback
        finally:
            left.cancel()
            if not answer.done():
                answer.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await answer


async def _read(receive: Any) -> bytes | None:
    """Return the body of a request; None if it is too long.

    The rest of a long one is read and dropped: a client that is still sending when its connection is closed never sees
    the answer.
    """
    parts, size = [], 0
    while True:
        message = await receive()
        part = message.get("body", b"")
        size += len(part)
        if size <= _MOST_BYTES:
            parts.append(part)
        if message["type"] == "http.disconnect" or not message.get("more_body"):
            return b"".join(parts) if size <= _MOST_BYTES else None


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
