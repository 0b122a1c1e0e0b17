"""Where a batch of texts is written block by block: rows whose blocks end together, and the rules that end a row."""

from dataclasses import dataclass

import torch
from transformers.generation import GenerationConfig
from transformers.generation.stopping_criteria import MaxLengthCriteria, MaxTimeCriteria, StoppingCriteriaList


@dataclass
class Canvas:
    """A batch of texts laid out so that the blocks of all rows end at the same columns.

    Row r's first token stands at column `start[r]`, a multiple of the block size; rows with fewer full prompt blocks
    start later. What is still to be written holds the mask token.
    """

    text: torch.Tensor  # (batch, columns)
    start: torch.Tensor  # (batch,), column of each row's first token
    lengths: torch.Tensor  # (batch,), tokens of each row's prompt
    first_block: int  # column where the first block that holds new tokens begins, the same for all rows
    new_tokens: int  # tokens that each row may get
    block_size: int
    key_valid: torch.Tensor | None  # bool (batch, columns), None when all rows start at column 0

    @property
    def position_ids(self) -> torch.Tensor:
        """Rotary positions `(batch or 1, columns)`, counted from each row's first token."""
        columns = torch.arange(self.text.shape[1], device=self.text.device)
        if self.key_valid is None:
            return columns.unsqueeze(0)
        return (columns - self.start.unsqueeze(1)).clamp(min=0)

    @property
    def prompt_end(self) -> torch.Tensor:
        """Column `(batch,)` of each row's first new token."""
        return self.start + self.lengths

    def blocks(self) -> range:
        """First columns of the blocks that hold new tokens."""
        return range(self.first_block, self.text.shape[1], self.block_size)

    def written(self, count: int) -> torch.Tensor:
        """The first `count` new tokens of each row, `(batch, count)`; a row that ends earlier repeats its last one."""
        columns = self.prompt_end.unsqueeze(1) + torch.arange(count, device=self.text.device)
        return self.text.gather(1, columns.clamp(max=self.text.shape[1] - 1))


def lay_out(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, new_tokens: int, block_size: int, mask_token_id: int
) -> Canvas:
    """Put prompts `(batch, length)`, padded on either side, on a [`Canvas`] with room for `new_tokens` each."""
    batch, width = input_ids.shape
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    lengths = real.sum(1)
    first_block = int(lengths.max()) // block_size * block_size
    start = first_block - lengths // block_size * block_size
    end = int((start + lengths).max()) + new_tokens
    columns = -(-end // block_size) * block_size
    text = input_ids.new_full((batch, columns), mask_token_id)
    column = torch.arange(columns, device=input_ids.device)
    prompt = (column >= start.unsqueeze(1)) & (column < (start + lengths).unsqueeze(1))
    text[prompt] = input_ids[real]  # both in reading order
    valid = column >= start.unsqueeze(1) if start.any() else None
    return Canvas(text, start, lengths, first_block, new_tokens, block_size, valid)


class StopRules:
    """Where each row ends.

    Args:
        criteria: transformers' stopping criteria.
        prompt: `(batch, length)`, as given to `generate`.

    Raises:
        ValueError: rows may end at different lengths, and no token is known to pad them with.
    """

    def __init__(
        self, criteria: StoppingCriteriaList, prompt: torch.Tensor, canvas: Canvas, config: GenerationConfig
    ) -> None:
        # Length is counted here, for rows whose blocks end at different lengths. Time is up for a whole block.
        self.clocks = StoppingCriteriaList(c for c in criteria if isinstance(c, MaxTimeCriteria))
        self.criteria = StoppingCriteriaList(
            c for c in criteria if not isinstance(c, (MaxLengthCriteria, MaxTimeCriteria))
        )
        self.prompt, self.canvas = prompt, canvas
        batch, device = prompt.shape[0], prompt.device
        self.finished = torch.zeros(batch, dtype=torch.bool, device=device)
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)  # new tokens of each row
        self.all_finished = False
        pad, eos = config.pad_token_id, config.eos_token_id
        self.pad_token_id = pad if pad is not None else eos[0] if isinstance(eos, list) else eos
        if self.pad_token_id is None and batch > 1 and (self.criteria or self.clocks):
            raise ValueError(
                "rows of a batch may stop at different lengths, and there is no token to pad them with: set "
                "pad_token_id (or eos_token_id) in the generation config."
            )

    def update(self, begin: int) -> torch.Tensor:
        """Take in the block at column `begin`: judge each of its tokens as if they came one by one.

        Returns:
            the first row's new tokens, up to its end, for the streamer.
        """
        canvas, shown = self.canvas, int(self.lengths[0])
        known = (begin + canvas.block_size - canvas.prompt_end).clamp(max=canvas.new_tokens)
        goal = torch.where(self.finished, self.lengths, known)
        if self.criteria:
            text = torch.cat([self.prompt, canvas.written(int(known.max()))], dim=1)
            running = ~self.finished
            for count in range(int(self.lengths[running].min()) + 1, int(known.max()) + 1):
                judged = ~self.finished & (count > self.lengths) & (count <= known)
                done = self.criteria(text[:, : self.prompt.shape[1] + count], None) & judged
                goal = torch.where(done, count, goal)
                self.finished |= done
        self.lengths = goal
        self.finished |= goal >= canvas.new_tokens
        if self.clocks:
            self.finished |= self.clocks(self.prompt, None)
        self.all_finished = bool(self.finished.all())
        self._pad_finished_rows()
        return canvas.written(int(self.lengths[0]))[0, shown:]

    def _pad_finished_rows(self) -> None:
        """What a finished row holds behind its end becomes padding, so that the cache holds what the output shows."""
        if self.pad_token_id is not None:
            end = (self.canvas.prompt_end + self.lengths).unsqueeze(1)
            behind = torch.arange(self.canvas.text.shape[1], device=end.device) >= end
            self.canvas.text[behind & self.finished.unsqueeze(1)] = self.pad_token_id

    def new_tokens(self) -> torch.Tensor:
        """New tokens of all rows `(batch, longest)`, padded behind each row's end."""
        longest = int(self.lengths.max())
        tokens = self.canvas.written(longest)
        behind = torch.arange(longest, device=tokens.device) >= self.lengths.unsqueeze(1)
        return tokens if self.pad_token_id is None else tokens.masked_fill(behind, self.pad_token_id)


__all__ = ["Canvas", "StopRules", "lay_out"]
