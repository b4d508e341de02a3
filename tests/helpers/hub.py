"""A small stand-in for the Hugging Face hub: the requests that its library makes to publish a data set, over HTTP, in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKENS = {"hf_writer": "write", "hf_reader": "read"}
_REPO = r"(?P<repo>[^/]+/[^/]+)"
_PART = 1 << 20  # larger objects are sent in parts


@dataclass
class Repo:
    private: bool = False
    files: dict[str, tuple[bytes, bool]] = field(default_factory=dict)
    """Path -> content, and whether it is an object of the large file storage."""
    commits: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)

    def commit(self, message: str) -> str:
        self.messages.append(message)
        self.commits.append(hashlib.sha1(f"{message} {len(self.commits)}".encode()).hexdigest())
        return self.commits[-1]


class Refused(Exception):
    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(message)
        self.status, self.code = status, code


class Hub:
    """The server. `with Hub() as hub:` runs it; `hub.url` is its endpoint."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        """SHA-256 -> content, of what was uploaded."""
        self.parts: dict[str, dict[int, bytes]] = {}
        self.uploads: list[str] = []
        """SHA-256 of each object that was uploaded, in order."""
        self.failing: set[str] = set()
        """SHA-256 of objects that are refused."""
        self.corrupted: set[str] = set()
        """SHA-256 of objects that are stored with another byte."""
        self.ignored: set[str] = set()
        """Paths that the data set's .gitignore excludes."""
        self.lock = threading.Lock()

    def __enter__(self) -> Hub:
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def contents(self, repo: str) -> dict[str, bytes]:
        return {path: content for path, (content, _) in self.repos[repo].files.items()}

    # ---------------------------------------------------------------------------------------------------------- answers

    def found(self, name: str, role: str, revision: str = "main") -> Repo:
        repo = self.repos.get(name)
        if not role:
            raise Refused(401, "RepoNotFound", "Invalid username or password.")
        if repo is None:
            raise Refused(404, "RepoNotFound", "Repository not found")
        if revision not in ("main", *repo.commits):
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repo

    def info(self, role: str, repo: str, revision: str = "main", **_: Any) -> Any:
        found = self.found(repo, role, revision)
        return {"id": repo, "_id": "1", "sha": found.commits[-1], "private": found.private}

    def create(self, role: str, body: bytes, **_: Any) -> Any:
        asked = json.loads(body)
        assert asked["type"] == "dataset"
        name = f"{asked['organization']}/{asked['name']}"
        if role != "write":
            raise Refused(401 if not role else 403, "", "You don't have the rights to create a dataset there")
        self.repos[name] = Repo(private=asked.get("visibility") == "private" or bool(asked.get("private")))
        self.repos[name].files[".gitattributes"] = (b"*.parquet filter=lfs\n", False)
        self.repos[name].commit("initial commit")
        return {"url": f"{self.url}/datasets/{name}", "name": name, "id": "1"}

    def paths_info(self, role: str, repo: str, revision: str, body: bytes, **_: Any) -> Any:
        files = self.found(repo, role, revision).files
        paths = parse_qs(body.decode()).get("paths", [])
        described = []
        for path in paths:
            if path in files:
                content, large = files[path]
                entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": _blob(content)}
                if large:
                    entry["lfs"] = {
                        "oid": hashlib.sha256(content).hexdigest(),
                        "size": len(content),
                        "pointerSize": 130,
                    }
                described.append(entry)
            elif any(name.startswith(f"{path}/") for name in files):
                described.append({"type": "directory", "path": path, "oid": "0" * 40})
        return described

    def preupload(self, role: str, repo: str, revision: str, body: bytes, **_: Any) -> Any:
        files = self.writable(repo, role, revision).files
        answers = []
        for asked in json.loads(body)["files"]:
            path = asked["path"]
            large = path.endswith(".parquet") or asked["size"] > 10 << 20
            answer = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": path in self.ignored}
            if path in files:
                content, was_large = files[path]
                answer["oid"] = hashlib.sha256(content).hexdigest() if was_large else _blob(content)
            answers.append(answer)
        return {"files": answers}

    def writable(self, repo: str, role: str, revision: str) -> Repo:
        found = self.found(repo, role, revision)
        if role != "write":
            raise Refused(403, "", "Forbidden: you must use a write token to upload to a repository.")
        return found

    def batch(self, role: str, repo: str, body: bytes, **_: Any) -> Any:
        self.writable(repo, role, "main")
        answers = []
        for asked in json.loads(body)["objects"]:
            oid, size = asked["oid"], asked["size"]
            answer = {"oid": oid, "size": size}
            if oid not in self.objects:
                upload: dict[str, Any] = {"href": f"{self.url}/objects/{oid}"}
                if size > _PART:
                    numbers = range(1, -(-size // _PART) + 1)
                    upload["header"] = {"chunk_size": str(_PART)} | {
                        f"{number:05d}": f"{self.url}/objects/{oid}/{number}" for number in numbers
                    }
                verify = {"href": f"{self.url}/verify/{oid}"}
                answer["actions"] = {"upload": upload, "verify": verify}
            answers.append(answer)
        return {"transfer": "basic", "objects": answers}

    def upload(self, oid: str, body: bytes, part: str | None = None, **_: Any) -> Any:
        if oid in self.failing:
            raise Refused(507, "", "Insufficient storage")
        if part is not None:
            self.parts.setdefault(oid, {})[int(part)] = body
            return {}
        self.store(oid, body)
        return {}

    def complete(self, oid: str, body: bytes, **_: Any) -> Any:
        numbers = [part["partNumber"] for part in json.loads(body)["parts"]]
        self.store(oid, b"".join(self.parts[oid][number] for number in numbers))
        return {}

    def store(self, oid: str, content: bytes) -> None:
        assert hashlib.sha256(content).hexdigest() == oid
        self.uploads.append(oid)
        self.objects[oid] = bytes([content[0] ^ 1]) + content[1:] if oid in self.corrupted else content

    def verify(self, oid: str, body: bytes, **_: Any) -> Any:
        assert json.loads(body)["size"] == len(self.objects[oid])
        return {}

    def commit(self, role: str, repo: str, revision: str, body: bytes, **_: Any) -> Any:
        found = self.writable(repo, role, revision)
        header, *operations = [json.loads(line) for line in body.splitlines()]
        parent = header["value"].get("parentCommit")
        if parent is not None and parent != found.commits[-1]:
            raise Refused(412, "", "A commit has happened since. Please refresh and try again.")
        files = dict(found.files)
        for operation in operations:
            value, path = operation["value"], operation["value"]["path"]
            if operation["key"] == "file":
                files[path] = (base64.b64decode(value["content"]), False)
            elif operation["key"] == "lfsFile":
                if value["oid"] not in self.objects:
                    raise Refused(400, "", f"LFS pointer points to a file that does not exist: {path}")
                files[path] = (self.objects[value["oid"]], True)
            elif files.pop(path, None) is None:
                raise Refused(404, "EntryNotFound", f"A file with this name doesn't exist: {path}")
        found.files = files
        oid = found.commit(header["value"]["summary"])
        return {"commitUrl": f"{self.url}/datasets/{repo}/commit/{oid}", "commitOid": oid}

    def download(self, role: str, repo: str, revision: str, path: str, **_: Any) -> bytes:
        files = self.found(repo, role, revision).files
        if path not in files:
            raise Refused(404, "EntryNotFound", "Entry not found")
        return files[path][0]


def _blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


_ROUTES: list[tuple[str, str, Callable[..., Any]]] = [
    ("POST", "/api/repos/create", Hub.create),
    ("POST", "/api/validate-yaml", lambda hub, **_: {"errors": [], "warnings": []}),
    ("GET", f"/api/datasets/{_REPO}", Hub.info),
    ("GET", f"/api/datasets/{_REPO}/revision/(?P<revision>[^/]+)", Hub.info),
    ("POST", f"/api/datasets/{_REPO}/paths-info/(?P<revision>[^/]+)", Hub.paths_info),
    ("POST", f"/api/datasets/{_REPO}/preupload/(?P<revision>[^/]+)", Hub.preupload),
    ("POST", f"/api/datasets/{_REPO}/commit/(?P<revision>[^/]+)", Hub.commit),
    ("POST", f"/datasets/{_REPO}\\.git/info/lfs/objects/batch", Hub.batch),
    ("PUT", r"/objects/(?P<oid>\w+)(?:/(?P<part>\d+))?", Hub.upload),
    ("POST", r"/objects/(?P<oid>\w+)", Hub.complete),
    ("POST", r"/verify/(?P<oid>\w+)", Hub.verify),
    ("GET", f"/datasets/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Hub.download),
]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and content in one packet

    def answer(self) -> None:
        path = urlsplit(self.path).path
        body = self.body()
        method = "GET" if self.command == "HEAD" else self.command
        role = TOKENS.get(self.headers.get("Authorization", "").removeprefix("Bearer "), "")
        headers = {"Content-Type": "application/json"}
        status, content = 404, b"{}"
        for wanted, pattern, function in _ROUTES:
            match = re.fullmatch(pattern, path)
            if wanted != method or match is None:
                continue
            values = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
            try:
                with self.hub.lock:
                    result = function(self.hub, role=role, body=body, **values)
            except Refused as error:
                status, content = error.status, json.dumps({"error": str(error)}).encode()
                headers |= {"X-Error-Message": str(error)} | ({"X-Error-Code": error.code} if error.code else {})
            else:
                status, content = 200, result if isinstance(result, bytes) else json.dumps(result).encode()
                headers["ETag"] = f'"{hashlib.sha1(content).hexdigest()}"'
                if isinstance(result, bytes):
                    headers["X-Repo-Commit"] = self.hub.repos[values["repo"]].commits[-1]
            break
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            found = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                found += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return found
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def log_message(self, format: str, *args: Any) -> None:
        pass
