"""Noise schedules and the forward process q(x_t | x_0), with a noise level per block (arXiv 2503.09573).

A schedule (Table 8) maps a time t in [0, 1] to `move_chance`, the probability 1 - alpha_t that a token is masked, and
to the weight of the token's loss. A training step draws one time t per block, stratified over the batch (Algorithm 1),
from a possibly clipped interval (Sec. 5.2).
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch


def wide_float(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on a device without float64 (MPS)."""
    return torch.float32 if device.type == "mps" else torch.float64


class NoiseLevel(NamedTuple):
    """Masking probability and loss weight at times t; each field has the shape of t."""

    move_chance: torch.Tensor  # probability that a token is masked, 1 - alpha_t
    loss_scaling: torch.Tensor  # factor of log p(x_0 | x_t) in the NELBO, alpha'_t / (1 - alpha_t); negative
    move_rate: torch.Tensor  # d move_chance / dt


class NoiseSchedule:
    """A schedule; calling it with times t of any shape returns a [`NoiseLevel`]."""

    def move_chance(self, t: torch.Tensor) -> torch.Tensor:
        """Return the probability that a token is masked at time t."""
        return t

    def move_rate(self, t: torch.Tensor) -> torch.Tensor:
        """Return the derivative of `move_chance` with respect to t."""
        return torch.ones_like(t)

    def loss_scaling(self, t: torch.Tensor) -> torch.Tensor:
        """Return the weight of log p(x_0 | x_t) in the continuous-time NELBO."""
        return -self.move_rate(t) / self.move_chance(t)

    def __call__(self, t: torch.Tensor) -> NoiseLevel:
        return NoiseLevel(self.move_chance(t), self.loss_scaling(t), self.move_rate(t))


class LogLinearNoise(NoiseSchedule):
    """move_chance = t, hence the weight 1/t of the paper's Eq. 8. `eps` bounds the total noise sigma at t = 1."""

    def __init__(self, eps: float = 1e-3) -> None:
        self.eps = eps

    @property
    def sigma_max(self) -> float:
        """The total noise at t = 1, the cap of `sigma`; 6.9078 for the published eps."""
        return -math.log(self.eps)

    def total_noise(self, t: torch.Tensor) -> torch.Tensor:
        """Return sigma(t) = -log(1 - (1 - eps) t), finite at t = 1."""
        return -torch.log1p(-(1 - self.eps) * t)

    def rate_noise(self, t: torch.Tensor) -> torch.Tensor:
        """Return d sigma / dt."""
        return (1 - self.eps) / (1 - (1 - self.eps) * t)

    def sigma(self, move_chance: torch.Tensor) -> torch.Tensor:
        """Return the noise level that a model is conditioned on, for a masking probability p: -log(1 - p), capped."""
        return (-torch.log1p(-move_chance)).clamp(max=self.sigma_max)


class TotalNoise(LogLinearNoise):
    """The log-linear schedule written in total noise: move_chance = 1 - exp(-sigma(t)) = (1 - eps) t.

    The authors' `mdlm_loss_scale`, used to train MDLM (arXiv 2406.07524) and SEDD; the weight is 1/t again.
    """

    def move_chance(self, t: torch.Tensor) -> torch.Tensor:
        return -torch.expm1(-self.total_noise(t))

    def move_rate(self, t: torch.Tensor) -> torch.Tensor:
        return torch.full_like(t, 1 - self.eps)

    def loss_scaling(self, t: torch.Tensor) -> torch.Tensor:
        return -self.rate_noise(t) / torch.expm1(self.total_noise(t))


class PowerNoise(NoiseSchedule):
    """move_chance = t^exponent, not below eps."""

    def __init__(self, exponent: float, eps: float = 1e-3) -> None:
        self.exponent, self.eps = exponent, eps

    def move_chance(self, t: torch.Tensor) -> torch.Tensor:
        return (t**self.exponent).clamp(min=self.eps)

    def move_rate(self, t: torch.Tensor) -> torch.Tensor:
        # As published, the derivative of t^exponent even where move_chance is clamped to eps.
        return self.exponent * t ** (self.exponent - 1)


