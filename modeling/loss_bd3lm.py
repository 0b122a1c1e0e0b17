"""The negative evidence lower bound of block diffusion, per token (arXiv 2503.09573, Eq. 8 and Algorithm 1).

For a block x_0^b given the clean blocks before it,

    -log p(x_0^b | x_0^<b)  <=  E_t E_{x_t}  w(t) * sum over masked positions of -log p(x_0 | x_t^b, x_0^<b),

with w(t) = alpha'_t / (1 - alpha_t), which is 1/t for the log-linear schedule. SUBS parameterisation: the mask token
has probability zero, and unmasked tokens are carried over, so they add nothing.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from transformers.configuration_utils import PreTrainedConfig

from .attention_bd3lm import Layout, token_layout
from .head_bd3lm import cross_entropy, weighted_cross_entropy
from .noise_bd3lm import (
    LogLinearNoise,
    Noise,
    clips,
    draw_noise,
    mask_positions,
    mask_positions_within,
    noise_schedule,
    per_token,
    rank_in_block,
    times,
)
from .streams_bd3lm import clean_cache, noisy_hidden


if TYPE_CHECKING:
    from .modeling_bd3lm import BD3LMForMaskedLM

Generators = torch.Generator | list[torch.Generator] | None  # a source of randomness, or one per row

_EPS = 1e-3  # the published objective integrates t over [1e-3, 1]
_MAX_EXACT_BLOCK = 8
_TOKEN_BUDGET = 2**14  # noisy tokens of one pass when scoring


class TokenNLL(NamedTuple):
    """A bound on the negative log-likelihood of each token; `nll.sum() / mask.sum()` is the mean in nats."""

    nll: torch.Tensor  # float32 (batch, length), nats, zero where mask is zero
    mask: torch.Tensor  # float32 (batch, length), 1 where a token is scored


class Scored(NamedTuple):
    """Which tokens of a batch take part in the loss; all bool `(batch, length)`."""

    counted: torch.Tensor  # in the denominator of the mean
    maskable: torch.Tensor  # may be masked
    valid: torch.Tensor  # no padding


def denoising_loss(
    model: "BD3LMForMaskedLM",
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    noise: Noise | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """The objective of Algorithm 1 in nats per token: a scalar with a gradient.

    1. Which tokens count: labels other than -100. The first token of a sequence is never masked under
       `config.ignore_bos`; as published it still counts in the mean of training, not in that of evaluation.
    2. A time t for each block, from the model's interval in train mode, from [1e-3, 1] in eval mode.
    3. x_t, and the logits of its masked positions only.
    4. The weighted cross-entropy, divided by the number of counted tokens or by `num_items_in_batch`.

    With an interval [beta, omega] other than [1e-3, 1] the value is no bound: it covers only a part of the noise
    levels, and its weight is as published, not as in the paper. There a clipped schedule has mask rates
    beta + (omega - beta) t for t over [0, 1], so alpha' is a constant of the interval (Sec. 5.2 states it as
    1/(beta - omega)) and scales all weights alike. The published code leaves this constant out: the weight stays w(t),
    and is 1 throughout when the interval starts above 0.5. One constant for all tokens changes no minimum, and Adam
    divides it out again; it does change the size of the loss, and of the gradient that `max_grad_norm` is compared
    with.
    """
    config = model.config
    check_text(model, input_ids, labels)
    # 1. Which tokens count
    layout = token_layout(attention_mask, input_ids.shape[1], config.block_size, device=input_ids.device)
    scored = scored_tokens(layout, labels, ignore_bos=config.ignore_bos, training=model.training)
    # 2. and 3. Noise, logits of the masked positions
    low, high = _interval(model)
    masked, weights, move_chance = corrupt(model, layout, scored, noise, low, high)
    rows = masked.flatten().nonzero().squeeze(1)
    x_t = torch.where(masked, config.mask_token_id, input_ids)
    hidden = noisy_hidden(model, x_t, input_ids, layout, rows, _sigma(config, move_chance))
    # 4. Weighted cross-entropy
    targets, coefficients = labels.flatten()[rows], weights.flatten()[rows]
    total = weighted_cross_entropy(hidden, model.get_output_embeddings(), targets, coefficients, config.mask_token_id)
    count = scored.counted.sum() if num_items_in_batch is None else num_items_in_batch
    return total / (count.clamp(min=1) if isinstance(count, torch.Tensor) else max(count, 1))


def scored_tokens(layout: Layout, labels: torch.Tensor, *, ignore_bos: bool, training: bool) -> Scored:
    """Which tokens count and which may be masked, from labels `(batch, length)` and padding."""
    valid = torch.ones_like(labels, dtype=torch.bool) if layout.valid is None else layout.valid
    counted = (labels != -100) & valid
    if not ignore_bos:
        return Scored(counted, counted, valid)
    later = counted & (layout.position_ids > 0)
    return Scored(counted if training else later, later, valid)


def corrupt(
    model: "BD3LMForMaskedLM",
    layout: Layout,
    scored: Scored,
    noise: Noise | None,
    low: float,
    high: float,
    *,
    training: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw the masked positions of a batch.

    Args:
        training: whether `config.resample` confines the mask rates, as it does in training; the model's mode by
            default.

    Returns:
        bool `(batch, length)`, masked positions; `(batch, length)`, weight of each position's loss; `(batch,
        num_blocks)`, masking probabilities.
    """
    config = model.config
    batch, length = scored.counted.shape
    device = scored.counted.device
    if noise is None:
        blocks = config.num_blocks(length)
        noise = draw_noise(batch, blocks, length, order=config.antithetic_sampling, device=device)
    level = noise_schedule(config.noise)(times(noise.block_noise.to(device), low, high))
    confined = config.resample and (model.training if training is None else training) and clips(low, high)
    if confined:
        masked = mask_positions_within(noise, level.move_chance, layout.block_ids, scored.valid, low, high)
    else:
        masked = mask_positions(noise, level.move_chance, layout.block_ids)
    weights = torch.ones_like(level.move_chance) if low > 0.5 else -level.loss_scaling
    return masked & scored.maskable, per_token(weights, layout.block_ids), level.move_chance


