"""A hub on this machine: the few endpoints that `datasets` asks for, a dataset of parquet files, and faults
on request.
"""

from __future__ import annotations

import http.server
import json
import threading
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

REPOSITORY, CONFIGURATION, COMMIT = (
    "tests/corpus",
    "cosmopedia-v2",
    "0123456789abcdef0123456789abcdef01234567",
)
FAULTS = ("drop", "stall", "truncate", "500", "429")


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeHub

    def do_GET(self) -> None:
        self.answer()

    def do_HEAD(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("content-length") or 0))
        self.answer()

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        path = urllib.parse.unquote(url.path)
        self.server.requests.append(f"{self.command} {path}")
        api, resolve = f"/api/datasets/{REPOSITORY}", f"/datasets/{REPOSITORY}/resolve/{COMMIT}/"
        if path in (f"{api}/revision/{COMMIT}", f"{api}/revision/main", api):
            siblings = [{"rfilename": name} for name in self.server.files]
            self.json(
                {
                    "_id": "0",
                    "id": REPOSITORY,
                    "sha": COMMIT,
                    "private": False,
                    "siblings": siblings,
                    "tags": [],
                }
            )
        elif path.startswith(f"{api}/tree/{COMMIT}"):
            folder = path.removeprefix(f"{api}/tree/{COMMIT}").strip("/")
            recursive = "true" in urllib.parse.parse_qs(url.query).get("recursive", [""])[0].lower()
            self.json(self.server.tree(folder, recursive))
        elif path == f"{api}/paths-info/{COMMIT}":
            wanted = (
                dict(urllib.parse.parse_qsl(self.body.decode())).get("paths")
                or json.loads(self.body)["paths"]
            )
            wanted = [wanted] if isinstance(wanted, str) else wanted
            self.json([entry for entry in self.server.entries() if entry["path"] in wanted])
        elif path.startswith(resolve) and path.removeprefix(resolve) in self.server.files:
            self.file(path.removeprefix(resolve))
        else:
            self.reply(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})

    def file(self, name: str) -> None:
        content = self.server.files[name]
        headers = {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        first, last, status = 0, len(content) - 1, 200
        if (wanted := self.headers.get("range")) is not None:
            begin, _, end = wanted.removeprefix("bytes=").partition("-")
            first, last, status = int(begin), min(int(end or last), last), 206
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        fault = self.server.next_fault() if self.command == "GET" and name.endswith(".parquet") else None
        if fault in ("500", "429"):
            return self.reply(int(fault), b"busy", {})
        if fault == "drop":
            self.close_connection = True
            return
        if fault == "stall":
            time.sleep(self.server.stall)
        self.reply(status, content[first : last + 1], headers, truncate=fault == "truncate")

    def json(self, value: Any) -> None:
        self.reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def reply(self, status: int, body: bytes, headers: dict[str, str], truncate: bool = False) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            try:
                self.wfile.write(body[: len(body) // 2] if truncate else body)
            except OSError:
                pass  # the client gave up waiting
        self.close_connection = self.close_connection or truncate


class FakeHub(http.server.ThreadingHTTPServer):
    """files: path in the repository -> content. Every `every`-th request for data meets the next of `faults`,
    until they are used up.
    """

    daemon_threads = True

    def __init__(self, files: dict[str, bytes], stall: float = 3.0) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.stall = files, stall
        self.requests: list[str] = []
        self.faults: list[str] = []
        self.met: list[str] = []
        self.every, self._count, self._lock = 2, 0, threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def entries(self) -> list[dict[str, Any]]:
        return [
            {"type": "file", "path": name, "size": len(content), "oid": f"{index:040x}"}
            for index, (name, content) in enumerate(self.files.items())
        ]

    def tree(self, folder: str, recursive: bool) -> list[dict[str, Any]]:
        inside = [entry for entry in self.entries() if not folder or entry["path"].startswith(folder + "/")]
        depth = folder.count("/") + 1 if folder else 0
        if recursive:
            return inside
        folders = sorted(
            {entry["path"].split("/")[depth] for entry in inside if entry["path"].count("/") > depth}
        )
        listed = [
            {"type": "directory", "path": f"{folder}/{name}".strip("/"), "size": 0, "oid": "0" * 40}
            for name in folders
        ]
        return [*listed, *(entry for entry in inside if entry["path"].count("/") == depth)]

    def next_fault(self) -> str | None:
        with self._lock:
            self._count += 1
            if not self.faults or self._count % self.every:
                return None
            self.met.append(self.faults.pop(0))
            return self.met[-1]


@contextmanager
def fake_hub(folder: Path) -> Iterator[FakeHub]:
    """Serves the parquet files of a folder as REPOSITORY, configuration CONFIGURATION, split train."""
    data_files = f"  data_files:\n  - split: train\n    path: {CONFIGURATION}/*.parquet\n"
    card = f"---\nconfigs:\n- config_name: {CONFIGURATION}\n{data_files}---\n"
    files = {f"{CONFIGURATION}/{path.name}": path.read_bytes() for path in sorted(folder.glob("*.parquet"))}
    hub = FakeHub({"README.md": card.encode(), **files})
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
