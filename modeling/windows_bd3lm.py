"""The sliding window that a denoising step attends to, recomputed in every step or kept in a key-value cache.

The window holds `model_length` tokens, the noisy block included. When a text outgrows it, the oldest block is dropped.
Rotary attention depends on distances only, so keys that were rotated at their absolute position stay valid.

A finished block is written to the cache by the first denoising step of the next block, so a block costs as many
forward passes as it has denoising steps.
"""

import threading
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, StaticCache
from transformers.generation import CompileConfig
from transformers.utils import is_triton_available, logging

from .attention_bd3lm import AttentionPlan, block_causal_plan, decoding_plan, slots_plan
from .cache_bd3lm import (
    OwnStaticCache,
    StaticSlots,
    StepCache,
    check_cache,
    clear,
    drop_oldest,
    note_tokens,
    set_length,
    static_buffers,
)
from .decoding_state_bd3lm import SequenceBuffer
from .inputs_bd3lm import token_layout


logger = logging.get_logger(__name__)


class DecodingNetwork:
    """The forward passes of a model that decoding needs. Windows, samplers, stop rules and traces use nothing else.

    A model with another network returns a subclass of this from `decoding_network()`. It overrides `hidden`,
    `static_hidden` and `key_value_shape`; its config has `block_size`, `model_length`, `mask_token_id`,
    `vocab_size`, `num_hidden_layers` and `time_conditioning`.

    Args:
        model: in train or eval mode; it is not changed.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.config = model, model.config
        self.dtype, self.device = model.dtype, model.device
        # Without time conditioning adaLN has the same input in every step, so its output is computed once.
        timed = model.config.time_conditioning
        self.modulations = None if timed else model.backbone.modulations(None, self.device)
        # One tensor for a CUDA graph, which copies each of its inputs before every run.
        self.static_modulations = None if timed else model.backbone.stacked(self.modulations)

    rope_switch: int | None = None  # texts longer than this are rotated in another way

    @property
    def key_value_shape(self) -> tuple[int, int]:
        """Number of heads of the cached keys and values, and the width of each."""
        return self.config.n_heads, self.config.head_dim

    def hidden(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        key_valid: torch.Tensor | None,
        positions: torch.Tensor | None,
        *,
        cache: StepCache | None = None,
        num_cached: int = 0,
        num_out_of_window: int = 0,
        sigma: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """Return hidden states `(positions, hidden_dim)` of the last block, ready for the head.

        Attention is block-causal over `[cache ; input_ids]`: a token sees its own and all earlier blocks.

        Args:
            input_ids: `(batch, length)`, finished blocks followed by the noisy block.
            position_ids: `(batch or 1, length)`, counted from the first token of each row.
            key_valid: bool `(batch, num_cached + length)`, False where a row has no token; None: no padding.
            positions: flat indices into `(batch, block_size)`, the noisy block. None: `input_ids` are finished blocks
                only, to be written to the cache.
            num_cached: tokens in the cache.
            num_out_of_window: oldest tokens of the cache that the noisy block does not see.
            sigma: noise levels `(batch,)`, for time-conditioned models only.
        """
        plan = self._plan(input_ids.shape[1], num_cached, key_valid, positions is not None, num_out_of_window)
        outputs = self.model.backbone.run(
            self.model.backbone.vocab_embed(input_ids),
            position_ids,
            plan,
            self.modulations if sigma is None else self.model.backbone.modulations(sigma, self.device),
            cache=cache,
            output_indices=positions,
        )
        return None if positions is None else outputs.last_hidden_state

    def static_hidden(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        mask: torch.Tensor,
        slots: torch.Tensor,
        cache: StaticCache,
    ) -> torch.Tensor:
        """Return hidden states `(batch, block_size, hidden_dim)` of the last block, with a cache of fixed size.

        Shapes do not depend on how many tokens are cached, so the step can be compiled.

        Args:
            input_ids: `(batch, length)`, the noisy block, in its first step preceded by the block to be cached.
            mask: additive, `(batch or 1, 1, length, cache slots)`.
            slots: `(length,)`, the cache slots to which the keys and values of `input_ids` are written.
        """
        backbone = self.model.backbone
        return backbone.run(
            backbone.vocab_embed(input_ids),
            position_ids,
            slots_plan(mask, input_ids.shape[1] - self.config.block_size),
            self.static_modulations,
            cache=StaticSlots(cache, slots),
        ).last_hidden_state

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return raw logits `(positions, vocab_size)` in float32."""
        logits: torch.Tensor = self.model.logits_head()(hidden)
        return logits.float()

    def _plan(
        self, length: int, num_cached: int, key_valid: torch.Tensor | None, noisy: bool, num_out_of_window: int
    ) -> AttentionPlan:
        size = self.config.block_size
        # With at most one finished block, a plan without large masks suffices.
        finished = length - size if noisy else length
        if noisy and finished <= size:
            return decoding_plan(
                num_cached, finished, size, key_valid, self.dtype, num_out_of_window=num_out_of_window
            )
        layout = token_layout(key_valid, length, size, past=num_cached, device=self.device)
        tiles = block_causal_plan(layout, length, self.config, self.dtype).tiles
        # For finished blocks the last layer only computes keys and values.
        last = decoding_plan(num_cached + finished, 0, size, key_valid, self.dtype).last_tiles if noisy else ()
        return AttentionPlan(tiles, last, finished)


