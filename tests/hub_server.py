"""A server that speaks as much of the Hugging Face Hub's protocol as its own client asks for when a model is read.

Answers follow what huggingface_hub 1.31 to 2.4 sends and expects: the model's list of files with sizes and checksums,
and `resolve`, which sends large files elsewhere, as the Hub does to its CDN, with ranges.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Models in directories `root/org/name`, at one commit each. What was asked for is in `requests`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.address = ""
        """For HF_ENDPOINT."""
        self.requests: list[tuple[str, str, str]] = []
        """(method, path, range)."""
        self.commit = COMMIT
        self.slow = 0.0
        """Seconds before each MB of a large file's data."""
        self.broken: dict[str, str] = {}
        """File name → `404`, `503`, `flip` (a byte of the data), `cut` (ends early), `all` (ranges are not known)."""
        self.gone: set[str] = set()
        """Models that are asked for with a status of their own: `name:status:code`."""

    def sent(self, name: str) -> list[str]:
        """Ranges of a file's data that were sent; "" stands for all of it."""
        return [r for method, path, r in self.requests if method == "GET" and path == f"/cdn/{name}"]


def _is_large(file: Path) -> bool:
    return file.suffix == ".safetensors"


@contextmanager
def serve(root: Path) -> Iterator[Hub]:
    """The models below a directory."""
    hub = Hub(root)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def _answer(self) -> None:
            path = self.path.partition("?")[0]
            hub.requests.append((self.command, path, self.headers.get("Range", "")))
            if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
                self._model(match[1], match[2] or "main")
            elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/]+", path):
                files = self._files(hub.root / match[1])
                tree = [
                    {"type": "file", "path": f["rfilename"], "size": f["size"], "oid": f["blobId"]}
                    for f in files
                ]
                self._send(json.dumps(tree).encode())
            elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                self._resolve(match[1], match[2], match[3])
            elif match := re.fullmatch(r"/cdn/(.+)", path):
                self._data(hub.root / match[1], self.headers.get("Range"))
            else:
                self._refuse(404, "EntryNotFound")

        def _model(self, name: str, revision: str) -> None:
            for entry in hub.gone:
                gone, status, code = entry.split(":")
                if gone == name:
                    return self._refuse(int(status), code)
            folder = hub.root / name
            if not folder.is_dir():
                return self._refuse(404, "RepoNotFound")
            if revision not in ("main", hub.commit):
                return self._refuse(404, "RevisionNotFound")
            body = {"id": name, "sha": hub.commit, "siblings": self._files(folder), "tags": []}
            self._send(json.dumps(body).encode())

        def _files(self, folder: Path) -> list[dict[str, Any]]:
            files = []
            for file in sorted(f for f in folder.rglob("*") if f.is_file()):
                entry: dict[str, Any] = {
                    "rfilename": file.relative_to(folder).as_posix(),
                    "size": file.stat().st_size,
                }
                entry["blobId"] = hashlib.sha1(file.read_bytes()).hexdigest()
                if _is_large(file):
                    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
                    entry["lfs"] = {"sha256": sha256, "size": file.stat().st_size, "pointerSize": 134}
                files.append(entry)
            return files

        def _resolve(self, name: str, revision: str, file: str) -> None:
            local = hub.root / name / file
            if not local.is_file() or revision not in ("main", hub.commit):
                return self._refuse(404, "EntryNotFound")
            if hub.broken.get(local.name) in ("404", "503"):
                return self._refuse(int(hub.broken[local.name]), "EntryNotFound")
            digest = hashlib.sha256 if _is_large(local) else hashlib.sha1
            headers = {"X-Repo-Commit": hub.commit, "ETag": f'"{digest(local.read_bytes()).hexdigest()}"'}
            if not _is_large(local):
                return self._send(local.read_bytes(), headers)
            headers |= {"X-Linked-Size": str(local.stat().st_size), "X-Linked-Etag": headers["ETag"]}
            # By another name: to one of its own the client would go on as to the Hub.
            location = f"http://localhost:{server.server_port}/cdn/{name}/{file}"
            self._send(b"", {**headers, "Location": location}, status=302)

        def _data(self, file: Path, asked: str | None) -> None:
            data, broken = bytearray(file.read_bytes()), hub.broken.get(file.name)
            status, first, stop = 200, 0, len(data)
            if asked and broken != "all":
                numbers = re.fullmatch(r"bytes=(\d+)-(\d*)", asked)
                assert numbers, asked
                status, first = 206, int(numbers[1])
                stop = min(int(numbers[2]) + 1, stop) if numbers[2] else stop
            if broken == "flip" and status == 200:
                data[-1] ^= 1
            headers = {"Accept-Ranges": "bytes"}
            if status == 206:
                headers["Content-Range"] = f"bytes {first}-{stop - 1}/{len(data)}"
            self._send(bytes(data[first:stop]), headers, status=status, slow=hub.slow, cut=broken == "cut")

        def _refuse(self, status: int, code: str) -> None:
            self._send(b"{}", {"X-Error-Code": code, "X-Error-Message": code}, status=status)

        def _send(
            self, body: bytes, headers: dict[str, str] | None = None, *,
            status: int = 200, slow: float = 0, cut: bool = False,
        ) -> None:  # fmt: skip
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            for at in range(0, len(body), 1 << 20):
                time.sleep(slow)
                if cut and at + (1 << 20) >= len(body):
                    self.close_connection = True
                    return
                try:
                    self.wfile.write(body[at : at + (1 << 20)])
                except OSError:  # the client went away
                    self.close_connection = True
                    return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        hub.address = f"http://127.0.0.1:{server.server_port}"
        yield hub
    finally:
        server.shutdown()
        server.server_close()
