"""The key-value cache of block-wise decoding: finished blocks are written once, denoising steps only read.

A denoising step attends to the cache and to its own block, whose keys are stale as soon as a token is revealed. A
`DynamicCache` would copy the whole cache for every such read. [`BlockCache`] keeps room behind its last token, where a
step puts its keys without counting them, and reads everything as one view.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticCache, StaticLayer
from transformers.configuration_utils import PreTrainedConfig


if TYPE_CHECKING:
    from .decoding_state_bd3lm import SequenceBuffer


class BlockCacheLayer(DynamicLayer):
    """One layer's keys and values `(batch, heads, tokens, head_dim)` in buffers with room behind and, later, before.

    The oldest tokens are forgotten by moving the beginning. Only when the room behind is used up, and there is as much
    before, the others are moved to the front: a copied token per token written, and memory for two windows.
    """

    _spare = 256  # tokens of room added when the buffers are full, on top of doubling them

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self._begin = self._length = 0
        self._buffers = (key_states[:, :, :0], value_states[:, :, :0])
        self.is_initialized = True

    @property
    def keys(self) -> torch.Tensor | None:
        """The finished tokens' keys, a view."""
        return self._view(0) if self.is_initialized else None

    @keys.setter
    def keys(self, states: torch.Tensor | None) -> None:
        # transformers' crop, reorder_cache and batch selection assign keys and values one after the other.
        if states is not None:
            self._begin, self._buffers = 0, (states, self._view(1))

    @property
    def values(self) -> torch.Tensor | None:
        """The finished tokens' values, a view."""
        return self._view(1) if self.is_initialized else None

    @values.setter
    def values(self, states: torch.Tensor | None) -> None:
        if states is not None:
            self._buffers, self._length = (self._buffers[0], states), states.shape[2]

    def _view(self, place: int) -> torch.Tensor:
        return self._buffers[place][:, :, self._begin : self._begin + self._length]

    def reserve(self, tokens: int, like: torch.Tensor) -> None:
        """Make room for `tokens` tokens behind the finished ones."""
        needed = self._length + tokens
        capacity = min(buffer.shape[2] for buffer in self._buffers)
        if self._begin + needed <= capacity:
            return
        buffers = self._buffers
        if self._begin < self._length or needed > capacity:
            batch, heads, _, dim = like.shape
            shape = (batch, heads, max(2 * self._length, needed) + self._spare, dim)
            fresh = [torch.empty(shape, dtype=buffer.dtype, device=buffer.device) for buffer in self._buffers]
            buffers = (fresh[0], fresh[1])
        for place, buffer in enumerate(buffers):
            buffer[:, :, : self._length] = self._view(place)
        self._begin, self._buffers = 0, buffers

    def append(
        self, key_states: torch.Tensor, value_states: torch.Tensor, commit: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of the finished tokens followed by the given ones, of which the first `commit` become finished."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.reserve(key_states.shape[2], key_states)
        begin, end = self._begin, self._begin + self._length
        stop = end + key_states.shape[2]
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, end:stop] = states
        self._length += commit
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
        """Forget the oldest `tokens` tokens; nothing is moved."""
        self._begin += tokens
        self._length -= tokens


class BlockCache(DynamicCache):
    """A `DynamicCache` whose layers are [`BlockCacheLayer`]s."""

    def __init__(self, config: PreTrainedConfig | None = None) -> None:
        super().__init__()
        self.layer_class_to_replicate = BlockCacheLayer