class Window:
    """Recompute the last `model_length` tokens in every step, without a cache.

    Columns are those of the sequence buffer.
    """

    cache: Cache | None = None
    compiled = False  # whether the network is compiled

    def __init__(self, network: DecodingNetwork, buffer: SequenceBuffer) -> None:
        self.network, self.buffer, self.config = network, buffer, network.config
        self.size: int = network.config.block_size
        self.held = 0  # tokens in the cache
        self.rows: torch.Tensor | None = None  # rows of the buffer that are still decoded; None: all

    def hidden(self, begin: int, positions: torch.Tensor, sigma: torch.Tensor | None) -> torch.Tensor:
        """Return hidden states `(positions, hidden_dim)` of one forward pass over the block at column `begin`.

        Args:
            positions: flat indices into `(batch, block_size)`; the batch is the rows that are still decoded.
            sigma: noise levels `(batch,)` of time-conditioned models.
        """
        stop = begin + self.size
        return self._forward(max(0, stop - self.config.model_length), stop, 0, positions, sigma)

    def keep_rows(self, kept: torch.Tensor) -> bool:
        """Continue with only the rows at the given indices. Return False if the cache cannot drop the others."""
        self.rows = kept if self.rows is None else self.rows[kept]
        return True

    def close(self, keep: bool = True) -> Cache | None:
        """Return the cache for a later call; without `keep` the caller discards it."""
        return self.cache

    def _forward(
        self,
        start: int,
        stop: int,
        first: int,
        positions: torch.Tensor | None,
        sigma: torch.Tensor | None,
        num_committed: int = 0,
        **options: Any,
    ) -> Any:
        """Run columns [start, stop) after the cached ones, which begin at `first`. Cache the first `num_committed`."""
        first = first if self.cache is not None else start
        ids, position_ids = self.buffer.token_ids[:, start:stop], self.buffer.position_ids(start, stop)
        ids = self._select_rows(ids)
        if len(position_ids) > 1:
            position_ids = self._select_rows(position_ids)
        cache = None if self.cache is None else StepCache(self.cache, num_committed)
        options = {"cache": cache, "num_cached": self.held, "sigma": sigma, **options}
        return self.network.hidden(ids, position_ids, self._key_valid(first, stop), positions, **options)

    def _select_rows(self, states: torch.Tensor) -> torch.Tensor:
        return states if self.rows is None else states[self.rows]

    def _key_valid(self, start: int, stop: int) -> torch.Tensor | None:
        """Return the valid-token mask, bool `(batch, stop - start)`, or None without padding."""
        valid = self.buffer.key_valid
        # Only infilled texts have padding to the right of the last row's start.
        if valid is None or (self.buffer.blanks is None and start >= self.buffer.last_start):
            return None
        return self._select_rows(valid[:, start:stop])


