"""Mean and second moment of a block's training loss for every interval of noise levels (arXiv 2503.09573, Sec. 5.2).

For a block of B' tokens and a time t, the loss is X = w(t) S / B', S the summed cross-entropy of the masked tokens. A
network that does not read t gives an S that depends on the mask alone, so the moments of X under an interval are

    E[X^j] = sum_k  E_t[w(t)^j; k masked]  E[S^j | k masked] / B'^j.

The first factor is a one-dimensional integral that needs no network; the second is the same for all intervals. Hence
one set of masks, spread over k, serves any number of intervals.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from bd3lm_hf.modeling.inputs_bd3lm import Layout, check_text, default_labels, padding_mask, token_layout
from bd3lm_hf.modeling.likelihood_bd3lm import mask_losses, noise_of_batch, stratified_masks
from bd3lm_hf.modeling.loss_bd3lm import Corruption, LossMask, corrupt, loss_mask
from bd3lm_hf.modeling.noise_bd3lm import NoiseSchedule, clips, count_probabilities, noise_schedule


Interval = tuple[float, float]

MAX_PASSES = 12  # noisy passes over a batch, whatever the number of intervals

_NODES = 512  # of the quadrature over t; resolves the binomial of a block of a few thousand tokens


class BlockMoments(NamedTuple):
    """Estimated moments of the loss of each block, all float64 `(intervals, blocks)`; unbiased for each block."""

    zeroth: torch.Tensor  # estimates 1; its error is proportional to those of the other two
    first: torch.Tensor  # E[X]
    second: torch.Tensor  # E[X^2]


class HeldOut(NamedTuple):
    """A batch of held-out text, with a generator for each row."""

    input_ids: torch.Tensor  # (batch, length)
    layout: Layout
    scored: LossMask
    generators: list[torch.Generator]


def held_out(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    labels: torch.Tensor | None,
    generators: list[torch.Generator],
) -> HeldOut:
    """Return a batch for [`SharedDraws`] and [`PassPerInterval`]; all tensors are `(batch, length)`."""
    config = model.config
    attention_mask = padding_mask(attention_mask, may_synchronize=True)
    labels = default_labels(input_ids, attention_mask) if labels is None else labels
    check_text(config, input_ids, labels, attention_mask, may_synchronize=True)
    layout = token_layout(attention_mask, input_ids.shape[1], config.block_size, device=input_ids.device)
    scored = loss_mask(layout, labels, ignore_bos=config.ignore_bos, training=False)
    return HeldOut(input_ids, layout, scored, generators)


class PassPerInterval:
    """Estimate moments as published: a noisy pass with its own masks for each interval, after one clean pass.

    With `config.resample` the mask rates are truncated as in training: an interval from 1e-3 has no lower bound. (The
    published search rounds 1e-3 to float32 and then does apply the bound, so it never sees an empty mask there.)

    Args:
        config: the model's configuration.
        intervals: the intervals to compare.
    """

    def __init__(self, config: Any, intervals: Sequence[Interval]) -> None:
        self.config, self.intervals, self.passes = config, list(intervals), len(intervals)

    def __call__(self, model: Any, batch: HeldOut) -> BlockMoments:
        """Return the moments of the blocks that have a maskable token, row by row."""
        kept = _per_block(batch, batch.scored.maskable, self.config) > 0
        losses = [
            _per_block(batch, loss * draw.weights, self.config)[kept] / self.config.block_size
            for draw, loss in mask_losses(model, batch.input_ids, batch.layout, self._masks(model, batch))
        ]
        first = torch.stack(losses)
        return BlockMoments(torch.ones_like(first), first, first.square())

    def _masks(self, model: Any, batch: HeldOut) -> Iterator[Corruption]:
        for low, high in self.intervals:
            noise = noise_of_batch(model, batch.scored, self.config.antithetic_sampling, batch.generators)
            yield corrupt(model, batch.layout, batch.scored, noise, low, high, training=True)


class SharedDraws:
    """Estimate moments for all intervals from at most `MAX_PASSES` noisy passes, over the number k of masked tokens.

    There is one pass per k if a block has at most `passes` tokens, otherwise one k from each of `passes` strata of
    1..n. k = 0 needs no pass, since its loss is zero.

    Args:
        config: the model's configuration.
        intervals: the intervals to compare.
        passes: noisy passes over a batch.

    Raises:
        ValueError: if the model reads the noise level, so that one pass cannot serve all levels.
    """

    def __init__(self, config: Any, intervals: Sequence[Interval], passes: int = MAX_PASSES) -> None:
        if config.time_conditioning:
            raise ValueError(
                "a model with time_conditioning=True gives other losses at each noise level: use PassPerInterval."
            )
        self.config, self.intervals = config, list(intervals)
        self.passes = min(passes, config.block_size)
        self._tables: dict[tuple[int, int], torch.Tensor] = {}

    def __call__(self, model: Any, batch: HeldOut) -> BlockMoments:
        """Return the moments of the blocks that have a maskable token, row by row."""
        maskable = _per_block(batch, batch.scored.maskable, self.config)
        # Blocks without a maskable token, such as padding, have no loss.
        kept = maskable > 0
        sizes = _per_block(batch, batch.scored.valid, self.config)[kept].long()
        maskable = maskable[kept].long()
        moments = torch.zeros(3, len(maskable), len(self.intervals), dtype=torch.float64)
        if not len(maskable):
            return BlockMoments(*moments.mT)
        table, rows = self._table_of_blocks(sizes, maskable)
        moments[0] = table[rows, 0, :, 0]  # an empty mask has loss zero
        draws = stratified_masks(model, batch.layout, batch.scored, self.passes, batch.generators)
        for draw, losses in mask_losses(model, batch.input_ids, batch.layout, draws):
            k = _per_block(batch, draw.masked, self.config)[kept].long()
            share = maskable / self.passes  # 1 / the probability that a draw has this k
            loss = _per_block(batch, losses, self.config)[kept] / self.config.block_size
            for power, moment in enumerate(moments):
                moment += (share * loss**power).unsqueeze(1) * table[rows, power, :, k]
        return BlockMoments(*moments.mT)

    def _table_of_blocks(self, sizes: torch.Tensor, maskable: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a table `(kinds, 3, intervals, k)` for the kinds of blocks in a batch, and the kind of each block."""
        # Most blocks of a batch are of one kind, so a table per kind is cheaper than one per block.
        kinds, rows = torch.stack([sizes, maskable], dim=1).unique(dim=0, return_inverse=True)
        tables = [self._table(*kind).permute(2, 0, 1) for kind in kinds.tolist()]
        return torch.nn.utils.rnn.pad_sequence(tables, batch_first=True).permute(0, 2, 3, 1), rows

    def _table(self, size: int, maskable: int) -> torch.Tensor:
        """Return the table of one kind, `(3, intervals, maskable + 1)`, cached for later batches."""
        if (size, maskable) not in self._tables:
            schedule, truncated = noise_schedule(self.config.noise), self.config.resample
            levels = [
                level_moments(schedule, interval, size=size, maskable=maskable, truncated=truncated)
                for interval in self.intervals
            ]
            self._tables[size, maskable] = torch.stack(levels, dim=1)
        return self._tables[size, maskable]


