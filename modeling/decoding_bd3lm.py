"""A record of the denoising, step by step, for pictures and for the curious.

The network passes that write text block by block (arXiv 2503.09573, Algorithm 2): one per denoising step.

Writing text block after block (arXiv 2503.09573, Algorithm 2): which token goes where, by sampler and processors.

A step predicts the places that the sampler names; `passes_bd3lm.py` has the network's side of it.

Completing texts in place: mask tokens anywhere, block by block, with the samplers of `generate`.

A block is denoised jointly, so a gap sees what stands to its right in its own block, and everything to its left; the
blocks behind it are not seen, as the model is block-causal.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import Cache
from transformers.generation.logits_process import LogitsProcessorList

from .cache_bd3lm import cache_maker
from .decoding_state_bd3lm import SequenceBuffer, lay_out
from .linear_bd3lm import PrepackedLinears
from .logits_process_bd3lm import PositionProcessors, never_written, wide_float
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
from .windows_bd3lm import fills_window, open_window


class TraceStep(NamedTuple):
    """One denoising step of a block; tensors on the CPU, `(batch, block_size)`."""

    block: int  # a number that the steps of one block share, and that grows from block to block
    tokens: torch.Tensor  # after the step; the mask token where nothing is revealed
    revealed: torch.Tensor  # bool, revealed in this step; what was known before and is masked now, was remasked
    confidence: torch.Tensor  # float, probability of a revealed token under the scores it was drawn from; 0 elsewhere
    columns: torch.Tensor  # column of `sequences` where each place stands, -1 for none; cut rows end before some


class Trace:
    """The steps of one call.

    Args:
        columns: `(batch, columns of the canvas)`, what becomes [`TraceStep.columns`].
    """

    def __init__(self, columns: torch.Tensor) -> None:
        self.columns = columns.cpu()
        self.steps: list[TraceStep] = []

    def add(self, begin: int, block: torch.Tensor, revealed: torch.Tensor, confidence: torch.Tensor) -> None:
        """Keep a step of the block `(batch, block_size)` that begins at this column of the canvas."""
        columns = self.columns[:, begin : begin + block.shape[1]]
        confidence = confidence.cpu().masked_fill(~revealed, 0.0)
        self.steps.append(TraceStep(begin, block.cpu().clone(), revealed, confidence, columns))


def sequence_columns(columns: int, start: torch.Tensor, real: torch.Tensor, *, continued: bool = True) -> torch.Tensor:
    """Where each column of a canvas stands in the result, -1 for nowhere; `(batch, columns)`.

    Args:
        columns: of the canvas.
        start: `(batch,)`, column of the canvas where each row's first token stands.
        real: bool `(batch, width)`, where the prompt has tokens.
        continued: the row goes on behind the prompt's last column, as in `generate`.
    """
    width = real.shape[1]
    number = torch.arange(columns, device=real.device) - start.unsqueeze(1)
    where = (~real).long().argsort(dim=1, stable=True)  # columns that hold tokens come first, in their order
    inside = where.gather(1, number.clamp(0, width - 1))
    lengths = real.sum(1, keepdim=True)
    behind = width + number - lengths if continued else torch.full_like(number, -1)
    return torch.where(number < lengths, inside, behind).masked_fill(number < 0, -1)


class BlockForward:
    """Runs a model over the blocks of a canvas.

    Args:
        cache: written to and read from; None computes the whole window in every pass.
        generation_config: says how the window moves, and whether a step is compiled.
    """

    def __init__(self, model: Any, canvas: SequenceBuffer, cache: Cache | None, generation_config: Any) -> None:
        self.model, self.block_size = model, canvas.block_size
        self.count = 0  # denoising passes so far
        self.modulations = None
        if not model.config.time_conditioning:
            self.modulations = model.backbone.modulations(None, canvas.text.device)
        self.window = open_window(model, canvas, cache, generation_config)
        self.prepacked = PrepackedLinears(model, enabled=not self.window.compiled)
        self._running = list(range(len(canvas.text)))  # rows of the canvas that the network still runs on
        self._place: torch.Tensor | None = None  # of each row among those

    def logits(self, begin: int, rows: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """One denoising pass over the block that begins at this column.

        Args:
            rows: places that are predicted, flat indices into `(batch, block_size)`; none of a finished text.
            t: `(batch,)`, how much of each row's block is still masked: the probability 1 - alpha_t, which is the time
                of the log-linear schedule. Read only by time-conditioned models.

        Returns:
            `(rows, vocab_size)` in float32.
        """
        self.count += 1
        modulations = self.modulations
        if self._place is not None:
            rows = self._place[rows // self.block_size] * self.block_size + rows % self.block_size
        if modulations is None:
            t = t if self.window.rows is None else t[self.window.rows]
            modulations = self.model.backbone.modulations(LogLinearNoise().sigma(t), rows.device)
        with self.prepacked:
            hidden = self.window.hidden(begin, rows, modulations)
            return self.model.get_output_embeddings()(hidden).float()

    def leave_out(self, finished: torch.Tensor) -> None:
        """Run the network without the texts that are finished, once they are at least half of those it runs on.

        Args:
            finished: bool `(batch,)` on the host.
        """
        ended = finished.tolist()
        kept = [number for number, row in enumerate(self._running) if not ended[row]]
        device = self.window.canvas.text.device
        if not 0 < 2 * len(kept) <= len(self._running) or not self.window.keep_rows(torch.tensor(kept, device=device)):
            return
        self._running = [self._running[number] for number in kept]
        place = torch.zeros(len(ended), dtype=torch.long)
        place[self._running] = torch.arange(len(kept))
        self._place = place.to(device)

    def close(self) -> Cache | None:
        """The cache, to be continued by a later call; empty if the window has moved or texts have been left out."""
        return self.window.close()


@dataclass
class StepRecord:
    """Scores or logits of each new token, kept when asked for."""

    wanted: bool
    steps: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def put(self, row: torch.Tensor, index: torch.Tensor, values: torch.Tensor) -> None:
        """Keep the values `(places, vocab_size)` of each row's new token number `index`, both `(places,)`."""
        if self.wanted:
            self.steps.append((row, index, values))

    def result(self, batch: int, count: int) -> tuple[torch.Tensor, ...] | None:
        """Of the first `count` new tokens, each `(batch, vocab_size)`; a row that ended before has zeros."""
        if not self.wanted:
            return None
        if not self.steps:
            return ()
        kept = self.steps[0][2].new_zeros(count, batch, self.steps[0][2].shape[1])
        for row, index, values in self.steps:
            shown = (index < count).nonzero().squeeze(1)
            kept[index[shown].to(kept.device), row[shown].to(kept.device)] = values[shown.to(kept.device)]
        return tuple(kept)


