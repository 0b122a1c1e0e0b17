"""Serve a model of this package with transformers' own server and our batching.

What that server lacks is added by subclassing it: a generation manager, handlers of both endpoints with stricter
checks, and middleware for its FastAPI application.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import torch
from fastapi import FastAPI, HTTPException
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from transformers import BatchEncoding, GenerationConfig
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.systemone import SystemOneHandler
from transformers.cli.serving.transcription import TranscriptionHandler
from transformers.cli.serving.utils import BaseGenerateManager, GenerationState, Modality, _StreamError

from bd3lm_hf.checkpoints import window_of
from bd3lm_hf.serving.batching import Batcher
from bd3lm_hf.serving.openai_api import (
    Access,
    add_error_handlers,
    check_fields,
    check_template_fields,
    checked_messages,
    describe,
    error_content,
    openai_events,
    own_fields,
    with_nulls,
)
from bd3lm_hf.serving.requests import Request
from bd3lm_hf.tokenization import encode_plain, encode_prompt


# Generation with our batching


class BatchedGeneration(BaseGenerateManager):
    """Generate for all requests to one model, through a [`Batcher`]."""

    def __init__(self, batcher: Batcher) -> None:
        self.batcher = batcher
        self.window = window_of(batcher.model)

    def generate_streaming(
        self,
        model: Any,
        processor: Any,
        inputs: dict,
        gen_config: GenerationConfig,
        request_id: str,
        response_parser: Any = None,
    ) -> tuple[asyncio.Queue, Any]:
        """Queue a request and return the queue that its text is streamed to, and the request."""
        (prompt,) = inputs["input_ids"].tolist()
        if len(prompt) > self.window:
            raise ValueError(
                f"the prompt has {len(prompt)} tokens, more than the window of {self.window}: shorten the prompt."
            )
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Any] = asyncio.Queue()

        def put(item: Any) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, item)  # called from the batcher's thread

        def end(error: BaseException | None) -> None:
            if request.finish_reason == "stop":
                # transformers' handlers report a text of exactly this many tokens as cut off.
                gen_config.max_new_tokens = None
            if error is None:
                put(None)
                return
            # transformers puts the message between quotes; `openai_events` parses it.
            put(_StreamError(json.dumps(json.dumps(error_content(*describe(error))))[1:-1]))

        request = Request(prompt, gen_config, gen_config.__dict__.pop("seed", None), put, end)
        self.batcher.submit(request)
        return queue, request

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: dict, gen_config: GenerationConfig, request_id: str
    ) -> tuple[str, int, list[int]]:
        """Queue a request and wait for its text; cancel it if the client disconnects."""
        queue, request = self.generate_streaming(model, processor, inputs, gen_config, request_id)
        try:
            while isinstance(await queue.get(), str):
                pass
        except asyncio.CancelledError:
            request.cancel()
            raise
        if request.error is not None:
            raise request.error
        return request.text, len(request.prompt), request.written

    def stop(self) -> None:
        self.batcher.close()


class OneModelState(GenerationState):
    """The generation state of transformers' handlers, with a single manager."""

    def __init__(self, manager: BatchedGeneration) -> None:
        super().__init__()
        self.manager = manager

    def get_manager(self, model_id: str, use_cb: bool = False) -> BaseGenerateManager:
        return self.manager

    def is_cb_alive(self) -> bool:
        """Return whether the server still answers requests, for `/health`."""
        return self.manager.batcher.is_alive()


# The handlers of the two endpoints


