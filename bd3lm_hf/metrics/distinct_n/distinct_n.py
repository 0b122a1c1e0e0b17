"""Distinct n-grams of texts."""

from typing import Any

from bd3lm_hf import metrics
from bd3lm_hf.evaluation.generative import distinct


class DistinctN(metrics.TextMeasurement):
    """Fraction of distinct n-grams among all n-grams of all texts, for each n; None if no text has n tokens."""

    inputs = metrics.TextMeasurement.inputs + "    n: lengths of the n-grams, by default 1, 2 and 3.\n"

    def _compute(self, predictions: list[Any], tokenizer: Any = None, n: Any = (1, 2, 3)) -> dict[str, Any]:
        texts = metrics.split_texts(predictions, tokenizer)
        return {f"distinct_{size}": distinct(texts, size) for size in n}
