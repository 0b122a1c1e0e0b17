"""Diffusion over the vocabulary simplex (SSD-LM, arXiv 2210.17432): almost-one-hot logits, noise, projections.

A token w is the logit vector K (2 onehot(w) - 1). The forward process adds Gaussian noise of scale K,

    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) K eps,      abar_t = f(t) / f(0),
    f(t) = cos^2( ((t / T + s) / (1 + s)) pi / 2 ),  s = 1e-4.

The reverse process projects the network's logits back onto almost-one-hot vectors (Sec. 3.3) and adds noise of the
next lower level.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch


_OFFSET = 1e-4


def simplex_alpha_bar(t: torch.Tensor, num_steps: int) -> torch.Tensor:
    """Return the remaining fraction of the signal's variance at steps `t`, from 0 to `num_steps`."""

    def signal(step: torch.Tensor) -> torch.Tensor:
        return torch.cos((step / num_steps + _OFFSET) / (1 + _OFFSET) * math.pi / 2) ** 2

    return signal(t) / signal(torch.zeros_like(t))


def almost_one_hot(input_ids: torch.Tensor, vocab_size: int, scale: float) -> torch.Tensor:
    """Return tokens as logits `(..., vocab_size)`: +scale at the token, -scale elsewhere."""
    logits = torch.full((*input_ids.shape, vocab_size), -float(scale), device=input_ids.device)
    return logits.scatter_(-1, input_ids.unsqueeze(-1), float(scale))


def noisy_logits(clean: torch.Tensor, alpha_bar: torch.Tensor, normal: torch.Tensor, scale: float) -> torch.Tensor:
    """Return x_t of x_0 and standard normal numbers, all `(batch, length, vocab_size)`; `alpha_bar` is `(batch,)`."""
    # The noise has the scale K of the signal, so their variances add up to a constant.
    alpha_bar = alpha_bar.view(-1, 1, 1)
    return alpha_bar.sqrt() * clean + (1 - alpha_bar).sqrt() * scale * normal


def nucleus(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """Return the smallest set of tokens with a probability of at least `top_p`, bool `(..., vocab_size)`."""
    ranked, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
    kept = ranked.cumsum(dim=-1) - ranked < top_p  # so the token that crosses `top_p` stays
    kept[..., 0] = True
    return torch.zeros_like(kept).scatter(-1, order, kept)


class Projection(NamedTuple):
    """Logits projected back onto almost-one-hot vectors."""

    logits: torch.Tensor  # (..., vocab_size)
    input_ids: torch.Tensor  # (...), the drawn or most likely token of each


def project_by_sampling(
    logits: torch.Tensor, scale: float, top_p: float, draw: Callable[[torch.Tensor], torch.Tensor]
) -> Projection:
    """Draw one token from the nucleus and give it +scale, all others -scale.

    Args:
        draw: maps log-probabilities `(rows, vocab_size)` to a token for each row, `(rows,)`.
    """
    inside = logits.masked_fill(~nucleus(logits, top_p), -torch.inf)
    ids = draw(inside.flatten(0, -2)).view(logits.shape[:-1])
    return Projection(almost_one_hot(ids, logits.shape[-1], scale), ids)


def project_evenly(logits: torch.Tensor, scale: float, top_p: float, _draw: Any = None) -> Projection:
    """Give every token of the nucleus +scale and all others -scale: multi-hot vectors."""
    inside = nucleus(logits, top_p)
    return Projection(torch.where(inside, float(scale), -float(scale)).to(logits.dtype), logits.argmax(dim=-1))


def project_unevenly(logits: torch.Tensor, scale: float, top_p: float, _draw: Any = None) -> Projection:
    """Give the most likely token +scale; other tokens of the nucleus keep their distance to it, down to -scale."""
    inside = nucleus(logits, top_p)
    best = logits.amax(dim=-1, keepdim=True)
    kept = (logits - best + scale).clamp(min=-scale)
    return Projection(torch.where(inside, kept, -float(scale)), logits.argmax(dim=-1))


PROJECTIONS: dict[str, Callable[..., Projection]] = {
    "sampling": project_by_sampling,
    "even": project_evenly,
    "uneven": project_unevenly,
}