class Drawn(NamedTuple):
    """What a step predicts for its places."""

    tokens: torch.Tensor  # (places,)
    scores: torch.Tensor  # (places, vocab_size), processed: what the tokens were drawn from
    logits: torch.Tensor  # (places, vocab_size)


class BlockState:
    """The block that is being written; what is counted lies on the host."""

    def __init__(self, canvas: SequenceBuffer, begin: int) -> None:
        size, text = canvas.block_size, canvas.text
        self.begin, self.block = begin, text[:, begin : begin + size]  # a view of the canvas
        origin = canvas.host_prompt_end.unsqueeze(1)
        self.index = begin + torch.arange(size) - origin  # (batch, block_size), which new token of its row
        self.wanted = self.index < canvas.new_tokens
        self.gaps = canvas.gaps(begin)  # what this block adds to the text
        self.confidence = torch.zeros(self.block.shape, device=text.device)  # of revealed tokens
        self.uniform = self.confidence  # of each place, what its token is drawn with
        self.dead = torch.zeros((), dtype=torch.bool, device=text.device)  # some place could not get any token

    def put(self, places: torch.Tensor, tokens: torch.Tensor) -> None:
        """Write tokens at flat indices into `(batch, block_size)`, both `(places,)` on the device."""
        size = self.block.shape[1]
        self.block[places // size, places % size] = tokens


class BlockWriter:
    """Denoises the blocks of a canvas with a model.

    Args:
        prompt: `(batch, length)`, the text before what is written, as logits processors see it.
        cache: written to and read from; None computes the whole window in every step.
        trace: gets every step, where one is wanted.

    Raises:
        ValueError: remasking together with processors that read the text; a precision that the device lacks; a sampler
            that does not fit what the model predicts.
    """

    def __init__(
        self,
        model: Any,
        canvas: SequenceBuffer,
        prompt: torch.Tensor,
        processors: LogitsProcessorList,
        generation_config: Any,
        cache: Cache | None = None,
        generator: Generators = None,
        trace: Trace | None = None,
    ) -> None:
        self.canvas, self.config = canvas, model.config
        self.generator, self.trace = generator, trace
        self.processors = PositionProcessors(processors, canvas, prompt)
        self.in_order = bool(self.processors.reading)
        self.remask_fraction: float = generation_config.remask_fraction
        if self.in_order and self.remask_fraction:
            names = ", ".join(sorted({type(p).__name__ for p in self.processors.reading}))
            raise ValueError(
                f"remask_fraction={self.remask_fraction} does not go with {names}: a processor that reads the text "
                f"judges a token by all to its left, which remasking would change afterwards. Leave one of them out, "
                f"or give a processor that does not read its input_ids an attribute reads_text = False."
            )
        self.sampling_dtype = SAMPLING_DTYPES[generation_config.sampling_dtype]
        if self.sampling_dtype.itemsize > wide_float(canvas.text.device).itemsize:
            raise ValueError(
                f"sampling_dtype={generation_config.sampling_dtype!r}: {canvas.text.device} has no such numbers."
                f" Leave it at 'float32', or move the model to another device."
            )
        self.passes = BlockForward(model, canvas, cache, generation_config)
        self.sampler: Sampler = _fitting_sampler(generation_config.sampler, model)(generation_config, model.config)
        self.do_sample: bool = generation_config.do_sample
        recorded = bool(generation_config.return_dict_in_generate)
        self.scores = StepRecord(recorded and bool(generation_config.output_scores))
        self.logits = StepRecord(recorded and bool(generation_config.output_logits))
        forbidden = never_written(self.config.mask_token_id, generation_config)
        self.forbidden = torch.tensor(forbidden, device=canvas.text.device)

    def denoise(self, begin: int, finished: torch.Tensor, streamer: Any = None) -> None:
        """Reveal the masked tokens of the block that begins at this column.

        1. Of what is masked, reveal what the result shows, as the sampler says.
        2. With `remask_fraction`, mask the least certain tokens of the block once more and reveal them again.

        Args:
            finished: bool `(batch,)` on the host, rows that are not touched.
            streamer: gets drafts of the first row, if it takes them.
        """
        page = BlockState(self.canvas, begin)
        masked = page.gaps & ~finished.unsqueeze(1)
        drafts = streamer if hasattr(streamer, "put_draft") and not finished[0] else None
        # 1. Reveal
        work = RevealState(masked.clone(), page.wanted, self.do_sample, self.in_order, self.generator)
        self._reveal(page, work, drafts)
        # 2. Reveal again
        if self.remask_fraction:
            again = self._remask(page, masked & ~work.masked)
            work = RevealState(again, again.clone(), self.do_sample, False, self.generator, self.remask_fraction)
            self._reveal(page, work, drafts)
        if self.processors.forbidding and page.dead:
            raise ValueError(
                "the logits processors leave no token to choose from at some place (the mask token, and padding "
                "unless it is also the end token, are never written): loosen the constraints."
            )

    def _reveal(self, page: BlockState, work: RevealState, drafts: Any) -> None:
        """Take the steps of a round.

        A place draws its uniform number once: a token that was predicted and not accepted has no second chance to
        become a likelier one, and what a row gets does not depend on the steps that other rows take.
        """
        device = page.block.device
        if self.do_sample:
            page.uniform = random_uniform(page.block.shape, device, self.generator)
        for step in self.sampler.steps(work):
            chance = step.chance.to(device, non_blocking=True)
            logits = self.passes.logits(page.begin, step.places.to(device, non_blocking=True), chance)
            step, logits = self.sampler.narrow(work, step, logits)
            if not step.places.numel():
                continue
            places = step.places.to(device, non_blocking=True)
            drawn = self._predict(page, step, logits)
            revealed = torch.ones_like(step.places, dtype=torch.bool)
            if not self.sampler.weighs:
                page.put(places, drawn.tokens)
            else:
                accepted = self.sampler.accept(work, step, drawn.tokens, drawn.scores)
                page.put(places, drawn.tokens.masked_fill(~accepted, self.config.mask_token_id))
                revealed = accepted.cpu()
            work.masked.view(-1)[step.places] = ~revealed
            if self.remask_fraction or self.trace is not None:
                page.confidence.view(-1)[places] = token_probability(drawn.scores, drawn.tokens)
            self._record(page, step, drawn, revealed)
            if drafts is not None and revealed[step.places < page.block.shape[1]].any():
                drafts.put_draft(self._draft(page))

    def _record(self, page: BlockState, step: Step, drawn: Drawn, revealed: torch.Tensor) -> None:
        """Keep what was asked for of a step, for the places `(places,)` that it revealed."""
        if self.scores.wanted or self.logits.wanted:
            shown = revealed.nonzero().squeeze(1)
            places, kept = step.places[shown], shown.to(drawn.scores.device)
            row, index = places // page.block.shape[1], page.index.view(-1)[places]
            self.scores.put(row, index, drawn.scores[kept])
            self.logits.put(row, index, drawn.logits[kept])
        if self.trace is not None:
            grid = torch.zeros(page.block.shape, dtype=torch.bool)
            grid.view(-1)[step.places] = revealed
            self.trace.add(page.begin, page.block, grid, page.confidence)

    def _remask(self, page: BlockState, revealed: torch.Tensor) -> torch.Tensor:
        """Mask the share of the revealed places that is least certain, rounded down; bool `(batch, block_size)`.

        A corrector in the manner of ReMDM (Wang et al., arXiv 2503.00307), once per block, so that it ends.
        """
        count = (self.remask_fraction * revealed.sum(1, keepdim=True) + 1e-6).long()
        device = page.block.device
        doubt = page.confidence.masked_fill(~revealed.to(device), torch.inf)
        rank = doubt.argsort(dim=1, stable=True).argsort(dim=1)
        again = rank < count.to(device)
        page.block.masked_fill_(again, self.config.mask_token_id)
        return again.cpu()

    def _draft(self, page: BlockState) -> torch.Tensor:
        """The first row's new tokens of this block, as far as they are revealed."""
        draft = page.block[0].cpu()
        return draft[page.gaps[0] & page.wanted[0] & (draft != self.config.mask_token_id)]

    # --- The choice of tokens ----------------------------------------------------------------------------------------

    def _predict(self, page: BlockState, step: Step, logits: torch.Tensor) -> Drawn:
        """A token for each place of a step.

        Processors that read the text judge the places of a row one after the other, each with the tokens just chosen
        to its left; where the sampler then accepts, it is a run from the left.
        """
        if not self.in_order:
            return self._choose(page, step.places, logits)
        row = step.places // page.block.shape[1]
        turn = torch.arange(len(row)) - torch.searchsorted(row, row)  # of each place within its row
        tokens = torch.zeros_like(step.places, device=logits.device)
        scores = torch.empty_like(logits)
        raw = torch.empty_like(logits)
        for number in range(int(turn.max()) + 1):
            now = (turn == number).nonzero().squeeze(1)
            here = now.to(logits.device, non_blocking=True)
            drawn = self._choose(page, step.places[now], logits[here])
            page.put(step.places[now].to(logits.device, non_blocking=True), drawn.tokens)
            tokens[here], scores[here], raw[here] = drawn
        return Drawn(tokens, scores, raw)

    def _choose(self, page: BlockState, places: torch.Tensor, logits: torch.Tensor) -> Drawn:
        """A token for each place on the host `(places,)`, at most one of a row where processors read the text."""
        logits.index_fill_(1, self.forbidden, -torch.inf)
        scores = logits
        if self.processors.processors:
            row, index = places // page.block.shape[1], page.index.view(-1)[places]
            scores = self.processors(logits.clone(), row, index).index_fill(1, self.forbidden, -torch.inf)
            if self.processors.forbidding:
                dead = scores.isneginf().all(dim=-1)
                page.dead |= dead.any()
                scores = scores.masked_fill(dead.unsqueeze(1), 0.0)
        if not self.do_sample:
            return Drawn(scores.argmax(dim=-1), scores, logits)
        uniform = page.uniform.view(-1)[places.to(scores.device, non_blocking=True)]
        return Drawn(sample_categorical(scores, uniform, dtype=self.sampling_dtype), scores, logits)


def _fitting_sampler(name: str, model: Any) -> type[Sampler]:
    """The model's sampler of this name."""
    if name not in model.samplers:
        fits = ", ".join(map(repr, model.samplers))
        raise ValueError(
            f"sampler={name!r} does not fit what a {type(model).__name__} predicts: choose {fits}, or leave it out."
        )
    return model.samplers[name]


# Fields of a generation config on how long a text becomes, how many there are and what else is returned.
NOT_FOR_GAPS = (
    "max_new_tokens",
    "max_length",
    "min_new_tokens",
    "min_length",
    "max_time",
    "stop_strings",
    "stopping_criteria",
    "stop_at_second_eos",
    "entropy_stop",
    "num_beams",
    "num_return_sequences",
    "streamer",
    "past_key_values",
    "output_scores",
    "output_logits",
)


class Filled(NamedTuple):
    """Completed texts and what they cost."""

    sequences: torch.Tensor  # (batch, length)
    num_gaps: int  # tokens that were filled in, in all rows
    num_forward_passes: int
    trace: Trace | None


def fill_gaps(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    processors: LogitsProcessorList,
    generation_config: Any,
    generator: torch.Generator | None = None,
) -> Filled:
    """Replace every mask token of `input_ids` `(batch, length)`; blocks without one only serve as context."""
    canvas, shown = lay_out_gaps(input_ids, attention_mask, model.config.block_size, model.config.mask_token_id)
    assert canvas.holes is not None
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    trace = None
    if generation_config.output_trace:
        trace = Trace(sequence_columns(canvas.text.shape[1], canvas.start, real, continued=False))
    cached = generation_config.use_cache and not model.config.time_conditioning and not fills_window(model.config)
    # Contexts for processors are counted from each row's first token: nothing stands before the canvas.
    make = cache_maker(generation_config.cache_implementation)
    before, cache = input_ids[:, :0], make(model.config) if cached else None
    writer = BlockWriter(model, canvas, before, processors, generation_config, cache, generator, trace)
    unfinished = torch.zeros(len(input_ids), dtype=torch.bool)
    for begin in canvas.blocks():
        if canvas.gaps(begin).any():
            writer.denoise(begin, unfinished)
    sequences = input_ids.clone()
    sequences[real] = canvas.text[shown]  # both in reading order
    return Filled(sequences, int(canvas.holes.sum()), writer.passes.count, trace)


def lay_out_gaps(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, block_size: int, mask_token_id: int
) -> tuple[SequenceBuffer, torch.Tensor]:
    """Put texts with gaps on a [`Canvas`], and say which of its places hold their tokens, bool `(batch, columns)`.

    A text may end inside a block: the rest of the block is no part of it, and is not seen.
    """
    canvas = lay_out(input_ids, attention_mask, 0, block_size, mask_token_id)
    column = torch.arange(canvas.text.shape[1], device=input_ids.device)
    shown = (column >= canvas.start.unsqueeze(1)) & (column < canvas.prompt_end.unsqueeze(1))
    canvas = SequenceBuffer(
        text=canvas.text,
        start=canvas.start,
        lengths=torch.zeros_like(canvas.lengths),
        first_block=0,
        new_tokens=canvas.text.shape[1],
        block_size=block_size,
        key_valid=None if bool(shown.all()) else shown,
        holes=((canvas.text == mask_token_id) & shown).cpu(),
    )
    return canvas, shown


__all__ = [
    "BlockForward",
    "BlockState",
    "BlockWriter",
    "Drawn",
    "Filled",
    "NOT_FOR_GAPS",
    "StepRecord",
    "Trace",
    "TraceStep",
    "fill_gaps",
    "lay_out_gaps",
    "sequence_columns",
]
