"""A Hugging Face Hub on this machine: as much of its HTTP as fetching from it takes.

Below `root`, `OWNER/NAME/...` are the files of models, `datasets/OWNER/NAME/...` those of data
sets. Each has one commit. `asked` are the paths that were asked for.
"""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+))?")
_FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


class Hub(ThreadingHTTPServer):
    """Serves while it is open: `with Hub(root) as hub: ... hub.address`."""

    daemon_threads = True

    def __init__(self, root: Path):
        self.root, self.asked = root, []
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *message):
        pass

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(path)
        if found := _API.match(path):
            return self._about(found, path[found.end() :].strip("/"))
        if found := _FILE.fullmatch(path):
            folder = self.server.root / (found[1] or "") / found[2]
            if (folder / found[4]).is_file():
                return self._file(folder / found[4])
        return self._missing("EntryNotFound")

    def do_HEAD(self):
        self.do_GET()

    def do_POST(self):
        self.do_GET()

    def _about(self, found: re.Match, below: str):
        kind, name, what, _ = found.groups()
        folder = self.server.root / ("datasets" if kind == "datasets" else "") / name
        if not folder.is_dir():
            return self._missing("RepoNotFound")
        if what == "paths-info":
            content = self.rfile.read(int(self.headers["Content-Length"])).decode()
            form = parse_qs(content)
            asked = form["paths"] if form else json.loads(content)["paths"]
            return self._json(
                [self._entry(folder, folder / p) for p in asked if (folder / p).exists()]
            )
        if what == "tree":
            top = folder / below
            every = "recursive=true" in self.path.lower()
            if not top.is_dir():
                return self._missing("EntryNotFound")
            listed = sorted(top.rglob("*") if every else top.iterdir())
            return self._json([self._entry(folder, path) for path in listed])
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        names = [{"rfilename": path.relative_to(folder).as_posix()} for path in files]
        about = {"id": name, "sha": COMMIT, "siblings": names, "tags": [], "downloads": 0}
        return self._json(about | {"private": False, "disabled": False, "gated": False})

    def _entry(self, folder: Path, path: Path) -> dict:
        name = path.relative_to(folder).as_posix()
        if path.is_dir():
            return {"type": "directory", "path": name, "oid": COMMIT, "size": 0}
        return {"type": "file", "path": name, "oid": _hash(path), "size": path.stat().st_size}

    def _json(self, data):
        self._answer(200, json.dumps(data).encode(), {"Content-Type": "application/json"})

    def _file(self, path: Path):
        content, status = path.read_bytes(), 200
        about = {"ETag": f'"{_hash(path)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if span := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last = int(span[1]), int(span[2] or len(content) - 1)
            about["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            content, status = content[first : last + 1], 206
        self._answer(status, content, about)

    def _missing(self, code: str):
        self._answer(404, b"", {"X-Error-Code": code, "X-Error-Message": "not here"})

    def _answer(self, status: int, content: bytes, about: dict[str, str]):
        self.send_response(status)
        for name, value in (about | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _hash(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
