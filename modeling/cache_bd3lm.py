"""The key-value cache of block-wise decoding: finished blocks are written once, denoising steps only read.

A denoising step attends to the cache and to its own block, whose keys are stale as soon as a token is revealed. A
`DynamicCache` would copy the whole cache for every such read. [`BlockCache`] has spare room after its last token,
where a step puts its keys without counting them, and reads everything as one view.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticCache, StaticLayer
from transformers.configuration_utils import PreTrainedConfig


if TYPE_CHECKING:
    from .decoding_state_bd3lm import SequenceBuffer


class BlockCacheLayer(DynamicLayer):
    """One layer's keys and values `(batch, heads, tokens, head_dim)`, in buffers with room at both ends.

    Dropping the oldest tokens only moves the beginning. When the room at the end is used up and the room at the front
    is as large, the tokens move to the front. This copies one token per token written and takes memory for two
    windows.
    """

    _spare = 256  # tokens of room to add when the buffers are full, in addition to doubling them

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self._begin = self._length = 0
        self._buffers = (key_states[:, :, :0], value_states[:, :, :0])
        self.is_initialized = True

    @property
    def keys(self) -> torch.Tensor | None:
        """Keys of the finished tokens, a view."""
        return self._view(0) if self.is_initialized else None

    @keys.setter
    def keys(self, states: torch.Tensor | None) -> None:
        # transformers' crop, reorder_cache and batch selection assign first the keys and then the values.
        if states is not None:
            self._begin, self._buffers = 0, (states, self._view(1))

    @property
    def values(self) -> torch.Tensor | None:
        """Values of the finished tokens, a view."""
        return self._view(1) if self.is_initialized else None

    @values.setter
    def values(self, states: torch.Tensor | None) -> None:
        if states is not None:
            self._buffers, self._length = (self._buffers[0], states), states.shape[2]

    def _view(self, index: int) -> torch.Tensor:
        return self._buffers[index][:, :, self._begin : self._begin + self._length]

    def reserve(self, tokens: int, like: torch.Tensor) -> None:
        """Make room for `tokens` tokens after the finished ones."""
        needed = self._length + tokens
        capacity = min(buffer.shape[2] for buffer in self._buffers)
        if self._begin + needed <= capacity:
            return
        buffers = self._buffers
        # Moving to the front needs room that the tokens do not occupy themselves; else new, larger buffers.
        if self._begin < self._length or needed > capacity:
            batch, heads, _, dim = like.shape
            shape = (batch, heads, max(2 * self._length, needed) + self._spare, dim)
            fresh = [torch.empty(shape, dtype=buffer.dtype, device=buffer.device) for buffer in self._buffers]
            buffers = (fresh[0], fresh[1])
        for index, buffer in enumerate(buffers):
            buffer[:, :, : self._length] = self._view(index)
        self._begin, self._buffers = 0, buffers

    def append(
        self, key_states: torch.Tensor, value_states: torch.Tensor, num_committed: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return views of finished and given tokens, of which the first `num_committed` become finished."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.reserve(key_states.shape[2], key_states)
        begin, end = self._begin, self._begin + self._length
        stop = end + key_states.shape[2]
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, end:stop] = states
        self._length += num_committed
        return self._buffers[0][:, :, begin:stop], self._buffers[1][:, :, begin:stop]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.append(key_states, value_states, key_states.shape[2])

    def get_seq_length(self) -> int:
        return self._length if self.is_initialized else 0

    def reset(self) -> None:
        if self.is_initialized:
            del self._buffers
        self.is_initialized = False

    def drop_first(self, tokens: int) -> None:
        """Drop the oldest `tokens` tokens without moving the others."""
        self._begin += tokens
        self._length -= tokens


class BlockCache(DynamicCache):
    """A `DynamicCache` whose layers are [`BlockCacheLayer`]s."""

    def __init__(self, _config: PreTrainedConfig | None = None) -> None:
        # Not the constructor of DynamicCache, which chooses the class of its layers itself.
        Cache.__init__(self, layer_class_to_replicate=BlockCacheLayer)


class StaticSlots:
    """A `StaticCache` during a step that writes its tokens to given slots and reads every slot, masked by the caller.

    Nothing here depends on the number of cached tokens, so one compiled step serves all steps.

    Args:
        slots: `(length,)`, where the tokens of the step go.
    """

    def __init__(self, cache: StaticCache, slots: torch.Tensor) -> None:
        self.cache, self.slots = cache, slots

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write to the slots. Return keys and values of all slots, `(batch, heads, slots, head_dim)`."""
        layer: Any = self.cache.layers[layer_idx]
        layer.keys.index_copy_(2, self.slots, key_states)
        layer.values.index_copy_(2, self.slots, value_states)
        return layer.keys, layer.values


