"""transformers' server for the models of this package: its application, its request formats, our batching.

What transformers' server lacks for us is added through its own classes: the generation manager of a model, the checks
of a request, and middleware of its FastAPI application.
"""

import asyncio
import json
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from fastapi import FastAPI, HTTPException
from fastapi import Request as HTTPRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from jinja2 import TemplateError
from transformers import BatchEncoding, GenerationConfig
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.systemone import SystemOneHandler
from transformers.cli.serving.transcription import TranscriptionHandler
from transformers.cli.serving.utils import BaseGenerateManager, GenerationState, Modality, _StreamError

from bd3lm_hf.serving.batching import Batcher, QueueFullError, Request


ROUTES = ("/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/metrics")
# Fields that change the answer and that nothing here honours: any other value is refused.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "best_of": (None, 1),
    "echo": (None, False),
    "logprobs": (None, False, 0),
    "top_logprobs": (None, 0),
    "presence_penalty": (None, 0),
    "response_format": (None, {"type": "text"}),
    "tool_choice": (None, "none", "auto"),
    "function_call": (None, "none"),
    "functions": (None, []),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "web_search_options": (None,),
}
_OF_TOKENIZATION = ("tokenize", "return_tensors", "return_dict", "load_audio_from_video")
# Our own fields of `generate`, which a request may set directly (`extra_body`) or in `generation_config`.
GENERATION_FIELDS = (
    "sampler",
    "num_denoising_steps",
    "confidence_threshold",
    "entropy_bound",
    "nucleus_p",
    "remask_fraction",
    "window",
    "do_sample",
    "top_k",
)


@dataclass
class ServeSettings:
    """Settings of `bd3lm serve`.

    Args:
        defaults: fields of `generate` that replace those of the folder.
        max_tokens: new tokens of a request that names no number.
        api_key: which every request must carry; None for none.
    """

    model: str
    defaults: dict[str, Any] = field(default_factory=dict)
    max_tokens: int = 256
    api_key: str | None = None
    max_batch_size: int = 8
    max_waiting: int = 64


