"""transformers' server for the models of this package: its application, its request formats, our batching.

What transformers' server lacks for us is added through its own classes: the generation manager of a model, the checks
of a request, and middleware of its FastAPI application.
"""

import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, HTTPException
from fastapi.responses import PlainTextResponse
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.systemone import SystemOneHandler
from transformers.cli.serving.transcription import TranscriptionHandler
from transformers.cli.serving.utils import Modality

from bd3lm_hf.serving.access import Access
from bd3lm_hf.serving.batched_generation import BatchedGeneration, OneModelState
from bd3lm_hf.serving.batching import Batcher
from bd3lm_hf.serving.errors import add_error_handlers
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


def make_app(model: Any, tokenizer: Any, settings: ServeSettings) -> FastAPI:
    """Return the application that serves one model.

    Args:
        model: any model with `generate`, in evaluation mode.
        tokenizer: its tokenizer.

    Raises:
        ValueError: if the model is not one of this package.
    """
    batcher = Batcher(model, tokenizer, max_batch_size=settings.max_batch_size, max_waiting=settings.max_waiting)
    manager, state = LoadedModel(settings.model, model, tokenizer), OneModelState(BatchedGeneration(batcher))
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
