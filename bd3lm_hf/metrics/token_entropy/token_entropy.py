"""Entropy of the tokens of each text."""

from typing import Any

import evaluate

from bd3lm_hf.evaluation.text_metrics import text_entropy
from bd3lm_hf.metrics import FEATURES, INPUTS, counted


class TokenEntropy(evaluate.Measurement):
    """Entropy in nats of the token frequencies of each text; the published figure is the sum over a batch."""

    def _info(self) -> evaluate.EvaluationModuleInfo:
        return evaluate.EvaluationModuleInfo(
            description=self.__doc__, citation="", inputs_description=INPUTS, features=FEATURES
        )

    def _compute(self, predictions: list[Any], tokenizer: Any = None) -> dict[str, Any]:
        entropies = [text_entropy(text) for text in counted(predictions, tokenizer)]
        return {"mean_entropy": sum(entropies) / len(entropies), "entropies": entropies}
