"""`bd3lm train | compare | eval | generate | quality | bench | convert`: thin, one function per verb.

Exit code 0 means that the work was done, 2 that the input was wrong, 1 that something else failed. An error is one
line on stderr; `--traceback` shows where it came from.
"""

import argparse
import importlib
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import datasets
import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from bd3lm_hf import quality, writing
from bd3lm_hf.checkpoints import load_model
from bd3lm_hf.data import bytes_per_token, find_schema, load_rows, load_text, pack
from bd3lm_hf.evaluation import Perplexity, perplexity
from bd3lm_hf.instructions import encode_rows
from bd3lm_hf.packing import PACKINGS
from bd3lm_hf.schemas import Text
from bd3lm_hf.tokenization import check_tokenizer_fits, load_tokenizer


# Verbs with a command line of their own: the module, whose `main(argv)` is called, and what it does. Imported by name
# and when asked for, as training is a later room, which this one does not depend on.
_OWN_COMMAND_LINE = {
    "train": ("bd3lm_hf.training.train", "train a model: a recipe plus overrides"),
    "bench": ("bd3lm_hf.benchmark", "speed and memory beside a named rival"),
    "compare": ("bd3lm_hf.training.compare", "train several models on the same text, in one table"),
    "convert": ("bd3lm_hf.hub_upload.convert", "a published or Lightning checkpoint into a folder, and back"),
    "push": ("bd3lm_hf.hub_upload.push", "a model to a repository on the hub that anyone can load"),
    "verify": ("bd3lm_hf.hub_upload.verify", "whether the files of a shared model are what was pushed"),
}


