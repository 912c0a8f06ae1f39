# SPDX-License-Identifier: Apache-2.0
"""A server on this machine that speaks the Hub's protocol, as far as publishing and loading need it.

Accounts, repositories with branches and commits, large files by LFS, private repositories and the errors that
the Hub reports. It keeps everything in memory. The client is the unmodified `huggingface_hub`.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

ACCOUNTS = {  # by token: name, organisations, may write
    "hf_me": ("me", ["lab"], True),
    "hf_reader": ("me", ["lab"], False),
    "hf_other": ("other", [], True),
}
LICENSES = {"mit", "apache-2.0", "cc-by-4.0", "cc-by-nc-4.0", "other"}
KINDS = "models|datasets|spaces"


@dataclass
class Repository:
    """A repository: files of each commit, by path; the newest commit of each branch."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        self.messages.append(message)
        name = hashlib.sha1(f"{branch} {message} {len(self.messages)}".encode()).hexdigest()
        self.commits[name] = files
        self.branches[branch] = name
        return name

    def files(self, branch: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches[branch]]


class Hub(ThreadingHTTPServer):
    """The server; `repositories` by "models/ORG/NAME", `blobs` by their sha256."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.address = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.broken: str | None = None  # requests that match lose their connection

    def add(self, name: str, files: dict[str, bytes], private: bool = False) -> Repository:
        """A repository that exists already."""
        repository = self.repositories[name] = Repository(private)
        repository.commit(
            "main", {".gitattributes": b"*.safetensors filter=lfs\n", **files}, "initial commit"
        )
        return repository

    def model(self, name: str) -> Repository:
        return self.repositories[f"models/{name}"]


def is_large(path: str) -> bool:
    return path.endswith(".safetensors")


def etag_of(path: str, content: bytes) -> str:
    if is_large(path):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Refusal(Exception):
    def __init__(self, status: int, message: str, code: str = "", **content) -> None:
        self.status, self.message, self.code, self.content = status, message, code, content


class Answer(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_) -> None:
        pass

    def handle_any(self) -> None:
        self.path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        request = f"{self.command} {self.path}"
        self.server.requests.append(request)
        if self.server.broken and re.search(self.server.broken, request):
            self.close_connection = True
            return
        try:
            for pattern, handler in ROUTES:
                if found := re.fullmatch(pattern, request):
                    handler(self, body, **found.groupdict())
                    return
            raise Refusal(404, f"no such address: {request}", "EntryNotFound")
        except Refusal as refusal:
            headers = {"X-Error-Message": refusal.message}
            headers |= {"X-Error-Code": refusal.code} if refusal.code else {}
            content = refusal.content or {"error": refusal.message}
            self.reply(json.dumps(content).encode(), refusal.status, **headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def reply(self, content: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def reply_json(self, content: object) -> None:
        self.reply(json.dumps(content).encode(), Content_Type="application/json")

    # who asks

    @property
    def account(self) -> tuple[str, list[str], bool] | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in ACCOUNTS:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return ACCOUNTS.get(token)

    def may(self, owner: str) -> bool:
        return self.account is not None and owner in (self.account[0], *self.account[1])

    def require_writer(self, owner: str) -> None:
        if self.account is None:
            raise Refusal(401, "Invalid username or password.")
        if not self.account[2]:
            raise Refusal(403, "You must use a write token to upload to a repository")
        if not self.may(owner):
            raise Refusal(403, f"You don't have the rights to create a model under the namespace {owner!r}")

    def repository(self, kind: str, name: str, *, write: bool = False) -> Repository:
        found = self.server.repositories.get(f"{kind}/{name}")
        owner = name.partition("/")[0]
        if found is None or (found.private and not self.may(owner)):
            raise Refusal(404 if self.account else 401, "Repository not found", "RepoNotFound")
        if write:
            self.require_writer(owner)
        return found

    def commit_of(self, repository: Repository, revision: str) -> str:
        name = repository.branches.get(revision, revision)
        if name not in repository.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return name

    # what is asked

    def home(self, body: bytes) -> None:
        self.reply(b"the Hub")

    def whoami(self, body: bytes) -> None:
        if self.account is None:
            raise Refusal(401, "Invalid username or password.")
        name, organisations, _ = self.account
        self.reply_json({"type": "user", "name": name, "orgs": [{"name": it} for it in organisations]})

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        owner = asked["organization"] or (self.account or ("",))[0]
        self.require_writer(owner)
        kind = f"{asked.get('type', 'model')}s"
        name = f"{kind}/{owner}/{asked['name']}"
        url = f"{self.server.address}/{name.removeprefix('models/')}"
        if name in self.server.repositories:
            raise Refusal(
                409, "You already created this repo", url=url, error="You already created this repo"
            )
        self.server.add(name, {}, private=asked.get("visibility") == "private")
        self.reply_json({"url": url, "name": f"{owner}/{asked['name']}"})

    def validate(self, body: bytes) -> None:
        asked = json.loads(body)
        front = re.match(r"---\n(.*?)\n---\n", asked["content"], re.DOTALL)
        metadata = yaml.safe_load(front[1]) if front else {}
        errors = []
        if (name := metadata.get("license")) and name not in LICENSES:
            errors.append({"message": f'"license" must be one of the known licenses, not "{name}"'})
        if asked["repoType"] == "space" and "sdk" not in metadata:
            errors.append({"message": '"sdk" is required'})
        if errors:
            raise Refusal(400, "Invalid metadata", errors=errors, warnings=[])
        self.reply_json({"errors": [], "warnings": []})

    def info(self, body: bytes, kind: str, name: str, revision: str = "main") -> None:
        repository = self.repository(kind, name)
        commit = self.commit_of(repository, revision)
        files = [{"rfilename": path} for path in sorted(repository.commits[commit])]
        facts = {"id": name, "modelId": name, "sha": commit, "private": repository.private, "tags": []}
        self.reply_json({**facts, "siblings": files})

    def tree(self, body: bytes, kind: str, name: str, revision: str, folder: str | None = None) -> None:
        repository = self.repository(kind, name)
        files = repository.commits[self.commit_of(repository, revision)]
        inside = {path: it for path, it in files.items() if not folder or path.startswith(f"{folder}/")}
        if folder and not inside:
            raise Refusal(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        entries = []
        for path, content in sorted(inside.items()):
            entry = {"type": "file", "path": path, "size": len(content), "oid": etag_of("", content)}
            if is_large(path):
                entry["lfs"] = {"oid": etag_of(path, content), "size": len(content), "pointerSize": 130}
            entries.append(entry)
        self.reply_json(entries)

    def refs(self, body: bytes, kind: str, name: str) -> None:
        branches = self.repository(kind, name).branches
        known = [{"name": it, "ref": f"refs/heads/{it}", "targetCommit": sha} for it, sha in branches.items()]
        self.reply_json({"branches": known, "tags": [], "converts": []})

    def branch(self, body: bytes, kind: str, name: str, revision: str) -> None:
        repository = self.repository(kind, name, write=True)
        if revision in repository.branches:
            raise Refusal(409, "Reference already exists")
        repository.branches[revision] = repository.branches["main"]
        self.reply_json({})

    def preupload(self, body: bytes, kind: str, name: str, revision: str) -> None:
        repository = self.repository(kind, name, write=True)
        files = repository.commits[self.commit_of(repository, revision)]
        self.reply_json(
            {
                "files": [
                    {
                        "path": (path := file["path"]),
                        "uploadMode": "lfs" if is_large(path) else "regular",
                        "shouldIgnore": False,
                        "oid": etag_of(path, files[path]) if path in files else None,
                    }
                    for file in json.loads(body)["files"]
                ]
            }
        )

    def batch(self, body: bytes, name: str) -> None:
        self.repository("models", name, write=True)
        objects = []
        for asked in json.loads(body)["objects"]:
            answer = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.server.blobs:
                upload = {"href": f"{self.server.address}/lfs/{asked['oid']}", "header": {}}
                verify = {"href": f"{self.server.address}/verify", "header": {}}
                answer["actions"] = {"upload": upload, "verify": verify}
            objects.append(answer)
        self.reply(
            json.dumps({"transfer": "basic", "objects": objects}).encode(),
            Content_Type="application/vnd.git-lfs+json",
        )

    def store(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refusal(400, "the content does not match its sha256")
        self.server.blobs[oid] = body
        self.reply(b"")

    def verify(self, body: bytes) -> None:
        asked = json.loads(body)
        if len(self.server.blobs.get(asked["oid"], b"")) != asked["size"]:
            raise Refusal(422, "the object is not there")
        self.reply_json({})

    def commit(self, body: bytes, kind: str, name: str, revision: str) -> None:
        repository = self.repository(kind, name, write=True)
        header, *operations = map(json.loads, body.splitlines())
        files = dict(repository.commits[self.commit_of(repository, revision)])
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                if value["oid"] not in self.server.blobs:
                    raise Refusal(400, f"the content of {value['path']} was not uploaded")
                files[value["path"]] = self.server.blobs[value["oid"]]
            else:
                raise Refusal(400, f"unknown operation {operation['key']}")
        oid = repository.commit(revision, files, header["value"]["summary"])
        self.reply_json(
            {"success": True, "commitOid": oid, "commitUrl": f"{self.server.address}/{name}/commit/{oid}"}
        )

    def resolve(self, body: bytes, name: str, revision: str, path: str, kind: str = "models") -> None:
        repository = self.repository(kind, name)
        commit = self.commit_of(repository, revision)
        content = repository.commits[commit].get(path)
        if content is None:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        self.reply(content, ETag=f'"{etag_of(path, content)}"', X_Repo_Commit=commit)


NAME = r"(?P<name>[^/]+/[^/]+)"
REPO = rf"(?P<kind>{KINDS})/{NAME}"
ROUTES = [
    (r"(HEAD|GET) /", Answer.home),
    (r"GET /api/whoami-v2", Answer.whoami),
    (r"POST /api/repos/create", Answer.create),
    (r"POST /api/validate-yaml", Answer.validate),
    (rf"GET /api/{REPO}", Answer.info),
    (rf"GET /api/{REPO}/revision/(?P<revision>.+)", Answer.info),
    (rf"GET /api/{REPO}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", Answer.tree),
    (rf"GET /api/{REPO}/refs", Answer.refs),
    (rf"POST /api/{REPO}/branch/(?P<revision>.+)", Answer.branch),
    (rf"POST /api/{REPO}/preupload/(?P<revision>.+)", Answer.preupload),
    (rf"POST /api/{REPO}/commit/(?P<revision>.+)", Answer.commit),
    (rf"POST /{NAME}\.git/info/lfs/objects/batch", Answer.batch),
    (r"PUT /lfs/(?P<oid>\w+)", Answer.store),
    (r"POST /verify", Answer.verify),
    (
        rf"(GET|HEAD) /(?P<kind>datasets|spaces)/{NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)",
        Answer.resolve,
    ),
    (rf"(GET|HEAD) /{NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Answer.resolve),
]
