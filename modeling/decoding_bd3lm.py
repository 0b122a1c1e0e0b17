"""Denoise one block: forward pass, logits processors, sampler, remasking, trace (arXiv 2503.09573, Algorithm 2).

Each step predicts the positions that the sampler chooses. The network's forward passes are in `windows_bd3lm.py`.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import Cache
from transformers.generation.logits_process import LogitsProcessorList
from transformers.modeling_outputs import ModelOutput

from .configuration_bd3lm import SAMPLING_EPS
from .decoding_state_bd3lm import SequenceBuffer
from .layers_bd3lm import PrepackedLinears
from .logits_process_bd3lm import PositionProcessors, never_generated
from .noise_bd3lm import LogLinearNoise
from .samplers_bd3lm import (
    SAMPLING_DTYPES,
    Generators,
    RevealState,
    Sampler,
    Step,
    random_uniform,
    sample_categorical,
    token_probability,
)
from .windows_bd3lm import DecodingNetwork, fills_window, open_window


class TraceStep(NamedTuple):
    """One denoising step of a block; tensors on the CPU, `(batch, block_size)`."""

    block: int  # the same for all steps of a block; increases from block to block
    tokens: torch.Tensor  # after the step; the mask token where nothing is revealed
    revealed: torch.Tensor  # bool, revealed in this step; a token known before and masked now was remasked
    confidence: torch.Tensor  # float, probability of a revealed token under the scores it was drawn from; else 0
    columns: torch.Tensor  # column in `sequences`, -1 for none; can be past the end in a row that stopped early


class Trace:
    """The denoising steps of one call, whose prompts have tokens where `attention_mask` `(batch, length)` is 1."""

    def __init__(self, buffer: SequenceBuffer, attention_mask: torch.Tensor) -> None:
        real = attention_mask.bool()
        width, lengths = real.shape[1], real.sum(1, keepdim=True)
        # Index of each column's token in its row, counted from the first token of the prompt.
        number = torch.arange(buffer.token_ids.shape[1], device=real.device) - buffer.row_start.unsqueeze(1)
        prompt_columns = (~real).long().argsort(dim=1, stable=True)  # columns that hold tokens come first, in order
        inside = prompt_columns.gather(1, number.clamp(0, width - 1))
        # New tokens follow the last column of the prompt, padded or not. Texts with blanks do not grow.
        after = width + number - lengths if buffer.blanks is None else torch.full_like(number, -1)
        # (batch, columns): the column of the output for each column of the buffer, -1 for none.
        self.columns = torch.where(number < lengths, inside, after).masked_fill(number < 0, -1).cpu()
        self.steps: list[TraceStep] = []

    def add(self, begin: int, block: torch.Tensor, revealed: torch.Tensor, confidence: torch.Tensor) -> None:
        """Record a step of the block `(batch, block_size)` at column `begin` of the buffer."""
        columns = self.columns[:, begin : begin + block.shape[1]]
        confidence = confidence.cpu().masked_fill(~revealed, 0.0)
        self.steps.append(TraceStep(begin, block.cpu().clone(), revealed, confidence, columns))


@dataclass
class BD3LMGenerateOutput(ModelOutput):
    """Output of `generate(return_dict_in_generate=True)`.

    Args:
        sequences: `(batch, prompt + new)`, the prompts as passed and the new tokens.
        scores: with `output_scores`, for each new token the processed scores `(batch, vocab_size)` it was drawn from.
            For SSD-LM those of the last step, whose argmax it is.
        logits: with `output_logits`, the same before processing.
        past_key_values: the cache of finished blocks, for the next call. Empty if the window has moved, or if rows
            ended early, in the middle of a block or dropped: the next call then recomputes its prompt.
        num_forward_passes: denoising forward passes of the whole batch, not counting the one over the prompts.
        row_forward_passes: `(batch,)`, denoising forward passes in which each row took part: as many as the row would
            need alone. Only for block diffusion.
        tokens_per_forward: new tokens, without padding of finished rows, per row and forward pass of the batch.
        trace: with `output_trace`, every denoising step that reveals tokens.
    """

    sequences: torch.Tensor | None = None
    scores: tuple[torch.Tensor, ...] | None = None
    logits: tuple[torch.Tensor, ...] | None = None
    past_key_values: Cache | None = None
    num_forward_passes: int | None = None
    row_forward_passes: torch.Tensor | None = None
    tokens_per_forward: float | None = None
    trace: list[TraceStep] | None = None


class BlockForward:
    """Run a network over the blocks of a buffer, one forward pass per denoising step.

    Args:
        cache: written and read; None recomputes the whole window in every pass.
        generation_config: decides how the window slides and whether a step is compiled.
    """

    def __init__(
        self, network: DecodingNetwork, buffer: SequenceBuffer, cache: Cache | None, generation_config: Any
    ) -> None:
        self.network, self.block_size, self.row_start = network, buffer.block_size, buffer.row_start
        self.window = open_window(network, buffer, cache, generation_config)
        self.prepacked = PrepackedLinears(network.model, enabled=not self.window.compiled)
        self.count = 0  # denoising forward passes so far
        self._running = list(range(len(buffer.token_ids)))  # rows of the buffer that the network still runs on
        self._row_index: torch.Tensor | None = None  # index of each row of the buffer among these

    def logits(self, begin: int, positions: torch.Tensor, mask_prob: torch.Tensor) -> torch.Tensor:
        """Run one forward pass over the block at column `begin`.

        Args:
            positions: flat indices into `(batch, block_size)`, to be predicted; finished rows have none.
            mask_prob: `(batch,)`, the probability 1 - alpha_t of being masked. Read by time-conditioned models only.

        Returns:
            `(positions, vocab_size)` in float32.
        """
        self.count += 1
        if self._row_index is not None:
            row = self._row_index[positions // self.block_size]
            # Flat indices count only the rows that the network still runs on.
            positions = row * self.block_size + positions % self.block_size
        sigma = None
        if self.network.config.time_conditioning:
            mask_prob = mask_prob.to(positions.device, non_blocking=True)
            if not fills_window(self.network.config):
                # As in training, a sequence has the noise level of its first block: the lowest, once that is finished.
                mask_prob = mask_prob.masked_fill(self.row_start < begin, SAMPLING_EPS)
            sigma = LogLinearNoise().sigma(mask_prob if self.window.rows is None else mask_prob[self.window.rows])
        with self.prepacked:
            return self.network.logits(self.window.hidden(begin, positions, sigma))

    def drop_finished(self, finished: torch.Tensor) -> None:
        """Drop the finished rows, bool `(batch,)` on the CPU, once they are half of those that the network runs on."""
        is_finished = finished.tolist()
        kept = [index for index, row in enumerate(self._running) if not is_finished[row]]
        device = self.network.device
        if not 0 < 2 * len(kept) <= len(self._running) or not self.window.keep_rows(torch.tensor(kept, device=device)):
            return
        self._running = [self._running[index] for index in kept]
        row_index = torch.zeros(len(is_finished), dtype=torch.long)
        row_index[self._running] = torch.arange(len(kept))
        self._row_index = row_index.to(device)


class ScoreRecord:
    """The scores and logits of each new token, recorded if the generation config requests them."""

    def __init__(self, generation_config: Any) -> None:
        requested = {"scores": generation_config.output_scores, "logits": generation_config.output_logits}
        self.names = [name for name in requested if requested[name] and generation_config.return_dict_in_generate]
        self.steps: list[tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]] = []

    def add(self, row: torch.Tensor, index: torch.Tensor, **values: torch.Tensor) -> None:
        """Record `scores` and `logits` `(positions, vocab_size)` of the new token at `index` of each `row`."""
        self.steps.append((row, index, {name: values[name] for name in self.names}))

    def result(self, batch: int, count: int) -> dict[str, tuple[torch.Tensor, ...]]:
        """Return `(batch, vocab_size)` for each of the first `count` new tokens; zeros where a row had ended."""
        results = {}
        for name in self.names:
            like = self.steps[0][2][name]
            recorded = like.new_zeros(count, batch, like.shape[1])
            for row, index, values in self.steps:
                # A block may reach beyond the last token of the output.
                inside = (index < count).nonzero().squeeze(1)
                at = (index[inside].to(recorded.device), row[inside].to(recorded.device))
                recorded[at] = values[name][inside.to(recorded.device)]
            results[name] = tuple(recorded)
        return results


class Prediction(NamedTuple):
    """The predictions of a step, one per position."""

    tokens: torch.Tensor  # (positions,)
    scores: torch.Tensor  # (positions, vocab_size), processed: the tokens are drawn from these
    logits: torch.Tensor  # (positions, vocab_size), before processing


class BlockState:
    """The block being denoised. Counters live on the CPU to avoid device synchronisation."""

    def __init__(self, buffer: SequenceBuffer, begin: int) -> None:
        size, token_ids = buffer.block_size, buffer.token_ids
        self.begin, self.token_ids = begin, token_ids[:, begin : begin + size]  # a view of the buffer
        # (batch, block_size): index of each position among the new tokens of its row, and whether it is output.
        self.index = begin + torch.arange(size) - buffer.prompt_end_cpu.unsqueeze(1)
        self.requested = self.index < buffer.max_new_tokens
        self.is_new = buffer.new_positions(begin)
        self.confidence = torch.zeros(self.token_ids.shape, device=token_ids.device)  # of revealed tokens
        self.uniform = self.confidence  # the random number with which each token is drawn

    def put(self, positions: torch.Tensor, tokens: torch.Tensor) -> None:
        """Set tokens `(positions,)` at flat indices into `(batch, block_size)`."""
        size = self.token_ids.shape[1]
        self.token_ids[positions // size, positions % size] = tokens

    def locate(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the row of each flat index, and its index among the new tokens of that row, on the CPU."""
        return positions // self.token_ids.shape[1], self.index.view(-1)[positions]


