"""Prompts that come in and samples that go out of `bd3lm generate`, as files of lines."""

import json
import os
import select
import stat
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from bd3lm_hf.output_files import check_output_file


#: The name that means standard input.
STDIN = "-"


@dataclass
class Sample:
    """One text and how it came about: a line of the samples file."""

    index: int  # prompts * num_samples in all, the samples of a prompt behind one another
    prompt: str | None  # None: written from nothing
    text: str  # the prompt included
    num_prompt_tokens: int
    num_tokens: int  # new ones, an end token included
    seed: int
    forwards: int | None  # passes of the network for the batch this sample was in; None where a model does not count
    tokens_per_forward: float | None
    seconds: float  # its share of its batch's time
    model: str
    settings: dict[str, Any]  # what decides the text, beside the model and the prompt


def read_prompts(given: Sequence[str] | None, file: str | None, stdin: TextIO | None = None) -> list[str | None]:
    """The prompts of `--prompt` (texts), `--prompt-file` (a name) or standard input; `[None]` if there is none.

    A file holds one prompt per line; a line of a `.jsonl` file is an object with a `prompt`. `"-"` is standard input,
    which is also read when nothing is named and something is piped in.

    Raises:
        ValueError: a file that is missing, empty or not UTF-8; an empty prompt; a line that holds no prompt.
    """
    stdin = sys.stdin if stdin is None else stdin
    if given and list(given) != [STDIN]:
        return list(_checked((f"--prompt {number}", text) for number, text in enumerate(given, start=1)))
    if given or file == STDIN:
        return _lines(STDIN, stdin.read())
    if file is not None:
        return _lines(file, _text_of(file))
    if _is_piped(stdin):
        text = stdin.read()
        if text:
            return _lines(STDIN, text)
    return [None]


def _text_of(file: str) -> str:
    path = Path(file).expanduser()
    if not path.is_file():
        raise ValueError(f"--prompt-file {file}: there is no such file.")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompt-file {file} is not UTF-8: byte {error.start} can not be decoded.") from error


def _lines(file: str, text: str) -> list[str | None]:
    name = "standard input" if file == STDIN else file
    lines = text.removesuffix("\n").split("\n") if text else []
    if not lines:
        raise ValueError(f"{name} holds no prompt: write one prompt per line.")
    is_json = file.lower().endswith(".jsonl")
    places = ((f"line {number} of {name}", line.removesuffix("\r")) for number, line in enumerate(lines, start=1))
    return list(_checked((place, _prompt_of(line, place) if is_json else line) for place, line in places))


def _prompt_of(line: str, place: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{place} is no JSON: {error}.") from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise ValueError(f'{place} has no prompt: write objects such as {{"prompt": "Once"}}.')
    return str(row["prompt"])


def _checked(prompts: Iterable[tuple[str, str]]) -> Iterable[str]:
    for place, text in prompts:
        if not text.strip():
            raise ValueError(f"{place} is an empty prompt: remove it; without any prompt a text starts from nothing.")
        yield text


def _is_piped(stdin: TextIO) -> bool:
    """Whether something was sent to standard input; an open but silent pipe is not waited for."""
    try:
        mode = os.fstat(stdin.fileno()).st_mode
        return (stat.S_ISFIFO(mode) or stat.S_ISREG(mode)) and bool(select.select([stdin], [], [], 0)[0])
    except (OSError, ValueError, AttributeError):
        return False  # closed, or not a real file


class SamplesFile:
    """Samples, one JSON object per line, each on disk as soon as it is finished; a rerun continues behind them.

    Args:
        prompts: that of each sample.
        settings: what decides the texts; a file that was written with others is refused.
        overwrite: start anew.
        argument: what the user calls the file, for messages.

    Raises:
        ValueError: a folder that does not exist, a file with something else in it, or samples of other settings.
    """

    def __init__(
        self,
        path: Path,
        prompts: Sequence[str | None],
        settings: dict[str, Any],
        *,
        overwrite: bool = False,
        argument: str = "--output",
    ) -> None:
        self.path, self.prompts, self.settings, self.argument = path, prompts, settings, argument
        self.finished: set[int] = set()
        self._size = 0  # bytes of complete lines
        check_output_file(path, argument)
        if path.exists() and not overwrite:
            self._read()

    def _read(self) -> None:
        content = self.path.read_bytes()
        # A run that was killed while it wrote leaves a part of a line, which is not counted and later cut off.
        self._size = content.rfind(b"\n") + 1
        for number, line in enumerate(content[: self._size].splitlines(), start=1):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict) or not isinstance(row.get("index"), int) or "settings" not in row:
                raise ValueError(
                    f"{self.argument} {self.path}: line {number} is no sample of this command; name another file, or "
                    f"replace it with --overwrite."
                )
            self._check(number, row)
            self.finished.add(row["index"])

    def _check(self, number: int, row: dict[str, Any]) -> None:
        settings, wanted = dict(row["settings"]), dict(self.settings)
        if row["index"] < len(self.prompts):
            settings["prompt"], wanted["prompt"] = row["prompt"], self.prompts[row["index"]]
        differences = [
            f"{name} is {settings.get(name)!r} there and {wanted.get(name)!r} now"
            for name in {**wanted, **settings}
            if settings.get(name) != wanted.get(name)
        ]
        if differences:
            raise ValueError(
                f"{self.argument} {self.path}: line {number} was written with other settings "
                f"({'; '.join(differences)}): repeat them to continue, name another file, or replace it with "
                f"--overwrite."
            )

    def rows(self) -> list[dict[str, Any]]:
        """The finished samples that were asked for, in the order of their numbers."""
        if not self.finished:
            return []
        lines = self.path.read_bytes()[: self._size].splitlines()
        rows = {row["index"]: row for row in map(json.loads, lines)}
        return [rows[index] for index in range(len(self.prompts)) if index in rows]

    def append(self, samples: Iterable[Sample]) -> None:
        """Write samples that are not there yet, each with a flush of its own."""
        with self.path.open("ab") as file:
            file.truncate(self._size)
            for sample in samples:
                if sample.index not in self.finished:
                    self._size += file.write(json.dumps(asdict(sample), ensure_ascii=False).encode() + b"\n")
                    file.flush()
                    self.finished.add(sample.index)


__all__ = ["STDIN", "Sample", "SamplesFile", "read_prompts"]
