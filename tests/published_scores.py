"""The published formulas of score-entropy sampling, which the analytic sampler must reproduce."""

import math

import torch


def log_score(logits: torch.Tensor, x_t: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Return log-scores `(batch, length, vocab_size)` from raw logits of that shape.

    Args:
        x_t: `(batch, length)`, what the logits were computed from.
        sigma: noise level `(batch,)`.
    """
    shift = torch.expm1(sigma).log().view(-1, 1, 1) + math.log(logits.shape[-1] - 1)
    return (logits - shift).scatter(-1, x_t.unsqueeze(-1), 0.0)


def analytic_weights(
    score: torch.Tensor, x_t: torch.Tensor, sigma_t: torch.Tensor, sigma_s: torch.Tensor, mask_token_id: int
) -> torch.Tensor:
    """Return the sampling weights of x_s given x_t, s < t, `(batch, length, vocab_size)`, not normalised.

    Tweedie tau-leaping (Alg. 2 of the paper): the staggered score, times the transposed transition over
    sigma_t - sigma_s.

    Args:
        score: `(batch, length, vocab_size)`, not its logarithm.
        sigma_t, sigma_s: noise levels `(batch,)`.
    """
    step = (sigma_t - sigma_s).view(-1, 1, 1)
    weights = score * step.exp()
    weights[..., mask_token_id] += ((1 - step.exp()) * score.sum(-1, keepdim=True)).squeeze(-1)
    return weights * transposed_transition(x_t, step, score, mask_token_id)


def denoising_weights(score: torch.Tensor, x_t: torch.Tensor, sigma: torch.Tensor, mask_token_id: int) -> torch.Tensor:
    """Return the sampling weights of the last step, from noise level `sigma` to none: no mask stays."""
    weights = analytic_weights(score, x_t, sigma, torch.zeros_like(sigma), mask_token_id)
    weights[..., mask_token_id] = 0.0
    return weights


def transposed_transition(
    x_t: torch.Tensor, step: torch.Tensor, like: torch.Tensor, mask_token_id: int
) -> torch.Tensor:
    """Return the probability that each token v becomes the one in x_t within `step` of noise, shaped as `like`."""
    stays = (-step).exp()
    transition = torch.zeros_like(like).scatter_(-1, x_t.unsqueeze(-1), 1.0) * stays
    return transition + torch.where((x_t == mask_token_id).unsqueeze(-1), 1 - stays, torch.zeros_like(stays))
