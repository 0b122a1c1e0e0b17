"""The flags of `bd3lm eval`, with and without `--generative`, and the command line of `bd3lm harness`.

The commands themselves are in `dataset_scoring.py`, `generative.py` and `harness.py`. Imports nothing slow.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bd3lm_hf.console import add_model_arguments, integer, number, with_underscores
from bd3lm_hf.data.sources import PACKINGS, SUITES
from bd3lm_hf.generation.generate_cli import FIELDS, add_sampling


#: Estimators of the likelihood.
ESTIMATORS: Mapping[str, str] = {
    "stratified": "ours, unbiased with low variance (default)",
    "exact": "sum over all masks of each block, for blocks of up to 8 tokens",
    "sampled": "the paper's noise, independent for each sequence",
    "published": "the paper's protocol, with the dataset's published flags (default of a suite)",
}

#: Estimators with a fixed number of noise samples, and why.
FIXED_SAMPLES = {"exact": "uses no noise", "published": "uses one noise sample"}

# A suite sets these for each of its datasets.
_DATASET_FLAGS = ("dataset", "dataset_config", "dataset_source", "text_column", "split")
_SUITE_FLAGS = ("suite_source", "sets")

#: Fields of `bd3lm generate` that generative evaluation also has: all but those that end a text early.
GENERATIVE_FIELDS = [name for name in FIELDS if name not in ("entropy_stop", "entropy_stop_window", "max_time")]

#: The paper's rule: a text whose last 256 tokens have an entropy below 4 nats is generated again.
PUBLISHED_ENTROPY_STOP = 4.0


def add_arguments(parser: argparse.ArgumentParser, words: Sequence[str] = ()) -> None:
    """Add the flags of `bd3lm eval`, or those of `bd3lm eval --generative` if `words` has that flag."""
    add_model_arguments(parser)
    parser.add_argument(
        "--generative", action="store_true", help="score generated text instead (add --help for its flags)"
    )
    (_add_generative_arguments if "--generative" in words else _add_dataset_arguments)(parser)


def _add_dataset_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what to score")
    what.add_argument("--dataset", help="name, file, folder or hub name")
    what.add_argument("--split", help="train, validation (default, unless published) or test")
    what.add_argument("--dataset-config", help="configuration of a hub dataset")
    what.add_argument("--dataset-source", help="file, folder or hub name to read a named dataset from")
    what.add_argument("--text-column", help="column of the text, if it is not obvious")
    what.add_argument("--skip-bad-rows", action="store_true", help="skip rows that cannot be read, with a warning")
    what.add_argument(
        "--suite",
        choices=tuple(SUITES),
        help="several datasets in one table (zero-shot: the paper's Table 5, eight datasets other than OpenWebText)",
    )
    what.add_argument("--sets", nargs="+", metavar="NAME", help="score only these datasets of the suite")
    what.add_argument("--suite-source", type=Path, help="folder of local copies: one folder or file per dataset")
    what.add_argument("--packing", choices=PACKINGS, help="how to cut sequences (contiguous, unless published)")
    switch: Any = {"action": argparse.BooleanOptionalAction, "default": None}
    what.add_argument("--insert-eos", **switch, help="put EOS after each document (yes, except in a suite)")
    what.add_argument("--insert-special", **switch, help="put BOS and EOS around sequences (no, unless published)")
    what.add_argument("--length", type=integer(1), help="tokens per sequence; by default the model's window")
    what.add_argument(
        "--window",
        type=integer(2),
        help="score longer sequences in windows of this many tokens that move by half of it; without it, tokens "
        "attend to the whole sequence, even beyond the model's window",
    )
    what.add_argument("--max-sequences", type=integer(1), help="score at most this many, spread over the dataset")
    how = parser.add_argument_group("estimator")
    estimators = "; ".join(f"{name}: {about}" for name, about in ESTIMATORS.items())
    how.add_argument("--estimator", choices=tuple(ESTIMATORS), help=estimators)
    how.add_argument("--num-samples", type=integer(1), help="noise samples per sequence (1)")
    how.add_argument("--batch-size", type=integer(1), default=8, help="sequences scored at once (8)")
    where = parser.add_argument_group("results")
    where.add_argument(
        "--output",
        type=Path,
        nargs="+",
        default=[],
        help="result files: .json is replaced, .csv and .md get a row per dataset; the scores of sequences are kept "
        "next to the first (NAME.scores.jsonl), and an interrupted run continues from them",
    )
    where.add_argument("--overwrite", action="store_true", help="replace a file that this command did not write")
    where.add_argument("--restart", action="store_true", help="discard the scores that were kept, and start again")


def _add_generative_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what to generate")
    what.add_argument("--num-samples", type=integer(1), default=64, help="number of texts (64; the paper uses 300)")
    what.add_argument(
        "--length", type=integer(2), help="tokens per text, including the first; by default the model's window"
    )
    what.add_argument("--variable-length", action="store_true", help="stop a text at an end token")
    what.add_argument("--batch-size", type=integer(1), default=8, help="texts generated at once (8)")
    how = parser.add_argument_group("how to generate")
    add_sampling(how, GENERATIVE_FIELDS)
    how.add_argument(
        "--protocol",
        choices=("plain", "published"),
        default="plain",
        help=f"published: as in the paper, with --entropy-stop {PUBLISHED_ENTROPY_STOP:g}",
    )
    how.add_argument(
        "--entropy-stop",
        type=number(),
        help="generate a text again, up to 10 times, if its last tokens have a lower entropy, in nats",
    )
    how.add_argument(
        "--entropy-stop-window", type=integer(1), default=256, help="number of last tokens for --entropy-stop (256)"
    )
    scoring = parser.add_argument_group("how to score")
    scoring.add_argument("--judge", help="folder or hub name of the reference model; the paper uses gpt2-large")
    scoring.add_argument(
        "--samples",
        type=Path,
        default=Path("samples.jsonl"),
        help="file for the texts, a JSON object per line; a rerun continues it (samples.jsonl)",
    )
    scoring.add_argument("--output", type=Path, help="JSON file for the result")
    scoring.add_argument("--overwrite", action="store_true", help="replace existing files")


def check(arguments: argparse.Namespace) -> None:
    """Refuse flags that contradict each other, and fill in defaults."""
    if arguments.generative:
        if arguments.judge is None:
            raise ValueError(
                "--generative needs a --judge: the folder or hub name of a language model that scores the texts, such "
                "as gpt2-large."
            )
        if arguments.protocol == "published" and arguments.entropy_stop is None:
            arguments.entropy_stop = PUBLISHED_ENTROPY_STOP
        return
    is_suite = arguments.suite is not None
    if is_suite == (arguments.dataset is not None):
        raise ValueError("name what to score: either a --dataset or a --suite.")
    for name in _DATASET_FLAGS if is_suite else _SUITE_FLAGS:
        if getattr(arguments, name) is not None:
            flag, other = f"--{name.replace('_', '-')}", "--dataset" if is_suite else "--suite"
            raise ValueError(f"{flag} applies only to a {other}: leave it out.")
    if arguments.estimator is None:
        arguments.estimator = "published" if is_suite else next(iter(ESTIMATORS))
    if arguments.num_samples not in (None, 1) and arguments.estimator in FIXED_SAMPLES:
        raise ValueError(
            f"--num-samples {arguments.num_samples}: --estimator {arguments.estimator} "
            f"{FIXED_SAMPLES[arguments.estimator]}; leave out the number, or use --estimator stratified."
        )
    if arguments.window is not None and arguments.estimator == "published":
        raise ValueError(f"--window {arguments.window}: the published protocol has no windows; leave it out.")
    if arguments.restart and not arguments.output:
        raise ValueError("--restart discards the scores next to a result: name the result with --output.")


# The harness

_HARNESS_HELP = """\
usage: bd3lm harness --model_args pretrained=DIR[,FIELD=VALUE ...] --tasks TASK,... [flags of lm_eval run]

