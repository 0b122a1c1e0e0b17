"""The passes that write text block after block (arXiv 2503.09573, Algorithm 2): network, cache, logits processors.

A step predicts one place per row. Finished blocks lie in the cache; a block is written to it by the pass that takes
the first step of the next one, so a block costs as many passes as it has steps.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
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

from .attention_bd3lm import AttentionPlan, block_causal_plan, decoding_plan, token_layout
from .cache_bd3lm import BlockCacheLayer
from .canvas_bd3lm import Canvas
from .noise_bd3lm import LogLinearNoise, noise_schedule
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
        self.model, self.canvas, self.config = model, canvas, model.config
        self.prompt, self.cache, self.generator = prompt, cache, generator
        self.processors, self.do_sample = processors, generation_config.do_sample
        self.sampler: FirstHittingSampler = SAMPLERS[generation_config.sampler]()
        # Processors that read the text expect all of it to the left of the token they judge.
        reads_text = any(not isinstance(p, (*_READS_SCORES, *_READS_LENGTH)) for p in processors)
        self.random_order = self.do_sample and not reads_text
        self.num_forward_passes = 0
        recorded = bool(generation_config.return_dict_in_generate)
        self.scores = Record(recorded and bool(generation_config.output_scores))
        self.logits = Record(recorded and bool(generation_config.output_logits))
        self.modulations = None
        if not self.config.time_conditioning:
            self.modulations = model.backbone.modulations(None, canvas.text.device)
        self.position_ids = canvas.position_ids
        self.forbidden = _never_written(self.config.mask_token_id, generation_config)
        self._dropped = 0  # oldest columns that have left the window and the cache
        if cache is not None:
            check_cache(cache, canvas)

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
            tokens = self._choose(self._forward(begin, place, t), begin + place, active)
            current = block.gather(1, place.unsqueeze(1)).squeeze(1)
            block.scatter_(1, place.unsqueeze(1), torch.where(active, tokens, current).unsqueeze(1))
            if hasattr(streamer, "put_draft") and not finished[0]:
                streamer.put_draft(self._draft(begin))

    def _draft(self, begin: int) -> torch.Tensor:
        """The first row's new tokens of this block, as far as they are revealed."""
        stop = min(begin + self.canvas.block_size, int(self.canvas.prompt_end[0]) + self.canvas.new_tokens)
        draft = self.canvas.text[0, max(begin, int(self.canvas.prompt_end[0])) : stop]
        return draft[draft != self.config.mask_token_id].cpu()

    # --- The network -------------------------------------------------------------------------------------------------

    def _forward(self, begin: int, place: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Logits `(batch, vocab_size)` of one place of the block per row."""
        model, size = self.model, self.config.block_size
        self.num_forward_passes += 1
        rows = torch.arange(place.shape[0], device=place.device) * size + place
        modulations = self.modulations
        if modulations is None:
            sigma = LogLinearNoise().sigma(noise_schedule(self.config.noise).move_chance(t))
            modulations = model.backbone.modulations(sigma, place.device)
        if self.cache is None:
            first, commit, plan = self._window_plan(begin)
        else:
            first = int(self.cache.get_seq_length()) + self._dropped
            if begin - first > size:
                self._prefill(first, begin, modulations)
                first = begin
            commit = begin - first
            plan = self._step_plan(begin, commit)
        embeds = model.backbone.vocab_embed(self.canvas.text[:, first : begin + size])
        positions = self.position_ids[:, first : begin + size]
        hidden = model.backbone.run(
            embeds, positions, plan, modulations, past_key_values=self.cache, commit=commit, rows=rows
        ).last_hidden_state
        self._slide()
        return model.get_output_embeddings()(hidden).float()

    def _prefill(self, first: int, stop: int, modulations: list) -> None:
        """Write finished blocks to the cache; nothing of their last layer but keys and values is needed."""
        length, valid = stop - first, self.canvas.key_valid
        valid = None if valid is None else valid[:, :stop]
        layout = token_layout(valid, length, self.config.block_size, past=first, device=self.canvas.text.device)
        embeds = self.model.backbone.vocab_embed(self.canvas.text[:, first:stop])
        options = {"implementation": self.config._attn_implementation, "dtype": embeds.dtype}
        plan = block_causal_plan(layout, length, self.config.block_size, **options)
        plan = AttentionPlan(plan.tiles, (), length)
        positions = self.position_ids[:, first:stop]
        self.model.backbone.run(embeds, positions, plan, modulations, past_key_values=self.cache, commit=length)

    def _step_plan(self, begin: int, finished: int) -> AttentionPlan:
        """Attention of a step behind the cache; the noisy block sees a window of at most `model_length` tokens."""
        size, past = self.config.block_size, begin - finished - self._dropped
        valid = self.canvas.key_valid
        if valid is not None:
            # Once every row reaches back to the window's beginning, nothing is padded any more.
            valid = None if self._dropped >= int(self.canvas.start.max()) else valid[:, self._dropped : begin + size]
        hidden = max(0, past + finished + size - self.config.model_length)
        return decoding_plan(past, finished, size, valid, self.model.dtype, hidden=hidden)

    def _slide(self) -> None:
        """Forget the oldest blocks, so that the next step fits into the window.

        Rotary attention depends on distances only, so keys rotated at their absolute position serve a moving window.
        """
        if self.cache is None:
            return
        excess = int(self.cache.get_seq_length()) + self.config.block_size - self.config.model_length
        if excess <= 0:
            return
        for layer in self.cache.layers:
            if isinstance(layer, BlockCacheLayer):
                layer.drop_first(excess)
            elif isinstance(layer, DynamicLayer) and layer.keys is not None and layer.values is not None:
                layer.keys, layer.values = layer.keys[:, :, excess:], layer.values[:, :, excess:]
        self._dropped += excess

    def close(self) -> Cache | None:
        """The cache, to be continued by a later call.

        When the window has moved it is emptied: its keys stand at positions that no later prompt has.
        """
        if self.cache is not None and self._dropped:
            for layer in self.cache.layers:
                # Not `reset`, which in some transformers versions keeps the tokens and zeroes them.
                if isinstance(layer, DynamicLayer) and layer.keys is not None and layer.values is not None:
                    layer.keys, layer.values = layer.keys[:, :, :0], layer.values[:, :, :0]
        return self.cache

    def _window_plan(self, begin: int) -> tuple[int, int, AttentionPlan]:
        """Without a cache: the whole window in every step, only the block queried in the last layer."""
        size = self.config.block_size
        first = max(0, begin + size - self.config.model_length)
        length = begin + size - first
        valid = self.canvas.key_valid
        valid = None if valid is None else valid[:, first : begin + size]
        layout = token_layout(valid, length, size, device=self.canvas.text.device)
        implementation, dtype = self.config._attn_implementation, self.model.dtype
        plan = block_causal_plan(layout, length, size, implementation=implementation, dtype=dtype)
        last = decoding_plan(length - size, 0, size, valid, dtype).last_tiles
        return first, 0, AttentionPlan(plan.tiles, last, length - size)

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


def check_cache(cache: Cache, canvas: Canvas) -> None:
    """Refuse a cache that this canvas can not continue.

    Raises:
        ValueError: a cache of another kind, of another batch, with padding or part of a block, or longer than the
            prompt.
    """
    growing = isinstance(cache, DynamicCache) and all(type(x) in (DynamicLayer, BlockCacheLayer) for x in cache.layers)
    if not growing:
        raise ValueError(
            f"past_key_values is a {type(cache).__name__}, which can not keep finished blocks: pass the cache that an "
            f"earlier call returned or a plain DynamicCache, or leave it out."
        )
    held = int(cache.get_seq_length())
    if not held:
        return
    layer: Any = cache.layers[0]
    rows = layer.keys.shape[0]
    if rows != canvas.text.shape[0]:
        raise ValueError(
            f"past_key_values holds {rows} rows but the batch has {canvas.text.shape[0]} (num_return_sequences "
            f"counts): repeat it with past_key_values.batch_repeat_interleave, or leave it out."
        )
    if canvas.key_valid is not None or held % canvas.block_size:
        raise ValueError(
            f"past_key_values holds {held} tokens: a cache can be continued when it holds whole blocks and no row of "
            f"the batch is padded. Leave it out to start afresh."
        )
    if held > int(canvas.lengths.min()):
        raise ValueError(
            f"past_key_values holds {held} tokens but the prompt has {int(canvas.lengths.min())}: pass the whole text "
            f"so far as input_ids, the cached part included."
        )


def _never_written(mask_token_id: int, generation_config: GenerationConfig) -> list[int]:
    """Ids that are never produced: the mask, and padding unless it doubles as the end of a text."""
    pad, eos = generation_config.pad_token_id, generation_config.eos_token_id
    if pad is None or pad in (eos if isinstance(eos, list) else [eos]):
        return [mask_token_id]
    return [mask_token_id, pad]


__all__ = ["BlockWriter", "NucleusLogitsProcessor", "Record", "check_cache"]
