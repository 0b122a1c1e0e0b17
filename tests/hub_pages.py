"""What each address of the tests' hub does: one function for each kind of request, and the table that names them."""

import hashlib
import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qs, quote

import yaml
from hub_repository import Blob, Commit, HubRefusal, Repository


if TYPE_CHECKING:
    from hub_server import HubServer


USER = "somebody"
LARGE = 10 * 1024 * 1024  # above this, a file is a large one whatever its name


class Answer(NamedTuple):
    """Status, headers and body of a response."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = {}


def as_json(value: Any, status: int = 200) -> Answer:
    return Answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"})


class Call(NamedTuple):
    """A request on its way through the hub."""

    method: str
    query: dict[str, str]
    body: bytes
    authorized: bool
    hub: "HubServer"

    @property
    def json(self) -> Any:
        return json.loads(self.body or b"null")

    def login(self) -> None:
        if not self.authorized:
            raise HubRefusal(401, "Invalid credentials in Authorization header")

    def repository(self, repo: str, *, write: bool = False) -> Repository:
        found = self.hub.repos.get(repo)
        if found is None or (found.private and not self.authorized):
            # As the hub does: whoever may not see a repository is not told that it is there.
            raise HubRefusal(404 if self.authorized else 401, "Repository not found", "RepoNotFound")
        if write:
            self.login()
        return found


def _whoami(hub: "HubServer", call: Call) -> Answer:
    call.login()
    return as_json({"type": "user", "name": USER, "fullname": USER, "orgs": [], "auth": {"type": "access_token"}})


def _create(hub: "HubServer", call: Call) -> Answer:
    call.login()
    name = f"{call.json.get('organization') or USER}/{call.json['name']}"
    url = f"{hub.endpoint}/{name}"
    if name in hub.repos:
        return as_json({"url": url, "error": "You already created this model repo"}, 409)
    private = call.json.get("visibility") == "private" or bool(call.json.get("private"))
    hub.repos[name] = Repository(name, private)
    return as_json({"url": url, "name": name, "id": name})


def _delete(hub: "HubServer", call: Call) -> Answer:
    name = f"{call.json.get('organization') or USER}/{call.json['name']}"
    call.repository(name, write=True)
    del hub.repos[name]
    return Answer()


def _validate_yaml(hub: "HubServer", call: Call) -> Answer:
    found = re.match(r"---\s*\n(.*?\n)?---\s*(\n|$)", call.json["content"], re.DOTALL)
    try:
        data = yaml.safe_load(found[1] or "") if found else None
    except yaml.YAMLError as error:
        return as_json({"errors": [{"message": f"YAML is not valid: {error}"}], "warnings": []}, 400)
    if data is not None and not isinstance(data, dict):
        return as_json({"errors": [{"message": "metadata is not a mapping"}], "warnings": []}, 400)
    warnings = [] if data else [{"message": "empty or missing yaml metadata in repo card"}]
    return as_json({"errors": [], "warnings": warnings})


def _info(hub: "HubServer", call: Call, repo: str, revision: str) -> Answer:
    repository = call.repository(repo)
    commit = repository.at(revision or "main")
    siblings: list[dict[str, Any]] = []
    for path, blob in sorted(commit.files.items()):
        siblings.append({"rfilename": path})
        if "blobs" in call.query:
            siblings[-1] |= {"size": len(blob.content), "blobId": blob.git_oid}
            if blob.large:
                lfs = {"sha256": blob.sha256, "size": len(blob.content), "pointerSize": len(blob.pointer)}
                siblings[-1]["lfs"] = lfs
    facts = {"id": repo, "modelId": repo, "sha": commit.oid, "private": repository.private, "tags": []}
    return as_json({**facts, "siblings": siblings, "downloads": 0, "likes": 0})


def _entry(path: str, blob: Blob) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(blob.content), "oid": blob.git_oid}
    if blob.large:
        entry["lfs"] = {"oid": blob.sha256, "size": len(blob.content), "pointerSize": len(blob.pointer)}
    return entry


def _tree(hub: "HubServer", call: Call, repo: str, revision: str, folder: str) -> Answer:
    files = call.repository(repo).at(revision).files
    below = f"{folder}/" if folder else ""
    inside = {path: blob for path, blob in sorted(files.items()) if path.startswith(below)}
    if not inside:
        raise HubRefusal(404, f"{folder} does not exist on {revision}", "EntryNotFound")
    deep = call.query.get("recursive", "").lower() == "true"
    folders, entries = set(), []
    for path, blob in inside.items():
        parts = path[len(below) :].split("/")
        folders |= {below + "/".join(parts[:depth]) for depth in range(1, len(parts) if deep else min(len(parts), 2))}
        if deep or len(parts) == 1:
            entries.append(_entry(path, blob))
    entries += [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in sorted(folders)]
    return as_json(entries)


def _paths_info(hub: "HubServer", call: Call, repo: str, revision: str) -> Answer:
    files = call.repository(repo).at(revision).files
    paths = call.json["paths"] if call.body[:1] == b"{" else parse_qs(call.body.decode()).get("paths", [])
    return as_json([_entry(path, files[path]) for path in paths if path in files])


def _refs(hub: "HubServer", call: Call, repo: str) -> Answer:
    found = call.repository(repo)

    def listed(prefix: str, refs: dict[str, str]) -> list[dict[str, str]]:
        return [{"name": name, "ref": prefix + name, "targetCommit": oid} for name, oid in refs.items()]

    refs = {
        "branches": listed("refs/heads/", found.branches),
        "converts": [],
        "tags": listed("refs/tags/", found.tags),
    }
    return as_json({**refs, "pullRequests": listed("", found.pulls)})


def _commits(hub: "HubServer", call: Call, repo: str, revision: str) -> Answer:
    found = call.repository(repo)
    commit: Commit | None = found.at(revision)
    listed = []
    while commit is not None:
        text = {"title": commit.title, "message": commit.description}
        listed.append({"id": commit.oid, "authors": [{"user": USER}], "date": "2026-01-01T00:00:00.000Z", **text})
        commit = found.commits[commit.parent] if commit.parent else None
    return as_json(listed)


def _branch(hub: "HubServer", call: Call, repo: str, branch: str) -> Answer:
    found = call.repository(repo, write=True)
    if branch in found.branches:
        raise HubRefusal(409, f"Reference already exists: {branch}")
    found.branches[branch] = found.at((call.json or {}).get("startingPoint", "main")).oid
    return as_json({})


def _tag(hub: "HubServer", call: Call, repo: str, revision: str) -> Answer:
    found = call.repository(repo, write=True)
    found.tags[call.json["tag"]] = found.at(revision).oid
    return as_json({})


def _preupload(hub: "HubServer", call: Call, repo: str, revision: str) -> Answer:
    found = call.repository(repo, write=True)
    there = found.at(revision).files
    modes = []
    for file in call.json["files"]:
        large = found.is_large(file["path"], file["size"], LARGE, revision)
        known = there.get(file["path"])
        oid = known and (known.sha256 if large else known.git_oid)
        mode = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}
        modes.append(mode)
    return as_json({"files": modes})


def _commit(hub: "HubServer", call: Call, repo: str, revision: str) -> Answer:
    found = call.repository(repo, write=True)
    lines = [json.loads(line) for line in call.body.splitlines()]
    pull = call.query.get("create_pr") == "1"
    commit = found.commit(revision, lines, hub.objects, pull)
    done = {"success": True, "commitOid": commit.oid, "commitUrl": f"{hub.endpoint}/{repo}/commit/{commit.oid}"}
    url = f"{hub.endpoint}/{repo}/discussions/{len(found.pulls)}" if pull else None
    return as_json({**done, "pullRequestUrl": url, "hookOutput": ""})


def _batch(hub: "HubServer", call: Call, repo: str) -> Answer:
    call.repository(repo, write=True)
    answers = []
    for item in call.json["objects"]:
        oid, size = item["oid"], item["size"]
        answers.append({"oid": oid, "size": size, "authenticated": True})
        if oid in hub.objects:
            continue
        place = f"{hub.cdn}/lfs/{oid}"
        upload: dict[str, Any] = {"href": place}
        if hub.part_size is not None:
            parts = range(1, -(-size // hub.part_size) + 1)
            upload = {"href": f"{hub.endpoint}/lfs/{oid}/complete", "header": {"chunk_size": str(hub.part_size)}}
            upload["header"] |= {str(number): f"{place}/{number}" for number in parts}
        verify = {"href": f"{hub.endpoint}/{repo}.git/info/lfs/verify"}
        answers[-1]["actions"] = {"upload": upload, "verify": verify}
    transfer = "basic" if hub.part_size is None else "multipart"
    return as_json({"transfer": transfer, "objects": answers})


def _store(hub: "HubServer", oid: str, content: bytes) -> Answer:
    if hashlib.sha256(content).hexdigest() != oid:
        raise HubRefusal(400, "the content is not what its hash says")
    hub.objects[oid] = content
    return as_json({})


def _put(hub: "HubServer", call: Call, oid: str) -> Answer:
    return _store(hub, oid, call.body)


def _put_part(hub: "HubServer", call: Call, oid: str, number: str) -> Answer:
    hub.parts[oid, int(number)] = call.body
    return Answer(headers={"ETag": hashlib.sha256(call.body).hexdigest()})


def _complete(hub: "HubServer", call: Call, oid: str) -> Answer:
    pieces = [hub.parts.pop((oid, part["partNumber"])) for part in call.json["parts"]]
    if [hashlib.sha256(piece).hexdigest() for piece in pieces] != [part["etag"] for part in call.json["parts"]]:
        raise HubRefusal(400, "a part has another ETag")
    return _store(hub, oid, b"".join(pieces))


def _verify(hub: "HubServer", call: Call, repo: str) -> Answer:
    call.repository(repo, write=True)
    if len(hub.objects.get(call.json["oid"], b"")) != call.json["size"]:
        raise HubRefusal(404, "this object has not arrived")
    return as_json({})


def _resolve(hub: "HubServer", call: Call, repo: str, revision: str, path: str) -> Answer:
    commit = call.repository(repo).at(revision)
    headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
    blob = commit.files.get(path)
    if blob is None:
        headers |= {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
        return Answer(404, b"Entry not found", headers)
    if not blob.large:
        return Answer(200, blob.content, {**headers, "ETag": f'"{blob.git_oid}"'})
    linked = {"X-Linked-ETag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.content))}
    return Answer(302, b"", {**headers, **linked, "Location": f"{hub.cdn}/cdn/{blob.sha256}?name={quote(path)}"})


def _cdn(hub: "HubServer", call: Call, oid: str) -> Answer:
    return Answer(200, hub.objects[oid], {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})


_REPO, _REVISION = r"(?P<repo>[^/]+/[^/]+?)", r"(?P<revision>[^/]+)"
_API = f"/api/models/{_REPO}"
ROUTES: list[tuple[tuple[str, ...], str, Callable[..., Answer]]] = [
    (("GET",), "/api/whoami-v2", _whoami),
    (("POST",), "/api/repos/create", _create),
    (("DELETE",), "/api/repos/delete", _delete),
    (("POST",), "/api/validate-yaml", _validate_yaml),
    (("GET",), f"{_API}(/revision/{_REVISION})?", _info),
    (("GET",), f"{_API}/tree/{_REVISION}(/(?P<folder>.*))?", _tree),
    (("POST",), f"{_API}/paths-info/{_REVISION}", _paths_info),
    (("GET",), f"{_API}/refs", _refs),
    (("GET",), f"{_API}/commits/{_REVISION}", _commits),
    (("POST",), f"{_API}/branch/(?P<branch>[^/]+)", _branch),
    (("POST",), f"{_API}/tag/{_REVISION}", _tag),
    (("POST",), f"{_API}/preupload/{_REVISION}", _preupload),
    (("POST",), f"{_API}/commit/{_REVISION}", _commit),
    (("POST",), rf"/{_REPO}\.git/info/lfs/objects/batch", _batch),
    (("POST",), rf"/{_REPO}\.git/info/lfs/verify", _verify),
    (("PUT",), "/lfs/(?P<oid>[0-9a-f]+)", _put),
    (("PUT",), "/lfs/(?P<oid>[0-9a-f]+)/(?P<number>[0-9]+)", _put_part),
    (("POST",), "/lfs/(?P<oid>[0-9a-f]+)/complete", _complete),
    (("GET", "HEAD"), f"/{_REPO}/resolve/{_REVISION}/(?P<path>.+)", _resolve),
    (("GET", "HEAD"), "/cdn/(?P<oid>[0-9a-f]+)", _cdn),
]


__all__ = ["LARGE", "ROUTES", "USER", "Answer", "Call", "as_json"]
