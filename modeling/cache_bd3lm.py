"""The key-value cache of block-wise decoding: finished blocks are written once, denoising steps only read.

A denoising step attends to the cache and to its own block, whose keys are stale as soon as a token is revealed. A
`DynamicCache` would copy the whole cache for every such read. [`BlockCache`] keeps room behind its last token, where a
step puts its keys without counting them, and reads everything as one view.
"""

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.configuration_utils import PreTrainedConfig


class BlockCacheLayer(DynamicLayer):
    """One layer's keys and values `(batch, heads, tokens, head_dim)` in a buffer with room to grow."""

    _spare = 256  # tokens of room added when the buffer is full, on top of doubling it

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self._length = 0
        self._buffers = (key_states[:, :, :0], value_states[:, :, :0])
        self.is_initialized = True

    @property
    def keys(self) -> torch.Tensor | None:
        """The finished tokens' keys, a view."""
        return self._buffers[0][:, :, : self._length] if self.is_initialized else None

    @keys.setter
    def keys(self, states: torch.Tensor | None) -> None:
        self._replace(0, states)

    @property
    def values(self) -> torch.Tensor | None:
        """The finished tokens' values, a view."""
        return self._buffers[1][:, :, : self._length] if self.is_initialized else None

    @values.setter
    def values(self, states: torch.Tensor | None) -> None:
        self._replace(1, states)

    def _replace(self, place: int, states: torch.Tensor | None) -> None:
        # transformers' crop, reorder_cache and batch selection assign keys and values one after the other.
        if states is None:
            return
        buffers = list(self._buffers)
        buffers[place] = states
        self._buffers = (buffers[0], buffers[1])
        if place == 1:
            self._length = states.shape[2]

    def reserve(self, tokens: int, like: torch.Tensor) -> None:
        """Make room for `tokens` tokens behind the finished ones."""
        needed = self._length + tokens
        if all(buffer.shape[2] >= needed for buffer in self._buffers):
            return
        capacity = max(2 * self._length, needed) + self._spare
        batch, heads, _, dim = like.shape
        grown = []
        for buffer in self._buffers:
            fresh = torch.empty((batch, heads, capacity, dim), dtype=buffer.dtype, device=buffer.device)
            fresh[:, :, : self._length] = buffer[:, :, : self._length]
            grown.append(fresh)
        self._buffers = (grown[0], grown[1])

    def append(
        self, key_states: torch.Tensor, value_states: torch.Tensor, commit: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of the finished tokens followed by the given ones, of which the first `commit` become finished."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.reserve(key_states.shape[2], key_states)
        stop = self._length + key_states.shape[2]
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, self._length : stop] = states
        self._length += commit
        return self._buffers[0][:, :, :stop], self._buffers[1][:, :, :stop]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.append(key_states, value_states, key_states.shape[2])

    def get_seq_length(self) -> int:
        return self._length if self.is_initialized else 0

    def reset(self) -> None:
        self.is_initialized = False

    def drop_first(self, tokens: int) -> None:
        """Forget the oldest `tokens` tokens, in place."""
        kept = self._length - tokens
        for buffer in self._buffers:
            buffer[:, :, :kept] = buffer[:, :, tokens : self._length].clone()
        self._length = kept


class BlockCache(DynamicCache):
    """A `DynamicCache` whose layers are [`BlockCacheLayer`]s."""

    def __init__(self, config: PreTrainedConfig | None = None) -> None:
        super().__init__()
        self.layer_class_to_replicate = BlockCacheLayer


def append_to_cache(
    cache: Cache, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, commit: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values `[cache ; given]` of one layer; the first `commit` given tokens are written to the cache.

    Any transformers cache works; only [`BlockCache`] spares a copy of the cache per call.
    """
    layers: list[Any] = cache.layers  # transformers' type also names layers that hold no keys
    if isinstance(cache, BlockCache):
        while len(layers) <= layer_idx:
            layers.append(BlockCacheLayer())
        return layers[layer_idx].append(key_states, value_states, commit)
    if commit:
        past = cache.update(key_states[:, :, :commit], value_states[:, :, :commit], layer_idx)
    elif layer_idx < len(layers) and layers[layer_idx].get_seq_length():
        past = (layers[layer_idx].keys, layers[layer_idx].values)
    else:
        return key_states, value_states
    if commit == key_states.shape[2]:
        return past
    return (
        torch.cat([past[0], key_states[:, :, commit:]], dim=2),
        torch.cat([past[1], value_states[:, :, commit:]], dim=2),
    )


__all__ = ["BlockCache", "BlockCacheLayer", "append_to_cache"]
