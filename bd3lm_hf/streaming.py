"""Streaming: contiguous packing of corpora larger than the disk, shuffled, and resumed to the very sequence."""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from datasets import IterableDataset
from transformers import PreTrainedTokenizerBase

from bd3lm_hf.packing import layout_of, token_id, tokenize_batch


_DOCUMENTS_PER_READ = 64


class PackedStream(torch.utils.data.IterableDataset):
    """Contiguous packing of a stream of documents, shuffled in a buffer, resumable to the very sequence.

    The buffer holds packed sequences and belongs to the state, because a stream of the `datasets` library forgets its
    own buffer when it resumes. Every process reads the whole stream: let accelerate hand each process its share of
    every batch (its default for iterable data sets), so that the data do not depend on the number of processes.

    Args:
        dataset: documents in the column `text`, as `load_text(..., streaming=True)` gives them.
        length, insert_eos, insert_special, drop_last: as for `pack`.
        shuffle_buffer: sequences to shuffle among; 0 keeps the order.
        seed: of the shuffle, together with the epoch (`set_epoch`).

    Raises:
        ValueError: as `pack`; too few tokens show when the stream ends. Also with several data loader workers.
    """

    def __init__(
        self,
        dataset: IterableDataset,
        tokenizer: PreTrainedTokenizerBase,
        *,
        length: int,
        insert_eos: bool = True,
        insert_special: bool = False,
        drop_last: bool = False,
        shuffle_buffer: int = 0,
        seed: int = 0,
    ) -> None:
        if shuffle_buffer < 0:
            raise ValueError(f"shuffle_buffer is {shuffle_buffer}; it counts sequences and must be 0 or more.")
        self.dataset = dataset
        self.tokenizer = tokenizer
        self.eos = token_id(tokenizer, "eos") if insert_eos else None
        self.layout = layout_of(tokenizer, length, insert_special)
        self.drop_last = drop_last
        self.shuffle_buffer = shuffle_buffer
        self.seed = seed
        self.epoch = 0
        self._resumed = False
        self._restart(None)

    def _restart(self, source: dict[str, Any] | None) -> None:
        self._source = source  # where the documents start; None is the beginning
        self._tokens = np.empty(0, np.int32)  # read, but not yet cut
        self._buffer: list[np.ndarray] = []  # cut, but not yet given out
        self._documents: Iterator[dict[str, str]] | None = None
        self._ended = False  # the documents are all read
        self._cut = 0  # sequences cut in this epoch
        self._random = np.random.default_rng((self.seed, self.epoch))

    def set_epoch(self, epoch: int) -> None:
        """Begin a new pass, shuffled differently. A pass that is about to resume keeps its own epoch."""
        if not self._resumed and epoch != self.epoch:
            self.epoch = epoch
            self._restart(None)

    def state_dict(self) -> dict[str, Any]:
        """The position behind the latest sequence that was given out."""
        return {
            "epoch": self.epoch,
            "source": self._source if self._documents is None else self.dataset.state_dict(),
            "tokens": self._tokens.tolist(),
            "buffer": [row.tolist() for row in self._buffer],
            "ended": self._ended,
            "cut": self._cut,
            "random": self._random.bit_generator.state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next pass go on at a recorded position."""
        self.epoch = state["epoch"]
        self._restart(state["source"])
        self._tokens = np.array(state["tokens"], np.int32)
        self._buffer = [np.array(row, np.int32) for row in state["buffer"]]
        self._ended = state["ended"]
        self._cut = state["cut"]
        self._random.bit_generator.state = state["random"]
        self._resumed = True

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
        """The next sequence out of the buffer, which is filled first while there are documents."""
        while len(self._buffer) <= self.shuffle_buffer:
            row = self._next_cut()
            if row is None:
                break
            self._buffer.append(row)
        if not self._buffer:
            return None
        place = int(self._random.integers(len(self._buffer))) if self.shuffle_buffer else 0
        self._buffer[place], self._buffer[-1] = self._buffer[-1], self._buffer[place]
        return self._buffer.pop()

    def _next_cut(self) -> np.ndarray | None:
        """The next sequence in the order of the text."""
        while len(self._tokens) < self.layout.body and not self._ended:
            self._read()
        body = min(self.layout.body, len(self._tokens))
        if body < self.layout.body and not self._cut:
            raise ValueError(
                f"The stream ended after {body} tokens, fewer than one sequence of {self.layout.body} (length "
                f"{self.layout.length}): name a larger data set or a smaller length."
            )
        if body == 0 or (body < self.layout.body and self.drop_last):
            return None
        row, self._tokens = self._tokens[:body], self._tokens[body:]
        self._cut += 1
        return row

    def _read(self) -> None:
        """Append the tokens of the next documents."""
        if self._documents is None:
            # Without a shuffle the order of the files is kept, too.
            self.dataset.set_epoch(self.epoch if self.shuffle_buffer else 0)
            self.dataset.load_state_dict(self._source)
            self._documents = iter(self.dataset)
        texts = [row["text"] for row in itertools.islice(self._documents, _DOCUMENTS_PER_READ)]
        self._ended = len(texts) < _DOCUMENTS_PER_READ
        if texts:
            batch = tokenize_batch({"text": texts}, tokenizer=self.tokenizer, eos=self.eos, end_empty=False)
            self._tokens = np.concatenate([self._tokens, *(np.array(ids, np.int32) for ids in batch["input_ids"])])
