"""The window of finished blocks that a denoising step attends to: computed anew, or kept in a cache that slides.

Finished blocks are written to the cache by the pass that takes the first step of the next block, so a block costs as
many passes as it has steps. The window holds `model_length` tokens, the noisy block included. When the text grows
beyond it the oldest block is forgotten; rotary attention depends on distances only, so keys that were rotated at their
absolute position serve a moving window.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import Cache, StaticCache
from transformers.generation import CompileConfig

from .attention_bd3lm import AttentionPlan, block_causal_plan, decoding_plan, slots_plan, token_layout
from .cache_bd3lm import StaticSlots, check_cache, clear, drop_oldest, set_length
from .decoding_state_bd3lm import SequenceBuffer


class Window:
    """Without a cache: the last `model_length` tokens are computed in every step.

    Columns are those of the canvas; `first` is the oldest one that is seen.
    """

    cache: Cache | None = None
    compiled = False

    def __init__(self, model: Any, canvas: SequenceBuffer) -> None:
        self.model, self.canvas, self.config = model, canvas, model.config
        self.size: int = model.config.block_size
        self.rows: torch.Tensor | None = None  # of the canvas, those that are still written; None: all

    def hidden(self, begin: int, rows: torch.Tensor, modulations: list) -> torch.Tensor:
        """Normed hidden states `(rows, hidden_dim)` of one pass over the block that begins at this column.

        Args:
            rows: flat indices into `(batch, block_size)`, the batch being `self.rows`.
        """
        stop = begin + self.size
        first = max(0, stop - self.config.model_length)
        length, valid = stop - first, self._valid(first, stop)
        plan = self._causal_plan(valid, length, 0)
        last = decoding_plan(length - self.size, 0, self.size, valid, self.model.dtype).last_tiles
        return self._run(
            first, stop, AttentionPlan(plan.tiles, last, length - self.size), modulations, output_indices=rows
        )

    def keep_rows(self, kept: torch.Tensor) -> bool:
        """Go on with some of the rows, given their indices; False where the cache can not part with the others."""
        self.rows = kept if self.rows is None else self.rows[kept]
        return True

    def close(self) -> Cache | None:
        """The cache, to be continued by a later call."""
        return self.cache

    def _run(self, first: int, stop: int, plan: AttentionPlan, modulations: list, **options: Any) -> torch.Tensor:
        embeds = self.model.backbone.vocab_embed(self._ids(first, stop))
        positions = self._positions(first, stop)
        run = self.model.backbone.run
        return run(embeds, positions, plan, modulations, **options).last_hidden_state

    def _of_rows(self, states: torch.Tensor) -> torch.Tensor:
        return states if self.rows is None else states[self.rows]

    def _ids(self, first: int, stop: int) -> torch.Tensor:
        return self._of_rows(self.canvas.text[:, first:stop])

    def _positions(self, first: int, stop: int) -> torch.Tensor:
        positions = self.canvas.positions(first, stop)
        return positions if len(positions) == 1 else self._of_rows(positions)

    def _valid(self, first: int, stop: int) -> torch.Tensor | None:
        """Where the rows have tokens, bool `(batch, stop - first)`; None: everywhere."""
        valid = self.canvas.key_valid
        begun = self.canvas.holes is None and first >= self.canvas.last_start
        return None if valid is None or begun else self._of_rows(valid[:, first:stop])

    def _causal_plan(self, valid: torch.Tensor | None, length: int, past: int) -> AttentionPlan:
        layout = token_layout(valid, length, self.size, past=past, device=self.canvas.text.device)
        options = {"implementation": self.config._attn_implementation, "dtype": self.model.dtype}
        return block_causal_plan(layout, length, self.size, **options)


class CachedWindow(Window):
    """Finished blocks lie in a cache that grows.

    Args:
        exact: a window that moves is computed anew for each block. Otherwise, as published, its keys and values are
            kept; those of deeper layers then still know of the blocks that have been forgotten.
    """

    cache: Cache

    def __init__(self, model: Any, canvas: SequenceBuffer, cache: Cache, exact: bool) -> None:
        super().__init__(model, canvas)
        self.cache, self.exact = cache, exact
        self.first, self.held = 0, int(cache.get_seq_length())  # oldest column, and tokens, in the cache

    def hidden(self, begin: int, rows: torch.Tensor, modulations: list) -> torch.Tensor:
        oldest = begin + self.size - self.config.model_length
        if self.exact and oldest > self.first:
            clear(self.cache)
            self.first, self.held = oldest, 0
        written = self.first + self.held
        if begin - written > self.size:
            self._prefill(written, begin, modulations)
            written = begin
        hidden = self._step(begin, begin - written, rows, modulations)
        self.held = begin - self.first
        if not self.exact and oldest > self.first:
            self._forget(oldest - self.first)
        return hidden

    def close(self) -> Cache:
        """The cache; emptied when it lacks rows, or when its keys stand at positions that no later prompt has."""
        if self.first or self.rows is not None:
            clear(self.cache)
        return self.cache

    def keep_rows(self, kept: torch.Tensor) -> bool:
        self.cache.batch_select_indices(kept)
        return super().keep_rows(kept)

    def _prefill(self, first: int, stop: int, modulations: list) -> None:
        """Write finished blocks to the cache; nothing of their last layer but keys and values is needed."""
        length = stop - first
        plan = self._causal_plan(self._valid(self.first, stop), length, first - self.first)
        plan = AttentionPlan(plan.tiles, (), length)
        self._run(first, stop, plan, modulations, past_key_values=self.cache, commit=length)
        self.held += length

    def _step(self, begin: int, commit: int, rows: torch.Tensor, modulations: list) -> torch.Tensor:
        """A denoising pass that writes the `commit` tokens before the block to the cache."""
        stop = begin + self.size
        valid = self._valid(self.first, stop)
        num_out_of_window = max(0, stop - self.first - self.config.model_length)
        plan = decoding_plan(
            self.held, commit, self.size, valid, self.model.dtype, num_out_of_window=num_out_of_window
        )
        options = {"past_key_values": self.cache, "commit": commit, "output_indices": rows}
        return self._run(begin - commit, stop, plan, modulations, **options)

    def _forget(self, tokens: int) -> None:
        """Let the window slide over its oldest tokens, so that the next step fits into it."""
        drop_oldest(self.cache, tokens)
        self.first += tokens
        self.held -= tokens


class StaticWindow(CachedWindow):
    """Finished blocks and the noisy one lie in a ring of fixed size, and every step has the same shapes.

    The column c lies in slot (c - origin) modulo the size of the ring; a mask says which slots a query sees.

    Args:
        step: [`static_step`], or the same compiled.
    """

    cache: StaticCache

    def __init__(
        self,
        model: Any,
        canvas: SequenceBuffer,
        cache: StaticCache,
        exact: bool,
        step: Callable,
    ) -> None:
        super().__init__(model, canvas, cache, exact)
        self.step, self.compiled = step, step is not static_step
        self.slots = cache.layers[0].max_cache_len  # type: ignore[union-attr]
        self.ring = self.slots // self.size * self.size
        self.origin = 0
        self._masks: tuple[tuple[int, int, int], torch.Tensor] | None = None
        rows, heads, dim = canvas.text.shape[0], self.config.n_heads, self.config.head_dim
        empty = torch.empty((rows, heads, 0, dim), dtype=model.dtype, device=canvas.text.device)
        layer: Any
        for layer in cache.layers:
            if not layer.is_initialized:
                layer.lazy_initialization(empty, empty)

    def keep_rows(self, kept: torch.Tensor) -> bool:
        return False

    def _prefill(self, first: int, stop: int, modulations: list) -> None:
        if self.held == 0:
            self.origin = self.first
        super()._prefill(first, stop, modulations)

    def _step(self, begin: int, commit: int, rows: torch.Tensor, modulations: list) -> torch.Tensor:
        first, stop = begin - commit, begin + self.size
        columns = torch.arange(first, stop, device=self.canvas.text.device)
        hidden = self.step(
            self.model.backbone,
            self._ids(first, stop).clone(memory_format=torch.contiguous_format),  # strides without the text's length
            self._positions(first, stop),
            self._mask(begin, commit),
            (columns - self.origin) % self.ring,
            self.cache,
            modulations,
        )
        if commit:
            set_length(self.cache, begin - self.first)
        return hidden.flatten(0, 1)[rows]

    def _mask(self, begin: int, commit: int) -> torch.Tensor:
        """Additive mask of a step, the same for all steps of a block but the first."""
        key = (begin, commit, self.first)
        if self._masks is None or self._masks[0] != key:
            self._masks = (key, self._make_mask(begin, commit))
        return self._masks[1]

    def _make_mask(self, begin: int, commit: int) -> torch.Tensor:
        """Additive mask `(batch or 1, 1, commit + block_size, slots)`."""
        stop, device, valid = begin + self.size, self.canvas.text.device, self.canvas.key_valid
        slot = torch.arange(self.slots, device=device)
        column = stop - 1 - (stop - 1 - self.origin - slot) % self.ring  # the latest one that lies there
        column = column.masked_fill(slot >= self.ring, -1)
        known = (column >= self.first).view(1, 1, 1, -1)
        if valid is not None:
            known = known & valid[:, None, None, column.clamp(min=0)]
        noisy = known & (column >= stop - self.config.model_length)
        own = torch.arange(begin - commit, begin, device=device).unsqueeze(1)
        finished = known & (column < begin) | (column == own)  # a place without a token sees itself
        seen = torch.cat([finished, noisy.expand(-1, -1, self.size, -1)], dim=2)
        return torch.zeros(seen.shape, dtype=self.model.dtype, device=device).masked_fill(~seen, -torch.inf)

    def _forget(self, tokens: int) -> None:
        # The ring writes over them.
        self.first += tokens
        self.held -= tokens


def static_step(
    backbone: Any,
    ids: torch.Tensor,
    position_ids: torch.Tensor,
    mask: torch.Tensor,
    slots: torch.Tensor,
    cache: StaticCache,
    modulations: list,
) -> torch.Tensor:
    """A denoising pass whose shapes are the same for all blocks: normed hidden states `(batch, block_size, dim)`.

    Args:
        ids: `(batch, length)`, the noisy block, in its first step behind the block before it.
        slots: `(length,)`, where in the cache their keys and values go.
    """
    plan = slots_plan(mask, ids.shape[1] - backbone.config.block_size)
    embeds, seen = backbone.vocab_embed(ids), StaticSlots(cache, slots)
    return backbone.run(embeds, position_ids, plan, modulations, past_key_values=seen)[0]


WINDOWS = {"cached": False, "exact": True}  # name in the generation config: whether a moved window is computed anew


def open_window(model: Any, canvas: SequenceBuffer, cache: Cache | None, generation_config: Any) -> Window:
    """The window that a cache makes possible.

    Raises:
        ValueError: the cache can not continue this canvas.
    """
    if cache is None:
        return Window(model, canvas)
    check_cache(cache, canvas, model.config)
    exact = WINDOWS[generation_config.window]
    if not isinstance(cache, StaticCache):
        return CachedWindow(model, canvas, cache, exact)
    compiled = _is_compiled(model, generation_config)
    step = _compile_step(generation_config.compile_config or CompileConfig()) if compiled else static_step
    return StaticWindow(model, canvas, cache, exact, step)


def _is_compiled(model: Any, generation_config: Any) -> bool:
    """As in transformers where it compiles by itself; elsewhere when `compile_config` is given."""
    if generation_config.disable_compile:
        return False
    return generation_config.compile_config is not None or model.device.type in ("cuda", "xpu")


def _compile_step(config: CompileConfig) -> Callable:
    options = config.to_dict()
    options["dynamic"] = bool(options["dynamic"])  # by default a graph for each shape, of which a text has two
    return torch.compile(static_step, **options)


def fills_window(config: Any) -> bool:
    """Whether a block is as long as the window: nothing in it is finished before the rest, so there is no cache."""
    return bool(config.block_size == config.model_length)


__all__ = ["WINDOWS", "CachedWindow", "StaticWindow", "Window", "open_window", "static_step", "fills_window"]
