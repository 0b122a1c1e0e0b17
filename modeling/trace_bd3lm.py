"""A record of the denoising, step by step, for pictures and for the curious."""

from typing import NamedTuple

import torch


class TraceStep(NamedTuple):
    """One denoising step of a block; tensors on the CPU, `(batch, block_size)`."""

    block: int  # a number that the steps of one block share, and that grows from block to block
    tokens: torch.Tensor  # after the step; the mask token where nothing is revealed
    revealed: torch.Tensor  # bool, revealed in this step; what was known before and is masked now, was remasked
    confidence: torch.Tensor  # float, probability of a revealed token under the scores it was drawn from; 0 elsewhere
    columns: torch.Tensor  # column of `sequences` where each place stands, -1 for none; cut rows end before some


class Trace:
    """The steps of one call.

    Args:
        columns: `(batch, columns of the canvas)`, what becomes [`TraceStep.columns`].
    """

    def __init__(self, columns: torch.Tensor) -> None:
        self.columns = columns.cpu()
        self.steps: list[TraceStep] = []

    def add(self, begin: int, block: torch.Tensor, revealed: torch.Tensor, confidence: torch.Tensor) -> None:
        """Keep a step of the block `(batch, block_size)` that begins at this column of the canvas."""
        columns = self.columns[:, begin : begin + block.shape[1]]
        confidence = confidence.cpu().masked_fill(~revealed, 0.0)
        self.steps.append(TraceStep(begin, block.cpu().clone(), revealed, confidence, columns))


def sequence_columns(columns: int, start: torch.Tensor, real: torch.Tensor, *, continued: bool = True) -> torch.Tensor:
    """Where each column of a canvas stands in the result, -1 for nowhere; `(batch, columns)`.

    Args:
        columns: of the canvas.
        start: `(batch,)`, column of the canvas where each row's first token stands.
        real: bool `(batch, width)`, where the prompt has tokens.
        continued: the row goes on behind the prompt's last column, as in `generate`.
    """
    width = real.shape[1]
    number = torch.arange(columns, device=real.device) - start.unsqueeze(1)
    where = (~real).long().argsort(dim=1, stable=True)  # columns that hold tokens come first, in their order
    inside = where.gather(1, number.clamp(0, width - 1))
    lengths = real.sum(1, keepdim=True)
    behind = width + number - lengths if continued else torch.full_like(number, -1)
    return torch.where(number < lengths, inside, behind).masked_fill(number < 0, -1)


__all__ = ["Trace", "TraceStep", "sequence_columns"]
