"""The `bd3lm` command, with one verb per task.

Exit codes: 0 for success, 2 for wrong input, 1 for any other failure, 130 after Ctrl-C, 143 after SIGTERM. An error is
one line on standard error; `--traceback` shows where it was raised. The module of a verb is imported when the verb is
used, and slow imports wait until its arguments have been checked.
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
from bd3lm_hf.console import ArgumentParser, one_line, with_home


class Verb(NamedTuple):
    """A verb: its help text, and the functions that run it, add its flags and return its help page.

    Functions are strings `module:name`, because `training` and `hub_upload` import this package and not vice versa.
    """

    # Takes the parsed arguments, or the words of the command line if `flags` is None.
    run: str
    help: str
    # Adds the flags to a parser; some depend on the words of the command line. Its module imports nothing slow.
    flags: str | None = None
    # Returns the help page of a verb whose own parser imports something slow.
    page: str | None = None


_EVALUATION, _GENERATION, _REPORTS = "bd3lm_hf.evaluation", "bd3lm_hf.generation", "bd3lm_hf.reports"
_TRAINING, _HUB = "bd3lm_hf.training", "bd3lm_hf.hub_upload"

VERBS = {
    "train": Verb(
        f"{_TRAINING}.train:main",
        "train a model from a recipe and overrides",
        page=f"{_TRAINING}.command_help:train_help",
    ),
    "compare": Verb(
        f"{_TRAINING}.compare:main", "train and compare several models", page=f"{_TRAINING}.command_help:compare_help"
    ),
    "eval": Verb(
        f"{_EVALUATION}.dataset_scoring:run",
        "measure a model's perplexity on datasets, or score the text that it generates",
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
        "measure the quality of generated text against the speed of samplers",
        f"{_REPORTS}.reports_cli:add_quality_arguments",
    ),
    "report": Verb(
        f"{_REPORTS}.report:run",
        "write a page of curves, tables and samples",
        f"{_REPORTS}.reports_cli:add_report_arguments",
    ),
    "harness": Verb(f"{_EVALUATION}.eval_cli:run_harness", "run lm-evaluation-harness on models of this package"),
    "serve": Verb(
        "bd3lm_hf.serving.serve_cli:run",
        "start an OpenAI-compatible server for one model",
        "bd3lm_hf.serving.serve_cli:add_arguments",
    ),
    "bench": Verb(
        f"{_REPORTS}.benchmark:run",
        "measure speed and memory against a named rival",
        f"{_REPORTS}.reports_cli:add_bench_arguments",
    ),
    "convert": Verb(f"{_HUB}.convert:run", "convert a published checkpoint", f"{_HUB}.hub_cli:add_convert_arguments"),
    "push": Verb(
        f"{_HUB}.push:run", "upload a model so that anyone can load it", f"{_HUB}.hub_cli:add_push_arguments"
    ),
    "verify": Verb(
        f"{_HUB}.push:run_verify",
        "check a shared model against what was pushed",
        f"{_HUB}.hub_cli:add_verify_arguments",
    ),
}

# Flags of these verbs are also names of Python arguments, so they keep their underscores.
_KEEP_UNDERSCORES = {"train", "compare", "harness"}

# Errors that mean wrong input or too small a machine, not a defect. Those of libraries are listed by name: importing
# the libraries just to compare types would be slow.
_INPUT_ERRORS = (ValueError, OSError, OverflowError, MemoryError, RecursionError, ImportError)
_INPUT_ERROR_NAMES = {"YAMLError", "SafetensorError", "StrictDataclassError", "OutOfMemoryError"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb and return the exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    show_traceback = "--traceback" in words
    signals: list[int] = []
    try:
        with _ending_on_signals(signals):
            _run([word for word in words if word != "--traceback"])
        print(end="", flush=True)  # a closed pipe fails here, not at exit; does nothing without a standard output
        return 0
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(f"error: {one_line(stop.code)}", file=sys.stderr)
            return 2
        return stop.code or 0
    except KeyboardInterrupt as stop:
        return getattr(stop, "exit_code", 130)  # 143 after a SIGTERM
    except BrokenPipeError:
        # The reader, such as `head`, has closed the pipe. Python would report that again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # 128 + SIGPIPE, as other commands end
    except Exception as error:
        if signals:  # the import of native code swallowed the interrupt, and then failed half-finished
            return 128 + signals[0]
        if show_traceback:
            raise
        own_code = getattr(error, "exit_code", None)  # for errors that are neither wrong input nor a defect
        is_expected = own_code is not None or is_input_error(error)
        has_message = own_code is not None or isinstance(error, (ValueError, OSError))
        kind = "" if has_message else f"{type(error).__name__}: "
        advice = "" if is_expected else " (--traceback shows where)"
        print(f"error: {one_line(f'{kind}{error}')}{advice}", file=sys.stderr)
        return own_code or (2 if is_expected else 1)


class _Terminated(KeyboardInterrupt):
    """Raised on SIGTERM, so that a verb cleans up as after Ctrl-C and leaves only finished files."""

    exit_code = 143


@contextlib.contextmanager
def _ending_on_signals(received: list[int]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    pid = os.getpid()

    def end(signum: int, frame: Any) -> None:
        if os.getpid() == pid:
            received.append(signum)
        elif signum == signal.SIGTERM:
            signal.signal(signum, signal.SIG_DFL)  # a forked worker that its parent terminates
            signal.raise_signal(signum)
        raise _Terminated if signum == signal.SIGTERM else KeyboardInterrupt

    # A shell starts background jobs with Ctrl-C ignored; that must stay so.
    handled = [number for number in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, end) for number in handled}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def is_input_error(error: Exception) -> bool:
    """Return whether an error means wrong input or too small a machine."""
    if isinstance(error, _INPUT_ERRORS):
        return True
    if {kind.__name__ for kind in type(error).__mro__} & _INPUT_ERROR_NAMES:
        return True
    # torch has no class of its own for running out of memory on a CPU.
    return isinstance(error, RuntimeError) and "not enough memory" in str(error)


def _run(words: list[str]) -> None:
    if not words:
        make_parser().print_help()
    elif words[0] in VERBS:
        run_verb(words[0], words[1:])
    else:
        make_parser().parse_args(words)


def run_verb(name: str, words: Sequence[str]) -> None:
    """Run a verb. Its errors are raised; a wrong flag exits the process with code 2."""
    verb = VERBS[name]
    words = with_home(words if name in _KEEP_UNDERSCORES else with_dashes(words))
    if verb.page is not None and {"-h", "--help"} & set(words):
        print(_function(verb.page)())
    elif verb.flags is None:
        _function(verb.run)(words)
    else:
        arguments = make_verb_parser(name, words).parse_args(words)  # before importing the module that does the work
        _function(verb.run)(arguments)


def _function(name: str) -> Any:
    """Import and return the function `module:name`."""
    module, _, name = name.partition(":")
    return getattr(importlib.import_module(module), name)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser for a command line that does not begin with a known verb."""
    parser = ArgumentParser(prog="bd3lm", description="Block diffusion language models: train, evaluate, generate.")
    parser.add_argument("--version", action="version", version=f"bd3lm {bd3lm_hf.__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    for name, verb in VERBS.items():
        verbs.add_parser(name, help=verb.help, add_help=False)
    return parser


def make_verb_parser(name: str, words: Sequence[str] = ()) -> argparse.ArgumentParser:
    """Return the parser of a verb that has flags; some flags in `words` add others."""
    verb = VERBS[name]
    assert verb.flags is not None
    parser = ArgumentParser(prog=f"bd3lm {name}", description=f"{verb.help.capitalize()}.", allow_abbrev=False)
    _function(verb.flags)(parser, words)
    parser.add_argument("--traceback", action="store_true", help="show where an error was raised")
    return parser


def with_dashes(words: Sequence[str]) -> list[str]:
    """Return the words with dashes in their flags: `--max_new_tokens` becomes `--max-new-tokens`.

    Raises:
        ValueError: if a flag is given the value `--`, which makes argparse fail.
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