def append_to_cache(
    cache: Cache | StaticSlots,
    key_states: torch.Tensor,
    value_states: torch.Tensor,
    layer_idx: int,
    num_committed: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values `[cache ; given]` of one layer, and write the first `num_committed` given tokens to it.

    Any transformers cache works; only [`BlockCache`] avoids a copy of the cache per call.
    """
    if isinstance(cache, StaticSlots):
        return cache.update(key_states, value_states, layer_idx)
    layers: list[Any] = cache.layers  # transformers' type also names layers that hold no keys
    if isinstance(cache, BlockCache):
        while len(layers) <= layer_idx:
            layers.append(BlockCacheLayer())
        return layers[layer_idx].append(key_states, value_states, num_committed)
    if num_committed:
        cache.update(key_states[:, :, :num_committed], value_states[:, :, :num_committed], layer_idx)
    # A foreign cache cannot read without writing: tokens that are not kept are appended to a copy.
    held = int(layers[layer_idx].get_seq_length()) if layer_idx < len(layers) else 0
    if not held:
        return key_states, value_states
    # A cache of fixed size has unused room after its tokens.
    past = (layers[layer_idx].keys[:, :, :held], layers[layer_idx].values[:, :, :held])
    if num_committed == key_states.shape[2]:
        return past
    return (
        torch.cat([past[0], key_states[:, :, num_committed:]], dim=2),
        torch.cat([past[1], value_states[:, :, num_committed:]], dim=2),
    )


def static_cache(config: PreTrainedConfig) -> StaticCache:
    """Return a `StaticCache` for texts of any length: the model's window and the block being denoised."""
    size = config.model_length + config.block_size
    cache = StaticCache(config, max_cache_len=size)
    # Also for layers with a sliding window, which is never shorter than ours: the ring of slots moves by itself.
    cache.layers = [StaticLayer(max_cache_len=size) for _ in cache.layers]
    return cache


# Values of `cache_implementation`.
_MAKERS: dict[str | None, Callable[[PreTrainedConfig], Cache]] = {
    None: BlockCache,
    "dynamic": BlockCache,
    "static": static_cache,
}
_REFUSED = {
    "offloaded": "every denoising step reads the keys of all layers, which would cross the bus once per step",
    "offloaded_static": "every denoising step reads the keys of all layers, which would cross the bus once per step",
    "quantized": "every denoising step would dequantize the whole cache, and the rounding would change the text",
}


def cache_maker(name: str | None) -> Callable[[PreTrainedConfig], Cache]:
    """Return a function that makes the cache named by `cache_implementation` from a model's configuration.

    Raises:
        ValueError: if block diffusion cannot use this cache, or would be slower with it.
    """
    if name not in _MAKERS:
        reason = _REFUSED.get(name or "", "it cannot hold finished blocks")
        raise ValueError(
            f"cache_implementation={name!r} does not fit block diffusion: {reason}. Choose 'dynamic' (exact, bounded "
            f"by the window) or 'static', or pass use_cache=False, which needs no memory."
        )
    return _MAKERS[name]


def drop_oldest(cache: Cache, tokens: int) -> None:
    """Drop the oldest tokens of a cache that grows."""
    for layer in cache.layers:
        if isinstance(layer, BlockCacheLayer):
            layer.drop_first(tokens)
        elif isinstance(layer, DynamicLayer) and layer.keys is not None and layer.values is not None:
            layer.keys, layer.values = layer.keys[:, :, tokens:], layer.values[:, :, tokens:]


def clear(cache: Cache) -> None:
    """Empty a cache, so that it fits a batch of any size."""
    for layer in cache.layers:
        if isinstance(layer, BlockCacheLayer) or not isinstance(layer, DynamicLayer):
            layer.reset()
        else:
            # Not `reset`, which in some transformers versions keeps the tokens and zeroes them.
            layer.keys, layer.values, layer.is_initialized = None, None, False


def set_length(cache: StaticCache, tokens: int) -> None:
    """Set how many leading slots of a cache of fixed size hold finished tokens."""
    layer: Any
    for layer in cache.layers:
        layer.cumulative_length.fill_(tokens)  # in place: compiled code refers to it by its address


def check_cache(cache: Cache, buffer: "SequenceBuffer", config: Any) -> None:
    """Refuse a cache that this text cannot continue.

    Raises:
        ValueError: if the cache is of another kind, too small, of another batch, longer than the prompt, or has
            padding or part of a block.
    """
    # Only layers that keep every token: sliding and quantized ones are classes of their own.
    kinds = {DynamicCache: (DynamicLayer, BlockCacheLayer), StaticCache: (StaticLayer,)}
    kind = next((kind for kind in kinds if isinstance(cache, kind)), None)
    if kind is None or cache.offloading or any(type(layer) not in kinds[kind] for layer in cache.layers):
        raise ValueError(
            f"past_key_values is a {type(cache).__name__}{' with offloading' if cache.offloading else ''}, which "
            f"cannot hold finished blocks: pass the cache that an earlier call returned, a plain DynamicCache or a "
            f"StaticCache, or leave it out."
        )
    if isinstance(cache, StaticCache):
        _check_static_size(cache, buffer, config)
    held, shortest = int(cache.get_seq_length()), int(buffer.prompt_lengths.min())
    if not held:
        return
    layer: Any = cache.layers[0]
    rows = layer.keys.shape[0]
    if rows != buffer.token_ids.shape[0]:
        raise ValueError(
            f"past_key_values holds {rows} rows but the batch has {buffer.token_ids.shape[0]} (num_return_sequences "
            f"counts): repeat it with past_key_values.batch_repeat_interleave, or leave it out."
        )
    if buffer.key_valid is not None or held % buffer.block_size:
        raise ValueError(
            f"past_key_values holds {held} tokens: a cache can be continued only if it holds whole blocks and no row "
            f"of the batch is padded. Leave it out to start without one."
        )
    if held > shortest:
        raise ValueError(
            f"past_key_values holds {held} tokens but the prompt has {shortest}: pass the whole text so "
            f"far as input_ids, the cached part included."
        )


def _check_static_size(cache: StaticCache, buffer: "SequenceBuffer", config: Any) -> None:
    layers: list[Any] = cache.layers
    batch, columns = buffer.token_ids.shape
    largest = config.model_length + config.block_size
    needed = min(columns, largest)
    rows = layers[0].keys.shape[0] if layers[0].is_initialized else batch
    if (len(layers), rows) != (config.num_hidden_layers, batch) or layers[0].max_cache_len < needed:
        raise ValueError(
            f"past_key_values is a StaticCache of {len(layers)} layers for {rows} rows of {layers[0].max_cache_len} "
            f"tokens, but this text needs {config.num_hidden_layers} layers for {batch} rows of {needed}: make "
            f"one with StaticCache(model.config, max_cache_len={largest}), which serves texts of any length."
        )


__all__ = [
    "BlockCache",
    "BlockCacheLayer",
    "StaticSlots",
    "append_to_cache",
    "cache_maker",
    "check_cache",
    "clear",
    "drop_oldest",
    "set_length",
]
