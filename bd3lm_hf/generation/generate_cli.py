"""`bd3lm generate` and `bd3lm infill`: flags, prompts and checks. Imports nothing slow.

The commands themselves are in `write_samples.py`.
"""

import argparse
import json
import os
import select
import stat
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO

from bd3lm_hf.console import add_model_arguments, integer, number
from bd3lm_hf.generation.denoising_trace import ENDINGS
from bd3lm_hf.user_files import check_output_file, has_mark


#: Fields of the generation config that have a flag: type and help.
FIELDS: dict[str, tuple[Callable[[str], Any], str]] = {
    "num_denoising_steps": (integer(1), "denoising steps per block; by default as many as the sampler needs"),
    "confidence_threshold": (number(1, allow_zero=True), "confidence: reveal above this probability; 1: one by one"),
    "entropy_bound": (number(allow_zero=True), "entropy_bound: nats of uncertainty that one step may reveal"),
    "remask_fraction": (number(1, allow_zero=True), "fraction of each block to mask and reveal again"),
    "window_stride": (integer(1), "MDLM, SEDD: tokens by which a full window moves; by default half of it"),
    "temperature": (number(), "divides the logits; below 1 sharpens the distribution"),
    "top_k": (integer(0), "sample from the k most likely tokens; 0: all"),
    "top_p": (number(1), "sample from the most likely tokens that together reach this probability"),
    "nucleus_p": (number(1), "the paper's nucleus, which drops the token that crosses p; the paper uses 0.9"),
    "repetition_penalty": (number(), "above 1 discourages tokens that have occurred"),
    "entropy_stop": (number(), "stop when the last tokens have a lower entropy, in nats; the paper uses 4"),
    "entropy_stop_window": (integer(1), "number of last tokens that --entropy-stop looks at"),
    "max_time": (number(), "stop a batch after this many seconds, at the end of its current block"),
}

#: Fields whose flag takes one of these values, the keys of tables in `modeling`. Copied, because `modeling` needs
#: torch; a test compares them.
CHOICES: dict[str, tuple[tuple[str, ...], str]] = {
    "sampler": (
        ("first_hitting", "ancestral", "confidence", "entropy_bound", "analytic"),
        "decides which masked positions each step reveals",
    ),
    "sampling_dtype": (("float32", "float64"), "precision of the probabilities that tokens are sampled from"),
    "context": (("all", "previous_block"), "simplex diffusion: what a block is conditioned on"),
    "projection": (("sampling", "even", "uneven"), "simplex diffusion: how a step projects the logits"),
}

#: Fields and choices of `bd3lm infill`, without those that decide where a text ends or belong to other models.
INFILL_FIELDS = [
    name for name in FIELDS if name not in ("window_stride", "entropy_stop", "entropy_stop_window", "max_time")
]
INFILL_CHOICES = ("sampler", "sampling_dtype")

_OTHER_FIELDS = ("max_new_tokens", "do_sample", "stop_at_second_eos")
_BATCH_SIZE = 8


def add_generate_arguments(parser: argparse.ArgumentParser, words: Sequence[str] = ()) -> None:
    """Add the flags of `bd3lm generate`."""
    add_model_arguments(parser)
    what = parser.add_argument_group("what to generate")
    source = what.add_mutually_exclusive_group()
    source.add_argument(
        "--prompt", action="append", help="text to continue; may be repeated; - reads lines of standard input"
    )
    source.add_argument("--chat", action="store_true", help="answer messages typed in a terminal, until Ctrl-D")
    source.add_argument("--prompt-file", help="a prompt per line, or a .jsonl file with `prompt` in every object")
    what.add_argument("--num-samples", type=integer(1), default=1, help="number of texts, for each prompt (1)")
    what.add_argument("--max-new-tokens", type=integer(1), default=64, help="longest continuation, in tokens (64)")
    what.add_argument(
        "--batch-size",
        type=integer(1),
        help=f"texts generated at once ({_BATCH_SIZE}, or 1 with --stream); apart from rounding, it does not change "
        f"the texts",
    )
    how = parser.add_argument_group("how to generate")
    add_do_sample(how)
    add_sampling(how, FIELDS)
    how.add_argument(
        "--stop-at-second-eos",
        action="store_true",
        default=None,
        help="the paper's rule: stop at the second end token",
    )
    where = parser.add_argument_group("output")
    where.add_argument("--stream", action="store_true", help="show each text while it is generated")
    where.add_argument(
        "--output",
        type=Path,
        help="samples file, a JSON object per line; a rerun continues it, and can add samples per prompt as if from "
        "one larger run",
    )
    where.add_argument("--overwrite", action="store_true", help="replace existing files")
    where.add_argument(
        "--trace",
        type=Path,
        action="append",
        default=[],
        help="page (.html) or data (.json) that replays every denoising step",
    )


def add_infill_arguments(parser: argparse.ArgumentParser, words: Sequence[str] = ()) -> None:
    """Add the flags of `bd3lm infill`."""
    add_model_arguments(parser)
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--text", action="append", help="text with gaps; may be repeated; - reads lines of standard input"
    )
    source.add_argument("--text-file", help="a text per line, or a .jsonl file with `prompt` in every object")
    parser.add_argument("--gap", default="___", help="what marks a gap (___); the mask token always does")
    parser.add_argument("--gap-tokens", type=integer(1), default=1, help="tokens per gap (1)")
    how = parser.add_argument_group("how to fill")
    add_do_sample(how)
    add_sampling(how, INFILL_FIELDS, INFILL_CHOICES)


