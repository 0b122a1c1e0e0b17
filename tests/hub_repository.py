"""A repository of the hub in memory: commits that hold whole trees, and what names them."""

import base64
import fnmatch
import hashlib
from dataclasses import dataclass, field
from typing import Any, NamedTuple


GITATTRIBUTES = "".join(
    f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in ("*.safetensors", "*.bin", "*.pt", "*.zip")
).encode()


class HubRefusal(Exception):
    """What the hub answers in place of what was asked for."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class Blob(NamedTuple):
    """A file: its bytes, and whether the hub keeps it as a large one."""

    content: bytes
    large: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pointer(self) -> bytes:
        """What git itself holds of a large file."""
        text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n"
        return text.encode()

    @property
    def git_oid(self) -> str:
        content = self.pointer if self.large else self.content
        return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


class Commit(NamedTuple):
    """A state of a repository."""

    oid: str
    parent: str | None
    title: str
    description: str
    files: dict[str, Blob]


@dataclass
class Repository:
    """Commits by their id, and the refs that point at them: `main` and other branches, tags, `refs/pr/N`."""

    name: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pulls: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.branches["main"] = self._add(None, "initial commit", "", {".gitattributes": Blob(GITATTRIBUTES, False)})

    def at(self, revision: str) -> Commit:
        """The commit that a branch, a tag, a pull request or an id names."""
        for refs in (self.branches, self.tags, self.pulls):
            if revision in refs:
                return self.commits[refs[revision]]
        if revision in self.commits:
            return self.commits[revision]
        raise HubRefusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Path -> bytes, for tests."""
        return {path: blob.content for path, blob in self.at(revision).files.items()}

    def is_large(self, path: str, size: int, limit: int, revision: str) -> bool:
        attributes = self.at(revision).files.get(".gitattributes", Blob(b"", False)).content.decode()
        patterns = [line.split()[0] for line in attributes.splitlines() if "filter=lfs" in line]
        return size > limit or any(fnmatch.fnmatch(path.rpartition("/")[2], pattern) for pattern in patterns)

    def commit(self, revision: str, lines: list[dict[str, Any]], objects: dict[str, bytes], pull: bool) -> Commit:
        """All operations of a commit, or none: a refusal leaves every ref where it was.

        Args:
            lines: header and operations, as the client sends them.
            objects: SHA-256 -> bytes of the large files that have arrived.
            pull: open a pull request in place of moving the branch.
        """
        parent, header = self.at(revision), lines[0]["value"]
        if header.get("parentCommit", parent.oid) != parent.oid:
            raise HubRefusal(412, "A commit has happened since. Please refresh and try again.")
        if not pull and revision not in self.branches and revision not in self.pulls:
            raise HubRefusal(400, f"{revision} is not a branch")
        files = dict(parent.files)
        for line in lines[1:]:
            apply_operation(files, line["key"], line["value"], objects)
        oid = self._add(parent.oid, header["summary"], header.get("description", ""), files)
        if pull:
            self.pulls[f"refs/pr/{len(self.pulls) + 1}"] = oid
        else:
            (self.pulls if revision in self.pulls else self.branches)[revision] = oid
        return self.commits[oid]

    def _add(self, parent: str | None, title: str, description: str, files: dict[str, Blob]) -> str:
        facts = (parent, title, description, len(self.commits), sorted((k, v.git_oid) for k, v in files.items()))
        oid = hashlib.sha1(repr(facts).encode(), usedforsecurity=False).hexdigest()
        self.commits[oid] = Commit(oid, parent, title, description, files)
        return oid


def apply_operation(files: dict[str, Blob], key: str, value: dict[str, Any], objects: dict[str, bytes]) -> None:
    """Add or delete what one line of a commit says."""
    path = value["path"]
    if key == "file":
        assert value["encoding"] == "base64"
        files[path] = Blob(base64.b64decode(value["content"]), False)
    elif key == "lfsFile":
        if value["oid"] not in objects:
            raise HubRefusal(400, f"LFS pointer of {path} points to a file that does not exist: {value['oid']}")
        files[path] = Blob(objects[value["oid"]], True)
    elif key in ("deletedFile", "deletedFolder"):
        below = path.rstrip("/") + "/" if key == "deletedFolder" else None
        gone = [name for name in files if name == path or (below and name.startswith(below))]
        if not gone:
            raise HubRefusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
        for name in gone:
            del files[name]
    else:
        raise HubRefusal(400, f"no such operation: {key}")


__all__ = ["Blob", "Commit", "HubRefusal", "Repository"]
