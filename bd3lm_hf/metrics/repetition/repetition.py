"""Repetition within texts."""

from typing import Any

from bd3lm_hf import metrics
from bd3lm_hf.evaluation.generative import mean_repetition, repetition


class Repetition(metrics.TextMeasurement):
    """Fraction of the n-grams of each text that have occurred in it before; None for fewer than n tokens."""

    inputs = metrics.TextMeasurement.inputs + "    n: length of the n-grams, by default 4.\n"

    def _compute(self, predictions: list[Any], tokenizer: Any = None, n: int = 4) -> dict[str, Any]:
        texts = metrics.split_texts(predictions, tokenizer)
        return {"mean_repetition": mean_repetition(texts, n), "repetitions": [repetition(text, n) for text in texts]}