`--model bd3lm` is added if no model is named. Fields of --model_args are the arguments of BD3LMHarness: pretrained,
tokenizer, estimator, num_samples, seed, batch_size, max_length, max_gen_toks, add_bos_token, check_greedy, device,
dtype, trust_remote_code. All other flags are those of `lm_eval run`, see `lm_eval run --help`; dashes and underscores
are both accepted. `bd3lm harness ls` and `bd3lm harness validate` work as in `lm_eval`."""

# Verbs of `lm_eval` that take no model.
_VERBS_WITHOUT_MODEL = {"ls", "validate"}


def run_harness(words: Sequence[str]) -> None:
    """Run `lm_eval` with the words of a command line, adding `--model bd3lm` if they name no model."""
    words = [with_underscores(word) for word in words]
    if not words or words[0] in ("-h", "--help"):
        print(_HARNESS_HELP)
        return
    # Registers the model, or raises if the harness is not installed.
    import bd3lm_hf.evaluation.harness  # noqa: F401

    from lm_eval.__main__ import cli_evaluate  # isort: skip

    names_model = any(word.split("=")[0] in ("--model", "-M", "--config", "-C", "-h", "--help") for word in words)
    if words[0] not in _VERBS_WITHOUT_MODEL and not names_model:
        words = [*words, "--model", "bd3lm"]
    before = sys.argv
    sys.argv = ["lm_eval", *words]  # the harness reads its arguments from there
    try:
        cli_evaluate()
    finally:
        sys.argv = before
