"""What the lm-evaluation-harness asks of a model, in our words: windows, seeds, and arguments of `generate`."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from bd3lm_hf.evaluation import seed_of


_LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class Window(NamedTuple):
    """What the model reads at once: tokens, of which the first are given."""

    ids: list[int]
    given: int

    @property
    def scored(self) -> range:
        """The places of the tokens that are not given."""
        return range(self.given, len(self.ids))

    @property
    def labelled(self) -> dict[str, list[int]]:
        """As arguments of `token_nll`: what is given has no label."""
        return {"input_ids": self.ids, "labels": [-100] * self.given + self.ids[self.given :]}


class Writing(NamedTuple):
    """What a request asks to write."""

    new_tokens: int
    until: tuple[str, ...]
    fields: dict[str, Any]  # of `generate`


def windows(context: Sequence[int], continuation: Sequence[int], length: int) -> list[Window]:
    """Windows of at most `length` tokens in which each token of a continuation is scored once.

    One window, whose context loses its beginning where there is no room for it. A continuation that has no room
    itself is cut: its first part has the last token of the context before it, the others what precedes them; the last
    one, which is shorter, has a context as long as possible.

    Args:
        context: not empty.
    """
    room = length - 1
    if len(continuation) <= room:
        kept = list(context[-(length - len(continuation)) :])
        return [Window([*kept, *continuation], len(kept))]
    text = [context[-1], *continuation]
    found = []
    for begin in range(1, len(text), room):
        end = min(begin + room, len(text))
        first = max(0, end - length)
        found.append(Window(text[first:end], begin - first))
    return found


def question_seed(seed: int, request: Any) -> int:
    """The seed of the question that a request belongs to: all choices of a question have the same."""
    asked = [request.task_name, request.doc_id] if request.doc_id is not None else [request.args[0]]
    digest = hashlib.sha256(json.dumps(asked).encode()).digest()
    return seed_of(seed, int.from_bytes(digest[:8], "big"))


def writing_of(asked: dict[str, Any], new_tokens: int) -> Writing:
    """The harness's words for what to write, in those of `generate`.

    Text is sampled with `do_sample`, or with a temperature above 0 where that is left open.

    Raises:
        ValueError: ends that are no strings, or no whole number of tokens.
    """
    fields = dict(asked)
    until = fields.pop("until", None) or []
    until = [until] if isinstance(until, str) else until
    if not isinstance(until, (list, tuple)) or not all(isinstance(text, str) for text in until):
        raise ValueError(f"until={until!r}: give a string or a list of strings.")
    lengths = [fields.pop(name, None) for name in _LENGTH_NAMES]
    count = next((length for length in lengths if length is not None), new_tokens)
    temperature, sample = fields.pop("temperature", None), fields.pop("do_sample", None)
    sample = bool(temperature) if sample is None else bool(sample) and temperature != 0
    if sample and temperature is not None:
        fields["temperature"] = float(temperature)
    if not sample:
        fields = {name: value for name, value in fields.items() if name not in ("top_p", "top_k", "nucleus_p")}
    ends = tuple(text for text in until if text)
    return Writing(whole_number("max_gen_toks", count), ends, {"do_sample": sample, **fields})


def whole_number(name: str, value: Any) -> int:
    """An argument that may come as text.

    Raises:
        ValueError: it is no whole number of at least 1.
    """
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = 0
    if number < 1 or number != float(value):
        raise ValueError(f"{name}={value!r}: give a whole number of at least 1.")
    return number


__all__ = ["Window", "Writing", "question_seed", "whole_number", "windows", "writing_of"]
