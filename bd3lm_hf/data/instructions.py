"""Encode fine-tuning rows as sequences: given tokens, learned tokens, and end tokens that fill the last block.

One row is one sequence and begins with its prompt: blocks are counted from there, as in `generate`. Given tokens have
the label -100, so they are neither masked nor scored. The text ends with at least one end token, and more of them fill
its block. All are scored, because the model must learn how a block ends; the sequence ends with that block.
"""

import itertools
import json
import logging
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from bd3lm_hf.data.packing import FEATURES, IGNORED, token_counts, token_id, tokenizer_key
from bd3lm_hf.data.schemas import Messages, Schema, is_learned


logger = logging.getLogger(__name__)

#: Part of every cache key: increase it when the encoding changes.
_VERSION = 2

#: Ways to treat rows that are longer than the model's window; no row is ever cut.
LONG_ROWS = ("error", "drop")

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Encoded(NamedTuple):
    """The tokens of a row, and whether each is learned."""

    ids: list[int]
    learned: list[bool]


def encode_rows(
    rows: Dataset,
    schema: Schema,
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    block_size: int,
    fill_turns: bool = False,
    long_rows: str = "error",
    num_proc: int | None = None,
) -> Dataset:
    """Encode rows as sequences of whole blocks, with columns `input_ids`, `labels` and `attention_mask`.

    A prompt and its completion are tokenized separately, as in generation, and without special tokens; an empty prompt
    becomes the BOS token. Messages, their tool calls and the row's tools are rendered with the chat template of the
    tokenizer. Every turn of the assistant is learned, except those with `weight` 0; everything after the last learned
    token is left out. Turns are found by the template's `{% generation %}` marks if it has them, otherwise by
    comparing the conversation rendered up to a turn and through it.

    Args:
        rows: rows in that schema, as `load_rows` returns them.
        schema: `PromptCompletion` or `Messages`.
        length: maximum number of tokens per sequence, including the end tokens.
        block_size: tokens per block of the model.
        fill_turns: also fill the block in which an earlier turn ends, so the next turn begins with a block. Otherwise
            a user's turn can begin in the block in which an answer ends, and is visible while that is denoised.
        long_rows: "error", or "drop" rows that do not fit, with a warning that counts them.
        num_proc: worker processes; they do not change the result.

    Returns:
        The sequences, whose lengths differ.

    Raises:
        ValueError: if rows do not fit, a row has nothing to learn, the tokenizer has no end token or chat template, or
            no row is left.
    """
    if isinstance(schema, Messages) and not tokenizer.chat_template:
        raise ValueError(
            f"The tokenizer {tokenizer.name_or_path!r} has no chat template to render messages with: set "
            "tokenizer.chat_template and save it, or use the columns prompt and completion."
        )
    encode = _conversation if isinstance(schema, Messages) else _prompt_and_completion
    end = token_id(tokenizer, "eos")
    options = {"end": end, "block_size": block_size, "fill_turns": fill_turns}
    template = (tokenizer.chat_template, tokenizer.special_tokens_map)
    key = (_VERSION, rows._fingerprint, tokenizer_key(tokenizer), template, options)
    encoded = rows.map(
        _encode_row,
        remove_columns=rows.column_names,
        features=FEATURES,
        fn_kwargs={"encode": encode, "tokenizer": tokenizer, **options},
        num_proc=num_proc,
        new_fingerprint=Hasher.hash(key),
        desc="Tokenizing",
    )
    return _fitting(encoded, tokenizer, length, drop=long_rows == "drop")


def texts_of(rows: Dataset, schema: Schema) -> Iterator[str]:
    """Yield the texts of the rows, to train a tokenizer on."""
    for row in rows:
        if isinstance(schema, Messages):
            yield from (str(message["content"]) for message in json.loads(row["messages"]))
        else:
            yield from (row[name] for name in schema.names)