class CachedWindow(Window):
    """Keep finished blocks in a cache that grows.

    Args:
        exact: recompute a window that has moved, once per block. Otherwise, as published, keep its keys and values;
            those of deeper layers still contain information from blocks that have left the window.
    """

    cache: Cache

    def __init__(self, network: DecodingNetwork, buffer: SequenceBuffer, cache: Cache, exact: bool) -> None:
        super().__init__(network, buffer)
        self.cache, self.exact = cache, exact
        self.first, self.held = 0, int(cache.get_seq_length())  # first column, and number of tokens, in the cache

    def hidden(self, begin: int, positions: torch.Tensor, sigma: torch.Tensor | None) -> torch.Tensor:
        # First column of the window whose last one is the end of this block.
        oldest = begin + self.size - self.config.model_length
        if self.exact and oldest > self.first:
            clear(self.cache)
            self.first, self.held = oldest, 0
        # Only the block before the noisy one can share its forward pass; older ones, the prompt, get one of their own.
        if begin - (self.first + self.held) > self.size:
            self._prefill(self.first + self.held, begin)
        hidden = self._step(begin, begin - (self.first + self.held), positions, sigma)
        if not self.exact and oldest > self.first:  # so that the next step fits into the window
            drop_oldest(self.cache, oldest - self.first)
            self.first = oldest
        self.held = begin - self.first
        return hidden

    def close(self, keep: bool = True) -> Cache:
        """Return the cache, emptied if no later call can continue it.

        It may lack rows or the first tokens. Or a row ended in the middle of a block that longer rows finished.
        """
        last = int((self.buffer.prompt_end_cpu + self.buffer.max_new_tokens).min())
        if self.first or self.rows is not None or self.held > last:
            clear(self.cache)
        note_tokens(self.cache, self.buffer.token_ids[:, : self.held], past=0)
        vars(self.cache)["row_start"] = None if self.buffer.key_valid is None else self.buffer.row_start
        return self.cache

    def keep_rows(self, kept: torch.Tensor) -> bool:
        self.cache.batch_select_indices(kept)
        return super().keep_rows(kept)

    def _prefill(self, start: int, stop: int) -> None:
        """Write the finished blocks of columns [start, stop) to the cache."""
        self._forward(start, stop, self.first, None, None, num_committed=stop - start)
        self.held = stop - self.first

    def _step(
        self, begin: int, num_committed: int, positions: torch.Tensor, sigma: torch.Tensor | None
    ) -> torch.Tensor:
        """Denoise, and write the `num_committed` tokens before the block to the cache."""
        stop = begin + self.size
        hidden: torch.Tensor = self._forward(
            begin - num_committed,
            stop,
            self.first,
            positions,
            sigma,
            num_committed=num_committed,
            num_out_of_window=max(0, stop - self.first - self.config.model_length),
        )
        return hidden


