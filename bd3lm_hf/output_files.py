"""Output files: one rule for what may be replaced, and one process at a time for each output.

A path is free if nothing is there, or an empty file. A file of the same command may be replaced. Any other file is
foreign and stays, unless the user asks for it with `--overwrite`.
"""

import contextlib
import errno
import json
import os
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


BASE_NAME = "base-model"  # in the folder of a run: what a plain decoder became, the base of its adapters
LOCK_NAME = ".lock"  # in an output folder; `.NAME.lock` next to an output file


# Which files may be replaced


def check_output_file(
    path: str | Path, flag: str, *, is_ours: Callable[[Path], bool] | None = None, overwrite: bool = False
) -> None:
    """Refuse a file that cannot or must not be written, before any work. Changes nothing.

    Args:
        flag: what the user calls the file, for messages.
        is_ours: recognises a file that this command wrote earlier; None does not look at what is there (for callers
            that check the content themselves).
        overwrite: replace a foreign file too.

    Raises:
        ValueError: if the folder does not exist or is not writable, the path is a folder, or a foreign file is there.
    """
    path = Path(path)
    folder = path.absolute().parent
    if not folder.is_dir():
        raise ValueError(f"{flag} {path}: the folder {folder} does not exist. Make it first.")
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
    """Return a test whether a file is a JSON object with these keys."""

    def is_ours(path: Path) -> bool:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return False
        return isinstance(content, dict) and all(key in content for key in keys)

    return is_ours


def begins_with(*marks: bytes) -> Callable[[Path], bool]:
    """Return a test whether one of `marks` is within the first 4,096 bytes of a file."""

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


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Write a small file that is afterwards either the old one or the new one, whatever happens.

    A symbolic link at `path` is replaced by the file; what it points to is not touched.
    """
    path = Path(path)
    data = content.encode("utf-8") if isinstance(content, str) else content
    if is_device(path):
        path.write_bytes(data)
        return
    unfinished = path.with_name(f".{path.name}.incomplete")
    unfinished.unlink(missing_ok=True)
    try:
        # "x" does not follow a link that somebody else put there in the meantime.
        with unfinished.open("xb") as file:
            file.write(data)
        os.replace(unfinished, path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise


# One process at a time


# The locks of this process. A fork must not keep them alive: a data loader's worker may outlive a killed run.
_held: set[int] = set()


def _release_in_child() -> None:
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_in_child)


@contextlib.contextmanager
def lock_output(path: str | Path, flag: str) -> Iterator[None]:
    """Keep every other process from writing to an output file or an existing output folder.

    The lock is a file with the process and host that hold it, and belongs to the process: it ends with it, even if
    the process is killed. Where the file system has no locks, a file whose process is dead does not count.

    Args:
        flag: what the user calls the file or folder, for messages.

    Raises:
        ValueError: if another process holds the lock.
    """
    path = Path(path)
    if is_device(path):
        yield
        return
    lock = path / LOCK_NAME if path.is_dir() else path.with_name(f".{path.name}{LOCK_NAME}")
    descriptor = _acquire(lock, f"{flag} {path}")
    _held.add(descriptor)
    try:
        yield
    finally:
        # The name goes first: a process that opened the file before looks at the name again, see `_acquire`.
        with contextlib.suppress(OSError):
            lock.unlink()
        if descriptor in _held:
            _held.discard(descriptor)
            os.close(descriptor)


def _acquire(lock: Path, output: str) -> int:
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            if not _try_lock(descriptor):
                raise ValueError(
                    f"{output} is in use by {_holder(lock)}: wait until it ends, or name another output. (If there "
                    f"is no such process any more, remove {lock}.)"
                )
            # The holder may have removed the name between our opening and locking it.
            if _is_named(descriptor, lock):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    if fcntl is not None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS):
                raise
    holder = _read_holder(os.pread(descriptor, 4096, 0) if hasattr(os, "pread") else os.read(descriptor, 4096))
    return holder is None or not _is_alive(holder)


def _is_named(descriptor: int, lock: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(lock))
    except FileNotFoundError:
        return False


def _read_holder(content: bytes) -> dict[str, Any] | None:
    try:
        holder = json.loads(content)
    except ValueError:
        return None
    return holder if isinstance(holder, dict) and isinstance(holder.get("pid"), int) else None


def _holder(lock: Path) -> str:
    try:
        holder = _read_holder(lock.read_bytes())
    except OSError:
        holder = None
    return "another process" if holder is None else f"process {holder['pid']} on {holder.get('host')}"


def _is_alive(holder: dict[str, Any]) -> bool:
    if holder.get("host") != socket.gethostname():
        return True  # not ours to find out
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


__all__ = [
    "LOCK_NAME",
    "begins_with",
    "check_output_file",
    "is_device",
    "is_json_with",
    "lock_output",
    "write_atomically",
]
