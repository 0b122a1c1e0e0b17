"""The `bd3lm` command: a verb for each thing that the package does.

Exit code 0 means that the work was done, 2 that the input was wrong, 1 that something else failed, 130 that Ctrl-C
ended it. An error is one line on standard error; `--traceback` shows where it came from. The module of a verb is
imported when the verb is used, and what is slow only once its arguments are in order.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import bd3lm_hf
from bd3lm_hf.argument_parser import ArgumentParser, one_line


class Verb(NamedTuple):
    """A verb: its help text and the module that runs it."""

    # With `add_arguments(parser, words)` and `run(arguments)`, or with `main(words)` if it parses them itself. Named
    # by strings, as `training` and `hub_upload` are later rooms, on which this one does not depend.
    module: str
    help: str
    # A function, `module:name`, that returns the parser, so that wrong words are refused before `module` is imported.
    parser: str | None = None
    # The module with `run`, if it is not that of the flags, which imports nothing slow.
    work: str | None = None
    # A function, `module:name`, that returns the help page of a verb whose own parser imports something slow.
    page: str | None = None


_EVALUATION = "bd3lm_hf.evaluation"
_HELP = "bd3lm_hf.training.command_help"
_HUB, _REPORTS = "bd3lm_hf.hub_upload.hub_cli", "bd3lm_hf.reports.reports_cli"

VERBS = {
    "train": Verb("bd3lm_hf.training.train", "train a model: a recipe plus overrides", page=f"{_HELP}:train_help"),
    "compare": Verb("bd3lm_hf.training.compare", "train several models on one text", page=f"{_HELP}:compare_help"),
    "eval": Verb(
        f"{_EVALUATION}.eval_cli",
        "score a model: its perplexity on datasets, or the text that it generates",
        work=f"{_EVALUATION}.dataset_scoring",
    ),
    "generate": Verb("bd3lm_hf.generation.generate_cli", "generate text", work="bd3lm_hf.generation.write_samples"),
    "infill": Verb("bd3lm_hf.generation.infill_cli", "fill gaps in text"),
    "quality": Verb(
        "bd3lm_hf.reports.quality_cli",
        "measure the quality of generated text over the speed of samplers",
        work="bd3lm_hf.reports.speed_quality",
    ),
    "report": Verb("bd3lm_hf.reports.report", "a page of curves, tables and samples", f"{_REPORTS}:report_parser"),
    "harness": Verb("bd3lm_hf.evaluation.harness_cli", "lm-evaluation-harness with the models of this package"),
    "serve": Verb("bd3lm_hf.serving.serve_cli", "an OpenAI-compatible server for one model"),
    "bench": Verb("bd3lm_hf.reports.benchmark", "speed and memory next to a named rival", f"{_REPORTS}:bench_parser"),
    "convert": Verb("bd3lm_hf.hub_upload.convert", "a published checkpoint into a folder", f"{_HUB}:convert_parser"),
    "push": Verb("bd3lm_hf.hub_upload.push", "a model to a repository that anyone can load", f"{_HUB}:push_parser"),
    "verify": Verb("bd3lm_hf.hub_upload.verify", "whether a shared model is what was pushed", f"{_HUB}:verify_parser"),
}

# Fields of these are also the names of Python arguments, and spelled with underscores.
_KEEP_UNDERSCORES = {"train", "compare", "harness"}

# Errors that mean wrong input or too small a machine, not a defect. Those of libraries are known by name, as they must
# not be imported for it.
_INPUT_ERRORS = (ValueError, OSError, OverflowError, MemoryError, RecursionError, ImportError)
_INPUT_ERROR_NAMES = {"YAMLError", "SafetensorError", "StrictDataclassError", "OutOfMemoryError"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb, and return the exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    show_traceback = "--traceback" in words
    try:
        code = _run([word for word in words if word != "--traceback"])
        sys.stdout.flush()
        return code
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(f"error: {one_line(stop.code)}", file=sys.stderr)
            return 2
        return stop.code or 0
    except KeyboardInterrupt as stop:
        return getattr(stop, "exit_code", 130)  # 143 if a SIGTERM stopped a training
    except BrokenPipeError:
        # The reader, such as `head`, has what it wanted. Python would complain once more when it closes the stream.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # 128 + SIGPIPE, as other commands end
    except Exception as error:
        if show_traceback:
            raise
        own_code = getattr(error, "exit_code", None)  # of an error that is neither wrong input nor a defect
        is_expected = own_code is not None or is_input_error(error)
        has_message = own_code is not None or isinstance(error, (ValueError, OSError))
        kind = "" if has_message else f"{type(error).__name__}: "
        advice = "" if is_expected else " (--traceback shows where)"
        print(f"error: {one_line(f'{kind}{error}')}{advice}", file=sys.stderr)
        return own_code or (2 if is_expected else 1)


def is_input_error(error: Exception) -> bool:
    """Whether an error means wrong input, or more than this machine has."""
    if isinstance(error, _INPUT_ERRORS):
        return True
    if {kind.__name__ for kind in type(error).__mro__} & _INPUT_ERROR_NAMES:
        return True
    # What torch says on a CPU.
    return isinstance(error, RuntimeError) and "not enough memory" in str(error)


def _run(words: list[str]) -> int:
    if not words:
        make_parser().print_help()
        return 0
    verb = words[0]
    if verb not in VERBS:
        make_parser().parse_args(words)
        return 0
    rest = words[1:] if verb in _KEEP_UNDERSCORES else with_dashes(words[1:])
    page, parser = VERBS[verb].page, VERBS[verb].parser
    if page is not None and {"-h", "--help"} & set(rest):
        print(_function(page)())
        return 0
    if parser is not None:
        _function(parser)().parse_args(rest)
    module = importlib.import_module(VERBS[verb].module)
    if hasattr(module, "add_arguments"):
        arguments = make_verb_parser(verb, rest, module).parse_args(rest)
        importlib.import_module(VERBS[verb].work or VERBS[verb].module).run(arguments)
    else:
        module.main(rest)
    return 0


def _function(name: str) -> Any:
    """Return the function that `module:name` means."""
    module, _, name = name.partition(":")
    return getattr(importlib.import_module(module), name)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of a command line without a known verb."""
    parser = ArgumentParser(prog="bd3lm", description="Block diffusion language models: train, evaluate, generate.")
    parser.add_argument("--version", action="version", version=f"bd3lm {bd3lm_hf.__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    for name, verb in VERBS.items():
        verbs.add_parser(name, help=verb.help, add_help=False)
    return parser


def make_verb_parser(verb: str, words: Sequence[str] = (), module: Any = None) -> argparse.ArgumentParser:
    """Return the parser of a verb; some flags of `words` bring others with them."""
    module = importlib.import_module(VERBS[verb].module) if module is None else module
    parser = ArgumentParser(prog=f"bd3lm {verb}", description=f"{VERBS[verb].help.capitalize()}.", allow_abbrev=False)
    module.add_arguments(parser, words)
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from")
    return parser


def with_dashes(words: Sequence[str]) -> list[str]:
    """Return words whose flags are spelled with dashes: `--max_new_tokens` is `--max-new-tokens`.

    Raises:
        ValueError: if the value of a flag is `--`, on which argparse fails.
    """
    spelled: list[str] = []
    for number, word in enumerate(words):
        if word == "--":
            return [*spelled, *words[number:]]
        flag, equals, value = word.partition("=")
        if flag.startswith("--"):
            if equals and value == "--":
                raise ValueError(f"{flag}: expected a value, got '--'.")
            word = flag.replace("_", "-") + equals + value
        spelled.append(word)
    return spelled


if __name__ == "__main__":
    sys.exit(main())
