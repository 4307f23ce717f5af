"""A Hub on 127.0.0.1: the endpoints that loading and pushing a model use, over repositories in memory."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

LARGE = (".safetensors",)  # what the Hub keeps as LFS objects


class FakeHub:
    """Repositories by name, each a commit of files by path.

    Attributes:
        requests: `METHOD /path` of everything asked for.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.url = ""

    def add_folder(self, name: str, folder: Path) -> None:
        self.repos[name] = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}

    def commit(self, name: str) -> str:
        """A name for the files as they are, 40 hexadecimal digits."""
        files = sorted((path, hashlib.sha1(data).hexdigest()) for path, data in self.repos[name].items())
        return hashlib.sha1(json.dumps(files).encode()).hexdigest()


def etag(path: str, data: bytes) -> str:
    """SHA-256 of a large file, Git's name of a small one."""
    if path.endswith(LARGE):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextlib.contextmanager
def serve(hub: FakeHub) -> Iterator[FakeHub]:
    """Serve `hub` at `hub.url` until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        do_HEAD = do_GET = do_POST = do_PUT = lambda self: self.handle_any()

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = read_chunks(self.rfile)
            path = self.path.partition("?")[0]
            hub.requests.append(f"{self.command} {path}")
            for methods, pattern, answer in ROUTES:
                if self.command in methods and (match := re.fullmatch(pattern, path)):
                    return answer(self, body, **match.groupdict())
            self.fail("EntryNotFound", path)

        def send(self, data: bytes, status: int = 200, **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def send_json(self, value: object) -> None:
            self.send(json.dumps(value).encode(), Content_Type="application/json")

        def fail(self, code: str, what: str, **headers: str) -> None:
            self.send(b"", 404, X_Error_Code=code, X_Error_Message=f"no {what} here", **headers)

        def resolve(self, body: bytes, name: str, rev: str, path: str) -> None:
            if name not in hub.repos:
                return self.fail("RepoNotFound", name)
            commit = hub.commit(name)
            if rev not in ("main", commit):
                return self.fail("RevisionNotFound", rev)
            if path not in hub.repos[name]:
                return self.fail("EntryNotFound", path, X_Repo_Commit=commit)
            data = hub.repos[name][path]
            tag = f'"{etag(path, data)}"'
            large = {"X_Linked_Etag": tag, "X_Linked_Size": str(len(data))} if path.endswith(LARGE) else {}
            self.send(data, ETag=tag, X_Repo_Commit=commit, **large)

        def info(self, body: bytes, name: str, rev: str | None = None) -> None:
            if name not in hub.repos:
                return self.fail("RepoNotFound", name)
            siblings = [{"rfilename": path} for path in hub.repos[name]]
            self.send_json({"id": name, "sha": hub.commit(name), "siblings": siblings, "tags": [], "private": False})

        def tree(self, body: bytes, name: str, rev: str, path: str | None = None) -> None:
            if name not in hub.repos:
                return self.fail("RepoNotFound", name)
            if path is not None:  # repositories here have no folders
                return self.fail("EntryNotFound", path, X_Repo_Commit=hub.commit(name))
            files = hub.repos[name].items()
            self.send_json(
                [{"type": "file", "path": path, "size": len(data), "oid": etag("", data)} for path, data in files]
            )

        def create(self, body: bytes) -> None:
            fields = json.loads(body)
            name = "/".join(filter(None, (fields.get("organization"), fields["name"])))
            hub.repos.setdefault(name, {})
            self.send_json({"url": f"{hub.url}/{name}", "name": name})

        def validate(self, body: bytes) -> None:
            self.send_json({"errors": [], "warnings": []})

        def preupload(self, body: bytes, name: str, rev: str) -> None:
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = {path: "lfs" if path.endswith(LARGE) else "regular" for path in files}
            answers = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]
            self.send_json({"files": answers})

        def batch(self, body: bytes, name: str) -> None:
            objects = [
                {**wanted, "actions": {"upload": {"href": f"{hub.url}/objects/{wanted['oid']}"}}}
                for wanted in json.loads(body)["objects"]
            ]
            self.send_json({"transfer": "basic", "objects": objects})

        def upload(self, body: bytes, oid: str) -> None:
            if hashlib.sha256(body).hexdigest() != oid:
                return self.send(b"", 400)
            hub.objects[oid] = body
            self.send(b"")

        def do_commit(self, body: bytes, name: str, rev: str) -> None:
            for line in body.splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    hub.repos[name][value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    hub.repos[name][value["path"]] = hub.objects[value["oid"]]
            commit = hub.commit(name)
            url = f"{hub.url}/{name}/commit/{commit}"
            self.send_json({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})

        def log_message(self, *args: object) -> None:
            """Nothing on stderr."""

    name, rev = r"(?P<name>[\w.-]+/[\w.-]+)", r"(?P<rev>[\w.-]+)"
    ROUTES = [
        (("HEAD", "GET"), rf"/{name}/resolve/{rev}/(?P<path>.+)", Handler.resolve),
        (("GET",), rf"/api/models/{name}", Handler.info),
        (("GET",), rf"/api/models/{name}/revision/{rev}", Handler.info),
        (("GET",), rf"/api/models/{name}/tree/{rev}(?:/(?P<path>.+))?", Handler.tree),
        (("POST",), r"/api/repos/create", Handler.create),
        (("POST",), r"/api/validate-yaml", Handler.validate),
        (("POST",), rf"/api/models/{name}/preupload/{rev}", Handler.preupload),
        (("POST",), rf"/{name}\.git/info/lfs/objects/batch", Handler.batch),
        (("PUT",), r"/objects/(?P<oid>\w+)", Handler.upload),
        (("POST",), rf"/api/models/{name}/commit/{rev}", Handler.do_commit),
    ]
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


def read_chunks(stream) -> bytes:
    """The body of a request sent in chunks."""
    body = b""
    while size := int(stream.readline().split(b";")[0], 16):
        body += stream.read(size)
        stream.readline()
    stream.readline()
    return body
