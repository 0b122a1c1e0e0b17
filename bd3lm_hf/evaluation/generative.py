"""`bd3lm eval --generative`: texts that a model writes from nothing, judged by another language model, and counted.

The paper's protocol (App. C.5, Table 7): texts of a set length, whose end tokens end nothing, are read by the judge
with its own tokenizer. Each text has a seed of its own and is judged and kept as soon as it is written, so that a run
goes on where it was stopped, and no number depends on the size of a batch.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from bd3lm_hf.checkpoints import read_config
from bd3lm_hf.evaluation.perplexity import SequenceScore, summarize
from bd3lm_hf.evaluation.reference_model import ReferenceModel, load_reference_model, mean_perplexity
from bd3lm_hf.evaluation.results import library_versions, weights_digest
from bd3lm_hf.evaluation.text_metrics import distinct, lengths, mean_repetition, text_entropy
from bd3lm_hf.generation.generate_cli import CHOICES, FIELDS, add_sampling, whole_number
from bd3lm_hf.generation.samples import Sample, SamplesFile
from bd3lm_hf.generation.text_generation import GeneratedText, generate_batch
from bd3lm_hf.output_files import check_output_file
from bd3lm_hf.seeds import derived_seed


# Of the fields that `bd3lm generate` knows, those that end a text otherwise than by an end token are left out.
_FIELDS = [name for name in FIELDS if name not in ("entropy_stop", "entropy_stop_window", "max_time")]


_DISTINCT = (1, 2, 3)


_REPETITION = 4


@dataclass
class JudgedSample(Sample):
    """One text, how it came about, and what the judge says: a line of the samples file."""

    ids: list[int]  # of the text, the token that begins it included
    nll: float  # under the judge, summed over the tokens that it scored, nats
    scored_tokens: int  # of the judge
    entropy: float  # of the frequencies of `ids`, nats


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `bd3lm eval --generative`, without those that every verb has."""
    what = parser.add_argument_group("what is written")
    what.add_argument("--num-samples", type=whole_number(1), default=64, help="texts (64; the paper has 300)")
    what.add_argument(
        "--length", type=whole_number(2), help="tokens of a text, the first included; by default the model's window"
    )
    what.add_argument("--variable-length", action="store_true", help="an end token ends a text")
    what.add_argument("--batch-size", type=whole_number(1), default=8, help="texts at once; changes rounding at most")
    how = parser.add_argument_group("how it is written")
    add_sampling(how, _FIELDS)
    judged = parser.add_argument_group("how it is judged")
    judged.add_argument("--judge", help="folder or hub name of a language model; the paper has gpt2-large")
    judged.add_argument(
        "--samples",
        type=Path,
        default=Path("samples.jsonl"),
        help="file of the texts, a JSON object per line; a rerun goes on behind what is there (samples.jsonl)",
    )
    judged.add_argument("--overwrite", action="store_true", help="replace that file")
    judged.add_argument("--output", type=Path, help="JSON file for the result")


def check(arguments: argparse.Namespace) -> None:
    """Refuse what can not be done, before a model is loaded.

    Raises:
        ValueError: names the argument and the remedy.
    """
    if arguments.judge is None:
        raise ValueError(
            "--generative needs a --judge: the folder or hub name of a language model that scores the texts, such as "
            "gpt2-large."
        )
    check_output_file(arguments.samples, "--samples")
    if arguments.output is not None:
        check_output_file(arguments.output, "--output")
    read_config(arguments.judge, argument="--judge", trust_remote_code=arguments.trust_remote_code)


