"""A Hub on 127.0.0.1: the part of the protocol that `huggingface_hub` uses to create, commit, list and download.

State is in memory, every request is recorded, and any of them can be made to fail ([`Fault`]). Large files use the LFS
protocol; Xet storage is not announced and has to be switched off in the client.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit


TOKEN = "hf_" + "nobodyShouldEverSeeThisToken"
USER = "somebody"
LARGE = ("*.safetensors", "*.bin")


class Fault(NamedTuple):
    """Requests of a method whose path matches a pattern are answered with a status; 0 does the work and hangs up."""

    method: str
    path: str
    status: int


class Request(NamedTuple):
    """A recorded request; its headers have `***` in place of the token."""

    method: str
    path: str
    headers: dict[str, str]
    status: int


class Refusal(Exception):
    """An error that the Hub answers."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class Blob(NamedTuple):
    """A file of a commit."""

    content: bytes
    large: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def git_oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content, usedforsecurity=False).hexdigest()


@dataclass
class Repository:
    """Trees by commit id, with the messages, and the branches and pull requests that point at them."""

    private: bool
    commits: dict[str, tuple[dict[str, Blob], dict[str, Any]]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def add(self, branch: str, files: dict[str, Blob], header: dict[str, Any]) -> str:
        oid = hashlib.sha1(f"{len(self.commits)}".encode(), usedforsecurity=False).hexdigest()
        self.commits[oid] = (files, header)
        self.branches[branch] = oid
        return oid

    def at(self, revision: str) -> tuple[str, dict[str, Blob]]:
        oid = self.branches.get(revision, revision)
        if oid not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid, self.commits[oid][0]

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Return path -> bytes, without the file that every repository is created with."""
        return {path: blob.content for path, blob in self.at(revision)[1].items() if path != ".gitattributes"}

    def put(self, name: str, content: bytes) -> None:
        """Commit a file as somebody else would."""
        self.add("main", {**self.at("main")[1], name: Blob(content, False)}, {"summary": "Theirs"})


Answer = tuple[int, bytes, dict[str, str]]


def as_json(value: Any, status: int = 200) -> Answer:
    return status, json.dumps(value).encode(), {"Content-Type": "application/json"}


@dataclass
class HubServer:
    """The Hub. As a context it serves on a free port until its end."""

    repos: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # SHA-256 -> large file that has arrived
    requests: list[Request] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    lock: Any = field(default_factory=threading.RLock)

    def __enter__(self) -> "HubServer":
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def environment(self, home: Path) -> dict[str, str]:
        """Return the variables with which a fresh process uses this Hub, with caches in `home`."""
        names = {"HF_ENDPOINT": self.endpoint, "HF_TOKEN": TOKEN, "HF_HOME": str(home)}
        switches = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}
        return {**names, **switches, "NO_PROXY": "127.0.0.1,localhost"}

    def asked(self, method: str, path: str) -> list[Request]:
        """Return the requests of a method whose path has a match of a regular expression."""
        return [request for request in self.requests if request.method == method and re.search(path, request.path)]

    def commits(self, repo: str) -> list[dict[str, Any]]:
        """Return the headers of a repository's commits, without the first."""
        return [header for _, header in list(self.repos[repo].commits.values())[1:]]

    def holds(self, text: str) -> bool:
        """Return whether a text occurs in any file, commit message or recorded request."""
        trees = [commit for repo in self.repos.values() for commit in repo.commits.values()]
        contents = [*self.objects.values(), *(blob.content for files, _ in trees for blob in files.values())]
        headers = repr([header for _, header in trees]) + repr(self.requests)
        return text in headers or any(text.encode() in content for content in contents)

    # The pages; `repo` and the other arguments come from the address

    def create(self, query: dict, body: bytes) -> Answer:
        sent = json.loads(body)
        name = f"{sent.get('organization') or USER}/{sent['name']}"
        if name in self.repos:
            return as_json({"url": f"{self.endpoint}/{name}", "error": "exists"}, 409)
        self.repos[name] = Repository(sent.get("visibility") == "private" or bool(sent.get("private")))
        self.repos[name].add("main", {".gitattributes": Blob(b"*.safetensors filter=lfs", False)}, {"summary": ""})
        return as_json({"url": f"{self.endpoint}/{name}", "name": name, "id": name})

    def validate_yaml(self, query: dict, body: bytes) -> Answer:
        return as_json({"errors": [], "warnings": []})

    def info(self, query: dict, body: bytes, repo: str, revision: str = "main") -> Answer:
        oid, files = self._repository(repo).at(revision)
        siblings = [{"rfilename": path} for path in sorted(files)]
        return as_json({"id": repo, "modelId": repo, "sha": oid, "private": False, "tags": [], "siblings": siblings})

    def tree(self, query: dict, body: bytes, repo: str, revision: str, folder: str = "") -> Answer:
        files = self._repository(repo).at(revision)[1]
        inside = [path for path in sorted(files) if path.startswith(f"{folder}/" if folder else "")]
        if not inside:
            raise Refusal(404, "no such folder", "EntryNotFound")
        entries = [{"type": "file", "path": p, "size": len(files[p].content), "oid": files[p].git_oid} for p in inside]
        return as_json(entries)

    def branch(self, query: dict, body: bytes, repo: str, branch: str) -> Answer:
        found = self._repository(repo)
        found.branches[branch] = found.branches["main"]
        return as_json({})

    def preupload(self, query: dict, body: bytes, repo: str, revision: str) -> Answer:
        files = self._repository(repo).at(revision)[1]
        modes = []
        for sent in json.loads(body)["files"]:
            known, large = files.get(sent["path"]), any(fnmatch(sent["path"], pattern) for pattern in LARGE)
            oid = known and (known.sha256 if large else known.git_oid)
            mode = "lfs" if large else "regular"
            modes.append({"path": sent["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return as_json({"files": modes})

    def commit(self, query: dict, body: bytes, repo: str, revision: str) -> Answer:
        found = self._repository(repo)
        header, *lines = (json.loads(line) for line in body.splitlines())
        parent, files = found.at(revision)
        if header["value"].get("parentCommit", parent) != parent:
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(files)
        for line in lines:
            sent = line["value"]
            if line["key"] == "file":
                files[sent["path"]] = Blob(base64.b64decode(sent["content"]), False)
            elif line["key"] == "lfsFile":
                files[sent["path"]] = Blob(self.objects[sent["oid"]], True)
            else:
                del files[sent["path"]]
        pull = query.get("create_pr") == ["1"]
        oid = found.add("refs/pr/1" if pull else revision, files, header["value"])
        done = {"success": True, "commitOid": oid, "commitUrl": f"{self.endpoint}/{repo}/commit/{oid}"}
        return as_json({**done, "pullRequestUrl": f"{self.endpoint}/{repo}/discussions/1" if pull else None})

    def batch(self, query: dict, body: bytes, repo: str) -> Answer:
        answers = []
        for sent in json.loads(body)["objects"]:
            actions = {"upload": {"href": f"{self.endpoint}/lfs/{sent['oid']}"}}
            known = sent["oid"] in self.objects
            answers.append({"oid": sent["oid"], "size": sent["size"], **({} if known else {"actions": actions})})
        return as_json({"transfer": "basic", "objects": answers})

    def store(self, query: dict, body: bytes, oid: str) -> Answer:
        assert hashlib.sha256(body).hexdigest() == oid
        self.objects[oid] = body
        return as_json({})

    def resolve(self, query: dict, body: bytes, repo: str, revision: str, path: str) -> Answer:
        oid, files = self._repository(repo).at(revision)
        if path not in files:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        blob = files[path]
        etag = blob.sha256 if blob.large else blob.git_oid
        return 200, blob.content, {"X-Repo-Commit": oid, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}

    def _repository(self, repo: str) -> Repository:
        if repo not in self.repos:
            raise Refusal(404, "Repository not found", "RepoNotFound")
        return self.repos[repo]

    def answer(self, method: str, url: str, body: bytes) -> Answer:
        """Answer a request by the page of its address."""
        parts = urlsplit(url)
        for methods, pattern, page in PAGES:
            if method in methods and (found := re.fullmatch(pattern, parts.path)):
                groups = {name: unquote(value) for name, value in found.groupdict().items() if value is not None}
                return page(self, parse_qs(parts.query), body, **groups)
        raise Refusal(404, f"no such page: {method} {parts.path}")


_REPO, _REVISION = r"(?P<repo>[^/]+/[^/]+?)", r"(?P<revision>[^/]+)"
_API = f"/api/models/{_REPO}"
PAGES: list[tuple[tuple[str, ...], str, Callable[..., Answer]]] = [
    (("POST",), "/api/repos/create", HubServer.create),
    (("POST",), "/api/validate-yaml", HubServer.validate_yaml),
    (("GET",), f"{_API}(/revision/{_REVISION})?", HubServer.info),
    (("GET",), f"{_API}/tree/{_REVISION}(/(?P<folder>.*))?", HubServer.tree),
    (("POST",), f"{_API}/branch/(?P<branch>[^/]+)", HubServer.branch),
    (("POST",), f"{_API}/preupload/{_REVISION}", HubServer.preupload),
    (("POST",), f"{_API}/commit/{_REVISION}", HubServer.commit),
    (("POST",), rf"/{_REPO}\.git/info/lfs/objects/batch", HubServer.batch),
    (("PUT",), "/lfs/(?P<oid>[0-9a-f]+)", HubServer.store),
    (("GET", "HEAD"), f"/{_REPO}/resolve/{_REVISION}/(?P<path>.+)", HubServer.resolve),
]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, format: str, *args: Any) -> None:
        """Stay silent: the requests are recorded."""

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with self.hub.lock:
            status, content, headers = self._answer(body)
            shown = {name.lower(): value.replace(TOKEN, "***") for name, value in self.headers.items()}
            self.hub.requests.append(Request(self.command, self.path, shown, status))
        if status == 0:
            self.close_connection = True
            return
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self, body: bytes) -> Answer:
        faults = (f.status for f in self.hub.faults if f.method == self.command and re.search(f.path, self.path))
        status = next(faults, None)
        try:
            if status:
                raise Refusal(status, "made to fail")
            # The addresses of large files need no token, and no other request comes without one.
            if not self.path.startswith("/lfs/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                raise Refusal(401, "Invalid credentials in Authorization header")
            answer = self.hub.answer(self.command, self.path, body)
            return answer if status is None else (0, b"", {})
        except Refusal as refusal:
            headers = {"X-Error-Code": refusal.code} if refusal.code else {}
            status, content, kind = as_json({"error": str(refusal)}, refusal.status)
            return status, content, {**kind, **headers, "X-Error-Message": str(refusal)}
