"""Writing text block after block (arXiv 2503.09573, Algorithm 2): which token goes where, by sampler and processors.

A step predicts the places that the sampler names; `passes_bd3lm.py` has the network's side of it.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import Cache
from transformers.generation.logits_process import LogitsProcessorList

from .canvas_bd3lm import Canvas
from .draws_bd3lm import SAMPLING_DTYPES, Generators, draw_tokens, random_uniform, token_probability, wide_float
from .passes_bd3lm import BlockPasses
from .processors_bd3lm import PlaceProcessors, never_written
from .samplers_bd3lm import Round, Sampler, Step
from .trace_bd3lm import Trace


@dataclass
class Record:
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


class Page:
    """The block that is being written; what is counted lies on the host."""

    def __init__(self, canvas: Canvas, begin: int) -> None:
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
        canvas: Canvas,
        prompt: torch.Tensor,
        processors: LogitsProcessorList,
        generation_config: Any,
        cache: Cache | None = None,
        generator: Generators = None,
        trace: Trace | None = None,
    ) -> None:
        self.canvas, self.config = canvas, model.config
        self.generator, self.trace = generator, trace
        self.processors = PlaceProcessors(processors, canvas, prompt)
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
        self.passes = BlockPasses(model, canvas, cache, generation_config)
        self.sampler: Sampler = _fitting_sampler(generation_config.sampler, model)(generation_config, model.config)
        self.do_sample: bool = generation_config.do_sample
        recorded = bool(generation_config.return_dict_in_generate)
        self.scores = Record(recorded and bool(generation_config.output_scores))
        self.logits = Record(recorded and bool(generation_config.output_logits))
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
        page = Page(self.canvas, begin)
        masked = page.gaps & ~finished.unsqueeze(1)
        drafts = streamer if hasattr(streamer, "put_draft") and not finished[0] else None
        # 1. Reveal
        work = Round(masked.clone(), page.wanted, self.do_sample, self.in_order, self.generator)
        self._reveal(page, work, drafts)
        # 2. Reveal again
        if self.remask_fraction:
            again = self._remask(page, masked & ~work.masked)
            work = Round(again, again.clone(), self.do_sample, False, self.generator, self.remask_fraction)
            self._reveal(page, work, drafts)
        if self.processors.forbidding and page.dead:
            raise ValueError(
                "the logits processors leave no token to choose from at some place (the mask token, and padding "
                "unless it is also the end token, are never written): loosen the constraints."
            )

    def _reveal(self, page: Page, work: Round, drafts: Any) -> None:
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

    def _record(self, page: Page, step: Step, drawn: Drawn, revealed: torch.Tensor) -> None:
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

    def _remask(self, page: Page, revealed: torch.Tensor) -> torch.Tensor:
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

    def _draft(self, page: Page) -> torch.Tensor:
        """The first row's new tokens of this block, as far as they are revealed."""
        draft = page.block[0].cpu()
        return draft[page.gaps[0] & page.wanted[0] & (draft != self.config.mask_token_id)]

    # --- The choice of tokens ----------------------------------------------------------------------------------------

    def _predict(self, page: Page, step: Step, logits: torch.Tensor) -> Drawn:
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

    def _choose(self, page: Page, places: torch.Tensor, logits: torch.Tensor) -> Drawn:
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
        return Drawn(draw_tokens(scores, uniform, dtype=self.sampling_dtype), scores, logits)


def _fitting_sampler(name: str, model: Any) -> type[Sampler]:
    """The model's sampler of this name."""
    if name not in model.samplers:
        fits = ", ".join(map(repr, model.samplers))
        raise ValueError(
            f"sampler={name!r} does not fit what a {type(model).__name__} predicts: choose {fits}, or leave it out."
        )
    return model.samplers[name]


__all__ = ["BlockWriter", "Drawn", "Page", "Record"]
