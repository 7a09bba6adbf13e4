"""The servers of `bench_serve.py` and `bench_agents.py`: llmkit, vLLM and llama.cpp on a CPU.

README.md says what each kind is.
"""

from __future__ import annotations

import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import psutil
import torch
from cpu_limit import CpuLimit
from gguf import GGUFReader

from common import ROOT, llmkit, peer_python, real_model
from llmkit.bench.backends import ServedBackend
from llmkit.bench.bench_metrics import require_complete
from llmkit.bench.host_memory import memory_bytes, process_tree
from llmkit.bench.load_client import query_server
from llmkit.bench.workload import WARMUP, WorkloadRequest
from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.kernels.cpu import cpu_kernels
from llmkit.model.families import checkpoint_spec
from llmkit.model.parameter_table import embedding_tensor

MIB = 1 << 20
CORES = sorted(os.sched_getaffinity(0))
NAME = "smollm2"
# vLLM's --max-num-seqs and --max-model-len.
VLLM_MAX_NUM_SEQS = 64
VLLM_MAX_MODEL_LEN = 2048
VLLM_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
# llama.cpp's --parallel, and the context of each slot.
LLAMACPP_SLOTS = 32
SLOT_TOKENS = 1024
PAUSE_TIMEOUT_S = 60.0
# Options of `llmkit quantize`. Speed does not depend on the quality of the calibration. llama.cpp's
# files have an 8-bit output projection too.
INT8_HEAD = ("--lm-head", "8")
FEW_SAMPLES = ("--samples", "8", "--seq-len", "512")
QUANTIZE_OPTIONS = {
    "int8": ("--method", "int8", *INT8_HEAD),
    "w8a8": ("--method", "int8", "--activations", *FEW_SAMPLES, *INT8_HEAD),
    "int4": ("--method", "rtn", *INT8_HEAD),
}
# The KV cache stays what `auto` takes for a bfloat16 checkpoint, so that only the inputs differ.
FLOAT_INPUTS = ("--cpu-activations", "float32")
if cpu_kernels.has_bfloat16():
    FLOAT_INPUTS += ("--kv-cache-dtype", "bfloat16")
INT8_INPUTS = ("--cpu-activations", "int8")
# llmkit's kinds: a key of QUANTIZE_OPTIONS, or "" for the source; and options of `llmkit serve`.
LLMKIT_KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "bf16": ("", ()),
    "fp32": ("", ("--dtype", "float32")),
    "w8a8": ("w8a8", ()),
    "int8": ("int8", ()),
    "int8-fp32": ("int8", FLOAT_INPUTS),
    "int8-int8": ("int8", INT8_INPUTS),
    "int4": ("int4", ()),
    "int4-fp32": ("int4", FLOAT_INPUTS),
    "int4-int8": ("int4", INT8_INPUTS),
}


@dataclass(frozen=True)
class PeerSetup:
    """What all servers of a benchmark share.

    work: the folder for models and logs. llamacpp: that of llama.cpp's sources and build.
    cpus: the limit of each server; None: all CPUs.
    """

    work: Path
    llamacpp: Path = ROOT / ".llamacpp"
    cpus: float | None = None

    @property
    def cores(self) -> list[int]:
        """The cores that servers which do not see the limit are told to use."""
        return CORES if self.cpus is None else CORES[: max(1, math.ceil(self.cpus))]


@dataclass(frozen=True)
class Launch:
    """How a server is started, and the weights that it reads for a token.

    command: `{port}` is the port. settings: more environment variables.
    token_bytes: see `checkpoint_token_bytes` and `gguf_token_bytes`; None: not known.
    """

    command: list[str]
    settings: dict[str, str]
    token_bytes: int | None


