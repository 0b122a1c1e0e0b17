"""Pack, shuffle and resume streams, for corpora larger than the disk."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import IterableDataset
from pyarrow import ArrowException
from transformers import PreTrainedTokenizerBase

from bd3lm_hf.data.packing import layout_of, token_id, tokenize_batch


_DOCUMENTS_PER_READ = 64


class PackedStream(torch.utils.data.IterableDataset):
    """Pack a stream of documents contiguously, shuffle it in a buffer, and resume at the exact sequence.

    The buffer contains packed sequences and is part of the state, because streams of the `datasets` library lose their
    own buffer when they resume. Every process reads the whole stream: let accelerate give each process its part of
    every batch (its default for iterable datasets), so the data does not depend on the number of processes.

    Args:
        dataset: documents in the column `text`, as `load_text(..., streaming=True)` returns them.
        length, insert_eos, insert_special: as for `pack`.
        shuffle_buffer: number of sequences to shuffle among; 0 keeps the order.
        seed: seed of the shuffle, together with the epoch (`set_epoch`).

    Raises:
        ValueError: as `pack` (for too few tokens, when the stream ends); also with several data loader workers.
    """

    def __init__(
        self,
        dataset: IterableDataset,
        tokenizer: PreTrainedTokenizerBase,
        *,
        length: int,
        insert_eos: bool = True,
        insert_special: bool = False,
        shuffle_buffer: int = 0,
        seed: int = 0,
    ) -> None:
        if shuffle_buffer < 0:
            raise ValueError(f"shuffle_buffer is {shuffle_buffer}; this number of sequences must be 0 or more.")
        self.dataset = dataset
        self.tokenizer = tokenizer
        self.eos = token_id(tokenizer, "eos") if insert_eos else None
        self.layout = layout_of(tokenizer, length, insert_special)
        self.shuffle_buffer = shuffle_buffer
        self.seed = seed
        self.epoch = 0
        self._resumed = False
        self._restart(None)

    def _restart(self, source: dict[str, Any] | None) -> None:
        self._source = source  # position of the next document; None is the beginning
        self._tokens = np.empty(0, np.int32)  # read, not yet cut
        self._buffer: list[np.ndarray] = []  # cut, not yet returned
        self._documents: Iterator[dict[str, str]] | None = None
        self._ended = False  # all documents have been read
        self._cut = 0  # sequences cut in this epoch
        self._random = np.random.default_rng((self.seed, self.epoch))

    def set_epoch(self, epoch: int) -> None:
        """Begin a new epoch with another shuffle. A stream that is about to resume keeps its own epoch."""
        if not self._resumed and epoch != self.epoch:
            self.epoch = epoch
            self._restart(None)

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the latest sequence.

        This is cheap enough for every step: it shares the stream's arrays, which are never modified in place.
        `write_position` saves it to a file.
        """
        return {
            "settings": self._settings,
            "epoch": self.epoch,
            "source": self._source if self._documents is None else self.dataset.state_dict(),
            "tokens": self._tokens,
            "buffer": list(self._buffer),
            "ended": self._ended,
            "cut": self._cut,
            "random": self._random.bit_generator.state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume at a recorded position.

        Raises:
            ValueError: if the position was recorded with other settings.
        """
        for name, value in self._settings.items():
            if state["settings"][name] != value:
                raise ValueError(
                    f"The position of the stream was recorded with {name}={state['settings'][name]}, but it is now "
                    f"{value}: continue with the same setting, or start again."
                )
        self.epoch = state["epoch"]
        self._restart(state["source"])
        self._tokens = state["tokens"]
        self._buffer = list(state["buffer"])
        self._ended = state["ended"]
        self._cut = state["cut"]
        self._random.bit_generator.state = state["random"]
        self._resumed = True

    @property
    def _settings(self) -> dict[str, Any]:
        """Settings that must equal those of a recorded position."""
        return {
            "length": self.layout.length,
            "insert_eos": self.eos is not None,
            "insert_special": bool(self.layout.begin),
            "shuffle_buffer": self.shuffle_buffer,
            "seed": self.seed,
        }

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that the sequences depend on besides the tokenizer, as far as it is known before reading."""
        return {**self._settings, "files": self.dataset.num_shards}

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        worker = torch.utils.data.get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise ValueError(
                f"{worker.num_workers} data loader workers would each read the whole stream; set "
                "dataloader_num_workers to 0 or 1."
            )
        if not self._resumed:
            self._restart(None)
        self._resumed = False
        while (row := self._next_row()) is not None:
            yield self.layout.example(row)

    def _next_row(self) -> np.ndarray | None:
        """Fill the buffer while there are documents, and return a sequence from it."""
        while len(self._buffer) <= self.shuffle_buffer:
            row = self._next_cut()
            if row is None:
                break
            self._buffer.append(row)
        if not self._buffer:
            return None
        index = int(self._random.integers(len(self._buffer))) if self.shuffle_buffer else 0
        # Swapped with the last one, because removing it from the middle would move all later ones.
        self._buffer[index], self._buffer[-1] = self._buffer[-1], self._buffer[index]
        return self._buffer.pop()

    def _next_cut(self) -> np.ndarray | None:
        """Return the next sequence in the order of the text."""
        while len(self._tokens) < self.layout.body and not self._ended:
            self._read()
        body = min(self.layout.body, len(self._tokens))
        if body < self.layout.body and not self._cut:
            raise ValueError(
                f"The stream ended after {body} tokens, fewer than one sequence of {self.layout.body} (length "
                f"{self.layout.length}): name a larger dataset or a smaller length."
            )
        if body == 0:
            return None
        row, self._tokens = self._tokens[:body], self._tokens[body:]
        self._cut += 1
        return row

    def _read(self) -> None:
        """Append the tokens of the next documents."""
        if self._documents is None:
            # Without a shuffle, the order of the files must not change either.
            self.dataset.set_epoch(self.epoch if self.shuffle_buffer else 0)
            self.dataset.load_state_dict(self._source)
            self._documents = iter(self.dataset)
        try:
            texts = [row["text"] for row in itertools.islice(self._documents, _DOCUMENTS_PER_READ)]
        except (OSError, ArrowException) as error:
            raise ValueError(
                f"The stream of documents broke off at {self.dataset.state_dict()}: {type(error).__name__}: {error}. "
                "Repair or replace that file; training resumes from the last checkpoint."
            ) from error
        self._ended = len(texts) < _DOCUMENTS_PER_READ
        if texts:
            batch = tokenize_batch({"text": texts}, tokenizer=self.tokenizer, eos=self.eos, end_empty=False)
            self._tokens = np.concatenate([self._tokens, *(np.array(ids, np.int32) for ids in batch["input_ids"])])


def write_position(state: dict[str, Any], path: str | Path) -> None:
    """Write a state of `PackedStream` to a file, with four bytes per buffered token."""
    arrays = {"tokens": state["tokens"], "buffer": np.concatenate([np.empty(0, np.int32), *state["buffer"]])}
    rest = {name: value for name, value in state.items() if name not in arrays}
    rest["lengths"] = [len(row) for row in state["buffer"]]
    with Path(path).open("wb") as file:
        np.savez(file, **arrays, rest=np.array(json.dumps(rest)))


def read_position(path: str | Path) -> dict[str, Any]:
    """Read a state that `write_position` wrote."""
    # No pickles: a checkpoint may come from a stranger.
    with np.load(path, allow_pickle=False) as file:
        state = json.loads(file["rest"].item())
        ends = np.cumsum(state.pop("lengths"), dtype=np.int64)
        state["tokens"] = file["tokens"]
        state["buffer"] = np.split(file["buffer"], ends[:-1]) if len(ends) else []
    return state
