"""The network passes that write text block by block (arXiv 2503.09573, Algorithm 2): cache, window, attention.

Finished blocks lie in the cache; a block is written to it by the pass that takes the first step of the next one, so a
block costs as many passes as it has steps.
"""

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from .attention_bd3lm import AttentionPlan, block_causal_plan, decoding_plan, token_layout
from .cache_bd3lm import BlockCacheLayer
from .canvas_bd3lm import Canvas
from .noise_bd3lm import LogLinearNoise


class BlockPasses:
    """Runs a model over the blocks of a canvas.

    Args:
        cache: written to and read from; None computes the whole window in every pass.
    """

    def __init__(self, model: Any, canvas: Canvas, cache: Cache | None = None) -> None:
        self.model, self.canvas, self.config, self.cache = model, canvas, model.config, cache
        self.count = 0  # denoising passes so far
        self.modulations = None
        if not self.config.time_conditioning:
            self.modulations = model.backbone.modulations(None, canvas.text.device)
        self.position_ids = canvas.position_ids
        self._dropped = 0  # oldest columns that have left the window and the cache
        if cache is not None:
            check_cache(cache, canvas)

    def logits(self, begin: int, rows: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """One denoising pass over the block that begins at this column.

        Args:
            rows: places that are predicted, flat indices into `(batch, block_size)`.
            t: `(batch,)`, how much of each row's block is still masked: the probability 1 - alpha_t, which is the time
                of the log-linear schedule. Read only by time-conditioned models.

        Returns:
            `(rows, vocab_size)` in float32.
        """
        model, size = self.model, self.config.block_size
        self.count += 1
        modulations = self.modulations
        if modulations is None:
            sigma = LogLinearNoise().sigma(t)
            modulations = model.backbone.modulations(sigma, rows.device)
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
            begun = self.canvas.holes is None and self._dropped >= self.canvas.last_start
            valid = None if begun else valid[:, self._dropped : begin + size]
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


__all__ = ["BlockPasses", "check_cache"]
