"""Completing texts in place: mask tokens anywhere, block by block, with the samplers of `generate`.

A block is denoised jointly, so a gap sees what stands to its right in its own block, and everything to its left; the
blocks behind it are not seen, as the model is block-causal.
"""

from typing import Any, NamedTuple

import torch
from transformers.generation.logits_process import LogitsProcessorList

from .cache_bd3lm import cache_maker
from .canvas_bd3lm import Canvas, lay_out
from .decoding_bd3lm import BlockWriter
from .trace_bd3lm import Trace, sequence_columns
from .windows_bd3lm import fills_window


# Fields of a generation config on how long a text becomes, how many there are and what else is returned.
NOT_FOR_GAPS = (
    "max_new_tokens",
    "max_length",
    "min_new_tokens",
    "min_length",
    "max_time",
    "stop_strings",
    "stopping_criteria",
    "stop_at_second_eos",
    "entropy_stop",
    "num_beams",
    "num_return_sequences",
    "streamer",
    "past_key_values",
    "output_scores",
    "output_logits",
)


class Filled(NamedTuple):
    """Completed texts and what they cost."""

    sequences: torch.Tensor  # (batch, length)
    num_gaps: int  # tokens that were filled in, in all rows
    num_forward_passes: int
    trace: Trace | None


def fill_gaps(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    processors: LogitsProcessorList,
    generation_config: Any,
    generator: torch.Generator | None = None,
) -> Filled:
    """Replace every mask token of `input_ids` `(batch, length)`; blocks without one only serve as context."""
    canvas, shown = lay_out_gaps(input_ids, attention_mask, model.config.block_size, model.config.mask_token_id)
    assert canvas.holes is not None
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    trace = None
    if generation_config.output_trace:
        trace = Trace(sequence_columns(canvas.text.shape[1], canvas.start, real, continued=False))
    cached = generation_config.use_cache and not model.config.time_conditioning and not fills_window(model.config)
    # Contexts for processors are counted from each row's first token: nothing stands before the canvas.
    make = cache_maker(generation_config.cache_implementation)
    before, cache = input_ids[:, :0], make(model.config) if cached else None
    writer = BlockWriter(model, canvas, before, processors, generation_config, cache, generator, trace)
    unfinished = torch.zeros(len(input_ids), dtype=torch.bool)
    for begin in canvas.blocks():
        if canvas.gaps(begin).any():
            writer.denoise(begin, unfinished)
    sequences = input_ids.clone()
    sequences[real] = canvas.text[shown]  # both in reading order
    return Filled(sequences, int(canvas.holes.sum()), writer.passes.count, trace)


def lay_out_gaps(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, block_size: int, mask_token_id: int
) -> tuple[Canvas, torch.Tensor]:
    """Put texts with gaps on a [`Canvas`], and say which of its places hold their tokens, bool `(batch, columns)`.

    A text may end inside a block: the rest of the block is no part of it, and is not seen.
    """
    canvas = lay_out(input_ids, attention_mask, 0, block_size, mask_token_id)
    column = torch.arange(canvas.text.shape[1], device=input_ids.device)
    shown = (column >= canvas.start.unsqueeze(1)) & (column < canvas.prompt_end.unsqueeze(1))
    canvas = Canvas(
        text=canvas.text,
        start=canvas.start,
        lengths=torch.zeros_like(canvas.lengths),
        first_block=0,
        new_tokens=canvas.text.shape[1],
        block_size=block_size,
        key_valid=None if bool(shown.all()) else shown,
        holes=((canvas.text == mask_token_id) & shown).cpu(),
    )
    return canvas, shown


__all__ = ["NOT_FOR_GAPS", "Filled", "fill_gaps", "lay_out_gaps"]
