"""The manifest of a folder: size and SHA-256 of every file that decides what a model computes, and its makers.

The model card is no part of it, as people go on writing there. Nothing in it depends on time or place, so the same
model has the same manifest.
"""

import hashlib
import json
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import bd3lm_hf
from bd3lm_hf.hub_upload.repo_files import CARD_NAME, CODE, MANIFEST_NAME, files_of
from bd3lm_hf.output_files import write_atomically


# Beside the card, what the hub and its users keep in a repository; no loader reads them.
_FREE = {CARD_NAME, MANIFEST_NAME, ".gitattributes", "LICENSE", "LICENSE.md", "LICENSE.txt"}


class ManifestDifference(NamedTuple):
    """A folder beside its manifest; names in order."""

    missing: list[str]
    changed: list[str]
    extra: list[str]
    num_files: int  # that the manifest lists
    version: str  # of the bd3lm_hf that wrote it
    other_code: list[str]  # code files that are not those of this version

    @property
    def intact(self) -> bool:
        """Whether the folder is what was written."""
        return not (self.missing or self.changed or self.extra)


def describe(path: Path) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
        return {"size": file.tell(), "sha256": digest.hexdigest()}


def write_manifest(folder: Path) -> dict[str, Any]:
    """Write `manifest.json` of the files that lie in a folder, and return what it says."""
    files = {name: describe(path) for name, path in files_of(folder).items() if name not in _FREE}
    content = {"bd3lm_hf": bd3lm_hf.__version__, "files": files}
    write_atomically(folder / MANIFEST_NAME, json.dumps(content, indent=2) + "\n")
    return content


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise ValueError(f"{folder} holds no {MANIFEST_NAME}: only folders that `bd3lm push` wrote can be verified.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        for name, entry in content["files"].items():
            # A name may not lead out of the folder.
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name:
                raise ValueError(f"it lists {name!r}, which is no file of the folder")
            if not isinstance(entry["size"], int) or not isinstance(entry["sha256"], str):
                raise ValueError(f"its entry of {name!r} has no size and hash")
        str(content["bd3lm_hf"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is damaged ({reason}): get it again from where the folder came from.") from error
    return content


def compare_with_manifest(folder: Path) -> ManifestDifference:
    """Hash the files of a folder again.

    Raises:
        ValueError: there is no manifest, or it is damaged.
    """
    content = read_manifest(folder)
    # Hidden folders are the hub client's own, as `.cache` is.
    here = {name: path for name, path in files_of(folder).items() if not name.startswith(".")}
    listed = content["files"]
    changed = [
        name
        for name, entry in listed.items()
        if name in here and (here[name].stat().st_size != entry["size"] or describe(here[name]) != entry)
    ]
    code = [name for name in here if name.endswith(".py")]
    other = [n for n in code if not (CODE / n).is_file() or (CODE / n).read_bytes() != here[n].read_bytes()]
    return ManifestDifference(
        missing=sorted(listed.keys() - here.keys()),
        changed=sorted(changed),
        extra=sorted(here.keys() - listed.keys() - _FREE),
        num_files=len(listed),
        version=content["bd3lm_hf"],
        other_code=sorted(other),
    )


__all__ = ["ManifestDifference", "compare_with_manifest", "describe", "read_manifest", "write_manifest"]