def level_moments(
    schedule: NoiseSchedule, interval: Interval, *, size: int, maskable: int, truncated: bool
) -> torch.Tensor:
    """Return E_t[w(t)^j; k of the block's tokens are masked] for j = 0, 1, 2 and t uniform on the interval.

    As published, the weight is 1 throughout when the interval starts above 0.5.

    Args:
        size: tokens of the block.
        maskable: tokens of the block that may stay masked; the others (a given first token, a prompt) are masked and
            then shown again, as in the loss.
        truncated: whether the masked fraction of the block is inside the interval (`config.resample`).

    Returns:
        float64 `(3, maskable + 1)`; row 0 sums to 1.
    """
    low, high = interval
    truncated = truncated and clips(low, high)
    drawn = size if truncated else maskable  # untruncated, tokens are independent: leave out those shown again
    t, share = _quadrature(low, high)
    level = schedule(t)
    weight = torch.ones_like(t) if low > 0.5 else -level.loss_scaling
    bounds = (low, high) if truncated else (0.0, 1.0)
    probabilities = count_probabilities(
        level.move_chance.unsqueeze(0), torch.full((1, len(t)), drawn), *bounds, max_size=drawn
    )[0]
    weights = torch.stack([share, share * weight, share * weight.square()])
    return weights @ probabilities @ _shown_again(drawn, maskable)


def _quadrature(low: float, high: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return nodes and weights of the mean over t in [low, high], dense at the ends of [0, 1]."""
    if low == high:
        return torch.tensor([low], dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    # In the angle a with t = sin^2 a, a binomial has the same width everywhere, and 1/t^2 is smooth near 0.
    nodes, weights = _legendre()
    first, last = np.arcsin(np.sqrt(low)), np.arcsin(np.sqrt(high))
    angle = first + (last - first) * (nodes + 1) / 2
    weights = weights * torch.sin(2 * angle)
    return torch.sin(angle).square(), weights / weights.sum()


@functools.cache
def _legendre() -> tuple[torch.Tensor, torch.Tensor]:
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    return torch.from_numpy(nodes), torch.from_numpy(weights)


def _shown_again(size: int, maskable: int) -> torch.Tensor:
    """Return the probability that k' of k masked tokens are maskable, `(size + 1, maskable + 1)` over k and k'.

    It is hypergeometric: `maskable` of the `size` tokens of a block may stay masked.
    """
    k = torch.arange(size + 1, dtype=torch.float64).unsqueeze(1)
    among = torch.arange(maskable + 1, dtype=torch.float64)

    def log_choose(n: torch.Tensor | float, m: torch.Tensor) -> torch.Tensor:
        n = torch.as_tensor(n, dtype=torch.float64)
        possible = (m >= 0) & (m <= n)
        value = torch.lgamma(n + 1) - torch.lgamma(m.clamp(min=0) + 1) - torch.lgamma((n - m).clamp(min=0) + 1)
        return torch.where(possible, value, -torch.inf)

    others = log_choose(float(size - maskable), k - among)
    return (log_choose(float(maskable), among) + others - log_choose(float(size), k)).exp()


def _per_block(batch: HeldOut, values: torch.Tensor, config: Any) -> torch.Tensor:
    """Sum values `(batch, length)` over the blocks of each row; float64 `(batch * blocks,)` on the CPU."""
    rows, length = values.shape
    block_ids = batch.layout.block_ids.expand(rows, -1).cpu()
    sums = torch.zeros(rows, config.num_blocks(length), dtype=torch.float64)
    return sums.scatter_add_(1, block_ids, values.double().cpu()).flatten()
