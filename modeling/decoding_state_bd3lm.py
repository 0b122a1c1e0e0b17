"""The state of a batch that is decoded block by block: its token buffer, and which rows are finished.

The published stop rules (arXiv 2503.09573, Sec. 6.2 and App. C.5) are stopping criteria here, applied to each row. The
published sampler checks once per block, pools the rows of a batch, and also truncates the text. The criteria only end
a row.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from transformers.generation import GenerationConfig
from transformers.generation.stopping_criteria import (
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
)

from .noise_bd3lm import wide_float


class TextCriteria(StoppingCriteria):
    """A stopping criterion that must not mistake padding for text.

    Calls pass `padding`, bool `(batch, length)`, True at the leading positions without a token; None: no padding.
    """


class BlockCriteria(StoppingCriteria):
    """A stopping criterion that sees every row's new tokens after each block, and can end the whole batch there.

    The last tokens of a row that another criterion ends come with the block in which it ends.
    """

    def end_block(self, new_tokens: list[list[int]], finished: list[bool]) -> bool:
        """Return whether the call ends after this block.

        Args:
            new_tokens: the tokens of each row since the previous block.
            finished: whether another criterion has ended each row.
        """
        raise NotImplementedError

    def __call__(self, input_ids: torch.Tensor, scores: tuple[torch.Tensor, ...] | None, **kwargs: Any) -> Any:
        """Treat each token as a block, in transformers' own loop, which does not report which rows have ended."""
        ends = self.end_block(input_ids[:, -1:].tolist(), [False] * len(input_ids))
        return torch.full((len(input_ids),), ends, device=input_ids.device)


class EntropyStopCriteria(TextCriteria):
    """End a row whose last `window` tokens are degenerate: the entropy of their frequencies is below `entropy`.

    ```python
    >>> model.generate(ids, stopping_criteria=[EntropyStopCriteria(4.0)], max_new_tokens=5000)
    ```

    Args:
        entropy: bound in nats; the published one is 4.0.
        window: number of tokens over which the entropy is computed. Rows of at most this many tokens continue.

    Raises:
        ValueError: if the bound is not a positive number, or the window is shorter than 2 tokens.
    """

    def __init__(self, entropy: float, window: int = 256) -> None:
        if isinstance(entropy, bool) or not isinstance(entropy, (int, float)) or not entropy > 0:
            raise ValueError(
                f"entropy_stop={entropy!r}: give a positive number of nats (the published rule uses 4.0), or None to "
                f"turn this stop off."
            )
        if isinstance(window, bool) or not isinstance(window, int) or window < 2:
            raise ValueError(f"entropy_stop_window={window!r}: give at least 2 tokens (the published rule uses 256).")
        self.entropy, self.window = entropy, window

    def __call__(self, input_ids: torch.Tensor, scores: Any, padding: Any = None, **kwargs: Any) -> Any:
        if input_ids.shape[1] <= self.window:
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        degenerate = token_entropy(input_ids[:, -self.window :]) < self.entropy
        # Padding comes first, so a row is longer than the window if there is a token right before the window.
        return degenerate if padding is None else degenerate & ~padding[:, -self.window - 1]


class SecondEosCriteria(TextCriteria):
    """End a row that contains two end tokens, the published rule for texts of any length.

    The first token counts if the same token begins and ends a text, as in GPT-2.

    Args:
        eos_token_id: one id or several.
    """

    def __init__(self, eos_token_id: int | list[int] | torch.Tensor) -> None:
        self.eos_token_id = torch.as_tensor(eos_token_id).reshape(-1)

    def __call__(self, input_ids: torch.Tensor, scores: Any, padding: Any = None, **kwargs: Any) -> Any:
        is_eos = torch.isin(input_ids, self.eos_token_id.to(input_ids.device))
        return (is_eos if padding is None else is_eos & ~padding).sum(dim=1) >= 2


