"""Writing text block after block (arXiv 2503.09573, Algorithm 2): which token goes where, by sampler and processors.

A step predicts one place per row; `passes_bd3lm.py` has the network's side of it.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.generation import GenerationConfig
from transformers.generation.logits_process import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    LogitsProcessor,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from .canvas_bd3lm import Canvas
from .passes_bd3lm import BlockPasses
from .samplers_bd3lm import SAMPLERS, FirstHittingSampler, draw_tokens, wide_float


class NucleusLogitsProcessor(LogitsProcessor):
    """The nucleus of the published samplers: ranks whose cumulative probability, their own included, is at most p.

    The most probable token always stays. transformers' `top_p` also keeps the token that crosses p.
    """

    def __init__(self, nucleus_p: float) -> None:
        self.nucleus_p = nucleus_p

    def __call__(self, input_ids: torch.Tensor | None, scores: torch.Tensor) -> Any:
        ranked, order = scores.sort(dim=-1, descending=True)
        # As published: normalised in the precision of the scores, summed up in float64.
        log_probability = ranked - ranked.logsumexp(dim=-1, keepdim=True)
        cumulative = log_probability.to(wide_float(scores.device)).exp().cumsum(dim=-1)
        dropped = cumulative > self.nucleus_p
        dropped[..., 0] = False
        return scores.masked_fill(dropped.scatter(-1, order, dropped), -torch.inf)


# Processors that read the scores only: they serve rows at different places in one call.
_READS_SCORES = (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    MinPLogitsWarper,
    NucleusLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
# Processors that also read how long the text is, but not what it says.
_READS_LENGTH = (
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
)


@dataclass
class Record:
    """Scores or logits of each new token `(batch, vocab_size)`, kept when asked for."""

    wanted: bool
    tokens: dict[int, torch.Tensor] = field(default_factory=dict)

    def put(self, index: torch.Tensor, active: torch.Tensor, values: torch.Tensor) -> None:
        """Keep the values `(batch, vocab_size)` of each active row's new token number `index`."""
        if not self.wanted:
            return
        for row in active.nonzero().flatten().tolist():
            kept = self.tokens.setdefault(int(index[row]), torch.zeros_like(values))
            kept[row] = values[row]

    def result(self, count: int) -> tuple[torch.Tensor, ...] | None:
        """Of the first `count` new tokens."""
        return tuple(self.tokens[index] for index in range(count)) if self.wanted else None


