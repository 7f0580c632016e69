"""A hub on this machine: datasets of one file, at a commit that can be moved; and models, which can be uploaded to.

Uploads take the way of git LFS; Xet, the hub's other way, is switched off for those who use this one.
"""

import base64
import hashlib
import http.server
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

FIRST, SECOND = "a" * 40, "b" * 40  # commits


TOKEN = "hf_" + "a" * 34  # may write; any other may not
LFS = (".safetensors", ".gguf", ".model")


class Repository:
    """A model on the hub: its files, and whether it is private."""

    def __init__(self, private: bool) -> None:
        self.private = private
        self.files: dict[str, bytes] = {}
        self.commits: list[str] = []  # their messages


class FakeHub:
    """`datasets` maps an id to its rows, `commit` is where every main branch is, `requests` are the paths so far.

    `models` are the repositories that can be uploaded to, `stored` what git LFS has got, by its sha256; `broken` is a
    file that arrives with another content.

    `faults` are, by the name of a file, what happens to the next requests for it: ("drop", bytes) ends the connection
    after so many, ("stall", seconds) sends half and then nothing for that time, (status, Retry-After) refuses, and
    ("damage", 0) sends other bytes. By the id of a model it is the status that the API answers about it. `sent` counts
    the bytes of files that were sent.
    """

    def __init__(self, datasets: dict[str, list[dict]]) -> None:
        self.files = {name: "".join(json.dumps(row) + "\n" for row in rows) for name, rows in datasets.items()}
        self.commit = FIRST
        self.requests: list[str] = []
        self.models: dict[str, Repository] = {}
        self.stored: dict[str, bytes] = {}
        self.broken = ""
        self.scripts: dict[str, str] = {}  # programs that datasets come as, by the dataset's id
        self.url = ""
        self.faults: dict[str, list[tuple[str | int, float]]] = {}
        self.sent = 0

    def environment(self, home: object) -> dict[str, str]:
        """The variables of a process that uses this hub, with its caches in `home` and whatever else is set here."""
        mine = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        return {**mine, "HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}


@contextmanager
def serve(datasets: dict[str, list[dict]]) -> Iterator[FakeHub]:
    hub = FakeHub(datasets)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            hub.requests.append(path)
            for name, repository in hub.models.items():
                if path.startswith(f"/api/models/{name}/tree/"):
                    return self.answer(json.dumps(self.tree(repository)))
                if path.startswith(f"/api/models/{name}") and hub.faults.get(name):
                    return self.answer("", int(hub.faults[name].pop(0)[0]))
                if path.startswith(f"/api/models/{name}"):
                    return self.answer(json.dumps(self.describe(name, repository)))
                if path.startswith(f"/{name}/resolve/"):
                    file = path.split("/", 5)[5]
                    if file in repository.files:
                        return self.send_file(file, repository.files[file])
            for name, text in hub.files.items():
                if path.startswith(f"/api/datasets/{name}/tree/"):
                    file = {"type": "file", "path": "train.jsonl", "size": len(text), "oid": "1" * 40}
                    return self.answer(json.dumps([file]))
                if path.startswith(f"/api/datasets/{name}"):
                    revision = path.rpartition("/revision/")[2] if "/revision/" in path else "main"
                    return self.answer(json.dumps({"id": name, "sha": self.commit(revision)}))
                if path.startswith(f"/datasets/{name}/resolve/") and path.endswith("/train.jsonl"):
                    return self.send_file("train.jsonl", text.encode(), etag="1")
                if path.endswith(f"/{name.rpartition('/')[2]}.py") and name in hub.scripts:
                    return self.answer(hub.scripts[name], ETag='"2"')
            known = any(f"/{name}" in path for name in hub.files)
            return self.answer("", 404, X_Error_Code="EntryNotFound" if known else "RepoNotFound")

        do_HEAD = do_GET

        def do_POST(self) -> None:
            path = self.path.partition("?")[0]
            hub.requests.append(f"POST {path}")
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self.answer(json.dumps({"error": "this token may not write"}), 403)
            if path == "/api/repos/create":
                given = json.loads(body)
                name = f"{given['organization']}/{given['name']}"
                private = bool(given.get("private") or given.get("visibility") == "private")
                hub.models[name] = Repository(private)
                return self.answer(json.dumps({"url": f"{hub.url}/{name}", "id": "1"}))
            if path == "/api/validate-yaml":  # of a README.md, before it is sent
                fine = json.loads(body)["content"].startswith("---\nlibrary_name: ")
                return self.answer(json.dumps({"errors": [] if fine else [{"message": "no metadata"}], "warnings": []}))
            name = next(name for name in hub.models if f"/{name}" in path)
            if "/preupload/" in path:
                files = [
                    {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(LFS) else "regular"}
                    for file in json.loads(body)["files"]
                ]
                return self.answer(json.dumps({"files": [{**file, "shouldIgnore": False} for file in files]}))
            if path.endswith("/info/lfs/objects/batch"):
                objects = [
                    one
                    | (
                        {}
                        if one["oid"] in hub.stored
                        else {"actions": {"upload": {"href": f"{hub.url}/lfs/{one['oid']}"}}}
                    )
                    for one in json.loads(body)["objects"]
                ]
                return self.answer(json.dumps({"transfer": "basic", "objects": objects}))
            repository = hub.models[name]
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "header":
                    repository.commits.append(value["summary"])
                elif line["key"] == "file":
                    repository.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    repository.files[value["path"]] = hub.stored[value["oid"]]
            if hub.broken:
                repository.files[hub.broken] += b"!"
            url = f"{hub.url}/{name}/commit/{hub.commit}"
            return self.answer(json.dumps({"commitUrl": url, "commitOid": hub.commit, "pullRequestUrl": None}))

        def do_PUT(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            oid = self.path.rpartition("/")[2]
            assert hashlib.sha256(content).hexdigest() == oid
            hub.stored[oid] = content
            return self.answer("")

        def describe(self, name: str, repository: Repository) -> dict:
            """A model as the hub's API describes it, with its files."""
            siblings = []
            for file, content in repository.files.items():
                blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
                one = {"rfilename": file, "size": len(content), "blobId": blob}
                if file.endswith(LFS):
                    one["lfs"] = {
                        "sha256": hashlib.sha256(content).hexdigest(),
                        "size": len(content),
                        "pointerSize": 134,
                    }
                siblings.append(one)
            return {"id": name, "sha": hub.commit, "private": repository.private, "siblings": siblings}

        def tree(self, repository: Repository) -> list[dict]:
            return [
                {"type": "file", "path": file, "size": len(content), "oid": hashlib.sha256(content).hexdigest()}
                for file, content in repository.files.items()
            ]

        def commit(self, revision: str) -> str:
            return hub.commit if revision == "main" else revision

        def send_file(self, name: str, content: bytes, etag: str = "") -> None:
            """A file as the hub sends it: from the byte that Range names, by its sha256 as etag; or a fault."""
            fault, amount = hub.faults[name].pop(0) if self.command == "GET" and hub.faults.get(name) else ("", 0)
            if isinstance(fault, int):
                return self.answer("", fault, **({"Retry_After": f"{amount:g}"} if amount else {}))
            first = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
            body = content[first:]
            self.send_response(206 if first else 200)
            headers = {"Content-Length": len(body), "ETag": f'"{etag or hashlib.sha256(content).hexdigest()}"'}
            headers |= {"X-Repo-Commit": hub.commit, "Accept-Ranges": "bytes"}
            if first:
                headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
            for header, value in headers.items():
                self.send_header(header, str(value))
            self.end_headers()
            if self.command == "HEAD":
                return None
            if fault == "damage":
                body = bytes(byte ^ 1 for byte in body)
            end = {"drop": int(amount), "stall": len(body) // 2}.get(str(fault), len(body))
            self.wfile.write(body[:end])
            self.wfile.flush()
            hub.sent += len(body[:end])
            if fault == "stall":
                time.sleep(amount)
            if fault in ("drop", "stall"):
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
            return None

        def answer(self, text: str, status: int = 200, **headers: str) -> None:
            content = text.encode()
            self.send_response(status)
            for name, value in {"Content_Length": len(content), "X_Repo_Commit": hub.commit, **headers}.items():
                self.send_header(name.replace("_", "-"), str(value))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