def token_nll(
    model: "BD3LMForMaskedLM",
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    labels: torch.Tensor | None = None,
    estimator: str = "sampled",
    num_samples: int = 1,
    generator: torch.Generator | list[torch.Generator] | None = None,
) -> TokenNLL:
    r"""Bound on the negative log-likelihood of every token of a text.

    All estimators have the expectation of Eq. 8 with t over (0, 1], which does not depend on the noise schedule: given
    that k of the n maskable tokens of a block are masked, all \\(\binom{n}{k}\\) masks are equally likely, and
    \\(\int_0^1 \frac1t \binom nk t^k (1-t)^{n-k} dt = \frac1k\\). So a mask with k tokens has the weight
    \\(1 / (k \binom nk)\\).

    - `"sampled"`, the paper's: t stratified over the blocks of the batch on [1e-3, 1], weight 1/t, `num_samples`
      draws.
    - `"stratified"`: k uniform on 1..n, a uniform mask of that size, weight n/k. Unbiased because k has probability
      1/n instead of weight 1/k. No draw is wasted on an empty mask and no weight exceeds n, so the variance is lower.
      The draws of one block spread k over 1..n.
    - `"exact"`: the sum over all 2^n - 1 masks of each block; no randomness.

    The clean stream is computed once for all draws. A model of block size 1 has a single mask per block, so every
    estimator gives its exact autoregressive likelihood.

    Args:
        input_ids: `(batch, length)`, of any length.
        attention_mask: `(batch, length)`, zeros for padding on either side.
        labels: `(batch, length)`; -100 marks context, which is neither masked nor scored. Default: score everything.
        num_samples: draws per block, for the two random estimators.
        generator: source of randomness, or one per row, which makes a row's draws independent of its batch.

    Raises:
        ValueError: unknown estimator, `num_samples` below 1, a block too large for the exact sum, ids outside the
            vocabulary, mask tokens in the text.
    """
    _check_estimator(model, estimator, num_samples, generator, input_ids.shape[0])
    labels = input_ids if labels is None else labels
    check_text(model, input_ids, labels)
    config = model.config
    layout = token_layout(attention_mask, input_ids.shape[1], config.block_size, device=input_ids.device)
    scored = scored_tokens(layout, labels, ignore_bos=config.ignore_bos, training=False)
    draws = _ESTIMATORS[estimator](model, layout, scored, num_samples, generator)
    with torch.no_grad():
        nll = _sum_over_masks(model, input_ids, layout, draws)
    return TokenNLL(nll, scored.counted.float())


def _check_estimator(
    model: "BD3LMForMaskedLM", estimator: str, num_samples: int, generator: Generators, batch: int
) -> None:
    if estimator not in _ESTIMATORS:
        raise ValueError(f"estimator={estimator!r} is unknown: choose one of {', '.join(_ESTIMATORS)}.")
    if num_samples < 1:
        raise ValueError(f"num_samples={num_samples}: give at least 1.")
    if isinstance(generator, list) and len(generator) != batch:
        raise ValueError(f"{len(generator)} generators for {batch} rows: give one for each row, or a single one.")
    size = model.config.block_size
    if estimator == "exact" and size > _MAX_EXACT_BLOCK:
        raise ValueError(
            f"estimator='exact' at block_size={size} needs 2^{size} - 1 passes; the limit is block size "
            f"{_MAX_EXACT_BLOCK}, {2**_MAX_EXACT_BLOCK - 1} passes. Use estimator='stratified' with num_samples."
        )
    if estimator != "sampled" and model.config.time_conditioning:
        raise ValueError(
            f"estimator={estimator!r} sums over masks of all noise levels at once, but this model has "
            f"time_conditioning=True: use estimator='sampled'."
        )


