"""Failures in OpenAI's form, without a traceback."""

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
