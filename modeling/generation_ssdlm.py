"""`generate` of SSD-LM (arXiv 2210.17432, Sec. 3.3): denoise a block, project it, add the noise of the next level.

A block starts as noise, x_T = K eps. For t = T, ..., 1 the network predicts logits of the clean tokens, a projection P
maps them to almost-one-hot vectors, and

    x_{t-1} = sqrt(abar_{t-1}) P(logits) + sqrt(1 - abar_{t-1}) K z,      z ~ N(0, 1).

The block's tokens are the most likely ones of the last step, t = 1.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers.generation import GenerationConfig
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteriaList

from .decoding_bd3lm import BD3LMGenerateOutput, ScoreRecord
from .decoding_state_bd3lm import SequenceBuffer, StopRules, pad_left
from .generation_bd3lm import BlockGenerationMixin, write_blocks
from .generation_config_bd3lm import check_choice, check_count, check_probability
from .logits_process_bd3lm import PositionProcessors
from .samplers_bd3lm import Generators, random_uniform, sample_categorical
from .simplex_ssdlm import PROJECTIONS, noisy_logits, simplex_schedule


CONTEXTS = ("all", "previous_block")


class SimplexDraws:
    """The source of a call's random numbers.

    Args:
        generator: one for the whole call, or one per row, which makes a row independent of its batch; by default
            torch's global one.
        greedy: choose the most likely tokens instead of drawing them.
    """

    def __init__(self, generator: Generators = None, *, greedy: bool = False) -> None:
        self.generator, self.greedy = generator, greedy

    def normal(self, rows: Sequence[int], shape: tuple[int, int], device: torch.device) -> torch.Tensor:
        """Return standard normal numbers `(rows, *shape)` for these rows of the batch."""
        generator = self._of(rows)
        if isinstance(generator, list):
            return torch.stack([torch.randn(shape, generator=own, device=own.device).to(device) for own in generator])
        home = device if generator is None else generator.device
        return torch.randn((len(rows), *shape), generator=generator, device=home).to(device)

    def tokens(self, rows: Sequence[int], scores: torch.Tensor) -> torch.Tensor:
        """Return a token for each position, given log-probabilities `(rows * positions, vocab_size)`, row by row."""
        if self.greedy:
            return scores.argmax(dim=-1)
        positions = scores.shape[0] // len(rows)
        uniform = random_uniform((len(rows), positions), scores.device, self._of(rows))
        return sample_categorical(scores, uniform.flatten())

    def _of(self, rows: Sequence[int]) -> Generators:
        return [self.generator[row] for row in rows] if isinstance(self.generator, list) else self.generator


def lay_out_after(prompt: torch.Tensor, padding: torch.Tensor | None, new_tokens: int, config: Any) -> SequenceBuffer:
    """Return a buffer whose blocks follow the left-padded prompts `(batch, width)`."""
    batch, width = prompt.shape
    size = config.block_size
    columns = -(-new_tokens // size) * size
    text = F.pad(prompt, (0, columns), value=config.mask_token_id)
    start = prompt.new_zeros(batch) if padding is None else padding.sum(1)
    valid = None if padding is None else F.pad(~padding, (0, columns), value=True)
    return SequenceBuffer(text, start, width - start, width, new_tokens, size, valid)


class SimplexWriter:
    """Denoise the blocks of a buffer with a model.

    Args:
        prompt: `(batch, width)`, padded on the left.
        generation_config: read for `context`, `projection`, `top_p`, `num_denoising_steps`, and which scores to
            record.
        draws: source of the random numbers.
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
        self.num_steps: int = generation_config.num_denoising_steps
        self.top_p: float = generation_config.top_p
        self.project = PROJECTIONS[generation_config.projection]
        self.sees_all_before: bool = generation_config.context == "all"
        recorded = bool(generation_config.return_dict_in_generate)
        self.scores = ScoreRecord(recorded and bool(generation_config.output_scores))
        self.logits = ScoreRecord(recorded and bool(generation_config.output_logits))
        self.num_forward_passes = 0

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
        noisy = self.scale * self.draws.normal(numbers, shape, device)
        for step in range(self.num_steps, 0, -1):
            t = torch.full((len(numbers),), float(step), device=device)
            # 2. Logits. The noise is drawn before the tokens, as published.
            normal = self.draws.normal(numbers, shape, device) if step > 1 else None
            logits = self.model.denoise(context, mask, noisy, t / self.num_steps)
            self.num_forward_passes += 1
            projected = torch.empty_like(logits)
            scores = self._choose(begin, live, logits, numbers, None if normal is None else projected)
            # 3. Less noise
            if normal is not None:
                alpha_bar = simplex_schedule(t, self.num_steps).alpha_bar_before
                noisy = noisy_logits(projected, alpha_bar, normal, self.scale)
        index = (begin - self.buffer.first_block + torch.arange(size)).repeat(len(rows))
        self.scores.add(rows.repeat_interleave(size), index, scores.flatten(0, 1))
        self.logits.add(rows.repeat_interleave(size), index, logits.flatten(0, 1))
        self.processors.check_any_token_left()

    def _context(self, begin: int, live: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the context of a block and its mask (None: no padding), both `(rows, width)`."""
        room = self.model.config.model_length - self.buffer.block_size
        # The context of the first block is the whole prompt, right before it.
        whole = self.sees_all_before or begin == self.buffer.first_block
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
                draw = functools.partial(self.draws.tokens, numbers)
                projected[:, columns], tokens = self.project(part, self.scale, self.top_p, draw)
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


class SSDLMGenerationConfig(GenerationConfig):
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

    def validate(self, *args: Any, **kwargs: Any) -> None:
        super().validate(*args, **kwargs)
        check_simplex_fields(self)

    @classmethod
    def from_model_config(cls, model_config: Any) -> "SSDLMGenerationConfig":
        # transformers then calls the constructor. A config made from a model config would lose our fields on saving.
        raise NotImplementedError("call the constructor of SSDLMGenerationConfig instead.")


def check_simplex_fields(config: Any) -> None:
    """Validate the fields that [`SSDLMGenerationConfig`] adds, and `top_p`, which transformers does not."""
    check_choice("context", config.context, CONTEXTS)
    check_choice("projection", config.projection, PROJECTIONS)
    check_count("num_denoising_steps", config.num_denoising_steps, "the denoising steps per block")
    check_probability("top_p", config.top_p, "is the whole vocabulary")


class SSDLMGenerationMixin(BlockGenerationMixin):
    """`generate` for simplex diffusion. `generator` can be a list with one per row of the batch.

    As published, any token can be generated, special tokens included; list the unwanted ones in `suppress_tokens`.
    """

    generation_config_class = SSDLMGenerationConfig
    masks_text = False
    draws_class = SimplexDraws  # source of the random numbers of a call

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, **kwargs: Any
    ) -> tuple[Any, dict]:
        prepared, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        check_simplex_fields(prepared)
        return prepared, model_kwargs

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        arguments = {
            "past_key_values": model_kwargs.get("past_key_values"),
            "cache_implementation": generation_config.cache_implementation,
        }
        given = [name for name, value in arguments.items() if value is not None]
        if given:
            raise ValueError(
                f"generate does not take {', '.join(given)}: the encoder of an SSD-LM attends from the context to the "
                f"noisy block, so nothing can be cached. Leave it out."
            )

    def _get_logits_processor(self, generation_config: Any, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        # The projection applies the nucleus.
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
    ) -> BD3LMGenerateOutput | torch.Tensor:
        """Generate block by block.

        1. Align the prompts so that they end at the same column, where the first block begins.
        2. Denoise each block, given its context.
        3. End the rows that meet a stopping criterion, and stream the block.
        4. Concatenate prompts and new tokens.
        """
        # 1. Align
        home = input_ids.device
        input_ids, attention_mask = self._take_prompts(input_ids, model_kwargs, synced_gpus)
        self._check_fits_window(attention_mask)
        prompt, padding = pad_left(input_ids, attention_mask)
        buffer = lay_out_after(prompt, padding, generation_config.max_length - input_ids.shape[1], self.config)
        stop = StopRules(stopping_criteria, prompt, buffer, generation_config, padding)
        draws = self.draws_class(model_kwargs.get("generator"), greedy=not generation_config.do_sample)
        writer = SimplexWriter(self, buffer, prompt, logits_processor, generation_config, draws)
        # 2. and 3. Denoise, stop and stream
        write_blocks(writer, stop, streamer)
        # 4. Concatenate
        sequences = torch.cat([input_ids, stop.new_tokens()], dim=1).to(home)
        if not generation_config.return_dict_in_generate:
            return sequences
        count = sequences.shape[1] - input_ids.shape[1]
        return BD3LMGenerateOutput(
            sequences=sequences,
            scores=writer.scores.result(len(input_ids), count),
            logits=writer.logits.result(len(input_ids), count),
            num_forward_passes=writer.num_forward_passes,
            tokens_per_forward=float(stop.lengths.sum()) / writer.num_forward_passes / len(input_ids),
        )
