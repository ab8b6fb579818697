"""As much of the Hub as an upload meets, on this machine: what was asked of it can be read afterwards."""

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

from huggingface_hub import constants


class Hub(ThreadingHTTPServer):
    """A Hub of one token; it takes every file as a plain one."""

    daemon_threads = True

    def __init__(self, token: str, refuses: int = 0) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.token, self.refuses = token, refuses
        self.created: list[dict[str, Any]] = []
        self.commits: list[dict[str, bytes]] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Answer(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *words: object) -> None:
        """Say nothing on stderr."""

    def _say(self, code: int, table: dict[str, Any]) -> None:
        text = json.dumps(table).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def do_GET(self) -> None:
        made = next((made for made in self.server.created if self.path.endswith(f"/{made['name']}")), None)
        if made is None:
            self._say(404, {"error": "Repository not found"})
        else:
            self._say(200, {"id": "me/tiny", "private": made.get("visibility") == "private"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Authorization") != f"Bearer {self.server.token}":
            self._say(401, {"error": "Invalid credentials"})
        elif self.server.refuses:
            self._say(self.server.refuses, {"error": f"You may not, {self.headers['Authorization']}"})
        elif self.path == "/api/validate-yaml":
            self._say(200, {"errors": [], "warnings": []})
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            if not self.server.created:  # one that is there stays as it is
                self.server.created.append(asked)
            self._say(200, {"url": f"{self.server.url}/{asked.get('organization') or 'me'}/{asked['name']}"})
        elif "/preupload/" in self.path:
            files = [file["path"] for file in json.loads(body)["files"]]
            self._say(200, {"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in files]})
        elif "/commit/" in self.path:
            rows = [json.loads(line) for line in body.splitlines()]
            files = [row["value"] for row in rows if row["key"] == "file"]
            self.server.commits.append({file["path"]: base64.b64decode(file["content"]) for file in files})
            self._say(200, {"commitUrl": f"{self.server.url}/me/tiny/commit/abc", "commitOid": "abc"})
        else:
            self._say(404, {"error": f"nothing at {self.path}"})


@contextmanager
def hub(patch: Any, token: str, refuses: int = 0) -> Iterator[Hub]:
    """A Hub that huggingface_hub asks instead of the real one."""
    server = Hub(token, refuses)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    patch.setattr(constants, "ENDPOINT", server.url)
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
