"""The order of training examples, their noise and their block size, independent of the layout of a run.

The global index of an example is `epoch * examples_per_epoch + position in the epoch's order`. One process with batch
8, two with batch 4, and four accumulated batches of 2 therefore take the same optimizer steps with the same noise.

A curriculum of block sizes begins with small blocks, which are close to an autoregressive model, and continues with
larger ones. The block size affects attention and noise but no weight, so it can change from step to step.
"""

import functools
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset, IterableDataset, Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState

from bd3lm_hf.data.streaming import PackedStream
from bd3lm_hf.modeling.configuration_bd3lm import SAMPLING_EPS
from bd3lm_hf.modeling.inputs_bd3lm import check_text
from bd3lm_hf.modeling.noise_bd3lm import Noise, stack_noise
from bd3lm_hf.seeds import derived_seed


EXAMPLE_INDEX = "example_index"
NOISE = Noise._fields  # the columns of a batch that carry its noise, float32


class EpochOrder(Dataset):
    """A seeded permutation of a dataset for every epoch, filled up to whole optimizer steps.

    Items are addressed by `(global index, dataset index)` pairs, which [`EpochSampler`] yields; each item is the
    example with its global index under `"example_index"`. The last step of an epoch is filled with the first examples
    of the same permutation, under new global indices, so that no example is ever left out.

    Args:
        examples: a sized dataset of mappings.
        seed: fixes all permutations.
        group_size: examples of one optimizer step, over all processes and accumulated batches.

    Raises:
        ValueError: if the dataset is empty.
    """

    def __init__(self, examples: Any, *, seed: int, group_size: int) -> None:
        if not len(examples):
            raise ValueError("the training data has 0 sequences: give more text, or a shorter model_length.")
        self.examples, self.seed, self.group_size, self.epoch = examples, seed, group_size, 0

    def __len__(self) -> int:
        return -(-len(self.examples) // self.group_size) * self.group_size

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration; accelerate calls this on the dataset of its loaders."""
        self.epoch = epoch

    def permutation(self, epoch: int) -> torch.Tensor:
        """Return the dataset indices of an epoch in their order, int64 `(len(self),)`."""
        generator = torch.Generator().manual_seed(derived_seed("epoch", self.seed, epoch))
        # The last step of an epoch is filled from the beginning of the same permutation.
        order = torch.randperm(len(self.examples), generator=generator)
        return order.repeat(-(-len(self) // len(order)))[: len(self)]

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Any]:
        global_index, dataset_index = item
        return {**self.examples[dataset_index], EXAMPLE_INDEX: global_index}


class EpochSampler(Sampler[tuple[int, int]]):
    """Yield the `(global index, dataset index)` pairs of the current epoch of an [`EpochOrder`].

    It reads the epoch from the dataset, which accelerate's loaders share however they wrap the sampler.
    """

    def __init__(self, order: EpochOrder) -> None:
        self.order = order

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        first = self.order.epoch * len(self.order)
        # The order stays a tensor: as Python integers, nine million indices take 350 MB in every process.
        chunks = self.order.permutation(self.order.epoch).split(4096)
        indices = itertools.chain.from_iterable(chunk.tolist() for chunk in chunks)
        # Global indices continue from epoch to epoch, so that an example has new noise in each.
        return enumerate(indices, start=first)


class EndlessStream(IterableDataset):
    """A stream of examples, one pass after another, each with its global index; positions are kept for checkpoints.

    Args:
        stream: the sequences; `set_epoch` begins another pass.
        group_size: examples of one optimizer step, over all processes and accumulated batches.
    """

    # Loaders read ahead by less than a step, so the position of the step that is saved is among the latest ones.
    _KEPT = 4

    def __init__(self, stream: PackedStream, *, group_size: int) -> None:
        self.stream, self.group_size = stream, group_size
        self.start = 0
        self._positions: dict[int, dict[str, Any]] = {}

    def resume(self, position: dict[str, Any]) -> None:
        """Start at a recorded position.

        Raises:
            ValueError: if the position belongs to another stream, or the step size has changed.
        """
        if position["group_size"] != self.group_size:
            raise ValueError(
                f"The position of the stream was recorded with {position['group_size']} sequences per step, but it is "
                f"now {self.group_size}: resume with the same global batch size, or start a new run."
            )
        self.stream.load_state_dict(position)
        self.start = position["step"] * self.group_size

    def position(self, step: int) -> dict[str, Any]:
        """Return the position of the stream after optimizer step `step`, one of the latest."""
        return {"step": step, "group_size": self.group_size, **self._positions[step]}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        index = self.start
        while True:
            # A pass may begin inside a step, since its length need not be a multiple of the step size.
            examples = iter(self.stream)
            while True:
                # The position before the first example of a step is the position after the previous step.
                if index % self.group_size == 0:
                    self._record(index // self.group_size)
                if (example := next(examples, None)) is None:
                    break
                yield {**example, EXAMPLE_INDEX: index}
                index += 1
            self.stream.set_epoch(self.stream.epoch + 1)

    def _record(self, step: int) -> None:
        self._positions[step] = self.stream.state_dict()
        for old in [kept for kept in self._positions if kept <= step - self._KEPT]:
            del self._positions[old]


class PaddingCollator:
    """Stack examples of token ids, padded on the right; padding has no attention and no label.

    A batch without padding has no attention mask. A GPU cannot see without waiting that a mask is all ones, and would
    use the slower masks of padded rows.

    Args:
        pad_token_id: id of padding, which no loss ever sees.
    """

    def __init__(self, pad_token_id: int = 0) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        # Fine-tuning examples have labels, packed text only ids; both become the same three columns.
        columns: dict[str, list[torch.Tensor]] = {"input_ids": [], "labels": [], "attention_mask": []}
        for example in examples:
            ids = torch.as_tensor(example["input_ids"], dtype=torch.long)
            mask = torch.as_tensor(example.get("attention_mask", torch.ones_like(ids)), dtype=torch.long)
            labels = torch.as_tensor(example.get("labels", ids.masked_fill(mask == 0, -100)), dtype=torch.long)
            for column, value in zip(columns.values(), (ids, labels, mask), strict=True):
                column.append(value)
        padding = {"input_ids": self.pad_token_id, "labels": -100, "attention_mask": 0}
        batch = {
            name: torch.nn.utils.rnn.pad_sequence(column, batch_first=True, padding_value=padding[name])
            for name, column in columns.items()
        }
        if bool(batch["attention_mask"].all()):
            del batch["attention_mask"]
        return batch


class BlockSizeSchedule(NamedTuple):
    """Block sizes, each with its number of optimizer steps; the last one lasts until the end."""

    sizes: tuple[int, ...]
    steps: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> "BlockSizeSchedule":
        """Parse `size:steps,size:steps,...`, for example `1:500,4:500,16:0`; the last number of steps is 0.

        Raises:
            ValueError: if the text has another form.
        """
        stages = [re.fullmatch(r"(\d+):(\d+)", stage.strip()) for stage in text.split(",")]
        sizes, steps = ([int(stage[k]) for stage in stages if stage] for k in (1, 2))
        # 0 steps mean until the end, so they are for the last stage only.
        if not all(stages) or min(sizes) < 1 or min(steps[:-1], default=1) < 1 or steps[-1] != 0:
            raise ValueError(
                f"--block_size_schedule {text}: write size:steps for each stage, with 0 steps for the last, which "
                f"lasts until the end: 1:500,4:500,16:0."
            )
        return cls(tuple(sizes), tuple(steps))

    def size_at(self, step: int) -> int:
        """Return the block size of the optimizer step that follows `step` steps."""
        for size, steps in zip(self.sizes[:-1], self.steps, strict=False):
            if step < steps:
                return size
            step -= steps
        return self.sizes[-1]

    def check(self, config: Any) -> None:
        """Refuse sizes that do not fit a model.

        Raises:
            ValueError: if the model's configuration would be invalid with one of the sizes.
        """
        for size in self.sizes:
            try:
                type(config).from_dict({**config.to_dict(), "block_size": size})
            except ValueError as error:
                raise ValueError(f"--block_size_schedule: {error}") from error


class BlockSizeCallback(TrainerCallback):
    """Set the block size of the model before each step, and at the end the last size, which is saved.

    An interval of noise levels that was searched at one size is dropped with it: the whole one is used until the next
    search.
    """

    def __init__(self, schedule: BlockSizeSchedule) -> None:
        self.schedule = schedule

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        model, step = kwargs["model"], state.global_step
        model.config.block_size = self.schedule.size_at(step)
        searches = args.interval_search and not args.interval_search_fixed
        if searches and step and self.schedule.size_at(step - 1) != model.config.block_size:
            model.set_interval(SAMPLING_EPS, 1.0)

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        kwargs["model"].config.block_size = self.schedule.sizes[-1]


class NoiseCollator:
    """Add the noise of its examples to a batch: `block_noise`, `token_noise` and `count_noise`.

    It also checks the text on the CPU, where that costs no synchronisation.

    Args:
        collate: makes the batch without noise.
        config: the model's; read for the number of blocks, the vocabulary and the longest sequence. Noise is drawn for
            that length and cut, so that an example's noise does not depend on its neighbours in the batch. A model
            without noise, which has no blocks, gets none.
        seed: fixes the noise of all examples.
        group_size: examples of one optimizer step; noise levels are stratified over them.
        num_noise_samples: noise samples of each example; more than one get their own axis after the batch.
        check: refuses a faulty batch, see [`check_text`].
        schedule: block sizes by optimizer step, which `config` does not show yet: batches are made in advance.
    """

    def __init__(
        self,
        collate: Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]],
        config: Any,
        *,
        seed: int,
        group_size: int,
        num_noise_samples: int = 1,
        check: Callable[..., None] = check_text,
        schedule: BlockSizeSchedule | None = None,
    ) -> None:
        self.collate, self.config, self.check, self.schedule = collate, config, check, schedule
        self.seed, self.group_size, self.num_noise_samples = seed, group_size, num_noise_samples

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        # The index is only for the noise: the inner collator, perhaps a caller's own, does not know it.
        indices = [int(example[EXAMPLE_INDEX]) for example in examples]
        batch = self.collate([{k: v for k, v in example.items() if k != EXAMPLE_INDEX} for example in examples])
        input_ids = batch["input_ids"]
        self.check(self.config, input_ids, batch.get("labels", input_ids), batch.get("attention_mask"))
        length, longest = input_ids.shape[1], self.config.model_length
        blocks, max_blocks = (self._num_blocks(tokens, indices[0] // self.group_size) for tokens in (length, longest))
        if not blocks:
            return batch
        if length > longest:
            raise ValueError(
                f"a training sequence of {length} tokens is longer than model_length={longest}: pack the data to at "
                f"most {longest} tokens, or raise model_length."
            )
        noise = noise_of_examples(
            indices,
            seed=self.seed,
            group_size=self.group_size,
            num_blocks=max_blocks,
            length=longest,
            num_noise_samples=self.num_noise_samples,
        )
        batch["block_noise"] = noise.block_noise[..., :blocks]
        batch["token_noise"] = noise.token_noise[..., :length]
        batch["count_noise"] = noise.count_noise[..., :blocks]
        return batch

    def _num_blocks(self, length: int, step: int) -> int:
        return self.config.num_blocks(length) if self.schedule is None else -(-length // self.schedule.size_at(step))


def noise_of_examples(
    indices: Sequence[int], *, seed: int, group_size: int, num_blocks: int, length: int, num_noise_samples: int = 1
) -> Noise:
    """Return the noise of training examples, a function of `seed` and each example's global index alone.

    It does not depend on how examples are spread over batches, processes or accumulation steps, so runs of every
    layout, and resumed runs, see the same masks. Stratification spans `group_size` consecutive indices.

    Args:
        indices: global index of each example.
        group_size: examples of one optimizer step, over all processes.
        num_noise_samples: noise samples of each example, which are stratified too, see [`stack_noise`]. The first one
            uses the same random numbers as a single one.

    Returns:
        [`Noise`] on the CPU, one row for each example.
    """
    generators = [torch.Generator().manual_seed(derived_seed("example", seed, int(index))) for index in indices]
    samples = []
    for sample in range(num_noise_samples):
        per_example = []
        for index, generator in zip(indices, generators, strict=True):
            group, slot = divmod(int(index), group_size)
            strata = _strata_of_group(seed, group, sample, group_size * num_blocks)
            # One call for all three kinds of noise, so the numbers of an example do not depend on its batch.
            uniform = torch.rand(2 * num_blocks + length, generator=generator)
            block, count, token = uniform.split([num_blocks, num_blocks, length])
            # Each block has its own slot in the group's permutation, so each stratum is hit exactly once per step.
            in_stratum = block + strata[slot * num_blocks : (slot + 1) * num_blocks]
            per_example.append(Noise(in_stratum / (group_size * num_blocks), token, count))
        samples.append(Noise(*(torch.stack(field) for field in zip(*per_example, strict=True))))
    return stack_noise(samples)


@functools.lru_cache(maxsize=16)
def _strata_of_group(seed: int, group: int, sample: int, count: int) -> torch.Tensor:
    kind = f"group, draw {sample}" if sample else "group"
    return torch.randperm(count, generator=torch.Generator().manual_seed(derived_seed(kind, seed, group)))
