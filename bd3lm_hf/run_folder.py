"""The folder of a run: check that a run may write to it, and publish files in it only when they are complete.

A checkpoint is written to a staging folder, marked complete with a list of its files, and renamed. If the run is
killed, a folder `checkpoint-N` is either complete, or lacks a file of its list and no run resumes from it.
"""

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints
from transformers.utils import logging

from bd3lm_hf.user_files import BASE_NAME, LOCK_NAME, lock_output


logger = logging.get_logger("bd3lm_hf.train")

RECIPE_NAME = "recipe.yaml"  # of every run folder
RECIPE_HEADER = "# Written by bd3lm train: the fields of this run."  # a user's file of the same name does not have it
STAGING_NAME = ".incomplete"
COMPLETE_NAME = "run.json"  # in every complete checkpoint: what a resumed run needs, and the list of files

EMA_NAME = "ema.safetensors"  # in a checkpoint, next to the weights that training continues from
WEIGHTS_NAME = "weights.json"  # in every saved folder: which weights these are
RESULTS_NAME = "results.json"
SAMPLES_NAME = "samples.txt"
SAMPLE_HEAD = re.compile(r"^--- sample at step (\d+) ---\n", re.MULTILINE)  # in it, before each sample
CURVE_NAME = "training_curve.json"
SEARCH_NAME = "interval_search.jsonl"

_REPLACED = ".replaced"
_WEIGHTS = ("model*.safetensors*", "pytorch_model*.bin*", "adapter_model*")  # weights, shards, their indices


class SaveError(OSError):
    """A checkpoint or model could not be written. What was saved before is intact."""


# Which folders may be written to


def check_output_dir(output_dir: str | Path, *, overwrite: bool = False, resume: bool = False) -> None:
    """Refuse a folder with content that a run would damage. Changes nothing.

    A folder is free if it does not exist, is empty, or belongs to a run of ours that saved nothing.

    Raises:
        ValueError: if the path is a file, or the folder has foreign files, or the model or checkpoints of a run.
    """
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir {folder} is a file: name a folder.")
    if overwrite or not folder.exists() or all(path.name == LOCK_NAME for path in folder.iterdir()):
        return
    if not is_run_folder(folder):
        raise ValueError(
            f"--output_dir {folder} is not empty and is not the folder of an earlier run (its {RECIPE_NAME} is "
            f"missing): name another folder, or pass --overwrite_output_dir to train into it."
        )
    saved = [path.name for path in _replaced(folder) + checkpoints(folder)]
    if saved and not resume:
        raise ValueError(
            f"--output_dir {folder} has checkpoints of an earlier run, the last one {saved[-1]}: continue it with "
            f"--resume_from_checkpoint true, name another folder, or discard it with --overwrite_output_dir."
        )
    if not resume and any(path for pattern in _WEIGHTS for path in folder.glob(pattern)):
        raise ValueError(
            f"--output_dir {folder} has the model of an earlier run: name another folder, or replace it with "
            f"--overwrite_output_dir."
        )


@contextlib.contextmanager
def lock_output_dir(output_dir: str | Path) -> Iterator[None]:
    """Create a folder, and keep other processes from training into it; remove it again if it stays empty.

    Raises:
        ValueError: if another process is training into it.
    """
    folder = Path(output_dir).absolute()
    if folder.exists() and not folder.is_dir():
        check_output_dir(output_dir)
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with lock_output(output_dir, "--output_dir"):
            yield
    finally:
        with contextlib.suppress(OSError):  # not empty
            for path in created:
                path.rmdir()


def is_run_folder(folder: str | Path) -> bool:
    """Return whether a folder belongs to a run of ours: its recipe has our header."""
    try:
        with Path(folder, RECIPE_NAME).open("rb") as file:
            return file.read(len(RECIPE_HEADER)) == RECIPE_HEADER.encode()
    except OSError:
        return False


def clear_output_dir(output_dir: str | Path) -> None:
    """Remove checkpoints and unfinished files of an earlier run of ours; foreign files stay."""
    folder = Path(output_dir)
    clear_staging(folder)
    if is_run_folder(folder):
        for checkpoint in checkpoints(folder):
            shutil.rmtree(checkpoint)
        shutil.rmtree(folder / BASE_NAME, ignore_errors=True)


# Staging


