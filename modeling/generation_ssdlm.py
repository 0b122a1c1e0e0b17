"""Diffusion over the vocabulary simplex, and `generate` of SSD-LM (arXiv 2210.17432).

A token w is the logit vector K (2 onehot(w) - 1). The forward process adds Gaussian noise of scale K,

    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) K eps,      abar_t = f(t) / f(0),
    f(t) = cos^2( ((t / T + s) / (1 + s)) pi / 2 ),  s = 1e-4.

In `generate` (Sec. 3.3) a block starts as noise, x_T = K eps. For t = T, ..., 1 the network predicts logits of the
clean tokens, a projection P maps them to almost-one-hot vectors, and

    x_{t-1} = sqrt(abar_{t-1}) P(logits) + sqrt(1 - abar_{t-1}) K z,      z ~ N(0, 1).

The block's tokens are the most likely ones of the last step, t = 1.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers.generation.logits_process import LogitsProcessorList

from .decoding_bd3lm import ScoreRecord
from .decoding_state_bd3lm import SequenceBuffer
from .generation_config_bd3lm import BlockGenerationConfig, check_choice, check_count, check_probability
from .logits_process_bd3lm import PositionProcessors
from .samplers_bd3lm import Generators, random_uniform, sample_categorical


CONTEXTS = ("all", "previous_block")
_OFFSET = 1e-4


def simplex_alpha_bar(t: torch.Tensor, num_steps: int) -> torch.Tensor:
    """Return the remaining fraction of the signal's variance at steps `t`, from 0 to `num_steps`."""

    def signal(step: torch.Tensor) -> torch.Tensor:
        return torch.cos((step / num_steps + _OFFSET) / (1 + _OFFSET) * math.pi / 2) ** 2

    return signal(t) / signal(torch.zeros_like(t))


def almost_one_hot(input_ids: torch.Tensor, vocab_size: int, scale: float) -> torch.Tensor:
    """Return tokens as logits `(..., vocab_size)`: +scale at the token, -scale elsewhere."""
    logits = torch.full((*input_ids.shape, vocab_size), -float(scale), device=input_ids.device)
    return logits.scatter_(-1, input_ids.unsqueeze(-1), float(scale))


def noisy_logits(clean: torch.Tensor, alpha_bar: torch.Tensor, normal: torch.Tensor, scale: float) -> torch.Tensor:
    """Return x_t of x_0 and standard normal numbers, all `(batch, length, vocab_size)`; `alpha_bar` is `(batch,)`."""
    # The noise has the scale K of the signal, so their variances add up to a constant.
    alpha_bar = alpha_bar.view(-1, 1, 1)
    return alpha_bar.sqrt() * clean + (1 - alpha_bar).sqrt() * scale * normal


