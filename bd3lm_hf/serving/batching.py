"""Continuous batching by rounds: rows join and leave a batch between blocks.

A round is one call of `generate` for a few whole blocks of every running request. Requests with the same settings
share it. A row keeps only tokens of blocks that the round finished, and its random numbers depend on its seed and on
how much it has written, so its text does not depend on who else is served. The price of joining and leaving is that
each round reads the texts of a batch again, of long ones the end that the window holds; a row alone keeps its cache.
"""

import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from transformers import GenerationConfig

from bd3lm_hf.seeds import derived_seed


ROUND_TOKENS = 32  # with fewer, reading texts again costs too much; with more, new requests wait too long

# What a row brings itself; all other fields must agree for requests to share a round.
_OF_A_ROW = ("max_new_tokens", "max_length", "stop_strings", "_from_model_config", "_original_object_hash")


class QueueFullError(RuntimeError):
    """More requests are waiting than the server takes."""


@dataclass(eq=False)
class Request:
    """One request from its prompt to its last token.

    Args:
        prompt: token ids.
        config: generation config; `max_new_tokens` and `stop_strings` are those of this request alone.
        seed: of its random numbers; None draws one.
        on_text: gets each piece of text as soon as it is final; nothing of it is taken back.
        on_end: is called once, with an error or None, from the worker's thread.
    """

    prompt: list[int]
    config: GenerationConfig
    seed: int | None = None
    on_text: Callable[[str], None] | None = None
    on_end: Callable[[BaseException | None], None] | None = None
    written: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        if self.seed is None:
            self.seed = secrets.randbits(63)
        self.key = settings_key(self.config)
        self._shown = 0  # characters of `text` that `on_text` has had

    def generator(self) -> torch.Generator:
        """Return the source of randomness of the next round."""
        return torch.Generator().manual_seed(derived_seed("serve", cast(int, self.seed), len(self.written)))

    @property
    def remaining(self) -> int:
        """Tokens that may still be written."""
        return self.config.max_new_tokens - len(self.written)

    @property
    def stop_strings(self) -> list[str]:
        """Strings that end the text and are not part of it."""
        stop = self.config.stop_strings
        return [stop] if isinstance(stop, str) else [text for text in stop or [] if text]

    def take(self, tokens: list[int], tokenizer: Any) -> None:
        """Append the tokens of a round and end the request at an end token, a stop string or its limit."""
        ends = self.config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends]) - {None}
        for token in tokens[: self.remaining]:
            if token in ends:
                self.finish_reason = "stop"
                break
            self.written.append(token)
        self.text = tokenizer.decode(self.written, skip_special_tokens=True)
        found = min((at for at in (self.text.find(stop) for stop in self.stop_strings) if at >= 0), default=-1)
        if found >= 0:
            self._cut(found, tokenizer)
            self.finish_reason = "stop"
        elif self.finish_reason is None and self.remaining <= 0:
            self.finish_reason = "length"
        self._show()

    def _cut(self, length: int, tokenizer: Any) -> None:
        """Keep the first `length` characters, and the tokens that they need."""
        kept, self.text = self.text[:length], self.text[:length]
        while self.written and len(tokenizer.decode(self.written[:-1], skip_special_tokens=True)) >= len(kept):
            self.written.pop()

    def _show(self) -> None:
        """Hand on the text that is final: no character that lacks bytes, no possible start of a stop string."""
        stop = len(self.text)
        if self.finish_reason is None:
            stop -= max((_overlap(self.text, string) for string in self.stop_strings), default=0)
            stop = min(stop, len(self.text.rstrip("\ufffd")))
        if self.on_text is not None and stop > self._shown:
            self.on_text(self.text[self._shown : stop])
            self._shown = stop


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of `text` could begin `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def settings_key(config: GenerationConfig) -> str:
    """Return what two requests must share to be written in one call of `generate`."""
    fields = {name: value for name, value in config.to_dict().items() if name not in _OF_A_ROW}
    return repr(sorted(fields.items()))


class Batcher:
    """Writes the texts of all requests of one model, in a thread of its own.

    Args:
        max_batch_size: requests that are written together.
        max_waiting: requests that wait beside them; one more is refused.

    Raises:
        QueueFullError: by `submit`, if too many requests wait.
    """

    def __init__(self, model: Any, tokenizer: Any, *, max_batch_size: int = 8, max_waiting: int = 64) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.max_batch_size, self.max_waiting = max_batch_size, max_waiting
        self.tokens = self.requests = 0  # written and finished so far
        self.busy_seconds = 0.0
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._cache: tuple[Request, Any] | None = None  # of the row that wrote the last round alone
        size = int(getattr(model.config, "block_size", None) or 1)
        # A model whose block fills the window writes a text as a whole.
        self.block_size = size if size < model.config.max_position_embeddings else None
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="bd3lm-batcher", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> Request:
        """Queue a request; its callbacks tell the rest."""
        with self._changed:
            if self._closed:
                raise QueueFullError("the server is shutting down: try again later.")
            if len(self._waiting) >= self.max_waiting:
                raise QueueFullError(f"{len(self._waiting)} requests are waiting already: try again later.")
            self._waiting.append(request)
            self._changed.notify()
        return request

    def statistics(self) -> dict[str, float]:
        """Return counts since the start and what is going on now."""
        with self._changed:
            return {
                "requests_finished": self.requests,
                "requests_running": len(self._running),
                "requests_waiting": len(self._waiting),
                "tokens_generated": self.tokens,
                "tokens_per_second": self.tokens / self.busy_seconds if self.busy_seconds else 0.0,
            }

    def close(self) -> None:
        """End the running requests after their round and refuse new ones."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout=30)

    def _work(self) -> None:
        try:
            self._serve()
        except BaseException as error:
            # A fault of this class: nobody may wait for an answer that never comes.
            with self._changed:
                self._closed = True
                stranded, self._running, self._waiting = [*self._running, *self._waiting], [], deque()
            for request in stranded:
                self._end(request, error)
            raise

    def _serve(self) -> None:
        """Alternate between taking requests and writing a round, until the server closes."""
        while True:
            with self._changed:
                while not (self._waiting or self._running or self._closed):
                    self._changed.wait()
                if self._closed:
                    ended = [*self._running, *self._waiting]
                    self._running, self._waiting = [], deque()
                else:
                    ended = self._drop_cancelled()
                    self._admit()
                rows = list(self._running)
            for request in ended:
                self._end(request, QueueFullError("the server is shutting down") if self._closed else None)
            if self._closed:
                return
            if rows:
                self._round(rows)

    def _drop_cancelled(self) -> list[Request]:
        gone = [request for request in (*self._running, *self._waiting) if request.cancelled.is_set()]
        self._running = [request for request in self._running if request not in gone]
        self._waiting = deque(request for request in self._waiting if request not in gone)
        return gone

    def _admit(self) -> None:
        """Let waiting requests with the settings of the running ones join, first come first served."""
        while self._waiting and len(self._running) < self.max_batch_size:
            # A request with other settings waits until the batch is empty; none overtakes it.
            if self._running and not self._share_a_round(self._running[0], self._waiting[0]):
                break
            self._running.append(self._waiting.popleft())

    def _share_a_round(self, one: Request, other: Request) -> bool:
        if one.key != other.key or (one.config.do_sample and not self.model.generator_per_row):
            return False
        return self.block_size is not None or one.remaining == other.remaining

    @torch.inference_mode()
    def _round(self, rows: list[Request]) -> None:
        """Write a few blocks of each row."""
        started = time.perf_counter()
        try:
            written = self._generate(rows)
        except Exception as error:
            # One row may be at fault: each is tried alone before it is given up.
            self._cache = None
            if len(rows) > 1:
                for request in rows:
                    self._round([request])
                return
            self._leave(rows[0], error)
            return
        self.busy_seconds += time.perf_counter() - started
        for request, tokens in zip(rows, written, strict=True):
            before = len(request.written)
            request.take(tokens, self.tokenizer)
            self.tokens += len(request.written) - before
            if request.finish_reason is not None:
                self._leave(request, None)

    def _generate(self, rows: list[Request]) -> list[list[int]]:
        """Return the new tokens of each row, up to the end of its last whole block."""
        texts = [self._in_window(request.prompt + request.written) for request in rows]
        width, longest = max(map(len, texts)), max(request.remaining for request in rows)
        count = longest
        if self.block_size is not None:
            blocks = min(-(-ROUND_TOKENS // self.block_size), -(-longest // self.block_size))
            count = (blocks + 1) * self.block_size - 1  # whatever a row begins with, so many blocks are whole
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(texts):
            ids[row, width - len(text) :] = torch.tensor(text, dtype=torch.long)
            mask[row, width - len(text) :] = 1
        generators = [request.generator() for request in rows]
        whole_text = len(texts[0]) == len(rows[0].prompt) + len(rows[0].written)
        kept = self._cache[1] if self._cache is not None and [self._cache[0]] == rows and whole_text else None
        output = self.model.generate(
            ids.to(self.model.device),
            attention_mask=mask.to(self.model.device),
            generation_config=self._config(rows[0].config, count),
            generator=generators if self.model.generator_per_row else generators[0],
            **({} if kept is None else {"past_key_values": kept}),
        )
        cache = getattr(output, "past_key_values", None)
        self._cache = (rows[0], cache) if len(rows) == 1 and cache is not None and cache.get_seq_length() else None
        size = self.block_size or 1
        whole = [(len(text) + count) // size * size - len(text) for text in texts]
        new = output.sequences[:, width:].tolist()
        return [tokens[:length] for tokens, length in zip(new, whole, strict=True)]

    def _in_window(self, text: list[int]) -> list[int]:
        """Return the end of a text that the window holds, from the beginning of a block on."""
        size, window = self.block_size or 1, self.model.config.max_position_embeddings
        return text[max(0, -(-(len(text) - window) // size) * size) :]

    @staticmethod
    def _config(config: GenerationConfig, count: int) -> GenerationConfig:
        fields = {"max_new_tokens": count, "max_length": None, "stop_strings": None, "return_dict_in_generate": True}
        made = type(config).from_dict({**config.to_dict(), **fields})
        if made.pad_token_id is None:
            ends = made.eos_token_id
            made.pad_token_id = ends[0] if isinstance(ends, list) else 0 if ends is None else ends
        return made

    def _leave(self, request: Request, error: BaseException | None) -> None:
        with self._changed:
            self._running = [other for other in self._running if other is not request]
        self._end(request, error)

    def _end(self, request: Request, error: BaseException | None) -> None:
        self.requests += 1
        if request.on_end is not None:
            request.on_end(error)


__all__ = ["Batcher", "QueueFullError", "Request", "settings_key"]
