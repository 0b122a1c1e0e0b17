"""Fine-tuning rows as sequences: a prompt that is given, then what is learned, then end tokens to the block's end.

One row is one sequence, and begins with its prompt: blocks are counted from there, as `generate` counts them. Given
tokens carry the label -100, so they are neither masked nor scored. Behind the last learned token stands the end token,
once at least and until the block is full, and it is scored in all these places: the model must learn how a block ends.
"""

import json
import logging
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from bd3lm_hf.data.packing import token_id, tokenizer_key
from bd3lm_hf.data.schemas import Messages, PromptCompletion, Schema


logger = logging.getLogger(__name__)


#: Part of every cache key: raise it when the encoding changes.
_VERSION = 1


#: Label of a position that is not scored.
_IGNORED = -100


_FEATURES = Features(input_ids=List(Value("int32")), labels=List(Value("int32")), attention_mask=List(Value("int8")))


#: What happens to rows that are longer than the model: nothing is ever cut.
LONG_ROWS = ("error", "drop")


_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Encoded(NamedTuple):
    """The tokens of a row, and which of them are learned."""

    ids: list[int]
    learned: list[bool]


def encode_rows(
    rows: Dataset,
    schema: Schema,
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    block_size: int,
    long_rows: str = "error",
    num_proc: int | None = None,
) -> Dataset:
    """Sequences of whole blocks, with columns `input_ids`, `labels` and `attention_mask`; their lengths differ.

    A prompt and its completion are tokenized apart, as they are when the model is asked, and without special tokens;
    an empty prompt becomes the begin token. Messages are written by the tokenizer's chat template. Where it marks
    `{% generation %}` all turns of the assistant are learned, else the last turn, which must be the assistant's; what
    follows the last learned token is left out. A user's turn that begins in the block in which an answer ends is seen
    while that block is denoised.

    Args:
        rows: as `load_rows` gives them in that schema.
        schema: `PromptCompletion` or `Messages`.
        length: most tokens of a sequence, the end tokens included.
        block_size: tokens of a block of the model.
        long_rows: "error", or "drop" rows that do not fit, with a warning that counts them.
        num_proc: worker processes; they do not change the result.

    Raises:
        ValueError: rows that do not fit, a row with nothing to learn, a tokenizer without end token or chat template,
            or no row left.
    """
    if long_rows not in LONG_ROWS:
        raise ValueError(f"long_rows is {long_rows!r}; it must be one of: {', '.join(LONG_ROWS)}.")
    encode = _ENCODERS[type(schema)]
    if isinstance(schema, Messages):
        _check_template(tokenizer)
    end = token_id(tokenizer, "eos")
    key = (_VERSION, rows._fingerprint, tokenizer_key(tokenizer), tokenizer.chat_template, end, block_size)
    encoded = rows.map(
        _encode_row,
        remove_columns=rows.column_names,
        features=_FEATURES,
        fn_kwargs={"encode": encode, "tokenizer": tokenizer, "end": end, "block_size": block_size},
        num_proc=num_proc,
        new_fingerprint=Hasher.hash(key),
        desc="Tokenizing",
    )
    return _fitting(encoded, tokenizer, length, drop=long_rows == "drop")