class LogarithmicNoise(NoiseSchedule):
    """move_chance = log2(1 + t)."""

    def move_chance(self, t: torch.Tensor) -> torch.Tensor:
        return torch.log1p(t) / math.log(2)

    def move_rate(self, t: torch.Tensor) -> torch.Tensor:
        return 1 / (math.log(2) * (1 + t))


class CosineNoise(NoiseSchedule):
    """move_chance = 1 - (1 - eps) cos(pi t / 2)."""

    def __init__(self, eps: float = 1e-3) -> None:
        self.eps = eps

    def move_chance(self, t: torch.Tensor) -> torch.Tensor:
        return 1 - (1 - self.eps) * torch.cos(t * math.pi / 2)

    def move_rate(self, t: torch.Tensor) -> torch.Tensor:
        return (1 - self.eps) * torch.sin(t * math.pi / 2) * math.pi / 2

    def loss_scaling(self, t: torch.Tensor) -> torch.Tensor:
        # The published weight adds eps to the denominator.
        return -self.move_rate(t) / (self.move_chance(t) + self.eps)


_SCHEDULES: dict[str, NoiseSchedule] = {
    "loglinear": LogLinearNoise(),
    "square": PowerNoise(2.0),
    "square_root": PowerNoise(0.5),
    "log": LogarithmicNoise(),
    "cosine": CosineNoise(),
    "total_noise": TotalNoise(),
}


def noise_schedule(name: str) -> NoiseSchedule:
    """Return the schedule called `name`: `loglinear`, `square`, `square_root`, `log` or `cosine` (paper, Table 8).

    `total_noise` is the log-linear schedule in the form of `mdlm_loss_scale`.

    Raises:
        ValueError: if no schedule has this name.
    """
    if name not in _SCHEDULES:
        raise ValueError(f"noise={name!r} is not a noise schedule: choose one of {', '.join(_SCHEDULES)}.")
    return _SCHEDULES[name]


# A lower bound up to this value counts as the unclipped 1e-3, which is 1.0014e-3 after a cast to bfloat16.
_UNCLIPPED = 1.01e-3


class Noise(NamedTuple):
    """The uniform numbers on [0, 1) that determine the noise of a batch.

    Several noise samples per sequence add an axis after the batch: `(batch, num_noise_samples, num_blocks)`.
    """

    block_noise: torch.Tensor  # (batch, num_blocks), becomes the time t of each block
    token_noise: torch.Tensor  # (batch, length), a token is masked where it is at most move_chance
    count_noise: torch.Tensor  # (batch, num_blocks), gives the number of masked tokens where mask rates are truncated

    def num_noise_samples(self) -> int:  # no property: torch before 2.11 cannot compile it in a named tuple
        """Return the number of noise samples per sequence."""
        return self.block_noise.shape[1] if self.block_noise.dim() == 3 else 1

    def side_by_side(self) -> "Noise":
        """Return the noise samples of a sequence as one long row, `(batch, num_noise_samples * num_blocks)`."""
        return Noise(*(field.flatten(1) for field in self))


def noise_from_arguments(
    block_noise: torch.Tensor | None,
    token_noise: torch.Tensor | None,
    count_noise: torch.Tensor | None,
    shape: torch.Size,
    config: Any,
) -> Noise | None:
    """Return the noise that a caller passed for a batch of `shape` (batch, length), or None if there is none.

    Its shape, not `config.noise_draws`, sets the number of noise samples.

    Raises:
        ValueError: if a part is missing (`count_noise` only under `config.resample`) or has the wrong shape.
    """
    if block_noise is None and token_noise is None and count_noise is None:
        return None
    lead: tuple[int, ...] = (shape[0],)
    if block_noise is not None and block_noise.dim() == 3 and block_noise.shape[1]:
        lead = (shape[0], block_noise.shape[1])
    blocks, tokens = (*lead, config.num_blocks(shape[1])), (*lead, shape[1])
    if block_noise is not None and count_noise is None and not config.resample:
        count_noise = torch.zeros_like(block_noise)  # read only when the mask rate is truncated
    noise = Noise(block_noise, token_noise, count_noise)  # type: ignore[arg-type]
    for name, field, expected in zip(Noise._fields, noise, (blocks, tokens, blocks), strict=True):
        if field is None:
            raise ValueError(f"{name} is missing: pass all noise of a loss (see draw_noise), or none.")
        if tuple(field.shape) != expected:
            raise ValueError(f"{name} of shape {tuple(field.shape)} does not fit this batch: pass {expected}.")
    return noise


