"""Two servers behind nginx and HAProxy: each is restarted under load, and no request fails."""

from __future__ import annotations

import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from support.free_ports import free_port
from support.server_process import LlmkitServer, wait_for

pytestmark = [pytest.mark.scale, pytest.mark.timeout(900)]

MODEL = {"dtype": "float32", "max_position_embeddings": 2048}
NGINX = """
daemon off; pid {folder}/nginx.pid; error_log {folder}/error.log warn; worker_processes 1;
events {{ worker_connections 512; }}
http {{
  access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/f;
  uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  upstream llmkit {{ server 127.0.0.1:{one} max_fails=0; server 127.0.0.1:{two} max_fails=0; }}
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://llmkit; proxy_http_version 1.1; proxy_buffering off;
      proxy_read_timeout 300s;
      proxy_set_header Host localhost;
      proxy_next_upstream error timeout http_503 non_idempotent; proxy_next_upstream_tries 4;
    }}
  }}
}}
"""
HAPROXY = """
global
  stats socket {folder}/admin level admin
defaults
  mode http
  timeout connect 5s
  timeout client 300s
  timeout server 300s
  option redispatch 1
  retries 4
frontend in
  bind 127.0.0.1:{port}
  default_backend llmkit
backend llmkit
  balance leastconn
  option httpchk GET /ready
  http-check send hdr host localhost
  http-request set-header host localhost
  default-server check inter 200ms fall 1 rise 1
  server one 127.0.0.1:{one}
  server two 127.0.0.1:{two}
"""


@pytest.fixture(params=["nginx", "haproxy"])
def proxy(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[int, int, int]]:
    """Ports of a running proxy and of the two servers behind it."""
    program = shutil.which(request.param, path="/usr/sbin:/usr/bin:/usr/local/bin")
    if program is None:
        pytest.skip(f"no {request.param} here (a package of Debian)")
    port, one, two = (free_port() for _ in range(3))
    text = NGINX if request.param == "nginx" else HAPROXY
    (tmp_path / "proxy.conf").write_text(text.format(folder=tmp_path, port=port, one=one, two=two))
    options = ["-p", str(tmp_path), "-c"] if request.param == "nginx" else ["-db", "-f"]
    process = subprocess.Popen([program, *options, str(tmp_path / "proxy.conf")])
    yield port, one, two
    process.terminate()
    process.wait(60)


def tell_haproxy(folder: Path, command: str) -> None:
    """Tell HAProxy about a server before it restarts. nginx needs none: it tries the other one."""
    if (folder / "admin").exists():
        with socket.socket(socket.AF_UNIX) as admin:
            admin.connect(str(folder / "admin"))
            admin.sendall(f"{command}\n".encode())
            assert admin.recv(1000).strip() == b""


def test_rolling_restart_fails_no_request(
    proxy: tuple[int, int, int], model: Path, tmp_path: Path
) -> None:
    port, *ports = proxy
    options = {"max_num_seqs": 8, "drain_timeout": 120.0}
    servers = [LlmkitServer(tmp_path / f"{one}.log", model, port=one, **options) for one in ports]
    for server in servers:
        server.wait_ready()
    # HAProxy checks its servers at intervals.
    wait_for(lambda: httpx.get(f"http://127.0.0.1:{port}/ready").is_success)
    stop = threading.Event()
    answered = [0, 0]
    failed = list[str]()

    def ask(number: int) -> None:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=300) as client:
            while not stop.is_set():
                streamed = number % 2 == 1
                body = {
                    "model": "model",
                    "prompt": "hello",
                    "max_tokens": 40,
                    "ignore_eos": True,
                    "stream": streamed,
                }
                try:
                    answer = client.post("/v1/completions", json=body)
                except httpx.HTTPError as error:
                    failed.append(repr(error))
                    continue
                complete = (
                    answer.text.endswith("data: [DONE]\n\n")
                    if streamed
                    else "length" in answer.text
                )
                if answer.status_code == 200 and complete:
                    answered[streamed] += 1
                else:
                    failed.append(f"{answer.status_code} {answer.text[-300:]}")

    with ThreadPoolExecutor(8) as pool:
        clients = [pool.submit(ask, number) for number in range(8)]
        try:
            wait_for(lambda: sum(answered) > 16 or failed)
            assert not failed, failed[:3]
            for place, one in enumerate(ports):
                tell_haproxy(tmp_path, f"set server llmkit/{['one', 'two'][place]} state drain")
                time.sleep(1.0)  # as preStop: a request that was on its way to it arrives
                assert servers[place].stop() == 0
                time.sleep(1.0)
                servers[place] = LlmkitServer(
                    tmp_path / f"{one}-again.log", model, port=one, **options
                ).wait_ready()
                tell_haproxy(tmp_path, f"set server llmkit/{['one', 'two'][place]} state ready")
                wait_for(lambda place=place: servers[place].metric("generation_tokens_total") > 600)
        finally:
            stop.set()
        for client in clients:
            client.result()
    for server in servers:
        server.stop()
    assert failed == [] and min(answered) > 20, (answered, failed[:5])
