"""`bd3lm eval --generative`: generate text without a prompt, and score it with a reference model and text metrics.

The paper's protocol (App. C.5, Table 7): texts have a fixed length and do not stop at end tokens, and the reference
model reads them with its own tokenizer. A text whose last 256 tokens have an entropy below 4 nats is generated again,
up to 10 times. Each text has its own seed, and is scored and saved as soon as it is finished. So a run can continue
where it was stopped, and no result depends on the batch size.
"""

import argparse
import json
import math
import statistics
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from bd3lm_hf.checkpoints import check_generates, read_config, window_of
from bd3lm_hf.console import progress_bar
from bd3lm_hf.evaluation.eval_cli import GENERATIVE_FIELDS
from bd3lm_hf.evaluation.perplexity import SequenceScore, summarize
from bd3lm_hf.evaluation.reference_model import ReferenceModel, load_reference_model, mean_perplexity
from bd3lm_hf.evaluation.results import library_versions, weights_digest
from bd3lm_hf.generation.generate_cli import CHOICES
from bd3lm_hf.generation.text_generation import GeneratedText, SamplesFile, generate_batch, sample_row
from bd3lm_hf.seeds import derived_seed
from bd3lm_hf.user_files import check_output_file, is_json_with, lock_output, write_atomically


#: How often a text of low entropy is generated again at most.
MAX_REDRAWS = 10

_DISTINCT = (1, 2, 3)
_REPETITION = 4


def check_files(arguments: argparse.Namespace) -> None:
    """Refuse files that cannot be written and a missing reference model, before any model is loaded."""
    check_output_file(arguments.samples, "--samples")
    if arguments.output is not None:
        is_ours = is_json_with("judge", "generative_perplexity")
        check_output_file(arguments.output, "--output", is_ours=is_ours, overwrite=arguments.overwrite)
    read_config(arguments.judge, argument="--judge", trust_remote_code=arguments.trust_remote_code)


