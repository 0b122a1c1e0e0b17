"""Writing text block after block with SSD-LM (arXiv 2210.17432, Sec. 3.3): denoise, project, add the next noise.

A block begins as noise, x_T = K eps. For t = T, ..., 1 the network gives logits of the clean tokens, a projection P
makes almost-one-hot vectors of them, and

    x_{t-1} = sqrt(abar_{t-1}) P(logits) + sqrt(1 - abar_{t-1}) K z,      z ~ N(0, 1).

The block's tokens are the most likely ones of the last step, t = 1.

What SSD-LM's `generate` can be told beside transformers' own fields: context, projection, number of steps.

Text from SSD-LM, block by block (arXiv 2210.17432, Sec. 3.3), as transformers' own `generate`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers.generation import GenerationConfig
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteriaList
from transformers.modeling_outputs import ModelOutput

from .decoding_state_bd3lm import SequenceBuffer, StopRules
from .generation_bd3lm import BlockGenerationMixin, pad_left
from .logits_process_bd3lm import PositionProcessors, check_any_token_left, never_generated
from .samplers_bd3lm import Generators, check_generators, random_uniform, sample_categorical
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
        return sample_categorical(scores, uniform.flatten())

    def _of(self, rows: Sequence[int]) -> Generators:
        return [self.generator[row] for row in rows] if isinstance(self.generator, list) else self.generator


def all_before(buffer: SequenceBuffer, begin: int) -> int:
    """All text before the block."""
    return 0


def block_before(buffer: SequenceBuffer, begin: int) -> int:
    """The block before the block, or the prompt."""
    return 0 if begin == buffer.first_block else begin - buffer.block_size


# Where the context of the block that begins at a column begins, but for the window.
CONTEXTS: dict[str, Callable[[SequenceBuffer, int], int]] = {"all": all_before, "previous_block": block_before}


def lay_out_behind(prompt: torch.Tensor, padding: torch.Tensor | None, new_tokens: int, config: Any) -> SequenceBuffer:
    """A buffer whose blocks follow the prompts `(batch, width)`, which are padded on the left."""
    batch, width = prompt.shape
    size = config.block_size
    columns = -(-new_tokens // size) * size
    text = F.pad(prompt, (0, columns), value=config.mask_token_id)
    start = prompt.new_zeros(batch) if padding is None else padding.sum(1)
    valid = None if padding is None else F.pad(~padding, (0, columns), value=True)
    return SequenceBuffer(text, start, width - start, width, new_tokens, size, valid)


class SimplexWriter:
    """Writes the blocks of a buffer with a model.

    Args:
        prompt: `(batch, width)`, padded on the left.
        generation_config: read for `context`, `projection`, `top_p`, `num_denoising_steps`, what is never written, and
            what is to be kept of the last steps.
        draws: where the random numbers come from.
    """

    def __init__(
        self,
        model: Any,
        buffer: SequenceBuffer,
        prompt: torch.Tensor,
        processors: LogitsProcessorList,
        generation_config: Any,
        draws: SimplexDraws,
    ) -> None:
        self.model, self.buffer, self.draws = model, buffer, draws
        self.processors = PositionProcessors(processors, buffer, prompt)
        self.scale: float = model.config.one_hot_value
        self.steps: int = generation_config.num_denoising_steps
        self.top_p: float = generation_config.top_p
        self.project = PROJECTIONS[generation_config.projection]
        self.context_begin = CONTEXTS[generation_config.context]
        forbidden = never_generated(model.config.mask_token_id, generation_config)
        self.forbidden = torch.tensor(forbidden, device=buffer.token_ids.device)
        recorded = bool(generation_config.return_dict_in_generate)
        # Of the last step of each block, (batch, block_size, vocab_size).
        self.scores: list[torch.Tensor] | None = [] if recorded and generation_config.output_scores else None
        self.logits: list[torch.Tensor] | None = [] if recorded and generation_config.output_logits else None
        self.count = 0  # passes of the network
        # Some place could not get any token.
        self.dead = torch.zeros((), dtype=torch.bool, device=buffer.token_ids.device)

    def denoise(self, begin: int, finished: torch.Tensor) -> None:
        """Write the block that begins at this column, in the rows that are not finished (bool `(batch,)`, host).

        1. The block is noise.
        2. In each step the noise of the next level is drawn, the network gives logits, and processors judge them.
        3. The projection of the logits gets the noise; behind the last step, the most likely tokens stay.
        """
        device = self.buffer.token_ids.device
        rows = (~finished).nonzero().squeeze(1)
        numbers, live = rows.tolist(), rows.to(device)
        context, mask = self._context(begin, live)
        shape = (self.buffer.block_size, self.model.config.vocab_size)
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
        if self.processors.can_forbid_all:
            check_any_token_left(self.dead)

    def _context(self, begin: int, live: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Text before a block that the network sees, `(rows, width)`, and where it is no padding; None: everywhere."""
        room = self.model.config.model_length - self.buffer.block_size
        columns = slice(max(self.context_begin(self.buffer, begin), begin - room), begin)
        context, valid = self.buffer.token_ids[live, columns], self.buffer.key_valid
        if valid is None or self.buffer.last_start <= columns.start:
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
        size = self.buffer.block_size
        in_order = bool(self.processors.text_readers)
        scores = torch.empty_like(logits)
        for first in range(size) if in_order else [0]:
            columns = slice(first, first + 1 if in_order else size)
            part = scores[:, columns] = self._process(begin + first, live, logits[:, columns])
            if projected is None:
                tokens = part.argmax(dim=-1)
            else:
                draw = lambda inside: self.draws.tokens(numbers, inside)  # noqa: E731
                projected[:, columns], tokens = self.project(part, self.scale, self.top_p, draw)
            self.buffer.token_ids[live, begin + columns.start : begin + columns.stop] = tokens
        return scores

    def _process(self, begin: int, live: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Return the processed `(rows, columns, vocab_size)` logits of the columns from `begin` on.

        Behind the last token that was asked for nothing is judged: that part of a block is written and not shown.
        """
        index = begin - self.buffer.first_block + torch.arange(logits.shape[1])
        shown = int((index < self.buffer.max_new_tokens).sum())
        if not self.processors.processors or not shown:
            return logits
        rows = live.cpu().repeat_interleave(shown)
        flat = logits[:, :shown].flatten(0, 1).clone()
        judged = self.processors(flat, rows, index[:shown].repeat(len(live))).index_fill(
            -1, self.forbidden, -torch.inf
        )
        if self.processors.can_forbid_all:
            dead = judged.isneginf().all(dim=-1)
            self.dead |= dead.any()
            judged = judged.masked_fill(dead.unsqueeze(1), 0.0)
        return torch.cat([judged.view(len(live), shown, -1), logits[:, shown:]], dim=1)

    def _keep(self, live: torch.Tensor, logits: torch.Tensor, scores: torch.Tensor) -> None:
        for kept, values in ((self.logits, logits), (self.scores, scores)):
            if kept is not None:
                whole = values.new_zeros(self.buffer.token_ids.shape[0], *values.shape[1:])
                kept.append(whole.index_copy_(0, live, values))


def of_tokens(kept: list[torch.Tensor] | None, count: int) -> tuple[torch.Tensor, ...] | None:
    """Return the scores of the first `count` new tokens, each `(batch, vocab_size)`; zeros where a row had ended."""
    return None if kept is None else tuple(torch.cat(kept, dim=1).unbind(1)[:count])


class SSDLMGenerationConfig(GenerationConfig):
    """transformers' `GenerationConfig` with the fields of simplex diffusion.

    Args:
        num_denoising_steps (`int`, defaults to 1000): steps T of a block, each one pass of the network over context
            and block. The block-diffusion paper compares 1000 and 25.
        context (`str`, defaults to `"all"`): what a block is written behind. `"all"`, the original: all text before
            it, as far as the window `model_length` reaches. `"previous_block"`, as the block-diffusion paper ran it:
            the block before it only, or the prompt for the first one.
        projection (`str`, defaults to `"sampling"`): how logits become almost-one-hot vectors after a step.
            `"sampling"`: a token drawn from the nucleus. `"even"`: all tokens of the nucleus alike. `"uneven"`: the
            likeliest token, and the others of the nucleus by their distance to it.
        top_p (`float`, defaults to 0.95): probability of the nucleus that is projected on, the token that crosses it
            included; 1 is the whole vocabulary. No logits processor does it again.
        do_sample (`bool`, defaults to `True`): whether `"sampling"` draws its tokens or takes the likeliest ones. The
            noise that is added after each step is drawn in any case, and what a block holds in the end is always the
            most likely token of the last step.
        kwargs: fields of `GenerationConfig`. `top_k` defaults to 0 here: the nucleus is chosen from all tokens.

    Raises:
        ValueError: a field that has no meaning; the message names the value and the remedy.
    """

    def __init__(self, **kwargs: Any) -> None:
        self.num_denoising_steps = kwargs.pop("num_denoising_steps", 1000)
        self.context = kwargs.pop("context", "all")
        self.projection = kwargs.pop("projection", "sampling")
        super().__init__(**{"top_p": 0.95, "do_sample": True, **kwargs})

    def validate(self, *args: Any, **kwargs: Any) -> None:
        super().validate(*args, **kwargs)
        check_simplex_fields(self)

    @classmethod
    def from_model_config(cls, model_config: Any) -> "SSDLMGenerationConfig":
        # transformers then calls the constructor. A config made from a model config forgets its own fields on reload.
        raise NotImplementedError("an SSDLMGenerationConfig is made by its constructor, not from a model config.")


def check_simplex_fields(config: Any) -> None:
    """Validate the fields that [`SSDLMGenerationConfig`] adds, and `top_p`, which transformers does not."""
    for name, table in (("context", CONTEXTS), ("projection", PROJECTIONS)):
        value = getattr(config, name)
        if value not in table:
            raise ValueError(f"{name}={value!r} is unknown: choose one of {', '.join(table)}.")
    steps, top_p = config.num_denoising_steps, config.top_p
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"num_denoising_steps={steps!r}: give a whole number of steps per block, 1 at least.")
    if isinstance(top_p, bool) or not isinstance(top_p, (int, float)) or not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p!r}: give a probability above 0 and at most 1 (1 is the whole vocabulary).")


@dataclass
class SSDLMGenerateOutput(ModelOutput):
    """Output of `generate(return_dict_in_generate=True)`.

    Args:
        sequences: `(batch, prompt + new)`, the prompt as given and what was written.
        scores: with `output_scores`, for each new token the processed scores `(batch, vocab_size)` of its last step,
            of which it is the largest.
        logits: with `output_logits`, the same before processing.
        num_forward_passes: passes of the network, `num_denoising_steps` for each block.
        tokens_per_forward: new tokens, finished rows' padding left out, per row and pass.
    """

    sequences: torch.Tensor | None = None
    scores: tuple[torch.Tensor, ...] | None = None
    logits: tuple[torch.Tensor, ...] | None = None
    num_forward_passes: int | None = None
    tokens_per_forward: float | None = None


class SSDLMGenerationMixin(BlockGenerationMixin):
    """`generate` for simplex diffusion. `generator` may be a list with one for each row of the batch."""

    generation_config_class = SSDLMGenerationConfig
    draws_class = SimplexDraws  # where the random numbers of a call come from

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, **kwargs: Any
    ) -> tuple[Any, dict]:
        prepared, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        check_simplex_fields(prepared)
        return prepared, model_kwargs

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        given = {
            "past_key_values": model_kwargs.get("past_key_values"),
            "cache_implementation": generation_config.cache_implementation,
        }
        unfit = [name for name, value in given.items() if value is not None]
        if unfit:
            raise ValueError(
                f"generate does not take {', '.join(unfit)}: the encoder of an SSD-LM attends from the context to the "
                f"noisy block, so that nothing of it can be kept. Leave it out."
            )

    def _get_logits_processor(self, generation_config: Any, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        # The projection has the nucleus.
        top_p, generation_config.top_p = generation_config.top_p, 1.0
        try:
            return super()._get_logits_processor(generation_config, *args, **kwargs)
        finally:
            generation_config.top_p = top_p

    @torch.no_grad()
    def _sample(
        self,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> SSDLMGenerateOutput | torch.Tensor:
        """Write block after block.

        1. Lay the prompts out so that they end together; the first block follows.
        2. For each block: denoise it behind its context.
        3. Cut rows where a stopping criterion holds; show the block to the streamer.
        4. Put prompts and new tokens together.
        """
        # 1. Lay out
        home, input_ids = input_ids.device, input_ids.to(self.device)
        attention_mask = model_kwargs.get("attention_mask")
        attention_mask = None if attention_mask is None else attention_mask.to(self.device)
        self._check_continuable(input_ids, attention_mask, synced_gpus)
        self._check_fits_window(input_ids, attention_mask)
        check_generators(model_kwargs.get("generator"), len(input_ids))
        prompt, padding = pad_left(input_ids, attention_mask)
        buffer = lay_out_behind(prompt, padding, generation_config.max_length - input_ids.shape[1], self.config)
        stop = StopRules(stopping_criteria, prompt, buffer, generation_config, padding)
        draws = self.draws_class(model_kwargs.get("generator"), greedy=not generation_config.do_sample)
        writer = SimplexWriter(self, buffer, prompt, logits_processor, generation_config, draws)
        for begin in buffer.blocks():
            # 2. Denoise
            writer.denoise(begin, stop.finished)
            # 3. Stop and stream
            shown = stop.update(begin)
            if streamer is not None and shown.numel():
                streamer.put(shown.cpu())
            if stop.all_finished:
                break
        if streamer is not None:
            streamer.end()
        # 4. Assemble
        sequences = torch.cat([input_ids, stop.new_tokens()], dim=1).to(home)
        if not generation_config.return_dict_in_generate:
            return sequences
        count = sequences.shape[1] - input_ids.shape[1]
        return SSDLMGenerateOutput(
            sequences=sequences,
            scores=of_tokens(writer.scores, count),
            logits=of_tokens(writer.logits, count),
            num_forward_passes=writer.count,
            tokens_per_forward=float(stop.lengths.sum()) / writer.count / len(input_ids),
        )


__all__ = [
    "CONTEXTS",
    "SSDLMGenerateOutput",
    "SSDLMGenerationConfig",
    "SSDLMGenerationMixin",
    "SimplexDraws",
    "SimplexWriter",
    "check_simplex_fields",
    "lay_out_behind",
    "of_tokens",
]