class BlockWriter:
    """Denoise the blocks of a buffer with a network.

    Args:
        model: has the `samplers` that suit its predictions, and `decoding_network()`, which runs the forward passes.
        prompt: `(batch, length)`, the text before the new tokens as logits processors see it.
        cache: written and read; None recomputes the whole window in every step.
        trace: records every step, unless None.

    Raises:
        ValueError: if remasking is combined with processors that read the text, or the sampler does not suit the
            model's predictions.
    """

    def __init__(
        self,
        model: Any,
        buffer: SequenceBuffer,
        prompt: torch.Tensor,
        processors: LogitsProcessorList,
        generation_config: Any,
        cache: Cache | None = None,
        generator: Generators = None,
        trace: Trace | None = None,
    ) -> None:
        self.buffer, self.config = buffer, model.config
        self.generator, self.trace = generator, trace
        forbidden = never_generated(self.config.mask_token_id, generation_config)
        self.processors = PositionProcessors(processors, buffer, prompt, forbidden)
        self.left_to_right = bool(self.processors.text_readers)
        self.remask_fraction: float = generation_config.remask_fraction
        if self.left_to_right and self.remask_fraction:
            names = ", ".join(sorted({type(p).__name__ for p in self.processors.text_readers}))
            raise ValueError(
                f"remask_fraction={self.remask_fraction} excludes {names}: a processor that reads the text scores a "
                f"token given all tokens to its left, which remasking would change afterwards. Leave one of them out, "
                f"or set reads_text = False on a processor that ignores its input_ids."
            )
        self.sampling_dtype = SAMPLING_DTYPES[generation_config.sampling_dtype]
        self.forward = BlockForward(model.decoding_network(), buffer, cache, generation_config)
        self.row_forward_passes = torch.zeros(len(buffer.token_ids), dtype=torch.long)  # in which each row took part
        if generation_config.sampler not in model.samplers:
            choices = ", ".join(map(repr, model.samplers))
            raise ValueError(
                f"sampler={generation_config.sampler!r} does not suit a {type(model).__name__}: choose {choices}, or "
                f"leave it out."
            )
        self.sampler: Sampler = model.samplers[generation_config.sampler](generation_config, model.config)
        self.do_sample: bool = generation_config.do_sample
        self.record = ScoreRecord(generation_config)

    def close(self, keep: bool) -> Cache | None:
        """Return the cache for a later call; empty if the window has moved or rows have been dropped.

        Args:
            keep: whether the caller gets it. Otherwise the next call can reuse its buffers.
        """
        return self.forward.window.close(keep)

    def statistics(self, new_tokens: int) -> dict[str, Any]:
        """Return the fields of a generate output about the cost of `new_tokens` tokens, summed over all rows."""
        batch, count = len(self.row_forward_passes), self.forward.count
        return {
            "num_forward_passes": count,
            "row_forward_passes": self.row_forward_passes,
            "tokens_per_forward": new_tokens / max(1, count) / batch,
            "trace": None if self.trace is None else self.trace.steps,
        }

    def denoise(self, begin: int, finished: torch.Tensor, streamer: Any = None) -> None:
        """Reveal the masked tokens of the block at column `begin`.

        1. Reveal the positions that are output, in the order of the sampler.
        2. With `remask_fraction`, mask the least certain tokens of the block and reveal them once more.

        Args:
            finished: bool `(batch,)` on the CPU, rows to skip.
            streamer: receives drafts of the first row, if it has a method `put_draft`.
        """
        self.forward.drop_finished(finished)
        block = BlockState(self.buffer, begin)
        masked = block.is_new & ~finished.unsqueeze(1)
        draft_streamer = streamer if hasattr(streamer, "put_draft") and not finished[0] else None
        # 1. Reveal
        state = RevealState(masked.clone(), block.requested, self.do_sample, self.left_to_right, self.generator)
        self._reveal(block, state, draft_streamer)
        # 2. Remask and reveal
        if self.remask_fraction:
            remasked = self._remask(block, masked & ~state.masked)
            state = RevealState(
                remasked, remasked.clone(), self.do_sample, False, self.generator, self.remask_fraction
            )
            self._reveal(block, state, draft_streamer)
        self.processors.check_any_token_left()

    def _reveal(self, block: BlockState, state: RevealState, draft_streamer: Any) -> None:
        """Take denoising steps until no requested position is masked.

        A position keeps one uniform number for all steps. So a prediction that was not accepted is not redrawn, which
        would favour likely tokens, and a row does not depend on how many steps other rows take.
        """
        device = block.token_ids.device
        if self.do_sample:
            block.uniform = random_uniform(block.token_ids.shape, device, self.generator)
        for step in self.sampler.steps(state):
            placed = step.positions.to(device, non_blocking=True)
            logits = self.forward.logits(block.begin, placed, step.mask_prob)
            self.row_forward_passes[step.positions // block.token_ids.shape[1]] += 1  # once per row of the step
            selected, logits = self.sampler.select(state, step, logits)
            if selected is not step:
                step, placed = selected, selected.positions.to(device, non_blocking=True)
            if not step.positions.numel():
                continue
            predicted = self._predict(block, step.positions, placed, logits)
            revealed = torch.ones_like(step.positions, dtype=torch.bool)
            if not self.sampler.is_parallel:
                block.put(placed, predicted.tokens)
            else:
                on_device = step._replace(positions=placed)
                accepted = self.sampler.accept(state, on_device, predicted.tokens, predicted.scores)
                block.put(placed, torch.where(accepted, predicted.tokens, self.config.mask_token_id))
                revealed = accepted.cpu()  # the one device synchronisation of a step
            state.masked.view(-1)[step.positions] = ~revealed
            if self.remask_fraction or self.trace is not None:
                block.confidence.view(-1)[placed] = token_probability(predicted.scores, predicted.tokens)
            self._record(block, step, predicted, revealed)
            if draft_streamer is not None and revealed[step.positions < block.token_ids.shape[1]].any():
                draft_streamer.put_draft(self._draft(block))

    def _record(self, block: BlockState, step: Step, predicted: Prediction, revealed: torch.Tensor) -> None:
        """Record the requested scores, logits and trace of a step, for the positions that it revealed."""
        if self.record.names:
            kept = revealed.nonzero().squeeze(1)
            row, index = block.locate(step.positions[kept])
            kept = kept.to(predicted.scores.device, non_blocking=True)
            self.record.add(row, index, scores=predicted.scores[kept], logits=predicted.logits[kept])
        if self.trace is not None:
            grid = torch.zeros(block.token_ids.shape, dtype=torch.bool)
            grid.view(-1)[step.positions] = revealed
            self.trace.add(block.begin, block.token_ids, grid, block.confidence)

    def _remask(self, block: BlockState, revealed: torch.Tensor) -> torch.Tensor:
        """Mask the least certain fraction of the revealed positions, rounded down; bool `(batch, block_size)`.

        A corrector in the manner of ReMDM (Wang et al., arXiv 2503.00307), run once per block so that it terminates.
        """
        # 1e-6, since a product such as 0.29 * 100 = 28.999... means 29 tokens.
        count = (self.remask_fraction * revealed.sum(1, keepdim=True) + 1e-6).long()
        device = block.token_ids.device
        confidence = block.confidence.masked_fill(~revealed.to(device, non_blocking=True), torch.inf)
        rank = confidence.argsort(dim=1, stable=True).argsort(dim=1)
        remasked = rank < count.to(device, non_blocking=True)
        block.token_ids.masked_fill_(remasked, self.config.mask_token_id)
        return remasked.cpu()

    def _draft(self, block: BlockState) -> torch.Tensor:
        """Return the new tokens of this block that are revealed in the first row."""
        draft = block.token_ids[0].cpu()
        return draft[block.is_new[0] & block.requested[0] & (draft != self.config.mask_token_id)]

    def _predict(
        self, block: BlockState, positions: torch.Tensor, placed: torch.Tensor, logits: torch.Tensor
    ) -> Prediction:
        """Choose a token for each of the `positions` `(positions,)` of a step; `placed` has them on the device.

        Processors that read the text score the positions of a row one after the other, each given the tokens just
        chosen to its left. A parallel sampler then accepts only from the left.
        """
        if not self.left_to_right:
            return self._choose(block, positions, placed, logits)
        row = positions // block.token_ids.shape[1]
        # Positions are in reading order, so searchsorted finds the first position of each row.
        turn = torch.arange(len(row)) - torch.searchsorted(row, row)  # of each position within its row
        tokens = torch.zeros_like(positions, device=logits.device)
        scores, raw = torch.empty_like(logits), torch.empty_like(logits)
        for number in range(int(turn.max()) + 1):
            current = (turn == number).nonzero().squeeze(1)
            at = current.to(logits.device, non_blocking=True)
            chosen = self._choose(block, positions[current], placed[at], logits[at])
            block.put(placed[at], chosen.tokens)
            tokens[at], scores[at], raw[at] = chosen
        return Prediction(tokens, scores, raw)

    def _choose(
        self, block: BlockState, positions: torch.Tensor, placed: torch.Tensor, logits: torch.Tensor
    ) -> Prediction:
        """Choose a token for each position, at most one per row if processors read the text."""
        logits.index_fill_(1, self.processors.forbidden, -torch.inf)
        scores = self.processors(logits, *block.locate(positions))
        if not self.do_sample:
            return Prediction(scores.argmax(dim=-1), scores, logits)
        uniform = block.uniform.view(-1)[placed]
        return Prediction(sample_categorical(scores, uniform, dtype=self.sampling_dtype), scores, logits)