class _Handler:
    """A mixin for transformers' handlers of both endpoints."""

    defaults: dict[str, Any]  # fields of `generate` that override those saved with the model
    max_tokens: int  # new tokens for a request that sets no limit
    _valid_params_class: Any

    async def handle_request(self, body: dict, request_id: str) -> Any:
        """Check the fields of a request and answer it."""
        # A null field counts as missing.
        body = {name: value for name, value in body.items() if value is not None}
        check_fields(body, set(self._valid_params_class.__mutable_keys__))
        response = await super().handle_request(self._checked(body), request_id)  # type: ignore[misc]
        if isinstance(response, StreamingResponse):
            include_usage = bool(body.get("stream_options", {}).get("include_usage"))
            response.body_iterator = await openai_events(response.body_iterator, include_usage)  # type: ignore[arg-type]
            return response
        return JSONResponse(with_nulls(json.loads(response.body)))

    def _checked(self, body: dict) -> dict:
        """Return the body after checking its prompt or messages."""
        raise NotImplementedError

    def _validate_request(self, body: dict) -> None:
        pass  # `check_fields` checks more

    def _build_generation_config(
        self, body: dict, model_generation_config: GenerationConfig, use_cb: bool = False
    ) -> GenerationConfig:
        """Return the request's fields over those of the command line, over those saved with the model."""
        ours = own_fields(body, model_generation_config)
        limits = {"max_new_tokens": self.max_tokens, "max_length": None}
        # Clients of this API expect sampling; temperature 0 turns it off.
        fields = {"do_sample": True, **limits, **self.defaults, **ours}
        made = type(model_generation_config).from_dict({**model_generation_config.to_dict(), **fields})
        limit = made.max_new_tokens
        # The seed is this request's alone; transformers' handler would seed the whole process.
        rest = {name: value for name, value in body.items() if name not in ("generation_config", "seed")}
        config = super()._build_generation_config(rest, made, use_cb=use_cb)  # type: ignore[misc]
        if body.get("max_tokens") is None and body.get("max_completion_tokens") is None:
            config.max_new_tokens = limit  # transformers raised it to 1,024
        if config.temperature == 0:
            config.temperature, config.do_sample = 1.0, False
        config.seed = body.get("seed")
        return config


class Completions(_Handler, CompletionHandler):
    """Answer `/v1/completions`."""

    def _checked(self, body: dict) -> dict:
        prompt = body.get("prompt", "")
        if isinstance(prompt, list) and len(prompt) == 1:
            (prompt,) = prompt
        if not isinstance(prompt, str):
            raise HTTPException(400, "prompt: expected one string; token ids and several prompts are not supported.")
        return {**body, "prompt": prompt}


class Chat(_Handler, ChatCompletionHandler):
    """Answer `/v1/chat/completions`."""

    def _checked(self, body: dict) -> dict:
        tokenizer = self.model_manager.load_model_and_processor("")[1]
        if getattr(tokenizer, "chat_template", None) is None:
            raise HTTPException(400, "this model has no chat template: use /v1/completions.")
        check_template_fields(body)
        return {**body, "messages": checked_messages(body.get("messages"))}


# The application


class PlainText:
    """A tokenizer for text sent by clients, with the interface that transformers' handlers call.

    A literal mask token in such a text is encoded as plain characters, never as the mask token.

    Args:
        tokenizer: the model's tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer_of_model = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer_of_model, name)

    def __call__(self, text: str, *, add_special_tokens: bool = True, **kwargs: Any) -> BatchEncoding:
        """Return `input_ids` and `attention_mask`, `(1, length)`.

        Raises:
            ValueError: if the text has no tokens or contains a lone surrogate.
        """
        text.encode()  # a tokenizer's own error would claim that such a text is not a string
        tokenizer = self._tokenizer_of_model
        ids = encode_prompt(text, tokenizer, add_special_tokens=add_special_tokens)
        if tokenizer.mask_token in text:
            literal = tokenizer(tokenizer.mask_token, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            first, *others = (encode_plain(part, tokenizer) for part in text.split(tokenizer.mask_token))
            ids = first + [token for part in others for token in literal + part]
            if add_special_tokens:
                # The special tokens that this tokenizer puts before a text.
                ids = encode_prompt("x", tokenizer)[: -len(encode_plain("x", tokenizer))] + ids
        if not ids:
            raise ValueError("the prompt has no tokens: send some text.")
        data = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
        return BatchEncoding(data)

    def apply_chat_template(self, conversation: list[dict], **kwargs: Any) -> BatchEncoding:
        """Return the ids of a conversation, rendered with the model's chat template."""
        # The caller's arguments for tokenization do not fit text.
        kwargs |= {"tokenize": False, "return_dict": False, "return_tensors": None}
        return self(self._tokenizer_of_model.apply_chat_template(conversation, **kwargs), add_special_tokens=False)


