"""Metrics of generated text as modules of the `evaluate` library, one folder each.

metric = load_metric("generative_perplexity")        # or evaluate.load with the path of the folder; no network
metric.add_batch(predictions=texts)                  # texts or token ids, batch by batch
metric.compute(judge="gpt2-large")
"""

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import datasets
import evaluate
from transformers import PreTrainedTokenizerBase

from bd3lm_hf.evaluation.generative import check_not_empty
from bd3lm_hf.tokenization import encode_plain, load_tokenizer


_FOLDER = Path(__file__).parent

#: The names of the modules.
METRICS = tuple(sorted(path.stem for path in _FOLDER.glob("*/*.py") if path.stem == path.parent.name))


class TextMeasurement(evaluate.Measurement):
    """Base class; modules do not import its name, because `evaluate` loads the first such class that they contain."""

    #: The arguments of `compute`; a module appends its own.
    inputs = """
    predictions: texts, or their token ids.
    tokenizer: splits texts into tokens, an object or a name; by default texts are split into words at whitespace.
"""

    def _info(self) -> evaluate.EvaluationModuleInfo:
        return evaluate.EvaluationModuleInfo(
            description=self.__doc__,
            citation="",
            inputs_description=self.inputs,
            features=[
                datasets.Features({"predictions": datasets.Value("string")}),
                datasets.Features({"predictions": datasets.List(datasets.Value("int64"))}),
            ],
        )


def load_metric(name: str, **options: Any) -> evaluate.EvaluationModule:
    """Load a module by name.

    Args:
        options: for `evaluate.load`.

    Raises:
        ValueError: if the name is unknown.
    """
    if name not in METRICS:
        raise ValueError(f"metric {name!r} is unknown: choose one of {', '.join(METRICS)}.")
    return evaluate.load(str(_FOLDER / name), **options)


def split_texts(
    predictions: Sequence[Any], tokenizer: PreTrainedTokenizerBase | str | None = None
) -> list[Sequence[Hashable]]:
    """Split each text into the units to count: token ids, or words without a tokenizer.

    Raises:
        ValueError: if there are no texts.
    """
    check_not_empty(predictions)
    if isinstance(tokenizer, str):
        tokenizer = load_tokenizer(tokenizer)
    return [
        text if not isinstance(text, str) else text.split() if tokenizer is None else encode_plain(text, tokenizer)
        for text in predictions
    ]