def add_do_sample(group: Any) -> None:
    """Add `--do-sample` and `--greedy`, which exclude each other."""
    choice = group.add_mutually_exclusive_group()
    choice.add_argument("--do-sample", action="store_true", default=True, help="sample tokens (default)")
    choice.add_argument("--greedy", dest="do_sample", action="store_false", help="take the most likely token")


def add_sampling(group: Any, fields: Iterable[str], choices: Iterable[str] = CHOICES) -> None:
    """Add the sampling flags of these `FIELDS` and `CHOICES`."""
    for name in choices:
        values, text = CHOICES[name]
        group.add_argument(f"--{name.replace('_', '-')}", choices=values, help=text)
    for name in fields:
        kind, text = FIELDS[name]
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, help=text)


def plan(arguments: argparse.Namespace) -> list[str | None]:
    """Refuse flags that contradict each other, and return the prompt of each sample, before a model is loaded.

    All samples of a prompt are adjacent. The batch size gets its default.
    """
    if arguments.stream and (arguments.batch_size or 1) > 1:
        raise ValueError(f"--stream shows one text at a time: leave out --batch-size {arguments.batch_size}.")
    arguments.batch_size = arguments.batch_size or (1 if arguments.stream else _BATCH_SIZE)
    if arguments.overwrite and arguments.output is None and not arguments.trace:
        raise ValueError("--overwrite replaces files: name one with --output or --trace.")
    for path in arguments.trace:
        if path.suffix.lower() not in ENDINGS:
            raise ValueError(f"--trace {path}: the name of a trace must end in {' or '.join(ENDINGS)}.")
        is_ours = has_mark(b"<title>Denoising, block by block</title>", b'{"format": "bd3lm-trace"')
        check_output_file(path, "--trace", is_ours=is_ours, overwrite=arguments.overwrite)
        if arguments.output is not None and path.absolute() == arguments.output.absolute():
            raise ValueError(f"--trace {path} would replace the samples of --output: name another file.")
    if arguments.output is not None:
        check_output_file(arguments.output, "--output")
    prompts = read_prompts(arguments.prompt, arguments.prompt_file)
    return [prompt for prompt in prompts for _ in range(arguments.num_samples)]


def generation_fields(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `generate` that were given."""
    chosen = {name: getattr(arguments, name, None) for name in (*_OTHER_FIELDS, *CHOICES, *FIELDS)}
    return {name: value for name, value in chosen.items() if value is not None}


def check_chat_arguments(arguments: argparse.Namespace) -> None:
    """Refuse flags that mean nothing in a conversation."""
    given = {
        "--num-samples": arguments.num_samples != 1,
        "--batch-size": arguments.batch_size is not None,
        "--output": arguments.output is not None,
        "--overwrite": arguments.overwrite,
        "--trace": arguments.trace != [],
    }
    if unfit := [name for name, is_given in given.items() if is_given]:
        raise ValueError(f"--chat shows one answer at a time: leave out {', '.join(unfit)}.")


# Prompts


STDIN = "-"  # the name that means standard input


def read_prompts(texts: Sequence[str] | None, file: str | None, *, flag: str = "--prompt") -> list[str | None]:
    """Return the prompts of `--prompt` (texts), `--prompt-file` (a name) or standard input; `[None]` without any.

    A file has one prompt per line; a line of a `.jsonl` file is an object with a `prompt`. Blank lines are skipped.
    `"-"` is standard input, which is also read if no prompts are given and input is piped in.

    Raises:
        ValueError: if a file is missing, has no prompts or is not UTF-8, or a prompt is missing or empty.
    """
    if texts and list(texts) != [STDIN]:
        return list(_checked((f"{flag} {number}", text) for number, text in enumerate(texts, start=1)))
    name = STDIN if texts else file
    if name is not None:
        return _lines(name, _content(name, f"{flag}-file"))
    if _is_piped(sys.stdin) and (text := _content(STDIN, "")).strip():
        return _lines(STDIN, text)
    return [None]


def _content(file: str, flag: str) -> str:
    path, name = Path(file).expanduser(), "standard input" if file == STDIN else f"{flag} {file}"
    if file != STDIN and not path.is_file():
        raise ValueError(f"{name}: there is no such file.")
    try:
        return sys.stdin.read() if file == STDIN else path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8: byte {error.start} cannot be decoded.") from error


def _lines(file: str, text: str) -> list[str | None]:
    name = "standard input" if file == STDIN else file
    numbered = enumerate((line.removesuffix("\r") for line in text.split("\n")), start=1)
    lines = [(f"line {number} of {name}", line) for number, line in numbered if line.strip()]
    if not lines:
        raise ValueError(f"{name} has no prompts: write one per line.")
    is_json = file.lower().endswith(".jsonl")
    return list(_checked((position, _prompt_of(line, position) if is_json else line) for position, line in lines))


def _prompt_of(line: str, position: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{position} is not JSON: {error}.") from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise ValueError(f'{position} has no prompt: write objects such as {{"prompt": "Once"}}.')
    return str(row["prompt"])


def _checked(prompts: Iterable[tuple[str, str]]) -> Iterable[str]:
    for position, text in prompts:
        if not text.strip():
            raise ValueError(f"{position} is an empty prompt: remove it. To start from nothing, give no prompt.")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{position} is not UTF-8: character {error.start} cannot be encoded.") from error
        yield text


def _is_piped(stdin: TextIO) -> bool:
    """Return whether standard input has data; do not wait for an open but silent pipe."""
    try:
        mode = os.fstat(stdin.fileno()).st_mode
        return (stat.S_ISFIFO(mode) or stat.S_ISREG(mode)) and bool(select.select([stdin], [], [], 0)[0])
    except (OSError, ValueError, AttributeError):
        return False  # closed, or not a real file
