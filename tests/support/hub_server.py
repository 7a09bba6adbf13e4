"""A local Hugging Face hub with the part of the protocol that uploads and downloads need.

Large files (here: safetensors) are sent through git LFS, others within the commit. A process uses
it as HF_ENDPOINT.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit


class Hub(ThreadingHTTPServer):
    """One repository, organization/model. `files` are those of its newest commit."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.objects: dict[str, bytes] = {}  # uploaded by LFS, by SHA-256
        self.commits = 0
        self.private: bool | None = None
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def head(self) -> str:
        """The name of the newest commit."""
        return f"{self.commits:040x}"

    def entry(self, path: str) -> dict[str, Any]:
        """The hub's description of a file."""
        data = self.files[path]
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        lfs = {
            "lfs": {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        }
        return {
            "type": "file",
            "path": path,
            "size": len(data),
            "oid": blob,
            **(lfs if _is_large(path) else {}),
        }

    def commit(self, lines: list[dict[str, Any]]) -> None:
        """Apply a commit."""
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[value["path"]] = self.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del self.files[value["path"]]
        self.commits += 1


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        path = self.path.split("?")[0]
        body = self._body()
        if path == "/api/repos/create":
            self.server.private = json.loads(body).get("visibility") == "private" or json.loads(
                body
            ).get("private")
            self._json({"url": f"{self.server.url}/organization/model"})
        elif "/preupload/" in path:
            files = json.loads(body)["files"]
            modes = {
                file["path"]: "lfs" if _is_large(file["path"]) else "regular" for file in files
            }
            common = {"shouldIgnore": False, "oid": None}
            self._json(
                {
                    "files": [
                        {"path": name, "uploadMode": mode, **common} for name, mode in modes.items()
                    ]
                }
            )
        elif path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            self._json(
                {
                    "transfer": "basic",
                    "objects": [
                        {
                            **o,
                            "actions": {"upload": {"href": f"{self.server.url}/upload/{o['oid']}"}},
                        }
                        for o in objects
                    ],
                }
            )
        elif "/commit/" in path:
            self.server.commit([json.loads(line) for line in body.splitlines()])
            url = f"{self.server.url}/organization/model/commit/{self.server.head}"
            self._json({"commitOid": self.server.head, "commitUrl": url, "success": True})
        elif "/paths-info/" in path:
            asked = (
                json.loads(body)["paths"] if body[:1] == b"{" else parse_qs(body.decode())["paths"]
            )
            self._json([self.server.entry(name) for name in asked if name in self.server.files])
        else:
            self._json({"error": path}, 404)

    def do_PUT(self) -> None:
        self.server.objects[self.path.rpartition("/")[2]] = self._body()
        self._json({})

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        server = self.server
        name = path.rpartition("/")[2]
        if "/tree/" in path:
            self._json([server.entry(file) for file in server.files])
        elif "/resolve/" in path and name in server.files:
            etag = {
                "ETag": f'"{hashlib.sha256(server.files[name]).hexdigest()}"',
                "X-Repo-Commit": server.head,
            }
            self._send(200, server.files[name], etag)
        elif path.startswith("/api/models/organization/model"):
            self._json(
                {
                    "id": "organization/model",
                    "modelId": "organization/model",
                    "sha": server.head,
                    "siblings": [{"rfilename": file} for file in server.files],
                }
            )
        else:
            self._json({"error": path}, 404)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_: Any) -> None:
        """Nothing."""

    def _body(self) -> bytes:
        headers: Message = self.headers
        if headers.get("transfer-encoding") != "chunked":
            return self.rfile.read(int(headers.get("content-length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _json(self, document: Any, status: int = 200) -> None:
        self._send(status, json.dumps(document).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _is_large(path: str) -> bool:
    return path.endswith(".safetensors")
