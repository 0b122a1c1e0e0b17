"""`bd3lm generate --chat`: a conversation in a terminal, each answer shown while it is written."""

import sys
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

import torch
from transformers import PreTrainedTokenizerBase, set_seed


#: What a user types instead of a message.
RESET, END = "/reset", "/exit"


def check_chat(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that cannot write messages as text.

    Raises:
        ValueError: if it has no chat template.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            f"--chat needs a chat template, which the tokenizer {tokenizer.name_or_path!r} does not have: set "
            f"tokenizer.chat_template and save it, or give a --prompt."
        )


def converse(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    generation: Mapping[str, Any],
    *,
    seed: int = 0,
    streamer: Any = None,
    stdin: TextIO | None = None,
) -> list[dict[str, str]]:
    """Answer the lines of standard input until it ends, and return the messages.

    `/reset` forgets the conversation so far, `/exit` ends it.

    Args:
        generation: arguments of `generate`.
        streamer: shows an answer while it is written.
    """
    check_chat(tokenizer)
    set_seed(seed)
    messages: list[dict[str, str]] = []
    for line in _lines(stdin or sys.stdin):
        if line == RESET:
            messages.clear()
            continue
        messages.append({"role": "user", "content": line})
        messages.append({"role": "assistant", "content": _answer(model, tokenizer, messages, generation, streamer)})
    return messages


def _answer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, str]],
    generation: Mapping[str, Any],
    streamer: Any,
) -> str:
    written: Any = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids: torch.Tensor = written["input_ids"].to(model.device)
    sequences = model.generate(ids, streamer=streamer, **generation)
    return str(tokenizer.decode(sequences[0, ids.shape[1] :], skip_special_tokens=True)).strip()


def _lines(stdin: TextIO) -> Iterator[str]:
    """Yield the messages of a user, asking for each one in a terminal."""
    asks = stdin.isatty()
    if asks:
        print(f"Type a message; {RESET} starts over, {END} or Ctrl-D ends.", file=sys.stderr)
    while True:
        if asks:
            print("> ", end="", file=sys.stderr, flush=True)
        line = stdin.readline()
        if not line or line.strip() == END:
            return
        if line.strip():
            yield line.strip()
