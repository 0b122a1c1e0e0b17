"""Attention of block diffusion: block-causal and two-stream masks, computed fast (arXiv 2503.09573, Sec. 3.1).

The clean stream x_0 is block-causal: a token sees its own and earlier blocks. The noisy stream x_t sees the clean
tokens of earlier blocks and the noisy tokens of its own block. A forward pass concatenates the streams as
`[x_0 ; x_t]`, several noise samples one after the other, after whatever a cache already holds.

Attention is computed in tiles: a range of queries against the few ranges of keys that any of them can see. The eager
implementation uses one tile, as a reference for the others; sdpa skips keys that no query of a tile sees; flex
attention uses one tile with a sparse block mask.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .cache_bd3lm import StepCache
from .configuration_bd3lm import BD3LMConfig
from .inputs_bd3lm import Layout, token_layout


_TILE = 256  # queries per tile, rounded up to whole blocks; measured on CPU: 128 spends more on copies and slices


def in_memory(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor that compiled code writes to memory instead of recomputing it in each kernel that reads it.

    A view with explicit strides forces that. Otherwise a mask of flex attention could not read it (torch 2.11).
    """
    tensor = tensor.contiguous()
    return tensor.as_strided(tensor.shape, tensor.stride()) if torch.compiler.is_compiling() else tensor


class Tile(NamedTuple):
    """Queries that share a set of keys."""

    queries: tuple[int, int]
    keys: tuple[tuple[int, int], ...]  # ranges of the keys [cache ; this forward pass]
    mask: "torch.Tensor | BlockMask | None"  # additive (batch or 1, 1, queries, keys); None: every key is seen


class AttentionPlan(NamedTuple):
    """The attention of one forward pass."""

    tiles: tuple[Tile, ...]  # for queries at all positions
    last_tiles: tuple[Tile, ...]  # for the last layer, where the first `skip` positions need no output
    skip: int


def block_causal_plan(layout: Layout, length: int, config: Any, dtype: torch.dtype) -> AttentionPlan:
    """Plan the attention of the last `length` tokens of `layout`, each to its own and all earlier blocks.

    The tokens before them are in the cache.
    """
    block_size, implementation = config.block_size, config._attn_implementation
    total = layout.block_ids.shape[1]
    past = total - length
    if not torch.compiler.is_exporting() and layout.is_aligned() and past % block_size == 0 and length <= block_size:
        return _plan((Tile((0, length), ((0, total),), None),))
    if implementation == "flex_attention":
        return _plan((_whole_tile(layout, block_size, implementation, dtype, 1, past),))
    tiles = []
    for start, stop in _ranges(length, implementation, block_size):
        keys = ((0, min(total, past + stop + _padding_slack(layout, block_size, past))),)
        tiles.append(
            Tile((start, stop), keys, _dense_mask(layout, block_size, 1, (past + start, past + stop), keys, dtype))
        )
    return _plan(tuple(tiles))


