"""Bounds on the negative log-likelihood of every token of a text (arXiv 2503.09573, Eq. 8).

Three estimators, sampled, stratified and exact, differ in which masks of a block they look at and how they weigh them.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from transformers.configuration_utils import PreTrainedConfig

from .attention_bd3lm import Layout, token_layout
from .backbone_bd3lm import BD3LMLanguageModel
from .configuration_bd3lm import SAMPLING_EPS
from .loss_bd3lm import LossMask, check_text, cross_entropy, loss_mask, sigma_of
from .noise_bd3lm import (
    Noise,
    draw_noise,
    given_noise,
    mask_positions,
    noise_schedule,
    per_token,
    rank_in_block,
    times,
)
from .samplers_bd3lm import Generators, check_generators


Source = Noise | Generators  # the draws themselves, or where they come from

#: The exact bound sums over all masks of a block: 2^tokens - 1 passes.
MAX_EXACT_TOKENS = 8
_TOKEN_BUDGET = 2**14  # noisy tokens of one pass when scoring


class TokenNLL(NamedTuple):
    """A bound on the negative log-likelihood of each token; `nll.sum() / mask.sum()` is the mean in nats."""

    nll: torch.Tensor  # float32 (batch, length), nats, zero where mask is zero
    mask: torch.Tensor  # float32 (batch, length), 1 where a token is scored


def token_nll(
    model: BD3LMLanguageModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    labels: torch.Tensor | None = None,
    estimator: str = "sampled",
    num_samples: int = 1,
    generator: torch.Generator | list[torch.Generator] | None = None,
    noise: Noise | None = None,
) -> TokenNLL:
    r"""Bound on the negative log-likelihood of every token of a text.

    All estimators have the expectation of Eq. 8 with t over (0, 1], which does not depend on the noise schedule: given
    that k of the n maskable tokens of a block are masked, all \\(\binom{n}{k}\\) masks are equally likely, and
    \\(\int_0^1 \frac1t \binom nk t^k (1-t)^{n-k} dt = \frac1k\\). So a mask with k tokens has the weight
    \\(1 / (k \binom nk)\\).

    - `"sampled"`, the paper's: t stratified over the blocks of the batch on [1e-3, 1], the weight of the model's noise
      schedule (1/t), `num_samples` draws. It leaves out the times below 1e-3, and with them the masks below
      move_chance(1e-3): 0.1 % masked for `loglinear`, `square` and `log`, where the bias is of that order, but 3 %
      for `square_root`, whose expectation lies up to 3 % too low. `cosine` lies up to 1 % too low, since its published
      weight adds eps to the denominator.
    - `"stratified"`: k uniform on 1..n, a uniform mask of that size, weight n/k. Unbiased because k has probability
      1/n instead of weight 1/k. No draw is wasted on an empty mask and no weight exceeds n, so the variance is lower.
      The draws of one block spread k over 1..n.
    - `"exact"`: the sum over all 2^n - 1 masks of each block; no randomness. n is at most 8.

    The clean stream is computed once for all draws. A model of block size 1 has a single mask per block, so every
    estimator gives its exact autoregressive likelihood.

    Args:
        input_ids: `(batch, length)`, of any length.
        attention_mask: `(batch, length)`, zeros for padding on either side.
        labels: `(batch, length)`; -100 marks context, which is neither masked nor scored. Default: score everything.
        num_samples: draws per block, for the two random estimators.
        generator: source of randomness, or one per row, which makes a row's draws independent of its batch.
        noise: the draws of one `"sampled"` estimate, see [`Noise`], in place of a source.

    Raises:
        ValueError: unknown estimator, `num_samples` below 1, a block with too many tokens for the exact sum, ids
            outside the vocabulary, mask tokens in the text, noise for another estimate or another batch.
    """
    _check_estimator(model, estimator, num_samples, generator, input_ids.shape[0])
    source = source_of(noise, generator, estimator, num_samples, input_ids.shape, model.config)
    labels = input_ids if labels is None else labels
    check_text(model, input_ids, labels)
    config = model.config
    layout = token_layout(attention_mask, input_ids.shape[1], config.block_size, device=input_ids.device)
    scored = loss_mask(layout, labels, ignore_bos=config.ignore_bos, training=False)
    draws = _ESTIMATORS[estimator](model, layout, scored, num_samples, source)
    with torch.no_grad():
        nll = _sum_over_masks(model, input_ids, layout, draws)
    return TokenNLL(nll, scored.counted.float())


def _check_estimator(
    model: BD3LMLanguageModel, estimator: str, num_samples: int, generator: Generators, batch: int
) -> None:
    if estimator not in _ESTIMATORS:
        raise ValueError(f"estimator={estimator!r} is unknown: choose one of {', '.join(_ESTIMATORS)}.")
    check_sampling(num_samples, generator, batch)
    if estimator != "sampled" and model.config.time_conditioning:
        raise ValueError(
            f"estimator={estimator!r} sums over masks of all noise levels at once, but this model has "
            f"time_conditioning=True: use estimator='sampled'."
        )


def check_sampling(num_samples: int, generator: Generators, batch: int) -> None:
    """Refuse fewer than one draw, or a list of generators that does not have one for each row."""
    if num_samples < 1:
        raise ValueError(f"num_samples={num_samples}: give at least 1.")
    check_generators(generator, batch)


def source_of(
    noise: Noise | None,
    generator: Generators,
    estimator: str,
    num_samples: int,
    shape: torch.Size,
    config: PreTrainedConfig,
) -> Source:
    """The draws that a caller gave for a batch of `shape`, or where they come from.

    Raises:
        ValueError: the draws are not those of one sampled estimate, or do not fit the batch.
    """
    if noise is None:
        return generator
    if estimator != "sampled" or num_samples != 1 or noise.draws != 1:
        raise ValueError(
            f"noise holds the draws of one sampled estimate, but estimator={estimator!r}, num_samples={num_samples} "
            f"and draws={noise.draws}: use estimator='sampled' with one draw, or leave noise out."
        )
    return given_noise(*noise, shape, config)


class Mask(NamedTuple):
    """One draw for every block of a batch."""

    masked: torch.Tensor  # bool (batch, length)
    weights: torch.Tensor  # (batch, length), weight of each position's loss, the share of this draw included
    move_chance: torch.Tensor | None  # (batch, num_blocks), for time conditioning


def _sampled(
    model: BD3LMLanguageModel, layout: Layout, scored: LossMask, num_samples: int, source: Source
) -> Iterator[Mask]:
    """Draws of t on [1e-3, 1] as published; a single full mask at block size 1."""
    config = model.config
    if config.block_size == 1:
        yield Mask(scored.maskable, scored.maskable.float(), None)
        return
    order = config.antithetic_sampling
    for _ in range(num_samples):
        noise = rows_of_noise(model, scored, order, source)
        level = noise_schedule(config.noise)(times(noise.block_noise, SAMPLING_EPS, 1.0))
        masked = mask_positions(noise, level.move_chance, layout.block_ids) & scored.maskable
        weights = per_token(-level.loss_scaling, layout.block_ids) / num_samples
        yield Mask(masked, weights, level.move_chance)


def stratified_masks(
    model: BD3LMLanguageModel, layout: Layout, scored: LossMask, num_samples: int, source: Source
) -> Iterator[Mask]:
    """Draws of the number k of masked tokens, spread over 1..n; weight n/k."""
    batch, length = scored.counted.shape
    blocks = model.config.num_blocks(length)
    device = scored.counted.device
    block_ids = layout.block_ids.expand(batch, -1)
    sizes = torch.zeros(batch, blocks, device=device).scatter_add_(1, block_ids, scored.maskable.float())
    shift = rows_of_noise(model, scored, "none", source).block_noise
    for sample in range(num_samples):
        noise = rows_of_noise(model, scored, "shuffled", source)
        # A single draw is stratified over the blocks of the batch; several are spread evenly over each block's 1..n.
        place = noise.block_noise if num_samples == 1 else (sample + shift) / num_samples
        chosen = torch.minimum((place * sizes).floor() + 1, sizes)
        masked = rank_in_block(noise.token_noise, block_ids, scored.maskable) < per_token(chosen, block_ids)
        weights = sizes / chosen.clamp(min=1) / num_samples
        yield Mask(masked & scored.maskable, per_token(weights, block_ids), None)


def _exact(
    model: BD3LMLanguageModel, layout: Layout, scored: LossMask, num_samples: int, source: Source
) -> Iterator[Mask]:
    """Every mask of a block once, with the weight 1 / (k C(n, k)).

    What may be masked in a block is numbered, so that a few tokens behind a context cost few passes at any block size.
    """
    batch, length = scored.counted.shape
    block_ids = layout.block_ids.expand(batch, -1)
    sizes = torch.zeros(batch, model.config.num_blocks(length), device=block_ids.device, dtype=torch.float64)
    n = sizes.scatter_add(1, block_ids, scored.maskable.double())
    most = int(n.max())
    if most > MAX_EXACT_TOKENS:
        raise ValueError(
            f"estimator='exact' at block_size={model.config.block_size} needs 2^{most} - 1 passes; the limit is "
            f"{MAX_EXACT_TOKENS} tokens to score in a block, {2**MAX_EXACT_TOKENS - 1} passes. Use "
            f"estimator='stratified' with num_samples."
        )
    place = rank_in_block((layout.position_ids / length).expand(batch, -1), block_ids, scored.maskable)

    def masks() -> Iterator[Mask]:
        for pattern in range(1, 2**most):
            picked = (torch.tensor(pattern, device=place.device) >> place) & 1 > 0
            masked = picked & scored.maskable
            k = sizes.scatter_add(1, block_ids, masked.double())
            log_binomial = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
            weights = torch.where(k > 0, (-log_binomial).exp() / k.clamp(min=1), 0.0)
            # A pattern with more tokens than a block has equals one without these: count it once.
            wanted = torch.full_like(k, bin(pattern).count("1"))
            weights = torch.where(k == wanted, weights, 0.0)
            masked = masked & (per_token(weights, block_ids) > 0)
            yield Mask(masked, per_token(weights, block_ids).float(), None)

    return masks()


_ESTIMATORS = {"sampled": _sampled, "stratified": stratified_masks, "exact": _exact}


def rows_of_noise(model: BD3LMLanguageModel, scored: LossMask, order: str, source: Source) -> Noise:
    """Noise of a batch; with a generator per row, a row's draws are those it would get alone and without padding."""
    batch, length = scored.valid.shape
    device, blocks = scored.valid.device, model.config.num_blocks(length)
    if isinstance(source, Noise):
        return Noise(*(field.to(device) for field in source))
    if not isinstance(source, list):
        return draw_noise(batch, blocks, length, order=order, device=device, generator=source)
    noise = Noise(*(torch.zeros(batch, size, device=device) for size in (blocks, length, blocks)))
    for row, generator in enumerate(source):
        tokens = int(scored.valid[row].sum())
        # As for a whole window, so that texts which begin alike are compared with the same draws, whatever their
        # length. Strata that are dealt in order must be those of the text's own blocks.
        drawn = tokens if order == "published" else max(tokens, model.config.model_length)
        own = draw_noise(1, model.config.num_blocks(drawn), drawn, order=order, device=device, generator=generator)
        own_blocks = model.config.num_blocks(tokens)
        noise.token_noise[row, scored.valid[row]] = own.token_noise[0, :tokens]
        noise.block_noise[row, :own_blocks] = own.block_noise[0, :own_blocks]
        noise.count_noise[row, :own_blocks] = own.count_noise[0, :own_blocks]
    return noise


