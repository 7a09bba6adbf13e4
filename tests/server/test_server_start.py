"""What a starting server imports, says and counts."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from support.gguf_files import convert
from support.tiny_models import tiny_checkpoint

from llmkit.checkpoint.open_checkpoint import open_checkpoint

# Everything that the API process runs before it is ready; the engine's process is another.
_API = """
import sys
import uvloop
from llmkit.cli.main import app
from llmkit.runtime.server.lifecycle import serve
from llmkit.runtime.server.run_server import run_server
from llmkit.runtime.server.server_state import TextResources
text = TextResources.load(sys.argv[1])
text.tokenizer.decode(text.tokenizer.encode("hello"))
text.tokenizer.stream().flush()
print(*sys.modules)
"""
_ENGINE = """
import sys
from llmkit.runtime.engine.engine_options import EngineOptions
from llmkit.runtime.engine_loader import load_engine
from llmkit.runtime.engine.sampling_params import SamplingParams
from llmkit.runtime.server.engines import engine_process
engine = load_engine(sys.argv[1], EngineOptions(device="cpu"))
engine.generate([[5, 6]], SamplingParams(max_tokens=6, ignore_eos=True))
print(*sys.modules)
"""


def modules(code: str, model: Path) -> set[str]:
    command = [sys.executable, "-c", code, str(model)]
    return set(
        subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=120
        ).stdout.split()
    )


def test_api_process_imports_no_torch(model: Path) -> None:
    loaded = modules(_API, model)
    assert {"fastapi", "tokenizers", "llmkit.runtime.server.app"} <= loaded
    assert loaded.isdisjoint(
        {"torch", "transformers", "numpy", "huggingface_hub", "datasets", "rich"}
    )


def test_api_process_imports_no_torch_for_a_gguf_file(model: Path, tmp_path: Path) -> None:
    loaded = modules(_API, convert(open_checkpoint(model), tmp_path / "model.gguf", "llama"))
    assert "gguf" in loaded
    assert loaded.isdisjoint({"torch", "transformers"})


def test_engine_process_imports_no_transformers(model: Path) -> None:
    loaded = modules(_ENGINE, model)
    assert "torch" in loaded
    assert loaded.isdisjoint(
        {"transformers", "huggingface_hub", "datasets", "tokenizers", "fastapi", "rich"}
    )
    # These imports would add more than a second to the first answer.
    assert loaded.isdisjoint({"torch._dynamo", "sympy"})


def start(model: Path, *options: str) -> tuple[str, str]:
    """What `llmkit serve` writes to stdout and stderr until it is ready and stopped."""
    command = [
        sys.executable,
        "-m",
        "llmkit.cli.main",
        "serve",
        str(model),
        "--port",
        "0",
        "--device",
        "cpu",
        *options,
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        document = ""
        while not document.endswith("\n}\n") and (line := process.stdout.readline()):
            document += line
        process.send_signal(signal.SIGTERM)
        rest, notes = process.communicate(timeout=60)
        return document + rest, notes
    finally:
        process.kill()


def test_start_up_times_and_the_context_are_reported(tmp_path: Path) -> None:
    """The memory has room for a part of the model's context."""
    model = tiny_checkpoint(tmp_path / "model", max_position_embeddings=1024)
    memory = 600 * 2 * 2 * 2 * 16 * 4  # a token has keys and values of 2 layers and heads
    began = time.monotonic()
    words = ["--kv-cache-memory", str(memory), "--kv-cache-dtype", "float32"]
    out, notes = start(model, "--json", *words)
    spent = time.monotonic() - began
    facts: dict[str, Any] = json.loads(out)
    stages = [
        "python and imports",
        "checkpoint check",
        "memory plan",
        "building",
        "waiting for the disk",
        "KV cache",
    ]
    assert list(facts["engine_seconds"]) == stages
    assert all(seconds >= 0 for seconds in facts["engine_seconds"].values())
    assert (
        0
        < facts["engine_seconds"]["python and imports"]
        < sum(facts["engine_seconds"].values())
        < facts["ready_s"]
    )
    assert facts["ready_s"] < spent
    assert facts["load_s"] < facts["ready_s"]
    assert set(facts["api_seconds"]) == {"python and imports", "tokenizer"}
    plan = facts["memory"]
    assert (plan["max_model_len"], plan["model_limit"], facts["max_model_len"]) == (592, 1024, 592)
    assert "the model's own limit is 1024 (see --kv-cache-memory)" in notes
    assert plan["kv_cache_tokens"] == facts["kv_cache_tokens"]
    assert plan["kv_cache_bytes"] == plan["kv_bytes_per_token"] * plan["kv_cache_tokens"]
    assert facts["paths"]
    for part in (
        "start-up",
        *stages,
        "ready",
        "weights",
        "workspace",
        "KV cache of a token",
        *facts["paths"],
    ):
        assert part in notes
    assert notes.index(" is ready at ") < notes.index("start-up")


def test_quiet_server_prints_nothing(model: Path) -> None:
    out, notes = start(model, "--json", "--quiet")
    assert json.loads(out)["model"] == "model"
    assert notes == ""
