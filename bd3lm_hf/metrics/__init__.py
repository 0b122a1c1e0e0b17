"""Metrics of generated text as modules of the `evaluate` library, one folder each.

metric = load_metric("generative_perplexity")        # or evaluate.load with the path of the folder; no network
metric.add_batch(predictions=texts)                  # token ids or texts, batch by batch
metric.compute(judge="gpt2-large")
"""

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import datasets
import evaluate
from transformers import PreTrainedTokenizerBase

from bd3lm_hf.evaluation.reference_model import own_ids
from bd3lm_hf.evaluation.text_metrics import check_some
from bd3lm_hf.tokenization import load_tokenizer


_FOLDER = Path(__file__).parent

#: The names of the modules.
METRICS = tuple(sorted(path.stem for path in _FOLDER.glob("*/*.py") if path.stem == path.parent.name))

#: What every module takes: texts, or their token ids.
FEATURES = [
    datasets.Features({"predictions": datasets.Value("string")}),
    datasets.Features({"predictions": datasets.List(datasets.Value("int64"))}),
]

INPUTS = """
    predictions: texts, or their token ids.
    tokenizer: cuts texts into tokens, an object or a name; by default they are cut into words at white space.
"""


def load_metric(name: str, **options: Any) -> evaluate.EvaluationModule:
    """A module by name.

    Args:
        options: of `evaluate.load`.

    Raises:
        ValueError: an unknown name.
    """
    if name not in METRICS:
        raise ValueError(f"there is no metric {name!r}: choose one of {', '.join(METRICS)}.")
    return evaluate.load(str(_FOLDER / name), **options)


def counted(
    predictions: Sequence[Any], tokenizer: PreTrainedTokenizerBase | str | None = None
) -> list[Sequence[Hashable]]:
    """Each text as what is counted: its token ids, or its words.

    Raises:
        ValueError: no texts.
    """
    check_some(predictions)
    if isinstance(tokenizer, str):
        tokenizer = load_tokenizer(tokenizer)
    return [
        text if not isinstance(text, str) else text.split() if tokenizer is None else own_ids(text, tokenizer)
        for text in predictions
    ]


__all__ = ["FEATURES", "INPUTS", "METRICS", "counted", "load_metric"]