class _Parser(argparse.ArgumentParser):
    """Reports a wrong argument in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def make_parser() -> argparse.ArgumentParser:
    """The command line, verb by verb."""
    parser = _Parser(prog="bd3lm", description="Block diffusion language models: train, score, write.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=_Parser)
    for verb, (_, text) in _OWN_COMMAND_LINE.items():
        verbs.add_parser(verb, help=text, add_help=False)
    _add_eval(verbs.add_parser("eval", help="perplexity of a model on a data set", description=evaluate.__doc__))
    _add_generate(verbs.add_parser("generate", help="text of a model", description=generate.__doc__))
    measure = "quality over forwards of a model's samplers"
    _add_quality(verbs.add_parser("quality", help=measure, description=compare_samplers.__doc__))
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="checkpoint folder or hub name")
    parser.add_argument("--tokenizer", help="folder or hub name of the tokenizer, where the model comes without")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code that comes with the model; ours needs none"
    )
    parser.add_argument("--device", type=_device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from")


def _device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{name!r} is no device of this machine") from error


def _add_eval(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=evaluate)
    _add_model(parser)
    parser.add_argument("--dataset", required=True, help="name, file, folder or hub name")
    parser.add_argument("--split", default="validation", help="train, validation (default) or test")
    parser.add_argument("--dataset-config", help="configuration of a hub data set")
    parser.add_argument("--dataset-source", help="file, folder or hub name to read in place of the table's source")
    parser.add_argument("--text-column", help="column of the text, where it is not obvious")
    parser.add_argument("--skip-bad-rows", action="store_true", help="skip rows that can not be read, with a warning")
    parser.add_argument("--packing", default="contiguous", choices=tuple(PACKINGS), help="how sequences are cut")
    parser.add_argument("--insert-eos", action=argparse.BooleanOptionalAction, default=True, help="end documents")
    parser.add_argument("--insert-special", action="store_true", help="put begin and end token around sequences")
    parser.add_argument("--length", type=int, help="tokens of a sequence; the model's own length by default")
    parser.add_argument("--max-sequences", type=int, help="score at most so many, spread over the data set")
    parser.add_argument("--estimator", default="stratified", choices=("sampled", "stratified", "exact"))
    parser.add_argument("--num-samples", type=int, default=1, help="noise draws per sequence")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--output", type=Path, help="JSON file for the result")


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=generate)
    _add_model(parser)
    writing.add_arguments(parser)


def _add_quality(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=compare_samplers)
    _add_model(parser)
    quality.add_arguments(parser)


def evaluate(arguments: argparse.Namespace) -> None:
    """Score a data set: an upper bound on the perplexity, exact for autoregressive models."""
    output: Path | None = arguments.output
    if output is not None and not output.absolute().parent.is_dir():
        raise ValueError(f"--output {output}: the folder {output.absolute().parent} does not exist; make it first.")
    model, tokenizer = load(arguments)
    if not hasattr(model, "token_nll"):
        raise ValueError(f"--model {arguments.model} is a {type(model).__name__}, which this package can not score.")
    length = arguments.length or model.config.max_position_embeddings
    sequences, bytes_of_token = _sequences(arguments, model, tokenizer, length)
    if arguments.max_sequences is not None:
        sequences = sequences.select(_spread(len(sequences), arguments.max_sequences))
    result = perplexity(
        model,
        sequences,
        estimator=arguments.estimator,
        num_samples=arguments.num_samples,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        bytes_per_token=bytes_of_token,
        progress=sys.stderr.isatty(),
    )
    print(_table(result))
    if output is not None:
        names = ("model", "dataset", "split", "estimator", "num_samples", "seed")
        report = {**result._asdict(), **{name: getattr(arguments, name) for name in names}, "length": length}
        numbers = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in report.items()}
        output.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")


def _sequences(
    arguments: argparse.Namespace, model: Any, tokenizer: PreTrainedTokenizerBase, length: int
) -> tuple[datasets.Dataset, float | None]:
    """The data set's sequences, and the bytes of a token where they are running text.

    Of a prompt and its completion, or of messages, what the model would have to write is scored.
    """
    place = {"config_name": arguments.dataset_config, "source": arguments.dataset_source}
    how = {"split": arguments.split, "skip_bad_rows": arguments.skip_bad_rows, **place}
    schema = Text() if arguments.text_column else find_schema(arguments.dataset, **place)
    if not isinstance(schema, Text):
        rows = load_rows(arguments.dataset, schema, **how)
        block_size = getattr(model.config, "block_size", 1)
        return encode_rows(rows, schema, tokenizer, length=length, block_size=block_size), None
    documents = load_text(arguments.dataset, text_column=arguments.text_column, **how)
    flags = {"insert_eos": arguments.insert_eos, "insert_special": arguments.insert_special}
    sequences = pack(documents, tokenizer, length=length, packing=arguments.packing, **flags)
    return sequences, bytes_per_token(documents, tokenizer, insert_eos=arguments.insert_eos).bytes_per_token


def generate(arguments: argparse.Namespace) -> None:
    """Continue prompts, or write from nothing."""
    job = writing.plan(arguments)
    writing.write(job, *load(arguments))


def compare_samplers(arguments: argparse.Namespace) -> None:
    """Generative perplexity by tokens per forward pass, for each sampler."""
    quality.check(arguments)
    quality.run(arguments, *load(arguments))


def load(arguments: argparse.Namespace) -> tuple[Any, PreTrainedTokenizerBase]:
    """The model, with every one of its weights and in evaluation mode, and its tokenizer.

    Raises:
        ValueError: a checkpoint that can not be read, lacks weights, has others or holds NaN; a tokenizer that is
            missing or of another model.
    """
    model = load_model(arguments.model, trust_remote_code=arguments.trust_remote_code)
    tokenizer = load_tokenizer(arguments.tokenizer or arguments.model)
    if hasattr(model.config, "mask_token_id"):
        check_tokenizer_fits(tokenizer, model.config)
    return model.to(arguments.device).eval(), tokenizer


def _spread(count: int, most: int) -> range:
    """At most `most` of `count` places, evenly apart."""
    if most < 1:
        raise ValueError(f"--max-sequences {most}: give at least 1.")
    return range(0, count, -(-count // most))


def _table(result: Perplexity) -> str:
    """What a reader wants to know."""
    rows = [
        ("perplexity", f"{result.perplexity:.4f}"),
        ("nats per token", f"{result.nll:.5f} +- {result.standard_error:.5f}"),
        ("bits per token", f"{result.bits_per_token:.5f}"),
        ("bits per byte", "unknown" if result.bits_per_byte is None else f"{result.bits_per_byte:.5f}"),
        ("scored tokens", f"{result.num_tokens} in {result.num_sequences} sequences"),
        ("seconds", f"{result.seconds:.1f}"),
    ]
    return "\n".join(f"{name:<16}{value}" for name, value in rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv and argv[0] in _OWN_COMMAND_LINE:
        # Its own parser reads the rest, and reports its own errors.
        try:
            importlib.import_module(_OWN_COMMAND_LINE[argv[0]][0]).main(argv[1:])
        except (ValueError, OSError) as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            return 2
        return 0
    arguments = make_parser().parse_args(argv)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        arguments.run(arguments)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if arguments.traceback:
            raise
        expected = isinstance(error, (ValueError, OSError))
        kind = "" if expected else f"{type(error).__name__}: "
        print(f"error: {kind}{' '.join(str(error).split())}", file=sys.stderr)
        return 2 if expected else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
