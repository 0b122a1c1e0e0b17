"""Lengths of texts."""

from typing import Any

from bd3lm_hf import metrics
from bd3lm_hf.evaluation.generative import lengths


class TextLength(metrics.TextMeasurement):
    """Mean, median, shortest and longest length of texts in tokens, or in words."""

    def _compute(self, predictions: list[Any], tokenizer: Any = None) -> dict[str, Any]:
        return lengths(metrics.split_texts(predictions, tokenizer))
