"""A hub on 127.0.0.1: the part of the protocol that `huggingface_hub` uses to create, commit, list and download.

State lies in memory, bytes are exact, every request is recorded, and any of them can be made to fail ([`Fault`]).
Large files go by the LFS protocol; Xet storage is not announced and has to be switched off in the client.
"""

import re
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

from hub_pages import ROUTES, USER, Answer, Call, as_json
from hub_repository import HubRefusal, Repository


TOKEN = "hf_" + "nobodyShouldEverSeeThisToken"


@dataclass
class Fault:
    """What goes wrong with the requests of a method whose path holds a match of a pattern.

    Args:
        path: regular expression.
        times: how many requests; after them all is well again.
        skip: how many go well before that.
        status: answer with this, and do nothing.
        message: of that answer.
        cut: the connection ends after that many bytes of the body that is sent up, or down.
        lose: do what was asked for, and end the connection without an answer.
        delay: seconds before anything happens.
    """

    method: str
    path: str
    times: int = 10**9
    skip: int = 0
    status: int | None = None
    message: str = "made to fail"
    cut: int | None = None
    lose: bool = False
    delay: float = 0.0

    def strikes(self, method: str, path: str) -> bool:
        if self.times < 1 or method != self.method or not re.search(self.path, path):
            return False
        if self.skip > 0:
            self.skip -= 1
            return False
        self.times -= 1
        return True


class Request(NamedTuple):
    """What a client asked; headers have lower names, and say `***` where the token was."""

    method: str
    path: str
    headers: dict[str, str]
    authorized: bool
    status: int  # of the answer, 0 where the connection was cut
    received: int  # bytes of the body


class Cut(Exception):
    """The connection ends here."""


@dataclass
class HubServer:
    """The hub. As a context it serves on a free port until its end.

    Args:
        token: the one that may write, and read what is private.
        part_size: send large files in parts of at most this many bytes; by default in one piece.
    """

    token: str = TOKEN
    part_size: int | None = None
    repos: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # SHA-256 -> large file that has arrived
    parts: dict[tuple[str, int], bytes] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    lock: Any = field(default_factory=threading.RLock)

    def __enter__(self) -> "HubServer":
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def cdn(self) -> str:
        """Where large files lie: another host, to which no client may send its token."""
        return f"http://localhost:{self._server.server_port}"

    def environment(self, home: Path) -> dict[str, str]:
        """The variables with which a fresh process speaks to this hub, with caches in `home`."""
        names = {"HF_ENDPOINT": self.endpoint, "HF_TOKEN": self.token, "HF_HOME": str(home)}
        switches = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}
        return {**names, **switches, "NO_PROXY": "127.0.0.1,localhost"}

    def asked(self, method: str, path: str) -> list[Request]:
        """The requests of a method whose path holds a match of a regular expression."""
        return [request for request in self.requests if request.method == method and re.search(path, request.path)]

    def holds(self, text: str) -> bool:
        """Whether a text occurs in any file, commit message or recorded request."""
        commits = [commit for repo in self.repos.values() for commit in repo.commits.values()]
        contents = [blob.content for commit in commits for blob in commit.files.values()]
        words = [repr((commit.title, commit.description)) for commit in commits] + [repr(self.requests)]
        return any(text.encode() in content for content in [*contents, *self.objects.values()]) or text in str(words)

    def answer(self, method: str, url: str, body: bytes, authorized: bool) -> Answer:
        """Do what a request says, see `ROUTES`."""
        parts = urlsplit(url)
        query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        for methods, pattern, action in ROUTES:
            if method in methods and (found := re.fullmatch(pattern, parts.path)):
                groups = {name: unquote(value) for name, value in found.groupdict(default="").items()}
                with self.lock:
                    return action(self, Call(method, query, body, authorized, self), **groups)
        raise HubRefusal(404, f"no such page: {method} {parts.path}")


class _Handler(BaseHTTPRequestHandler):
    """Reads a request, lets a fault strike, answers, and records."""

    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, format: str, *args: Any) -> None:
        """Be silent: the requests are recorded."""

    def do_GET(self) -> None:
        hub, received = self.hub, 0
        bearer = self.headers.get("Authorization", "")
        authorized = bearer == f"Bearer {hub.token}"
        with hub.lock:
            fault = next((fault for fault in hub.faults if fault.strikes(self.command, self.path)), None)
        status = 0
        try:
            time.sleep(fault.delay if fault else 0)
            upload = self.command in ("POST", "PUT")
            body = self._read(fault.cut if fault and upload else None)
            received = len(body)
            answer = self._answer(fault, body, authorized, bool(bearer))
            if fault and fault.lose:
                raise Cut
            status = answer.status
            self._send(answer, fault.cut if fault and not upload else None)
        except (Cut, ConnectionError):
            self.close_connection = True
            self._hang_up()
        finally:
            headers = {name.lower(): value.replace(hub.token, "***") for name, value in self.headers.items()}
            with hub.lock:
                hub.requests.append(Request(self.command, self.path, headers, authorized, status, received))

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _answer(self, fault: Fault | None, body: bytes, authorized: bool, named: bool) -> Answer:
        try:
            if fault and fault.status is not None:
                raise HubRefusal(fault.status, fault.message)
            if named and not authorized:
                raise HubRefusal(401, "Invalid credentials in Authorization header")
            return self.hub.answer(self.command, self.path, body, authorized)
        except HubRefusal as refusal:
            headers = {"X-Error-Code": refusal.code} if refusal.code else {}
            answer = as_json({"error": str(refusal)}, refusal.status)
            return answer._replace(headers={**answer.headers, **headers, "X-Error-Message": str(refusal)})

    def _read(self, cut: int | None) -> bytes:
        """The body; with `cut`, no more than that of it before the connection ends."""
        pieces = []
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline(), 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
        else:
            length = int(self.headers.get("Content-Length", 0))
            pieces.append(self.rfile.read(length if cut is None else min(cut, length)))
        if cut is not None:
            raise Cut
        return b"".join(pieces)

    def _send(self, answer: Answer, cut: int | None) -> None:
        status, body, headers = answer.status, answer.body, dict(answer.headers)
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if found and status == 200:
            first, last = int(found[1]), min(int(found[2] or len(body)), len(body) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(body)}"
            status, body = 206, body[first : last + 1]
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:cut])
            if cut is not None:
                raise Cut

    def _hang_up(self) -> None:
        with suppress(OSError):  # the other side was faster
            self.connection.shutdown(socket.SHUT_RDWR)


__all__ = ["TOKEN", "USER", "Fault", "HubServer", "Request"]
