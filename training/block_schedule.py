"""A curriculum of block sizes: small blocks first, which are close to an autoregressive model, then larger ones.

A block size shapes attention and noise, never a weight, so it may change from step to step.
"""

import re
from typing import Any, NamedTuple

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class BlockSizeSchedule(NamedTuple):
    """Block sizes, each with the number of optimizer steps that it lasts; the last one lasts until the end."""

    sizes: tuple[int, ...]
    steps: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> "BlockSizeSchedule":
        """Read `size:steps,size:steps,...`, for example `1:500,4:500,16:0`; the last number of steps is 0.

        Raises:
            ValueError: if it is written differently.
        """
        stages = [re.fullmatch(r"(\d+):(\d+)", stage.strip()) for stage in text.split(",")]
        sizes, steps = ([int(stage[k]) for stage in stages if stage] for k in (1, 2))
        # Only the last stage has 0 steps, so any other would never be left.
        if not all(stages) or min(sizes) < 1 or min(steps[:-1], default=1) < 1 or steps[-1] != 0:
            raise ValueError(
                f"--block_size_schedule {text}: write size:steps for each stage, with 0 steps for the last, which "
                f"lasts until the end: 1:500,4:500,16:0."
            )
        return cls(tuple(sizes), tuple(steps))

    def size_at(self, step: int) -> int:
        """Return the block size of the optimizer step after `step` steps."""
        for size, steps in zip(self.sizes[:-1], self.steps, strict=False):
            if step < steps:
                return size
            step -= steps
        return self.sizes[-1]

    def check(self, config: Any) -> None:
        """Refuse sizes that do not fit a model.

        Raises:
            ValueError: if the model has no blocks, or a size does not divide its window.
        """
        for size in self.sizes:
            if config.model_length % size:
                raise ValueError(
                    f"--block_size_schedule: {size} does not divide model_length={config.model_length}: choose its "
                    f"divisors."
                )


class BlockSizeCallback(TrainerCallback):
    """Set the block size of the model before each step, and the last one at the end, which is then saved."""

    def __init__(self, schedule: BlockSizeSchedule) -> None:
        self.schedule = schedule

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        model.config.block_size = self.schedule.size_at(state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        model.config.block_size = self.schedule.sizes[-1]
