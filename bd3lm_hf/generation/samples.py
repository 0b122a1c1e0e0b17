"""Prompts that `bd3lm generate` reads, and samples that it writes: files of lines."""

import contextlib
import itertools
import json
import os
import select
import stat
import sys
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

from bd3lm_hf.seeds import derived_seed
from bd3lm_hf.user_files import JsonLinesFile, check_output_file, lock_output


if TYPE_CHECKING:
    from bd3lm_hf.generation.text_generation import GeneratedText

_Sample = TypeVar("_Sample", bound="Sample")

STDIN = "-"  # the name that means standard input


@dataclass
class Sample:
    """One text and how it came about: a line of the samples file."""

    index: int  # its number in the file
    prompt: str | None  # None: generated from nothing
    text: str  # the prompt included
    num_prompt_tokens: int
    num_tokens: int  # new ones, an end token included
    seed: int
    forwards: int  # forward passes that this text takes when it is generated alone
    batch_forwards: int  # forward passes of its batch
    tokens_per_forward: float  # num_tokens / forwards
    seconds: float  # its share of its batch's time
    model: str
    settings: dict[str, Any]  # what decides the text, apart from the prompt

    @classmethod
    def of(
        cls: type[_Sample],
        text: "GeneratedText",
        tokenizer: Any,
        *,
        index: int,
        prompt: str | None,
        settings: Mapping[str, Any],
        **fields: Any,
    ) -> _Sample:
        """Describe a generated text.

        Args:
            settings: what decides the text; they have its `model` and `seed`.
            fields: of a subclass.
        """
        num_tokens = len(text.new_ids)
        return cls(
            index=index,
            prompt=prompt,
            text=str(tokenizer.decode(text.ids, skip_special_tokens=True)),
            num_prompt_tokens=text.num_given,
            num_tokens=num_tokens,
            seed=settings["seed"],
            forwards=text.forwards,
            batch_forwards=text.batch_forwards,
            tokens_per_forward=num_tokens / max(1, text.forwards),
            seconds=text.seconds,
            model=settings["model"],
            settings=dict(settings),
            **fields,
        )


# Prompts


def read_prompts(
    texts: Sequence[str] | None, file: str | None, stdin: TextIO | None = None, *, flag: str = "--prompt"
) -> list[str | None]:
    """Return the prompts of `--prompt` (texts), `--prompt-file` (a name) or standard input; `[None]` without any.

    A file holds one prompt per line; a line of a `.jsonl` file is an object with a `prompt`. Blank lines are skipped.
    `"-"` is standard input, which is also read when nothing is named and something is piped in.

    Raises:
        ValueError: if a file is missing, without prompts or not UTF-8, a prompt is empty, or a line holds none.
    """
    stdin = sys.stdin if stdin is None else stdin
    if texts and list(texts) != [STDIN]:
        return list(_checked((f"{flag} {number}", text) for number, text in enumerate(texts, start=1)))
    if texts or file == STDIN:
        return _lines(STDIN, _read_stdin(stdin))
    if file is not None:
        return _lines(file, _text_of(file, f"{flag}-file"))
    if _is_piped(stdin):
        text = _read_stdin(stdin)
        if text.strip():
            return _lines(STDIN, text)
    return [None]


def _read_stdin(stdin: TextIO) -> str:
    try:
        return stdin.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is not UTF-8: byte {error.start} cannot be decoded.") from error


def _text_of(file: str, flag: str) -> str:
    path = Path(file).expanduser()
    if not path.is_file():
        raise ValueError(f"{flag} {file}: there is no such file.")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{flag} {file} is not UTF-8: byte {error.start} cannot be decoded.") from error


def _lines(file: str, text: str) -> list[str | None]:
    name = "standard input" if file == STDIN else file
    numbered = enumerate((line.removesuffix("\r") for line in text.split("\n")), start=1)
    lines = [(f"line {number} of {name}", line) for number, line in numbered if line.strip()]
    if not lines:
        raise ValueError(f"{name} holds no prompt: write one prompt per line.")
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
            raise ValueError(f"{position} is an empty prompt: remove it. Without a prompt, text starts from nothing.")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{position} is not UTF-8: character {error.start} cannot be encoded.") from error
        yield text


def _is_piped(stdin: TextIO) -> bool:
    """Whether something was sent to standard input; an open but silent pipe is not waited for."""
    try:
        mode = os.fstat(stdin.fileno()).st_mode
        return (stat.S_ISFIFO(mode) or stat.S_ISREG(mode)) and bool(select.select([stdin], [], [], 0)[0])
    except (OSError, ValueError, AttributeError):
        return False  # closed, or not a real file


# Samples


# Settings of earlier versions that do not decide a text.
_IGNORED_SETTINGS = {"num_prompts", "num_samples", "batch_size", "samples_per_prompt"}


