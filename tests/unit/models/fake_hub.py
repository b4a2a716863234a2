"""A local hub: one repository with the files of a folder."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

SHA = "a" * 40


@contextmanager
def hub(name: str, folder: Path) -> Iterator[tuple[str, list[str]]]:
    """The address of a hub that holds ``folder`` as repository ``name``, and the files that were downloaded from it."""
    fetched: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def log_message(self, *_: object) -> None:
            pass

        def _answer(self, *, body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            files = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
            headers = {"X-Repo-Commit": SHA}
            if path.startswith(f"/api/models/{name}/tree/"):
                content = json.dumps([
                    {"type": "file", "path": file, "size": (folder / file).stat().st_size, "oid": _etag(folder / file)}
                    for file in files
                ]).encode()  # fmt: skip
            elif path in (
                f"/api/models/{name}",
                f"/api/models/{name}/revision/main",
                f"/api/models/{name}/revision/{SHA}",
            ):
                siblings = [{"rfilename": file} for file in files]
                content = json.dumps({"id": name, "modelId": name, "sha": SHA, "siblings": siblings}).encode()
            elif path.startswith(f"/{name}/resolve/") and path.split("/", 5)[5] in files:
                file = path.split("/", 5)[5]
                content = (folder / file).read_bytes()
                headers["ETag"] = f'"{_etag(folder / file)}"'
                if body:
                    fetched.append(file)
            else:
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(200)
            for header, value in headers.items():
                self.send_header(header, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body:
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", fetched
    finally:
        server.shutdown()
        server.server_close()


def _etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
