"""One commit: bring a repository on the hub to the state of a folder, or leave it as it is.

The hub stores large files first, under their hash, and a commit then names them; so an upload that breaks off changes
nothing, and the next one sends only what has not arrived.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import RevisionNotFoundError

from bd3lm_hf.hub_upload.errors import hub_errors
from bd3lm_hf.hub_upload.manifest import describe
from bd3lm_hf.hub_upload.repo_files import MANIFEST_NAME, files_of, kind_of


# Weights of another layout: transformers would load them in place of the new ones, or keep them for nothing.
_OTHER_WEIGHTS = ("model*.safetensors*", "pytorch_model*.bin*", "adapter_model.*")


class Upload(NamedTuple):
    """What an upload did."""

    url: str  # of the repository, the commit or the pull request
    added: list[str]  # new and changed files
    removed: list[str]  # files of an earlier push that the model has no more


def upload(
    api: HfApi,
    folder: Path,
    repo_id: str,
    *,
    message: str,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    description: str | None = None,
) -> Upload:
    """Make a repository hold a folder's files, in one commit; create it, and the branch, where they are not there.

    Files that others put into the repository stay, but for weights that the folder does not hold.

    Raises:
        HubError: the hub or the network failed, or the repository was changed meanwhile. It is as it was.
        ValueError: the folder holds a file that is never uploaded.
    """
    files = files_of(folder)
    if strange := [name for name in files if kind_of(name) is None]:
        raise ValueError(f"{', '.join(strange)} in {folder} is never uploaded.")
    with hub_errors(f"{repo_id} can not be written"):
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        state = _state(api, repo_id, revision, create=not create_pr)
        there = {entry.rfilename: entry for entry in state.siblings or ()}
        added = [name for name, path in files.items() if name not in there or _differs(path, there[name])]
        removed = sorted(_outdated(api, repo_id, state.sha, set(there)) - files.keys())
        if not added and not removed:
            return Upload(str(url), [], [])
        operations: list[Any] = [CommitOperationAdd(name, str(files[name])) for name in added]
        operations += [CommitOperationDelete(name) for name in removed]
        commit = api.create_commit(
            repo_id,
            operations,
            commit_message=message,
            commit_description=description,
            revision=revision,
            create_pr=create_pr,
            parent_commit=state.sha,
        )
    return Upload(str(commit.pr_url or commit.commit_url), added, removed)


def _state(api: HfApi, repo_id: str, revision: str | None, *, create: bool) -> Any:
    """What a branch holds now."""
    try:
        return api.repo_info(repo_id, revision=revision, files_metadata=True)
    except RevisionNotFoundError:
        if revision is None or revision.startswith("refs/") or not create:
            raise
        api.create_branch(repo_id, branch=revision, exist_ok=True)
        return api.repo_info(repo_id, revision=revision, files_metadata=True)


def _differs(path: Path, entry: Any) -> bool:
    """Whether a file is another one than the hub's; large ones are known there by SHA-256, small ones as git does."""
    if entry.size != path.stat().st_size:
        return True
    if entry.lfs is not None:
        return entry.lfs.sha256 != describe(path)["sha256"]
    content = path.read_bytes()
    return entry.blob_id != hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _outdated(api: HfApi, repo_id: str, commit: str, there: set[str]) -> set[str]:
    """The files in a repository that a push replaces: weights of any layout, and the code of an earlier push."""
    weights = {name for name in there if any(Path(name).match(pattern) for pattern in _OTHER_WEIGHTS)}
    weights = {name for name in weights if "/" not in name}
    if MANIFEST_NAME not in there:
        return weights
    path = api.hf_hub_download(repo_id, MANIFEST_NAME, revision=commit)
    try:
        listed = set(json.loads(Path(path).read_text(encoding="utf-8"))["files"])
    except (ValueError, KeyError, TypeError):  # somebody else's file of that name
        return weights
    return weights | {name for name in listed & there if name.endswith(".py")}


__all__ = ["Upload", "upload"]
