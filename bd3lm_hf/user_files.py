"""Files that users name: read small inputs safely, and write outputs without replacing foreign files.

JSON and YAML can come from strangers: their size and depth are limited, and keys of a YAML file must be unique. An
output may replace an empty file and a file of the same command. Any other file is foreign and stays, unless the user
passes `--overwrite`. Files of lines survive a kill, and only one process writes them at a time.
"""

import contextlib
import json
import math
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import yaml
from filelock import FileLock, Timeout


BASE_NAME = "base-model"  # in the folder of a run: the adapted decoder, to which its adapters belong
LOCK_NAME = ".lock"  # in an output folder; `.NAME.lock` next to an output file


# Small inputs


_MAX_JSON_BYTES = 10_000_000  # ours have a few kilobytes
_MAX_YAML_BYTES = 1_000_000
_MAX_VALUES = 100_000  # in a YAML file with its aliases expanded: 480 bytes can become gigabytes


_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def find_fault(path: str | Path) -> str:
    """Return why an existing file cannot be read, as a predicate, or an empty string.

    Libraries report a file without permission as missing, and a pointer of Git LFS as damaged.
    """
    try:
        with open(path, "rb") as file:
            if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
                return "is a pointer of Git LFS, not the data: run `git lfs pull`"
    except PermissionError:
        return "cannot be read: permission denied"
    except OSError:
        pass
    return ""


