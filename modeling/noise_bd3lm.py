"""The forward process q(x_t | x_0): a noise level per block, masking (arXiv 2503.09573, Sec. 3 and 5).

A training step draws one time t per block, stratified over the batch (Algorithm 1), from a possibly clipped interval
(Sec. 5.2); a schedule turns it into the probability that a token is masked.
"""

import functools
import hashlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch


_UNCLIPPED = 1.01e-3  # a lower bound up to here is the unclipped 1e-3, also after a cast to bfloat16


class Noise(NamedTuple):
    """The uniform draws on [0, 1) that decide the noise of a batch.

    Several draws for each sequence are one more axis behind the batch: `(batch, draws, num_blocks)` and so on.
    """

    block_noise: torch.Tensor  # (batch, num_blocks), becomes the time t of each block
    token_noise: torch.Tensor  # (batch, length), a token is masked where it is at most move_chance
    count_noise: torch.Tensor  # (batch, num_blocks), number of masked tokens where the mask rate is confined

    @property
    def draws(self) -> int:
        """Draws for each sequence."""
        return self.block_noise.shape[1] if self.block_noise.dim() == 3 else 1

    def side_by_side(self) -> "Noise":
        """The draws of a sequence one behind the other, as noisy streams stand: `(batch, draws * num_blocks)`."""
        return Noise(*(field.flatten(1) for field in self))


def given_noise(
    block_noise: torch.Tensor | None,
    token_noise: torch.Tensor | None,
    count_noise: torch.Tensor | None,
    shape: torch.Size,
    config: Any,
) -> Noise | None:
    """The noise that a caller gave for a batch of `shape` (batch, length), or None where none was given.

    Its shape says how many draws each sequence has, whatever `config.noise_draws` says.

    Raises:
        ValueError: only some of it, or a wrong shape. `count_noise` may be left out unless `config.resample`.
    """
    if block_noise is None and token_noise is None and count_noise is None:
        return None
    lead: tuple[int, ...] = (shape[0],)
    if block_noise is not None and block_noise.dim() == 3 and block_noise.shape[1]:
        lead = (shape[0], block_noise.shape[1])
    blocks, tokens = (*lead, config.num_blocks(shape[1])), (*lead, shape[1])
    if block_noise is not None and count_noise is None and not config.resample:
        count_noise = torch.zeros_like(block_noise)  # read only when the mask rate is confined
    noise = Noise(block_noise, token_noise, count_noise)  # type: ignore[arg-type]
    for name, draw, expected in zip(Noise._fields, noise, (blocks, tokens, blocks), strict=True):
        if draw is None:
            raise ValueError(f"{name} is missing: the noise of a loss is given whole (see draw_noise) or not at all.")
        if tuple(draw.shape) != expected:
            raise ValueError(f"{name} of shape {tuple(draw.shape)} does not fit this batch: give {expected}.")
    return noise


def check_draws(draws: int, time_conditioning: bool) -> None:
    """Refuse several noisy streams that can not share a clean one.

    Raises:
        ValueError: several draws for a model whose clean stream depends on the noise level.
    """
    if draws > 1 and time_conditioning:
        raise ValueError(
            f"noise_draws={draws} needs time_conditioning=False: here the noise level of a draw changes the clean "
            f"stream too, so that draws can not share one. Set noise_draws=1 and use larger batches."
        )


