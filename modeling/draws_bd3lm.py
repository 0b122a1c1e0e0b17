"""How a token is drawn: the distribution function, inverted, and the published categorical draw beside it."""

from collections.abc import Sequence

import torch


# Precision of the probabilities that tokens are drawn from, by the name that a generation config gives it.
SAMPLING_DTYPES = {"float32": torch.float32, "float64": torch.float64}

Generators = torch.Generator | list[torch.Generator] | None  # a source of randomness, or one per row


def wide_float(device: torch.device) -> torch.dtype:
    """float64, as in the published samplers, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def random_uniform(shape: Sequence[int], device: torch.device, generator: Generators = None) -> torch.Tensor:
    """Uniform numbers on [0, 1), as wide as possible, drawn where the generator lives and needed on `device`.

    With a generator for each row of `shape`, a row gets the numbers that it would get alone.
    """
    if isinstance(generator, list):
        return torch.stack([random_uniform(shape[1:], device, source) for source in generator])
    home = device if generator is None else generator.device
    drawn = torch.rand(tuple(shape), generator=generator, device=home, dtype=wide_float(home))
    return drawn.to(device, wide_float(device), non_blocking=device.type != "cpu")


def check_sources(generator: Generators, batch: int) -> None:
    """Refuse a list of generators that does not have one for each row.

    Raises:
        ValueError: tells both numbers.
    """
    if isinstance(generator, list) and len(generator) != batch:
        raise ValueError(f"{len(generator)} generators for {batch} rows: give one for each row, or a single one.")


def draw_tokens(scores: torch.Tensor, uniform: torch.Tensor, *, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """One token per row of unnormalised log-probabilities `(rows, vocab_size)`: the distribution function, inverted.

    One uniform number a row instead of one for each token of the vocabulary, which on a CPU is an order of magnitude
    faster than `torch.multinomial` or a Gumbel race. It also lacks their weakness in float32: the smallest number that
    a race can draw bounds its tail, which sharpens the distribution (Zheng et al., arXiv 2409.02908).

    Args:
        uniform: `(rows,)` on [0, 1).
        dtype: of the probabilities; they are summed up in float64 where the device has it. A token of probability
            zero is never drawn.
    """
    probability = scores.to(dtype).softmax(dim=-1)
    wide = wide_float(scores.device)
    cumulative = probability.cumsum(dim=-1, dtype=wide)
    if wide != torch.float64:
        # Sums in parallel may fall or rise by a rounding error where nothing is added: such steps have no height here.
        cumulative = cumulative.masked_fill(probability == 0, 0).cummax(dim=-1).values
    # Below the total even after rounding; from the right, so that the step found has a positive height.
    below = uniform.to(wide).unsqueeze(1) * cumulative[:, -1:] * (1 - 4 * torch.finfo(wide).eps)
    return torch.searchsorted(cumulative, below, right=True).squeeze(1)


def draw_published(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The published categorical draw: the index `(...)` of the largest weight / (1e-10 - log(u + 1e-10)).

    An exponential race with one uniform number per entry, both `(..., vocab_size)`; `draw_tokens` draws from the same
    distribution with one number in all.
    """
    return (weights / (1e-10 - (uniform + 1e-10).log())).argmax(dim=-1)


def token_probability(scores: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The probability `(rows,)` of one token per row under unnormalised log-probabilities `(rows, vocab_size)`."""
    return (scores.gather(1, tokens.unsqueeze(1)).squeeze(1) - scores.logsumexp(dim=-1)).exp()


__all__ = [
    "SAMPLING_DTYPES",
    "Generators",
    "check_sources",
    "draw_published",
    "draw_tokens",
    "random_uniform",
    "token_probability",
    "wide_float",
]