class PeerServer(ServedBackend):
    """A server of any program, which can be paused."""

    def __init__(self, name: str, launch: Launch, log: Path, limit: CpuLimit | None) -> None:
        """log: the file for its stderr. limit: the cgroup that it runs in; it ends with it."""
        super().__init__(name, NAME, SLOT_TOKENS)
        self.launch = launch
        self.limit = limit
        self.stderr_file.close()
        self.stderr_file = log.open("w+b")

    def command(self, port: int) -> list[str]:
        """See `ServedBackend.command`."""
        words = [word.replace("{port}", str(port)) for word in self.launch.command]
        return words if self.limit is None else self.limit.command(words)

    def environment(self) -> dict[str, str]:
        """The server's environment, without settings of threads: every server uses its default."""
        inherited = {
            k: v
            for k, v in super().environment().items()
            if not k.startswith(("OMP_", "MKL_", "KMP_"))
        }
        return inherited | {"HF_HUB_OFFLINE": "1"} | self.launch.settings

    def memory_bytes(self) -> int:
        """The server's memory now."""
        return memory_bytes(self.process.pid) if self.process else 0

    def pause(self) -> None:
        """Stop every process of the server. Exits when one runs on."""
        deadline_s = time.monotonic() + PAUSE_TIMEOUT_S
        while running := [one for one in self._processes() if _is_running(one)]:
            if time.monotonic() > deadline_s:
                raise SystemExit(f"{self.name}: process {running[0].pid} does not stop")
            self._signal(signal.SIGSTOP)
            time.sleep(0.01)

    def resume(self) -> None:
        """Continue the server and wait for an answer. Raises ShortageError without one."""
        assert self.server
        self._signal(signal.SIGCONT)
        query_server(self.server.url)

    def stop(self) -> dict[str, float]:
        """See `ServedBackend.stop`."""
        self._signal(signal.SIGCONT)
        found = super().stop()
        if self.limit is not None:
            self.limit.remove()
            self.limit = None
        return found

    def _processes(self) -> list[psutil.Process]:
        return process_tree(self.process.pid) if self.process else []

    def _signal(self, number: signal.Signals) -> None:
        """Send a signal to each process; a server's engine may lead a process group of its own."""
        for process in self._processes():
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)


def _is_running(process: psutil.Process) -> bool:
    try:
        return process.status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def make_server(name: str, setup: PeerSetup) -> PeerServer:
    """The server of a `--servers` value. Its model is created first when it is missing."""
    server, *options = shlex.split(name)
    program, _, kind = server.partition("=")
    makers: dict[str, Callable[[str, PeerSetup], Launch]] = {
        "llmkit": launch_llmkit,
        "vllm": launch_vllm,
        "llamacpp": launch_llamacpp,
    }
    if program not in makers or not kind:
        raise SystemExit(f"{name}: llmkit=, vllm= or llamacpp= and a kind was expected")
    launch = makers[program](kind, setup)
    launch.command.extend(options)
    log = setup.work / f"{re.sub(r'[^a-z0-9_]+', '-', name.lower()).strip('-')}.log"
    limit = None
    if setup.cpus is not None:
        limit = CpuLimit(setup.cpus, f"llmkit-bench-{os.getpid()}-{next(_limit_numbers)}")
    return PeerServer(name, launch, log, limit)


_limit_numbers = count()


def launch_llmkit(kind: str, setup: PeerSetup) -> Launch:
    """`llmkit serve` with the source model or a checkpoint quantized from it."""
    options: tuple[str, ...] = ()
    if kind in LLMKIT_KINDS:
        quantized, options = LLMKIT_KINDS[kind]
        model = llmkit_checkpoint(quantized, setup.work)
    else:
        model = folder(kind, LLMKIT_KINDS)
    serve = [sys.executable, "-m", "llmkit.cli.main", "serve", str(model)]
    listen = ["--served-model-name", NAME, "--host", "127.0.0.1", "--port", "{port}"]
    return Launch([*serve, *listen, *options], {}, checkpoint_token_bytes(model))


def llmkit_checkpoint(kind: str, work: Path) -> Path:
    """The source model, or for a key of QUANTIZE_OPTIONS a checkpoint quantized from it."""
    source = real_model(work)
    if not kind:
        return source
    model = work / f"llmkit-{kind}"
    if not model.exists():
        options = (*QUANTIZE_OPTIONS[kind], "--no-eval", "--quiet", "--output", model)
        llmkit("quantize", source, *options)
    return model


def launch_vllm(kind: str, setup: PeerSetup) -> Launch:
    """`vllm serve` with its default compilation, bound to all cores, with the libraries that it
    recommends."""
    python = peer_python("vllm")
    is_known = kind in VLLM_DTYPES
    model = real_model(setup.work) if is_known else folder(kind, VLLM_DTYPES)
    dtype = VLLM_DTYPES.get(kind, "float32")
    preloaded = [
        *Path("/usr/lib").glob("*/libtcmalloc_minimal.so.4"),
        python.parents[1] / "lib" / "libiomp5.so",
    ]
    settings = {
        "LD_PRELOAD": ":".join(map(str, preloaded)),
        "VLLM_CPU_KVCACHE_SPACE": "4",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, setup.cores)),
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
    serve = [python.parent / "vllm", "serve", model, "--served-model-name", NAME, "--dtype", dtype]
    limits = ["--max-model-len", VLLM_MAX_MODEL_LEN, "--max-num-seqs", VLLM_MAX_NUM_SEQS]
    command = [*serve, *limits, "--host", "127.0.0.1", "--port", "{port}"]
    item_bytes = getattr(torch, dtype).itemsize if is_known else None
    return Launch(list(map(str, command)), settings, checkpoint_token_bytes(model, item_bytes))


def launch_llamacpp(kind: str, setup: PeerSetup) -> Launch:
    """`llama-server` with one slot for each client.

    The cache belongs to a slot unless --kv-unified is given.
    """
    programs = setup.llamacpp / "build" / "bin"
    if not (programs / "llama-server").exists():
        raise SystemExit(
            f"{programs / 'llama-server'} is missing; make {setup.llamacpp}/.ready makes it"
        )
    model = gguf(kind, setup)
    serve = [programs / "llama-server", "--model", model, "--alias", NAME]
    threads = ["--threads", len(setup.cores), "--parallel", LLAMACPP_SLOTS]
    cache = ["--ctx-size", LLAMACPP_SLOTS * SLOT_TOKENS, "--no-kv-unified"]
    listen = ["--host", "127.0.0.1", "--port", "{port}", "--no-webui"]
    command = [str(word) for word in (*serve, *threads, *cache, *listen)]
    return Launch(command, {}, gguf_token_bytes(model))


def gguf(kind: str, setup: PeerSetup) -> Path:
    """The model in llama.cpp's format, written by its own tools.

    f32 is converted from the checkpoint, and other types are quantized from f32.
    """
    out = setup.work / f"{kind}.gguf"
    if out.exists():
        return out
    partial = out.with_suffix(".partial")
    if kind == "f32":  # vLLM's environment has the modules that the script imports
        script = setup.llamacpp / "src" / "vendor" / "llama.cpp" / "convert_hf_to_gguf.py"
        source = real_model(setup.work)
        python = peer_python("vllm")
        command = [python, script, source, "--outtype", "f32", "--outfile", partial]
    else:
        quantize = setup.llamacpp / "build" / "bin" / "llama-quantize"
        command = [quantize, gguf("f32", setup), partial, kind]
    process = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if process.returncode:
        raise SystemExit(f"{kind}.gguf could not be made:\n{process.stderr[-3000:]}")
    return partial.rename(out)


def folder(kind: str, known: Sequence[str] | dict[str, Any]) -> Path:
    """A checkpoint directory that the user names."""
    if not Path(kind).is_dir():
        raise SystemExit(f"{kind} is neither one of {', '.join(known)} nor a directory")
    return Path(kind).resolve()


def checkpoint_token_bytes(model: Path, item_bytes: int | None = None) -> int | None:
    """The bytes of weights that a decode step reads: all but an embedding that is no LM head.

    They are counted as the file has them, scales included. item_bytes: of each weight of an
    unquantized model that is held in another type. None for a model with experts, of which a token
    uses some.
    """
    checkpoint = open_checkpoint(model)
    spec = checkpoint_spec(checkpoint)
    if spec.moe is not None:
        return None
    total = 0
    for name, tensor in checkpoint.tensors.items():
        if name == embedding_tensor(spec) and not spec.tie_word_embeddings:
            continue
        total += math.prod(tensor.shape) * item_bytes if item_bytes else tensor.nbytes
    return total


def gguf_token_bytes(model: Path) -> int:
    """As `checkpoint_token_bytes`, of a GGUF file: its embedding is the LM head without another."""
    sizes = {tensor.name: int(tensor.n_bytes) for tensor in GGUFReader(model).tensors}
    if "output.weight" in sizes:
        sizes.pop("token_embd.weight", None)
    return sum(sizes.values())


def start(server: PeerServer, warmup: Sequence[WorkloadRequest]) -> dict[str, Any]:
    """Start a server, warm it up and pause it. Returns the seconds and the memory until it was
    ready."""
    facts: dict[str, Any] = {
        "command": shlex.join(server.launch.command),
        "settings": server.launch.settings,
        "token_bytes": server.launch.token_bytes,
    }
    facts |= server.start() | {
        "ready_bytes": server.memory_bytes(),
        "peak_bytes": server.peak_bytes,
    }
    print(
        f"{server.name}: ready in {facts['ready_s']:.1f} s, {facts['ready_bytes'] / MIB:.0f} MiB",
        flush=True,
    )
    timelines = server.run(warmup, WARMUP.max_concurrency).timelines
    require_complete(timelines, server.name, WARMUP.name)
    server.pause()
    return facts
