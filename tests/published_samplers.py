"""The published samplers in plain torch, as references for ours."""

import torch

from bd3lm_hf.modeling.decoding_state_bd3lm import EntropyStopCriteria


def draw_published(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The published categorical draw `(...)`, an exponential race with one uniform number per entry."""
    return (weights / (1e-10 - (uniform + 1e-10).log())).argmax(dim=-1)


def ancestral_weights(probabilities: torch.Tensor, stay: torch.Tensor | float, mask_token_id: int) -> torch.Tensor:
    """The published weights of one ancestral update, `(..., vocab_size)`, for masked positions.

    Args:
        probabilities: of the clean token, zero for the mask.
        stay: probability of staying masked, move_chance(s) / move_chance(t).
    """
    weights = probabilities * (1 - stay)
    weights[..., mask_token_id] = stay
    return weights


def published_length(
    input_ids: torch.Tensor, *, entropy: float = 4.0, window: int = 256, eos_token_id: int | None = None
) -> torch.Tensor:
    """Tokens `(batch,)` that the published sampler keeps of each row `(batch, length)`, without padding.

    A degenerate row loses its last `window` tokens. Otherwise, with `eos_token_id`, it ends at its second end token.
    """
    batch, length = input_ids.shape
    kept = torch.full((batch,), length)
    if eos_token_id is not None:
        second = (input_ids == eos_token_id).cumsum(dim=1) >= 2
        kept -= (second.sum(dim=1) - 1).clamp(min=0)
    return torch.where(EntropyStopCriteria(entropy, window)(input_ids, None), length - window, kept)
