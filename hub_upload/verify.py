"""`bd3lm verify DIR`: hash the files of a folder again, and name those that differ from its manifest.

The manifest lists size and SHA-256 of every file that determines what a model computes, and the version that wrote
them. It excludes the model card, which people edit. Nothing in it depends on time or place: the same model has the
same manifest. It reveals damage and changes, but does not prove who wrote the files.
"""

import argparse
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

import bd3lm_hf
from bd3lm_hf.data.sources import is_local
from bd3lm_hf.hub_upload.push import hub_errors
from bd3lm_hf.hub_upload.repo_files import CODE, MANIFEST_NAME, NOT_LISTED, describe, files_of
from bd3lm_hf.printing import printable
from bd3lm_hf.user_files import read_json


_CLIENT_FOLDERS = (".cache", ".git")  # written by the Hub's client and by git


class ManifestDifference(NamedTuple):
    """The difference between a folder and its manifest; names in order."""

    missing: list[str]
    changed: list[str]
    extra: list[str]
    num_files: int  # files in the manifest
    version: str  # of the bd3lm_hf that wrote it, according to the manifest
    other_code: list[str]  # code files that differ from those of this version

    @property
    def intact(self) -> bool:
        """Whether the folder contains exactly the listed files."""
        return not (self.missing or self.changed or self.extra)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a folder.

    Raises:
        ValueError: if it is missing or damaged.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise ValueError(f"DIR {folder} has no {MANIFEST_NAME}: only folders that `bd3lm push` wrote have one.")
    try:
        content = read_json(path)
        for name, entry in content["files"].items():
            # An untrusted manifest must not name files elsewhere, in the path syntax of any system.
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name:
                raise ValueError(f"it lists {name!r}, which is outside of the folder")
            if not isinstance(entry["size"], int) or not isinstance(entry["sha256"], str):
                raise ValueError(f"its entry {name!r} has no size and hash")
        str(content["bd3lm_hf"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is damaged ({reason}): get the folder again from its source.") from error
    return content


def compare_with_manifest(folder: Path) -> ManifestDifference:
    """Hash the files of a folder again.

    Raises:
        ValueError: if the manifest is missing or damaged.
    """
    content = read_manifest(folder)
    present = {name: path for name, path in files_of(folder).items() if name.split("/")[0] not in _CLIENT_FOLDERS}
    listed = content["files"]
    # Sizes are compared first, which needs no reading.
    changed = [
        name
        for name, entry in listed.items()
        if name in present and (present[name].stat().st_size != entry["size"] or describe(present[name]) != entry)
    ]
    code = [name for name in present if name.endswith(".py")]
    other = [n for n in code if not (CODE / n).is_file() or (CODE / n).read_bytes() != present[n].read_bytes()]
    return ManifestDifference(
        missing=sorted(listed.keys() - present.keys()),
        changed=sorted(changed),
        extra=sorted(present.keys() - listed.keys() - NOT_LISTED),
        num_files=len(listed),
        version=str(content["bd3lm_hf"]),
        other_code=sorted(other),
    )


def model_folder(name: str, revision: str | None = None) -> Path:
    """Return a local folder, or download a repository and return its folder.

    Raises:
        ValueError: if there is no such folder or repository.
        OSError, httpx.HTTPError: if the download failed.
    """
    if Path(name).expanduser().is_dir():
        if revision is not None:
            raise ValueError(f"--revision {revision}: {name} is a local folder, which has no revisions.")
        return Path(name).expanduser()
    if is_local(name):
        raise ValueError(f"DIR {name}: there is no such folder.")
    try:
        return Path(snapshot_download(name, revision=revision))
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        repository = name if revision is None else f"{name} at {revision}"
        raise ValueError(f"DIR {repository} is neither a local folder nor a repository that you may read.") from error


def report(difference: ManifestDifference) -> str:
    """Format a difference, one line per file; names from the folder are escaped."""
    lines = [f"{kind}: {name}" for kind in ("missing", "changed", "extra") for name in getattr(difference, kind)]
    state = "intact" if difference.intact else "NOT INTACT"
    lines.append(f"{state}: {difference.num_files} files, written by bd3lm_hf {difference.version}")
    if difference.other_code:
        files = ", ".join(difference.other_code)
        lines.append(f"code: differs from bd3lm_hf {bd3lm_hf.__version__} in {files}; read it before you run it")
    else:
        lines.append(f"code: that of bd3lm_hf {bd3lm_hf.__version__}")
    return "\n".join(map(printable, lines))


def run(arguments: argparse.Namespace) -> None:
    """Run `bd3lm verify`; exit with code 1 if the folder differs."""
    with hub_errors(f"Cannot download {arguments.folder}"):
        folder = model_folder(arguments.folder, arguments.revision)
    difference = compare_with_manifest(folder)
    print(report(difference))
    if not difference.intact or (arguments.strict and difference.other_code):
        raise SystemExit(1)
