"""A small Hub on loopback for tests: repositories, commits, tags, LFS and Xet uploads, resolve.

It speaks what huggingface_hub's real client asks for when it creates, uploads, tags and downloads a repository: a model's
under its name, a Space's under "spaces/" and its name.
Content is addressed by sha256. Files above 1 KiB or of a weights type go through LFS, or through Xet when a local folder
stands in for the content store: then the client writes its chunks there itself, and the double only learns hashes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_double"
DATE = "2026-01-01T00:00:00.000Z"


class Repository:
    """Commits are {path: (kind, key, size)}: kind "regular" with the bytes as key, "lfs" with their sha256."""

    def __init__(self):
        self.commits: list[tuple[str, dict]] = []
        self.tags: dict[str, str] = {}
        self.commit({})

    def commit(self, files: dict) -> str:
        oid = hashlib.sha1(repr((len(self.commits), sorted(files.items()))).encode()).hexdigest()
        self.commits.append((oid, files))
        return oid

    @property
    def head(self) -> tuple[str, dict]:
        return self.commits[-1]

    def at(self, revision: str) -> tuple[str, dict] | None:
        oid = self.head[0] if revision in ("main", "HEAD") else self.tags.get(revision, revision)
        return next((commit for commit in self.commits if commit[0] == oid), None)


class Hub:
    """The state of the double. With `refuse_commits` an upload ends after its files were stored."""

    def __init__(self, xet: Path | None):
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.xet = xet
        self.requests: list[tuple[str, str]] = []
        self.refuse_commits = False
        self.url = ""

    def xet_hash(self, sha256: str) -> str | None:
        """The Xet hash of a file, looked up in the shards that the client wrote.

        A shard lists files after a 48-byte header: [hash 32, flags u32, segments u32, 8], 48 bytes a segment (twice with
        flag bit 31), then, with bit 30, 48 bytes that begin with the sha256. Each 8-byte word is byte-reversed.
        """
        for shard in self.xet.rglob("*.mdb"):
            data, at = shard.read_bytes(), 48
            while at + 48 <= len(data) and data[at : at + 32] != b"\xff" * 32:
                name, flags = data[at : at + 32], int.from_bytes(data[at + 32 : at + 36], "little")
                segments = int.from_bytes(data[at + 36 : at + 40], "little")
                at += 48 + 48 * segments * (2 if flags >> 31 & 1 else 1)
                if flags >> 30 & 1:
                    if words_reversed(data[at : at + 32]).hex() == sha256:
                        return words_reversed(name).hex()
                    at += 48
        return None

    def download(self, name: str, folder: Path) -> Path:
        """Writes the files of a repository's head to `folder`, and returns it."""
        for path, (kind, key, _) in self.repositories[name].head[1].items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(key if kind == "regular" else self.blobs[key])
        return folder

    def is_stored(self, sha256: str) -> bool:
        return sha256 in self.blobs if self.xet is None else self.xet_hash(sha256) is not None