class SamplesFile(JsonLinesFile):
    """A file of samples, each on disk as soon as it is finished; a rerun continues after them.

    Use [`open_samples`], which keeps other processes away from the file.

    Args:
        prompts: that of each requested sample. Finished samples of a prompt are kept; the missing ones get the first
            free indices, so that a file can grow by samples per prompt and by prompts.
        settings: what decides the texts; a file with other settings is refused.
        overwrite: start again. The old file stays until the first sample is finished.
        flag: what the user calls the file, for messages.

    Raises:
        ValueError: if the folder does not exist, or the file holds something else, or samples of other settings.
    """

    def __init__(
        self,
        path: Path,
        prompts: Sequence[str | None],
        settings: dict[str, Any],
        *,
        overwrite: bool = False,
        flag: str = "--output",
    ) -> None:
        remedy = "name another file, or replace it with --overwrite"
        super().__init__(path, f"{flag} {path}", first_key="index", remedy=remedy, replace=overwrite)
        self.prompts, self.settings = prompts, settings
        self._requested = set(prompts)
        check_output_file(path, flag)
        found: dict[int, str | None] = {}
        for number, row in () if overwrite else self.read_lines():
            self._check(number, row)
            found[row["index"]] = row.get("prompt")
        self.finished = set(found)
        #: The index of each requested sample.
        self.indices = _assign_indices(prompts, found)

    def _check(self, number: int, row: dict[str, Any]) -> None:
        if not isinstance(row.get("index"), int) or not isinstance(row.get("settings"), dict):
            raise self.foreign_line(number)
        old = {name: value for name, value in row["settings"].items() if name not in _IGNORED_SETTINGS}
        new = dict(self.settings)
        if row.get("prompt") not in self._requested:
            old["prompt"], new["prompt"] = row.get("prompt"), self.prompts[min(row["index"], len(self.prompts) - 1)]
        differences = [
            f"{name} is {old.get(name)!r} there and {new.get(name)!r} now"
            for name in {**new, **old}
            if old.get(name) != new.get(name)
        ]
        if differences:
            raise ValueError(
                f"{self.label}: line {number} was written with other settings ({'; '.join(differences)}): repeat them "
                f"to continue, name another file, or replace it with --overwrite."
            )

    def missing(self) -> dict[int, str | None]:
        """Return the prompts of the requested samples that are not finished, by their indices."""
        requested = zip(self.indices, self.prompts, strict=True)
        return {index: prompt for index, prompt in requested if index not in self.finished}

    def rows(self) -> list[dict[str, Any]]:
        """Return the requested samples that are finished, in the order of the request."""
        rows = {row["index"]: row for _, row in self.read_lines()} if self.finished else {}
        return [rows[index] for index in self.indices if index in rows]

    def append(self, samples: Iterable[Sample]) -> None:
        """Write samples that are not there yet, each on disk before the next is taken.

        Raises:
            ValueError: if another process changed the file.
        """
        for sample in samples:
            if sample.index not in self.finished:
                self.write_line(asdict(sample))
                self.finished.add(sample.index)


def _assign_indices(prompts: Sequence[str | None], found: Mapping[int, str | None]) -> list[int]:
    """Return an index for the sample of each prompt: of one that was found, or the next that is free."""
    of_prompt: defaultdict[str | None, deque[int]] = defaultdict(deque)
    for index in sorted(found):
        of_prompt[found[index]].append(index)
    free = itertools.filterfalse(found.__contains__, itertools.count())
    return [of_prompt[prompt].popleft() if of_prompt[prompt] else next(free) for prompt in prompts]


def sample_seeds(seed: int, prompts: Sequence[str | None], indices: Sequence[int]) -> dict[int, int]:
    """Return the seed of each sample by its index.

    It follows from a count of the first samples of all prompts, then their second ones, and so on. So a file to which
    samples are added has the texts of one larger run. Prompts that are added to several samples each would have other
    texts in a fresh run.

    Args:
        seed: of the run.
        prompts, indices: of each requested sample.
    """
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    counts: Counter[str | None] = Counter()
    seeds = {}
    for index, prompt in sorted(zip(indices, prompts, strict=True), key=lambda sample: sample[0]):
        seeds[index] = derived_seed(seed, counts[prompt] * len(numbers) + numbers[prompt])
        counts[prompt] += 1
    return seeds


@contextlib.contextmanager
def open_samples(
    path: Path,
    prompts: Sequence[str | None],
    settings: dict[str, Any],
    *,
    overwrite: bool = False,
    flag: str = "--output",
) -> Iterator[SamplesFile]:
    """Open a [`SamplesFile`] that no other process writes to at the same time.

    Raises:
        ValueError: if another process does, or the file is refused.
    """
    check_output_file(path, flag)
    with lock_output(path, flag):
        yield SamplesFile(path, prompts, settings, overwrite=overwrite, flag=flag)