def two_stream_plan(
    layout: Layout, config: Any, dtype: torch.dtype, *, num_noise_samples: int = 1, clean_cached: bool = False
) -> AttentionPlan:
    """Plan the attention of `[x_0 ; x_t]`, or of `x_t` alone when the cache holds x_0.

    All `num_noise_samples` noisy streams share one x_0. This is the published mask [[M_BD, M_OBC], [0, M_BC]]: noisy
    queries see the clean keys of earlier blocks and the noisy keys of their own block and noise sample; clean queries
    see the clean keys of their own and earlier blocks.
    """
    block_size, implementation = config.block_size, config._attn_implementation
    length = layout.block_ids.shape[1]
    # Eager attention returns whole weight matrices; after a cache, one for all noise samples would be too large.
    if implementation == "flex_attention" or (implementation == "eager" and not clean_cached):
        whole = functools.partial(_whole_tile, layout, block_size, implementation, dtype, 1 + num_noise_samples)
        last = (whole(length),)
        return _plan(last) if clean_cached else AttentionPlan((whole(0),), last, length)
    padding_slack = _padding_slack(layout, block_size, 0)
    noisy: list[Tile] = []
    for sample in range(num_noise_samples):
        for start, stop in _ranges(length, implementation, block_size):
            # Clean keys up to the block before the tile's last one; noisy keys of the tile's own blocks.
            num_visible_keys = (
                min(length, stop + padding_slack) if padding_slack else stop - block_size + (-stop) % block_size
            )
            own = (max(0, start - padding_slack), min(length, stop + padding_slack))
            if sample == 0 and own[0] == 0 and length - num_visible_keys <= block_size:
                num_visible_keys = length  # adjacent ranges are one view of the keys, others a copy
            offset = (1 + sample) * length
            keys = _joined((0, num_visible_keys), (offset + own[0], offset + own[1]))
            queries = (offset + start, offset + stop)
            mask = _dense_mask(layout, block_size, 1 + num_noise_samples, queries, keys, dtype)
            noisy.append(Tile((sample * length + start, sample * length + stop), keys, mask))
    if clean_cached:
        return _plan(tuple(noisy))
    clean = block_causal_plan(layout, length, config, dtype).tiles
    shifted = tuple(Tile((t.queries[0] + length, t.queries[1] + length), t.keys, t.mask) for t in noisy)
    return AttentionPlan(clean + shifted, tuple(noisy), length)


def decoding_plan(
    past: int,
    finished: int,
    block: int,
    key_valid: torch.Tensor | None,
    dtype: torch.dtype,
    *,
    num_out_of_window: int = 0,
) -> AttentionPlan:
    """Plan the attention of a denoising step `[finished block ; noisy block]` after a cache of `past` tokens.

    The noisy block sees everything; the finished one, whose keys are being written, sees everything but the noisy one.

    Args:
        finished: tokens of the finished block, 0 when it is already in the cache.
        key_valid: bool `(batch, past + finished + block)`, False where a row has no token; None: all rows are full.
        num_out_of_window: oldest tokens of the cache that have left the noisy block's window.
    """
    mask = None if key_valid is None else _additive(key_valid[:, None, None, :], dtype)
    tiles, total = [], past + finished + block
    if finished:
        clean_mask = None
        if key_valid is not None:
            # A row may be all padding here, which then sees itself: no softmax may run over an empty set.
            own = torch.arange(finished, device=key_valid.device)[:, None] + past
            itself = own == torch.arange(past + finished, device=key_valid.device)
            clean_mask = _additive(key_valid[:, None, None, : past + finished] | itself, dtype)
        tiles.append(Tile((0, finished), ((0, past + finished),), clean_mask))
    noisy = Tile(
        (finished, finished + block),
        ((num_out_of_window, total),),
        None if mask is None else mask[..., num_out_of_window:],
    )
    return AttentionPlan((*tiles, noisy), (Tile((0, block), noisy.keys, noisy.mask),), finished)


def slots_plan(mask: torch.Tensor, finished: int) -> AttentionPlan:
    """Plan the attention of a denoising step `[finished block ; noisy block]` to the slots of a cache of fixed size.

    Args:
        mask: additive, `(batch or 1, 1, finished + block, slots)`.
        finished: tokens of the finished block, 0 when it is already in the cache.
    """
    queries, slots = mask.shape[2:]
    last = Tile((0, queries - finished), ((0, slots),), mask[:, :, finished:])
    return AttentionPlan((Tile((0, queries), ((0, slots),), mask),), (last,), finished)