def words_reversed(data: bytes) -> bytes:
    return b"".join(data[i : i + 8][::-1] for i in range(0, len(data), 8))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: object) -> None:
        pass

    def reply(self, status: int, content: object = b"", **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body))} | {
            name.replace("_", "-"): value for name, value in headers.items()
        }
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str, **headers: str) -> None:
        self.reply(status, {"error": code}, X_Error_Code=code, X_Error_Message=code, **headers)

    def body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def handle_request(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        content = self.body()
        for method, pattern, action in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                repository = None
                if "repo" in match.groupdict():
                    repository = self.hub.repositories.get(match["repo"])
                    if repository is None:
                        return self.refuse(404, "RepoNotFound")
                return action(self, repository, match, content)
        return self.refuse(404, "EntryNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

    # ------------------------------------------------------------------------------------------------- account, repo

    def whoami(self, _, match, content) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.refuse(401, "InvalidToken")
        return self.reply(200, {"type": "user", "name": "tester", "orgs": [], "auth": {"type": "access_token"}})

    def create(self, _, match, content) -> None:
        wanted = json.loads(content)
        name = f"{wanted.get('organization') or 'tester'}/{wanted['name']}"
        if wanted.get("type") == "space":
            if wanted.get("sdk") != "gradio":
                return self.refuse(400, "BadRequest")
            name = f"spaces/{name}"
        exists = name in self.hub.repositories
        self.hub.repositories.setdefault(name, Repository())
        return self.reply(409 if exists else 200, {"url": f"{self.hub.url}/{name}", "id": name})

    def validate_yaml(self, _, match, content) -> None:
        self.reply(200, {"warnings": [], "errors": []})

    def info(self, repository, match, content) -> None:
        commit = repository.at(match.groupdict().get("revision") or "main")
        if commit is None:
            return self.refuse(404, "RevisionNotFound")
        siblings = [{"rfilename": path, "size": size} for path, (_, _, size) in commit[1].items()]
        return self.reply(
            200,
            {"id": match["repo"], "sha": commit[0], "siblings": siblings, "tags": [], "private": False}
            | {"lastModified": DATE, "createdAt": DATE, "downloads": 0, "likes": 0},
        )

    def refs(self, repository, match, content) -> None:
        tags = [
            {"name": name, "ref": f"refs/tags/{name}", "targetCommit": oid} for name, oid in repository.tags.items()
        ]
        main = {"name": "main", "ref": "refs/heads/main", "targetCommit": repository.head[0]}
        self.reply(200, {"branches": [main], "tags": tags, "converts": []})

    def tag(self, repository, match, content) -> None:
        name = json.loads(content)["tag"]
        if name in repository.tags:
            return self.reply(409, {"error": "exists"})
        repository.tags[name] = repository.at(match["revision"])[0]
        return self.reply(200, {})

    def tree(self, repository, match, content) -> None:
        commit = repository.at(match["revision"])
        if commit is None:
            return self.refuse(404, "RevisionNotFound")
        prefix = match["path"] or ""
        if prefix and not any(path.startswith(f"{prefix}/") for path in commit[1]):
            return self.refuse(404, "EntryNotFound", X_Repo_Commit=commit[0])
        return self.reply(200, [self.entry(path, file) for path, file in commit[1].items() if path.startswith(prefix)])

    def paths_info(self, repository, match, content) -> None:
        files = repository.at(match["revision"])[1]
        wanted = parse_qs(content.decode()).get("paths", [])
        self.reply(200, [self.entry(path, files[path]) for path in wanted if path in files])

    def entry(self, path: str, file: tuple) -> dict:
        kind, key, size = file
        entry = {"type": "file", "path": path, "size": size, "oid": git_oid(key) if kind == "regular" else key[:40]}
        if kind == "lfs":
            entry["lfs"] = {"oid": key, "size": size, "pointerSize": 134}
        return entry

    # ------------------------------------------------------------------------------------------------------- uploads

    def preupload(self, repository, match, content) -> None:
        known = repository.head[1]
        answer = []
        for file in json.loads(content)["files"]:
            large = file["size"] > 1024 or file["path"].endswith(".safetensors")
            row = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if file["path"] in known:
                kind, key, _ = known[file["path"]]
                row["oid"] = key if kind == "lfs" else git_oid(key)
            answer.append(row)
        self.reply(200, {"files": answer})

    def xet_token(self, repository, match, content) -> None:
        if self.hub.xet is None:
            return self.refuse(404, "EntryNotFound")
        url = f"local://{self.hub.xet}"
        return self.reply(
            200,
            {"accessToken": "x", "exp": 4102444800, "casUrl": url},
            X_Xet_Access_Token="x",
            X_Xet_Token_Expiration="4102444800",
            X_Xet_Cas_Url=url,
        )

    def lfs_batch(self, repository, match, content) -> None:
        objects = []
        for item in json.loads(content)["objects"]:
            if not self.hub.is_stored(item["oid"]):
                item["actions"] = {
                    "upload": {"href": f"{self.hub.url}/store/{item['oid']}"},
                    "verify": {"href": f"{self.hub.url}/verify/{item['oid']}"},
                }
            objects.append(item)
        self.reply(200, {"transfer": "basic", "objects": objects})

    def store(self, _, match, content) -> None:
        if hashlib.sha256(content).hexdigest() != match["sha256"]:
            return self.refuse(400, "BadHash")
        self.hub.blobs[match["sha256"]] = content
        return self.reply(200, ETag=match["sha256"])

    def verify(self, _, match, content) -> None:
        self.reply(200 if match["sha256"] in self.hub.blobs else 404)

    def commit(self, repository, match, content) -> None:
        if self.hub.refuse_commits:
            return self.refuse(400, "Interrupted")  # the client retries 5xx by itself
        files = dict(repository.head[1])
        for line in content.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header" and value.get("parentCommit") not in (None, repository.head[0]):
                return self.refuse(412, "StaleParent")
            if entry["key"] == "file":
                data = base64.b64decode(value["content"])
                files[value["path"]] = ("regular", data, len(data))
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
            elif entry["key"] == "lfsFile":
                if not self.hub.is_stored(value["oid"]):
                    return self.refuse(400, "UnknownBlob")
                files[value["path"]] = ("lfs", value["oid"], value["size"])
        oid = repository.commit(files)
        url = f"{self.hub.url}/{match['repo']}/commit/{oid}"
        return self.reply(200, {"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

    # ----------------------------------------------------------------------------------------------------- downloads

    def resolve(self, repository, match, content) -> None:
        commit = repository.at(match["revision"])
        if commit is None:
            return self.refuse(404, "RevisionNotFound")
        if match["path"] not in commit[1]:
            return self.refuse(404, "EntryNotFound", X_Repo_Commit=commit[0])
        kind, key, size = commit[1][match["path"]]
        headers = {"X_Repo_Commit": commit[0]}
        if kind == "regular":
            return self.reply(200, key, ETag=f'"{git_oid(key)}"', **headers)
        headers |= {"X_Linked_Etag": f'"{key}"', "X_Linked_Size": str(size), "ETag": f'"{key}"'}
        if self.hub.xet is not None:
            headers["X_Xet_Hash"] = self.hub.xet_hash(key)
            headers["X_Xet_Refresh_Route"] = f"{self.hub.url}/api/models/{match['repo']}/xet-read-token/{commit[0]}"
            return self.reply(200, b"", Content_Length=str(size) if self.command == "HEAD" else "0", **headers)
        return self.reply(200, self.hub.blobs[key], **headers)


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


NAME = r"(?P<repo>(?:spaces/)?[^/]+/[^/]+)"
API = rf"/api/(?:models/)?{NAME}"
ROUTES = [
    ("GET", r"/api/whoami-v2", Handler.whoami),
    ("POST", r"/api/repos/create", Handler.create),
    ("POST", r"/api/validate-yaml", Handler.validate_yaml),
    ("POST", API + r"/preupload/(?P<revision>[^/]+)", Handler.preupload),
    ("GET", API + r"/xet-(?:read|write)-token/(?P<revision>[^/]+)", Handler.xet_token),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", r"/store/(?P<sha256>\w+)", Handler.store),
    ("POST", r"/verify/(?P<sha256>\w+)", Handler.verify),
    ("POST", API + r"/commit/(?P<revision>[^/]+)", Handler.commit),
    ("POST", API + r"/tag/(?P<revision>[^/]+)", Handler.tag),
    ("GET", API + r"/refs", Handler.refs),
    ("GET", API + r"/tree/(?P<revision>[^/]+)/?(?P<path>.*)", Handler.tree),
    ("POST", API + r"/paths-info/(?P<revision>[^/]+)", Handler.paths_info),
    ("GET", API + r"(?:/revision/(?P<revision>[^/]+))?", Handler.info),
    ("GET HEAD", rf"/{NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.resolve),
]


@contextmanager
def hub_double(xet: Path | None = None) -> Iterator[Hub]:
    """Serves a Hub on a free port of 127.0.0.1 until the block ends; `xet` is the folder of a local content store."""
    hub = Hub(xet)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
