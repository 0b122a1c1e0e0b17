"""Lengths of texts."""

from typing import Any

import evaluate

from bd3lm_hf.evaluation.text_metrics import lengths
from bd3lm_hf.metrics import FEATURES, INPUTS, counted


class TextLength(evaluate.Measurement):
    """Mean, median, shortest and longest length of texts in tokens, or in words."""

    def _info(self) -> evaluate.EvaluationModuleInfo:
        return evaluate.EvaluationModuleInfo(
            description=self.__doc__, citation="", inputs_description=INPUTS, features=FEATURES
        )

    def _compute(self, predictions: list[Any], tokenizer: Any = None) -> dict[str, Any]:
        return lengths(counted(predictions, tokenizer))._asdict()
