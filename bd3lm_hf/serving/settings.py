"""The settings of `bd3lm serve` that its parts share."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class ServeSettings:
    """Settings of `bd3lm serve`.

    Args:
        model: what requests call the model.
        defaults: fields of `generate` that replace those of the folder.
        max_tokens: new tokens of a request that names no number.
        api_key: which every request must carry; None for none.
        max_batch_size: requests that are generated at a time.
        max_waiting: requests that wait for that; one more is refused.
    """

    model: str
    defaults: dict[str, Any] = field(default_factory=dict)
    max_tokens: int = 256
    api_key: str | None = None
    max_batch_size: int = 8
    max_waiting: int = 64
