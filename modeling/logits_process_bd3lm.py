"""Logits processors over many positions of a block at once, each with the text to its left as context."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers.generation import GenerationConfig
from transformers.generation import logits_process as standard
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList

from .decoding_state_bd3lm import SequenceBuffer
from .noise_bd3lm import wide_float


class NucleusLogitsProcessor(LogitsProcessor):
    """Keep the nucleus of the published samplers: tokens whose cumulative probability, including theirs, is at most p.

    The most probable token always stays. transformers' `top_p` also keeps the token that crosses p.
    """

    def __init__(self, nucleus_p: float) -> None:
        self.nucleus_p = nucleus_p

    def __call__(self, input_ids: torch.Tensor | None, scores: torch.Tensor) -> Any:
        ranked, order = scores.sort(dim=-1, descending=True)
        # As published: normalised in the precision of the scores, summed in float64.
        log_probability = ranked - ranked.logsumexp(dim=-1, keepdim=True)
        cumulative = log_probability.to(wide_float(scores.device)).exp().cumsum(dim=-1)
        dropped = cumulative > self.nucleus_p
        dropped[..., 0] = False
        return scores.masked_fill(dropped.scatter(-1, order, dropped), -torch.inf)


# Processors that read only the scores and keep at least one token.
_KEEPS_ONE = (
    standard.EpsilonLogitsWarper,
    standard.EtaLogitsWarper,
    standard.InfNanRemoveLogitsProcessor,
    standard.LogitNormalization,
    standard.MinPLogitsWarper,
    NucleusLogitsProcessor,
    standard.TemperatureLogitsWarper,
    standard.TopHLogitsWarper,
    standard.TopKLogitsWarper,
    standard.TopPLogitsWarper,
    standard.TypicalLogitsWarper,
)

# Processors that read only the scores, so one call serves all positions.
_READS_SCORES = (*_KEEPS_ONE, standard.SuppressTokensLogitsProcessor)

# Processors that also read the length of the text, but not its tokens.
_READS_LENGTH = (
    standard.ExponentialDecayLengthPenalty,
    standard.ForcedBOSTokenLogitsProcessor,
    standard.ForcedEOSTokenLogitsProcessor,
    standard.MinLengthLogitsProcessor,
    standard.MinNewTokensLengthLogitsProcessor,
    standard.SuppressTokensAtBeginLogitsProcessor,
)


def _reads_scores_only(processor: Any) -> bool:
    return isinstance(processor, _READS_SCORES) or not getattr(processor, "reads_text", True)


class PositionProcessors:
    """The logits processors of a call, applied to positions of a block instead of the ends of texts.

    A processor that reads only the scores gets those of all positions in one call, `(positions, vocab_size)`, along
    with the prompts. The others are called once per column of the output with whole batches: `(batch, vocab_size)`
    scores and all tokens to the left. The scores of rows without a position in that column are zeros, and their
    context may contain mask tokens.

    An unknown processor is assumed to read the text, unless it has an attribute `reads_text = False`.

    Args:
        buffer: has the tokens to the left of a position.
        prompt: `(batch, length)`, the text before the new tokens.
        forbidden: ids that are never generated, see [`never_generated`].
    """

    def __init__(
        self,
        processors: LogitsProcessorList,
        buffer: SequenceBuffer,
        prompt: torch.Tensor,
        forbidden: Sequence[int] = (),
    ) -> None:
        self.processors, self.buffer, self.prompt = processors, buffer, prompt
        self.forbidden = torch.tensor(forbidden, dtype=torch.long, device=prompt.device)
        # These need every token to the left of a position, so decoding must go from left to right.
        self.text_readers = [p for p in processors if not _reads_scores_only(p) and not isinstance(p, _READS_LENGTH)]
        # Warpers always keep a token. Only for the others is a check worth a device synchronisation per block.
        self.can_forbid_all = any(not isinstance(p, _KEEPS_ONE) for p in processors)
        self._no_token_left = torch.zeros((), dtype=torch.bool, device=prompt.device)  # at some position so far

    def __call__(self, logits: torch.Tensor, row: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Return processed scores `(positions, vocab_size)` of logits that give forbidden ids no probability.

        Args:
            row, index: `(positions,)` on the CPU, the row of each position, and its index among the row's new tokens.
        """
        if not self.processors:
            return logits
        scores = self._process(logits.clone(), row, index).index_fill(1, self.forbidden, -torch.inf)
        if self.can_forbid_all:
            no_token_left = scores.isneginf().all(dim=-1)
            self._no_token_left |= no_token_left.any()
            scores = scores.masked_fill(no_token_left.unsqueeze(1), 0.0)  # any token, until the block is checked
        return scores

    def check_any_token_left(self) -> None:
        """Refuse constraints that forbade every token of a position so far."""
        if self.can_forbid_all and self._no_token_left:
            raise ValueError(
                "the logits processors forbid every token at some position (a model that masks text generates "
                "neither the mask token nor padding, unless that is also the end token): loosen the constraints."
            )

    def _process(self, scores: torch.Tensor, row: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        context = None
        processor: Any
        for processor in self.processors:
            if _reads_scores_only(processor):
                scores = processor(self.prompt, scores)
                continue
            if context is None:
                context = torch.cat([self.prompt, self.buffer.new_token_ids(int(index.max()))], dim=1)
            for column in index.unique().tolist():
                at = (index == column).nonzero().squeeze(1).to(scores.device, non_blocking=True)
                rows = row[index == column].to(scores.device, non_blocking=True)
                batch = scores.new_zeros(context.shape[0], scores.shape[1]).index_copy_(0, rows, scores[at])
                processed = processor(context[:, : self.prompt.shape[1] + column], batch)
                scores = scores.index_copy(0, at, processed[rows])
        return scores


def never_generated(mask_token_id: int, generation_config: GenerationConfig) -> list[int]:
    """Return the ids that are never generated: the mask, and padding unless it is also an end token."""
    pad, eos = generation_config.pad_token_id, generation_config.eos_token_id
    if pad is None or pad in (eos if isinstance(eos, list) else [eos]):
        return [mask_token_id]
    return [mask_token_id, pad]
