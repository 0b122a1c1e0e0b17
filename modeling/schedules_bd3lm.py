"""Noise schedules: how likely a token is masked at time t, and its weight in the loss (arXiv 2503.09573, Table 8).

A schedule maps a time t in [0, 1] to the probability `move_chance` that a token is masked.
"""

import math
from typing import NamedTuple

import torch


class NoiseLevel(NamedTuple):
    """What a schedule says about the times t; each field has the shape of t."""

    move_chance: torch.Tensor  # probability that a token is masked, 1 - alpha_t
    loss_scaling: torch.Tensor  # factor of log p(x_0 | x_t) in the NELBO, alpha'_t / (1 - alpha_t); negative
    move_rate: torch.Tensor  # d move_chance / dt


class NoiseSchedule:
    """A schedule; calling it with times t of any shape gives a [`NoiseLevel`]."""

    def move_chance(self, t: torch.Tensor) -> torch.Tensor:
        """Probability that a token is masked at time t."""
        return t

    def move_rate(self, t: torch.Tensor) -> torch.Tensor:
        """Derivative of `move_chance` with respect to t."""
        return torch.ones_like(t)

    def loss_scaling(self, t: torch.Tensor) -> torch.Tensor:
        """Weight of log p(x_0 | x_t) in the continuous-time NELBO."""
        return -self.move_rate(t) / self.move_chance(t)

    def __call__(self, t: torch.Tensor) -> NoiseLevel:
        return NoiseLevel(self.move_chance(t), self.loss_scaling(t), self.move_rate(t))


class LogLinearNoise(NoiseSchedule):
    """move_chance = t, hence the weight 1/t of the paper's Eq. 8. `eps` bounds the total noise sigma at t = 1."""

    def __init__(self, eps: float = 1e-3) -> None:
        self.eps = eps

    @property
    def sigma_max(self) -> float:
        """Total noise at t = 1, the cap of `sigma`; 6.9078 for the published eps."""
        return -math.log(self.eps)

    def total_noise(self, t: torch.Tensor) -> torch.Tensor:
        """sigma(t) = -log(1 - (1 - eps) t), finite at t = 1."""
        return -torch.log1p(-(1 - self.eps) * t)

    def rate_noise(self, t: torch.Tensor) -> torch.Tensor:
        """d sigma / dt."""
        return (1 - self.eps) / (1 - (1 - self.eps) * t)

    def sigma(self, move_chance: torch.Tensor) -> torch.Tensor:
        """The noise level that a model is conditioned on, for a masking probability: -log(1 - p), capped."""
        return (-torch.log1p(-move_chance)).clamp(max=self.sigma_max)


class TotalNoise(LogLinearNoise):
    """The log-linear schedule written in total noise: move_chance = 1 - exp(-sigma(t)) = (1 - eps) t.

    The authors' `mdlm_loss_scale`, with which MDLM (arXiv 2406.07524) and SEDD were trained; the weight is 1/t again.
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
        # As published, the derivative of t^exponent also where move_chance is held at eps.
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
    """The schedule called `name`: `loglinear`, `square`, `square_root`, `log` or `cosine` (paper, Table 8).

    `total_noise` is the log-linear one as `mdlm_loss_scale` writes it.

    Raises:
        ValueError: no schedule has this name.
    """
    if name not in _SCHEDULES:
        raise ValueError(f"noise={name!r} is no noise schedule: choose one of {', '.join(_SCHEDULES)}.")
    return _SCHEDULES[name]


__all__ = [
    "CosineNoise",
    "LogLinearNoise",
    "LogarithmicNoise",
    "NoiseLevel",
    "NoiseSchedule",
    "PowerNoise",
    "TotalNoise",
    "noise_schedule",
]
