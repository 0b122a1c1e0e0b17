"""The key-value cache of block-wise decoding: finished blocks are written once, denoising steps only read.

A denoising step attends to the cache and to its own block, whose keys are stale as soon as a token is revealed. A
`DynamicCache` would copy the whole cache for every such read. [`BlockCache`] has spare room after its last token,
where a step writes its keys without counting them, and reads everything as one view.
"""

import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticCache, StaticLayer
from transformers.configuration_utils import PreTrainedConfig


if TYPE_CHECKING:
    from .decoding_state_bd3lm import SequenceBuffer


class BlockCacheLayer(DynamicLayer):
    """One layer's keys and values `(batch, heads, tokens, head_dim)`, in buffers with room at both ends.

    Dropping the oldest tokens only moves the beginning. When the room at the end is used up and the tokens fit into
    the room at the front, they move there. This copies one token per token written and takes memory for two windows.
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
        # transformers' crop, reorder_cache and batch selection assign the keys first and then the values.
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
        # Tokens can only move into room that they do not occupy themselves; otherwise allocate larger buffers.
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
        """Return views of finished and given keys and values; the first `num_committed` given ones become finished."""
        # When transformers selects or repeats the rows of a cache, buffers without tokens keep their old rows.
        emptied = self.is_initialized and not self._length and len(self._buffers[0]) != len(key_states)
        if not self.is_initialized or emptied:
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
    """A `DynamicCache` whose layers are [`BlockCacheLayer`]s.

    Attributes:
        row_start: `(batch,)`, column at which each row begins; None if all begin at column 0.
    """

    def __init__(self, _config: PreTrainedConfig | None = None) -> None:
        # Not the constructor of DynamicCache, which chooses the class of its layers itself.
        Cache.__init__(self, layer_class_to_replicate=BlockCacheLayer)
        self.row_start: torch.Tensor | None = None


class StepCache:
    """A cache as layers see it in one forward pass, which reads all of it and adds the first `num_committed` tokens.

    Layers call only `update`, since masks and positions are passed to them. Any transformers cache works; only
    [`BlockCache`] avoids a copy of the cache per call.
    """

    def __init__(self, cache: Cache, num_committed: int = 0) -> None:
        self.cache: Any = cache
        self.num_committed = num_committed

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values `[cache ; given]` of one layer, and write the first `num_committed` given tokens."""
        count = self.num_committed
        layers: list[Any] = self.cache.layers  # transformers' type includes layers without keys
        if isinstance(self.cache, BlockCache):
            while len(layers) <= layer_idx:
                layers.append(BlockCacheLayer())
            return layers[layer_idx].append(key_states, value_states, count)
        if count:
            self.cache.update(key_states[:, :, :count], value_states[:, :, :count], layer_idx)
        # Another cache cannot read without writing, so tokens that are not committed are appended to a copy.
        held = int(layers[layer_idx].get_seq_length()) if layer_idx < len(layers) else 0
        if not held:
            return key_states, value_states
        # A cache of fixed size has unused room after its tokens.
        past = (layers[layer_idx].keys[:, :, :held], layers[layer_idx].values[:, :, :held])
        if count == key_states.shape[2]:
            return past
        return (
            torch.cat([past[0], key_states[:, :, count:]], dim=2),
            torch.cat([past[1], value_states[:, :, count:]], dim=2),
        )


class StaticSlots(StepCache):
    """A `StaticCache` during a step that writes its tokens to given slots and reads every slot, masked by the caller.

    No shape depends on the number of cached tokens, so all steps share one compiled step.

    Args:
        slots: `(length,)`, the slots of the step's tokens.
    """

    def __init__(self, cache: StaticCache, slots: torch.Tensor, num_committed: int = 0) -> None:
        super().__init__(cache, num_committed)
        self.slots = slots

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write to the slots. Return keys and values of all slots, `(batch, heads, slots, head_dim)`."""
        layer = self.cache.layers[layer_idx]
        layer.keys.index_copy_(2, self.slots, key_states)
        layer.values.index_copy_(2, self.slots, value_states)
        return layer.keys, layer.values


class OwnStaticCache(StaticCache):
    """A `StaticCache` made by `generate`, with room for the window and the noisy block, so for texts of any length.

    Its buffers come from [`StaticBuffers`] and return there, unless a caller gets the cache.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        self.size = config.model_length + config.block_size
        super().__init__(config, max_cache_len=self.size)
        self.drop()

    def drop(self) -> None:
        """Release the buffers."""
        # Plain layers even for a sliding window, which is never shorter than ours: the ring of slots slides by itself.
        self.layers = [StaticLayer(max_cache_len=self.size) for _ in self.layers]


