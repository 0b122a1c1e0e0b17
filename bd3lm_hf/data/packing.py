"""Pack documents of text into sequences of exactly `length` tokens (paper, App. C.1).

Contiguous packing, the default, cuts the concatenated tokens of all documents: no token is lost between documents, and
the result does not depend on the number of workers or the batch size. Published packing is that of the reference
implementation, which drops remainders that depend on both.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from bd3lm_hf.data.sources import PACKINGS


#: Part of every cache key: increase it when the meaning of a packed dataset changes.
_VERSION = 1

#: Label of a position that is not scored.
IGNORED = -100

#: Columns of a sequence. int32 and int8: corpora are kept on disk, where int64 would take twice the space.
FEATURES = Features(input_ids=List(Value("int32")), labels=List(Value("int32")), attention_mask=List(Value("int8")))

_ROWS_PER_BATCH = 1000  # documents, or sequences


class PackingLayout(NamedTuple):
    """Layout of a sequence: `[begin] tokens [end]`, or only tokens, then padding."""

    length: int
    begin: tuple[int, ...]
    end: tuple[int, ...]
    padding: int

    @property
    def body(self) -> int:
        """Tokens of text in a full sequence."""
        return self.length - len(self.begin) - len(self.end)

    def example(self, tokens: np.ndarray) -> dict[str, np.ndarray]:
        """Return the packed example of at most `body` tokens, padded on the right."""
        ids = np.full(self.length, self.padding, dtype=np.int32)
        used = len(self.begin) + len(tokens) + len(self.end)
        ids[:used] = np.concatenate([np.array(self.begin, np.int32), tokens, np.array(self.end, np.int32)])
        labels = ids.copy()
        labels[used:] = IGNORED
        mask = np.zeros(self.length, dtype=np.int8)
        mask[:used] = 1
        return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def pack(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    packing: str = "contiguous",
    insert_eos: bool = True,
    insert_special: bool = False,
    drop_last: bool = False,
    num_proc: int | None = None,
) -> Dataset:
    """Pack documents into sequences, with columns `input_ids`, `labels` and `attention_mask`, each `(length,)`.

    Args:
        dataset: documents in the column `text`, as `load_text` returns them.
        length: tokens per sequence.
        packing: "contiguous" or "published" (see `pack_published`; it drops incomplete sequences in any case).
        insert_eos: append an end token to every document (contiguous: to every document that is not empty).
        insert_special: put a begin token before and an end token after the tokens of every sequence.
        drop_last: drop the last, incomplete sequence. Otherwise it is padded on the right, with attention mask 0 and
            label -100.
        num_proc: worker processes. They change only the result of published packing.

    Raises:
        ValueError: if the packing is unknown, there is no column `text`, the tokenizer lacks a special token, the
            length leaves no room for text, or there are fewer tokens than one sequence.
    """
    if packing not in PACKINGS:
        raise ValueError(f"packing is {packing!r}; it must be one of: {', '.join(PACKINGS)}.")
    if not isinstance(dataset, Dataset):
        raise ValueError(
            "pack needs a dataset that was loaded without streaming; pack a stream with streaming.PackedStream."
        )
    first_id = _published_id if packing == "published" else token_id
    eos = first_id(tokenizer, "eos") if insert_eos else None
    layout = layout_of(tokenizer, length, insert_special, first_id)
    tokenized = tokenize(dataset, tokenizer, eos=eos, end_empty=packing == "published", num_proc=num_proc)
    tokens = int(token_counts(tokenized).sum())
    if tokens < layout.body:
        raise ValueError(
            f"The dataset has {tokens} tokens in {len(dataset)} documents, fewer than one sequence of {layout.body} "
            f"(length {length}): name a larger dataset or a smaller length."
        )
    if packing == "contiguous":
        return _pack_contiguous(tokenized, layout, drop_last=drop_last, num_proc=num_proc)
    packed = _pack_published(tokenized, layout, num_proc=num_proc)
    if len(packed) == 0:
        raise ValueError(
            f"Published packing drops the remainder of every {_ROWS_PER_BATCH} documents of a worker, which leaves no "
            f"sequence of length {length} of the dataset's {tokens} tokens: use packing='contiguous', or fewer "
            "workers."
        )
    return packed


def tokenize(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    eos: int | None,
    end_empty: bool = False,
    num_proc: int | None = None,
) -> Dataset:
    """Tokenize every document into the column `input_ids`.

    Names of special tokens in a document are tokenized as text: data never contains control tokens.

    Args:
        eos: id to append to every document that is not empty, or None.
        end_empty: append it to empty documents too.

    Raises:
        ValueError: if there is no column `text`.
    """
    if "text" not in dataset.column_names:
        raise ValueError(
            f"The dataset has no column 'text', only: {', '.join(dataset.column_names)}; load it with load_text, or "
            "rename the column."
        )
    key = (_VERSION, dataset._fingerprint, tokenizer_key(tokenizer), eos, end_empty)
    return dataset.map(
        tokenize_batch,
        batched=True,
        batch_size=_ROWS_PER_BATCH,
        remove_columns=dataset.column_names,
        features=Features(input_ids=List(Value("int32"))),
        fn_kwargs={"tokenizer": tokenizer, "eos": eos, "end_empty": end_empty},
        num_proc=num_proc,
        new_fingerprint=Hasher.hash(key),
        desc="Tokenizing",
    )


def pack_published(documents: Sequence[Sequence[int]], layout: PackingLayout) -> list[list[int]]:
    """Pack one batch of documents as the reference implementation does.

    The documents are joined and cut, and each piece gets the begin and end of the layout. The batch's incomplete
    remainder is dropped.
    """
    joined = [token for document in documents for token in document]
    starts = range(0, len(joined) - layout.body + 1, layout.body)
    return [[*layout.begin, *joined[start : start + layout.body], *layout.end] for start in starts]


def bytes_per_token(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, *, insert_eos: bool = True) -> float:
    """Return the mean number of UTF-8 bytes per token, to convert nats per token to bits per byte.

    Args:
        insert_eos: count one end token for every document that is not empty, as contiguous packing appends them.

    Raises:
        ValueError: if there is no column `text`, or no text.
    """
    eos = token_id(tokenizer, "eos") if insert_eos else None
    tokens = int(token_counts(tokenize(dataset, tokenizer, eos=eos)).sum())
    if tokens == 0:
        raise ValueError(f"The dataset's {len(dataset)} documents have no text; name another dataset.")
    tables = dataset.with_format("arrow").iter(_ROWS_PER_BATCH)
    return sum(pc.sum(pc.binary_length(table["text"])).as_py() for table in tables) / tokens


def evenly_spaced(rows: Dataset, max_rows: int | None) -> Dataset:
    """Return at most `max_rows` evenly spaced rows, so a part is as varied as the whole; None returns all."""
    if max_rows is None or max_rows >= len(rows):
        return rows
    return rows.select([index * len(rows) // max_rows for index in range(max_rows)])


def tokenize_batch(
    batch: dict[str, list[str]], *, tokenizer: PreTrainedTokenizerBase, eos: int | None, end_empty: bool
) -> dict[str, list[list[int]]]:
    """Tokenize a batch of texts; the arguments are those of `tokenize`."""
    documents = tokenizer(
        batch["text"],
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # do not warn about documents longer than the model's window: they will be cut
    )["input_ids"]
    if eos is not None:
        for ids in documents:
            if ids or end_empty:
                ids.append(eos)
    return {"input_ids": documents}


# Ways of packing


def _pack_contiguous(tokenized: Dataset, layout: PackingLayout, *, drop_last: bool, num_proc: int | None) -> Dataset:
    """Cut the concatenated tokens. Row i begins at token i * body, whichever worker or batch computes it."""
    ends = np.cumsum(token_counts(tokenized))
    rows = int(ends[-1]) // layout.body if drop_last else -(-int(ends[-1]) // layout.body)
    fingerprint = Hasher.hash((_VERSION, "contiguous", tokenized._fingerprint, layout, drop_last))
    # Documents on disk are packed on disk, next to their tokens; documents in memory are packed in memory.
    on_disk = [Path(file["filename"]).parent for file in tokenized.cache_files]
    return Dataset.from_dict({"row": range(rows)}).map(
        _contiguous_batch,
        batched=True,
        batch_size=_ROWS_PER_BATCH,
        remove_columns=["row"],
        features=FEATURES,
        fn_kwargs={"tokenized": tokenized.with_format("arrow"), "ends": ends, "layout": layout},
        num_proc=num_proc,
        cache_file_name=str(on_disk[0] / f"cache-{fingerprint}.arrow") if on_disk else None,
        new_fingerprint=fingerprint,
        desc="Packing",
    )


def _contiguous_batch(
    batch: dict[str, list[int]], *, tokenized: Dataset, ends: np.ndarray, layout: PackingLayout
) -> dict[str, np.ndarray]:
    """Return the sequences of consecutive rows; `ends` are the positions in the stream at which documents end."""
    start = batch["row"][0] * layout.body
    stop = min((batch["row"][-1] + 1) * layout.body, int(ends[-1]))
    # The documents that overlap [start, stop). One that ends at `start` does not.
    first = int(np.searchsorted(ends, start, side="right"))
    last = int(np.searchsorted(ends, stop, side="left"))
    tokens = pc.list_flatten(tokenized[first : last + 1]["input_ids"]).to_numpy()
    before = int(ends[first - 1]) if first else 0
    tokens = tokens[start - before : stop - before]
    examples = [layout.example(tokens[i : i + layout.body]) for i in range(0, len(tokens), layout.body)]
    return {key: np.stack([example[key] for example in examples]) for key in FEATURES}


def _pack_published(tokenized: Dataset, layout: PackingLayout, *, num_proc: int | None) -> Dataset:
    """Pack every batch of a worker separately; incomplete remainders are dropped."""
    return tokenized.map(
        _published_batch,
        batched=True,
        batch_size=_ROWS_PER_BATCH,
        remove_columns=tokenized.column_names,
        features=FEATURES,
        fn_kwargs={"layout": layout},
        num_proc=num_proc,
        new_fingerprint=Hasher.hash((_VERSION, "published", tokenized._fingerprint, layout, num_proc)),
        desc="Packing",
    )


def _published_batch(batch: dict[str, list[list[int]]], *, layout: PackingLayout) -> dict[str, list[Any]]:
    rows = pack_published(batch["input_ids"], layout)
    return {"input_ids": rows, "labels": rows, "attention_mask": [[1] * layout.length for _ in rows]}


# Special tokens and keys of the cache


def token_id(tokenizer: PreTrainedTokenizerBase, kind: str) -> int:
    """Return the id of the begin ("bos") or end ("eos") token.

    Raises:
        ValueError: if the tokenizer has none.
    """
    found = getattr(tokenizer, f"{kind}_token_id")
    if found is None:
        raise ValueError(
            f"The tokenizer {tokenizer.name_or_path!r} has no {kind}_token, which packing inserts: load it with "
            f"load_tokenizer, which adds one, or set tokenizer.{kind}_token."
        )
    return found


def _published_id(tokenizer: PreTrainedTokenizerBase, kind: str) -> int:
    """Return the first id of the encoded token: for BERT this is the classifier token for both BOS and EOS."""
    token_id(tokenizer, kind)
    return tokenizer.encode(getattr(tokenizer, f"{kind}_token"))[0]


def layout_of(
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    insert_special: bool,
    first_id: Callable[[PreTrainedTokenizerBase, str], int] = token_id,
) -> PackingLayout:
    """Return the layout of sequences of `length` tokens; `first_id` finds the ids of "bos" and "eos"."""
    smallest = 3 if insert_special else 1
    if length < smallest:
        raise ValueError(
            f"length is {length}; a sequence {'with special tokens ' if insert_special else ''}needs {smallest} "
            "tokens or more."
        )
    begin = (first_id(tokenizer, "bos"),) if insert_special else ()
    end = (first_id(tokenizer, "eos"),) if insert_special else ()
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else token_id(tokenizer, "eos")
    return PackingLayout(length, begin, end, padding)


def tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a key of everything that tokenization depends on, without the truncation and padding of earlier calls."""
    # A pure Python tokenizer has no serialized form, so its vocabulary and arguments are used instead.
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return Hasher.hash((type(tokenizer).__name__, sorted(tokenizer.get_vocab().items()), tokenizer.init_kwargs))
    state = json.loads(backend.to_str())
    state.update(truncation=None, padding=None)
    return Hasher.hash(json.dumps(state, sort_keys=True))


def token_counts(tokenized: Dataset) -> np.ndarray:
    """Return the number of tokens of each row, `(rows,)`."""
    tables = tokenized.with_format("arrow").iter(_ROWS_PER_BATCH)
    counts = [pc.list_value_length(table["input_ids"]).to_numpy() for table in tables]
    # int64: sums of these counts exceed 2^31 for a large corpus.
    return np.concatenate([np.empty(0, np.int64), *counts])
