"""Distinct n-grams of texts."""

from typing import Any

import evaluate

from bd3lm_hf.evaluation.text_metrics import distinct
from bd3lm_hf.metrics import FEATURES, INPUTS, counted


class DistinctN(evaluate.Measurement):
    """Share of different ones among the n-grams of all texts, for each n; None where no text has n tokens."""

    def _info(self) -> evaluate.EvaluationModuleInfo:
        return evaluate.EvaluationModuleInfo(
            description=self.__doc__,
            citation="",
            inputs_description=INPUTS + "    n: lengths of the n-grams, by default 1, 2 and 3.\n",
            features=FEATURES,
        )

    def _compute(self, predictions: list[Any], tokenizer: Any = None, n: Any = (1, 2, 3)) -> dict[str, Any]:
        texts = counted(predictions, tokenizer)
        return {f"distinct_{size}": distinct(texts, size) for size in n}
