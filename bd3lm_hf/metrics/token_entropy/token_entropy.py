"""Entropy of the tokens of each text."""

from typing import Any

from bd3lm_hf import metrics
from bd3lm_hf.evaluation.generative import mean_entropy, text_entropy


class TokenEntropy(metrics.TextMeasurement):
    """Entropy in nats of the token frequencies of each text; the published figure is the sum over a batch."""

    def _compute(self, predictions: list[Any], tokenizer: Any = None) -> dict[str, Any]:
        texts = metrics.split_texts(predictions, tokenizer)
        return {"mean_entropy": mean_entropy(texts), "entropies": list(map(text_entropy, texts))}