class BlockWriter:
    """Denoises the blocks of a canvas with a model.

    Args:
        prompt: `(batch, length)`, as given to `generate`.
        cache: written to and read from; None computes the whole window in every step.
    """

    def __init__(
        self,
        model: Any,
        canvas: Canvas,
        prompt: torch.Tensor,
        processors: LogitsProcessorList,
        generation_config: Any,
        cache: Cache | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        self.canvas, self.config = canvas, model.config
        self.prompt, self.generator = prompt, generator
        self.passes = BlockPasses(model, canvas, cache)
        self.processors, self.do_sample = processors, generation_config.do_sample
        self.sampler: FirstHittingSampler = SAMPLERS[generation_config.sampler]()
        # Processors that read the text expect all of it to the left of the token they judge.
        reads_text = any(not isinstance(p, (*_READS_SCORES, *_READS_LENGTH)) for p in processors)
        self.random_order = self.do_sample and not reads_text
        recorded = bool(generation_config.return_dict_in_generate)
        self.scores = Record(recorded and bool(generation_config.output_scores))
        self.logits = Record(recorded and bool(generation_config.output_logits))
        self.forbidden = _never_written(self.config.mask_token_id, generation_config)

    def denoise(self, begin: int, finished: torch.Tensor, streamer: Any = None) -> None:
        """Reveal the masked tokens of the block that begins at this column, one per row and step."""
        text, canvas = self.canvas.text, self.canvas
        block = text[:, begin : begin + canvas.block_size]
        masked = (block == self.config.mask_token_id) & ~finished.unsqueeze(1)
        order = self.sampler.order(masked, random=self.random_order, generator=self.generator)
        # Steps until the last token that was asked for is revealed; those behind it in the block need not be.
        remaining = masked.sum(1)
        number = torch.arange(order.shape[1], device=text.device)
        wanted = begin + order < (canvas.prompt_end + canvas.new_tokens).unsqueeze(1)
        counts = ((number + 1) * (wanted & (number < remaining.unsqueeze(1)))).amax(1)
        t = torch.ones(text.shape[0], device=text.device)
        for step in range(int(counts.max())):
            place, active = order[:, step], step < counts
            if self.config.time_conditioning:
                t = self.sampler.time(t, remaining - step, random=self.do_sample, generator=self.generator)
            rows = torch.arange(place.shape[0], device=place.device) * canvas.block_size + place
            tokens = self._choose(self.passes.logits(begin, rows, t), begin + place, active)
            current = block.gather(1, place.unsqueeze(1)).squeeze(1)
            block.scatter_(1, place.unsqueeze(1), torch.where(active, tokens, current).unsqueeze(1))
            if hasattr(streamer, "put_draft") and not finished[0]:
                streamer.put_draft(self._draft(begin))

    def _draft(self, begin: int) -> torch.Tensor:
        """The first row's new tokens of this block, as far as they are revealed."""
        stop = min(begin + self.canvas.block_size, int(self.canvas.prompt_end[0]) + self.canvas.new_tokens)
        draft = self.canvas.text[0, max(begin, int(self.canvas.prompt_end[0])) : stop]
        return draft[draft != self.config.mask_token_id].cpu()

    # --- The choice of a token ---------------------------------------------------------------------------------------

    def _choose(self, logits: torch.Tensor, columns: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
        """One token per row from its logits; `columns` are places on the canvas, all `(batch,)`."""
        index = columns - self.canvas.prompt_end  # which new token of its row
        logits[:, self.forbidden] = -torch.inf
        self.logits.put(index, active, logits)
        scores = logits
        if self.processors:
            scores = self._process(logits.clone(), self.prompt.shape[1] + index, active)
            scores[:, self.forbidden] = -torch.inf
            if (scores.isneginf().all(dim=-1) & active).any():
                raise ValueError(
                    "the logits processors leave no token to choose from at some place (the mask token, and padding "
                    "unless it is also the end token, are never written): loosen the constraints."
                )
            scores = scores.masked_fill(~active.unsqueeze(1), 0.0)  # rows that choose nothing may hold anything
        self.scores.put(index, active, scores)
        if not self.do_sample:
            return scores.argmax(dim=-1)
        return draw_tokens(scores, self.generator)

    def _process(self, scores: torch.Tensor, columns: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
        """Apply the logits processors, each row with the text to the left of its place as context.

        Processors judge by the width of the context, so rows at different output columns are processed once per
        column. With processors that read the text, places are revealed from left to right; else tokens to the left
        that are not yet revealed may stand in the context as mask tokens.
        """
        places: list[int] = []
        processor: Any
        for processor in self.processors:
            if isinstance(processor, _READS_SCORES):
                scores = processor(self.prompt, scores)  # type: ignore[arg-type]
                continue
            if not places:
                places = columns[active].unique().tolist()
                written = self.canvas.written(max(places) - self.prompt.shape[1])
                context = torch.cat([self.prompt, written], dim=1)
            for column in places:
                processed = processor(context[:, :column], scores.clone())
                scores = torch.where((columns == column).unsqueeze(1), processed, scores)
        return scores


def _never_written(mask_token_id: int, generation_config: GenerationConfig) -> list[int]:
    """Ids that are never produced: the mask, and padding unless it doubles as the end of a text."""
    pad, eos = generation_config.pad_token_id, generation_config.eos_token_id
    if pad is None or pad in (eos if isinstance(eos, list) else [eos]):
        return [mask_token_id]
    return [mask_token_id, pad]


__all__ = ["BlockWriter", "NucleusLogitsProcessor", "Record"]