class Mask(NamedTuple):
    """One draw for every block of a batch."""

    masked: torch.Tensor  # bool (batch, length)
    weights: torch.Tensor  # (batch, length), weight of each position's loss, the share of this draw included
    move_chance: torch.Tensor | None  # (batch, num_blocks), for time conditioning


def _sampled(
    model: "BD3LMForMaskedLM", layout: Layout, scored: Scored, num_samples: int, generator: Generators
) -> Iterator[Mask]:
    """Draws of t on [1e-3, 1] as published; a single full mask at block size 1."""
    config = model.config
    if config.block_size == 1:
        yield Mask(scored.maskable, scored.maskable.float(), None)
        return
    order = config.antithetic_sampling
    for _ in range(num_samples):
        noise = rows_of_noise(model, scored, order, generator)
        level = noise_schedule(config.noise)(times(noise.block_noise, _EPS, 1.0))
        masked = mask_positions(noise, level.move_chance, layout.block_ids) & scored.maskable
        weights = per_token(-level.loss_scaling, layout.block_ids) / num_samples
        yield Mask(masked, weights, level.move_chance)


def stratified_masks(
    model: "BD3LMForMaskedLM", layout: Layout, scored: Scored, num_samples: int, generator: Generators
) -> Iterator[Mask]:
    """Draws of the number k of masked tokens, spread over 1..n; weight n/k."""
    batch, length = scored.counted.shape
    blocks = model.config.num_blocks(length)
    device = scored.counted.device
    block_ids = layout.block_ids.expand(batch, -1)
    sizes = torch.zeros(batch, blocks, device=device).scatter_add_(1, block_ids, scored.maskable.float())
    shift = rows_of_noise(model, scored, "none", generator).block_noise
    for sample in range(num_samples):
        noise = rows_of_noise(model, scored, "shuffled", generator)
        # A single draw is stratified over the blocks of the batch; several are spread evenly over each block's 1..n.
        place = noise.block_noise if num_samples == 1 else (sample + shift) / num_samples
        chosen = torch.minimum((place * sizes).floor() + 1, sizes)
        masked = rank_in_block(noise.token_noise, block_ids, scored.maskable) < per_token(chosen, block_ids)
        weights = sizes / chosen.clamp(min=1) / num_samples
        yield Mask(masked & scored.maskable, per_token(weights, block_ids), None)


def _exact(
    model: "BD3LMForMaskedLM", layout: Layout, scored: Scored, num_samples: int, generator: Generators
) -> Iterator[Mask]:
    """Every mask of a block once, with the weight 1 / (k C(n, k))."""
    size, (batch, length) = model.config.block_size, scored.counted.shape
    blocks = model.config.num_blocks(length)
    block_ids = layout.block_ids.expand(batch, -1)
    place = (layout.position_ids % size).expand(batch, -1)

    def count(tokens: torch.Tensor) -> torch.Tensor:
        zeros = torch.zeros(batch, blocks, device=tokens.device, dtype=torch.float64)
        return zeros.scatter_add_(1, block_ids, tokens.double())

    n = count(scored.maskable)
    for pattern in range(1, 2**size):
        picked = (torch.tensor(pattern, device=place.device) >> place) & 1 > 0
        masked = picked & scored.maskable
        k = count(masked)
        log_binomial = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
        weights = torch.where(k > 0, (-log_binomial).exp() / k.clamp(min=1), 0.0)
        # A pattern that picks a token which may not be masked equals one that does not pick it: count it once.
        wanted = torch.full_like(k, bin(pattern).count("1"))
        weights = torch.where(k == wanted, weights, 0.0)
        masked = masked & (per_token(weights, block_ids) > 0)
        yield Mask(masked, per_token(weights, block_ids).float(), None)


_ESTIMATORS = {"sampled": _sampled, "stratified": stratified_masks, "exact": _exact}


