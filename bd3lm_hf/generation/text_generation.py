"""Generate text with a seed for each row: alone or in a batch, it is the same text.

The one wrapper around `model.generate`: the generate command, generative evaluation, the quality curves, the
comparison of models and the samples shown while training all call it.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from bd3lm_hf.generation.denoising_trace import RowStep, row_steps


class GeneratedText(NamedTuple):
    """Prompt and continuation, and what generating it took."""

    ids: list[int]
    num_given: int  # tokens of the prompt
    forwards: int = 0  # forward passes in which this row revealed a token: those that it takes when generated alone
    batch_forwards: int = 0  # forward passes of its batch, which ends with its slowest row
    seconds: float = 0.0  # its share of the time of its batch
    steps: Sequence[RowStep] = ()  # if they were asked for

    @property
    def new_ids(self) -> list[int]:
        """The tokens after the prompt."""
        return self.ids[self.num_given :]


def generate_batch(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    seeds: Sequence[int],
    stop_at_eos: bool = False,
    keep_steps: bool = False,
    one_by_one: bool = True,
    **generation: Any,
) -> list[GeneratedText]:
    """Continue each prompt by `max_new_tokens` tokens; a row depends on its seed, and on its batch by rounding only.

    A model that draws the tokens of a batch from a single generator continues its prompts one by one, unless nothing
    is drawn. The global random state stays as it was.

    Args:
        prompts: token ids.
        seeds: one for each prompt.
        stop_at_eos: an end token ends a text, which is then shorter; otherwise it is a token like any other, as in
            packed training text.
        keep_steps: return every denoising step.
        one_by_one: False lets a model with a single generator sample the batch together, from the first seed: faster,
            but what a row gets depends on its batch.
        generation: arguments of `generate`.
    """
    has_row_generators = getattr(model, "generator_per_row", False)  # a plain decoder has no such flag
    if one_by_one and len(prompts) > 1 and not has_row_generators and generation.get("do_sample"):
        return [
            generate_batch(
                model,
                [prompt],
                max_new_tokens,
                seeds=[seed],
                stop_at_eos=stop_at_eos,
                keep_steps=keep_steps,
                **generation,
            )[0]
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
    input_ids, attention_mask = _pad_left(prompts, model)
    if has_row_generators:
        generation["generator"] = [torch.Generator().manual_seed(seed) for seed in seeds]
    # Only the trace shows which steps revealed a token of which row.
    if keep_steps or (has_row_generators and hasattr(model.generation_config, "output_trace")):
        generation["output_trace"] = True
    started = time.perf_counter()
    with _eos_disabled(model.generation_config, not stop_at_eos), _seeded(model.device, seeds[0]):
        output = model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            max_new_tokens=max_new_tokens,
            return_dict_in_generate=True,
            **generation,
        )
    seconds = (time.perf_counter() - started) / len(prompts)
    width = input_ids.shape[1]
    texts = []
    for row, (prompt, ids) in enumerate(zip(prompts, output.sequences.tolist(), strict=True)):
        new_ids = without_padding(ids[width:], model.generation_config) if stop_at_eos else ids[width:]
        forwards, batch_forwards = _count_forwards(output, row, len(new_ids))
        steps = list(row_steps(output.trace, row, width - len(prompt))) if keep_steps else []
        texts.append(GeneratedText([*prompt, *new_ids], len(prompt), forwards, batch_forwards, seconds, steps))
    return texts


def without_padding(new_ids: list[int], config: Any) -> list[int]:
    """Return a row's new tokens without the padding after its end."""
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    padding = ends[0] if config.pad_token_id is None else config.pad_token_id
    count = len(new_ids)
    while count and new_ids[count - 1] == padding:
        count -= 1
    if padding in ends and count < len(new_ids):
        count += 1  # the first of them ended the text
    return new_ids[:count]


def _pad_left(prompts: Sequence[Sequence[int]], model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and attention mask, both `(batch, length of the longest prompt)`."""
    width = max(map(len, prompts))
    # The attention mask hides the padding, so any id of the vocabulary will do.
    padding = model.generation_config.pad_token_id or 0
    ids = [[padding] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=model.device), torch.tensor(mask, device=model.device)


def _count_forwards(output: Any, row: int, num_new: int) -> tuple[int, int]:
    """Return the forward passes of a row, and of its batch."""
    # An autoregressive model counts none: it takes one for each token, and the batch goes on with its longest row.
    in_batch = output.get("num_forward_passes")
    if output.get("trace") is None:
        return in_batch or num_new, in_batch or num_new
    # In the other steps the row waits for the batch.
    return sum(bool(step.revealed[row].any()) for step in output.trace), in_batch or len(output.trace)


@contextlib.contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def _eos_disabled(config: Any, disabled: bool) -> Iterator[None]:
    # `generate` takes what a call leaves out, and what it sets to None, from the model's own fields.
    eos_token_id = config.eos_token_id
    if disabled:
        config.eos_token_id = None
    try:
        yield
    finally:
        config.eos_token_id = eos_token_id
