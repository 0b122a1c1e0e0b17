"""Let transformers' handlers get text from our batching: the generation manager of a model, and what finds it."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

from transformers import GenerationConfig
from transformers.cli.serving.utils import BaseGenerateManager, GenerationState, Modality, _StreamError

from bd3lm_hf.checkpoints import window_of
from bd3lm_hf.serving.batching import Batcher, Request
from bd3lm_hf.serving.errors import describe, error_content


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


class OneModelState(GenerationState):
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