class LoadedModel(ModelManager):
    """transformers' model manager around a model that is loaded already, and never unloaded."""

    def __init__(self, name: str, model: Any, tokenizer: Any) -> None:
        super().__init__(force_model=None)
        self.force_model, self._model, self._tokenizer = name, model, PlainText(tokenizer)

    def load_model_and_processor(self, model_id_and_revision: str, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Return the model and its tokenizer."""
        return self._model, self._tokenizer

    def get_model_modality(self, model: Any, processor: Any = None) -> Modality:  # type: ignore[override]
        """Return that of a language model."""
        return Modality.LLM

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict]:  # type: ignore[override]
        """Return the one model in the form of `/v1/models`."""
        return [{"owned_by": "", "id": self.force_model, "object": "model", "created": 0}]


class PlainText:
    """A tokenizer for text from others: a literal mask token in it stays text, since blanks are known by position."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer_of_model, self._mask = tokenizer, getattr(tokenizer, "mask_token", None)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer_of_model, name)

    def __call__(self, text: str, *, add_special_tokens: bool = True, **kwargs: Any) -> BatchEncoding:
        """Return `input_ids` and `attention_mask`, `(1, length)`."""
        encode = self._tokenizer_of_model
        if not self._mask or self._mask not in text:
            ids = encode(text, add_special_tokens=add_special_tokens)["input_ids"]
        else:
            literal = encode(self._mask, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            parts = [encode(part, add_special_tokens=False)["input_ids"] for part in text.split(self._mask)]
            ids = parts[0] + [token for part in parts[1:] for token in literal + part]
            if add_special_tokens:
                (token,) = encode("x", add_special_tokens=False)["input_ids"][:1]
                framed = encode("x")["input_ids"]
                at = framed.index(token)
                ids = framed[:at] + ids + framed[at + 1 :]
        if not ids:
            raise HTTPException(400, "the prompt has no tokens: send some text.")
        data = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
        return BatchEncoding(data)

    def apply_chat_template(self, conversation: list[dict], **kwargs: Any) -> BatchEncoding:
        """Return the ids of a conversation in the model's chat format."""
        kwargs = {name: value for name, value in kwargs.items() if name not in _OF_TOKENIZATION}
        text = self._tokenizer_of_model.apply_chat_template(conversation, tokenize=False, **kwargs)
        return self(text, add_special_tokens=False)


class _QueueStreamer:
    """Puts final text into the queue that transformers' handlers read."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.queue: asyncio.Queue[Any] = asyncio.Queue()
        self.request: Request | None = None

    @property
    def total_tokens(self) -> int:
        """New tokens so far; one less than the limit when the text ended by itself at the limit."""
        return _counted(self.request)

    def put(self, text: str) -> None:
        """Show text; called from the batcher's thread."""
        self.loop.call_soon_threadsafe(self.queue.put_nowait, text)

    def end(self, error: BaseException | None) -> None:
        """End the stream, with an error if there is one."""
        item = None if error is None else _StreamError(json.dumps(str(error))[1:-1])
        self.loop.call_soon_threadsafe(self.queue.put_nowait, item)

    def cancel(self) -> None:
        """Stop writing: the client has left."""
        if self.request is not None:
            self.request.cancelled.set()


def _counted(request: Request | None) -> int:
    return 0 if request is None else len(request.written)


class BatchedGeneration(BaseGenerateManager):
    """Generation of one model for all requests, by a [`Batcher`]."""

    def __init__(self, batcher: Batcher) -> None:
        self.batcher = batcher

    def generate_streaming(
        self,
        model: Any,
        processor: Any,
        inputs: dict,
        gen_config: GenerationConfig,
        request_id: str,
        response_parser: Any = None,
    ) -> tuple[asyncio.Queue, Any]:
        """Queue a request whose text is streamed."""
        streamer = _QueueStreamer(asyncio.get_running_loop())
        streamer.request = self._submit(inputs, gen_config, streamer.put, streamer.end)
        return streamer.queue, streamer

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: dict, gen_config: GenerationConfig, request_id: str
    ) -> tuple[str, int, list[int]]:
        """Queue a request and wait for its text; a client that leaves cancels it."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future = loop.create_future()

        def end(error: BaseException | None) -> None:
            def settle() -> None:
                if not done.done():
                    done.set_result(None) if error is None else done.set_exception(error)

            loop.call_soon_threadsafe(settle)

        request = self._submit(inputs, gen_config, None, end)
        try:
            await done
        except asyncio.CancelledError:
            request.cancelled.set()
            raise
        return request.text, len(request.prompt), request.written

    def stop(self) -> None:
        """End all requests."""
        self.batcher.close()

    def _submit(self, inputs: dict, config: GenerationConfig, on_text: Callable | None, on_end: Callable) -> Request:
        ids = inputs["input_ids"]
        prompt = (ids.tolist() if hasattr(ids, "tolist") else ids)[0]
        seed = config.__dict__.pop("seed", None)
        return self.batcher.submit(Request(prompt, config, seed, on_text, on_end))


class _State(GenerationState):
    """The generation state of transformers' handlers, with one manager."""

    def __init__(self, manager: BatchedGeneration) -> None:
        super().__init__()
        self.manager = manager

    def use_continuous_batching(self, model: Any, modality: Modality) -> bool:
        """Return False: transformers' own batching pages autoregressive caches."""
        return False

    def get_manager(self, model_id: str, use_cb: bool = False) -> BaseGenerateManager:
        """Return the one manager."""
        return self.manager


class _Checked:
    """Checks of a request that transformers' handlers leave out; mixed into both of them."""

    settings: ServeSettings
    _valid_params_class: Any

    def _validate_request(self, body: dict) -> None:
        known = getattr(self._valid_params_class, "__mutable_keys__", set()) | set(GENERATION_FIELDS)
        unknown = sorted(set(body) - known)
        if unknown:
            raise HTTPException(422, f"unknown field {', '.join(map(repr, unknown))}: remove it.")
        for name, neutral in _NEUTRAL.items():
            if name in body and body[name] not in neutral:
                raise HTTPException(400, f"{name}={body[name]!r} is not supported: leave it out.")
        limits = {
            "temperature": (0, 100),
            "top_p": (0, 1),
            "max_tokens": (1, 10**6),
            "max_completion_tokens": (1, 10**6),
        }
        for name, (low, high) in limits.items():
            value = body.get(name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
                raise HTTPException(400, f"{name}={value!r}: expected a number.")
            if value is not None and not low <= value <= high:
                raise HTTPException(400, f"{name}={value!r}: expected a number from {low} to {high}.")
        seed = body.get("seed")
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
            raise HTTPException(400, f"seed={seed!r}: expected an integer.")
        stop = body.get("stop")
        if stop is not None and not (isinstance(stop, str) or all(isinstance(text, str) for text in stop)):
            raise HTTPException(400, f"stop={stop!r}: expected a string or a list of strings.")

    def _build_generation_config(
        self, body: dict, model_generation_config: GenerationConfig, use_cb: bool = False
    ) -> GenerationConfig:
        """Return the fields of a request on top of those of the command line, on top of those of the folder."""
        ours = {name: body[name] for name in GENERATION_FIELDS if name in body}
        given = body.get("generation_config")
        if given is not None:
            try:
                ours = {**(json.loads(given) if isinstance(given, str) else dict(given)), **ours}
            except ValueError as error:
                raise HTTPException(400, f"generation_config is not a JSON object: {error}.") from error
        base = model_generation_config.to_dict()
        unknown = sorted(set(ours) - set(base))
        if unknown:
            raise HTTPException(400, f"generation_config has no field {', '.join(map(repr, unknown))}.")
        # The seed is of this request alone; transformers' handler would set that of the whole process.
        rest = {name: value for name, value in body.items() if name not in ("generation_config", "seed")}
        limits = {"max_new_tokens": self.settings.max_tokens, "max_length": None}
        # Sampling is what clients of this interface expect; temperature 0 turns it off.
        made = type(model_generation_config).from_dict(
            {**base, "do_sample": True, **limits, **self.settings.defaults, **ours}
        )
        limit = made.max_new_tokens
        config = super()._build_generation_config(rest, made, use_cb=use_cb)  # type: ignore[misc]
        if body.get("max_tokens") is None and body.get("max_completion_tokens") is None:
            config.max_new_tokens = limit  # which transformers raises to 1,024
        if body.get("temperature") == 0:
            config.temperature = 1.0
        config.seed = body.get("seed")
        return config


class _Completions(_Checked, CompletionHandler):
    pass


class _Chat(_Checked, ChatCompletionHandler):
    async def handle_request(self, body: dict, request_id: str) -> Any:
        tokenizer = self.model_manager.load_model_and_processor("")[1]
        if getattr(tokenizer, "chat_template", None) is None:
            raise HTTPException(400, "this model has no chat template: use /v1/completions.")
        messages = body.get("messages")
        if (
            not isinstance(messages, list)
            or not all(isinstance(m, dict) and "role" in m for m in messages)
            or not messages
        ):
            raise HTTPException(400, "messages: expected a list of objects with a role and a content.")
        return await super().handle_request(body, request_id)


def make_app(model: Any, tokenizer: Any, settings: ServeSettings) -> FastAPI:
    """Return the application that serves one model.

    Args:
        model: any model with `generate`, in evaluation mode.
        tokenizer: its tokenizer.
    """
    batcher = Batcher(model, tokenizer, max_batch_size=settings.max_batch_size, max_waiting=settings.max_waiting)
    manager, state = LoadedModel(settings.model, model, tokenizer), _State(BatchedGeneration(batcher))
    completions, chat = _Completions(manager, state), _Chat(manager, state)
    completions.settings = chat.settings = settings
    app = build_server(
        manager,
        chat,
        completion_handler=completions,
        response_handler=ResponseHandler(manager, state),
        transcription_handler=TranscriptionHandler(manager, state),
        systemone_handler=SystemOneHandler(manager, state),
        generation_state=state,
    )
    # Routes of other kinds of models, and those that load and unload: this server has one model.
    app.router.routes = [route for route in app.router.routes if getattr(route, "path", "") in ROUTES]
    _add_errors(app)
    _add_access(app, settings)
    app.add_api_route("/metrics", lambda: PlainTextResponse(_metrics(batcher)), methods=["GET"])
    app.state.batcher = batcher
    return app


def _metrics(batcher: Batcher) -> str:
    """Return the counts in Prometheus' text format."""
    return "".join(f"bd3lm_{name} {value:g}\n" for name, value in batcher.statistics().items())


def _add_errors(app: FastAPI) -> None:
    """Answer every failure in OpenAI's form, without a traceback."""

    def answer(status: int, message: str) -> JSONResponse:
        kind = "invalid_request_error" if status < 500 else "server_error"
        return JSONResponse({"error": {"message": message, "type": kind, "code": status}}, status_code=status)

    @app.exception_handler(404)
    @app.exception_handler(405)
    @app.exception_handler(HTTPException)
    async def refused(_request: HTTPRequest, error: HTTPException) -> JSONResponse:
        return answer(error.status_code, str(error.detail))

    @app.exception_handler(RequestValidationError)
    async def not_an_object(_request: HTTPRequest, _error: RequestValidationError) -> JSONResponse:
        return answer(422, "the body must be a JSON object, sent with the header 'Content-Type: application/json'.")

    @app.exception_handler(QueueFullError)
    async def busy(_request: HTTPRequest, error: QueueFullError) -> JSONResponse:
        response = answer(429, str(error))
        response.headers["Retry-After"] = "1"
        return response

    async def bad_input(_request: HTTPRequest, error: Exception) -> JSONResponse:
        return answer(400, " ".join(str(error).split()))

    # What generate, the tokenizer and the chat template say of a request's fields.
    for kind in (ValueError, TypeError, KeyError, TemplateError):
        app.add_exception_handler(kind, bad_input)


def _add_access(app: FastAPI, settings: ServeSettings) -> None:
    """Let in only requests with the key, and with a JSON object of bounded size."""

    @app.middleware("http")
    async def check(request: HTTPRequest, call_next: Callable) -> Any:
        def refuse(status: int, message: str) -> JSONResponse:
            body = {"error": {"message": message, "type": "invalid_request_error", "code": status}}
            return JSONResponse(body, status_code=status)

        if settings.api_key is not None and request.url.path != "/health":
            key = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
            if not secrets.compare_digest(key.encode(), settings.api_key.encode()):
                return refuse(401, "the API key is missing or wrong: send it as 'Authorization: Bearer KEY'.")
        if request.method == "POST":
            try:
                body = json.loads(await request.body())
            except ValueError:
                return refuse(400, "the request is not valid JSON.")
            if not isinstance(body, dict):
                return refuse(400, "the request must be a JSON object.")
        return await call_next(request)


__all__ = ["GENERATION_FIELDS", "LoadedModel", "ServeSettings", "make_app"]