class BD3LMAttention(nn.Module):
    """Parameter-free multi-head attention over the tiles of a plan."""

    is_causal = False  # every mask is explicit; sdpa must never add a causal one of its own

    def __init__(self, config: BD3LMConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.scaling = config.head_dim**-0.5

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        tiles: tuple[Tile, ...],
        cache: StepCache | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend to the keys of each tile.

        Args:
            query: `(batch, heads, queries, head_dim)`.
            key, value: `(batch, heads, length, head_dim)`, of this forward pass.
            cache: has the keys that precede these.

        Returns:
            `(batch, queries, heads * head_dim)`, and the weights if the implementation returns them.
        """
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        weights = None
        if not tiles:  # only keys and values of these positions are needed
            return query.transpose(1, 2).flatten(2), weights
        if self.config._attn_implementation == "flex_attention":
            attend = flex_attention_forward
        outputs = []
        for tile in tiles:
            out, weights = attend(
                self,
                _select(query, (tile.queries,)),
                _select(key, tile.keys),
                _select(value, tile.keys),
                tile.mask,
                scaling=self.scaling,
                dropout=0.0,
            )
            outputs.append(out)
        out = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
        return out.flatten(2), weights


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute softmax(Q K^T * scaling + mask) V, with the softmax in float32."""
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def flex_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | BlockMask | None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run transformers' flex attention if the mask is sparse, in tiles that suit these masks.

    A denoising step has no mask or a dense one, which sdpa accepts without compiling anything. On a CPU the sparse
    kernel runs uncompiled: compiling it takes a minute, and the result crashed (torch 2.13).
    """
    if not isinstance(attention_mask, BlockMask):
        attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
    elif query.device.type == "cpu":
        attend = flex_attention_on_cpu
    else:
        attend = ALL_ATTENTION_FUNCTIONS["flex_attention"]
        options["kernel_options"] = flex_tiles(query, value)
    return attend(module, query, key, value, attention_mask, **options)


def flex_tiles(query: torch.Tensor, value: torch.Tensor) -> dict[str, int] | None:
    """Return the tile sizes of flex attention, both inputs `(batch, heads, length, head_dim)`; None: torch's own.

    Measured on an H200 with torch 2.11 for heads of 64 in bfloat16: forward and backward pass took 1.16 ms in torch's
    tiles of 128 x 128 scores, and take 0.98 in these.
    """
    # Fewer than 128 queries have a kernel of their own. Autocast may leave only the values in the precision it uses.
    suits = value.shape[-1] == 64 and value.element_size() == 2 and query.shape[2] >= 128
    if not suits or not _is_hopper(query.device.index):
        return None
    forward = {"fwd_BLOCK_M": 128, "fwd_BLOCK_N": 64, "fwd_num_warps": 4, "fwd_num_stages": 3}
    backward = {"bwd_BLOCK_M1": 32, "bwd_BLOCK_N1": 64, "bwd_BLOCK_M2": 64, "bwd_BLOCK_N2": 32}
    return forward | backward | {"bwd_num_warps": 4, "bwd_num_stages": 3}


@torch.compiler.assume_constant_result  # tracing cannot follow it
def _is_hopper(device_index: int | None) -> bool:
    return torch.cuda.get_device_capability(device_index) == (9, 0)


def flex_attention_on_cpu(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: BlockMask,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Run flex attention uncompiled: on a CPU it is only a reference, and masks per batch row fail to compile."""
    if query.requires_grad:
        raise ValueError(
            "attn_implementation='flex_attention' has no backward pass on a CPU: use "
            "model.set_attn_implementation('sdpa')."
        )
    grouped = query.shape[1] != key.shape[1]
    out = flex_attention(query, key, value, block_mask=attention_mask, scale=scaling, enable_gqa=grouped)
    return out.transpose(1, 2).contiguous(), None


def _plan(tiles: tuple[Tile, ...]) -> AttentionPlan:
    return AttentionPlan(tiles, tiles, 0)


def _ranges(length: int, implementation: str, block_size: int) -> list[tuple[int, int]]:
    # An exported program may have to serve every length, so it has a single tile.
    if implementation == "eager" or torch.compiler.is_exporting():
        return [(0, length)]
    step = -(-_TILE // block_size) * block_size
    return [(start, min(start + step, length)) for start in range(0, length, step)]


def _padding_slack(layout: Layout, block_size: int, past: int) -> int:
    # Left padding shifts a row's blocks against the tile borders, by at most block_size - 1.
    return 0 if layout.is_aligned() and past % block_size == 0 else block_size - 1


def _additive(allowed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, -torch.inf)


def _joined(first: tuple[int, int], second: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    if first[1] == second[0]:
        return ((first[0], second[1]),)
    return tuple(r for r in (first, second) if r[1] > r[0])


def _select(states: torch.Tensor, ranges: tuple[tuple[int, int], ...]) -> torch.Tensor:
    if ranges == ((0, states.shape[2]),):
        return states
    if len(ranges) == 1:
        return states[:, :, ranges[0][0] : ranges[0][1]]
    return torch.cat([states[:, :, start:stop] for start, stop in ranges], dim=2)


def _whole_tile(
    layout: Layout, block_size: int, implementation: str, dtype: torch.dtype, num_streams: int, first_query: int
) -> Tile:
    """Return one tile of the queries from `first_query` on and all keys of `num_streams` streams."""
    keys, sparse = num_streams * layout.block_ids.shape[1], implementation == "flex_attention"
    mask = stream_mask(layout, block_size, dtype, num_streams=num_streams, first_query=first_query, sparse=sparse)
    return Tile((0, keys - first_query), ((0, keys),), mask)


def stream_mask(layout: Layout, block_size: int, dtype: torch.dtype, **options: Any) -> torch.Tensor | BlockMask:
    """Return one mask, see [`_make_stream_mask`]. Masks of unpadded rows are cached between steps."""
    if layout.is_aligned() and not torch.compiler.is_compiling():  # tracing ignores lru_cache, with a warning
        return _aligned_stream_mask(layout.block_ids.shape[1], block_size, dtype, layout.block_ids.device, **options)
    return _make_stream_mask(layout, block_size, dtype, **options)


@functools.lru_cache(maxsize=4)  # a dense one of two streams of 4,096 tokens takes 134 MB
def _aligned_stream_mask(
    length: int, block_size: int, dtype: torch.dtype, device: torch.device, **options: Any
) -> Any:
    # Cached masks are used in training too, where inference tensors cannot be.
    with torch.inference_mode(False):
        return _make_stream_mask(token_layout(None, length, block_size, device=device), block_size, dtype, **options)


def _make_stream_mask(
    layout: Layout,
    block_size: int,
    dtype: torch.dtype,
    *,
    num_streams: int = 1,
    first_query: int = 0,
    causal_columns: int = 0,
    sparse: bool = False,
) -> torch.Tensor | BlockMask:
    """Return one mask for all queries from `first_query` on.

    Args:
        num_streams: number of streams, x_0 included.
        causal_columns: as in [`stream_visibility`].
        sparse: return the mask of flex attention instead of an additive one `(batch or 1, 1, queries, keys)`.
    """
    if not sparse:
        keys = num_streams * layout.block_ids.shape[1]
        return _dense_mask(layout, block_size, num_streams, (first_query, keys), ((0, keys),), dtype, causal_columns)
    # A constant even in compiled code: torch 2.11 cannot compile flex attention for a dynamic length.
    length = len(range(layout.block_ids.shape[1]))
    keys, rows = num_streams * length, layout.num_rows()
    see = stream_visibility(layout, block_size, num_streams, first_query=first_query, causal_columns=causal_columns)
    batch = None if rows == 1 else rows
    return create_block_mask(see, batch, None, keys - first_query, keys, device=layout.block_ids.device)


def _dense_mask(
    layout: Layout,
    block_size: int,
    num_streams: int,
    queries: tuple[int, int],
    keys: tuple[tuple[int, int], ...],
    dtype: torch.dtype,
    causal_columns: int = 0,
) -> torch.Tensor:
    """Return an additive mask `(batch or 1, 1, queries, keys)` of ranges of the streams; see [`stream_visibility`]."""
    device = layout.block_ids.device
    row = torch.arange(layout.num_rows(), device=device)[:, None, None]
    query = torch.arange(*queries, device=device)[None, :, None]
    key = torch.cat([torch.arange(*ends, device=device) for ends in keys])[None, None, :]
    see = stream_visibility(layout, block_size, num_streams, causal_columns=causal_columns)
    return _additive(see(row, None, query, key).unsqueeze(1), dtype)


def stream_visibility(
    layout: Layout, block_size: int, num_streams: int = 1, *, first_query: int = 0, causal_columns: int = 0
) -> Callable:
    """Return the mask function (row, head, query, key) of `[x_0 ; x_t ; x_t ...]`, each as long as `layout`.

    All masks share this code and differ only in the numbers and tensors that it captures. Padding and documents are
    captured tensors, so flex attention, once compiled for their shapes, is not compiled again for another batch.

    A kernel computes it for each pair of a tile, and runs out of registers easily: when it compared the blocks,
    padding and documents of the keys, the forward pass of a layer over padded rows took 0.4 to 18 ms, instead of 0.3
    (16 x 1,024 tokens on an H200). So a key has a single number, its rank, to compare with those of the query.

    Args:
        num_streams: number of streams, x_0 included.
        first_query: index of the key at the position of query 0.
        causal_columns: leading tokens of x_0 that see nothing to their right, as in an autoregressive model.
    """
    length = layout.block_ids.shape[1]
    ranks, blocks, first_blocks = (None, None, None) if layout.is_aligned() else _ranks(layout, num_streams)

    def at(values: torch.Tensor, batch: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        # All rows of the batch may share one. Indexed by tensors only: a number would be copied to the device.
        return values.squeeze(0)[position] if values.shape[0] == 1 else values[batch, position]

    def block_at(batch: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        if blocks is None:  # computed faster than read
            return (index - index // length * length) // block_size
        return at(blocks, batch, index)

    def rank_at(batch: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        if ranks is None:
            return index // length * length + block_at(batch, index)
        return at(ranks, batch, index)

    # torch before 2.11 cannot compile the annotation of an optional argument of an inner function.
    def see(batch: torch.Tensor, head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        query = query + first_query
        rank = rank_at(batch, key)
        earlier = rank < block_at(batch, query)
        if first_blocks is not None:
            earlier = earlier & (rank >= at(first_blocks, batch, query))
        own = rank == rank_at(batch, query)
        if causal_columns:
            own = own & ((query >= causal_columns) | (key <= query))
        return earlier | own

    return see


def _ranks(layout: Layout, num_streams: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return three numbers of each token, `(batch or 1, num_streams * length)`, that decide which keys a query sees.

    Returns:
        The rank. In x_0 it is the token's block; in x_t it is higher, and the same for all tokens of a block; padding
        has one for each token, which sees itself, since no softmax may run over an empty set.
        The token's block.
        The first block of its document; None without documents.
    """
    length = layout.block_ids.shape[1]
    block = layout.block_ids.int()
    stream = torch.arange(num_streams, dtype=torch.int32, device=block.device)
    ranks = (stream[:, None] * length + block.unsqueeze(1)).flatten(1)
    if layout.valid is not None:
        index = torch.arange(num_streams * length, dtype=torch.int32, device=block.device)
        ranks = torch.where(layout.valid.repeat(1, num_streams), ranks, num_streams * length + index)
    first = None
    if layout.document_ids is not None:
        begins = layout.document_ids.diff(dim=1, prepend=layout.document_ids[:, :1] - 1) != 0
        first = in_memory(torch.where(begins, block, 0).cummax(1).values.repeat(1, num_streams))
    return in_memory(ranks), in_memory(block.repeat(1, num_streams)), first