def run(arguments: argparse.Namespace, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write, judge, keep, and report.

    Raises:
        ValueError: a judge that can not be loaded, a model that can not write, or texts of another run.
    """
    begin = _begin(model, arguments.model)
    how = {"device": model.device, "trust_remote_code": arguments.trust_remote_code}
    judge = load_reference_model(arguments.judge, tokenizer, **how, as_text=True, score_end=False)
    length = arguments.length or model.config.model_length
    settings = _settings(arguments, model, judge, length)
    prompts = [None] * arguments.num_samples
    file = SamplesFile(arguments.samples, prompts, settings, overwrite=arguments.overwrite, argument="--samples")
    missing = [index for index in range(arguments.num_samples) if index not in file.finished]
    kept, shown = arguments.num_samples - len(missing), sys.stderr.isatty()
    with tqdm(total=arguments.num_samples, initial=kept, desc="writing", disable=not shown, leave=False) as bar:
        for at in range(0, len(missing), arguments.batch_size):
            batch = missing[at : at + arguments.batch_size]
            file.append(_judged(batch, [begin] * len(batch), length - 1, judge, model, tokenizer, settings))
            bar.update(len(batch))
    result = {**settings, "num_samples": arguments.num_samples, **summary(file.rows()), **library_versions()}
    print(_table(result))
    print(f"{arguments.num_samples} samples in {arguments.samples}" + (f", {kept} of an earlier run" if kept else ""))
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _begin(model: Any, name: str) -> list[int]:
    """What a text begins with."""
    if not model.can_generate():
        raise ValueError(f"--model {name} is a {type(model).__name__}, which can not write: name a model that can.")
    token = model.generation_config.bos_token_id
    if token is None:
        raise ValueError(f"--model {name} has no bos_token_id to start a text from: set it in its generation config.")
    return [token]


def _settings(arguments: argparse.Namespace, model: Any, judge: ReferenceModel, length: int) -> dict[str, Any]:
    """What decides the texts and their scores; the number of texts and the size of a batch do not."""
    fields = {name: getattr(arguments, name) for name in (*CHOICES, *_FIELDS)}
    return {
        "model": arguments.model,
        "model_weights": weights_digest(model),
        "judge": arguments.judge,
        "judge_weights": weights_digest(judge.weights),
        "judge_estimator": judge.estimator,
        "seed": arguments.seed,
        "length": length,
        "variable_length": arguments.variable_length,
        **{name: value for name, value in fields.items() if value is not None},
    }


def _judged(
    batch: Sequence[int],
    prompts: Sequence[list[int]],
    new_tokens: int,
    judge: ReferenceModel,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    settings: Mapping[str, Any],
) -> Iterator[JudgedSample]:
    """Write the texts of these numbers and have them judged."""
    seed = settings["seed"]
    texts = generate_batch(
        model,
        prompts,
        new_tokens,
        seeds=[derived_seed(seed, index) for index in batch],
        to_end=settings["variable_length"],
        do_sample=True,
        **{name: settings[name] for name in (*CHOICES, *_FIELDS) if name in settings},
    )
    scores = judge.score(texts, seed=seed, batch_size=len(batch), numbers=batch)
    for index, text, score in zip(batch, texts, scores, strict=True):
        yield _sample(index, text, score, tokenizer, settings)


def _sample(
    index: int,
    text: GeneratedText,
    score: SequenceScore,
    tokenizer: PreTrainedTokenizerBase,
    settings: Mapping[str, Any],
) -> JudgedSample:
    return JudgedSample(
        index=index,
        prompt=None,
        text=str(tokenizer.decode(text.ids, skip_special_tokens=True)),
        num_prompt_tokens=text.given,
        num_tokens=len(text.written),
        seed=settings["seed"],
        forwards=text.forwards,
        tokens_per_forward=len(text.written) / max(1, text.forwards),
        seconds=text.seconds,
        model=settings["model"],
        settings=dict(settings),
        ids=text.ids,
        nll=score.nll,
        scored_tokens=score.num_tokens,
        entropy=text_entropy(text.ids),
    )


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What is said of judged samples, the lines of a samples file.

    Returns:
        `generative_perplexity` over all scored tokens and the `standard_error` of its log (None for a single text),
        `mean_perplexity` of the perplexities of texts (the figure in the paper's tables), `scored_tokens`, the mean
        `entropy` of texts in nats, `distinct_n`, the mean `repetition_4`, the `lengths` of what was written in tokens,
        `forwards_per_token` of a text that is written alone, `seconds_per_token` and `seconds` of writing.

    Raises:
        ValueError: no scored token.
    """
    scores = [SequenceScore(row["index"], row["nll"], row["scored_tokens"]) for row in rows]
    result = summarize(scores)
    written = [row["ids"][row["num_prompt_tokens"] :] for row in rows]
    tokens, seconds = sum(map(len, written)), math.fsum(row["seconds"] for row in rows)
    return {
        "generative_perplexity": result.perplexity,
        "standard_error": None if math.isnan(result.standard_error) else result.standard_error,
        "mean_perplexity": mean_perplexity(scores),
        "scored_tokens": result.num_tokens,
        "entropy": math.fsum(row["entropy"] for row in rows) / len(rows),
        **{f"distinct_{n}": distinct(written, n) for n in _DISTINCT},
        f"repetition_{_REPETITION}": mean_repetition(written, _REPETITION),
        "lengths": lengths(written)._asdict(),
        "forwards_per_token": sum(row["forwards"] for row in rows) / tokens,
        "seconds_per_token": seconds / tokens,
        "seconds": seconds,
    }


def _table(result: Mapping[str, Any]) -> str:
    """What a reader wants to know."""
    error = result["standard_error"]
    spread = "" if error is None else f" +- {result['generative_perplexity'] * error:.2f}"
    rows = [
        ("generative perplexity", f"{result['generative_perplexity']:.2f}{spread} ({result['judge']})"),
        ("mean of the texts'", f"{result['mean_perplexity']:.2f}"),
        ("entropy", f"{result['entropy']:.3f} nats"),
        *((f"distinct {n}-grams", _share(result[f"distinct_{n}"])) for n in _DISTINCT),
        (f"repeated {_REPETITION}-grams", _share(result[f"repetition_{_REPETITION}"])),
        ("length", "mean {mean:.1f}, median {median:g}, {shortest} to {longest} tokens".format(**result["lengths"])),
        ("forwards per token", f"{result['forwards_per_token']:.3f}"),
        ("seconds", f"{result['seconds']:.1f}, {1000 * result['seconds_per_token']:.2f} ms per token"),
    ]
    return "\n".join(f"{name:<24}{value}" for name, value in rows)


def _share(value: float | None) -> str:
    return "none" if value is None else f"{100 * value:.1f} %"


__all__ = ["JudgedSample", "add_arguments", "check", "run", "summary"]
