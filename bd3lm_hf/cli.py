"""`bd3lm train | compare | eval | generate | quality | harness | bench | convert`: thin, one function per verb.

Exit code 0 means that the work was done, 2 that the input was wrong, 1 that something else failed. An error is one
line on stderr; `--traceback` shows where it came from.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import datasets
import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from bd3lm_hf.adapt import is_adaptable
from bd3lm_hf.checkpoints import load_model, read_config
from bd3lm_hf.evaluation import eval_cli
from bd3lm_hf.generation import generate_cli
from bd3lm_hf.reports import speed_quality
from bd3lm_hf.tokenization import check_tokenizer_fits, load_tokenizer


# Verbs with a command line of their own: the module, whose `main(argv)` is called, and what it does. Imported by name
# and when asked for, as training is a later room, which this one does not depend on.
_OWN_COMMAND_LINE = {
    "train": ("bd3lm_hf.training.train", "train a model: a recipe plus overrides"),
    "bench": ("bd3lm_hf.reports.benchmark", "speed and memory beside a named rival"),
    "compare": ("bd3lm_hf.training.compare", "train several models on the same text, in one table"),
    "report": ("bd3lm_hf.reports.report", "a page of the curves, tables and samples of runs"),
    "harness": ("bd3lm_hf.evaluation.harness", "lm-evaluation-harness with the models of this package"),
    "serve": ("bd3lm_hf.serving.serve_cli", "an OpenAI-compatible server for one model"),
    "convert": ("bd3lm_hf.hub_upload.convert", "a published or Lightning checkpoint into a folder, and back"),
    "push": ("bd3lm_hf.hub_upload.push", "a model to a repository on the hub that anyone can load"),
    "verify": ("bd3lm_hf.hub_upload.verify", "whether the files of a shared model are what was pushed"),
}


class _Parser(argparse.ArgumentParser):
    """Reports a wrong argument in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def make_parser(evaluation: Any = eval_cli) -> argparse.ArgumentParser:
    """The command line, verb by verb; `evaluation` is the module that does the work of `eval`."""
    parser = _Parser(prog="bd3lm", description="Block diffusion language models: train, score, write.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=_Parser)
    for verb, (_, text) in _OWN_COMMAND_LINE.items():
        verbs.add_parser(verb, help=text, add_help=False)
    measure = "perplexity of a model on a data set or a suite of them"
    _add_eval(verbs.add_parser("eval", help=measure, description=evaluate.__doc__, allow_abbrev=False), evaluation)
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


def _add_eval(parser: argparse.ArgumentParser, evaluation: Any) -> None:
    parser.set_defaults(run=evaluate, evaluation=evaluation)
    _add_model(parser)
    parser.add_argument(
        "--generative", action="store_true", help="judge what the model writes instead (its flags: with --help)"
    )
    evaluation.add_arguments(parser)


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=generate)
    _add_model(parser)
    generate_cli.add_arguments(parser)


def _add_quality(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=compare_samplers)
    _add_model(parser)
    speed_quality.add_arguments(parser)


def evaluate(arguments: argparse.Namespace) -> None:
    """Score data sets: perplexity, an upper bound unless the model is autoregressive; or, with --generative, texts."""
    arguments.evaluation.check(arguments)
    arguments.evaluation.run(arguments, *load(arguments))


def generate(arguments: argparse.Namespace) -> None:
    """Continue prompts, write from nothing, or hold a conversation."""
    if arguments.chat:
        generate_cli.check_chat_arguments(arguments)
        generate_cli.hold_conversation(arguments, *load(arguments))
        return
    job = generate_cli.plan(arguments)
    generate_cli.write(job, *load(arguments))


def compare_samplers(arguments: argparse.Namespace) -> None:
    """Generative perplexity by tokens per forward pass, for each sampler."""
    speed_quality.check(arguments)
    speed_quality.run(arguments, *load(arguments))


def load(arguments: argparse.Namespace) -> tuple[Any, PreTrainedTokenizerBase]:
    """The model, with every one of its weights and in evaluation mode, and its tokenizer.

    Raises:
        ValueError: a checkpoint that can not be read, lacks weights, has others or holds NaN; a tokenizer that is
            missing or of another model.
    """
    config = read_config(arguments.model, trust_remote_code=arguments.trust_remote_code)
    if is_adaptable(config):
        raise ValueError(
            f"--model {arguments.model} is a {config.model_type}, which writes one token after the other: make a "
            f"block-diffusion model of it with `bd3lm train adapt --init_from {arguments.model}`."
        )
    model = load_model(arguments.model, trust_remote_code=arguments.trust_remote_code)
    tokenizer = load_tokenizer(arguments.tokenizer or arguments.model)
    if hasattr(model.config, "mask_token_id"):
        check_tokenizer_fits(tokenizer, model.config)
    return model.to(arguments.device).eval(), tokenizer


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
    # Another set of flags, in a module that is imported when asked for.
    generative = argv[:1] == ["eval"] and "--generative" in argv
    evaluation = importlib.import_module("bd3lm_hf.evaluation.generative") if generative else eval_cli
    arguments = make_parser(evaluation).parse_args(argv)
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
