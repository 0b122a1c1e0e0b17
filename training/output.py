"""The folder of a run: which folders may be written to, and how files appear in them only when they are complete."""

import os
import shutil
from pathlib import Path

from transformers.trainer_utils import get_last_checkpoint


RECIPE_NAME = "recipe.yaml"  # also the sign that a folder belongs to a run of ours
STAGING_NAME = ".incomplete"


def check_output_dir(output_dir: str | Path, *, overwrite: bool = False, resume: bool = False) -> None:
    """Refuse a folder that holds something a run would damage. Changes nothing.

    A folder is free when it does not exist, is empty, or holds an earlier run of ours without checkpoints (its model
    is replaced once the new one is complete).

    Raises:
        ValueError: the path is a file, holds foreign files, or checkpoints of an earlier run.
    """
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir {folder} is a file: name a folder.")
    if overwrite or not folder.exists() or not any(folder.iterdir()):
        return
    if not (folder / RECIPE_NAME).is_file():
        raise ValueError(
            f"--output_dir {folder} is not empty and is no folder of an earlier run ({RECIPE_NAME} is missing): name "
            f"another folder, or pass --overwrite_output_dir to train into it."
        )
    last = get_last_checkpoint(str(folder))
    if last is not None and not resume:
        raise ValueError(
            f"--output_dir {folder} holds checkpoints of an earlier run, the last one {Path(last).name}: continue it "
            f"with --resume_from_checkpoint true, name another folder, or drop it with --overwrite_output_dir."
        )


def clear_output_dir(output_dir: str | Path) -> None:
    """Remove checkpoints and unfinished files of an earlier run of ours; foreign files stay."""
    folder = Path(output_dir)
    shutil.rmtree(folder / STAGING_NAME, ignore_errors=True)
    if (folder / RECIPE_NAME).is_file():
        while (last := get_last_checkpoint(str(folder))) is not None:
            shutil.rmtree(last)


def staging_folder(output_dir: str | Path) -> Path:
    """Where files are written until they are complete; on the same file system as `output_dir`."""
    return Path(output_dir) / STAGING_NAME


def publish_folder(source: Path, target: Path) -> None:
    """Make a complete folder appear under its final name in one step, replacing one of that name."""
    _flush(source)
    if target.exists():
        discarded = source.with_name(f"{target.name}.replaced")
        os.rename(target, discarded)
        os.rename(source, target)
        shutil.rmtree(discarded)
    else:
        os.rename(source, target)


def publish_files(source: Path, target: Path) -> None:
    """Move complete files into a folder, each in one step; files of `target` with other names stay."""
    _flush(source)
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.rglob("*")):
        if path.is_file():
            destination = target / path.relative_to(source)
            destination.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, destination)
    shutil.rmtree(source)


def _flush(folder: Path) -> None:
    """Have the contents on disk before their name is: after a power cut a name must not lead to half a file."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


__all__ = [
    "RECIPE_NAME",
    "STAGING_NAME",
    "check_output_dir",
    "clear_output_dir",
    "publish_files",
    "publish_folder",
    "staging_folder",
]
