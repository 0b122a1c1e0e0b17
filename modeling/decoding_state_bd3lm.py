"""The published stop rules as stopping criteria, judged row by row (arXiv 2503.09573, Sec. 6.2 and App. C.5).

The published sampler looks once per block, pools the rows of a batch, and also shortens the text: to its second end
token, or by the whole degenerate window. The criteria only end a row; [`published_length`] has the rest.

Where a batch of texts is written block by block: rows whose blocks end together, and the rules that end a row.
"""

from dataclasses import dataclass, field
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


class TextCriteria(StoppingCriteria):
    """A stopping criterion that reads the text and should not take padding for text."""

    def __call__(
        self,
        input_ids: torch.Tensor,
        scores: tuple[torch.Tensor, ...] | None,
        padding: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Whether each row ends here, bool `(batch,)`.

        Args:
            input_ids: `(batch, length)`, the text so far.
            padding: bool `(batch, length)`, True where a row has no token, at its beginning only; None: nowhere.
        """
        raise NotImplementedError


class EntropyStopCriteria(TextCriteria):
    """Ends a row whose last `window` tokens are degenerate: the entropy of their frequencies is below `entropy`.

    ```python
    >>> model.generate(ids, stopping_criteria=[EntropyStopCriteria(4.0)], max_new_tokens=5000)
    ```

    Args:
        entropy: bound in nats; the published one is 4.0.
        window: tokens that are looked at; a row of at most so many is not judged.

    Raises:
        ValueError: a bound that no text or every text falls below, or a window of no tokens.
    """

    def __init__(self, entropy: float, window: int = 256) -> None:
        check_entropy_stop(entropy, window)
        self.entropy, self.window = entropy, window

    def __call__(
        self,
        input_ids: torch.Tensor,
        scores: tuple[torch.Tensor, ...] | None,
        padding: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if input_ids.shape[1] <= self.window:
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        degenerate = token_entropy(input_ids[:, -self.window :]) < self.entropy
        # Padding comes first, so a row is longer than the window when the token before the window is one.
        return degenerate if padding is None else degenerate & ~padding[:, -self.window - 1]


class SecondEosCriteria(TextCriteria):
    """Ends a row that holds two end tokens, the published rule for texts of any length.

    The beginning counts where, as in GPT-2, the same token begins and ends a text.

    Args:
        eos_token_id: one id or several.
    """

    def __init__(self, eos_token_id: int | list[int] | torch.Tensor) -> None:
        self.eos_token_id = torch.as_tensor(eos_token_id).reshape(-1)

    def __call__(
        self,
        input_ids: torch.Tensor,
        scores: tuple[torch.Tensor, ...] | None,
        padding: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        return self.ends(input_ids, padding).sum(dim=1) >= 2

    def ends(self, input_ids: torch.Tensor, padding: torch.Tensor | None = None) -> torch.Tensor:
        """Where end tokens stand, bool `(batch, length)`."""
        ends = torch.isin(input_ids, self.eos_token_id.to(input_ids.device))
        return ends if padding is None else ends & ~padding


def token_entropy(input_ids: torch.Tensor) -> torch.Tensor:
    """Entropy in nats of the token frequencies in each row of `(batch, length)`; `(batch,)` in float64."""
    ordered = input_ids.sort(dim=1).values
    fresh = torch.ones_like(ordered, dtype=torch.bool)
    fresh[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    # Counts of each distinct token, at its number within the row.
    counts = torch.zeros(ordered.shape, dtype=torch.float64, device=ordered.device)
    counts.scatter_add_(1, fresh.long().cumsum(dim=1) - 1, torch.ones_like(counts))
    return torch.special.entr(counts / ordered.shape[1]).sum(dim=1)


def published_length(
    input_ids: torch.Tensor,
    *,
    entropy: float = 4.0,
    window: int = 256,
    eos_token_id: int | list[int] | None = None,
) -> torch.Tensor:
    """Tokens `(batch,)` that the published sampler keeps of each row `(batch, length)`, without padding.

    A degenerate row loses its last `window` tokens; else, with `eos_token_id`, a row ends with its second end token.
    Published, rows are pooled and texts shorter than the window are cut at a negative index; here each row is judged
    for itself, and texts that short stay whole.
    """
    batch, length = input_ids.shape
    kept = torch.full((batch,), length, device=input_ids.device)
    if eos_token_id is not None:
        second = SecondEosCriteria(eos_token_id).ends(input_ids).cumsum(dim=1) >= 2
        kept -= (second.sum(dim=1) - 1).clamp(min=0)
    return torch.where(EntropyStopCriteria(entropy, window)(input_ids, None), length - window, kept)


def check_entropy_stop(entropy: Any, window: Any) -> None:
    """Refuse an entropy stop that can not work."""
    if not isinstance(entropy, (int, float)) or not entropy > 0:
        raise ValueError(
            f"entropy_stop={entropy!r}: give a positive number of nats (the published rule has 4.0; no text has less "
            f"than 0), or None for no such stop."
        )
    if not isinstance(window, int) or window < 2:
        raise ValueError(f"entropy_stop_window={window!r}: give at least 2 tokens (the published rule looks at 256).")


@dataclass
class SequenceBuffer:
    """A batch of texts laid out so that the blocks of all rows end at the same columns.

    Row r's first token stands at column `start[r]`, a multiple of the block size; rows with fewer full prompt blocks
    start later. What is still to be written holds the mask token.
    """

    text: torch.Tensor  # (batch, columns)
    start: torch.Tensor  # (batch,), column of each row's first token
    lengths: torch.Tensor  # (batch,), tokens of each row's prompt; 0 where new ones stand among given ones
    first_block: int  # column where the first block that holds new tokens begins, the same for all rows
    new_tokens: int  # tokens that each row may get
    block_size: int
    key_valid: torch.Tensor | None  # bool (batch, columns), None when all rows start at column 0
    holes: torch.Tensor | None = None  # bool (batch, columns) on the host, what is written where it is not the rest
    stride: int | None = None  # columns from block to block, where blocks overlap; None: block_size

    host_prompt_end: torch.Tensor = field(init=False)  # `prompt_end` on the host
    last_start: int = field(init=False)  # column from which on every row has begun

    def __post_init__(self) -> None:
        self.host_prompt_end, self.last_start = self.prompt_end.cpu(), int(self.start.max())

    def positions(self, first: int, stop: int) -> torch.Tensor:
        """Rotary positions `(batch or 1, stop - first)` of some columns, counted from each row's first token."""
        columns = torch.arange(first, stop, device=self.text.device).unsqueeze(0)
        return columns if self.last_start == 0 else (columns - self.start.unsqueeze(1)).clamp(min=0)

    @property
    def prompt_end(self) -> torch.Tensor:
        """Column `(batch,)` of each row's first new token."""
        return self.start + self.lengths

    def blocks(self) -> range:
        """First columns of the blocks that hold new tokens."""
        return range(self.first_block, self.text.shape[1] - self.block_size + 1, self.stride or self.block_size)

    def gaps(self, begin: int) -> torch.Tensor:
        """What is to be written in the block that begins at this column, bool `(batch, block_size)` on the host."""
        if self.holes is not None:
            return self.holes[:, begin : begin + self.block_size]
        column = begin + torch.arange(self.block_size)
        overlap = 0 if self.stride is None or begin == self.first_block else self.block_size - self.stride
        return (column >= self.host_prompt_end.unsqueeze(1)) & (column >= begin + overlap)

    def written(self, stop: int, start: int = 0) -> torch.Tensor:
        """New tokens `start` to `stop` of each row, `(batch, stop - start)`; behind its end a row repeats its last."""
        columns = self.prompt_end.unsqueeze(1) + torch.arange(start, stop, device=self.text.device)
        return self.text.gather(1, columns.clamp(max=self.text.shape[1] - 1))


def lay_out(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    new_tokens: int,
    block_size: int,
    mask_token_id: int,
    stride: int | None = None,
) -> SequenceBuffer:
    """Put prompts `(batch, length)`, padded on either side, on a [`Canvas`] with room for `new_tokens` each.

    Args:
        stride: columns from block to block, at most `block_size`; below it a block also holds the end of the text
            before it.
    """
    batch, width = input_ids.shape
    step = stride or block_size
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    lengths = real.sum(1)
    full = (((lengths - block_size) // step + 1) * step).clamp(min=0)  # column of each row's first block with gaps
    first_block = int(full.max())
    start = first_block - full
    end = int((start + lengths).max()) + new_tokens
    columns = block_size + max(0, -(-(end - block_size) // step) * step)
    text = input_ids.new_full((batch, columns), mask_token_id)
    column = torch.arange(columns, device=input_ids.device)
    prompt = (column >= start.unsqueeze(1)) & (column < (start + lengths).unsqueeze(1))
    text[prompt] = input_ids[real]  # both in reading order
    valid = column >= start.unsqueeze(1) if start.any() else None
    return SequenceBuffer(text, start, lengths, first_block, new_tokens, block_size, valid, stride=stride)


class StopRules:
    """Where each row ends. What is counted lies on the host; a block costs one wait for the judgement of the criteria.

    Args:
        criteria: transformers' stopping criteria.
        prompt: `(batch, length)`, padded on the left.
        padding: bool `(batch, length)`, True where the prompt has no token; None: nowhere.

    Raises:
        ValueError: rows may end at different lengths, and no token is known to pad them with.
    """

    def __init__(
        self,
        criteria: StoppingCriteriaList,
        prompt: torch.Tensor,
        canvas: SequenceBuffer,
        config: GenerationConfig,
        padding: torch.Tensor | None = None,
    ) -> None:
        # Length is counted here, for rows whose blocks end at different lengths. Time is up for a whole block.
        self.clocks = StoppingCriteriaList(c for c in criteria if isinstance(c, MaxTimeCriteria))
        self.criteria = StoppingCriteriaList(
            c for c in criteria if not isinstance(c, (MaxLengthCriteria, MaxTimeCriteria))
        )
        self.prompt, self.canvas = prompt, canvas
        batch, self._width = prompt.shape
        self.finished = torch.zeros(batch, dtype=torch.bool)
        self.lengths = torch.zeros(batch, dtype=torch.long)  # new tokens of each row
        pad, eos = config.pad_token_id, config.eos_token_id
        self.pad_token_id = pad if pad is not None else eos[0] if isinstance(eos, list) else eos
        if self.pad_token_id is None and batch > 1 and (self.criteria or self.clocks):
            raise ValueError(
                "rows of a batch may stop at different lengths, and there is no token to pad them with: set "
                "pad_token_id (or eos_token_id) in the generation config."
            )
        if self.criteria:
            # What the criteria read, filled block by block.
            self._text = F.pad(prompt, (0, canvas.new_tokens))
            self._padding = None if padding is None else F.pad(padding, (0, canvas.new_tokens))

    @property
    def all_finished(self) -> bool:
        return all(self.finished.tolist())

    def update(self, begin: int) -> torch.Tensor:
        """Take in the block at column `begin`: judge each of its tokens as if they came one by one.

        Returns:
            the first row's new tokens, up to its end, for the streamer.
        """
        canvas, shown, ended_before = self.canvas, self.lengths.tolist()[0], self.finished
        known = (begin + canvas.block_size - canvas.host_prompt_end).clamp(max=canvas.new_tokens)
        goal = torch.where(self.finished, self.lengths, known)
        if self.criteria:
            ends = self._judge(known)
            goal = torch.minimum(goal, ends)
            self.finished = self.finished | (ends <= known)
        self.lengths = goal
        self.finished = self.finished | (goal >= canvas.new_tokens)
        if self.clocks:
            self.finished = self.finished | self.clocks(self.prompt, None).cpu()
        self._pad(self.finished & ~ended_before)
        return canvas.written(self.lengths.tolist()[0], shown)[0]

    def _judge(self, known: torch.Tensor) -> torch.Tensor:
        """How many new tokens each row has when a criterion first holds, on the host; more than `known` for never."""
        device, width = self._text.device, self._width
        first = min(self.lengths.masked_fill(self.finished, self.canvas.new_tokens).tolist())
        last = max(known.tolist())
        self._text[:, width + first : width + last] = self.canvas.written(last, first)
        never = last + 1
        ends = torch.full((len(known),), never, device=device)
        for count in range(first + 1, last + 1):
            judged = (~self.finished & (count > self.lengths) & (count <= known)).to(device, non_blocking=True)
            text = self._text[:, : width + count]
            padding = None if self._padding is None else self._padding[:, : width + count]
            for criterion in self.criteria:
                known_padding = {"padding": padding} if isinstance(criterion, TextCriteria) else {}
                ends = torch.where(judged & criterion(text, None, **known_padding), ends.clamp(max=count), ends)
        return ends.cpu()

    def _pad(self, rows: torch.Tensor) -> None:
        """What a finished row holds behind its end becomes padding, so that the cache holds what the output shows."""
        if self.pad_token_id is not None and any(rows.tolist()):
            text = self.canvas.text
            end = (self.canvas.host_prompt_end + self.lengths).masked_fill(~rows, text.shape[1])
            behind = torch.arange(text.shape[1], device=text.device) >= end.to(text.device).unsqueeze(1)
            text.masked_fill_(behind, self.pad_token_id)

    def new_tokens(self) -> torch.Tensor:
        """New tokens of all rows `(batch, longest)`, padded behind each row's end."""
        longest = int(self.lengths.max())
        tokens = self.canvas.written(longest)
        behind = torch.arange(longest, device=tokens.device) >= self.lengths.to(tokens.device).unsqueeze(1)
        return tokens if self.pad_token_id is None else tokens.masked_fill(behind, self.pad_token_id)


__all__ = [
    "EntropyStopCriteria",
    "SecondEosCriteria",
    "SequenceBuffer",
    "StopRules",
    "TextCriteria",
    "lay_out",
    "published_length",
    "token_entropy",
]
