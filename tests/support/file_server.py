"""A small HTTP server on the loopback interface, in the place of the hub and of GitHub."""

import http.server
from typing import Any


class FileServer(http.server.BaseHTTPRequestHandler):
    """Answers with `files` by path and keeps a `log` of what was asked for."""

    files: dict[str, bytes]
    log: list[str]

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        if not self.path.startswith("/api/"):  # what the client asks about itself
            self.log.append(self.path)
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        content = self.files.get(self.path)
        self.send_response(404 if content is None else 200)
        content = content or b""
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", '"0123456789abcdef"')
        self.send_header("X-Repo-Commit", "f" * 40)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass
