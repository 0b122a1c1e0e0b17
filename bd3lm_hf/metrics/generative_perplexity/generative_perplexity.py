"""Generative perplexity of texts under a judge."""

from typing import Any

import evaluate

from bd3lm_hf.evaluation.reference_model import score_texts
from bd3lm_hf.metrics import FEATURES


_INPUTS = """
    predictions: texts, or their token ids.
    judge: a causal language model, or a model with `token_nll`: an object, or the name of a folder or hub model.
    tokenizer: the judge's, an object or a name; by default that of a judge given by name. Texts need it.
    writer: tokenizer of the model that wrote the ids, where they are to be read as text by the judge's tokenizer;
        without it ids are those of the judge.
    window: tokens that the judge reads at once; by default 1024, or fewer where it knows no more positions.
    score_end: score the judge's end token, which the published figure leaves out wherever it stands.
    batch_size, seed, device: how, with which noise (of a bound that is estimated) and where to compute.
"""


class GenerativePerplexity(evaluate.Measurement):
    """exp of the mean nll per token of texts under a judge, as published: windows of 1024 tokens that move by 512."""

    def _info(self) -> evaluate.EvaluationModuleInfo:
        return evaluate.EvaluationModuleInfo(
            description=self.__doc__, citation="", inputs_description=_INPUTS, features=FEATURES
        )

    def _compute(self, predictions: list[Any], **options: Any) -> dict[str, Any]:
        return score_texts(predictions, **options)