class StaticSlots:
    """A `StaticCache` in a step that writes all its tokens to given slots and sees every slot; its mask tells which.

    Nothing here depends on how much the cache holds, so that a compiled step serves all steps.

    Args:
        slots: `(length,)`, where the tokens of the step go.
    """

    def __init__(self, cache: StaticCache, slots: torch.Tensor) -> None:
        self.cache, self.slots = cache, slots

    def append(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all slots `(batch, heads, slots, head_dim)`, the given ones among them."""
        layer: Any = self.cache.layers[layer_idx]
        layer.keys.index_copy_(2, self.slots, key_states)
        layer.values.index_copy_(2, self.slots, value_states)
        return layer.keys, layer.values


def append_to_cache(
    cache: Cache | StaticSlots, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, commit: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values `[cache ; given]` of one layer; the first `commit` given tokens are written to the cache.

    Any transformers cache works; only [`BlockCache`] spares a copy of the cache per call.
    """
    if isinstance(cache, StaticSlots):
        return cache.append(key_states, value_states, layer_idx)
    layers: list[Any] = cache.layers  # transformers' type also names layers that hold no keys
    if isinstance(cache, BlockCache):
        while len(layers) <= layer_idx:
            layers.append(BlockCacheLayer())
        return layers[layer_idx].append(key_states, value_states, commit)
    if commit:
        cache.update(key_states[:, :, :commit], value_states[:, :, :commit], layer_idx)
    held = int(layers[layer_idx].get_seq_length()) if layer_idx < len(layers) else 0
    if not held:
        return key_states, value_states
    # A cache of fixed size has room behind its tokens.
    past = (layers[layer_idx].keys[:, :, :held], layers[layer_idx].values[:, :, :held])
    if commit == key_states.shape[2]:
        return past
    return (
        torch.cat([past[0], key_states[:, :, commit:]], dim=2),
        torch.cat([past[1], value_states[:, :, commit:]], dim=2),
    )


def static_cache(config: PreTrainedConfig) -> StaticCache:
    """A `StaticCache` for texts of any length: the model's window, and a block that is being written."""
    return StaticCache(config, max_cache_len=config.model_length + config.block_size)


# Values of `cache_implementation`.
_MAKERS: dict[str | None, Callable[[PreTrainedConfig], Cache]] = {
    None: BlockCache,
    "dynamic": BlockCache,
    "static": static_cache,
}
_REFUSED = {
    "offloaded": "every denoising step reads the keys of all layers, which would cross the bus once per step",
    "offloaded_static": "every denoising step reads the keys of all layers, which would cross the bus once per step",
    "quantized": "every denoising step would dequantize the whole cache, and text would no longer be the model's own",
}


def cache_maker(name: str | None) -> Callable[[PreTrainedConfig], Cache]:
    """What makes the cache that `cache_implementation` names, from a model's configuration.

    Raises:
        ValueError: a cache that block diffusion can not use, or not at a profit.
    """
    if name not in _MAKERS:
        reason = _REFUSED.get(name or "", "it holds no finished blocks of a text")
        raise ValueError(
            f"cache_implementation={name!r} does not fit block diffusion: {reason}. Leave it out for the exact cache "
            f"of finished blocks, whose size the window bounds, or choose 'static'; use_cache=False needs no memory."
        )
    return _MAKERS[name]


def drop_oldest(cache: Cache, tokens: int) -> None:
    """Forget the oldest tokens of a cache that grows."""
    for layer in cache.layers:
        if isinstance(layer, BlockCacheLayer):
            layer.drop_first(tokens)
        elif isinstance(layer, DynamicLayer) and layer.keys is not None and layer.values is not None:
            layer.keys, layer.values = layer.keys[:, :, tokens:], layer.values[:, :, tokens:]


def clear(cache: Cache) -> None:
    """Empty a cache, for batches of any size."""
    for layer in cache.layers:
        if isinstance(layer, BlockCacheLayer) or not isinstance(layer, DynamicLayer):
            layer.reset()
        else:
            # Not `reset`, which in some transformers versions keeps the tokens and zeroes them.
            layer.keys, layer.values, layer.is_initialized = None, None, False


def set_length(cache: StaticCache, tokens: int) -> None:
    """Tell a cache of fixed size how many of its leading slots hold finished tokens."""
    layer: Any
    for layer in cache.layers:
        layer.cumulative_length.fill_(tokens)  # in place: compiled code knows it by its address


def check_cache(cache: Cache, canvas: "SequenceBuffer", config: Any) -> None:
    """Refuse a cache that a canvas can not continue.

    Raises:
        ValueError: a cache of another kind or too small, of another batch, with padding or part of a block, or longer
            than the prompt.
    """
    kinds = {DynamicCache: (DynamicLayer, BlockCacheLayer), StaticCache: (StaticLayer,)}
    kind = next((kind for kind in kinds if isinstance(cache, kind)), None)
    if kind is None or cache.offloading or any(type(layer) not in kinds[kind] for layer in cache.layers):
        raise ValueError(
            f"past_key_values is a {type(cache).__name__}{' with offloading' if cache.offloading else ''}, which can "
            f"not keep finished blocks: pass the cache that an earlier call returned, a plain DynamicCache or a "
            f"StaticCache, or leave it out."
        )
    if isinstance(cache, StaticCache):
        _check_slots(cache, canvas, config)
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


def _check_slots(cache: StaticCache, canvas: "SequenceBuffer", config: Any) -> None:
    layers: list[Any] = cache.layers
    most = config.model_length + config.block_size
    needed = min(canvas.text.shape[1], most)
    made = (len(layers), layers[0].keys.shape[0] if layers[0].is_initialized else canvas.text.shape[0])
    if made != (config.n_blocks, canvas.text.shape[0]) or layers[0].max_cache_len < needed:
        raise ValueError(
            f"past_key_values is a StaticCache of {made[0]} layers for {made[1]} rows of {layers[0].max_cache_len} "
            f"tokens, and this text needs {config.n_blocks} layers for {canvas.text.shape[0]} rows of {needed}: make "
            f"it anew with StaticCache(model.config, max_cache_len={most}), the window and a block, which serves "
            f"texts of any length."
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