def staging_folder(output_dir: str | Path) -> Path:
    """Return the folder for files that are not complete, on the same file system as `output_dir`."""
    return Path(output_dir) / STAGING_NAME


def clear_staging(output_dir: str | Path) -> None:
    """Remove the unfinished files of a run, so none of them gets into a later checkpoint."""
    recover_output_dir(output_dir)
    shutil.rmtree(staging_folder(output_dir), ignore_errors=True)


def recover_output_dir(output_dir: str | Path) -> None:
    """Restore a checkpoint that was about to be replaced when its run was killed."""
    for replaced in _replaced(output_dir):
        target = Path(output_dir) / replaced.name.removesuffix(_REPLACED)
        if not target.exists():
            os.rename(replaced, target)
            _sync_folder(target.parent)


def publish_folder(source: Path, target: Path) -> None:
    """Make a complete folder appear under its final name in one step.

    Meanwhile, an old folder of that name is kept next to `source`; after a kill between the two renames,
    [`recover_output_dir`] restores it.
    """
    _flush(source)
    replaced = source.with_name(f"{target.name}{_REPLACED}")
    if target.exists():
        os.rename(target, replaced)
    os.rename(source, target)
    _sync_folder(target.parent)
    _sync_folder(source.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def publish_files(source: Path, target: Path) -> None:
    """Move complete files into a folder, each in one step; files of `target` with other names stay.

    Old weights are removed first and new ones come last: a kill in between leaves a folder without weights, which
    cannot be loaded, instead of one with the weights of one model and the configuration of another.
    """
    _flush(source)
    target.mkdir(parents=True, exist_ok=True)
    new = [path for path in sorted(source.rglob("*")) if path.is_file()]
    weights = [path for path in new if any(path.match(pattern) for pattern in _WEIGHTS)]
    if weights:
        for pattern in _WEIGHTS:
            for old in target.glob(pattern):
                old.unlink()
    for path in [path for path in new if path not in weights] + weights:
        destination = target / path.relative_to(source)
        destination.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, destination)
    for folder in {target, *(target / path.relative_to(source).parent for path in new)}:
        _sync_folder(folder)
    shutil.rmtree(source)


# Complete checkpoints


def mark_complete(folder: Path, content: dict[str, Any]) -> None:
    """Mark a checkpoint as complete, once all other files are written: record `content`, and every file's size."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / COMPLETE_NAME]
    files = {str(path.relative_to(folder)): path.stat().st_size for path in paths}
    text = json.dumps({**content, "files": files}, indent=2, ensure_ascii=False)
    (folder / COMPLETE_NAME).write_text(text + "\n", encoding="utf-8")


def checkpoint_to_resume(requested: str | Path | bool, output_dir: str | Path) -> Path:
    """Return the checkpoint that a run continues from.

    Args:
        requested: a checkpoint folder, or True for the last complete one of `output_dir`.

    Raises:
        ValueError: if there is none that is complete and can be resumed.
    """
    found = last_complete_checkpoint(output_dir) if requested is True else Path(str(requested))
    if found is None:
        raise ValueError(f"{output_dir} has no complete checkpoint.")
    read_completion_mark(found)
    return found


def read_completion_mark(folder: str | Path) -> dict[str, Any]:
    """Return what [`mark_complete`] wrote into a checkpoint that a run can continue from.

    Raises:
        ValueError: if the checkpoint is not complete (with the reason), or contains only the model.
    """
    if reason := incomplete_because(folder):
        raise ValueError(f"{folder} is not a complete checkpoint: {reason}.")
    mark: dict[str, Any] = json.loads(Path(folder, COMPLETE_NAME).read_text(encoding="utf-8"))
    if not mark["resumable"]:
        raise ValueError(
            f"{folder} was saved with --save_only_model, without the optimizer's state: start a new run from its "
            f"weights with --init_from {folder}."
        )
    return mark


def check_same_run(checkpoint: str | Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Refuse to resume from the checkpoint of another run; warn if only the length differs.

    Args:
        old: fingerprint in the checkpoint.
        new: fingerprint of the run that resumes from it.

    Raises:
        ValueError: if they differ; the message has both values.
    """
    sections = ("model", "tokenizer", "data", "training")
    # The length may differ: a run can be extended.
    differences = [text for section in sections for text in _compare(section, old, new)]
    if differences:
        raise ValueError(
            f"{checkpoint} belongs to another run: {'; '.join(differences)}. Restore the old values, or start a new "
            f"run from its weights with --init_from {checkpoint} and another --output_dir."
        )
    for text in _compare("length", old, new):
        logger.warning(f"the run is resumed with another {text}. Schedules that depend on it change.")


