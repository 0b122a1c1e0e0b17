"""transformers' server for the models of this package: its application, its request formats, our batching.

What transformers' server lacks for us is added through its own classes: the generation manager of a model, the checks
of a request, and middleware of its FastAPI application.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import FastAPI, HTTPException
from fastapi.responses import PlainTextResponse
from transformers import GenerationConfig
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.systemone import SystemOneHandler
from transformers.cli.serving.transcription import TranscriptionHandler
from transformers.cli.serving.utils import BaseGenerateManager, GenerationState, Modality, _StreamError

from bd3lm_hf.checkpoints import window_of
from bd3lm_hf.serving.access import Access
from bd3lm_hf.serving.batching import Batcher, Request
from bd3lm_hf.serving.errors import add_error_handlers, describe, error_content
from bd3lm_hf.serving.handlers import Chat, Completions
from bd3lm_hf.serving.plain_text import PlainText
from bd3lm_hf.serving.settings import ServeSettings


# `/load_model` is what `transformers chat` asks first; here it only says that the model is ready.
ROUTES = ("/v1/completions", "/v1/chat/completions", "/v1/models", "/load_model", "/health", "/metrics")


class LoadedModel(ModelManager):
    """transformers' model manager around a model that is loaded already, and never unloaded."""

    def __init__(self, name: str, model: Any, tokenizer: Any) -> None:
        super().__init__(force_model=None)
        self.force_model, self._model, self._tokenizer = name, model, PlainText(tokenizer)

    @staticmethod
    def process_model_name(model_id: str) -> str:
        """Return the name as it is: transformers would add a revision, and clients send back the name they got."""
        return model_id

    def load_model_and_processor(self, model_id_and_revision: str, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Return the model and its tokenizer."""
        return self._model, self._tokenizer

    def get_model_modality(self, model: Any, processor: Any = None) -> Modality:  # type: ignore[override]
        """Return that of a language model."""
        return Modality.LLM

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict]:  # type: ignore[override]
        """Return the one model in the form of `/v1/models`."""
        return [{"owned_by": "", "id": self.force_model, "object": "model", "created": 0}]

    async def load_model_streaming(
        self, model_id_and_revision: str, gguf_file: str | None = None
    ) -> AsyncIterator[str]:
        """Yield one event: the model is ready, or another one was asked for."""
        event = {"status": "ready", "model": self.force_model, "cached": True}
        if model_id_and_revision != self.force_model:
            event = {"status": "error", "message": f"this server has one model, {self.force_model}: name that."}
        yield f"data: {json.dumps(event)}\n\n"


class _QueueStreamer:
    """Puts final text into the queue that transformers' handlers read."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.queue: asyncio.Queue[Any] = asyncio.Queue()
        self.request: Request | None = None

    @property
    def total_tokens(self) -> int:
        """New tokens so far."""
        return 0 if self.request is None else len(self.request.written)

    def put(self, text: str) -> None:
        """Show text; called from the batcher's thread."""
        self.loop.call_soon_threadsafe(self.queue.put_nowait, text)

    def end(self, error: BaseException | None) -> None:
        """End the stream, with an error if there is one."""
        # transformers puts the message between quotes; `event_stream.py` reads it.
        item = None if error is None else _StreamError(json.dumps(json.dumps(error_content(*describe(error))))[1:-1])
        self.loop.call_soon_threadsafe(self.queue.put_nowait, item)

    def cancel(self) -> None:
        """Stop writing: the client has left."""
        if self.request is not None:
            self.request.cancelled.set()


class BatchedGeneration(BaseGenerateManager):
    """Generation of one model for all requests, by a [`Batcher`]."""

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

    def _submit(
        self,
        inputs: dict,
        config: GenerationConfig,
        on_text: Callable[[str], None] | None,
        on_end: Callable[[BaseException | None], None],
    ) -> Request:
        (prompt,) = inputs["input_ids"].tolist()
        if len(prompt) > self.window:
            raise ValueError(
                f"the prompt has {len(prompt)} tokens, more than the window of {self.window}: shorten the prompt."
            )
        request = Request(prompt, config, config.__dict__.pop("seed", None), on_text)

        def end(error: BaseException | None) -> None:
            if request.finish_reason == "stop":
                # transformers' handlers take a text for cut off when it has as many tokens as this.
                config.max_new_tokens = None
            on_end(error)

        request.on_end = end
        return self.batcher.submit(request)


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

    def is_cb_alive(self) -> bool:
        """Return whether requests are answered, for `/health`."""
        return self.manager.batcher.is_alive()


def make_app(model: Any, tokenizer: Any, settings: ServeSettings) -> FastAPI:
    """Return the application that serves one model.

    Args:
        model: any model with `generate`, in evaluation mode.
        tokenizer: its tokenizer.

    Raises:
        ValueError: if the model is not one of this package.
    """
    batcher = Batcher(model, tokenizer, max_batch_size=settings.max_batch_size, max_waiting=settings.max_waiting)
    manager, state = LoadedModel(settings.model, model, tokenizer), _State(BatchedGeneration(batcher))
    completions, chat = Completions(manager, state), Chat(manager, state)
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
    app.add_api_route("/v1/models/{name:path}", lambda name: _named_model(manager, name), methods=["GET"])
    app.add_api_route("/metrics", lambda: PlainTextResponse(_metrics(batcher)), methods=["GET"])
    add_error_handlers(app)
    app.add_middleware(Access, api_key=settings.api_key)
    app.state.batcher = batcher
    return app


def _named_model(manager: LoadedModel, name: str) -> dict:
    for model in manager.get_gen_models():
        if model["id"] == name:
            return model
    raise HTTPException(404, f"this server has one model, {manager.force_model}: name that.")


def _metrics(batcher: Batcher) -> str:
    """Return the counts in Prometheus' text format."""
    return "".join(f"bd3lm_{name} {value:g}\n" for name, value in batcher.statistics().items())
