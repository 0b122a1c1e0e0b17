"""Logits processors over many places of a block at once, each place with the text to its left as context."""

from typing import Any

import torch
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
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from .decoding_state_bd3lm import SequenceBuffer


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


# Processors that read the scores only, and leave at least one token.
_KEEPS_ONE = (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    MinPLogitsWarper,
    NucleusLogitsProcessor,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)


# Processors that read the scores only: they serve all places in one call.
_READS_SCORES = (*_KEEPS_ONE, SuppressTokensLogitsProcessor)


# Processors that also read how long the text is, but not what it says.
_READS_LENGTH = (
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
)


def _reads_scores_only(processor: Any) -> bool:
    return isinstance(processor, _READS_SCORES) or not getattr(processor, "reads_text", True)


class PositionProcessors:
    """The logits processors of a call, for places of a block instead of the ends of texts.

    A processor that reads the scores only gets those of all places in one call, `(places, vocab_size)`, beside the
    prompts. The others are called once per column of the output, with whole batches: `(batch, vocab_size)` scores and
    all tokens to the left. Rows that are not judged in such a call hold zeros, and their context may hold mask tokens.

    A processor that is unknown here is taken to read the text, unless it has an attribute `reads_text = False`.
    """

    def __init__(self, processors: LogitsProcessorList, canvas: SequenceBuffer, prompt: torch.Tensor) -> None:
        self.processors, self.canvas, self.prompt = processors, canvas, prompt
        # These expect all of the text to the left of the place they judge.
        self.reading = [p for p in processors if not _reads_scores_only(p) and not isinstance(p, _READS_LENGTH)]
        # Whether all tokens of a place may be forbidden; the warpers always keep one.
        self.forbidding = any(not isinstance(p, _KEEPS_ONE) for p in processors)

    def __call__(self, scores: torch.Tensor, row: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Processed scores `(places, vocab_size)`.

        Args:
            row, index: `(places,)` on the host, the row of each place and which new token of its row it is.
        """
        context = None
        processor: Any
        for processor in self.processors:
            if _reads_scores_only(processor):
                scores = processor(self.prompt, scores)
                continue
            if context is None:
                context = torch.cat([self.prompt, self.canvas.written(int(index.max()))], dim=1)
            for column in index.unique().tolist():
                here = (index == column).nonzero().squeeze(1).to(scores.device, non_blocking=True)
                judged = row[index == column].to(scores.device, non_blocking=True)
                whole = scores.new_zeros(context.shape[0], scores.shape[1]).index_copy_(0, judged, scores[here])
                processed = processor(context[:, : self.prompt.shape[1] + column], whole)
                scores = scores.index_copy(0, here, processed[judged])
        return scores


def never_written(mask_token_id: int, generation_config: GenerationConfig) -> list[int]:
    """Ids that are never produced: the mask, and padding unless it doubles as the end of a text."""
    pad, eos = generation_config.pad_token_id, generation_config.eos_token_id
    if pad is None or pad in (eos if isinstance(eos, list) else [eos]):
        return [mask_token_id]
    return [mask_token_id, pad]


def wide_float(device: torch.device) -> torch.dtype:
    """float64, as in the published samplers, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


__all__ = ["NucleusLogitsProcessor", "PositionProcessors", "never_written", "wide_float"]