def _sum_over_masks(
    model: BD3LMLanguageModel, input_ids: torch.Tensor, layout: Layout, draws: Iterator[Mask]
) -> torch.Tensor:
    """Sum of weighted losses over draws, `(batch, length)`."""
    nll = torch.zeros(input_ids.shape, device=input_ids.device)
    for draw, losses in mask_losses(model, input_ids, layout, draws):
        nll += losses * draw.weights
    return nll


def mask_losses(
    model: BD3LMLanguageModel, input_ids: torch.Tensor, layout: Layout, draws: Iterator[Mask]
) -> Iterator[tuple[Mask, torch.Tensor]]:
    """-log p(x_0 | x_t) of the tokens that each draw masks, `(batch, length)`, zero elsewhere; without weights.

    The clean stream is computed once for all draws, unless the model is time-conditioned. To be iterated without
    gradients.
    """
    batch, length = input_ids.shape
    conditioned, lone = model.config.time_conditioning, model.config.num_blocks(length) == 1
    cache = None if conditioned or lone else model.clean_cache(input_ids, layout)
    group_size = 1 if conditioned else max(1, _TOKEN_BUDGET // (batch * length))
    for group in _grouped(draws, group_size):
        masked = torch.stack([draw.masked for draw in group], dim=1)
        rows = masked.flatten().nonzero().squeeze(1)
        x_t = torch.where(masked, model.config.mask_token_id, input_ids.unsqueeze(1)).flatten(1)
        sigma = sigma_of(model.config, group[0].move_chance)
        hidden = model.noisy_hidden(x_t, input_ids, layout, rows, sigma, cache=cache, num_noise_samples=len(group))
        # Rows of (batch, draw, position) belong to the token (batch, position).
        token = rows // (len(group) * length) * length + rows % length
        losses = torch.zeros(masked.numel(), device=input_ids.device)
        losses[rows] = cross_entropy(
            hidden, model.get_output_embeddings(), input_ids.flatten()[token], model.config.mask_token_id
        )
        yield from zip(group, losses.view(masked.shape).unbind(1), strict=True)


def _grouped(draws: Iterator[Mask], size: int) -> Iterator[list[Mask]]:
    group: list[Mask] = []
    for draw in draws:
        group.append(draw)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


__all__ = [
    "MAX_EXACT_TOKENS",
    "Generators",
    "Mask",
    "Source",
    "TokenNLL",
    "check_sampling",
    "mask_losses",
    "rows_of_noise",
    "source_of",
    "stratified_masks",
    "token_nll",
]