class StaticWindow(CachedWindow):
    """Keep finished blocks and the noisy one in a ring of fixed size, so that every step has the same shapes.

    Column c is in slot (c - origin) modulo the size of the ring. A mask selects the slots that a query sees.

    Args:
        step: [`static_step`], or its compiled version.
    """

    cache: StaticCache

    def __init__(
        self, network: DecodingNetwork, buffer: SequenceBuffer, cache: StaticCache, exact: bool, step: Callable
    ) -> None:
        super().__init__(network, buffer, cache, exact)
        self.step, self.compiled = step, step is not static_step
        self.slots = cache.layers[0].max_cache_len  # type: ignore[union-attr]
        self.origin = 0
        self._placed: tuple[tuple[int, int, int], tuple[torch.Tensor, ...]] | None = None
        heads, width = network.key_value_shape
        shape = (buffer.token_ids.shape[0], heads, 0, width)
        empty = torch.empty(shape, dtype=network.dtype, device=buffer.token_ids.device)
        layer: Any = cache.layers[0]
        self._is_own = isinstance(cache, OwnStaticCache) and not layer.is_initialized
        if isinstance(cache, OwnStaticCache) and self._is_own:
            static_buffers(network.model).take(cache, empty)
        for layer in cache.layers:
            if not layer.is_initialized:
                layer.lazy_initialization(empty, empty)

    def close(self, keep: bool = True) -> Cache:
        """Return the cache; without `keep` return it empty, and leave its buffers to the next call."""
        if isinstance(self.cache, OwnStaticCache) and self._is_own and not keep:
            static_buffers(self.network.model).give_back(self.cache)
            return self.cache
        return super().close()

    def keep_rows(self, kept: torch.Tensor) -> bool:
        return False  # another batch size would be another shape to compile

    def _prefill(self, start: int, stop: int) -> None:
        if self.held == 0:
            self.origin = self.first
        super()._prefill(start, stop)

    def _step(
        self, begin: int, num_committed: int, positions: torch.Tensor, sigma: torch.Tensor | None
    ) -> torch.Tensor:
        start, stop = begin - num_committed, begin + self.size
        hidden = self.step(
            self.network,
            # A copy: the strides of a view depend on the length of the text, and new ones would recompile the step.
            self.buffer.token_ids[:, start:stop].clone(memory_format=torch.contiguous_format),
            *self._placement(begin, num_committed),
            self.cache,
        )
        if num_committed:
            set_length(self.cache, begin - self.first)
            cache: Any = self.cache
            if self.compiled and getattr(cache, "clean_hidden", None) is not None:
                # All steps of the block read it, but the next run of a CUDA graph overwrites what this one returned.
                cache.clean_hidden = cache.clean_hidden.clone()
        return hidden.flatten(0, 1)[positions]

    def _placement(self, begin: int, num_committed: int) -> tuple[torch.Tensor, ...]:
        """Return position ids, mask and slots of a step, which all steps of a block but the first share."""
        key = (begin, num_committed, self.first)
        if self._placed is None or self._placed[0] != key:
            start, stop = begin - num_committed, begin + self.size
            columns = torch.arange(start, stop, device=self.buffer.token_ids.device)
            # Unpadded batches have a single row of positions; expanding it gives the same shape as in padded ones.
            position_ids = self.buffer.position_ids(start, stop).expand(len(self.buffer.token_ids), -1).contiguous()
            slots = (columns - self.origin) % self.slots
            self._placed = (key, (position_ids, self._make_mask(begin, num_committed), slots))
        return self._placed[1]

    def _make_mask(self, begin: int, num_committed: int) -> torch.Tensor:
        """Return an additive mask `(batch, 1, num_committed + block_size, slots)`."""
        # Slots are reused, so the column that a slot holds depends on the block being denoised.
        stop, device, valid = begin + self.size, self.buffer.token_ids.device, self.buffer.key_valid
        slot = torch.arange(self.slots, device=device)
        column = stop - 1 - (stop - 1 - self.origin - slot) % self.slots  # the latest column that this slot holds
        known = (column >= self.first).expand(len(self.buffer.token_ids), 1, 1, -1)
        if valid is not None:
            known = known & valid[:, None, None, column.clamp(min=0)]
        noisy = known & (column >= stop - self.config.model_length)
        own = torch.arange(begin - num_committed, begin, device=device).unsqueeze(1)
        # A position without a token sees itself: no softmax may run over an empty set.
        finished = known & (column < begin) | (column == own)
        seen = torch.cat([finished, noisy.expand(-1, -1, self.size, -1)], dim=2)
        return torch.zeros(seen.shape, dtype=self.network.dtype, device=device).masked_fill(~seen, -torch.inf)