def draw_noise(
    batch_size: int,
    num_blocks: int,
    length: int,
    *,
    draws: int = 1,
    order: str = "shuffled",
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> Noise:
    """Draw the noise of one batch, its block noise stratified over all blocks of the batch (Algorithm 1).

    Args:
        draws: draws for each sequence. Unless `order` is `"none"` they are stratified too, see [`stack_draws`].
        order: `"shuffled"` gives each block a random stratum; `"published"` deals the strata in row-major order, so
            that row k has all its levels in [k / batch, (k + 1) / batch); `"none"` draws independently.
        generator: source of randomness, on `device`; torch's global one by default.
    """

    def uniform(size: int) -> torch.Tensor:
        return torch.rand((batch_size, size), generator=generator, device=device)

    noises = []
    for _ in range(draws):
        block_noise = stratify(uniform(num_blocks), order=order, generator=generator)
        noises.append(Noise(block_noise, uniform(length), uniform(num_blocks)))
    return stack_draws(noises, spread=order != "none")


def stack_draws(noises: Sequence[Noise], *, spread: bool = True) -> Noise:
    """Several draws for each sequence of a batch, from one draw each; a single one is returned as it is.

    Args:
        spread: move the block noise of the d-th of n draws into [d / n, (d + 1) / n). Every block then has one time in
            each n-th of the interval, and the strata of n batches of N blocks become n * N strata, each hit once: the
            mean over draws varies less than that of independent ones.
    """
    count = len(noises)
    if count == 1:
        return noises[0]
    noise = Noise(*(torch.stack(field, dim=1) for field in zip(*noises, strict=True)))
    if not spread:
        return noise
    first = torch.arange(count, device=noise.block_noise.device).unsqueeze(1)
    return noise._replace(block_noise=(noise.block_noise + first) / count)


def stratify(
    uniform: torch.Tensor, *, order: str = "shuffled", generator: torch.Generator | None = None
) -> torch.Tensor:
    """Spread independent draws on [0, 1) over N = numel strata of width 1/N, one draw in each stratum.

    Every draw stays uniform on [0, 1); their mean has a much lower variance. See [`draw_noise`] for `order`.
    """
    count = uniform.numel()
    if order == "none":
        return uniform
    if order == "published":
        strata = torch.arange(count, device=uniform.device)
    else:
        strata = torch.randperm(count, device=uniform.device, generator=generator)
    # Dividing before adding follows the published arithmetic; float32 rounding may reach 1, which is still a time.
    return uniform / count + strata.view_as(uniform) / count


def noise_of_examples(
    indices: Sequence[int], *, seed: int, group_size: int, num_blocks: int, length: int, draws: int = 1
) -> Noise:
    """The noise of training examples, a function of `seed` and each example's global index alone.

    It does not depend on how examples are dealt to batches, processes or accumulation steps, so runs of every layout,
    and resumed runs, see the same masks. Stratification spans `group_size` consecutive indices.

    Args:
        indices: global index of each example, `epoch * examples_per_epoch + place in the epoch's order`.
        group_size: examples of one optimizer step, over all processes.
        draws: draws for each example, stratified as well, see [`stack_draws`]. The first draw takes its random numbers
            from where a single one does.

    Returns:
        [`Noise`] on the CPU with `len(indices)` rows.
    """
    generators = [torch.Generator().manual_seed(_derived_seed(seed, "example", int(index))) for index in indices]
    noises = []
    for draw in range(draws):
        rows = []
        for index, generator in zip(indices, generators, strict=True):
            group, slot = divmod(int(index), group_size)
            strata = _strata_of_group(seed, group, draw, group_size * num_blocks)
            uniform = torch.rand(2 * num_blocks + length, generator=generator)
            block, count, token = uniform.split([num_blocks, num_blocks, length])
            place = block + strata[slot * num_blocks : (slot + 1) * num_blocks]
            rows.append(Noise(place / (group_size * num_blocks), token, count))
        noises.append(Noise(*(torch.stack(field) for field in zip(*rows, strict=True))))
    return stack_draws(noises)


@functools.lru_cache(maxsize=16)
def _strata_of_group(seed: int, group: int, draw: int, count: int) -> torch.Tensor:
    kind = f"group, draw {draw}" if draw else "group"
    return torch.randperm(count, generator=torch.Generator().manual_seed(_derived_seed(seed, kind, group)))


def _derived_seed(seed: int, kind: str, index: int) -> int:
    # Neighbouring seeds of a Mersenne twister give correlated first draws; a hash does not.
    return int.from_bytes(hashlib.sha256(f"{kind}:{seed}:{index}".encode()).digest()[:8], "big") >> 1


def times(uniform: torch.Tensor, low: float | torch.Tensor, high: float | torch.Tensor) -> torch.Tensor:
    """Times t in [low, high] from uniform draws on [0, 1), of the same shape; the interval [1, 1] gives ones."""
    return uniform * (high - low) + low


def per_token(per_block: torch.Tensor, block_ids: torch.Tensor) -> torch.Tensor:
    """Spread values of blocks `(batch, num_blocks)` over tokens, for block indices `(batch or 1, length)`."""
    return per_block.gather(1, block_ids.expand(per_block.shape[0], -1))


def mask_positions(noise: Noise, move_chance: torch.Tensor, block_ids: torch.Tensor) -> torch.Tensor:
    """Which tokens q(x_t | x_0) masks, bool `(batch, length)`: each one independently with its block's probability.

    Args:
        move_chance: masking probability of each block, `(batch, num_blocks)`.
        block_ids: block index of each token, `(batch or 1, length)`.
    """
    return noise.token_noise <= per_token(move_chance, block_ids)


def mask_positions_within(
    noise: Noise, move_chance: torch.Tensor, block_ids: torch.Tensor, valid: torch.Tensor, low: float, high: float
) -> torch.Tensor:
    """Like [`mask_positions`], given that the masked fraction of every block lies in [low, high].

    The published code redraws a block until it fits. The number of masked tokens of a block is binomial, and given the
    number every subset is equally likely; so drawing the number from the binomial confined to the interval, then a
    uniform subset of that size, gives the same distribution in one try. A bound at the end of the unclipped interval
    (low <= 1e-3, high = 1) is not enforced, as published. A shorter last block may exceed the bounds by rounding.

    Args:
        valid: bool `(batch, length)`, tokens that exist; padding belongs to no block.
        low, high: bounds of the masked fraction. See [`check_reachable`].
    """
    batch = noise.token_noise.shape[0]
    block_ids = block_ids.expand(batch, -1)
    blocks = move_chance.shape[1]
    sizes = torch.zeros(batch, blocks, device=move_chance.device).scatter_add_(1, block_ids, valid.float())
    chosen = _confined_binomial(noise.count_noise, move_chance, sizes, low, high)
    rank = rank_in_block(noise.token_noise, block_ids, valid)
    return (rank < per_token(chosen, block_ids)) & valid


def rank_in_block(noise: torch.Tensor, block_ids: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
    """Rank of each token's draw among the tokens `among` of its block, the smallest first; all `(batch, length)`."""
    # Blocks are intervals of the key, so one sort ranks within all of them; tokens left out come last in theirs.
    order = (torch.where(among, noise, 2.0).double() + 4.0 * block_ids).argsort(dim=1)
    sizes = torch.zeros(noise.shape[0], int(block_ids.max()) + 1, dtype=torch.long, device=noise.device)
    sizes.scatter_add_(1, block_ids, torch.ones_like(block_ids))
    first = sizes.cumsum(1) - sizes
    place = torch.arange(noise.shape[1], device=noise.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, place - per_token(first, block_ids.gather(1, order)))


def _confined_binomial(
    uniform: torch.Tensor, chance: torch.Tensor, sizes: torch.Tensor, low: float, high: float
) -> torch.Tensor:
    """Inverse-CDF draw from Binomial(sizes, chance) given low <= k / sizes <= high; all `(batch, blocks)`."""
    cdf = count_probabilities(chance, sizes, low, high).cumsum(-1)
    return (cdf <= uniform.double().unsqueeze(-1)).sum(-1).clamp(max=cdf.shape[-1] - 1)


def count_probabilities(chance: torch.Tensor, sizes: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """Probability that k of a block's tokens are masked, given that the masked fraction lies in [low, high].

    Args:
        chance: masking probability of each block, `(batch, blocks)`.
        sizes: tokens of each block, `(batch, blocks)`.
        low, high: bounds as in [`mask_positions_within`]; 0 and 1 leave the plain binomial.

    Returns:
        float64 `(batch, blocks, sizes.max() + 1)` over k = 0, 1, ...
    """
    n = sizes.double().unsqueeze(-1)
    k = torch.arange(int(sizes.max().item()) + 1, device=sizes.device, dtype=torch.float64)
    p = chance.double().clamp(1e-12, 1 - 1e-12).unsqueeze(-1)
    log_pmf = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma((n - k).clamp(min=0) + 1)
    log_pmf = log_pmf + k * p.log() + (n - k) * torch.log1p(-p)
    # Float32 end points such as 0.3 must not lose the k that equals them exactly.
    least = torch.ceil(low * n - 1e-6) if low > _UNCLIPPED else torch.zeros_like(n)
    most = torch.floor(high * n + 1e-6) if high < 1 else n
    empty = least > most
    least, most = torch.where(empty, most, least), torch.where(empty, least, most)
    return log_pmf.masked_fill((k < least) | (k > most) | (k > n), -torch.inf).softmax(-1)


def clips(low: float, high: float) -> bool:
    """Whether an interval of noise levels leaves out anything of the whole one, [1e-3, 1]."""
    return low > _UNCLIPPED or high < 1


def check_interval(low: float, high: float, block_size: int, *, confined: bool) -> None:
    """Refuse what training can draw no noise level from.

    Args:
        confined: the mask rate of every block shall lie in the interval (`config.resample`).

    Raises:
        ValueError: reversed, not inside [0, 1], or, if confined, met by no mask rate of a block.
    """
    if not 0.0 <= low <= high <= 1.0 or high == 0.0:
        raise ValueError(
            f"sampling_eps_min={low}, sampling_eps_max={high} is no interval of noise levels: give "
            f"0 <= sampling_eps_min <= sampling_eps_max <= 1 with sampling_eps_max > 0."
        )
    if confined:
        check_reachable(low, high, block_size)


def check_reachable(low: float, high: float, block_size: int) -> None:
    """Refuse an interval of mask rates that no number of masked tokens of a block can meet.

    Raises:
        ValueError: no k / block_size lies in [low, high].
    """
    least = math.ceil(low * block_size - 1e-6) if low > _UNCLIPPED else 0
    most = math.floor(high * block_size + 1e-6) if high < 1 else block_size
    if least > most:
        raise ValueError(
            f"the interval [{low}, {high}] holds no mask rate k / {block_size}: widen it, or set resample=False."
        )


__all__ = [
    "Noise",
    "check_draws",
    "check_interval",
    "check_reachable",
    "clips",
    "count_probabilities",
    "draw_noise",
    "given_noise",
    "mask_positions",
    "mask_positions_within",
    "noise_of_examples",
    "per_token",
    "rank_in_block",
    "stack_draws",
    "stratify",
    "times",
]
