"""Writing text block after block with SSD-LM (arXiv 2210.17432, Sec. 3.3): denoise, project, add the next noise.

A block begins as noise, x_T = K eps. For t = T, ..., 1 the network gives logits of the clean tokens, a projection P
makes almost-one-hot vectors of them, and

    x_{t-1} = sqrt(abar_{t-1}) P(logits) + sqrt(1 - abar_{t-1}) K z,      z ~ N(0, 1).

The block's tokens are the most likely ones of the last step, t = 1.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers.generation.logits_process import LogitsProcessorList

from .canvas_bd3lm import Canvas
from .draws_bd3lm import Generators, draw_tokens, random_uniform
from .processors_bd3lm import PlaceProcessors, never_written
from .simplex_ssdlm import PROJECTIONS, noisy_logits, simplex_schedule


class SimplexDraws:
    """The random numbers of a call.

    Args:
        generator: one for the whole call, or one for each row of the batch, whose text is then what it would be
            alone; by default torch's global one.
        greedy: take the most likely tokens instead of drawing them.
    """

    def __init__(self, generator: Generators = None, *, greedy: bool = False) -> None:
        self.generator, self.greedy = generator, greedy

    def normal(self, rows: Sequence[int], shape: tuple[int, int], device: torch.device) -> torch.Tensor:
        """Standard normal numbers `(rows, *shape)` for these rows of the batch."""
        generator = self._of(rows)
        if isinstance(generator, list):
            return torch.stack([torch.randn(shape, generator=own, device=own.device).to(device) for own in generator])
        home = device if generator is None else generator.device
        return torch.randn((len(rows), *shape), generator=generator, device=home).to(device)

    def tokens(self, rows: Sequence[int], scores: torch.Tensor) -> torch.Tensor:
        """A token for each of the log-probabilities `(rows * places, vocab_size)`, row after row."""
        if self.greedy:
            return scores.argmax(dim=-1)
        places = scores.shape[0] // len(rows)
        uniform = random_uniform((len(rows), places), scores.device, self._of(rows))
        return draw_tokens(scores, uniform.flatten())

    def _of(self, rows: Sequence[int]) -> Generators:
        return [self.generator[row] for row in rows] if isinstance(self.generator, list) else self.generator


def all_before(canvas: Canvas, begin: int) -> int:
    """All text before the block."""
    return 0


def block_before(canvas: Canvas, begin: int) -> int:
    """The block before the block, or the prompt."""
    return 0 if begin == canvas.first_block else begin - canvas.block_size


# Where the context of the block that begins at a column begins, but for the window.
CONTEXTS: dict[str, Callable[[Canvas, int], int]] = {"all": all_before, "previous_block": block_before}


def lay_out_behind(prompt: torch.Tensor, padding: torch.Tensor | None, new_tokens: int, config: Any) -> Canvas:
    """A canvas whose blocks follow the prompts `(batch, width)`, which are padded on the left."""
    batch, width = prompt.shape
    size = config.block_size
    columns = -(-new_tokens // size) * size
    text = F.pad(prompt, (0, columns), value=config.mask_token_id)
    start = prompt.new_zeros(batch) if padding is None else padding.sum(1)
    valid = None if padding is None else F.pad(~padding, (0, columns), value=True)
    return Canvas(text, start, width - start, width, new_tokens, size, valid)


class SimplexWriter:
    """Writes the blocks of a canvas with a model.

    Args:
        prompt: `(batch, width)`, padded on the left.
        generation_config: read for `context`, `projection`, `top_p`, `num_denoising_steps`, what is never written, and
            what is to be kept of the last steps.
        draws: where the random numbers come from.
    """

    def __init__(
        self,
        model: Any,
        canvas: Canvas,
        prompt: torch.Tensor,
        processors: LogitsProcessorList,
        generation_config: Any,
        draws: SimplexDraws,
    ) -> None:
        self.model, self.canvas, self.draws = model, canvas, draws
        self.processors = PlaceProcessors(processors, canvas, prompt)
        self.scale: float = model.config.one_hot_value
        self.steps: int = generation_config.num_denoising_steps
        self.top_p: float = generation_config.top_p
        self.project = PROJECTIONS[generation_config.projection]
        self.context_begin = CONTEXTS[generation_config.context]
        forbidden = never_written(model.config.mask_token_id, generation_config)
        self.forbidden = torch.tensor(forbidden, device=canvas.text.device)
        recorded = bool(generation_config.return_dict_in_generate)
        # Of the last step of each block, (batch, block_size, vocab_size).
        self.scores: list[torch.Tensor] | None = [] if recorded and generation_config.output_scores else None
        self.logits: list[torch.Tensor] | None = [] if recorded and generation_config.output_logits else None
        self.count = 0  # passes of the network
        # Some place could not get any token.
        self.dead = torch.zeros((), dtype=torch.bool, device=canvas.text.device)

    def denoise(self, begin: int, finished: torch.Tensor) -> None:
        """Write the block that begins at this column, in the rows that are not finished (bool `(batch,)`, host).

        1. The block is noise.
        2. In each step the noise of the next level is drawn, the network gives logits, and processors judge them.
        3. The projection of the logits gets the noise; behind the last step, the most likely tokens stay.
        """
        device = self.canvas.text.device
        rows = (~finished).nonzero().squeeze(1)
        numbers, live = rows.tolist(), rows.to(device)
        context, mask = self._context(begin, live)
        shape = (self.canvas.block_size, self.model.config.vocab_size)
        self.dead.zero_()
        # 1. Noise
        noisy = self.scale * self.draws.normal(numbers, shape, device)
        for step in range(self.steps, 0, -1):
            t = torch.full((len(numbers),), float(step), device=device)
            # 2. Logits
            normal = self.draws.normal(numbers, shape, device) if step > 1 else None
            logits = self.model.denoise(context, mask, noisy, t / self.steps)
            self.count += 1
            logits.index_fill_(-1, self.forbidden, -torch.inf)
            projected = torch.empty_like(logits)
            scores = self._judge(begin, live, logits, numbers, None if normal is None else projected)
            # 3. Less noise
            if normal is not None:
                alpha_bar = simplex_schedule(t, self.steps).alpha_bar_before
                noisy = noisy_logits(projected, alpha_bar, normal, self.scale)
            else:
                self._keep(live, logits, scores)
        if self.processors.forbidding and self.dead:
            raise ValueError(
                "the logits processors leave no token to choose from at some place (the mask token, and padding "
                "unless it is also the end token, are never written): loosen the constraints."
            )

    def _context(self, begin: int, live: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Text before a block that the network sees, `(rows, width)`, and where it is no padding; None: everywhere."""
        room = self.model.config.model_length - self.canvas.block_size
        columns = slice(max(self.context_begin(self.canvas, begin), begin - room), begin)
        context, valid = self.canvas.text[live, columns], self.canvas.key_valid
        if valid is None or self.canvas.last_start <= columns.start:
            return context, None
        return context, valid[live, columns].long()

    def _judge(
        self, begin: int, live: torch.Tensor, logits: torch.Tensor, numbers: list[int], projected: torch.Tensor | None
    ) -> torch.Tensor:
        """Processed logits `(rows, block_size, vocab_size)`; writes the tokens that they stand for into the block.

        Processors that read the text judge one column after the other, each with the tokens just chosen to its left.

        Args:
            projected: filled with the projection. Without it the tokens are the most likely ones.
        """
        size = self.canvas.block_size
        in_order = bool(self.processors.reading)
        scores = torch.empty_like(logits)
        for first in range(size) if in_order else [0]:
            columns = slice(first, first + 1 if in_order else size)
            part = scores[:, columns] = self._process(begin + first, live, logits[:, columns])
            if projected is None:
                tokens = part.argmax(dim=-1)
            else:
                draw = lambda inside: self.draws.tokens(numbers, inside)  # noqa: E731
                projected[:, columns], tokens = self.project(part, self.scale, self.top_p, draw)
            self.canvas.text[live, begin + columns.start : begin + columns.stop] = tokens
        return scores

    def _process(self, begin: int, live: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """What the logits processors make of `(rows, columns, vocab_size)` logits of the columns from `begin` on.

        Behind the last token that was asked for nothing is judged: that part of a block is written and not shown.
        """
        index = begin - self.canvas.first_block + torch.arange(logits.shape[1])
        shown = int((index < self.canvas.new_tokens).sum())
        if not self.processors.processors or not shown:
            return logits
        rows = live.cpu().repeat_interleave(shown)
        flat = logits[:, :shown].flatten(0, 1).clone()
        judged = self.processors(flat, rows, index[:shown].repeat(len(live))).index_fill(
            -1, self.forbidden, -torch.inf
        )
        if self.processors.forbidding:
            dead = judged.isneginf().all(dim=-1)
            self.dead |= dead.any()
            judged = judged.masked_fill(dead.unsqueeze(1), 0.0)
        return torch.cat([judged.view(len(live), shown, -1), logits[:, shown:]], dim=1)

    def _keep(self, live: torch.Tensor, logits: torch.Tensor, scores: torch.Tensor) -> None:
        for kept, values in ((self.logits, logits), (self.scores, scores)):
            if kept is not None:
                whole = values.new_zeros(self.canvas.text.shape[0], *values.shape[1:])
                kept.append(whole.index_copy_(0, live, values))


def of_tokens(kept: list[torch.Tensor] | None, count: int) -> tuple[torch.Tensor, ...] | None:
    """What was kept of each of the first `count` new tokens, `(batch, vocab_size)`; zeros where a row had ended."""
    return None if kept is None else tuple(torch.cat(kept, dim=1).unbind(1)[:count])


__all__ = ["CONTEXTS", "SimplexDraws", "SimplexWriter", "lay_out_behind", "of_tokens"]
