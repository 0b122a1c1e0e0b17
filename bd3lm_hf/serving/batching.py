"""Continuous batching: requests wait in a queue, and join and leave the running groups between blocks.

Requests with the same settings form a group: one call of `generate` writes the next blocks of all its rows. Groups
with different settings take turns. A request's random numbers depend only on its seed and its number of tokens so far,
so its text does not depend on other requests.

Each row brings the keys and values of its finished blocks, so nothing is computed twice: whenever the rows of a group
change, their caches are joined again.
"""

import contextlib
import copy
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, StoppingCriteriaList

from bd3lm_hf.checkpoints import window_of
from bd3lm_hf.generation.text_generation import pad_left
from bd3lm_hf.modeling.cache_bd3lm import BlockCache, StepCache
from bd3lm_hf.modeling.decoding_state_bd3lm import BlockCriteria
from bd3lm_hf.modeling.layers_bd3lm import PrepackedLinears
from bd3lm_hf.modeling.windows_bd3lm import fills_window
from bd3lm_hf.serving.requests import Request


# How long the worker waits for the next requests of clients it has just answered: a share of a block's time, and the
# maximum in seconds.
_PATIENCE, _MAX_PATIENCE = 0.1, 0.05

_ROUND_TOKENS = 32  # tokens each row gets before another group runs

_Row = tuple[Request, int]  # a request and the index of the first of its tokens that the model still reads
_Layers = list[tuple[torch.Tensor, torch.Tensor]]  # a row's keys and values of each layer, (tokens, heads, head_dim)


class QueueFullError(RuntimeError):
    """The queue of waiting requests is full."""


class ServerStoppedError(RuntimeError):
    """The server no longer answers requests."""