def nucleus(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """Return the smallest set of tokens with a probability of at least `top_p`, bool `(..., vocab_size)`."""
    ranked, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
    kept = ranked.cumsum(dim=-1) - ranked < top_p  # so the token that crosses `top_p` stays
    kept[..., 0] = True
    return torch.zeros_like(kept).scatter(-1, order, kept)


class Projection(NamedTuple):
    """Logits projected back onto almost-one-hot vectors."""

    logits: torch.Tensor  # (..., vocab_size)
    input_ids: torch.Tensor  # (...), the drawn or most likely token of each


def project_by_sampling(
    logits: torch.Tensor, scale: float, top_p: float, draw: Callable[[torch.Tensor], torch.Tensor]
) -> Projection:
    """Draw one token from the nucleus and give it +scale, all others -scale.

    Args:
        draw: maps log-probabilities `(rows, vocab_size)` to a token for each row, `(rows,)`.
    """
    inside = logits.masked_fill(~nucleus(logits, top_p), -torch.inf)
    ids = draw(inside.flatten(0, -2)).view(logits.shape[:-1])
    return Projection(almost_one_hot(ids, logits.shape[-1], scale), ids)


def project_evenly(logits: torch.Tensor, scale: float, top_p: float, _draw: Any = None) -> Projection:
    """Give every token of the nucleus +scale and all others -scale: multi-hot vectors."""
    inside = nucleus(logits, top_p)
    return Projection(torch.where(inside, float(scale), -float(scale)).to(logits.dtype), logits.argmax(dim=-1))


def project_unevenly(logits: torch.Tensor, scale: float, top_p: float, _draw: Any = None) -> Projection:
    """Give the most likely token +scale; other tokens of the nucleus keep their distance to it, down to -scale."""
    inside = nucleus(logits, top_p)
    best = logits.amax(dim=-1, keepdim=True)
    kept = (logits - best + scale).clamp(min=-scale)
    return Projection(torch.where(inside, kept, -float(scale)), logits.argmax(dim=-1))


PROJECTIONS: dict[str, Callable[..., Projection]] = {
    "sampling": project_by_sampling,
    "even": project_evenly,
    "uneven": project_unevenly,
}


class SimplexWriter:
    """Denoise the blocks of a buffer with a model.

    Args:
        prompt: `(batch, width)`, padded on the left.
        generation_config: read for `context`, `projection`, `top_p`, `num_denoising_steps`, `do_sample`, and which
            scores to record.
        generator: one for the whole call, or one per row, which makes a row independent of its batch; by default
            torch's global one.
    """

    def __init__(
        self,
        model: Any,
        buffer: SequenceBuffer,
        prompt: torch.Tensor,
        processors: LogitsProcessorList,
        generation_config: Any,
        generator: Generators = None,
    ) -> None:
        self.model, self.buffer, self.generator = model, buffer, generator
        self.processors = PositionProcessors(processors, buffer, prompt)
        self.scale: float = model.config.one_hot_value
        self.fields = generation_config
        self.project = PROJECTIONS[generation_config.projection]
        self.record = ScoreRecord(generation_config)
        self.num_forward_passes = 0

    def close(self, keep: bool) -> None:
        """Return None, since nothing can be cached."""

    def statistics(self, new_tokens: int) -> dict[str, Any]:
        """Return the fields of a generate output about the cost of `new_tokens` tokens, summed over all rows."""
        tokens_per_forward = new_tokens / self.num_forward_passes / len(self.buffer.token_ids)
        return {"num_forward_passes": self.num_forward_passes, "tokens_per_forward": tokens_per_forward}

    def denoise(self, begin: int, finished: torch.Tensor, streamer: Any = None) -> None:
        """Generate the block at column `begin`, in the rows that are not finished.

        1. Start from noise.
        2. In each step, draw the noise of the next level, compute logits, and apply the processors.
        3. Add the noise to the projection of the logits; after the last step, keep the most likely tokens.

        Args:
            finished: bool `(batch,)` on the CPU.
            streamer: unused, as a block has no tokens before its last step.
        """
        device, size = self.buffer.token_ids.device, self.buffer.block_size
        rows = (~finished).nonzero().squeeze(1)
        numbers, live = rows.tolist(), rows.to(device)
        context, mask = self._context(begin, live)
        shape = (size, self.model.config.vocab_size)
        # 1. Noise
        noisy = self.scale * self._normal(numbers, shape, device)
        for step in range(self.fields.num_denoising_steps, 0, -1):
            t = torch.full((len(numbers),), float(step), device=device)
            # 2. Logits. The noise is drawn before the tokens, as published.
            normal = self._normal(numbers, shape, device) if step > 1 else None
            logits = self.model.denoise(context, mask, noisy, t / self.fields.num_denoising_steps)
            self.num_forward_passes += 1
            projected = torch.empty_like(logits)
            scores = self._choose(begin, live, logits, numbers, None if normal is None else projected)
            # 3. Less noise
            if normal is not None:
                alpha_bar = simplex_alpha_bar(t - 1, self.fields.num_denoising_steps)
                noisy = noisy_logits(projected, alpha_bar, normal, self.scale)
        index = (begin - self.buffer.first_block + torch.arange(size)).repeat(len(rows))
        values = {"scores": scores.flatten(0, 1), "logits": logits.flatten(0, 1)}
        self.record.add(rows.repeat_interleave(size), index, **values)
        self.processors.check_any_token_left()

    def _normal(self, rows: list[int], shape: tuple[int, int], device: torch.device) -> torch.Tensor:
        """Return standard normal numbers `(rows, *shape)` for these rows of the batch."""
        generator = self._generators(rows)
        if isinstance(generator, list):
            return torch.stack([torch.randn(shape, generator=own, device=own.device).to(device) for own in generator])
        home = device if generator is None else generator.device
        return torch.randn((len(rows), *shape), generator=generator, device=home).to(device)

    def _draw(self, rows: list[int], scores: torch.Tensor) -> torch.Tensor:
        """Return a token for each position, given log-probabilities `(rows * positions, vocab_size)`, row by row."""
        if not self.fields.do_sample:
            return scores.argmax(dim=-1)
        shape = (len(rows), scores.shape[0] // len(rows))
        uniform = random_uniform(shape, scores.device, self._generators(rows))
        return sample_categorical(scores, uniform.flatten())

    def _generators(self, rows: list[int]) -> Generators:
        return [self.generator[row] for row in rows] if isinstance(self.generator, list) else self.generator

    def _context(self, begin: int, live: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the context of a block and its mask (None: no padding), both `(rows, width)`."""
        room = self.model.config.model_length - self.buffer.block_size
        # The context of the first block is the whole prompt, right before it.
        whole = self.fields.context == "all" or begin == self.buffer.first_block
        columns = slice(max(0 if whole else begin - self.buffer.block_size, begin - room), begin)
        context, valid = self.buffer.token_ids[live, columns], self.buffer.key_valid
        if valid is None or self.buffer.last_start <= columns.start:
            return context, None
        return context, valid[live, columns].long()

    def _choose(
        self, begin: int, live: torch.Tensor, logits: torch.Tensor, numbers: list[int], projected: torch.Tensor | None
    ) -> torch.Tensor:
        """Choose the tokens of the block from its logits. Return scores `(rows, block_size, vocab_size)`.

        Processors that read the text score one column after the other, each given the tokens just chosen to its left.

        Args:
            projected: filled with the projection. Without it the tokens are the most likely ones.
        """
        size = self.buffer.block_size
        in_order = bool(self.processors.text_readers)
        scores = torch.empty_like(logits)
        for first in range(size) if in_order else [0]:
            columns = slice(first, first + 1 if in_order else size)
            part = scores[:, columns] = self._process(begin + first, numbers, logits[:, columns])
            if projected is None:
                tokens = part.argmax(dim=-1)
            else:
                draw = functools.partial(self._draw, numbers)
                projected[:, columns], tokens = self.project(part, self.scale, self.fields.top_p, draw)
            self.buffer.token_ids[live, begin + columns.start : begin + columns.stop] = tokens
        return scores

    def _process(self, begin: int, numbers: list[int], logits: torch.Tensor) -> torch.Tensor:
        """Return the processed `(rows, columns, vocab_size)` logits of the columns from `begin` on.

        Positions after the last requested token are not processed: they fill up the block but are not output.
        """
        index = begin - self.buffer.first_block + torch.arange(logits.shape[1])
        requested = int((index < self.buffer.max_new_tokens).sum())
        if not self.processors.processors or not requested:
            return logits
        rows = torch.tensor(numbers).repeat_interleave(requested)
        scores = self.processors(logits[:, :requested].flatten(0, 1), rows, index[:requested].repeat(len(numbers)))
        return torch.cat([scores.view(len(numbers), requested, -1), logits[:, requested:]], dim=1)


class SSDLMGenerationConfig(BlockGenerationConfig):
    """transformers' `GenerationConfig` with the fields of simplex diffusion.

    Args:
        num_denoising_steps (`int`, defaults to 1000): steps T per block, each one forward pass over context and block.
            The block-diffusion paper compares 1000 and 25.
        context (`str`, defaults to `"all"`): text that a block is conditioned on. `"all"`, the original: all text
            before it that fits into the window of `model_length` tokens. `"previous_block"`, as in the block-diffusion
            paper: only the block before it, or the prompt for the first one.
        projection (`str`, defaults to `"sampling"`): how logits become almost-one-hot vectors after a step.
            `"sampling"`: a token drawn from the nucleus. `"even"`: all tokens of the nucleus equally. `"uneven"`: the
            most likely token, and the others of the nucleus by their distance to it.
        top_p (`float`, defaults to 0.95): probability of the nucleus of the projection, the token that crosses it
            included; 1 is the whole vocabulary. Not applied again as a logits processor.
        do_sample (`bool`, defaults to `True`): whether `"sampling"` draws its tokens or takes the most likely ones.
            The noise that is added after each step is always drawn, and the tokens of a block are always the most
            likely ones of the last step.
        kwargs: fields of `GenerationConfig`. Here `top_k` defaults to 0: the nucleus is chosen from all tokens.

    Raises:
        ValueError: if a field has an invalid value; the message names the value and the remedy.
    """

    def __init__(self, **kwargs: Any) -> None:
        self.num_denoising_steps = kwargs.pop("num_denoising_steps", 1000)
        self.context = kwargs.pop("context", "all")
        self.projection = kwargs.pop("projection", "sampling")
        super().__init__(**{"top_p": 0.95, "do_sample": True, **kwargs})

    @staticmethod
    def check_fields(config: Any) -> None:
        check_choice("context", config.context, CONTEXTS)
        check_choice("projection", config.projection, PROJECTIONS)
        check_count("num_denoising_steps", config.num_denoising_steps, "the denoising steps per block")
        check_probability("top_p", config.top_p, "is the whole vocabulary")
