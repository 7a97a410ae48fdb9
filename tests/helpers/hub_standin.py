"""A stand-in of the Hugging Face Hub on loopback: the part of its HTTP protocol that pushing and loading models need.

Repositories with branches, small files in commits, large files by the LFS protocol, tokens with rights. It can drop the
connection in the middle of an upload, and keeps a log of requests. Standard library only.
"""

import base64
import contextlib
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

USER = "tester"
WRITE_TOKEN, READ_TOKEN = "hf_test_that_may_write", "hf_test_that_may_read"


@dataclass
class Repo:
    """A repository: its commits, each with all its files, their messages, and the commits that branches point to."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"0" * 40: {".gitattributes": b""}})
    branches: dict[str, str] = field(default_factory=lambda: {"main": "0" * 40})
    messages: list[str] = field(default_factory=list)

    def sha(self, revision: str) -> str:
        return self.branches.get(revision, revision)


@dataclass
class Answer:
    status: int
    body: object = b""
    headers: dict[str, str] = field(default_factory=dict)


def refusal(status: int, error: str, code: str = "") -> Answer:
    return Answer(status, {"error": error}, {"X-Error-Code": code, "X-Error-Message": error})


class Hub:
    """The state of the stand-in, and one method per endpoint.

    Attributes:
        repos: by id.
        objects: large files, sha256 → content.
        requests: (method, path) of every request.
        drops: large files, sha256 → how many times the connection is dropped in the middle of their upload.
        on_event: called with "asked" when a request arrives, before its body is read, and with "done" when it has been
            carried out, before the answer.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.drops: dict[str, int] = {}
        self.on_event: Callable[[str], object] = lambda event: None
        self.url = ""

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        repo = self.repos[repo_id]
        return repo.commits[repo.sha(revision)]

    # ---- endpoints: each takes the parts of the path, and the body ----
    def create_repo(self, body: bytes) -> Answer:
        asked = json.loads(body)
        repo_id = f"{asked.get('organization') or USER}/{asked['name']}"
        owner = repo_id.split("/")[0]
        if owner not in (USER, "somebody"):
            return refusal(404, "Namespace not found")
        if owner != USER:
            return refusal(403, "You don't have the rights to create a model under this namespace")
        place = {"url": f"{self.url}/{repo_id}", "name": repo_id}
        if repo_id in self.repos:
            return Answer(409, place)
        self.repos[repo_id] = Repo(private=asked.get("visibility") == "private" or bool(asked.get("private")))
        return Answer(200, place)

    def create_branch(self, body: bytes, repo_id: str, branch: str) -> Answer:
        if branch.startswith("refs/"):
            return refusal(400, "Invalid reference for a branch")
        branches = self.repos[repo_id].branches
        if branch in branches:
            return refusal(409, "Reference already exists")
        branches[branch] = branches["main"]
        return Answer(200, {})

    def validate_card(self, body: bytes) -> Answer:
        return Answer(200, {"errors": [], "warnings": []})

    def preupload(self, body: bytes, repo_id: str, revision: str) -> Answer:
        present = self.files(repo_id, revision)
        answers = []
        for file in json.loads(body)["files"]:
            large = file["path"].endswith(".safetensors")
            content = present.get(file["path"])
            oid = None if content is None else hashlib.sha256(content).hexdigest() if large else git_hash(content)
            mode = "lfs" if large else "regular"
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return Answer(200, {"files": answers})

    def batch(self, body: bytes, repo_id: str) -> Answer:
        objects = []
        for asked in json.loads(body)["objects"]:
            upload = {"upload": {"href": f"{self.url}/lfs/{asked['oid']}"}}
            objects.append(asked if asked["oid"] in self.objects else asked | {"actions": upload})
        return Answer(200, {"transfer": "basic", "objects": objects})

    def upload(self, body: bytes, oid: str) -> Answer:
        assert hashlib.sha256(body).hexdigest() == oid
        self.objects[oid] = body
        return Answer(200, {})

    def commit(self, body: bytes, repo_id: str, branch: str) -> Answer:
        repo, files = self.repos[repo_id], dict(self.files(repo_id, branch))
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "header":
                repo.messages.append(value["summary"])
            elif operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        sha = hashlib.sha1(repo.sha(branch).encode() + body).hexdigest()
        repo.commits[sha], repo.branches[branch] = files, sha
        return Answer(200, {"success": True, "commitOid": sha, "commitUrl": f"{self.url}/{repo_id}/commit/{sha}"})

    def info(self, body: bytes, repo_id: str, revision: str = "main") -> Answer:
        siblings = [{"rfilename": name} for name in self.files(repo_id, revision)]
        repo = self.repos[repo_id]
        about = {"id": repo_id, "sha": repo.sha(revision), "private": repo.private, "tags": [], "siblings": siblings}
        return Answer(200, about)

    def tree(self, body: bytes, repo_id: str, revision: str, folder: str = "") -> Answer:
        files = {name: data for name, data in self.files(repo_id, revision).items() if name.startswith(folder)}
        if not files:
            return refusal(404, "Entry not found", "EntryNotFound")
        return Answer(
            200,
            [{"type": "file", "path": name, "size": len(data), "oid": git_hash(data)} for name, data in files.items()],
        )

    def resolve(self, body: bytes, repo_id: str, revision: str, name: str) -> Answer:
        sha, content = self.repos[repo_id].sha(revision), self.files(repo_id, revision).get(name)
        if content is None:
            missing = refusal(404, "Entry not found", "EntryNotFound")
            missing.headers["X-Repo-Commit"] = sha
            return missing
        return Answer(200, content, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": sha})

    # ---- who may do what, and which method answers ----
    def answer(self, method: str, path: str, token: str | None, body: bytes) -> Answer:
        self.requests.append((method, path))
        for methods, pattern, endpoint in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method in methods.split():
                parts = [unquote(part) for part in match.groups() if part is not None]
                return self._refused(endpoint, parts, token) or getattr(self, endpoint)(body, *parts)
        return refusal(404, f"the stand-in has no {method} {path}")

    def _refused(self, endpoint: str, parts: list[str], token: str | None) -> Answer | None:
        if endpoint in ("upload", "validate_card"):
            return None  # an upload's address is the permission
        if token not in (None, WRITE_TOKEN, READ_TOKEN):
            return refusal(401, "Invalid credentials in Authorization header")
        if parts and (parts[0] not in self.repos or (self.repos[parts[0]].private and token is None)):
            return refusal(404, "Repository not found", "RepoNotFound")
        if endpoint not in ("info", "tree", "resolve") and token != WRITE_TOKEN:
            return refusal(403, "Forbidden: you must use a write token")
        revision = parts[1] if endpoint in ("info", "tree", "resolve", "preupload", "commit") and parts[1:] else "main"
        if parts and self.repos[parts[0]].sha(revision) not in self.repos[parts[0]].commits:
            return refusal(404, "Invalid rev id", "RevisionNotFound")
        return None


REPO = "([^/]+/[^/]+)"
ROUTES = [  # (methods, pattern of the path, method of Hub)
    ("POST", "/api/repos/create", "create_repo"),
    ("POST", "/api/validate-yaml", "validate_card"),
    ("POST", f"/api/models/{REPO}/branch/([^/]+)", "create_branch"),
    ("POST", f"/api/models/{REPO}/preupload/([^/]+)", "preupload"),
    ("POST", f"/api/models/{REPO}/commit/([^/]+)", "commit"),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", "batch"),
    ("PUT", "/lfs/([0-9a-f]+)", "upload"),
    ("GET", f"/api/models/{REPO}(?:/revision/([^/]+))?", "info"),
    ("GET", f"/api/models/{REPO}/tree/([^/]+)(?:/(.+))?", "tree"),
    ("GET HEAD", f"/{REPO}/resolve/([^/]+)/(.+)", "resolve"),
]


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """HTTP around a `Hub`, which is `server.hub`."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments) -> None:
        pass

    def do_GET(self) -> None:
        hub = self.server.hub
        path = urlsplit(self.path).path
        oid = path.removeprefix("/lfs/")
        if hub.drops.get(oid, 0):
            hub.drops[oid] -= 1
            self.rfile.read(16)
            self.close_connection = True
            return
        bearer = self.headers.get("Authorization")
        token = None if bearer is None else bearer.removeprefix("Bearer ")
        hub.on_event("asked")
        answer = hub.answer(self.command, path, token, self._body())
        hub.on_event("done")
        self._send(answer)

    do_POST = do_PUT = do_HEAD = do_GET

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(self, answer: Answer) -> None:
        is_file = isinstance(answer.body, bytes)
        body = answer.body if is_file else json.dumps(answer.body).encode()
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/octet-stream" if is_file else "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def environment_of(hub, home, token=None):
    """The environment of a process whose Hub is a stand-in, with a token or without one."""
    kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    about = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    return kept | about | ({} if token is None else {"HF_TOKEN": token})


@contextlib.contextmanager
def serve():
    """A running `Hub`; its address is `hub.url`."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.hub = Hub()
        server.hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server.hub
        server.shutdown()
        thread.join()