class Batcher:
    """Generate the text of all requests to one model, in a separate thread.

    Args:
        max_batch_size: requests that are generated at the same time.
        max_waiting: requests that may wait in the queue; further ones are refused.

    Raises:
        ValueError: if the model is not one of this package.
        QueueFullError: by `submit`, if too many requests are waiting.
        ServerStoppedError: by `submit`, after `close` or a crash of the worker.
    """

    def __init__(self, model: Any, tokenizer: Any, *, max_batch_size: int = 8, max_waiting: int = 64) -> None:
        if not hasattr(model, "generator_per_row"):
            raise ValueError(
                f"bd3lm serve serves the models of this package, and this is a {type(model).__name__}: adapt it with "
                f"`bd3lm convert`, or serve it with `transformers serve`."
            )
        self.model, self.tokenizer = model, tokenizer
        self.max_batch_size, self.max_waiting = max_batch_size, max_waiting
        self.tokens = self.requests = 0  # generated tokens and finished requests so far
        self.busy_seconds = 0.0
        self._answered = 0  # requests that the last call finished
        self._block_seconds = 0.0  # time per block in the last call
        self._waiting: deque[Request] = deque()
        self._groups: deque[RowGroup] = deque()  # the first one runs next
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="bd3lm-batcher", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Queue a request; its callbacks report its text and its end."""
        with self._changed:
            if self._closed:
                raise ServerStoppedError("the server has stopped: restart it, or try again later.")
            if len(self._waiting) >= self.max_waiting:
                raise QueueFullError(f"{len(self._waiting)} requests are waiting already: try again later.")
            self._waiting.append(request)
            self._changed.notify()

    def statistics(self) -> dict[str, float]:
        """Return totals since the start and the current load."""
        with self._changed:
            return {
                "requests_finished": self.requests,
                "requests_running": self._num_running(),
                "requests_waiting": len(self._waiting),
                "tokens_generated": self.tokens,
                "tokens_per_second": self.tokens / self.busy_seconds if self.busy_seconds else 0.0,
            }

    def is_alive(self) -> bool:
        """Return whether requests are accepted and answered."""
        return self._thread.is_alive() and not self._closed

    def close(self) -> None:
        """End the running requests after their block and refuse new ones."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout=30)

    # --- The worker's thread -----------------------------------------------------------------------------------------

    def _work(self) -> None:
        reason: BaseException = ServerStoppedError("the server is shutting down")
        try:
            self._serve()
        except BaseException as error:
            reason = error  # a bug in this class: clients must not wait for an answer that never comes
            raise
        finally:
            with self._changed:
                self._closed = True
                requests = self._requests()
            for request in requests:
                self._end(request, reason)

    def _serve(self) -> None:
        """Alternate between admitting requests and running one of the groups, until the server closes."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._groups or self._closed)
                self._wait_for_answered_clients()
                if self._closed:
                    return
                for request in self._requests():
                    if request.cancelled.is_set():
                        self._end(request, None)
                self._admit()
                group = self._groups[0] if self._groups else None
            if group is not None:
                self._write(group)
                if self._groups and self._groups[0] is group:
                    self._groups.rotate(-1)

    def _wait_for_answered_clients(self) -> None:
        """Wait a moment for the next requests of clients that were just answered.

        A block costs hardly more with their rows than without, and they would miss it by milliseconds.
        """
        answered, self._answered = self._answered, 0
        patience = min(_PATIENCE * self._block_seconds, _MAX_PATIENCE)
        self._changed.wait_for(lambda: len(self._waiting) >= answered or self._closed, patience)

    def _requests(self) -> list[Request]:
        return [*(request for group in self._groups for request in group.rows), *self._waiting]

    def _num_running(self) -> int:
        return sum(len(group.rows) for group in self._groups)

    def _admit(self) -> None:
        """Start waiting requests in order of arrival: in the first group that accepts them, or else in a new one."""
        while self._waiting and self._num_running() < self.max_batch_size:
            request = self._waiting.popleft()
            group = next((group for group in self._groups if group.accepts(request)), None)
            if group is None:
                self._groups.append(RowGroup(self.model, self.tokenizer, request))
            else:
                group.rows.append(request)

    def _write(self, group: "RowGroup") -> None:
        """Run one call for a group and end its finished requests."""
        before, started = sum(len(request.written) for request in group.rows), time.perf_counter()

        def should_yield() -> bool:
            with self._changed:
                written = sum(len(request.written) for request in group.rows) - before
                round_is_over = len(self._groups) > 1 and written >= _ROUND_TOKENS * len(group.rows)
                can_admit = bool(self._waiting) and self._num_running() < self.max_batch_size
                return round_is_over or can_admit or self._closed

        try:
            blocks = group.write(should_yield)
        except Exception as error:
            self._isolate(group, error)
            return
        with self._changed:
            seconds = time.perf_counter() - started
            self.busy_seconds += seconds
            self._block_seconds = seconds / max(1, blocks)
            self.tokens += sum(len(request.written) for request in group.rows) - before
            ended = [request for request in group.rows if request.finish_reason is not None]
            self._answered = len(ended)
        for request in ended:
            self._end(request, None)

    def _isolate(self, group: "RowGroup", error: Exception) -> None:
        """Retry each row in its own group after an error: a single row may have caused it."""
        if len(group.rows) == 1:
            self._end(group.rows[0], error)
            return
        with self._changed:
            self._groups.remove(group)
            for request in group.rows:
                self._groups.append(RowGroup(self.model, self.tokenizer, request))

    def _end(self, request: Request, error: BaseException | None) -> None:
        with self._changed:
            for group in self._groups:
                group.rows = [row for row in group.rows if row is not request]
            self._groups = deque(group for group in self._groups if group.rows)
            self._waiting = deque(waiting for waiting in self._waiting if waiting is not request)
            self.requests += 1
            request.error = error
        if request.on_end is not None:
            # The client's event loop may already be closed.
            with contextlib.suppress(RuntimeError):
                request.on_end(error)


class RowGroup:
    """The running requests with one set of settings.

    The length of a call depends on the model:
    - A block-diffusion model can end its call after any block, and keeps the cache.
    - A model without a block cache (SSD-LM, time-conditioned models) can too, but reads the text again in every call.
    - A model whose block fills the window denoises a text as a whole; only rows of equal length share a call.
    - An autoregressive model draws all rows from one generator. A sampled row runs alone, in calls of fixed length, so
      its text does not depend on other requests.

    Args:
        model: in evaluation mode.
        tokenizer: decodes the text of the requests.
        first: the first request.
    """

    def __init__(self, model: Any, tokenizer: Any, first: Request) -> None:
        self.model, self.tokenizer, self.rows = model, tokenizer, [first]
        self.block_size = int(getattr(model.config, "block_size", None) or 1)
        self.window = window_of(model)
        if getattr(model.config, "has_learned_positions", False):
            # A call generates whole blocks after the longest row, and they need positions too.
            self.window = min(self.window, model.config.max_position_embeddings // self.block_size * self.block_size)
            self.window -= self.block_size
        self.in_one_piece = self.block_size >= self.window
        self.per_row: bool = model.generator_per_row
        self.has_block_cache = _has_block_cache(model)
        self._cache: tuple[list[_Row], Any] | None = None  # rows of the last call and their cache

    def accepts(self, request: Request) -> bool:
        """Return whether a request can join now without changing the text of any row."""
        first, config = self.rows[0], request.config
        # transformers' own loop does not report which rows these criteria have ended.
        ends_early = getattr(config, "entropy_stop", None) is not None or getattr(config, "stop_at_second_eos", False)
        if first.key != request.key or (not self.per_row and (config.do_sample or ends_early)):
            return False
        return not self.in_one_piece or (first.remaining == request.remaining and not first.written)

    @torch.inference_mode()
    def write(self, should_yield: Callable[[], bool]) -> int:
        """Append blocks to the rows until one ends or is cancelled, or `should_yield()` is true after a block.

        Returns:
            the number of blocks generated.
        """
        rows = [(request, self._start(request)) for request in self.rows]
        texts = [(request.prompt + request.written)[start:] for request, start in rows]
        max_blocks = self._max_blocks(texts)
        # Whether the call can end after any block without changing the text.
        can_pause = self.per_row and not self.in_one_piece
        criteria = _RowCriteria(self.rows, self.tokenizer, max_blocks, should_yield if can_pause else lambda: False)
        cache = self._take_cache(rows, texts)
        for request in self.rows:
            request.reseed()
        generators: Any = [request.generator for request in self.rows]
        output = self.model.generate(
            **pad_left(texts, self.model.device),
            generation_config=_call_config(self.rows[0].config, self._max_new_tokens(max_blocks)),
            generator=generators if self.per_row else generators[0],
            stopping_criteria=StoppingCriteriaList([criteria]),
            **({} if cache is None else {"past_key_values": cache}),
        )
        criteria.finish()
        kept = getattr(output, "past_key_values", None)
        if kept is not None and kept.get_seq_length() and (self.has_block_cache or len(self.rows) == 1):
            self._cache = (rows, kept)
        return criteria.num_blocks

    def _max_new_tokens(self, max_blocks: int | None) -> int:
        longest = max(request.remaining for request in self.rows)
        if max_blocks is None:
            return longest
        # Whole blocks: a block that is only partly requested would be denoised differently than in a batch.
        return min(-(-longest // self.block_size) + 1, max_blocks) * self.block_size

    def _max_blocks(self, texts: list[list[int]]) -> int | None:
        """Return the most blocks that the call may write; None if it runs to the end of the text."""
        if self.in_one_piece:
            return None
        if not self.per_row:
            return _ROUND_TOKENS
        # No row outgrows its window within a call.
        size = self.block_size
        return max(1, (self.window - max(map(len, texts)) // size * size) // size)

    def _start(self, request: Request) -> int:
        """Return the index of the first token that the model still reads, a function of the row's length alone.

        With a cache, a text that has outgrown the window moves it by a quarter at a time, and is read again only then.
        """
        length, size = len(request.prompt) + len(request.written), self.block_size
        if self.in_one_piece:
            return 0
        if request.written and getattr(request.config, "context", None) == "previous_block":
            return length - size  # after its first block, such an SSD-LM reads only the previous one
        exact = getattr(request.config, "window", None) == "exact" or (self.per_row and not self.has_block_cache)
        stride = size if exact else max(1, self.window // (4 * size)) * size
        too_many = length // size * size + size - self.window
        return max(0, -(-too_many // stride) * stride)

    def _take_cache(self, rows: list[_Row], texts: list[list[int]]) -> Any:
        """Return a cache of the finished blocks of the rows, except the last one of each."""
        (cached_rows, cache), self._cache = self._cache or ([], None), None
        if cached_rows == rows:
            return cache
        if not self.has_block_cache:
            return None
        size = self.block_size
        kept = {} if cache is None else dict(zip(cached_rows, _split_cache(cache, len(cached_rows)), strict=True))
        # `generate` writes the last finished block together with the first step of the next one.
        finished = [text[: max(0, len(text) // size * size - size)] for text in texts]
        layers = [kept.get(row, []) for row in rows]
        unread = [
            index
            for index, (own, text) in enumerate(zip(layers, finished, strict=True))
            if (len(own[0][0]) if own else 0) != len(text)
        ]
        if unread:
            with PrepackedLinears(self.model):
                for index in unread:
                    layers[index] = self._read(finished[index])
        ends = torch.tensor([len(text) // size * size for text in texts], device=self.model.device)
        return _join_caches(self.model, layers, ends.max() - ends)

    def _read(self, tokens: list[int]) -> _Layers:
        """Run the finished blocks of one row through the network and return their keys and values."""
        network, cache = self.model.decoding_network(), BlockCache(self.model.config)
        ids = torch.tensor([tokens], device=self.model.device)
        positions = torch.arange(len(tokens), device=self.model.device).unsqueeze(0)
        network.hidden(ids, positions, None, None, cache=StepCache(cache, len(tokens)))
        return _split_cache(cache, 1)[0]


class _RowCriteria(BlockCriteria):
    """Pass each block to its rows; end the call when a row has ended or other requests should run."""

    def __init__(
        self, rows: list[Request], tokenizer: Any, max_blocks: int | None, should_yield: Callable[[], bool]
    ) -> None:
        self.rows, self.tokenizer, self.max_blocks, self.should_yield = list(rows), tokenizer, max_blocks, should_yield
        self.num_blocks, self.ended = 0, False

    def end_block(self, new_tokens: list[list[int]], finished: list[bool]) -> bool:
        self.num_blocks += 1
        for request, tokens, has_ended in zip(self.rows, new_tokens, finished, strict=True):
            request.take(tokens, self.tokenizer, has_ended)
            request.reseed()
        over = [request.finish_reason is not None or request.cancelled.is_set() for request in self.rows]
        # Rows that are denoised as a whole stay together until all are over.
        can_end = all(over) if self.max_blocks is None else any(over)
        self.ended = can_end or self.num_blocks == self.max_blocks or self.should_yield()
        return self.ended

    def finish(self) -> None:
        """Finish the rows if `generate` ended the call on a criterion that it does not report."""
        if not self.ended:
            for request in self.rows:
                request.take([], self.tokenizer, finished=True)


def _has_block_cache(model: Any) -> bool:
    return (
        hasattr(model, "decoding_network")
        and model.generator_per_row
        and not model.config.time_conditioning  # keys depend on the noise level
        and not fills_window(model.config)
        and model.generation_config.use_cache is not False
        and model.generation_config.cache_implementation in (None, "dynamic")
    )


def _call_config(config: GenerationConfig, tokens: int) -> GenerationConfig:
    """Return the settings of one call; each row applies its own stop strings and limit."""
    made = copy.deepcopy(config)
    made.max_new_tokens, made.max_length, made.stop_strings = tokens, None, None
    made.return_dict_in_generate = True
    if made.pad_token_id is None:
        ends = made.eos_token_id
        made.pad_token_id = ends[0] if isinstance(ends, list) else 0 if ends is None else ends
    return made


def _split_cache(cache: Any, num_rows: int) -> list[_Layers]:
    """Split a cache into views, one per row; rows may begin at different columns."""
    begins = [0] * num_rows if cache.row_start is None else cache.row_start.tolist()
    # (tokens, batch, heads, head_dim)
    layers = [(layer.keys.permute(2, 0, 1, 3), layer.values.permute(2, 0, 1, 3)) for layer in cache.layers]
    return [[(keys[begin:, row], values[begin:, row]) for keys, values in layers] for row, begin in enumerate(begins)]


def _join_caches(model: Any, rows: list[_Layers], starts: torch.Tensor) -> BlockCache:
    """Join rows into one cache; they begin at the columns `starts` and end at the same column."""
    cache = BlockCache(model.config)
    longest: _Layers = max(rows, key=len)
    for index, example in enumerate(longest):
        nothing = tuple(states[:0] for states in example)  # of a row without a finished block, which has no layers
        of_rows = zip(*(row[index] if row else nothing for row in rows), strict=True)
        # The padding before a row is masked, but must be finite: it enters products.
        keys, values = (pad_sequence(list(states), batch_first=True, padding_side="left") for states in of_rows)
        cache.update(keys.transpose(1, 2), values.transpose(1, 2), index)
    cache.row_start = starts if starts.any() else None
    return cache
