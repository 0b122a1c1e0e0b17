"""Scores of sequences, shared among processes and kept on disk: an interrupted evaluation goes on where it stopped."""

import itertools
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from accelerate.utils import broadcast_object_list, gather_object
from tqdm.auto import tqdm

from bd3lm_hf.evaluation import Batch, Protocol, SequenceScore, batches_of, score_batch
from bd3lm_hf.fingerprint import digest


_T = TypeVar("_T")


class Processes(NamedTuple):
    """This process among those that share the work."""

    rank: int = 0
    size: int = 1

    def gather(self, items: list[_T]) -> list[_T]:
        """Everybody's items, in each process."""
        return gather_object(items) if self.size > 1 else items

    def broadcast(self, value: _T) -> _T:
        """The first process's value, in each process."""
        return broadcast_object_list([value])[0] if self.size > 1 else value


_ALONE = Processes()


class Progress(NamedTuple):
    """How far an evaluation has come."""

    scores: dict[int, SequenceScore]  # by row
    seconds: float  # spent on them


class ScoresFile:
    """A line of JSON for each round of batches, behind a line that says which run they belong to.

    A file holds the scores of any number of finished runs, as a table holds their results, and of at most one that was
    interrupted.

    Args:
        restart: drop what the file holds.

    Raises:
        ValueError: a file with something else in it.
    """

    def __init__(self, path: Path, *, restart: bool = False) -> None:
        self.path = path
        self._runs: dict[str, dict[str, Any]] = {}  # identities
        self._progress: dict[str, Progress] = {}
        self._finished: set[str] = set()
        self._size = 0  # bytes of complete lines
        if path.exists() and not restart:
            self._read()

    def _read(self) -> None:
        content = self.path.read_bytes()
        # A run that was killed while it wrote leaves a part of a line, which is not counted and later cut off.
        self._size = content.rfind(b"\n") + 1
        for number, line in enumerate(content[: self._size].splitlines(), start=1):
            try:
                self._take(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{self.path}: line {number} is no score of this command; move the file away, or name another "
                    f"output."
                ) from error

    def _take(self, entry: Mapping[str, Any]) -> None:
        run = entry["run"]
        if "identity" in entry:
            self._runs[run], self._progress[run] = entry["identity"], Progress({}, 0.0)
        elif "finished" in entry:
            self._finished.add(run)
        else:
            progress = self._progress[run]
            scores = {int(row): SequenceScore(int(row), float(nll), int(m)) for row, nll, m in entry["scores"]}
            self._progress[run] = Progress({**scores, **progress.scores}, progress.seconds + entry["seconds"])

    def _unfinished(self) -> list[str]:
        return [run for run in self._runs if run not in self._finished and self._progress[run].scores]

    def begin(self, identity: Mapping[str, Any]) -> Progress:
        """What is there of the run with this identity.

        Raises:
            ValueError: the file holds another run that was interrupted; the message says what differs.
        """
        identity = json.loads(json.dumps(identity))  # as it comes back from the file
        run = digest(identity)
        for other in self._unfinished():
            if other != run:
                old = self._runs[other]
                differences = [
                    f"{name} was {old.get(name)} and is {identity.get(name)}"
                    for name in {**old, **identity}
                    if old.get(name) != identity.get(name)
                ]
                raise ValueError(
                    f"{self.path} holds {len(self._progress[other].scores)} scores of another run that was "
                    f"interrupted: {'; '.join(differences)}. Repeat that run to finish it, name another output, or "
                    f"drop its scores with --restart."
                )
        if run not in self._runs:
            self._write({"run": run, "identity": identity})
        return self._progress[run]

    def append(self, identity: Mapping[str, Any], scores: Sequence[SequenceScore], seconds: float) -> None:
        """Keep the scores of one more round of the run with this identity."""
        self._write({"run": digest(identity), "scores": [list(score) for score in scores], "seconds": seconds})

    def finish(self, identity: Mapping[str, Any]) -> None:
        """Every sequence of the run with this identity is scored."""
        if digest(identity) not in self._finished:
            self._write({"run": digest(identity), "finished": True})

    def _write(self, entry: dict[str, Any]) -> None:
        """One line, whole or not at all: what a kill leaves of it is cut off by the next one."""
        with self.path.open("ab") as file:
            file.truncate(self._size)
            self._size += file.write(json.dumps(entry).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._take(entry)


def score_shared(
    model: Any,
    sequences: Sequence[Any],
    protocol: Protocol,
    *,
    batch_size: int,
    identity: Mapping[str, Any],
    file: ScoresFile | None = None,
    processes: Processes = _ALONE,
    progress: bool = False,
) -> Progress:
    """The scores of all sequences, in every process.

    Batches are those of a single process, each given whole to one of them, so that the number of processes does not
    even change rounding. A batch of which a score is missing in the file is scored again.

    Args:
        identity: what decides the scores, for the file.
        file: of the first process, None in the others; None keeps nothing.

    Raises:
        ValueError: the file holds another run that was interrupted.
    """
    begun = processes.broadcast(_begin(file, identity))
    if isinstance(begun, ValueError):
        raise begun
    scores, seconds = dict(begun.scores), begun.seconds
    missing = _missing(batches_of(sequences, range(len(sequences)), batch_size), frozenset(scores))
    with tqdm(total=len(sequences), initial=len(scores), desc="scoring", leave=False, disable=not progress) as bar:
        # A round is a batch for each process; in the last one some may have none.
        while batches := list(itertools.islice(missing, processes.size)):
            started = time.perf_counter()
            own = batches[processes.rank : processes.rank + 1]
            found = processes.gather([score for batch in own for score in score_batch(model, batch, protocol)])
            new = [SequenceScore(*score) for score in found if score[0] not in scores]
            spent = time.perf_counter() - started
            if file is not None:
                file.append(identity, new, spent)
            scores.update({score.row: score for score in new})
            seconds += spent
            bar.update(len(new))
    if file is not None:
        file.finish(identity)
    return Progress(scores, seconds)


def _begin(file: ScoresFile | None, identity: Mapping[str, Any]) -> Progress | ValueError:
    try:
        return Progress({}, 0.0) if file is None else file.begin(identity)
    except ValueError as error:
        return error  # for every process to raise


def _missing(batches: Iterable[Batch], done: frozenset[int]) -> Iterator[Batch]:
    return (batch for batch in batches if not done.issuperset(batch.indices))


__all__ = ["Processes", "Progress", "ScoresFile", "score_shared"]