def token_entropy(input_ids: torch.Tensor) -> torch.Tensor:
    """Return the entropy in nats of the token frequencies in each row of `(batch, length)`, as `(batch,)`."""
    ordered = input_ids.sort(dim=1).values
    is_new = torch.ones_like(ordered, dtype=torch.bool)
    is_new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    # The count of each distinct token, stored at its rank among the distinct tokens of the row.
    counts = torch.zeros(ordered.shape, dtype=wide_float(ordered.device), device=ordered.device)
    counts.scatter_add_(1, is_new.long().cumsum(dim=1) - 1, torch.ones_like(counts))
    return torch.special.entr(counts / ordered.shape[1]).sum(dim=1)


_LARGEST_BUFFER = 2**31  # tokens


@dataclass
class SequenceBuffer:
    """The token ids of a batch, shifted so that the blocks of all rows end at the same columns.

    Row r starts at column `row_start[r]`, a multiple of the block size; rows with fewer full prompt blocks start
    later. Positions to generate hold the mask token, but are identified by their column, never by that id, which a
    prompt or its padding may contain too.
    """

    token_ids: torch.Tensor  # (batch, columns)
    row_start: torch.Tensor  # (batch,), column of the first token of each row
    prompt_lengths: torch.Tensor  # (batch,), tokens of each prompt; 0 when filling blanks
    first_block: int  # column of the first block that holds new tokens, the same for all rows
    max_new_tokens: int  # per row
    block_size: int
    key_valid: torch.Tensor | None  # bool (batch, columns); None if all rows start at column 0
    blanks: torch.Tensor | None = None  # bool (batch, columns) on the CPU, to be filled; None: all after the prompts
    stride: int | None = None  # columns from block to block if blocks overlap; None: block_size

    # Kept on the CPU: loops over blocks must not wait for the device.
    prompt_end_cpu: torch.Tensor = field(init=False)
    last_start: int = field(init=False)  # first column at which every row has a token

    def __post_init__(self) -> None:
        self.prompt_end_cpu, self.last_start = self.prompt_end.cpu(), int(self.row_start.max())

    @classmethod
    def from_prompts(
        cls,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        max_new_tokens: int,
        block_size: int,
        mask_token_id: int,
        stride: int | None = None,
    ) -> "SequenceBuffer":
        """Align prompts `(batch, length)`, padded on either side, with room for `max_new_tokens` each.

        Args:
            stride: columns from block to block, at most `block_size`. If it is smaller, a block begins with the end of
                the text before it.
        """
        batch = input_ids.shape[0]
        step = stride or block_size
        real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        lengths = real.sum(1)
        # Columns before the first block of each row that has room for new tokens.
        full = (((lengths - block_size) // step + 1) * step).clamp(min=0)
        first_block = int(full.max())
        row_start = first_block - full
        # The row that ends last determines the number of columns, in whole steps.
        end = int((row_start + lengths).max()) + max_new_tokens
        columns = block_size + max(0, -(-(end - block_size) // step) * step)
        if batch * columns > _LARGEST_BUFFER:
            raise ValueError(
                f"max_new_tokens={max_new_tokens} for {batch} rows is more than memory can hold: generate at most "
                f"{_LARGEST_BUFFER // batch} tokens per row."
            )
        token_ids = input_ids.new_full((batch, columns), mask_token_id)
        column = torch.arange(columns, device=input_ids.device)
        prompt = (column >= row_start.unsqueeze(1)) & (column < (row_start + lengths).unsqueeze(1))
        token_ids[prompt] = input_ids[real]  # both in reading order
        valid = column >= row_start.unsqueeze(1) if row_start.any() else None
        return cls(token_ids, row_start, lengths, first_block, max_new_tokens, block_size, valid, stride=stride)

    @classmethod
    def from_blanks(
        cls, input_ids: torch.Tensor, attention_mask: torch.Tensor, block_size: int, mask_token_id: int
    ) -> tuple["SequenceBuffer", torch.Tensor]:
        """Align texts whose mask tokens are to be filled in. Also return which columns are text, as a bool mask.

        A text can end inside a block; the rest of that block is not part of the text and is not attended to.
        """
        laid_out = cls.from_prompts(input_ids, attention_mask, 0, block_size, mask_token_id)
        token_ids, row_start = laid_out.token_ids, laid_out.row_start
        column = torch.arange(token_ids.shape[1], device=input_ids.device)
        is_text = (column >= row_start.unsqueeze(1)) & (column < laid_out.prompt_end.unsqueeze(1))
        buffer = replace(
            laid_out,
            prompt_lengths=torch.zeros_like(row_start),
            first_block=0,
            max_new_tokens=token_ids.shape[1],
            key_valid=None if bool(is_text.all()) else is_text,
            blanks=((token_ids == mask_token_id) & is_text).cpu(),
        )
        return buffer, is_text

    @property
    def prompt_end(self) -> torch.Tensor:
        """Column `(batch,)` of the first new token of each row."""
        return self.row_start + self.prompt_lengths

    def position_ids(self, start: int, stop: int) -> torch.Tensor:
        """Return positions `(batch or 1, stop - start)` of columns, counted from the first token of each row."""
        columns = torch.arange(start, stop, device=self.token_ids.device).unsqueeze(0)
        return columns if self.last_start == 0 else (columns - self.row_start.unsqueeze(1)).clamp(min=0)

    def blocks(self) -> range:
        """Return the first columns of the blocks that hold new tokens."""
        return range(self.first_block, self.token_ids.shape[1] - self.block_size + 1, self.stride or self.block_size)

    def new_positions(self, begin: int) -> torch.Tensor:
        """Return which positions of a block are generated, bool `(batch, block_size)` on the CPU."""
        if self.blanks is not None:
            return self.blanks[:, begin : begin + self.block_size]
        column = begin + torch.arange(self.block_size)
        overlap = 0 if self.stride is None or begin == self.first_block else self.block_size - self.stride
        return (column >= self.prompt_end_cpu.unsqueeze(1)) & (column >= begin + overlap)

    def new_token_ids(self, stop: int, start: int = 0) -> torch.Tensor:
        """Return new tokens [start, stop) of each row, `(batch, stop - start)`. Shorter rows repeat their last one."""
        columns = self.prompt_end.unsqueeze(1) + torch.arange(start, stop, device=self.token_ids.device)
        return self.token_ids.gather(1, columns.clamp(max=self.token_ids.shape[1] - 1))


def pad_left(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Move the padding of prompts `(batch, length)` to the left. Also return its mask, or None without padding.

    Processors and criteria that read the text then find the new tokens right after it.
    """
    if bool(attention_mask.all()):
        return input_ids, None
    order = attention_mask.bool().long().argsort(dim=1, stable=True)
    return input_ids.gather(1, order), ~attention_mask.bool().gather(1, order)


class StopRules:
    """Track where each row ends.

    Counters live on the CPU. A block costs one device synchronisation, for the result of the stopping criteria.

    Args:
        criteria: transformers' stopping criteria.
        prompt: `(batch, length)`, padded on the left.
        padding: bool `(batch, length)`, True where the prompt has no token; None: no padding.

    Raises:
        ValueError: if rows can end at different lengths and no token can pad them.
    """

    def __init__(
        self,
        criteria: StoppingCriteriaList,
        prompt: torch.Tensor,
        buffer: SequenceBuffer,
        config: GenerationConfig,
        padding: torch.Tensor | None = None,
    ) -> None:
        # Lengths are counted here, since blocks of unequal prompts end at unequal lengths. Time is checked per block.
        self.time_criteria = StoppingCriteriaList(c for c in criteria if isinstance(c, MaxTimeCriteria))
        self.block_criteria = [c for c in criteria if isinstance(c, BlockCriteria)]
        self.criteria = StoppingCriteriaList(
            c for c in criteria if not isinstance(c, (MaxLengthCriteria, MaxTimeCriteria, BlockCriteria))
        )
        self.prompt, self.buffer = prompt, buffer
        batch, self._width = prompt.shape
        self.finished = torch.zeros(batch, dtype=torch.bool)
        self.lengths = torch.zeros(batch, dtype=torch.long)  # new tokens of each row
        pad, eos = config.pad_token_id, config.eos_token_id
        self.pad_token_id = pad if pad is not None else eos[0] if isinstance(eos, list) else eos
        if self.pad_token_id is None and batch > 1 and (self.criteria or self.time_criteria):
            raise ValueError(
                "rows of a batch can stop at different lengths, and no token is set to pad them: set "
                "pad_token_id (or eos_token_id) in the generation config."
            )
        if self.criteria:
            # The text that the criteria read, filled block by block.
            self._text = F.pad(prompt, (0, buffer.max_new_tokens))
            self._padding = None if padding is None else F.pad(padding, (0, buffer.max_new_tokens))

    @property
    def all_finished(self) -> bool:
        return all(self.finished.tolist())

    def update(self, begin: int) -> torch.Tensor:
        """Commit the block at column `begin` and apply the criteria token by token, as if generated one at a time.

        Returns:
            the new tokens of the first row, up to its end, for the streamer.
        """
        buffer, ended_before = self.buffer, self.finished
        # Prompts end at different positions of their block, so rows gain different numbers of tokens.
        available = (begin + buffer.block_size - buffer.prompt_end_cpu).clamp(max=buffer.max_new_tokens)
        lengths = torch.where(self.finished, self.lengths, available)
        if self.criteria:
            ends = self._first_ends(available)
            lengths = torch.minimum(lengths, ends)
            self.finished = self.finished | (ends <= available)
        before, self.lengths = self.lengths.tolist(), lengths
        if self.block_criteria and self._end_blocks(before):
            self.finished = torch.ones_like(self.finished)
        self.finished = self.finished | (lengths >= buffer.max_new_tokens)
        if self.time_criteria:
            self.finished = self.finished | self.time_criteria(self.prompt, None).cpu()
        self._pad(self.finished & ~ended_before)
        return buffer.new_token_ids(self.lengths.tolist()[0], before[0])[0]

    def _end_blocks(self, before: list[int]) -> bool:
        """Apply the block criteria to a block, given the number of new tokens that each row had before it."""
        lengths, finished = self.lengths.tolist(), self.finished.tolist()
        rows = self.buffer.new_token_ids(max(lengths)).tolist()
        tokens = [row[start:stop] for row, start, stop in zip(rows, before, lengths, strict=True)]
        ends = [criterion.end_block(tokens, finished) for criterion in self.block_criteria]  # all must see the block
        return any(ends)

    def _first_ends(self, available: torch.Tensor) -> torch.Tensor:
        """Return the number of new tokens `(batch,)` at which a criterion is first met; more than all if never."""
        device, width = self._text.device, self._width
        first = min(self.lengths.masked_fill(self.finished, self.buffer.max_new_tokens).tolist())
        last = max(available.tolist())
        self._text[:, width + first : width + last] = self.buffer.new_token_ids(last, first)
        never = last + 1
        # Criteria expect one new token at a time: they see the text of each length in turn.
        ends = torch.full((len(available),), never, device=device)
        for count in range(first + 1, last + 1):
            is_new = (~self.finished & (count > self.lengths) & (count <= available)).to(device, non_blocking=True)
            text = self._text[:, : width + count]
            padding = None if self._padding is None else self._padding[:, : width + count]
            for criterion in self.criteria:
                known_padding = {"padding": padding} if isinstance(criterion, TextCriteria) else {}
                ends = torch.where(is_new & criterion(text, None, **known_padding), ends.clamp(max=count), ends)
        return ends.cpu()

    def _pad(self, rows: torch.Tensor) -> None:
        """Pad finished rows after their end, so that the cache holds the same tokens as the output."""
        if self.pad_token_id is not None and any(rows.tolist()):
            token_ids = self.buffer.token_ids
            end = (self.buffer.prompt_end_cpu + self.lengths).masked_fill(~rows, token_ids.shape[1])
            end = end.to(token_ids.device, non_blocking=True).unsqueeze(1)
            ended = torch.arange(token_ids.shape[1], device=token_ids.device) >= end
            token_ids.masked_fill_(ended, self.pad_token_id)

    def new_tokens(self) -> torch.Tensor:
        """Return the new tokens of all rows `(batch, longest)`, padded after the end of each."""
        longest = int(self.lengths.max())
        tokens = self.buffer.new_token_ids(longest)
        ended = torch.arange(longest, device=tokens.device) >= self.lengths.to(tokens.device).unsqueeze(1)
        return tokens if self.pad_token_id is None else tokens.masked_fill(ended, self.pad_token_id)
