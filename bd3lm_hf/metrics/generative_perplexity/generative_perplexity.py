"""Generative perplexity of texts under a reference model."""

from typing import Any

from bd3lm_hf import metrics
from bd3lm_hf.evaluation.reference_model import score_texts


class GenerativePerplexity(metrics.TextMeasurement):
    """exp of the mean NLL per token under a reference model, as published: windows of 1024 tokens that move by 512."""

    inputs = """
    predictions: texts, or their token ids.
    judge: the reference model, a causal language model or a model with `token_nll`: an object, or the name of a
        folder or hub model.
    tokenizer: the reference model's, an object or a name; by default that of a model given by name. Texts need it.
    writer: tokenizer of the model that generated the ids, if they are to be read as text by the reference model's
        tokenizer; without it ids are those of the reference model.
    window: tokens that the reference model reads at once; by default 1024, or fewer if it knows no more positions.
    score_end: score the reference model's end token, which the published figure leaves out everywhere.
    batch_size, seed, device: texts at once, seed of the noise of an estimated bound, and where to compute.
"""

    def _compute(self, predictions: list[Any], **options: Any) -> dict[str, Any]:
        return score_texts(predictions, **options)
