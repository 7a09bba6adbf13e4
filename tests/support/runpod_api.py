"""RunPod's queue of jobs for a serverless worker: jobs go out, parts and results come in."""

from __future__ import annotations

import json
import queue
import time
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, urlsplit

# How long a request for jobs or for stop signals waits. RunPod's wait longer.
_WAIT_S = 0.5


class RunpodApi:
    """The API, as a context. A worker finds it by `environment`."""

    def __init__(self) -> None:
        self.parts: dict[str, list[tuple[float, Any]]] = defaultdict(list)  # of a job, with times
        self.results: dict[str, queue.Queue[dict[str, Any]]] = defaultdict(queue.Queue)
        self._jobs: queue.Queue[dict[str, Any]] = queue.Queue()
        self._stops: queue.Queue[str] = queue.Queue()
        api = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments: Any) -> None:
                """Nothing on stderr."""

            def do_GET(self) -> None:
                url = urlsplit(self.path)
                kind = url.path.split("/")[1]
                if kind.startswith("job-take"):
                    limit = int(parse_qs(url.query).get("batch_size", ["1"])[0])
                    jobs = _take(api._jobs, limit)
                    _send(self, (jobs if "batch" in kind else jobs[0]) if jobs else None)
                elif kind == "job-stop":
                    _send(self, {"jobsToStop": _take(api._stops, 10)})
                else:
                    assert kind == "ping"
                    _send(self, {})

            def do_POST(self) -> None:
                kind, job = urlsplit(self.path).path.split("/")[1:3]
                document = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if kind == "job-stream":
                    api.parts[job].append((time.monotonic(), document["output"]))
                else:
                    assert kind == "job-done"
                    api.results[job].put(document)
                _send(self, {})

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self.environment = {
            "RUNPOD_WEBHOOK_GET_JOB": f"{url}/job-take/$ID?gpu=none",
            "RUNPOD_WEBHOOK_POST_STREAM": f"{url}/job-stream/$ID?gpu=none",
            "RUNPOD_WEBHOOK_POST_OUTPUT": f"{url}/job-done/$ID?gpu=none",
            "RUNPOD_WEBHOOK_PING": f"{url}/ping/$RUNPOD_POD_ID",
            "RUNPOD_POD_ID": "worker-1",
            "RUNPOD_AI_API_KEY": "key",
            # They measure GPUs, and ask hosts on the internet.
            "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",
            "RUNPOD_SKIP_GPU_CHECK": "true",
        }

    def __enter__(self) -> RunpodApi:
        Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def submit(self, name: str, job_input: Any) -> None:
        """Put a job into the queue."""
        self._jobs.put({"id": name, "input": job_input})

    def cancel(self, name: str) -> None:
        """Tell the worker to stop a job."""
        self._stops.put(name)

    def result(self, name: str) -> dict[str, Any]:
        """What the worker sent at the end of a job."""
        return self.results[name].get(timeout=90)

    def texts(self, name: str) -> list[Any]:
        """The parts of a job's output."""
        return [part for _, part in self.parts[name]]


def _take(items: queue.Queue[Any], limit: int) -> list[Any]:
    """Wait for one item, and take those that are there."""
    taken = []
    try:
        taken.append(items.get(timeout=_WAIT_S))
        while len(taken) < limit:
            taken.append(items.get_nowait())
    except queue.Empty:
        pass
    return taken


def _send(handler: BaseHTTPRequestHandler, document: Any) -> None:
    body = b"" if document is None else json.dumps(document).encode()
    handler.send_response(204 if document is None else 200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)
