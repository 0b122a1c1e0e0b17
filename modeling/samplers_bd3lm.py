"""Which masked position of a block to reveal next.

First-hitting sampling (Zheng et al., arXiv 2409.02908; BD3-LM's default) simulates the reverse process exactly:
masked tokens are hit one at a time, each remaining one equally likely to be next, so a block of b tokens takes b
steps. The order does not depend on any probability, and is drawn before the network runs: its head is needed at one
position only.
"""

import torch


def wide_float(device: torch.device) -> torch.dtype:
    """float64, as in the published samplers, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


class FirstHittingSampler:
    """One masked position per row and step, uniformly chosen."""

    def order(
        self, masked: torch.Tensor, *, random: bool = True, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """The places of a block in the order in which they are revealed, `(batch, block_size)`.

        Places that are not masked come last. Any fixed order is one draw of the uniform one; without `random` it runs
        from left to right, so that greedy decoding repeats itself and does not depend on the batch.

        Args:
            masked: bool `(batch, block_size)`.
        """
        device, dtype = masked.device, wide_float(masked.device)
        key = torch.arange(masked.shape[1], device=device, dtype=dtype).expand(masked.shape)
        if random:
            key = torch.rand(masked.shape, generator=generator, device=device, dtype=dtype)
        return torch.where(masked, key, masked.shape[1] + 1.0).argsort(dim=1, stable=True)

    def time(
        self,
        t: torch.Tensor,
        remaining: torch.Tensor,
        *,
        random: bool = True,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """The time of the next hit, t * u^(1 / n), for rows with n `remaining` masked tokens; all `(batch,)`.

        Time is the probability that a token is masked. Measured in it, a masked token is hit at a uniform time under
        every noise schedule, so the hitting times are those of the log-linear one.

        Without `random` its expectation, t * n / (n + 1).
        """
        n = remaining.clamp(min=1)
        if not random:
            return t * n / (n + 1)
        return t * torch.rand(t.shape, generator=generator, device=t.device, dtype=t.dtype) ** (1 / n)


def draw_tokens(scores: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """One token per row of unnormalised log-probabilities `(rows, vocab_size)`: the distribution function, inverted.

    One uniform number a row instead of one for each token of the vocabulary, which on a CPU is an order of magnitude
    faster than `torch.multinomial`. Probabilities in the precision of the scores, float32 at least, summed up in
    float64. A token of probability zero is never drawn.
    """
    dtype = wide_float(scores.device)
    cumulative = scores.float().softmax(dim=-1).cumsum(dim=-1, dtype=dtype)
    uniform = torch.rand((scores.shape[0], 1), generator=generator, device=scores.device, dtype=dtype)
    # Below the total even after rounding; from the right, so that the step found has a positive height.
    below = uniform * cumulative[:, -1:] * (1 - 4 * torch.finfo(dtype).eps)
    return torch.searchsorted(cumulative, below, right=True).squeeze(1)


SAMPLERS = {"first_hitting": FirstHittingSampler}

__all__ = ["SAMPLERS", "FirstHittingSampler", "draw_tokens", "wide_float"]
