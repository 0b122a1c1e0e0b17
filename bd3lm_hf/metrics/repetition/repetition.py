"""Repetition within texts."""

from typing import Any

import evaluate

from bd3lm_hf.evaluation.text_metrics import mean_repetition, repetition
from bd3lm_hf.metrics import FEATURES, INPUTS, counted


class Repetition(evaluate.Measurement):
    """Share of the n-grams of each text that occurred in it before; None where a text has fewer than n tokens."""

    def _info(self) -> evaluate.EvaluationModuleInfo:
        return evaluate.EvaluationModuleInfo(
            description=self.__doc__,
            citation="",
            inputs_description=INPUTS + "    n: length of the n-grams, by default 4.\n",
            features=FEATURES,
        )

    def _compute(self, predictions: list[Any], tokenizer: Any = None, n: int = 4) -> dict[str, Any]:
        texts = counted(predictions, tokenizer)
        return {"mean_repetition": mean_repetition(texts, n), "repetitions": [repetition(text, n) for text in texts]}
