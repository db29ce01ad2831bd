"""A hub on this machine: a server that speaks the hub's protocol for models, so that uploads need no network.

Repositories are created and read over HTTP, small files come with the commit, large ones by the LFS protocol, whole or
in parts. The server computes every hash itself, and refuses content that does not have the one that it was announced
with. Xet, the hub's newer storage, is not spoken: clients are told `HF_HUB_DISABLE_XET=1`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

LARGE, PART = 10_000, 400_000  # bytes: of a file that goes by LFS, and of a part of a very large one
LICENCES = {"apache-2.0", "mit", "cc-by-4.0", "other"}


class Repository:
    def __init__(self, private: bool) -> None:
        self.private, self.gated = private, False
        self.commits: list[dict[str, bytes]] = [{}]

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1]

    @property
    def sha(self) -> str:
        return hashlib.sha1(repr((len(self.commits), sorted(self.files))).encode()).hexdigest()


class Hub:
    """State of the server: users by token, repositories, and large files by their hash."""

    def __init__(self) -> None:
        self.users = {"hf_alice": "alice", "hf_bob": "bob"}
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.requests: list[str] = []  # method and path
        self.damage = False  # whether large content is changed on its way
        self.address = ""

    @contextmanager
    def serving(self):
        """Serve on a free port; `address` is where."""
        handler = type("Handler", (Answers,), {"hub": self})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        self.address = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


class Refused(Exception):
    def __init__(self, status: int, message: str, code: str = "", body: Any = None) -> None:
        self.status, self.message, self.code = status, message, code
        self.body = {"error": message} if body is None else body


class Answers(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    # ---- the way in and out ----

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        self.body = self._read()
        try:
            for pattern, method in ROUTES:
                found = re.fullmatch(pattern, f"{self.command} {path}")
                if found:
                    return method(self, **found.groupdict())
            raise Refused(404, f"no route {self.command} {path}")
        except Refused as refused:
            more = {"X-Error-Code": refused.code} if refused.code else {}
            self._send(refused.status, refused.body, {**more, "X-Error-Message": refused.message})

    do_GET = do_POST = do_PUT = do_HEAD = answer

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "") == "chunked":
            found = b""
            while size := int(self.rfile.readline().strip(), 16):
                found += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return found
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _send(self, status: int, body: Any = None, headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps({} if body is None else body).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    # ---- who may do what ----

    @property
    def user(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.users:
            raise Refused(401, "Invalid credentials in Authorization header")
        return self.hub.users.get(token)

    def _writer(self, owner: str) -> None:
        if self.user is None:
            raise Refused(401, "Invalid username or password.")
        if self.user != owner:
            raise Refused(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')

    def _readable(self, name: str) -> Repository:
        found = self.hub.repositories.get(name)
        if found is None or (found.private and self.user != name.split("/")[0]):
            raise Refused(401 if self.user is None else 404, "Repository not found", "RepoNotFound")
        if found.gated and self.user != name.split("/")[0]:
            raise Refused(403, f"Access to model {name} is restricted", "GatedRepo")
        return found

    # ---- repositories ----

    def create(self) -> None:
        asked = json.loads(self.body)
        owner = asked.get("organization") or self.user or ""
        self._writer(owner)
        name = f"{owner}/{asked['name']}"
        if name in self.hub.repositories:
            message = "You already created this model repo"
            raise Refused(409, message, body={"error": message, "url": f"{self.hub.address}/{name}"})
        self.hub.repositories[name] = Repository(asked.get("visibility") == "private")
        self._send(200, {"url": f"{self.hub.address}/{name}"})

    def validate(self) -> None:
        text = json.loads(self.body)["content"]
        fields = yaml.safe_load(text.split("---")[1]) or {}
        if fields.get("license", "other") not in LICENCES:
            message = '"license" must be one of [apache-2.0, mit, ...]'
            raise Refused(400, "Invalid metadata", body={"errors": [{"message": message}], "warnings": []})
        self._send(200, {"errors": [], "warnings": []})

    def info(self, name: str, revision: str = "main") -> None:
        found = self._readable(name)
        self._check_revision(found, revision)
        card = found.files.get("README.md", b"").decode().split("---")
        fields = yaml.safe_load(card[1]) if len(card) > 2 else None
        files = [{"rfilename": file} for file in sorted(found.files)]
        shown = {"id": name, "modelId": name, "sha": found.sha, "private": found.private, "siblings": files}
        self._send(200, {**shown, "cardData": fields, "tags": [], "downloads": 0, "likes": 0})

    def _check_revision(self, found: Repository, revision: str) -> None:
        if revision not in ("main", found.sha):
            raise Refused(404, "Invalid rev id", "RevisionNotFound")

    def tree(self, name: str, revision: str) -> None:
        found = self._readable(name)
        self._check_revision(found, revision)
        self._send(200, [_entry(file, content) for file, content in sorted(found.files.items())])

    def resolve(self, name: str, revision: str, file: str) -> None:
        found = self._readable(name)
        self._check_revision(found, revision)
        if file not in found.files:
            raise Refused(404, "Entry not found", "EntryNotFound")
        content = found.files[file]
        entry = _entry(file, content)
        tag = entry.get("lfs", entry)["oid"]
        headers = {"ETag": f'"{tag}"', "X-Repo-Commit": found.sha, "Accept-Ranges": "bytes"}
        if "lfs" in entry:
            headers |= {"X-Linked-Etag": f'"{tag}"', "X-Linked-Size": str(len(content))}
        if begin := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            return self._send(206, content[int(begin[1]) :], headers)
        self._send(200, content, headers)

    # ---- uploads ----

    def preupload(self, name: str, revision: str) -> None:
        self._writer(name.split("/")[0])
        modes = {True: "lfs", False: "regular"}
        self._send(
            200,
            {
                "files": [
                    {"path": file["path"], "uploadMode": modes[file["size"] >= LARGE], "shouldIgnore": False}
                    for file in json.loads(self.body)["files"]
                ]
            },
        )

    def batch(self, name: str) -> None:
        self._writer(name.split("/")[0])
        objects = []
        for item in json.loads(self.body)["objects"]:
            oid, size = item["oid"], item["size"]
            entry: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in self.hub.large:
                href, header = f"{self.hub.address}/lfs/{oid}", {}
                verify = {"href": f"{href}/verify"}
                if size > PART:
                    header = {f"{n:05d}": f"{href}/part/{n}" for n in range(1, -(-size // PART) + 1)}
                    header["chunk_size"] = str(PART)
                    href += "/complete"
                entry["actions"] = {"upload": {"href": href, "header": header}, "verify": verify}
            objects.append(entry)
        self._send(200, {"transfer": "basic", "objects": objects})

    def _keep(self, oid: str, content: bytes) -> None:
        if self.hub.damage:
            content = content[:-1] + bytes([content[-1] ^ 1])
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refused(400, "The sha256 of the content is not the announced one")
        self.hub.large[oid] = content

    def put(self, oid: str) -> None:
        self._keep(oid, self.body)
        self._send(200)

    def put_part(self, oid: str, number: str) -> None:
        self.hub.parts.setdefault(oid, {})[int(number)] = self.body
        self._send(200, headers={"ETag": hashlib.md5(self.body).hexdigest()})

    def complete(self, oid: str) -> None:
        parts = self.hub.parts.pop(oid)
        asked = json.loads(self.body)["parts"]
        if [part["etag"] for part in asked] != [hashlib.md5(parts[part["partNumber"]]).hexdigest() for part in asked]:
            raise Refused(400, "A part is not what was announced")
        self._keep(oid, b"".join(parts[number] for number in sorted(parts)))
        self._send(200)

    def verify(self, oid: str) -> None:
        if len(self.hub.large.get(oid, b"")) != json.loads(self.body)["size"]:
            raise Refused(404, "The object is not there")
        self._send(200)

    def commit(self, name: str, revision: str) -> None:
        self._writer(name.split("/")[0])
        found, new = self.hub.repositories[name], {}
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                new[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.hub.large:
                    raise Refused(400, f"{value['path']}: the large file was not uploaded")
                new[value["path"]] = self.hub.large[value["oid"]]
        found.commits.append({**found.files, **new})
        address = f"{self.hub.address}/{name}/commit/{found.sha}"
        self._send(200, {"commitUrl": address, "commitOid": found.sha, "success": True})


def _entry(file: str, content: bytes) -> dict[str, Any]:
    git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    entry: dict[str, Any] = {"type": "file", "path": file, "size": len(content), "oid": git}
    if len(content) >= LARGE:
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return entry


_NAME = r"(?P<name>[^/]+/[^/]+)"
ROUTES = (
    (r"POST /api/repos/create", Answers.create),
    (r"POST /api/validate-yaml", Answers.validate),
    (rf"POST /api/models/{_NAME}/preupload/(?P<revision>.+)", Answers.preupload),
    (rf"POST /api/models/{_NAME}/commit/(?P<revision>.+)", Answers.commit),
    (rf"GET /api/models/{_NAME}", Answers.info),
    (rf"GET /api/models/{_NAME}/revision/(?P<revision>.+)", Answers.info),
    (rf"GET /api/models/{_NAME}/tree/(?P<revision>[^/]+)", Answers.tree),
    (rf"POST /{_NAME}\.git/info/lfs/objects/batch", Answers.batch),
    (r"PUT /lfs/(?P<oid>\w+)", Answers.put),
    (r"PUT /lfs/(?P<oid>\w+)/part/(?P<number>\d+)", Answers.put_part),
    (r"POST /lfs/(?P<oid>\w+)/complete", Answers.complete),
    (r"POST /lfs/(?P<oid>\w+)/verify", Answers.verify),
    (rf"(?:GET|HEAD) /{_NAME}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", Answers.resolve),
)
