"""A real server for a folder, which counts what is asked of it; s3fs is content with it as well."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

Spoil = Callable[[str, int, bytes], bytes]
"""(name of the file, which request for it, its content) to what is sent instead."""


class Server:
    def __init__(self, root: Path) -> None:
        self.root, self.requests = root, Counter[str]()
        self.spoil: Spoil = lambda name, number, content: content
        self.failures: Counter[str] = Counter()
        """How many requests for a file fail before one succeeds."""
        self.port = 0


class _Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, server: Server, *args: object) -> None:
        self.counted = server
        super().__init__(*args, directory=str(server.root))  # type: ignore[arg-type]

    def do_HEAD(self) -> None:
        self._answer(with_content=False)

    def do_GET(self) -> None:
        self._answer(with_content=True)

    def _answer(self, with_content: bool) -> None:
        path, served = Path(self.translate_path(self.path)), self.counted
        if not path.is_file():
            return self._send(404, b"", with_content)
        if served.failures[path.name] > 0:
            served.failures[path.name] -= 1
            return self._send(503, b"later", with_content)
        served.requests[path.name] += with_content
        content = served.spoil(path.name, served.requests[path.name], path.read_bytes())
        return self._send(200, content, with_content)

    def _send(self, status: int, content: bytes, with_content: bool) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", '"0"')
        self.send_header("Last-Modified", self.date_time_string(0))
        self.end_headers()
        if with_content:
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def serve(root: Path) -> Iterator[Server]:
    server = Server(root)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, server)) as http:
        server.port = http.server_port
        thread = threading.Thread(target=http.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield server
        http.shutdown()
        thread.join()
