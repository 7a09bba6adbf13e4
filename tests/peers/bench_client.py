"""llmkit's load client beside vLLM's, on one server with known latencies: do they measure the same?

    python tests/peers/bench_client.py --tokenizer MODEL [--vllm .venv-vllm/bin/vllm] [--runs 3]

The server answers each request after 200 ms and then sends a token every 20 ms. It runs in a
process of its llmkit_metrics.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from aiohttp import web

FIRST_S = 0.2
NEXT_S = 0.02
PORT = 8124
VLLM = {
    "output_tps": "Output token throughput",
    "ttft_mean_ms": "Mean TTFT",
    "tpot_mean_ms": "Mean TPOT",
}


async def complete(request: web.Request) -> web.StreamResponse:
    body = await request.json()
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    count = body["max_tokens"]
    for index in range(count):
        await asyncio.sleep(NEXT_S if index else FIRST_S)
        choice = {
            "index": 0,
            "text": " a",
            "finish_reason": "length" if index == count - 1 else None,
        }
        await response.write(b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n")
    usage = {"prompt_tokens": 64, "completion_tokens": count, "total_tokens": 64 + count}
    await response.write(
        b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\ndata: [DONE]\n\n"
    )
    return response


async def models(request: web.Request) -> web.StreamResponse:
    return web.json_response({"data": [{"id": "m", "object": "model", "max_model_len": 512}]})


def serve() -> None:
    app = web.Application()
    app.router.add_post("/v1/completions", complete)
    app.router.add_get("/v1/models", models)
    web.run_app(app, host="127.0.0.1", port=PORT, print=None)


def run(*words: str) -> str:
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        sys.exit(f"{' '.join(words)}\n{done.stderr[-2000:]}")
    return done.stdout


def measure_with_llmkit(tokenizer: str, seed: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "figures.csv"
        run(
            sys.executable,
            "-m",
            "llmkit.cli.main",
            "bench",
            "--url",
            f"http://127.0.0.1:{PORT}",
            "--tokenizer",
            tokenizer,
            "--data",
            "random",
            "--concurrency",
            "8",
            "--requests",
            "48",
            "--input-tokens",
            "64",
            "--output-tokens",
            "64",
            "--seed",
            seed,
            "--no-quality",
            "--csv",
            str(out),
        )
        return {
            row["metric"]: float(row["value"])
            for row in csv.DictReader(out.read_text().splitlines())
        }


def measure_with_vllm(vllm: str, tokenizer: str, seed: str) -> dict[str, float]:
    report = run(
        vllm,
        "bench",
        "serve",
        "--backend",
        "openai",
        "--base-url",
        f"http://127.0.0.1:{PORT}",
        "--endpoint",
        "/v1/completions",
        "--model",
        "m",
        "--tokenizer",
        tokenizer,
        "--dataset-name",
        "random",
        "--random-input-len",
        "64",
        "--random-output-len",
        "64",
        "--num-prompts",
        "48",
        "--max-concurrency",
        "8",
        "--ignore-eos",
        "--seed",
        seed,
    )
    found = {
        name: re.search(rf"{title} \([^)]*\):\s+([0-9.]+)", report) for name, title in VLLM.items()
    }
    return {name: float(match[1]) for name, match in found.items() if match}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", required=True, help="a checkpoint")
    parser.add_argument(
        "--vllm", default=".venv-vllm/bin/vllm", help="default: .venv-vllm/bin/vllm"
    )
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    server = multiprocessing.Process(target=serve, daemon=True)
    server.start()
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{PORT}/v1/models", timeout=1)
            break
        except OSError:
            time.sleep(0.1)
    for seed in map(str, range(arguments.runs)):
        llmkit_metrics = measure_with_llmkit(arguments.tokenizer, seed)
        vllm_metrics = measure_with_vllm(arguments.vllm, arguments.tokenizer, seed)
        for name in VLLM:
            difference = llmkit_metrics[name] / vllm_metrics[name] - 1
            print(
                f"{name:14} llmkit {llmkit_metrics[name]:8.2f}"
                f"  vLLM {vllm_metrics[name]:8.2f}  {difference:+.1%}"
            )
        print(
            f"our client: {llmkit_metrics['client_us']:.0f} us a token,"
            f" {llmkit_metrics['client_busy']:.1%} of a core",
            flush=True,
        )
    server.terminate()
    return 0


if __name__ == "__main__":
    sys.exit(main())