def read_json(path: str | Path, *, max_bytes: int = _MAX_JSON_BYTES) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        ValueError: if the file is too large, is not valid JSON, or is not an object.
    """
    path = Path(path)
    try:
        if path.stat().st_size > max_bytes:
            raise ValueError(f"it has more than {max_bytes:,} bytes")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} has a {type(content).__name__} instead of an object.")
    return content


def read_yaml(path: str | Path) -> Any:
    """Return the content of a small YAML file such as a recipe.

    Raises:
        ValueError: if the file is not readable YAML, repeats a key, or is too large with its aliases expanded.
    """
    path = Path(path)
    if path.stat().st_size > _MAX_YAML_BYTES:
        raise ValueError(f"{path} has more than {_MAX_YAML_BYTES:,} bytes, so it is not a recipe.")
    try:
        text = path.read_text(encoding="utf-8-sig")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is not None and _count_values(node, {}) > _MAX_VALUES:
            raise ValueError(f"it has more than {_MAX_VALUES:,} values with its aliases expanded.")
        return yaml.safe_load(text)
    except RecursionError:
        raise ValueError(f"{path} is not readable YAML: it is nested too deeply.") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ValueError(f"{path}, line {line}: not readable YAML ({error.problem}).") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path} is not readable YAML: {' '.join(str(error).split())}") from error


def _count_values(node: Any, counted: dict[int, float]) -> float:
    """Return the number of values below a node, with each use of an alias counted; refuse repeated keys."""
    if id(node) in counted:
        return counted[id(node)]
    counted[id(node)] = math.inf  # until it is known: an alias to an enclosing node has no end
    children = node.value if isinstance(node, (yaml.SequenceNode, yaml.MappingNode)) else []
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in children if isinstance(key, yaml.ScalarNode)]
        repeated = [key for key, count in Counter(keys).items() if count > 1 and key != "<<"]
        if repeated:
            raise ValueError(f"line {node.start_mark.line + 1}: the key {repeated[0]!r} appears twice.")
        children = [child for pair in children for child in pair]
    counted[id(node)] = 1 + sum(_count_values(child, counted) for child in children)
    return counted[id(node)]


# Which files may be replaced


def check_output_file(
    path: str | Path, flag: str, *, is_ours: Callable[[Path], bool] | None = None, overwrite: bool = False
) -> None:
    """Refuse a file that cannot or must not be written, before any work. Changes nothing.

    Args:
        flag: the flag that names the file, for messages.
        is_ours: recognises a file that this command wrote earlier; None skips this check, for callers that check the
            content themselves.
        overwrite: replace a foreign file too.

    Raises:
        ValueError: if the folder does not exist or is not writable, or the path is a folder or a foreign file.
    """
    path = Path(path)
    folder = path.absolute().parent
    if str(path) == "-":
        raise ValueError(f"{flag} - would be a file called '-', not standard output: name a file.")
    if not folder.is_dir():
        raise ValueError(f"{flag} {path}: the folder {folder} does not exist. Create it first.")
    if path.is_dir():
        raise ValueError(f"{flag} {path} is a folder: name a file.")
    if is_device(path):
        return
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{flag} {path}: no permission to write into {folder}.")
    if is_ours is None or overwrite or not path.exists() or path.stat().st_size == 0:
        return
    if not is_ours(path):
        raise ValueError(
            f"{flag} {path} exists and was not written by this command: name another file, or replace it with "
            f"--overwrite."
        )


def is_json_with(*keys: str) -> Callable[[Path], bool]:
    """Return a function that tests whether a file is a JSON object with these keys."""

    def is_ours(path: Path) -> bool:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return False
        return isinstance(content, dict) and all(key in content for key in keys)

    return is_ours


def has_mark(*marks: bytes) -> Callable[[Path], bool]:
    """Return a function that tests whether one of `marks` is in the first 4,096 bytes of a file."""

    def is_ours(path: Path) -> bool:
        try:
            with path.open("rb") as file:
                head = file.read(4096)
        except OSError:
            return False
        return any(mark in head for mark in marks)

    return is_ours


def is_device(path: str | Path) -> bool:
    """Return whether a path is a terminal, pipe or device such as /dev/stdout: written to, never replaced."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Add the name of a file to errors of writing to it, which the system leaves out."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Write a small file so that `path` is either the old or the new file, whatever happens.

    A symbolic link at `path` is replaced by the file; its target is not touched.
    """
    path = Path(path)
    data = content.encode("utf-8") if isinstance(content, str) else content
    if is_device(path):
        with _naming(path):
            path.write_bytes(data)
        return
    unfinished = path.with_name(f".{path.name}.incomplete")
    unfinished.unlink(missing_ok=True)
    try:
        # "x" does not follow a link that somebody else created there in the meantime.
        with _naming(path), unfinished.open("xb") as file:
            file.write(data)
        os.replace(unfinished, path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise


# Files of lines


class JsonLinesFile:
    """A file with one JSON object per line, which grows while a command runs and which the next run continues.

    A killed run leaves at most one incomplete line, which the next line replaces. Use [`lock_output`] to keep other
    processes away.

    Args:
        label: the flag and name of the file, for messages.
        first_key: the first key of every object, by which an incomplete line is recognised as ours.
        remedy: advice on a foreign file.
        replace: discard the old content, which stays until the first line is written.
    """

    def __init__(self, path: Path, label: str, *, first_key: str, remedy: str, replace: bool = False) -> None:
        self.path, self.label, self._remedy = path, label, remedy
        self._line_start = f'{{"{first_key}": '.encode()
        self._replace = replace
        self._size = 0  # bytes of complete lines
        self._size_on_disk = 0  # at most, with an incomplete last line

    def read_lines(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the number of each line, counted from 1, and its object; all must be read before a line is written.

        Raises:
            ValueError: if a line is not an object, or the file ends in anything but the beginning of one of our lines.
        """
        content = self.path.read_bytes() if self.path.exists() and not is_device(self.path) else b""
        self._size, self._size_on_disk = content.rfind(b"\n") + 1, len(content)
        number = 0
        for number, line in enumerate(content[: self._size].splitlines(), start=1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                raise self.foreign_line(number)
            yield number, row
        # A foreign file without a newline would look like one incomplete line, and would be cut off.
        rest = content[self._size :]
        if rest[: len(self._line_start)] != self._line_start[: len(rest)]:
            raise self.foreign_line(number + 1)

    def foreign_line(self, number: int) -> ValueError:
        """Return the error for a line that this command did not write."""
        return ValueError(f"{self.label}: line {number} was not written by this command; {self._remedy}.")

    def write_line(self, row: dict[str, Any]) -> None:
        """Append an object; it is not lost if the process is killed after this returns.

        Raises:
            ValueError: if another process changed the file.
        """
        line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
        if self._replace and not is_device(self.path):
            write_atomically(self.path, line)  # the old file stays until now
            self._replace, self._size, self._size_on_disk = False, 0, len(line)
        else:
            with _naming(self.path), self.path.open("ab") as file:
                if not is_device(self.path):
                    self._cut_incomplete_line(file)
                self._size_on_disk = self._size + len(line)  # or less, if a signal interrupts the write
                file.write(line)
        self._size += len(line)

    def _cut_incomplete_line(self, file: BinaryIO) -> None:
        size = os.fstat(file.fileno()).st_size
        if not self._size <= size <= self._size_on_disk:
            raise ValueError(
                f"{self.label} has {size} bytes instead of {self._size_on_disk}: another process changed it. Run "
                f"again to continue after its last line."
            )
        file.truncate(self._size)


# One process at a time


@contextlib.contextmanager
def lock_output(path: str | Path, flag: str) -> Iterator[None]:
    """Keep other processes from writing to an output file or an existing output folder.

    The lock ends with the process, even if that is killed while a worker that it forked lives on.

    Args:
        flag: the flag that names the file or folder, for messages.

    Raises:
        ValueError: if another process holds the lock.
    """
    path = Path(path)
    if is_device(path):
        yield
        return
    file = path / LOCK_NAME if path.is_dir() else path.with_name(f".{path.name}{LOCK_NAME}")
    lock = FileLock(file, blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"{flag} {path} is in use by another process: wait until it ends, or name another output."
        ) from None
    try:
        yield
    finally:
        # The name is removed first: a process that opened the file before that finds that it has no name any more.
        with contextlib.suppress(OSError):
            file.unlink()
        lock.release()