# `transformers chat` calls `/load_model` first; here it only reports that the model is ready.
ROUTES = ("/v1/completions", "/v1/chat/completions", "/v1/models", "/load_model", "/health", "/metrics")


class LoadedModel(ModelManager):
    """transformers' model manager for one model that is already loaded and never unloaded."""

    def __init__(self, name: str, model: Any, tokenizer: Any) -> None:
        super().__init__(force_model=None)
        self.force_model, self._model, self._tokenizer = name, model, PlainText(tokenizer)

    @staticmethod
    def process_model_name(model_id: str) -> str:
        """Return the name unchanged: transformers would append a revision, which clients do not send."""
        return model_id

    def load_model_and_processor(self, model_id_and_revision: str, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        return self._model, self._tokenizer

    def get_model_modality(self, model: Any, processor: Any = None) -> Modality:  # type: ignore[override]
        return Modality.LLM

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict]:  # type: ignore[override]
        """Return the one model in the format of `/v1/models`."""
        return [{"owned_by": "", "id": self.force_model, "object": "model", "created": 0}]

    async def load_model_streaming(
        self, model_id_and_revision: str, gguf_file: str | None = None
    ) -> AsyncIterator[str]:
        """Yield one event: the model is ready, or the client asked for a different one."""
        event = {"status": "ready", "model": self.force_model, "cached": True}
        if model_id_and_revision != self.force_model:
            event = {"status": "error", "message": f"this server has one model, {self.force_model}: use that."}
        yield f"data: {json.dumps(event)}\n\n"


def make_app(
    model: Any,
    tokenizer: Any,
    *,
    name: str,
    defaults: dict[str, Any],
    max_tokens: int,
    api_key: str | None,
    **limits: int,
) -> FastAPI:
    """Return the application that serves one model.

    Args:
        model: any model with `generate`, in evaluation mode.
        name: the model's name in requests.
        defaults, max_tokens: for the handlers of both endpoints.
        api_key: the key that every request must carry; None disables the check.
        limits: for [`Batcher`].

    Raises:
        ValueError: if the model is not one of this package.
    """
    batcher = Batcher(model, tokenizer, **limits)
    manager, state = LoadedModel(name, model, tokenizer), OneModelState(BatchedGeneration(batcher))
    completions, chat = Completions(manager, state), Chat(manager, state)
    completions.defaults = chat.defaults = defaults
    completions.max_tokens = chat.max_tokens = max_tokens
    app = build_server(
        manager,
        chat,
        completion_handler=completions,
        response_handler=ResponseHandler(manager, state),
        transcription_handler=TranscriptionHandler(manager, state),
        systemone_handler=SystemOneHandler(manager, state),
        generation_state=state,
    )
    # Drop the routes for other kinds of models and for loading and unloading: this server has one model.
    app.router.routes = [route for route in app.router.routes if getattr(route, "path", "") in ROUTES]
    app.add_api_route("/v1/models/{name:path}", lambda name: _named_model(manager, name), methods=["GET"])
    app.add_api_route("/metrics", lambda: PlainTextResponse(_metrics(batcher)), methods=["GET"])
    add_error_handlers(app)
    app.add_middleware(Access, api_key=api_key)
    app.state.batcher = batcher
    return app


def _named_model(manager: LoadedModel, name: str) -> dict:
    if name != manager.force_model:
        raise HTTPException(404, f"this server has one model, {manager.force_model}: use that.")
    return manager.get_gen_models()[0]


def _metrics(batcher: Batcher) -> str:
    """Return the counts in Prometheus' text format."""
    return "".join(f"bd3lm_{name} {value}\n" for name, value in batcher.statistics().items())