def static_step(network: DecodingNetwork, *inputs: Any) -> torch.Tensor:
    """Run [`DecodingNetwork.static_hidden`]."""
    return network.static_hidden(*inputs)


WINDOWS = {"cached": False, "exact": True}  # `window` in the generation config -> whether a moved one is recomputed


def open_window(
    network: DecodingNetwork, buffer: SequenceBuffer, cache: Cache | None, generation_config: Any
) -> Window:
    """Return the window that fits a cache, which is refused if it cannot continue this text."""
    columns, switch = buffer.token_ids.shape[1], network.rope_switch
    if cache is not None and switch is not None and buffer.first_block <= switch < columns:
        logger.warning_once(
            f"The text grows past original_max_position_embeddings={switch}, where longrope changes the rotation "
            f"of earlier tokens, so nothing is cached. At most {switch} tokens, prompt included, are generated faster."
        )
        cache = None
    if cache is None:
        return Window(network, buffer)
    check_cache(cache, buffer, network.config)
    exact = WINDOWS[generation_config.window]
    if not isinstance(cache, StaticCache):
        return CachedWindow(network, buffer, cache, exact)
    step: Callable = static_step
    # As in transformers, by default only on these devices.
    wanted = generation_config.compile_config is not None or network.device.type in ("cuda", "xpu")
    if wanted and not generation_config.disable_compile:
        shape = (len(buffer.token_ids), cache.layers[0].max_cache_len)  # type: ignore[union-attr]
        step = _compiled_step(network, shape, generation_config.compile_config or CompileConfig())
    return StaticWindow(network, buffer, cache, exact, step)


_LARGEST_STATIC_BATCH = 64  # larger batches keep a GPU busy without compilation


def compiles_by_default(model: Any, generation_config: Any, batch_size: int) -> bool:
    """Return whether a static cache and a compiled step are the default: on one CUDA device, for small batches.

    Small batches are bound by kernel launches. `cache_implementation="dynamic"` and `disable_compile=True` opt out.
    """
    return (
        model.device.type == "cuda"
        and batch_size <= _LARGEST_STATIC_BATCH
        and not generation_config.disable_compile
        and len(set(getattr(model, "hf_device_map", {}).values())) <= 1
        and getattr(model, "hf_quantizer", None) is None
        and is_triton_available()
    )


# Compiled steps by model, then by shape and compile options, the most recently used last. They must not share a code
# object: torch gives up on one after 8 compiled versions.
_STEPS: weakref.WeakKeyDictionary[nn.Module, dict[Any, Callable]] = weakref.WeakKeyDictionary()
_MOST_STEPS = 16  # per model; a server has one for each batch size
_STEPS_LOCK = threading.Lock()


def _compiled_step(network: DecodingNetwork, shape: tuple[int, int], config: CompileConfig) -> Callable:
    """Return [`static_step`] compiled for batches of a shape, the same function on every call.

    Args:
        shape: rows of the batch and slots of the cache.
    """
    options = config.to_dict()
    options["dynamic"] = bool(options["dynamic"])  # by default one graph per shape; a text has two shapes
    if options["mode"] == "reduce-overhead" and threading.current_thread() is not threading.main_thread():
        options["mode"] = "default"  # torch records CUDA graphs in the thread that imported it, and fails elsewhere
    key = (shape, network.dtype, network.device, repr(options))
    with _STEPS_LOCK:
        steps = _STEPS.setdefault(network.model, {})
        step = steps.pop(key, None)
        if step is None:
            # A copy with its own code object: torch counts compiled versions per code object.
            copy: Any = types.FunctionType(static_step.__code__.replace(), static_step.__globals__)
            step = torch.compile(copy, **options)
        steps[key] = step
        while len(steps) > _MOST_STEPS:
            steps.pop(next(iter(steps)))
    return step


def fills_window(config: Any) -> bool:
    """Return whether a block is as long as the window, so that no part is finished early and could be cached."""
    return bool(config.block_size == config.model_length)
