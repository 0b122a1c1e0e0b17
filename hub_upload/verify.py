"""`bd3lm verify DIR`: hash the files of a folder again, and say which are not what its manifest lists."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

import bd3lm_hf
from bd3lm_hf.data.sources import exists, looks_like_path
from bd3lm_hf.hub_upload.errors import HubError, hub_errors
from bd3lm_hf.hub_upload.manifest import ManifestDifference, compare_with_manifest


def folder_of(name: str, revision: str | None = None) -> Path:
    """A folder here, or what a repository of that name holds, downloaded.

    Raises:
        ValueError: there is no such folder or repository.
        OSError, httpx.HTTPError: the download failed.
    """
    if Path(name).expanduser().is_dir():
        if revision is not None:
            raise ValueError(f"--revision {revision}: {name} is a folder here, which has no revisions; leave it out.")
        return Path(name).expanduser()
    if exists(name) or looks_like_path(name):
        raise ValueError(f"DIR {name}: there is no such folder.")
    try:
        return Path(snapshot_download(name, revision=revision))
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        place = name if revision is None else f"{name} at {revision}"
        raise ValueError(f"DIR {place} is no folder here, and no repository that you may read.") from error


def report(comparison: ManifestDifference) -> str:
    """What a reader wants to know, a line for every file that is not as it should be."""
    lines = [f"{kind}: {name}" for kind in ("missing", "changed", "extra") for name in getattr(comparison, kind)]
    state = "intact" if comparison.intact else "NOT INTACT"
    lines.append(f"{state}: {comparison.num_files} files, written by bd3lm_hf {comparison.version}")
    if comparison.other_code:
        files = ", ".join(comparison.other_code)
        lines.append(f"code: not that of bd3lm_hf {bd3lm_hf.__version__}, in {files}")
    else:
        lines.append(f"code: that of bd3lm_hf {bd3lm_hf.__version__}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Run with the command line's arguments; exit code 1 for a folder that is not intact, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="bd3lm verify", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", metavar="DIR", help="folder, or name of a repository on the hub")
    parser.add_argument("--revision", help="branch, tag or commit of the repository")
    arguments = parser.parse_args(argv)
    try:
        with hub_errors(f"{arguments.folder} can not be downloaded"):
            folder = folder_of(arguments.folder, arguments.revision)
    except HubError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    comparison = compare_with_manifest(folder)
    print(report(comparison))
    if not comparison.intact:
        raise SystemExit(1)


__all__ = ["folder_of", "main", "report"]