def evaluate_samples(arguments: argparse.Namespace, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Generate, score and save texts, and report the results."""
    check_generates(model, arguments.model)
    prompt = [model.generation_config.bos_token_id]
    if prompt == [None]:
        raise ValueError(
            f"--model {arguments.model} has no bos_token_id to start a text from: set it in its generation config."
        )
    options = {"device": model.device, "trust_remote_code": arguments.trust_remote_code}
    reference = load_reference_model(arguments.judge, tokenizer, **options, as_text=True, score_end=False)
    length = arguments.length or window_of(model)
    settings = _settings(arguments, model, reference, length)
    count = arguments.num_samples
    with lock_output(arguments.samples, "--samples"):
        file = SamplesFile(
            arguments.samples, [None] * count, settings, overwrite=arguments.overwrite, flag="--samples"
        )
        missing = list(file.missing())
        kept = count - len(missing)
        with progress_bar("generating", count, initial=kept) as bar:
            for begin in range(0, len(missing), arguments.batch_size):
                batch = missing[begin : begin + arguments.batch_size]
                texts = _generate(batch, prompt, length - 1, model, settings)
                file.append(_scored(texts, reference, tokenizer, settings))
                bar.update(len(batch))
        rows = file.rows()
    result = {**settings, "num_samples": count, **summary(rows), **library_versions()}
    print(_table(result))
    print(f"{count} samples in {arguments.samples}" + (f", {kept} from an earlier run" if kept else ""))
    if arguments.output is not None:
        write_atomically(arguments.output, json.dumps(result, indent=2, allow_nan=False) + "\n")


def _settings(arguments: argparse.Namespace, model: Any, reference: ReferenceModel, length: int) -> dict[str, Any]:
    """Return everything that determines the texts and their scores; their number and the batch size do not."""
    fields = {name: getattr(arguments, name) for name in (*CHOICES, *GENERATIVE_FIELDS)}
    if arguments.entropy_stop is not None:
        fields |= {"entropy_stop": arguments.entropy_stop, "entropy_stop_window": arguments.entropy_stop_window}
    return {
        "model": arguments.model,
        "model_weights": weights_digest(model),
        "judge": arguments.judge,
        "judge_weights": weights_digest(reference.weights),
        "judge_estimator": reference.estimator,
        "seed": arguments.seed,
        "length": length,
        "variable_length": arguments.variable_length,
        **{name: value for name, value in fields.items() if value is not None},
    }


def _generate(
    batch: Sequence[int], prompt: list[int], new_tokens: int, model: Any, settings: Mapping[str, Any]
) -> dict[int, tuple[GeneratedText, int]]:
    """Generate the texts of these indices, again while their entropy is low; return each with its redraws."""
    texts: dict[int, tuple[GeneratedText, int]] = {}
    missing = list(batch)
    for attempt in range(MAX_REDRAWS + 1):
        seeds = [derived_seed(settings["seed"], index) for index in missing]
        new = generate_batch(
            model,
            [prompt] * len(missing),
            new_tokens,
            # Each attempt has its own seed, however many the rest of its batch needs.
            seeds=[derived_seed(seed, attempt) if attempt else seed for seed in seeds],
            stop_at_eos=settings["variable_length"],
            do_sample=True,
            **{name: settings[name] for name in (*CHOICES, *GENERATIVE_FIELDS) if name in settings},
        )
        texts.update((index, (text, attempt)) for index, text in zip(missing, new, strict=True))
        missing = [index for index, text in zip(missing, new, strict=True) if has_low_entropy(text.ids, settings)]
        if not missing:
            break
    return texts


def has_low_entropy(ids: Sequence[int], settings: Mapping[str, Any]) -> bool:
    """Return whether the last `entropy_stop_window` tokens of a longer text have less entropy than `entropy_stop`."""
    threshold, window = settings.get("entropy_stop"), settings.get("entropy_stop_window", 0)
    return threshold is not None and len(ids) > window and text_entropy(ids[-window:]) < threshold


def _scored(
    texts: Mapping[int, tuple[GeneratedText, int]],
    reference: ReferenceModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: Mapping[str, Any],
) -> Iterator[dict[str, Any]]:
    """Yield the lines of the samples file."""
    generated = [text for text, _ in texts.values()]
    scores = reference.score(generated, seed=settings["seed"], batch_size=len(texts), indices=list(texts))
    for (index, (text, redraws)), score in zip(texts.items(), scores, strict=True):
        yield {
            **sample_row(text, tokenizer, index=index, prompt=None, settings=settings),
            "ids": text.ids,  # including the BOS token
            "nll": score.nll,  # under the reference model, summed over the tokens that it scored, nats
            "scored_tokens": score.num_tokens,  # in the reference model's tokens
            "entropy": text_entropy(text.ids),  # of the token frequencies, nats
            "reference_entropy": text_entropy(reference.read(text).ids),  # the same for the reference model's tokens
            "redraws": redraws,  # how often the text was generated again because of its low entropy
        }


# The report


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Aggregate metrics over scored samples (the lines of a samples file).

    Returns:
        `generative_perplexity` over all scored tokens and the `standard_error` of its log (None for a single text),
        `mean_perplexity` over texts (the figure in the paper's tables), `scored_tokens`, the mean `entropy` of texts
        in nats and its `reference_entropy` in the reference model's tokens (the figure in the paper's tables),
        `redrawn` (texts that were generated again because of their entropy) and `low_entropy` (those still below after
        the last attempt), `distinct_n`, the mean `repetition_4`, the `lengths` of the continuations in tokens,
        `forwards_per_token` of texts generated alone and `batch_forwards_per_token` of whole batches,
        `seconds_per_token` and `seconds` of generation.

    Raises:
        ValueError: if no token was scored.
    """
    scores = [SequenceScore(row["index"], row["nll"], row["scored_tokens"]) for row in rows]
    result = summarize(scores)
    # The BOS token is given, not generated.
    new_ids = [row["ids"][row["num_prompt_tokens"] :] for row in rows]
    tokens, seconds = sum(map(len, new_ids)), math.fsum(row["seconds"] for row in rows)
    return {
        "generative_perplexity": result.perplexity,
        "standard_error": None if math.isnan(result.standard_error) else result.standard_error,
        "mean_perplexity": mean_perplexity(scores),
        "scored_tokens": result.num_tokens,
        "entropy": math.fsum(row["entropy"] for row in rows) / len(rows),
        "reference_entropy": math.fsum(row["reference_entropy"] for row in rows) / len(rows),
        "redrawn": sum(row["redraws"] > 0 for row in rows),
        "low_entropy": sum(has_low_entropy(row["ids"], row["settings"]) for row in rows),
        **{f"distinct_{n}": distinct(new_ids, n) for n in _DISTINCT},
        f"repetition_{_REPETITION}": mean_repetition(new_ids, _REPETITION),
        "lengths": lengths(new_ids),
        "forwards_per_token": sum(row["forwards"] for row in rows) / max(1, tokens),
        "batch_forwards_per_token": sum(row["batch_forwards"] for row in rows) / max(1, tokens),
        "seconds_per_token": seconds / max(1, tokens),
        "seconds": seconds,
    }


def _table(result: Mapping[str, Any]) -> str:
    error = result["standard_error"]
    spread = "" if error is None else f" +- {result['generative_perplexity'] * error:.2f}"
    rows = [
        ("generative perplexity", f"{result['generative_perplexity']:.2f}{spread} (under {result['judge']})"),
        ("mean over texts", f"{result['mean_perplexity']:.2f}"),
        ("scored tokens", f"{result['scored_tokens']} in {result['num_samples']} texts"),
        ("entropy", f"{result['entropy']:.3f} nats, {result['reference_entropy']:.3f} in the judge's tokens"),
        *((f"distinct {n}-grams", _percent(result[f"distinct_{n}"])) for n in _DISTINCT),
        (f"repeated {_REPETITION}-grams", _percent(result[f"repetition_{_REPETITION}"])),
        ("length", "mean {mean:.1f}, median {median:g}, {shortest} to {longest} tokens".format(**result["lengths"])),
        (
            "forwards per token",
            f"{result['forwards_per_token']:.3f} alone, {result['batch_forwards_per_token']:.3f} in its batch",
        ),
        ("seconds", f"{result['seconds']:.1f}, {1000 * result['seconds_per_token']:.2f} ms per token"),
    ]
    if "entropy_stop" in result:
        below = (
            f"{result['redrawn']} texts, {result['low_entropy']} of them still below {result['entropy_stop']:g} nats"
        )
        rows.append(("generated again", below))
    return "\n".join(f"{name:<24}{value}" for name, value in rows)


def _percent(value: float | None) -> str:
    return "none" if value is None else f"{100 * value:.1f} %"


# Text metrics. A text is a sequence of token ids, of words, or of anything else that can be counted. A low generative
# perplexity alone means little, because repetitive text is easy to predict.


def text_entropy(text: Sequence[Hashable]) -> float:
    """Return the entropy in nats of the token frequencies of a text; 0 for an empty one.

    Repetition lowers it. The published figure is the same number summed over the texts of a batch.
    """
    total = len(text)
    return math.fsum(-n / total * math.log(n / total) for n in Counter(text).values()) if total else 0.0


def mean_entropy(texts: Sequence[Sequence[Hashable]]) -> float:
    """Return the mean of [`text_entropy`] over texts.

    Raises:
        ValueError: if there are no texts.
    """
    check_not_empty(texts)
    return math.fsum(map(text_entropy, texts)) / len(texts)


def distinct(texts: Sequence[Sequence[Hashable]], n: int) -> float | None:
    """Return the fraction of distinct n-grams among all n-grams of all texts (Li et al., arXiv 1510.03055).

    It falls with the number and length of texts, so compare only equal amounts. None if no text has n tokens.

    Raises:
        ValueError: if n is below 1.
    """
    if n < 1:
        raise ValueError(f"n={n} must be at least 1.")
    found = [tuple(text[start : start + n]) for text in texts for start in range(len(text) - n + 1)]
    return len(set(found)) / len(found) if found else None


def repetition(text: Sequence[Hashable], n: int = 4) -> float | None:
    """Return the fraction of a text's n-grams that have occurred in it before (seq-rep-n, arXiv 1908.04319).

    None if the text has fewer than n tokens.

    Raises:
        ValueError: if n is below 1.
    """
    fraction = distinct([text], n)
    return None if fraction is None else 1 - fraction


def mean_repetition(texts: Sequence[Sequence[Hashable]], n: int = 4) -> float | None:
    """Return the mean of [`repetition`] over the texts that have n tokens; None if none has."""
    values = [value for value in (repetition(text, n) for text in texts) if value is not None]
    return math.fsum(values) / len(values) if values else None


def lengths(texts: Sequence[Sequence[Hashable]]) -> dict[str, float]:
    """Return mean, median, shortest and longest length of texts in tokens.

    Raises:
        ValueError: if there are no texts.
    """
    check_not_empty(texts)
    counts = [len(text) for text in texts]
    middle = {"mean": statistics.fmean(counts), "median": statistics.median(counts)}
    return {**middle, "shortest": min(counts), "longest": max(counts)}


def check_not_empty(texts: Sequence[object]) -> None:
    """Refuse an empty list of texts."""
    if not len(texts):
        raise ValueError("there are no texts: give at least one.")