def rows_of_noise(model: "BD3LMForMaskedLM", scored: Scored, order: str, generator: Generators) -> Noise:
    """Noise of a batch; with a generator per row, a row's draws are those it would get alone and without padding."""
    batch, length = scored.valid.shape
    device, blocks = scored.valid.device, model.config.num_blocks(length)
    if not isinstance(generator, list):
        return draw_noise(batch, blocks, length, order=order, device=device, generator=generator)
    noise = Noise(*(torch.zeros(batch, size, device=device) for size in (blocks, length, blocks)))
    for row, source in enumerate(generator):
        tokens = int(scored.valid[row].sum())
        own = draw_noise(1, model.config.num_blocks(tokens), tokens, order=order, device=device, generator=source)
        noise.token_noise[row, scored.valid[row]] = own.token_noise[0]
        noise.block_noise[row, : own.block_noise.shape[1]] = own.block_noise[0]
        noise.count_noise[row, : own.count_noise.shape[1]] = own.count_noise[0]
    return noise


def _sum_over_masks(
    model: "BD3LMForMaskedLM", input_ids: torch.Tensor, layout: Layout, draws: Iterator[Mask]
) -> torch.Tensor:
    """Sum of weighted losses over draws, `(batch, length)`."""
    nll = torch.zeros(input_ids.shape, device=input_ids.device)
    for draw, losses in mask_losses(model, input_ids, layout, draws):
        nll += losses * draw.weights
    return nll


def mask_losses(
    model: "BD3LMForMaskedLM", input_ids: torch.Tensor, layout: Layout, draws: Iterator[Mask]
) -> Iterator[tuple[Mask, torch.Tensor]]:
    """-log p(x_0 | x_t) of the tokens that each draw masks, `(batch, length)`, zero elsewhere; weights are not applied.

    The clean stream is computed once for all draws, unless the model is time-conditioned. To be iterated without
    gradients.
    """
    batch, length = input_ids.shape
    cache = None if model.config.time_conditioning else clean_cache(model, input_ids, layout)
    group_size = 1 if cache is None else max(1, _TOKEN_BUDGET // (batch * length))
    for group in _grouped(draws, group_size):
        masked = torch.stack([draw.masked for draw in group], dim=1)
        rows = masked.flatten().nonzero().squeeze(1)
        x_t = torch.where(masked, model.config.mask_token_id, input_ids.unsqueeze(1)).flatten(1)
        sigma = _sigma(model.config, group[0].move_chance)
        hidden = noisy_hidden(model, x_t, input_ids, layout, rows, sigma, cache=cache, draws=len(group))
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


def _interval(model: "BD3LMForMaskedLM") -> tuple[float, float]:
    if model.training:
        return model.interval()
    # At block size 1 a full mask is the whole bound: the exact autoregressive likelihood.
    return (1.0, 1.0) if model.config.block_size == 1 else (_EPS, 1.0)


def _sigma(config: PreTrainedConfig, move_chance: torch.Tensor | None) -> torch.Tensor | None:
    """The noise level of a sequence, as published that of its first block."""
    if not config.time_conditioning or move_chance is None:
        return None
    return LogLinearNoise().sigma(move_chance[:, 0])


def check_token_ids(input_ids: torch.Tensor | None, vocab_size: int, name: str) -> None:
    """Refuse ids outside the vocabulary while the error can still be understood.

    On an accelerator the look would cost a synchronisation per step, and the device's own assertion catches it.

    Raises:
        ValueError: an id below 0 or not below `vocab_size`.
    """
    if input_ids is None or torch.compiler.is_compiling() or input_ids.device.type != "cpu" or not input_ids.numel():
        return
    low, high = int(input_ids.min()), int(input_ids.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"{name} holds the id {low if low < 0 else high}, outside the vocabulary of {vocab_size} ids (0 to "
            f"{vocab_size - 1}): use the tokenizer that the model was trained with."
        )


def check_text(model: "BD3LMForMaskedLM", input_ids: torch.Tensor, labels: torch.Tensor) -> None:
    """Refuse what cannot be scored. Skipped on accelerators and under compilation, where a look would synchronise.

    Raises:
        ValueError: ids outside the vocabulary, labels of another shape, mask tokens to be predicted.
    """
    if labels.shape != input_ids.shape:
        raise ValueError(
            f"labels of shape {tuple(labels.shape)} do not match input_ids of shape {tuple(input_ids.shape)}."
        )
    if torch.compiler.is_compiling() or input_ids.device.type != "cpu":
        return
    mask = model.config.mask_token_id
    check_token_ids(input_ids, model.config.vocab_size, "input_ids")
    check_token_ids(labels[labels != -100], model.config.vocab_size, "labels")
    if (labels == mask).any():
        raise ValueError(
            f"labels hold mask_token_id={mask}: the model gives the mask no probability, so it cannot be scored. Set "
            f"such labels to -100, or use a tokenizer whose text never contains the mask."
        )


__all__ = [
    "Generators",
    "Mask",
    "Scored",
    "TokenNLL",
    "check_text",
    "check_token_ids",
    "corrupt",
    "denoising_loss",
    "mask_losses",
    "rows_of_noise",
    "scored_tokens",
    "stratified_masks",
    "token_nll",
]
