"""OpenAI's API: check the fields and messages of a request, format the responses, and guard the endpoints.

OpenAI's schema has many fields that this server does not honour. A field that would change the answer is refused by
name; ignoring it would silently return something else.

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
import re
import secrets
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from fastapi import FastAPI, HTTPException
from fastapi import Request as HTTPRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from jinja2 import TemplateError
from transformers import GenerationConfig

from bd3lm_hf.serving.batching import QueueFullError, ServerStoppedError


# The fields of a request


# Fields of `generate` that a request may set directly (`extra_body` of the openai package).
GENERATION_FIELDS = (
    *("sampler", "num_denoising_steps", "confidence_threshold", "entropy_bound", "nucleus_p", "remask_fraction"),
    *("window", "do_sample", "top_k", "min_p", "repetition_penalty", "no_repeat_ngram_size"),
)
# Fields that it may also set in `generation_config`. The rest count tokens per `generate` call, and a request spans
# several calls, or they request outputs that a response cannot carry.
_CONFIG_FIELDS = (
    *GENERATION_FIELDS,
    *("bad_words_ids", "bos_token_id", "context", "eos_token_id", "epsilon_cutoff", "eta_cutoff", "max_new_tokens"),
    *("pad_token_id", "projection", "renormalize_logits", "sampling_dtype", "sequence_bias", "stop_at_second_eos"),
    *("stop_strings", "suppress_tokens", "temperature", "top_p", "typical_p"),
)
_HONOURED = {
    *("model", "prompt", "messages", "stream", "seed", "stop", "temperature", "top_p", "frequency_penalty"),
    *("max_tokens", "max_completion_tokens", "generation_config", "tools", "chat_template_kwargs"),
    *GENERATION_FIELDS,
}
# Fields that do not change the answer.
_IGNORED = {
    *("user", "metadata", "store", "service_tier", "safety_identifier", "stream_options", "parallel_tool_calls"),
    *("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"),
}
# Values of unsupported fields that do not change the answer.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "function_call": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
}
_MAX_TOKENS = 10**6
# Field -> minimum, maximum, and whether it must be an integer.
_RANGES: dict[str, tuple[float, float, bool]] = {
    "temperature": (0, 100, False),
    "top_p": (0, 1, False),
    "frequency_penalty": (-0.99, 2, False),  # transformers adds 1 and uses it as the repetition penalty
    "max_tokens": (1, _MAX_TOKENS, True),
    "max_completion_tokens": (1, _MAX_TOKENS, True),
    "seed": (-(2**63), 2**64 - 1, True),
}


def check_fields(body: dict[str, Any], known: set[str]) -> None:
    """Refuse fields that are not honoured.

    Args:
        body: the request without null fields.
        known: fields of OpenAI's schema.

    Raises:
        HTTPException: 422 for an unknown field, 400 for an unsupported one or an invalid value.
    """
    unknown = sorted(set(body) - known - set(GENERATION_FIELDS))
    if unknown:
        raise HTTPException(422, f"unknown field {', '.join(map(repr, unknown))}: remove it.")
    for name, value in body.items():
        if name not in _HONOURED | _IGNORED and value not in _NEUTRAL.get(name, ()):
            raise HTTPException(400, f"{name}={value!r} is not supported: leave it out.")
    for name, (low, high, whole) in _RANGES.items():
        _check_number(name, body.get(name), low, high, whole)
    _check_stop("stop", body.get("stop"))
    for name in ("stream", "do_sample"):
        _check_flag(name, body.get(name))
    options = body.get("stream_options", {})
    if not isinstance(options, dict):
        raise HTTPException(400, f"stream_options={options!r}: expected an object.")
    _check_flag("stream_options.include_usage", options.get("include_usage"))


def _check_number(name: str, value: Any, low: float, high: float, whole: bool) -> None:
    if value is None:
        return
    kinds = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        kind = "an integer" if whole else "a number"
        raise HTTPException(400, f"{name}={value!r}: expected {kind} from {low} to {high}.")


def _check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool | None):
        raise HTTPException(400, f"{name}={value!r}: expected true or false.")


def _check_stop(name: str, value: Any) -> None:
    texts = [value] if isinstance(value, str | None) else value
    if not isinstance(texts, list) or not all(isinstance(text, str | None) for text in texts):
        raise HTTPException(400, f"{name}={value!r}: expected a string or a list of strings.")


def own_fields(body: dict[str, Any], base: GenerationConfig) -> dict[str, Any]:
    """Return the fields of `generate` that a request sets, in `generation_config` or directly.

    Args:
        base: the model's generation config.

    Raises:
        HTTPException: if a field is unknown or cannot be set by a request.
    """
    given = body.get("generation_config") or {}
    try:
        given = json.loads(given) if isinstance(given, str) else dict(given)
        if not isinstance(given, dict):
            raise ValueError(f"it is a {type(given).__name__}")
    except (ValueError, TypeError, RecursionError) as error:
        raise HTTPException(400, f"generation_config is not a JSON object: {error}.") from error
    known = base.to_dict()
    direct = {name: body[name] for name in GENERATION_FIELDS if body.get(name) is not None}
    unknown = sorted((set(given) | set(direct)) - set(known))
    if unknown:
        raise HTTPException(400, f"generation_config has no field {', '.join(map(repr, unknown))} for this model.")
    fields = {name: value for name, value in given.items() if name in _CONFIG_FIELDS and value is not None}
    for name in set(given) - set(_CONFIG_FIELDS) - {"transformers_version"}:
        if given[name] not in (None, known[name]):
            raise HTTPException(400, f"generation_config: {name}={given[name]!r} is not supported: leave it out.")
    _check_number("max_new_tokens", fields.get("max_new_tokens"), 1, _MAX_TOKENS, True)
    _check_stop("stop_strings", fields.get("stop_strings"))
    _check_flag("do_sample", fields.get("do_sample"))
    return {**fields, **direct}


_TEXT_PARTS = ("text", "input_text", "output_text")
# Arguments of `apply_chat_template` that the server sets itself, and the template, which a client cannot replace.
_NOT_FOR_TEMPLATE = (
    *("conversation", "tools", "documents", "chat_template", "add_generation_prompt", "continue_final_message"),
    *("tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict", "load_audio_from_video"),
)


def checked_messages(messages: Any) -> list[dict[str, Any]]:
    """Return the messages of a request without empty fields, which clients send back as null.

    Raises:
        HTTPException: 400 if they are not a text conversation.
    """
    if not isinstance(messages, list) or not messages:
        raise HTTPException(400, "messages: expected a list of objects with a role and a content.")
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise HTTPException(400, f"messages[{index}]: expected an object with a role and a content.")
        if not _is_text(message.get("content")):
            raise HTTPException(400, f"messages[{index}].content: expected a string or a list of text parts.")
        calls = message.get("tool_calls") or []
        if not isinstance(calls, list) or not all(map(_is_tool_call, calls)):
            raise HTTPException(
                400,
                f"messages[{index}].tool_calls: expected a list of objects with a function that has a name and "
                f"arguments (a JSON object).",
            )
    # transformers drops the content of a message with `tool_calls`, even if that list is empty.
    return [{name: value for name, value in message.items() if value not in (None, [])} for message in messages]


def check_template_fields(body: dict[str, Any]) -> None:
    """Refuse malformed tools, and template arguments that a request cannot set."""
    tools, fields = body.get("tools", []), body.get("chat_template_kwargs", {})
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise HTTPException(400, f"tools={tools!r}: expected a list of objects.")
    if not isinstance(fields, dict):
        raise HTTPException(400, f"chat_template_kwargs={fields!r}: expected an object.")
    reserved = sorted(set(fields) & set(_NOT_FOR_TEMPLATE))
    if reserved:
        raise HTTPException(400, f"chat_template_kwargs: {', '.join(reserved)} cannot be set by a request.")


def _is_text(content: Any) -> bool:
    if isinstance(content, list):
        return all(
            isinstance(part, dict) and part.get("type") in _TEXT_PARTS and isinstance(part.get("text"), str)
            for part in content
        )
    return isinstance(content, str | None)


def _is_tool_call(call: Any) -> bool:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        return False
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return False
    return isinstance(arguments, dict)


# Errors and streams


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
        given = dict(scope["headers"]).get(b"authorization", b"")
        key = re.sub(rb"^bearer ", b"", given, flags=re.IGNORECASE).strip()  # HTTP ignores the case of a scheme
        return secrets.compare_digest(key, (self.api_key or "").encode())

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
