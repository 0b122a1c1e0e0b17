"""One request: decode its new tokens, find where the text ends, and release what is final."""

import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from transformers import GenerationConfig

from bd3lm_hf.seeds import derived_seed


# Fields that may differ between requests that are generated together; all others must agree.
_OWN_FIELDS = ("max_new_tokens", "max_length", "stop_strings", "_from_model_config", "_original_object_hash")
# The last tokens are decoded again with each new one, so multi-token characters and word boundaries come out right.
_DECODED_TOKENS = 64


@dataclass(eq=False)
class Request:
    """One request from its prompt to its last token."""

    prompt: list[int]
    config: GenerationConfig  # `max_new_tokens` and `stop_strings` apply to this request only
    seed: int | None = None  # None draws one
    on_text: Callable[[str], None] | None = None  # called with each piece of text once it is final
    on_end: Callable[[BaseException | None], None] | None = None  # called once, from the worker's thread
    written: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    error: BaseException | None = None  # why it ended without a finish reason
    cancelled: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        if self.seed is None:
            self.seed = secrets.randbits(63)
        self.generator = torch.Generator()
        # Requests with equal keys can be generated in one call.
        fields = {name: value for name, value in self.config.to_dict().items() if name not in _OWN_FIELDS}
        self.key = repr(sorted(fields.items()))
        ends = self.config.eos_token_id
        self._end_tokens = set(ends if isinstance(ends, list) else [ends]) - {None}
        self._ends_left = 1  # end tokens still to come before the text ends
        if getattr(self.config, "stop_at_second_eos", False):
            self._ends_left = max(1, 2 - sum(token in self._end_tokens for token in self.prompt))
        self._final = 0  # characters of `text` that are final
        self._window = 0  # index in `written` of the first token that is decoded again
        self._known = 0  # characters that these tokens decoded to when that index was set
        self._settled = ""  # `text` when that index was set

    @property
    def total_tokens(self) -> int:
        """Number of new tokens, as the streamers of transformers' server name it."""
        return len(self.written)

    def cancel(self) -> None:
        """Stop generating: the client has disconnected."""
        self.cancelled.set()

    def reseed(self) -> None:
        """Seed the random numbers of the next block with the request's seed and its number of tokens so far."""
        self.generator.manual_seed(derived_seed("serve", cast(int, self.seed), len(self.written)))

    @property
    def remaining(self) -> int:
        """Number of tokens that the request may still get."""
        return cast(int, self.config.max_new_tokens) - len(self.written)

    @property
    def stop_strings(self) -> list[str]:
        """Strings that end the text and are not part of it."""
        stop = self.config.stop_strings
        return [text for text in ([stop] if isinstance(stop, str) else stop or []) if text]

    def take(self, tokens: list[int], tokenizer: Any, finished: bool = False) -> None:
        """Append new tokens, and end the request at an end token, a stop string or its limit.

        Args:
            finished: whether a stopping criterion of `generate` ended the row after these tokens.
        """
        if self.finish_reason is not None:
            return
        for token in tokens[: self.remaining]:
            self._ends_left -= token in self._end_tokens
            if self._ends_left == 0:
                self.finish_reason = "stop"
                break
            self.written.append(token)
        self._decode(tokenizer)
        # Final text contains no stop string and not the beginning of one, so the search starts after it.
        found = [at for at in (self.text.find(stop, self._final) for stop in self.stop_strings) if at >= 0]
        if found:
            self._cut(min(found), tokenizer)
            self.finish_reason = "stop"
        elif self.finish_reason is None and self.remaining <= 0:
            self.finish_reason = "length"
        elif finished:
            self.finish_reason = "stop"
        self._show()

    def _decode(self, tokenizer: Any) -> None:
        """Append the text of the new tokens. Only the last tokens are decoded, so the cost is linear in the length."""
        decoded = tokenizer.decode(self.written[self._window :], skip_special_tokens=True)
        self.text = self._settled + decoded[self._known :]
        if len(self.written) - self._window > 4 * _DECODED_TOKENS and not decoded.endswith("\ufffd"):
            self._window = len(self.written) - _DECODED_TOKENS
            self._known = len(tokenizer.decode(self.written[self._window :], skip_special_tokens=True))
            self._settled = self.text

    def _cut(self, length: int, tokenizer: Any) -> None:
        """Keep the first `length` characters, and the tokens that they need."""
        surplus = len(self.text) - length
        decoded = tokenizer.decode(self.written[self._window :], skip_special_tokens=True)
        needed = len(decoded) - surplus
        while len(self.written) > self._window and (
            len(tokenizer.decode(self.written[self._window : -1], skip_special_tokens=True)) >= needed
        ):
            self.written.pop()
        self.text = self.text[:length]

    def _show(self) -> None:
        """Release final text: hold back incomplete characters and possible beginnings of a stop string."""
        stop = len(self.text)
        if self.finish_reason is None:
            # A stop string can begin before an incomplete character and go on with it.
            complete = self.text.rstrip("\ufffd")
            stop = len(complete) - max((_overlap(complete, string) for string in self.stop_strings), default=0)
        if stop > self._final:
            piece, self._final = self.text[self._final : stop], stop
            if self.on_text is not None:
                self.on_text(piece)


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of `text` could begin `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
