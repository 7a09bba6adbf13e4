"""Checks of Triton kernels without a GPU: by Triton's interpreter, and compiled for two GPUs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import pytest
import torch

HOPPER_SHARED_BYTES = 227 * 1024
# The shared memory that a program may use, by compute capability.
SHARED_BYTES = {90: HOPPER_SHARED_BYTES, 89: 99 * 1024, 80: 163 * 1024}
TESTS = Path(__file__).parents[1]
# Reads calls from stdin and makes each in a fork of its own, which may change modules as it likes.
# It is no child of the tests' process, whose children tests count.
_SERVE = """
import importlib, os, sys, traceback
if os.fork():
    os._exit(0)
import triton
import torch

for line in sys.stdin:
    module, function, path = line.rstrip().split("\\t")
    child = os.fork()
    if child == 0:
        status = 1
        try:
            run = getattr(importlib.import_module(module), function)
            torch.save([run(*call) for call in torch.load(path)], path)
            status = 0
        except BaseException:
            with open(path + ".error", "w") as file:
                traceback.print_exc(file=file)
        finally:
            os._exit(status)
    print(path, os.waitpid(child, 0)[1], sep="\\t", flush=True)
"""


@cache
def _kernel_process(interpret: bool) -> subprocess.Popen[str]:
    """A process with Triton and torch imported, which takes seconds. It ends with its stdin."""
    modules = os.pathsep.join((str(TESTS), os.environ.get("PYTHONPATH", "")))
    environment = os.environ | {"PYTHONPATH": modules}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVE],
        env=environment,
        # Not the repository's root, whose folder `model` would hide `tests/model`.
        cwd=TESTS,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.wait() == 0
    return process


def interpreted(
    module: str, function: str, calls: list[tuple[Any, ...]], folder: Path, interpret: bool = True
) -> list[Any]:
    """Run a function that launches kernels, on the CPU by Triton's interpreter.

    Returns its result for each call. module: of llmkit ("llmkit.kernels.elementwise") or of the
    tests ("support.paged_cases"). It runs in a separate process, because Triton decides when it is
    imported whether it interprets; what it changes in modules ends with it. interpret: False for
    Triton as a GPU has it; then the function must not launch anything.
    """
    pytest.importorskip("triton")
    path = folder / f"{function}.pt"
    torch.save(calls, path)
    process = _kernel_process(interpret)
    assert process.stdin
    assert process.stdout
    process.stdin.write(f"{module}\t{function}\t{path}\n")
    process.stdin.flush()
    reply = ""
    while not reply.startswith(f"{path}\t"):  # those before are of tests that timed out
        reply = process.stdout.readline()
        assert reply, "the process of the interpreter has ended"
    status = reply.split()[-1]
    error = Path(f"{path}.error")
    assert status == "0", error.read_text() if error.exists() else f"wait status {status}"
    results: list[Any] = torch.load(path)
    return results


@dataclass(frozen=True)
class Compiled:
    """What a program of a compiled kernel needs on a GPU."""

    shared_bytes: int
    stack_bytes: int  # of each thread; spilled registers go there
    cubin: bytes

    @cached_property
    def code(self) -> str:
        """SASS. Its HGMMA instructions are Hopper's matrix products."""
        import triton

        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.cubin)
            file.flush()
            return _output(triton.knobs.nvidia.nvdisasm.path, "-c", file.name)


def compiled_for_hopper(
    kernel: Any, arguments: dict[str, str], constants: dict[str, Any], folder: Path
) -> Compiled:
    """`compiled_for` sm_90a, with 4 warps."""
    return compiled_for(90, kernel, arguments, constants, folder)


def compiled_for(
    capability: int,
    kernel: Any,
    arguments: dict[str, str],
    constants: dict[str, Any],
    folder: Path,
    **options: int,
) -> Compiled:
    """Compile a kernel for a compute capability (90 or 80).

    arguments: the types of those that are not constants ("*fp32", "i32"); pointers and integers
    are multiples of 16. options: num_warps, num_stages.
    """
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    nvidia = triton.knobs.nvidia
    try:
        cuobjdump = nvidia.ptxas.path and nvidia.cuobjdump.path
        assert nvidia.nvdisasm.path
    except RuntimeError as error:
        pytest.skip(str(error))
    signature = arguments | dict.fromkeys(constants, "constexpr")
    multiples = [name for name, kind in arguments.items() if kind[0] in "*i"]
    aligned = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in multiples}
    source = ASTSource(kernel, signature, constants, aligned)
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options={"enable_fp_fusion": True, **options})
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = _output(cuobjdump, "--dump-resource-usage", cubin)
    stack, local = (re.search(rf"\b{kind}:(\d+)", usage) for kind in ("STACK", "LOCAL"))
    assert stack and local, usage
    spilled_bytes = int(stack[1]) + int(local[1])
    return Compiled(compiled.metadata.shared, spilled_bytes, compiled.asm["cubin"])


def _output(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
