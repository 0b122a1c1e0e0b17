"""Continuous batching: requests wait in a queue, and join and leave the running groups between blocks.

Requests with the same settings are generated together; groups with different settings take turns. A request's random
numbers depend only on its seed and its number of tokens so far, so its text does not depend on other requests.
"""

import contextlib
import threading
import time
from collections import deque
from typing import Any

from bd3lm_hf.serving.requests import Request
from bd3lm_hf.serving.row_group import ROUND_TOKENS, RowGroup


# How long the worker waits for the next requests of clients it has just answered: a share of a block's time, and the
# maximum in seconds.
_PATIENCE, _MAX_PATIENCE = 0.1, 0.05


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

    def submit(self, request: Request) -> Request:
        """Queue a request; its callbacks report its text and its end."""
        with self._changed:
            if self._closed:
                raise ServerStoppedError("the server has stopped: restart it, or try again later.")
            if len(self._waiting) >= self.max_waiting:
                raise QueueFullError(f"{len(self._waiting)} requests are waiting already: try again later.")
            self._waiting.append(request)
            self._changed.notify()
        return request

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
                requests = [*(row for group in self._groups for row in group.rows), *self._waiting]
                self._groups.clear()
                self._waiting.clear()
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
                cancelled = self._drop_cancelled()
                self._admit()
                group = self._groups[0] if self._groups else None
            for request in cancelled:
                self._end(request, None)
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

    def _num_running(self) -> int:
        return sum(len(group.rows) for group in self._groups)

    def _drop_cancelled(self) -> list[Request]:
        running = (request for group in self._groups for request in group.rows)
        cancelled = [request for request in (*running, *self._waiting) if request.cancelled.is_set()]
        for group in self._groups:
            group.remove(cancelled)
        self._groups = deque(group for group in self._groups if group.rows)
        self._waiting = deque(request for request in self._waiting if request not in cancelled)
        return cancelled

    def _admit(self) -> None:
        """Start waiting requests in order of arrival: in the first group that accepts them, or else in a new one."""
        while self._waiting and self._num_running() < self.max_batch_size:
            request = self._waiting.popleft()
            group = next((group for group in self._groups if group.accepts(request)), None)
            if group is None:
                group = RowGroup(self.model, self.tokenizer)
                self._groups.append(group)
            group.rows.append(request)

    def _write(self, group: RowGroup) -> None:
        """Run one call for a group and end its finished requests."""
        before, started = sum(len(request.written) for request in group.rows), time.perf_counter()

        def should_yield() -> bool:
            with self._changed:
                written = sum(len(request.written) for request in group.rows) - before
                round_is_over = len(self._groups) > 1 and written >= ROUND_TOKENS * len(group.rows)
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
            self._remove(group, ended)
            self._answered = len(ended)
        for request in ended:
            self._end(request, None)

    def _isolate(self, group: RowGroup, error: Exception) -> None:
        """Retry each row in its own group after an error: a single row may have caused it."""
        with self._changed:
            rows = list(group.rows)
            self._remove(group, rows)
            for request in rows if len(rows) > 1 else ():
                alone = RowGroup(self.model, self.tokenizer)
                alone.rows.append(request)
                self._groups.append(alone)
        if len(rows) == 1:
            self._end(rows[0], error)

    def _remove(self, group: RowGroup, requests: list[Request]) -> None:
        group.remove(requests)
        if not group.rows:
            self._groups.remove(group)

    def _end(self, request: Request, error: BaseException | None) -> None:
        self.requests += 1
        if request.on_end is not None:
            # The client's event loop may already be closed.
            with contextlib.suppress(RuntimeError):
                request.on_end(error)
