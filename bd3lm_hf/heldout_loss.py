"""The training loss of held-out sequences: how models are followed that have no likelihood, and hence no perplexity.

Such a model says `has_likelihood = False`. Its loss compares checkpoints of one model; it is no bound on log p(x), and
compares with no other model.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm

from bd3lm_hf.evaluation import SequenceScore, batch_of, seed_of, summarize
from bd3lm_hf.modeling.noise_bd3lm import Noise


class HeldOutLoss(NamedTuple):
    """The training objective on text that was not trained on."""

    loss: float  # mean per labelled token, nats
    standard_error: float  # of loss: sequences as a random sample of text, noise draws included
    num_tokens: int  # labelled tokens
    num_sequences: int
    seconds: float


@torch.no_grad()
def sequence_losses(
    model: Any,
    sequences: Sequence[Any],
    *,
    indices: Sequence[int] | None = None,
    num_samples: int = 1,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = False,
) -> list[SequenceScore]:
    """The loss of the sequences at `indices` (all by default), so that several processes can share the work.

    Every sequence has its own source of noise, a function of `seed` and its place: neither batch size nor the number
    of processes changes the result. The model's train or eval mode is restored.

    Args:
        model: its `forward` gives a mean loss per labelled token, and takes the noise of each row; `config.num_blocks`
            tells how many uniform numbers that is.
        sequences: a data set with `input_ids` (and `attention_mask`, `labels`), or sequences of token ids.
        num_samples: noise draws per sequence.
        batch_size: draws that are computed at once.

    Raises:
        ValueError: a batch size below 1, or sequences that the model can not learn from.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: give at least 1.")
    indices = range(len(sequences)) if indices is None else indices
    device = next(iter(model.parameters())).device
    was_training = model.training
    model.eval()
    scores = []
    try:
        for index in tqdm(indices, desc="losses", leave=False, disable=not progress):
            input_ids, attention_mask, context = batch_of([sequences[index]], device)
            labels = context.get("labels", input_ids).masked_fill(attention_mask == 0, -100)
            count = int((labels != -100).sum())
            noise = _noise(model, input_ids.shape[1], num_samples, seed_of(seed, int(index)))
            total = 0.0
            for first in range(0, num_samples, batch_size):
                part = [field[first : first + batch_size] for field in noise]
                rows = len(part[0])
                loss = model(
                    input_ids=input_ids.expand(rows, -1),
                    attention_mask=attention_mask.expand(rows, -1),
                    labels=labels.expand(rows, -1),
                    **{name: field.to(device) for name, field in zip(Noise._fields, part, strict=True)},
                ).loss
                total += float(loss) * rows
            scores.append(SequenceScore(int(index), total / num_samples * count, count))
    finally:
        model.train(was_training)
    return sorted(scores)


def _noise(model: Any, length: int, draws: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    blocks = model.config.num_blocks(length)
    return list(torch.rand((draws, 2 * blocks + length), generator=generator).split([blocks, length, blocks], dim=1))


def summarize_losses(scores: Iterable[SequenceScore], *, seconds: float = 0.0) -> HeldOutLoss:
    """Combine the losses of sequences; their order does not matter, and a row that occurs twice counts once.

    Raises:
        ValueError: no sequence has a labelled token.
    """
    mean = summarize(scores, seconds=seconds)
    return HeldOutLoss(mean.nll, mean.standard_error, mean.num_tokens, mean.num_sequences, seconds)


__all__ = ["HeldOutLoss", "sequence_losses", "summarize_losses"]
