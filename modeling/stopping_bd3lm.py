"""The published stop rules as stopping criteria, judged row by row (arXiv 2503.09573, Sec. 6.2 and App. C.5).

The published sampler looks once per block, pools the rows of a batch, and also shortens the text: to its second end
token, or by the whole degenerate window. The criteria only end a row; [`published_length`] has the rest.
"""

from typing import Any

import torch
from transformers.generation.stopping_criteria import StoppingCriteria


class TextCriteria(StoppingCriteria):
    """A stopping criterion that reads the text and should not take padding for text."""

    def __call__(
        self,
        input_ids: torch.Tensor,
        scores: tuple[torch.Tensor, ...] | None,
        padding: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Whether each row ends here, bool `(batch,)`.

        Args:
            input_ids: `(batch, length)`, the text so far.
            padding: bool `(batch, length)`, True where a row has no token, at its beginning only; None: nowhere.
        """
        raise NotImplementedError


class EntropyStopCriteria(TextCriteria):
    """Ends a row whose last `window` tokens are degenerate: the entropy of their frequencies is below `entropy`.

    ```python
    >>> model.generate(ids, stopping_criteria=[EntropyStopCriteria(4.0)], max_new_tokens=5000)
    ```

    Args:
        entropy: bound in nats; the published one is 4.0.
        window: tokens that are looked at; a row of at most so many is not judged.

    Raises:
        ValueError: a bound that no text or every text falls below, or a window of no tokens.
    """

    def __init__(self, entropy: float, window: int = 256) -> None:
        check_entropy_stop(entropy, window)
        self.entropy, self.window = entropy, window

    def __call__(
        self,
        input_ids: torch.Tensor,
        scores: tuple[torch.Tensor, ...] | None,
        padding: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if input_ids.shape[1] <= self.window:
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        degenerate = token_entropy(input_ids[:, -self.window :]) < self.entropy
        # Padding comes first, so a row is longer than the window when the token before the window is one.
        return degenerate if padding is None else degenerate & ~padding[:, -self.window - 1]


class SecondEosCriteria(TextCriteria):
    """Ends a row that holds two end tokens, the published rule for texts of any length.

    The beginning counts where, as in GPT-2, the same token begins and ends a text.

    Args:
        eos_token_id: one id or several.
    """

    def __init__(self, eos_token_id: int | list[int] | torch.Tensor) -> None:
        self.eos_token_id = torch.as_tensor(eos_token_id).reshape(-1)

    def __call__(
        self,
        input_ids: torch.Tensor,
        scores: tuple[torch.Tensor, ...] | None,
        padding: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        return self.ends(input_ids, padding).sum(dim=1) >= 2

    def ends(self, input_ids: torch.Tensor, padding: torch.Tensor | None = None) -> torch.Tensor:
        """Where end tokens stand, bool `(batch, length)`."""
        ends = torch.isin(input_ids, self.eos_token_id.to(input_ids.device))
        return ends if padding is None else ends & ~padding


def token_entropy(input_ids: torch.Tensor) -> torch.Tensor:
    """Entropy in nats of the token frequencies in each row of `(batch, length)`; `(batch,)` in float64."""
    ordered = input_ids.sort(dim=1).values
    fresh = torch.ones_like(ordered, dtype=torch.bool)
    fresh[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    # Counts of each distinct token, at its number within the row.
    counts = torch.zeros(ordered.shape, dtype=torch.float64, device=ordered.device)
    counts.scatter_add_(1, fresh.long().cumsum(dim=1) - 1, torch.ones_like(counts))
    return torch.special.entr(counts / ordered.shape[1]).sum(dim=1)


def published_length(
    input_ids: torch.Tensor,
    *,
    entropy: float = 4.0,
    window: int = 256,
    eos_token_id: int | list[int] | None = None,
) -> torch.Tensor:
    """Tokens `(batch,)` that the published sampler keeps of each row `(batch, length)`, without padding.

    A degenerate row loses its last `window` tokens; else, with `eos_token_id`, a row ends with its second end token.
    Published, rows are pooled and texts shorter than the window are cut at a negative index; here each row is judged
    for itself, and texts that short stay whole.
    """
    batch, length = input_ids.shape
    kept = torch.full((batch,), length, device=input_ids.device)
    if eos_token_id is not None:
        second = SecondEosCriteria(eos_token_id).ends(input_ids).cumsum(dim=1) >= 2
        kept -= (second.sum(dim=1) - 1).clamp(min=0)
    return torch.where(EntropyStopCriteria(entropy, window)(input_ids, None), length - window, kept)


def check_entropy_stop(entropy: Any, window: Any) -> None:
    """Refuse an entropy stop that can not work."""
    if not isinstance(entropy, (int, float)) or not entropy > 0:
        raise ValueError(
            f"entropy_stop={entropy!r}: give a positive number of nats (the published rule has 4.0; no text has less "
            f"than 0), or None for no such stop."
        )
    if not isinstance(window, int) or window < 2:
        raise ValueError(f"entropy_stop_window={window!r}: give at least 2 tokens (the published rule looks at 256).")


__all__ = ["EntropyStopCriteria", "SecondEosCriteria", "TextCriteria", "published_length", "token_entropy"]
