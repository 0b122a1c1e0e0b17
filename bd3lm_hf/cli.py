"""The `bd3lm` command: a verb for each thing that the package does.

Exit code 0 means that the work was done, 2 that the input was wrong, 1 that something else failed, 130 or 143 that
Ctrl-C or SIGTERM ended it. An error is one line on standard error; `--traceback` shows where it came from. The module
of a verb is imported when the verb is used, and what is slow only once its arguments are in order.
"""

import argparse
import contextlib
import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import bd3lm_hf
from bd3lm_hf.argument_parser import ArgumentParser, with_home
from bd3lm_hf.printing import one_line
from bd3lm_hf.user_files import advice_on


class Verb(NamedTuple):
    """A verb: its help text, and functions `module:name` that run it, add its flags and write its help.

    They are named by strings: `training` and `hub_upload` are later rooms, on which this one does not depend.
    """

    # Takes the parsed arguments; without `flags`, the words of the command line.
    run: str
    help: str
    # Adds the flags to a parser; some words of the command line add more. Its module imports nothing slow.
    flags: str | None = None
    # Returns the help page of a verb whose own parser imports something slow.
    page: str | None = None


_EVALUATION, _GENERATION, _REPORTS = "bd3lm_hf.evaluation", "bd3lm_hf.generation", "bd3lm_hf.reports"
_TRAINING, _HUB = "bd3lm_hf.training", "bd3lm_hf.hub_upload"

VERBS = {
    "train": Verb(
        f"{_TRAINING}.train:main",
        "train a model: a recipe plus overrides",
        page=f"{_TRAINING}.command_help:train_help",
    ),
    "compare": Verb(
        f"{_TRAINING}.compare:main", "train several models on one text", page=f"{_TRAINING}.command_help:compare_help"
    ),
    "eval": Verb(
        f"{_EVALUATION}.dataset_scoring:run",
        "score a model: its perplexity on datasets, or the text that it generates",
        f"{_EVALUATION}.eval_cli:add_arguments",
    ),
    "generate": Verb(
        f"{_GENERATION}.write_samples:run", "generate text", f"{_GENERATION}.generate_cli:add_generate_arguments"
    ),
    "infill": Verb(
        f"{_GENERATION}.write_samples:run_infill",
        "fill gaps in text",
        f"{_GENERATION}.generate_cli:add_infill_arguments",
    ),
    "quality": Verb(
        f"{_REPORTS}.speed_quality:run",
        "measure the quality of generated text over the speed of samplers",
        f"{_REPORTS}.reports_cli:add_quality_arguments",
    ),
    "report": Verb(
        f"{_REPORTS}.report:run",
        "a page of curves, tables and samples",
        f"{_REPORTS}.reports_cli:add_report_arguments",
    ),
    "harness": Verb(f"{_EVALUATION}.eval_cli:run_harness", "lm-evaluation-harness with the models of this package"),
    "serve": Verb(
        "bd3lm_hf.serving.serve_cli:run",
        "an OpenAI-compatible server for one model",
        "bd3lm_hf.serving.serve_cli:add_arguments",
    ),
    "bench": Verb(
        f"{_REPORTS}.benchmark:run",
        "speed and memory next to a named rival",
        f"{_REPORTS}.reports_cli:add_bench_arguments",
    ),
    "convert": Verb(
        f"{_HUB}.convert:run", "a published checkpoint into a folder", f"{_HUB}.hub_cli:add_convert_arguments"
    ),
    "push": Verb(
        f"{_HUB}.push:run", "a model to a repository that anyone can load", f"{_HUB}.hub_cli:add_push_arguments"
    ),
    "verify": Verb(
        f"{_HUB}.verify:run", "whether a shared model is what was pushed", f"{_HUB}.hub_cli:add_verify_arguments"
    ),
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
    signals: list[int] = []
    try:
        with _ending_on_signals(signals):
            _run([word for word in words if word != "--traceback"])
        print(end="", flush=True)  # where there is a standard output
        return 0
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(f"error: {one_line(stop.code)}", file=sys.stderr)
            return 2
        return stop.code or 0
    except KeyboardInterrupt as stop:
        return getattr(stop, "exit_code", 130)  # 143 after a SIGTERM
    except BrokenPipeError:
        # The reader, such as `head`, has what it wanted. Python would complain once more when it closes the stream.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # 128 + SIGPIPE, as other commands end
    except Exception as error:
        if signals:  # native code that was being imported swallowed the interrupt, and was left half imported
            return 128 + signals[0]
        if show_traceback:
            raise
        own_code = getattr(error, "exit_code", None)  # of an error that is neither wrong input nor a defect
        is_expected = own_code is not None or is_input_error(error)
        has_message = own_code is not None or isinstance(error, (ValueError, OSError))
        kind = "" if has_message else f"{type(error).__name__}: "
        advice = "" if is_expected else " (--traceback shows where)"
        print(f"error: {one_line(f'{kind}{error}')}{advice_on(error)}{advice}", file=sys.stderr)
        return own_code or (2 if is_expected else 1)


class _Terminated(KeyboardInterrupt):
    """A SIGTERM, which ends a verb as Ctrl-C does: what it leaves is complete, and nothing unfinished stays."""

    exit_code = 143


@contextlib.contextmanager
def _ending_on_signals(received: list[int]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # Python lets no other thread set handlers
        return
    pid = os.getpid()

    def end(signum: int, frame: Any) -> None:
        if os.getpid() == pid:
            received.append(signum)
        elif signum == signal.SIGTERM:
            signal.signal(signum, signal.SIG_DFL)  # in a worker process, which its parent ends
            signal.raise_signal(signum)
        raise _Terminated if signum == signal.SIGTERM else KeyboardInterrupt

    # A shell lets its background jobs ignore Ctrl-C.
    ends = [number for number in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, end) for number in ends}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def is_input_error(error: Exception) -> bool:
    """Whether an error means wrong input, or more than this machine has."""
    if isinstance(error, _INPUT_ERRORS):
        return True
    if {kind.__name__ for kind in type(error).__mro__} & _INPUT_ERROR_NAMES:
        return True
    # What torch says on a CPU.
    return isinstance(error, RuntimeError) and "not enough memory" in str(error)


def _run(words: list[str]) -> None:
    if not words:
        make_parser().print_help()
    elif words[0] in VERBS:
        run_verb(words[0], words[1:])
    else:
        make_parser().parse_args(words)


def run_verb(name: str, words: Sequence[str]) -> None:
    """Run a verb; its errors are raised, and a wrong flag ends the process with code 2."""
    verb = VERBS[name]
    words = with_home(words if name in _KEEP_UNDERSCORES else with_dashes(words))
    if verb.page is not None and {"-h", "--help"} & set(words):
        print(_function(verb.page)())
    elif verb.flags is None:
        _function(verb.run)(words)
    else:
        arguments = make_verb_parser(name, words).parse_args(words)  # before the module that does the work is imported
        _function(verb.run)(arguments)


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


def make_verb_parser(name: str, words: Sequence[str] = ()) -> argparse.ArgumentParser:
    """Return the parser of a verb that has flags; some flags of `words` bring others with them."""
    verb = VERBS[name]
    assert verb.flags is not None
    parser = ArgumentParser(prog=f"bd3lm {name}", description=f"{verb.help.capitalize()}.", allow_abbrev=False)
    _function(verb.flags)(parser, words)
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