def check_noise_samples(num_noise_samples: int, time_conditioning: bool) -> None:
    """Refuse several noisy streams that cannot share a clean one.

    Raises:
        ValueError: if there are several and the clean stream depends on the noise level.
    """
    if num_noise_samples > 1 and time_conditioning:
        raise ValueError(
            f"noise_draws={num_noise_samples} needs time_conditioning=False: here the noise level also changes the "
            f"clean stream, so noise samples cannot share it. Set noise_draws=1 and use larger batches."
        )


def draw_noise(
    batch_size: int,
    num_blocks: int,
    length: int,
    *,
    num_noise_samples: int = 1,
    order: str = "shuffled",
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> Noise:
    """Draw the noise of one batch, its block noise stratified over all blocks of the batch (Algorithm 1).

    The numbers are drawn on the generator's device, by default the CPU, and then moved: a seed gives the same noise
    on every device.

    Args:
        num_noise_samples: noise samples per sequence, stratified too unless `order` is `"none"`, see [`stack_noise`].
        order: `"shuffled"` gives each block a random stratum; `"published"` assigns the strata in row-major order, so
            that row k has all its levels in [k / batch, (k + 1) / batch); `"none"` draws independently.
        generator: source of randomness; by default torch's global one on the CPU.
    """
    # A CUDA generator and a CPU one give different numbers for the same seed, so the default is always the CPU.
    home = torch.device("cpu") if generator is None else generator.device

    def uniform(size: int) -> torch.Tensor:
        return torch.rand((batch_size, size), device=home, **_source(generator))

    samples = []
    for _ in range(num_noise_samples):
        block_noise = stratify(uniform(num_blocks), order=order, generator=generator)
        samples.append(Noise(block_noise, uniform(length), uniform(num_blocks)))
    noise = stack_noise(samples, spread=order != "none")
    return Noise(*(field.to(device, non_blocking=True) for field in noise))


def stack_noise(samples: Sequence[Noise], *, spread: bool = True) -> Noise:
    """Stack several noise samples of a batch along a new axis; return a single one unchanged.

    Args:
        spread: move the block noise of the d-th of n samples into [d / n, (d + 1) / n). Every block then has one time
            in each n-th of the interval, and the strata of n batches of N blocks become n * N strata, each hit once:
            the mean over samples varies less than that of independent ones.
    """
    count = len(samples)
    if count == 1:
        return samples[0]
    noise = Noise(*(torch.stack(field, dim=1) for field in zip(*samples, strict=True)))
    if not spread:
        return noise
    first = torch.arange(count, device=noise.block_noise.device).unsqueeze(1)
    return noise._replace(block_noise=(noise.block_noise + first) / count)


def stratify(
    uniform: torch.Tensor, *, order: str = "shuffled", generator: torch.Generator | None = None
) -> torch.Tensor:
    """Spread independent numbers on [0, 1) over N = numel strata of width 1/N, one number in each stratum.

    Every number stays uniform on [0, 1); their mean has a much lower variance. See [`draw_noise`] for `order`.
    """
    count = uniform.numel()
    if order == "none":
        return uniform
    if order == "published":
        strata = torch.arange(count, device=uniform.device)
    else:
        strata = torch.randperm(count, device=uniform.device, **_source(generator))
    # Dividing before adding follows the published arithmetic. Rounding in float32 can give 1, which is a valid time.
    return uniform / count + strata.view_as(uniform) / count


def _source(generator: torch.Generator | None) -> dict[str, Any]:
    """Return the keyword `generator`, omitted if None, which fails in compiled code of varying lengths."""
    return {} if generator is None else {"generator": generator}


def times(uniform: torch.Tensor, low: float | torch.Tensor, high: float | torch.Tensor) -> torch.Tensor:
    """Map numbers on [0, 1) to times t in [low, high], of the same shape; the interval [1, 1] gives ones."""
    return uniform * (high - low) + low


def per_token(per_block: torch.Tensor, block_ids: torch.Tensor) -> torch.Tensor:
    """Expand values of blocks `(batch, num_blocks)` to tokens, given block indices `(batch or 1, length)`."""
    return per_block.gather(1, block_ids.expand(per_block.shape[0], -1))


def tokens_per_block(tokens: torch.Tensor, block_ids: torch.Tensor, num_blocks: int) -> torch.Tensor:
    """Count the tokens, bool `(batch, length)`, in each block; float32 `(batch, num_blocks)`."""
    sizes = torch.zeros(tokens.shape[0], num_blocks, device=tokens.device)
    return sizes.scatter_add_(1, block_ids.expand(tokens.shape[0], -1), tokens.float())


def mask_positions(noise: Noise, move_chance: torch.Tensor, block_ids: torch.Tensor) -> torch.Tensor:
    """Return the positions that q(x_t | x_0) masks, bool `(batch, length)`, each with its block's probability.

    Args:
        move_chance: masking probability of each block, `(batch, num_blocks)`.
        block_ids: block index of each token, `(batch or 1, length)`.
    """
    return noise.token_noise <= per_token(move_chance, block_ids)


def mask_positions_within(
    noise: Noise,
    move_chance: torch.Tensor,
    block_ids: torch.Tensor,
    valid: torch.Tensor,
    low: float,
    high: float,
    *,
    block_size: int,
) -> torch.Tensor:
    """Return masked positions as [`mask_positions`] does, but with a masked fraction in [low, high] in every block.

    The published code redraws a block until it fits. The number of masked tokens in a block is binomial, and given the
    number every subset is equally likely. So drawing the number from the truncated binomial, then a uniform subset of
    that size, gives the same distribution in one try. A bound at the end of the unclipped interval (low <= 1e-3,
    high = 1) is not enforced, as published. A shorter last block can exceed the bounds by rounding.

    Args:
        valid: bool `(batch, length)`, False for padding, which belongs to no block.
        low, high: bounds of the masked fraction, see [`check_interval`].
        block_size: the largest number of tokens in a block.
    """
    sizes = tokens_per_block(valid, block_ids, move_chance.shape[1])
    # Inverse transform sampling: the count is the number of steps of the CDF that the uniform number has passed.
    cdf = count_probabilities(move_chance, sizes, low, high, max_size=block_size).cumsum(-1)
    count = (cdf <= noise.count_noise.to(cdf).unsqueeze(-1)).sum(-1).clamp(max=cdf.shape[-1] - 1)
    return random_subset(noise, count, block_ids, valid)


def random_subset(noise: Noise, count: torch.Tensor, block_ids: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
    """Return a uniform subset of `count` `(batch, num_blocks)` tokens of each block, bool `(batch, length)`."""
    rank = rank_in_block(noise.token_noise, block_ids, among, count.shape[1])
    return (rank < per_token(count, block_ids)) & among


def mask_exact_numbers(
    noise: Noise, block_ids: torch.Tensor, maskable: torch.Tensor, low: float, high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mask exactly k of the n maskable tokens of a block, k uniform on 1..n, with the weight n / k.

    The expectation is that of independent masks with the weight 1/t, since the integral of
    1/t C(n, k) t^k (1 - t)^(n - k) over t is 1/k. Every block has a masked token, no weight exceeds n, and k is
    stratified like the times. On a clipped interval k is t n rounded up, and if the interval starts above 0.5 the
    weight is 1, as for independent masks.

    Args:
        maskable: bool `(batch, length)`.

    Returns:
        bool `(batch, length)`, and the weight of each position's loss `(batch, length)`.
    """
    sizes = tokens_per_block(maskable, block_ids, noise.block_noise.shape[1])
    # On the whole interval the share is the uniform number itself, so that k is uniform on 1..n.
    share = times(noise.block_noise, low, high) if clips(low, high) else noise.block_noise
    count = torch.minimum((share * sizes).floor() + 1, sizes)
    weights = torch.ones_like(sizes) if low > 0.5 else sizes / count.clamp(min=1)
    return random_subset(noise, count, block_ids, maskable), per_token(weights, block_ids)


def rank_in_block(noise: torch.Tensor, block_ids: torch.Tensor, among: torch.Tensor, num_blocks: int) -> torch.Tensor:
    """Rank the numbers of the tokens `among` within each block, smallest first; all `(batch, length)`."""
    batch, length = noise.shape
    block_ids = block_ids.expand(batch, -1)
    # Sorted by number, then stably by block; tokens not in `among` come last in their block.
    order = torch.where(among, noise, 2.0).argsort(dim=1, stable=True)
    order = order.gather(1, block_ids.gather(1, order).argsort(dim=1, stable=True))
    sizes = torch.zeros(batch, num_blocks, dtype=torch.long, device=noise.device)
    sizes.scatter_add_(1, block_ids, torch.ones_like(block_ids))
    # Offset of each block in the sorted row: its tokens are contiguous there.
    first = sizes.cumsum(1) - sizes
    position = torch.arange(length, device=noise.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, position - per_token(first, block_ids.gather(1, order)))


def count_probabilities(
    move_chance: torch.Tensor, sizes: torch.Tensor, low: float, high: float, *, max_size: int
) -> torch.Tensor:
    """Return the probability that k of a block's tokens are masked, conditioned on a masked fraction in [low, high].

    Args:
        move_chance: masking probability of each block, `(batch, num_blocks)`.
        sizes: tokens of each block, `(batch, num_blocks)`.
        low, high: bounds as in [`mask_positions_within`]; 0 and 1 give the plain binomial.
        max_size: the largest size, passed to avoid reading one back from a device.

    Returns:
        `(batch, num_blocks, max_size + 1)` over k = 0, 1, ..., float64 where the device has it.
    """
    wide = wide_float(sizes.device)
    n = sizes.to(wide).unsqueeze(-1)
    k = torch.arange(max_size + 1, device=sizes.device, dtype=wide)
    tiny = 1e-12 if wide == torch.float64 else 1e-7
    p = move_chance.to(wide).clamp(tiny, 1 - tiny).unsqueeze(-1)
    # In logarithms, as the factorials of a block of 1024 tokens overflow.
    log_pmf = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma((n - k).clamp(min=0) + 1)
    log_pmf = log_pmf + k * p.log() + (n - k) * torch.log1p(-p)
    # Float32 end points such as 0.3 must not lose the k that equals them exactly.
    minimum = torch.ceil(low * n - 1e-6) if low > _UNCLIPPED else torch.zeros_like(n)
    maximum = torch.floor(high * n + 1e-6) if high < 1 else n
    # A short last block may have no count within the bounds: then the counts next to them are allowed.
    empty = minimum > maximum
    minimum, maximum = torch.where(empty, maximum, minimum), torch.where(empty, minimum, maximum)
    return log_pmf.masked_fill((k < minimum) | (k > maximum) | (k > n), -torch.inf).softmax(-1)


def clips(low: float, high: float) -> bool:
    """Return whether an interval of noise levels leaves out part of the full one, [1e-3, 1]."""
    return low > _UNCLIPPED or high < 1


def check_interval(low: float, high: float, block_size: int, *, truncated: bool) -> None:
    """Refuse an interval from which training cannot draw noise levels.

    Args:
        truncated: the mask rate of every block must be in the interval (`config.resample`).

    Raises:
        ValueError: if the interval is reversed, not within [0, 1], ends at 0, or, if `truncated`, contains no
            k / block_size.
    """
    if not 0.0 <= low <= high <= 1.0 or high == 0.0:
        raise ValueError(
            f"sampling_eps_min={low}, sampling_eps_max={high} is not an interval of noise levels: give "
            f"0 <= sampling_eps_min <= sampling_eps_max <= 1 with sampling_eps_max > 0."
        )
    minimum = math.ceil(low * block_size - 1e-6) if low > _UNCLIPPED else 0
    maximum = math.floor(high * block_size + 1e-6) if high < 1 else block_size
    if truncated and minimum > maximum:
        raise ValueError(
            f"the interval [{low}, {high}] contains no mask rate k / {block_size}: widen it, or set resample=False."
        )
