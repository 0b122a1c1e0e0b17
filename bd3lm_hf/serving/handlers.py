"""transformers' handlers of the two endpoints, with the checks that they leave out and OpenAI's form of answers."""

import json
from typing import Any

from fastapi import HTTPException
from fastapi.responses import JSONResponse, StreamingResponse
from transformers import GenerationConfig
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler

from bd3lm_hf.serving.conversation import check_template_fields, checked_messages
from bd3lm_hf.serving.event_stream import openai_events, with_nulls
from bd3lm_hf.serving.request_fields import check_fields, own_fields
from bd3lm_hf.serving.settings import ServeSettings


class _Handler:
    """Mixed into transformers' handlers of both endpoints."""

    settings: ServeSettings
    _valid_params_class: Any

    async def handle_request(self, body: dict, request_id: str) -> Any:
        """Answer a request whose fields are known to fit."""
        # A field that is null is one that is missing.
        body = {name: value for name, value in body.items() if value is not None}
        check_fields(body, set(self._valid_params_class.__mutable_keys__))
        response = await super().handle_request(self._checked(body), request_id)  # type: ignore[misc]
        if isinstance(response, StreamingResponse):
            include_usage = bool(body.get("stream_options", {}).get("include_usage"))
            response.body_iterator = await openai_events(response.body_iterator, include_usage)  # type: ignore[arg-type]
            return response
        return JSONResponse(with_nulls(json.loads(response.body)))

    def _checked(self, body: dict) -> dict:
        """Return a body whose text is known to fit the endpoint."""
        raise NotImplementedError

    def _validate_request(self, body: dict) -> None:
        pass  # `check_fields` says more

    def _build_generation_config(
        self, body: dict, model_generation_config: GenerationConfig, use_cb: bool = False
    ) -> GenerationConfig:
        """Return the fields of a request on top of those of the command line, on top of those of the folder."""
        ours = own_fields(body, model_generation_config)
        limits = {"max_new_tokens": self.settings.max_tokens, "max_length": None}
        # Sampling is what clients of this interface expect; temperature 0 turns it off.
        fields = {"do_sample": True, **limits, **self.settings.defaults, **ours}
        made = type(model_generation_config).from_dict({**model_generation_config.to_dict(), **fields})
        limit = made.max_new_tokens
        # The seed is of this request alone; transformers' handler would set that of the whole process.
        rest = {name: value for name, value in body.items() if name not in ("generation_config", "seed")}
        config = super()._build_generation_config(rest, made, use_cb=use_cb)  # type: ignore[misc]
        if body.get("max_tokens") is None and body.get("max_completion_tokens") is None:
            config.max_new_tokens = limit  # which transformers raises to 1,024
        if config.temperature == 0:
            config.temperature, config.do_sample = 1.0, False
        config.seed = body.get("seed")
        return config


class Completions(_Handler, CompletionHandler):
    """Answers `/v1/completions`."""

    def _checked(self, body: dict) -> dict:
        prompt = body.get("prompt", "")
        if isinstance(prompt, list) and len(prompt) == 1:
            (prompt,) = prompt
        if not isinstance(prompt, str):
            raise HTTPException(400, "prompt: expected one text; token ids and several prompts are not supported.")
        return {**body, "prompt": prompt}


class Chat(_Handler, ChatCompletionHandler):
    """Answers `/v1/chat/completions`."""

    def _checked(self, body: dict) -> dict:
        tokenizer = self.model_manager.load_model_and_processor("")[1]
        if getattr(tokenizer, "chat_template", None) is None:
            raise HTTPException(400, "this model has no chat template: use /v1/completions.")
        check_template_fields(body)
        return {**body, "messages": checked_messages(body.get("messages"))}
