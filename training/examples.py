"""Which example comes when, and with which noise: both depend on the seed and a global index, never on the layout.

The global index of an example is `epoch * examples_per_epoch + place in the epoch's order`. One process with batch 8,
two with batch 4, and four accumulated batches of 2 therefore take the same optimizer steps.
"""

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset, Sampler

from bd3lm_hf.data.streaming import PackedStream
from bd3lm_hf.modeling.noise_bd3lm import Noise, stack_draws


EXAMPLE_INDEX = "example_index"


NOISE = ("block_noise", "token_noise", "count_noise")  # what a batch carries of its noise, float32


class EpochOrder(Dataset):
    """A seeded permutation of a data set for every epoch, filled up to whole optimizer steps.

    Items are addressed by `(global index, row)` pairs, which [`EpochSampler`] yields; each item is the row with its
    global index under `"example_index"`. The last step of an epoch is filled with the first rows of the same
    permutation, under indices of their own, so that no row is ever left out.

    Args:
        rows: a sized data set of mappings.
        seed: fixes all permutations.
        group_size: examples of one optimizer step, over all processes and accumulated batches.

    Raises:
        ValueError: the data set is empty or has no length.
    """

    def __init__(self, rows: Any, *, seed: int, group_size: int) -> None:
        if not hasattr(rows, "__len__"):
            raise ValueError(
                f"the training data is a {type(rows).__name__} without a length: load it as a map-style data set, or "
                "give a PackedStream."
            )
        if not len(rows):
            raise ValueError("the training data holds no sequence: give more text, or a shorter model_length.")
        self.rows, self.seed, self.group_size, self.epoch = rows, seed, group_size, 0

    def __len__(self) -> int:
        return -(-len(self.rows) // self.group_size) * self.group_size

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order is visited next; accelerate calls this on the data set of its loaders."""
        self.epoch = epoch

    def permutation(self, epoch: int) -> list[int]:
        """The rows of an epoch in the order of their visit, `len(self)` of them."""
        # An odd multiplier keeps (seed, epoch) pairs apart; neighbouring seeds must not share epochs.
        generator = torch.Generator().manual_seed((self.seed * 0x9E3779B1 + epoch * 0x85EBCA77) & (2**63 - 1))
        order = torch.randperm(len(self.rows), generator=generator)
        return order.repeat(-(-len(self) // len(order)))[: len(self)].tolist()

    def rows_at(self, first: int, count: int) -> list[int]:
        """The rows behind `count` consecutive global indices of one epoch, for messages."""
        epoch, place = divmod(first, len(self))
        return self.permutation(epoch)[place : place + count]

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Any]:
        index, row = item
        return {**self.rows[row], EXAMPLE_INDEX: index}


class EpochSampler(Sampler[tuple[int, int]]):
    """Yields the `(global index, row)` pairs of the current epoch of an [`EpochOrder`].

    It reads the epoch from the data set, which accelerate's loaders share however they wrap the sampler.
    """

    def __init__(self, order: EpochOrder) -> None:
        self.order = order

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        first = self.order.epoch * len(self.order)
        return ((first + place, row) for place, row in enumerate(self.order.permutation(self.order.epoch)))


class EndlessStream(IterableDataset):
    """A stream of sequences, pass after pass, each with its global index; its positions are kept for checkpoints.

    Args:
        stream: the sequences; `set_epoch` begins another pass.
        group_size: examples of one optimizer step, over all processes and accumulated batches.
    """

    # Loaders read ahead, by less than a step: the position of the step that is saved is among the latest ones.
    _KEPT = 4

    def __init__(self, stream: PackedStream, *, group_size: int) -> None:
        self.stream, self.group_size = stream, group_size
        self.start = 0
        self._positions: dict[int, dict[str, Any]] = {}

    def go_on(self, position: dict[str, Any]) -> None:
        """Start at a recorded position.

        Raises:
            ValueError: the position is that of another stream, or of steps of another size.
        """
        if position["group_size"] != self.group_size:
            raise ValueError(
                f"The position of the stream was recorded with {position['group_size']} sequences a step, but it is "
                f"now {self.group_size}: go on with the same global batch size, or start anew."
            )
        self.stream.load_state_dict(position)
        self.start = position["step"] * self.group_size

    def position(self, step: int) -> dict[str, Any]:
        """The position of the stream behind optimizer step `step`, one of the latest."""
        return {"step": step, "group_size": self.group_size, **self._positions[step]}

    def rows_at(self, first: int, count: int) -> list[int]:
        """The sequences behind `count` consecutive global indices, for messages: their places in the stream."""
        return list(range(first, first + count))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        index = self.start
        while True:
            for row in self._pass_from(index):
                yield row
                index += 1
            self.stream.set_epoch(self.stream.epoch + 1)

    def _pass_from(self, index: int) -> Iterator[dict[str, Any]]:
        """The rest of a pass."""
        rows = iter(self.stream)
        while True:
            if index % self.group_size == 0:
                self._record(index // self.group_size)
            row = next(rows, None)
            if row is None:
                return
            yield {**row, EXAMPLE_INDEX: index}
            index += 1

    def _record(self, step: int) -> None:
        self._positions[step] = self.stream.state_dict()
        for old in [kept for kept in self._positions if kept <= step - self._KEPT]:
            del self._positions[old]


class PaddingCollator:
    """Stacks examples of token ids, padded on the right; padding carries no attention and no label.

    Args:
        pad_token_id: id of padding, which no loss ever sees.
    """

    def __init__(self, pad_token_id: int = 0) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        columns: dict[str, list[torch.Tensor]] = {"input_ids": [], "labels": [], "attention_mask": []}
        for example in examples:
            ids = torch.as_tensor(example["input_ids"], dtype=torch.long)
            mask = torch.as_tensor(example.get("attention_mask", torch.ones_like(ids)), dtype=torch.long)
            labels = torch.as_tensor(example.get("labels", ids.masked_fill(mask == 0, -100)), dtype=torch.long)
            for column, value in zip(columns.values(), (ids, labels, mask), strict=True):
                column.append(value)
        padding = {"input_ids": self.pad_token_id, "labels": -100, "attention_mask": 0}
        return {
            name: torch.nn.utils.rnn.pad_sequence(column, batch_first=True, padding_value=padding[name])
            for name, column in columns.items()
        }


class NoiseCollator:
    """Adds to a batch the noise of its examples, `block_noise`, `token_noise` and `count_noise`.

    Args:
        collate: makes the batch without noise.
        seed: fixes the noise of all examples.
        group_size: examples of one optimizer step; noise levels are stratified over them.
        num_blocks: number of blocks of a sequence of some length; 0 for models without noise, which get none.
        length: longest sequence of the training data. Noise is drawn for this length and cut, so that an example's
            noise does not depend on its neighbours in the batch.
        draws: draws of noise for each example; more than one are an axis of their own behind the batch.
    """

    def __init__(
        self,
        collate: Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]],
        *,
        seed: int,
        group_size: int,
        num_blocks: Callable[[int], int],
        length: int,
        draws: int = 1,
    ) -> None:
        self.collate, self.seed, self.group_size = collate, seed, group_size
        self.num_blocks, self.length, self.draws = num_blocks, length, draws

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        indices = [int(example[EXAMPLE_INDEX]) for example in examples]
        batch = self.collate([{k: v for k, v in example.items() if k != EXAMPLE_INDEX} for example in examples])
        length = batch["input_ids"].shape[1]
        if not self.num_blocks(length):
            return batch
        if length > self.length:
            raise ValueError(
                f"a training sequence of {length} tokens is longer than model_length={self.length}: pack the data to "
                f"at most {self.length} tokens, or raise model_length."
            )
        noise = noise_of_examples(
            indices,
            seed=self.seed,
            group_size=self.group_size,
            num_blocks=self.num_blocks(self.length),
            length=self.length,
            draws=self.draws,
        )
        blocks = self.num_blocks(length)
        batch["block_noise"] = noise.block_noise[..., :blocks]
        batch["token_noise"] = noise.token_noise[..., :length]
        batch["count_noise"] = noise.count_noise[..., :blocks]
        return batch


def noise_of_examples(
    indices: Sequence[int], *, seed: int, group_size: int, num_blocks: int, length: int, draws: int = 1
) -> Noise:
    """The noise of training examples, a function of `seed` and each example's global index alone.

    It does not depend on how examples are dealt to batches, processes or accumulation steps, so runs of every layout,
    and resumed runs, see the same masks. Stratification spans `group_size` consecutive indices.

    Args:
        indices: global index of each example, `epoch * examples_per_epoch + place in the epoch's order`.
        group_size: examples of one optimizer step, over all processes.
        draws: draws for each example, stratified as well, see [`stack_draws`]. The first draw takes its random numbers
            from where a single one does.

    Returns:
        [`Noise`] on the CPU with `len(indices)` rows.
    """
    generators = [torch.Generator().manual_seed(_derived_seed(seed, "example", int(index))) for index in indices]
    noises = []
    for draw in range(draws):
        rows = []
        for index, generator in zip(indices, generators, strict=True):
            group, slot = divmod(int(index), group_size)
            strata = _strata_of_group(seed, group, draw, group_size * num_blocks)
            uniform = torch.rand(2 * num_blocks + length, generator=generator)
            block, count, token = uniform.split([num_blocks, num_blocks, length])
            place = block + strata[slot * num_blocks : (slot + 1) * num_blocks]
            rows.append(Noise(place / (group_size * num_blocks), token, count))
        noises.append(Noise(*(torch.stack(field) for field in zip(*rows, strict=True))))
    return stack_draws(noises)


@functools.lru_cache(maxsize=16)
def _strata_of_group(seed: int, group: int, draw: int, count: int) -> torch.Tensor:
    kind = f"group, draw {draw}" if draw else "group"
    return torch.randperm(count, generator=torch.Generator().manual_seed(_derived_seed(seed, kind, group)))


def _derived_seed(seed: int, kind: str, index: int) -> int:
    # Neighbouring seeds of a Mersenne twister give correlated first draws; a hash does not.
    return int.from_bytes(hashlib.sha256(f"{kind}:{seed}:{index}".encode()).digest()[:8], "big") >> 1


__all__ = [
    "EXAMPLE_INDEX",
    "EndlessStream",
    "EpochOrder",
    "EpochSampler",
    "NoiseCollator",
    "PaddingCollator",
    "noise_of_examples",
]