def texts_of(rows: Dataset, schema: Schema) -> Iterator[str]:
    """The text of the rows, to train a tokenizer on."""
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
) -> dict[str, Any]:
    ids, learned = encode(row, tokenizer)
    if ids[-1] != end or not learned[-1]:
        ids, learned = [*ids, end], [*learned, True]
    fill = -len(ids) % block_size
    ids, learned = ids + [end] * fill, learned + [True] * fill
    labels = [token if scored else _IGNORED for token, scored in zip(ids, learned, strict=True)]
    return {"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids)}


def _prompt_and_completion(row: dict[str, str], tokenizer: PreTrainedTokenizerBase) -> Encoded:
    prompt, completion = (_tokens(tokenizer, row[name], control=False) for name in ("prompt", "completion"))
    prompt = prompt or [token_id(tokenizer, "bos")]
    return Encoded(prompt + completion, [False] * len(prompt) + [True] * len(completion))


def _conversation(row: dict[str, str], tokenizer: PreTrainedTokenizerBase) -> Encoded:
    messages = json.loads(row["messages"])
    ids, learned = (
        _marked_turns(messages, tokenizer)
        if _GENERATION.search(tokenizer.get_chat_template())
        else _last_turn(messages, tokenizer)
    )
    if not any(learned):
        raise ValueError(f"The chat template writes no token of the assistant for the messages {_shown(messages)}.")
    last = len(learned) - 1 - learned[::-1].index(True)
    return Encoded(ids[: last + 1], learned[: last + 1])


def _marked_turns(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """All turns of the assistant, by the marks of the template."""
    written: Any = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    return Encoded(list(written["input_ids"]), [mask == 1 for mask in written["assistant_masks"]])


def _last_turn(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """The last turn, by what the template adds to the prompt before it; it ends with the first end token."""
    if messages[-1]["role"] != "assistant":
        raise ValueError(
            f"The messages {_shown(messages)} end with the role {messages[-1]['role']!r}: the chat template does not "
            "mark the assistant's turns with {% generation %}, so the last message must be the assistant's."
        )
    prompt: Any = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    whole: Any = tokenizer.apply_chat_template(messages, tokenize=False)
    if not whole.startswith(prompt):
        raise ValueError(
            f"The chat template writes the messages {_shown(messages)} differently with and without their last turn: "
            "mark the assistant's turns in it with {% generation %}."
        )
    given = _tokens(tokenizer, prompt, control=True)
    answer = _tokens(tokenizer, whole[len(prompt) :], control=True)
    end = token_id(tokenizer, "eos")
    answer = answer[: answer.index(end) + 1] if end in answer else answer
    return Encoded(given + answer, [False] * len(given) + [True] * len(answer))


_ENCODERS: dict[type[Schema], Callable[[dict[str, str], PreTrainedTokenizerBase], Encoded]] = {
    PromptCompletion: _prompt_and_completion,
    Messages: _conversation,
}


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str, *, control: bool) -> list[int]:
    """The ids of a text. Only a template writes control tokens; their names in data are text."""
    encoded = tokenizer(text, add_special_tokens=False, split_special_tokens=not control, verbose=False)
    return list(encoded["input_ids"])


def _check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.chat_template:
        raise ValueError(
            f"The tokenizer {tokenizer.name_or_path!r} has no chat template, which writes messages as text: set "
            "tokenizer.chat_template and save it, or give rows with the columns prompt and completion."
        )


def _fitting(encoded: Dataset, tokenizer: PreTrainedTokenizerBase, length: int, *, drop: bool) -> Dataset:
    lengths = np.concatenate(
        [pc.list_value_length(table["input_ids"]).to_numpy() for table in encoded.with_format("arrow").iter(1000)]
    )
    long = np.flatnonzero(lengths > length)
    if not len(long):
        return encoded
    start = tokenizer.decode(encoded[int(long[0])]["input_ids"][:12])
    found = f"{len(long)} of {len(encoded)} rows have more than {length} tokens, up to {lengths.max()}"
    if not drop:
        raise ValueError(
            f"{found}; the first begins with {start!r}. No row is cut: raise model_length, or leave such rows out "
            "with long_rows='drop'."
        )
    if len(long) == len(encoded):
        raise ValueError(f"{found}: none is left. Raise model_length.")
    logger.warning("Dropped rows: %s.", found)
    return encoded.select(np.flatnonzero(lengths <= length))


def _shown(messages: list[dict[str, Any]]) -> str:
    text = json.dumps(messages, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:80]}..."


__all__ = ["Encoded", "LONG_ROWS", "encode_rows", "texts_of"]