def _encode_row(
    row: dict[str, str],
    *,
    encode: Callable[[dict[str, str], PreTrainedTokenizerBase], Encoded],
    tokenizer: PreTrainedTokenizerBase,
    end: int,
    block_size: int,
    fill_turns: bool,
) -> dict[str, Any]:
    ids: list[int] = []
    labels: list[int] = []
    encoded = encode(row, tokenizer)
    last = len(encoded.ids) - 1
    for position, (token, learned) in enumerate(zip(*encoded, strict=True)):
        ids.append(token)
        labels.append(token if learned else IGNORED)
        is_last = position == last
        if not is_last and not (fill_turns and learned and not encoded.learned[position + 1]):
            continue
        # A turn ends here: at least one end token after the last turn, then as many as fill the block.
        missing = is_last and not (learned and token == end)
        count = missing + -(len(ids) + missing) % block_size
        ids += [end] * count
        labels += [end] * count
    return {"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids)}


def _prompt_and_completion(row: dict[str, str], tokenizer: PreTrainedTokenizerBase) -> Encoded:
    prompt, completion = (_tokens(tokenizer, row[name], control=False) for name in ("prompt", "completion"))
    prompt = prompt or [token_id(tokenizer, "bos")]
    return Encoded(prompt + completion, [False] * len(prompt) + [True] * len(completion))


def _conversation(row: dict[str, str], tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """Render a conversation and mark its learned tokens; everything after the last of them is left out."""
    messages = json.loads(row["messages"])
    learned_turns = {index: is_learned(m) for index, m in enumerate(messages) if m["role"] == "assistant"}
    for message in messages:
        message.pop("weight", None)  # a mark for the loss, not for the template
    tools = json.loads(row["tools"]) if row.get("tools") else None
    if _GENERATION.search(tokenizer.get_chat_template()):
        ids, learned = _marked_turns(messages, list(learned_turns.values()), tools, tokenizer)
    else:
        ids, learned = _rendered_turns(messages, learned_turns, tools, tokenizer)
    if not any(learned):
        raise ValueError(f"The chat template renders no assistant tokens for the messages {_shown(messages)}.")
    last = len(learned) - 1 - learned[::-1].index(True)
    return Encoded(ids[: last + 1], learned[: last + 1])


def _marked_turns(
    messages: list[dict[str, Any]], is_turn_learned: list[bool], tools: list[Any] | None, tokenizer: Any
) -> Encoded:
    """Find the turns of the assistant by the `{% generation %}` marks of the template."""
    rendered = tokenizer.apply_chat_template(
        messages, tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    learned = np.array(rendered["assistant_masks"]) == 1
    if not all(is_turn_learned):
        edges = np.flatnonzero(np.diff([0, *learned, 0]))
        turns = list(zip(edges[::2], edges[1::2], strict=True))
        if len(turns) != len(is_turn_learned):
            raise ValueError(
                f"The chat template marks {len(turns)} of the assistant's {len(is_turn_learned)} turns, so those with "
                f"weight 0 cannot be identified, in the messages {_shown(messages)}."
            )
        for (start, stop), keep in zip(turns, is_turn_learned, strict=True):
            learned[start:stop] = keep
    return Encoded(list(rendered["input_ids"]), learned.tolist())


def _rendered_turns(
    messages: list[dict[str, Any]], is_turn_learned: dict[int, bool], tools: list[Any] | None, tokenizer: Any
) -> Encoded:
    """Find the turns of the assistant by the text that the template adds for each of them.

    The text is tokenized turn by turn, because a token of the whole text can cross the border of a turn. A turn ends
    with its first end token, as in generation; a newline that the template puts after it is given.
    """
    render = partial(tokenizer.apply_chat_template, tools=tools, tokenize=False)
    whole, done = render(messages), 0
    ids: list[int] = []
    learned: list[bool] = []
    end = token_id(tokenizer, "eos")
    for index, keep in is_turn_learned.items():
        prompt = render(messages[:index], add_generation_prompt=True)
        stop = _end_of_turn(messages, index, whole, render)
        if not (done <= len(prompt) <= (stop or 0) and whole.startswith(prompt)):
            raise ValueError(
                f"The chat template renders the messages {_shown(messages)} differently with and without their turn "
                f"{index}: mark the assistant's turns in it with {{% generation %}}."
            )
        prompt_ids = _tokens(tokenizer, whole[done : len(prompt)], control=True)
        answer = _tokens(tokenizer, whole[len(prompt) : stop], control=True)
        num_learned = answer.index(end) + 1 if end in answer else len(answer)
        ids += prompt_ids + answer
        learned += [False] * len(prompt_ids) + [keep] * num_learned + [False] * (len(answer) - num_learned)
        done = len(whole) if stop is None else stop
    return Encoded(ids, learned)


def _end_of_turn(messages: list[dict[str, Any]], index: int, whole: str, render: Callable[..., str]) -> int | None:
    """Return the index of the character at which a turn ends in the whole conversation, or None if it is unknown."""
    through = render(messages[: index + 1])
    if whole.startswith(through):
        return len(through)
    # Some templates render the last turn differently (Qwen3 puts an empty thought before it). Then the turn ends where
    # the following messages begin, whose length is found by rendering them without the turn.
    following = list(itertools.takewhile(lambda message: message["role"] != "assistant", messages[index + 1 :]))
    before = render(messages[:index])
    added = render([*messages[:index], *following])[len(before) :]
    through = render(messages[: index + 1 + len(following)])
    found = following and whole.startswith(through) and through.endswith(added)
    return len(through) - len(added) if found else None


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str, *, control: bool) -> list[int]:
    """Return the ids of a text. Only a template can write control tokens; their names in data are text."""
    encoded = tokenizer(text, add_special_tokens=False, split_special_tokens=not control, verbose=False)
    return list(encoded["input_ids"])


def _fitting(encoded: Dataset, tokenizer: PreTrainedTokenizerBase, length: int, *, drop: bool) -> Dataset:
    lengths = token_counts(encoded)
    long = np.flatnonzero(lengths > length)
    if not len(long):
        return encoded
    start = tokenizer.decode(encoded[int(long[0])]["input_ids"][:12])
    found = f"{len(long)} of {len(encoded)} rows have more than {length} tokens, up to {lengths.max()}"
    if not drop:
        raise ValueError(
            f"{found}; the first begins with {start!r}. Rows are never cut: raise model_length, or drop such rows "
            "with long_rows='drop'."
        )
    if len(long) == len(encoded):
        raise ValueError(f"{found}: none is left. Raise model_length.")
    logger.warning("Dropped rows: %s.", found)
    return encoded.select(np.flatnonzero(lengths <= length))


def _shown(messages: list[dict[str, Any]]) -> str:
    text = json.dumps(messages, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:80]}..."
