"""One request: encode its prompt, decode its new tokens, find where the text ends, and release what is final."""

import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from transformers import BatchEncoding, GenerationConfig

from bd3lm_hf.seeds import derived_seed
from bd3lm_hf.tokenization import encode_prompt


# Arguments of `apply_chat_template` that concern tokenization, which is done here.
_TOKENIZATION_ARGUMENTS = ("tokenize", "return_tensors", "return_dict", "load_audio_from_video")


class PlainText:
    """A tokenizer for text sent by clients, with the interface that transformers' handlers call.

    A literal mask token in such a text is encoded as plain characters, never as the mask token.

    Args:
        tokenizer: the model's tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer_of_model, self._mask = tokenizer, getattr(tokenizer, "mask_token", None)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer_of_model, name)

    def __call__(self, text: str, *, add_special_tokens: bool = True, **kwargs: Any) -> BatchEncoding:
        """Return `input_ids` and `attention_mask`, `(1, length)`.

        Raises:
            ValueError: if the text has no tokens or contains a lone surrogate.
        """
        text.encode()  # a tokenizer's own error would claim that such a text is not a string
        if self._mask and self._mask in text:
            ids = self._with_literal_masks(text, add_special_tokens)
        else:
            ids = encode_prompt(text, self._tokenizer_of_model, add_special_tokens=add_special_tokens)
        if not ids:
            raise ValueError("the prompt has no tokens: send some text.")
        data = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
        return BatchEncoding(data)

    def _with_literal_masks(self, text: str, add_special_tokens: bool) -> list[int]:
        encode = self._tokenizer_of_model
        literal = encode(self._mask, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        parts = [encode(part, add_special_tokens=False)["input_ids"] for part in text.split(self._mask)]
        ids: list[int] = parts[0] + [token for part in parts[1:] for token in literal + part]
        if not add_special_tokens:
            return ids
        # The special tokens that this tokenizer puts before a text.
        example = encode("x", add_special_tokens=False)["input_ids"]
        framed: list[int] = encode("x")["input_ids"]
        at = next(at for at in range(len(framed)) if framed[at : at + len(example)] == example)
        return framed[:at] + ids

    def apply_chat_template(self, conversation: list[dict], **kwargs: Any) -> BatchEncoding:
        """Return the ids of a conversation, rendered with the model's chat template."""
        kwargs = {name: value for name, value in kwargs.items() if name not in _TOKENIZATION_ARGUMENTS}
        text = self._tokenizer_of_model.apply_chat_template(conversation, tokenize=False, **kwargs)
        return self(text, add_special_tokens=False)


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
        self._tail = 0  # characters at the end of `text` that the next decoding replaces

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
        self.text = self.text[: len(self.text) - self._tail] + decoded[self._known :]
        self._tail = len(decoded) - self._known
        if len(self.written) - self._window > 4 * _DECODED_TOKENS and not decoded.endswith("\ufffd"):
            self._window = len(self.written) - _DECODED_TOKENS
            self._known = len(tokenizer.decode(self.written[self._window :], skip_special_tokens=True))
            self._tail = 0

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
