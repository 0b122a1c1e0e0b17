"""Generative perplexity of texts under a reference model."""

from typing import Any

from bd3lm_hf import metrics
from bd3lm_hf.evaluation.reference_model import score_texts


class GenerativePerplexity(metrics.TextMeasurement):
    """exp of the mean NLL per token under a reference model, as published: windows of 1024 tokens that move by 512."""

    inputs = """
    predictions: texts, or their token ids.
    judge: the reference model, a causal language model or a model with `token_nll`: an object, a folder or a hub name.
    tokenizer: the reference model's, an object or a name; by default that of a model given by name. Needed for texts.
    writer: tokenizer of the model that generated the ids, to re-tokenize them for the reference model; without it the
        ids are those of the reference model.
    window: tokens that the reference model reads at once; by default 1024, or fewer if its own window is shorter.
    score_end: also score the reference model's end token, which the published figure never does.
    batch_size, seed, device: texts scored at once, seed of the noise of an estimated bound, and device to use.
"""

    def _compute(self, predictions: list[Any], **options: Any) -> dict[str, Any]:
        return score_texts(predictions, **options)
