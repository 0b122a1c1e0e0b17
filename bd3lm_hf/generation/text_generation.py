"""Texts of a set length that a model writes, each from a seed of its own: alone or in a batch, it is the same text."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from bd3lm_hf.generation.generate_cli import new_tokens


class GeneratedText(NamedTuple):
    """A text of which the first tokens were given."""

    ids: list[int]
    given: int
    forwards: int = 0  # passes of the network that it takes when it is written alone
    seconds: float = 0.0  # its share of the time of its batch

    @property
    def written(self) -> list[int]:
        """The tokens behind those that were given."""
        return self.ids[self.given :]


def generate_batch(
    model: Any,
    prompts: Sequence[list[int]],
    length: int,
    *,
    seeds: Sequence[int],
    to_end: bool = False,
    **generation: Any,
) -> list[GeneratedText]:
    """Continue prompts by `length` tokens; what a row gets depends on its seed, and on its batch by rounding at most.

    A model that draws the tokens of a batch from a single source writes its texts one after the other, unless
    nothing is drawn.

    Args:
        prompts: token ids, all of one length.
        seeds: one for each prompt.
        to_end: an end token ends a text, which is then shorter; otherwise it is a token like any other, as in packed
            training text.
        generation: fields of `generate`.
    """
    by_row = model.generator_per_row
    if len(prompts) > 1 and not by_row and generation.get("do_sample"):
        return [
            text
            for prompt, seed in zip(prompts, seeds, strict=True)
            for text in generate_batch(model, [prompt], length, seeds=[seed], to_end=to_end, **generation)
        ]
    given = torch.tensor(list(prompts), device=model.device)
    if by_row:
        sources = [torch.Generator().manual_seed(seed) for seed in seeds]
        traced = {"output_trace": True} if hasattr(model.generation_config, "output_trace") else {}
        generation = {**generation, "generator": sources, **traced}
    else:
        torch.manual_seed(seeds[0])
    started = time.perf_counter()
    with _ending(model.generation_config, to_end):
        output = model.generate(
            input_ids=given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=length,
            return_dict_in_generate=True,
            **generation,
        )
    seconds = (time.perf_counter() - started) / len(prompts)
    width, texts = given.shape[1], []
    for row, ids in enumerate(output.sequences.tolist()):
        written = new_tokens(ids[width:], model.generation_config) if to_end else ids[width:]
        texts.append(GeneratedText(ids[:width] + written, width, _forwards(output, row, len(written)), seconds))
    return texts


def _forwards(output: Any, row: int, written: int) -> int:
    """The passes that a row takes, or its batch did; an autoregressive model, which counts none, takes one a token."""
    if output.get("trace") is None:
        return output.get("num_forward_passes") or written
    # A row takes part in the steps that reveal something of it; in the others it waits for the batch.
    return sum(bool(step.revealed[row].any()) for step in output.trace)


@contextmanager
def _ending(config: Any, to_end: bool) -> Iterator[None]:
    """Without its end token, where texts are to go on: what a call leaves out is taken from the model's own fields."""
    end = config.eos_token_id
    if not to_end:
        config.eos_token_id = None
    try:
        yield
    finally:
        config.eos_token_id = end


__all__ = ["GeneratedText", "generate_batch"]
