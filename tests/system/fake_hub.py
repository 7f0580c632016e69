"""A hub on this machine: datasets of one file, at a commit that can be moved; it has nothing else."""

import http.server
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

FIRST, SECOND = "a" * 40, "b" * 40  # commits


class FakeHub:
    """`datasets` maps an id to its rows, `commit` is where every main branch is, `requests` are the paths so far."""

    def __init__(self, datasets: dict[str, list[dict]]) -> None:
        self.files = {name: "".join(json.dumps(row) + "\n" for row in rows) for name, rows in datasets.items()}
        self.commit = FIRST
        self.requests: list[str] = []
        self.url = ""

    def environment(self, home: object) -> dict[str, str]:
        """The variables of a process that uses this hub, with its caches in `home` and whatever else is set here."""
        mine = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        return {**mine, "HF_ENDPOINT": self.url, "HF_HOME": str(home)}


@contextmanager
def serve(datasets: dict[str, list[dict]]) -> Iterator[FakeHub]:
    hub = FakeHub(datasets)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            hub.requests.append(path)
            for name, text in hub.files.items():
                if path.startswith(f"/api/datasets/{name}/tree/"):
                    file = {"type": "file", "path": "train.jsonl", "size": len(text), "oid": "1" * 40}
                    return self.answer(json.dumps([file]))
                if path.startswith(f"/api/datasets/{name}"):
                    revision = path.rpartition("/revision/")[2] if "/revision/" in path else "main"
                    return self.answer(json.dumps({"id": name, "sha": self.commit(revision)}))
                if path.startswith(f"/datasets/{name}/resolve/") and path.endswith("/train.jsonl"):
                    return self.answer(text, ETag='"1"')
            known = any(f"/{name}" in path for name in hub.files)
            return self.answer("", 404, X_Error_Code="EntryNotFound" if known else "RepoNotFound")

        do_HEAD = do_GET

        def commit(self, revision: str) -> str:
            return hub.commit if revision == "main" else revision

        def answer(self, text: str, status: int = 200, **headers: str) -> None:
            content = text.encode()
            self.send_response(status)
            for name, value in {"Content_Length": len(content), "X_Repo_Commit": hub.commit, **headers}.items():
                self.send_header(name.replace("_", "-"), str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
