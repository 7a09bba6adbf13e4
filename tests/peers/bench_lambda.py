"""Cold starts of a Lambda function: seconds from the start of its process to its first answer.

CPU seconds are those of its processes that run then: a function with one vCPU takes as long.

    .venv/bin/llmkit deploy lambda MODEL -o FOLDER --package ANY.tar.gz
    PYTHONPATH=tests .venv/bin/python tests/peers/bench_lambda.py FOLDER

The runtime is the one that the folder's Dockerfile starts, at a local Lambda runtime API.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from support.lambda_api import LambdaApi, url_event

KEY = "key"
MESSAGES = [{"role": "user", "content": "Say hello."}]


def measure(folder: Path, runtime: str) -> tuple[float, float, float]:
    """Seconds to a new process's first answer, its CPU seconds, and seconds to the next answer."""
    body = json.dumps({"messages": MESSAGES, "max_tokens": 16, "temperature": 0})
    headers = {"authorization": f"Bearer {KEY}"}
    event = url_event("POST", "/v1/chat/completions", body, headers)
    with LambdaApi() as api:
        environment = {
            **os.environ,
            "AWS_LAMBDA_RUNTIME_API": api.address,
            "LLMKIT_API_KEY": KEY,
        }
        cold = api.start(event)
        started_at = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", runtime, "handler.handler"],
            cwd=folder,
            env=environment,
            stderr=subprocess.DEVNULL,
        )
        try:
            cold.done.get(timeout=120)
            cold_s = time.monotonic() - started_at
            assert cold.error is None and b"completion_tokens" in cold.body, cold
            root = psutil.Process(process.pid)
            family = [root, *root.children(recursive=True)]
            cpu_s = sum(sum(one.cpu_times()[:2]) for one in family)
            started_at = time.monotonic()
            warm = api.invoke(event)
            assert warm.error is None
            return cold_s, cpu_s, time.monotonic() - started_at
        finally:
            process.kill()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    dockerfile = (arguments.folder / "Dockerfile").read_text()
    match = re.search(r'ENTRYPOINT \["python", "-m", "([\w.]+)"\]', dockerfile)
    assert match is not None, "the folder was not written by `llmkit deploy lambda`"
    with tempfile.TemporaryDirectory() as scratch:
        # The image's path of the model is the folder's on this machine.
        text = (arguments.folder / "handler.py").read_text()
        model = str((arguments.folder / "model").resolve())
        (Path(scratch) / "handler.py").write_text(text.replace("/opt/model", model))
        times = [measure(Path(scratch), match[1]) for _ in range(arguments.runs)]
    names = ("first answer", "its CPU time", "next answer")
    for name, values in zip(names, zip(*times, strict=True), strict=True):
        listed = " ".join(f"{value:.2f}" for value in values)
        print(f"{name}: median {statistics.median(values):.2f} s ({listed})")


if __name__ == "__main__":
    main()
