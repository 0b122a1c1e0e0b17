"""The two streams of block diffusion (arXiv 2503.09573, Sec. 3): the clean x_0, and noisy x_t that attend to it.

The clean stream needs only itself, so it can be computed once, as a cache or in the same pass, and serve any number of
noisy streams. A text of one block has no earlier block to read: its noisy streams go alone.
"""

from typing import TYPE_CHECKING, cast

import torch

from .attention_bd3lm import AttentionPlan, Layout, block_causal_plan, two_stream_plan
from .cache_bd3lm import BlockCache


if TYPE_CHECKING:
    from .modeling_bd3lm import BD3LMForMaskedLM


def clean_cache(model: "BD3LMForMaskedLM", input_ids: torch.Tensor, layout: Layout) -> BlockCache:
    """Keys and values of the clean stream; its last layer needs nothing else."""
    backbone, config, length = model.backbone, model.config, input_ids.shape[1]
    embeds, cache = backbone.vocab_embed(input_ids), BlockCache()
    plan = block_causal_plan(
        layout, length, config.block_size, implementation=config._attn_implementation, dtype=embeds.dtype
    )
    plan = AttentionPlan(plan.tiles, (), length)
    modulations = backbone.modulations(None, input_ids.device)
    backbone.run(embeds, layout.position_ids, plan, modulations, past_key_values=cache, commit=length)
    return cache


def noisy_hidden(
    model: "BD3LMForMaskedLM",
    x_t: torch.Tensor,
    x_0: torch.Tensor,
    layout: Layout,
    rows: torch.Tensor,
    sigma: torch.Tensor | None,
    *,
    cache: BlockCache | None = None,
    draws: int = 1,
) -> torch.Tensor:
    """Normed hidden states of some positions of the noisy streams, `(rows, hidden_dim)`.

    Args:
        x_t: `(batch, draws * length)`, the noisy streams of each row side by side.
        x_0: `(batch, length)`, the clean stream that all of them attend to.
        rows: flat indices into x_t.
        sigma: noise level `(batch,)` of each row, for time-conditioned models, which take one draw.
        cache: what [`clean_cache`] gave; without it the clean stream is computed in this pass, with a gradient.
    """
    backbone, config = model.backbone, model.config
    if config.num_blocks(x_0.shape[1]) == 1:
        return _lone_hidden(model, x_t.view(-1, x_0.shape[1]), layout, rows, sigma, draws)
    ids = x_t if cache is not None else torch.cat([x_0, x_t], dim=1)
    embeds = backbone.vocab_embed(ids)
    plan = two_stream_plan(
        layout,
        config.block_size,
        draws=draws,
        clean_cached=cache is not None,
        implementation=config._attn_implementation,
        dtype=embeds.dtype,
    )
    positions = layout.position_ids.repeat(1, draws + (cache is None))
    modulations = backbone.modulations(sigma, x_t.device)
    outputs = backbone.run(embeds, positions, plan, modulations, past_key_values=cache, rows=rows)
    return cast(torch.Tensor, outputs.last_hidden_state)


def _lone_hidden(
    model: "BD3LMForMaskedLM",
    x_t: torch.Tensor,
    layout: Layout,
    rows: torch.Tensor,
    sigma: torch.Tensor | None,
    draws: int,
) -> torch.Tensor:
    """[`noisy_hidden`] of texts of one block, `x_t` of `(batch * draws, length)`: full attention, half the work."""
    backbone, config = model.backbone, model.config
    if layout.valid is not None:
        fields = (layout.position_ids, layout.block_ids, layout.valid)
        layout = Layout(*(field.repeat_interleave(draws, dim=0) for field in fields))
    embeds = backbone.vocab_embed(x_t)
    options = {"implementation": config._attn_implementation, "dtype": embeds.dtype}
    plan = block_causal_plan(layout, x_t.shape[1], config.block_size, **options)
    modulations = backbone.modulations(sigma, x_t.device)
    outputs = backbone.run(embeds, layout.position_ids, plan, modulations, rows=rows)
    return cast(torch.Tensor, outputs.last_hidden_state)


__all__ = ["clean_cache", "noisy_hidden"]