class StaticBuffers:
    """A pool of keys and values of fixed size, which one call of `generate` leaves to the next.

    Compiled code and CUDA graphs refer to them by address: with new ones, every call would record its graphs again.

    Args:
        most_bytes: limit on all free buffers; the most recently used set is kept whatever its size.
    """

    def __init__(self, most_bytes: int = 2**31) -> None:
        self.most_bytes = most_bytes
        self._free: list[list[Any]] = []  # the layers of each set, the most recently used set last
        self._lock = threading.Lock()  # two threads can generate at the same time, each in its own buffers

    def take(self, cache: OwnStaticCache, like: torch.Tensor) -> None:
        """Give zeroed buffers to a new cache; `like` has the shape of keys, `(batch, heads, 0, head_dim)`."""
        shape = (like.shape[0], like.shape[1], cache.size, like.shape[3])
        with self._lock:
            for index, (first, *_) in enumerate(self._free):
                keys = first.keys
                known = (keys.shape, keys.dtype, keys.device, keys.is_inference())
                # Inference tensors can only be written to in inference mode.
                if known == (shape, like.dtype, like.device, torch.is_inference_mode_enabled()):
                    cache.layers = self._free.pop(index)
                    break
        layer: Any
        for layer in cache.layers:
            if layer.is_initialized:
                layer.reset()
            else:
                layer.lazy_initialization(like, like)

    def give_back(self, cache: OwnStaticCache) -> None:
        """Take back the buffers of a cache that no caller got, and drop the oldest ones beyond the limit."""
        layers: list[Any] = cache.layers
        cache.drop()
        with self._lock:
            self._free.append(layers)
            while len(self._free) > 1 and self.num_bytes > self.most_bytes:
                self._free.pop(0)

    @property
    def num_bytes(self) -> int:
        """Bytes of the free buffers."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layers in self._free for layer in layers)


# Per model, and freed with it. Training releases them too, since it needs the memory.
_BUFFERS: weakref.WeakKeyDictionary[nn.Module, StaticBuffers] = weakref.WeakKeyDictionary()


def static_buffers(model: nn.Module) -> StaticBuffers:
    """Return the free buffers of a model."""
    return _BUFFERS.setdefault(model, StaticBuffers())


def release_buffers(model: nn.Module) -> None:
    """Free the buffers that are kept for the next call of `generate`."""
    _BUFFERS.pop(model, None)


# Values of `cache_implementation`. Every step would move an offloaded cache over the bus, or dequantize one.
_MAKERS: dict[str | None, Callable[[PreTrainedConfig], Cache]] = {
    None: BlockCache,
    "dynamic": BlockCache,
    "static": OwnStaticCache,
}


def cache_maker(name: str | None) -> Callable[[PreTrainedConfig], Cache]:
    """Return a function that makes the cache named by `cache_implementation` from a model's configuration.

    Raises:
        ValueError: if block diffusion cannot use this cache, or would be slower with it.
    """
    if name not in _MAKERS:
        raise ValueError(
            f"cache_implementation={name!r} does not fit block diffusion, where every denoising step reads all keys: "
            f"choose 'dynamic' (exact, bounded by the window) or 'static', or pass use_cache=False, which needs no "
            f"memory."
        )
    return _MAKERS[name]


def open_cache(
    cache: Cache | None,
    use_cache: bool | None,
    length: int,
    attention_mask: torch.Tensor | None,
    block_size: int,
    *,
    training: bool,
) -> tuple[StepCache | None, int]:
    """Return the cache of a forward pass, which keeps all of its tokens or none, and the number it holds."""
    write = cache is not None if use_cache is None else use_cache
    if cache is None:
        if not write or training:
            return None, 0
        cache = BlockCache()
    past = int(cache.get_seq_length())
    if write:
        _check_whole_blocks(past + length, attention_mask, block_size)
    return StepCache(cache, length if write else 0), past


def _check_whole_blocks(width: int, attention_mask: torch.Tensor | None, block_size: int) -> None:
    """Refuse to store an unfinished block, whose keys have not seen the rest of it."""
    tokens = [width]
    if attention_mask is not None:
        if torch.compiler.is_compiling() or attention_mask.device.type != "cpu":
            return
        tokens = attention_mask.sum(1).tolist()
    if any(count % block_size for count in tokens):
        raise ValueError(
            f"use_cache=True would store {tokens} tokens in all, which is not a whole number of blocks of "
            f"{block_size}: a block is stored when it is finished, so pass whole blocks, or use_cache=False to only "
            f"read the cache."
        )


def drop_oldest(cache: Cache, tokens: int) -> None:
    """Drop the oldest tokens of a cache that grows. One of fixed size is a ring, which overwrites them."""
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


def note_tokens(cache: Cache, token_ids: torch.Tensor | None, past: int) -> None:
    """Remember the tokens `(batch, length)` that were written after `past` cached ones; None if they are not known."""
    known: torch.Tensor | None = getattr(cache, "token_ids", None)
    if past and known is not None and token_ids is not None:
        fits = known.shape[0] == len(token_ids) and known.shape[1] >= past
        token_ids = torch.cat([known[:, :past], token_ids], dim=1) if fits else None
    elif past:
        token_ids = None
    vars(cache)["token_ids"] = token_ids


def check_rows(cache: Cache, rows: int, config: Any) -> None:
    """Refuse a cache of another model or with another number of rows."""
    layers: list[Any] = cache.layers
    if len(layers) != config.num_hidden_layers:
        raise ValueError(
            f"past_key_values holds {len(layers)} layers but the model has {config.num_hidden_layers}: it belongs to "
            f"another model. Leave it out."
        )
    if layers[0].keys.shape[0] != rows:
        raise ValueError(
            f"past_key_values holds {layers[0].keys.shape[0]} rows but the batch has {rows} (num_return_sequences "
            f"counts): repeat it with past_key_values.batch_repeat_interleave, or leave it out."
        )


def check_continued(cache: Cache, token_ids: torch.Tensor, length: int, config: Any, *, num_uncached: int) -> None:
    """Refuse a cache of another model, batch or text, or with too many tokens.

    Args:
        token_ids: `(batch, columns)`, the text, which begins with the cached tokens if these are known.
        length: tokens of the shortest prompt.
        num_uncached: how many of them must not be in the cache.
    """
    check_rows(cache, len(token_ids), config)
    known, held = getattr(cache, "token_ids", None), int(cache.get_seq_length())
    if held > length - num_uncached:
        raise ValueError(
            f"past_key_values holds {held} tokens but the prompt has {length}: pass the whole text so far as "
            f"input_ids, the cached part included{' and at least one more token' * num_uncached}."
        )
    if known is None or known.shape[1] < held:
        return
    # In any order: the rows of the cache may since have been selected, repeated or sorted.
    texts = {tuple(row) for row in known[:, :held].tolist()}
    for number, row in enumerate(token_ids[:, :held].tolist()):
        if tuple(row) not in texts:
            raise ValueError(
                f"past_key_values holds {held} tokens of another text than row {number}: pass the whole "
                f"text so far as input_ids, or leave the cache out."
            )


def last_clean(cache: StepCache) -> torch.Tensor:
    """Return the hidden state of the last cached token, `(batch, 1, hidden_size)`.

    Raises:
        ValueError: if the cache has none, as when another model wrote it.
    """
    kept = getattr(cache.cache, "clean_hidden", None)
    if kept is None:
        raise ValueError(
            "past_key_values holds no hidden state of its last token, from which alignment='shifted' predicts the "
            "next one: pass a cache that this model wrote, or leave it out."
        )
    return kept[:, -1:]


def check_cache(cache: Cache, buffer: "SequenceBuffer", config: Any) -> None:
    """Refuse a cache that this text cannot continue.

    It may be of an unsupported kind, too small, of another batch, model or text, longer than the prompt, or have other
    padding or part of a block.
    """
    # Only layers that keep every token; sliding and quantized ones are subclasses.
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
    held, shortest = int(cache.get_seq_length()), int(buffer.prompt_end.min())
    if not held:
        return
    check_continued(cache, buffer.token_ids, shortest, config, num_uncached=0)
    starts = getattr(cache, "row_start", None)
    aligned = (
        buffer.key_valid is None
        if starts is None
        else torch.equal(starts.to(buffer.row_start.device), buffer.row_start)
    )
    if not aligned or held % buffer.block_size:
        raise ValueError(
            f"past_key_values holds {held} tokens: a cache can be continued only if it holds whole blocks and the "
            f"rows of the batch are padded as they were in it. Leave it out to start without one."
        )
    # Without a finished block left to read, the next one is predicted from the state of the last cached token.
    if getattr(config, "alignment", "same") != "same" and shortest - held < buffer.block_size:
        last_clean(StepCache(cache))


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
