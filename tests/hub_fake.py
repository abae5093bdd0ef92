"""A hub on this machine: the few answers of its API that pushing and loading a mapper ask for."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

OWNER = "somebody"


class Hub(ThreadingHTTPServer):
    """Repositories by their names."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.large: dict[str, bytes] = {}
        """Files as LFS keeps them, by their SHA-256."""
        self.made: list[dict[str, Any]] = []
        """What was asked for each new repository."""
        self.commits: list[dict[str, Any]] = []
        self.asked: list[str] = []
        """All requests."""


class Answers(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        """Print nothing."""

    def answer(self, content: bytes = b"", code: int = 200, **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def say(self, content: object) -> None:
        self.answer(json.dumps(content).encode(), Content_Type="application/json")

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_PUT(self) -> None:
        content = self.body()
        self.server.large[hashlib.sha256(content).hexdigest()] = content
        self.answer()

    def do_POST(self) -> None:
        hub, (path, _, query) = self.server, self.path.partition("?")
        content = self.body()
        hub.asked.append(f"POST {path}")
        if path == "/api/repos/create":
            asked = json.loads(content)
            name = f"{asked['organization'] or OWNER}/{asked['name']}"
            hub.made.append(asked)
            hub.repositories.setdefault(name, {})
            self.say({"url": f"{hub.address}/{name}", "name": name})
        elif path == "/api/validate-yaml":
            self.say({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(content)["files"]
            ]
            self.say({"files": modes})
        elif path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**file, "actions": {"upload": {"href": f"{hub.address}/large/{file['oid']}"}}}
                for file in json.loads(content)["objects"]
            ]
            self.say({"transfer": "basic", "objects": objects})
        elif "/commit/" in path:
            name, _, branch = path.removeprefix("/api/models/").partition("/commit/")
            lines = [json.loads(line) for line in content.splitlines()]
            for line in lines:
                value = line["value"]
                if line["key"] == "file":
                    hub.repositories[name][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub.repositories[name][value["path"]] = hub.large[value["oid"]]
            hub.commits.append({**lines[0]["value"], "branch": branch, "query": query})
            number = f"{len(hub.commits):040x}"
            address = f"{hub.address}/{name}/commit/{number}"
            self.say({"commitUrl": address, "commitOid": number, "pullRequestUrl": address})
        else:
            self.answer(code=404)

    def do_GET(self) -> None:
        hub, path = self.server, self.path.partition("?")[0]
        hub.asked.append(f"{self.command} {path}")
        name, _, rest = path.removeprefix("/").partition("/resolve/")
        files, file = hub.repositories.get(name), rest.partition("/")[2]
        commit = f"{len(hub.commits):040x}"
        if files is None:
            self.answer(code=404, X_Error_Code="RepoNotFound")
        elif file not in files:
            self.answer(code=404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        else:
            tag = hashlib.sha256(files[file]).hexdigest()
            self.answer(files[file], X_Repo_Commit=commit, ETag=f'"{tag}"')

    do_HEAD = do_GET


@contextmanager
def hub_running() -> Iterator[Hub]:
    """Serve an empty hub."""
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