def _compare(section: str, old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    # A field that only one of two versions of a library has is not a difference.
    before, now = old.get(section, {}), new.get(section, {})
    return [
        f"{section}: {name} was {before[name]} and is {now[name]}"
        for name in before
        if name in now and before[name] != now[name]
    ]


def incomplete_because(folder: str | Path) -> str | None:
    """Return the reason why a checkpoint is not complete, or None if it is."""
    folder = Path(folder)
    if not folder.is_dir():
        return "there is no such folder"
    try:
        files = json.loads((folder / COMPLETE_NAME).read_text(encoding="utf-8"))["files"].items()
    except FileNotFoundError:
        return f"it has no {COMPLETE_NAME}, which is written last"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"its {COMPLETE_NAME} is damaged"
    for name, size in files:
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        # The size is enough to detect files cut short by a full disk or a kill; hashing would read all weights.
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes instead of {size:,}"
    return None


def checkpoints(output_dir: str | Path) -> list[Path]:
    """Return the checkpoint folders of a run by step, complete or not."""
    found = [path for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir()]
    return sorted((path for path in found if _step(path) is not None), key=lambda path: _step(path) or 0)


def last_complete_checkpoint(output_dir: str | Path) -> Path | None:
    """Return the complete checkpoint with the highest step; later incomplete ones are skipped with a warning."""
    for path in reversed(checkpoints(output_dir)):
        reason = incomplete_because(path)
        if reason is None:
            return path
        logger.warning(f"{path} is not complete and is skipped: {reason}.")
    return None


def remove_old_checkpoints(output_dir: str | Path, *, limit: int | None, keep: set[str]) -> None:
    """Remove the oldest checkpoints beyond `limit`, but none of `keep`.

    A folder is renamed before its files are deleted, so a kill leaves no half-deleted checkpoint.
    """
    if not limit or limit < 0:
        return
    # By time, as transformers removes them.
    ordered = sort_checkpoints(str(output_dir), use_mtime=True)
    removable = [path for path in ordered if str(Path(path)) not in keep]
    for path in removable[: max(0, len(ordered) - limit)]:
        discarded = staging_folder(output_dir) / f"{Path(path).name}.deleted"
        discarded.parent.mkdir(exist_ok=True)
        os.rename(path, discarded)
        shutil.rmtree(discarded, ignore_errors=True)


def _replaced(output_dir: str | Path) -> list[Path]:
    return sorted(staging_folder(output_dir).glob(f"*{_REPLACED}"))


def _step(path: Path) -> int | None:
    number = path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
    return int(number) if number.isdecimal() else None


# Disk


@contextlib.contextmanager
def saving(name: str, output_dir: str | Path) -> Iterator[None]:
    """Turn a failure to write into one clear error, and clear the staging folder.

    Args:
        name: name of the checkpoint or model to save, for the message.

    Raises:
        SaveError: if writing failed. torch reports a full disk as RuntimeError, safetensors with its own error.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        clear_staging(output_dir)
        last = last_complete_checkpoint(output_dir)
        kept = f"The last complete checkpoint is {last}" if last else "No checkpoint had been saved yet"
        resume = "continue with --resume_from_checkpoint true" if last else "start again"
        raise SaveError(
            f"cannot save {name} in {output_dir} ({type(error).__name__}: {error}). {kept}; remove the cause, and "
            f"{resume}."
        ) from error


def as_size(size: float) -> str:
    """Format a number of bytes for people."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def _flush(folder: Path) -> None:
    """Write contents and names to disk before the final rename, so no partial file gets that name in a power cut.

    Some libraries create files that only the owner can read; all get the permissions that the umask gives new files.
    """
    umask = os.umask(0o077)
    os.umask(umask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~umask)
            with path.open("rb") as file:
                os.fsync(file.fileno())
        else:
            _sync_folder(path)
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    if os.name == "nt" or not folder.is_dir():  # Windows cannot open folders; it journals renames
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot
            raise
    finally:
        os.close(descriptor)
