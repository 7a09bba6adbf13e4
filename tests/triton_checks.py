"""Checking Triton kernels without a GPU: run by Triton's interpreter, and compiled for Hopper and Ampere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

HOPPER_SHARED_BYTES = 227 * 1024
SHARED_BYTES = {90: HOPPER_SHARED_BYTES, 80: 163 * 1024}  # that a program may use, by compute capability
_RUN = """
import importlib, sys, torch
module, function, path = sys.argv[1:]
run = getattr(importlib.import_module(module), function)
torch.save([run(*call) for call in torch.load(path)], path)
"""


def interpreted(
    module: str, function: str, calls: list[tuple[Any, ...]], folder: Path, interpret: bool = True
) -> list[Any]:
    """What a launching function of `module` returns for each call, its kernels run on the CPU by the interpreter.

    The module is one of llmkit or of the tests. In a process of its own, because Triton decides when it is imported
    whether it interprets. interpret: False for one that has Triton as a GPU has it, and must not launch anything.
    """
    pytest.importorskip("triton")
    path = folder / f"{function}.pt"
    torch.save(calls, path)
    modules = os.pathsep.join((str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")))
    environment = os.environ | {"PYTHONPATH": modules} | ({"TRITON_INTERPRET": "1"} if interpret else {})
    subprocess.run(
        [sys.executable, "-c", "import triton" + _RUN, module, function, str(path)],
        env=environment,
        check=True,
        timeout=240,
    )
    results: list[Any] = torch.load(path)
    return results


@dataclass(frozen=True)
class Compiled:
    """What a program of a kernel takes on a GPU."""

    shared_bytes: int
    stack_bytes: int  # of each thread; registers are spilled there
    code: str  # SASS; HGMMA in it are Hopper's matrix products


def compiled_for_hopper(kernel: Any, arguments: dict[str, str], constants: dict[str, Any], folder: Path) -> Compiled:
    """`compiled_for` sm_90a, with 4 warps."""
    return compiled_for(90, kernel, arguments, constants, folder)


def compiled_for(
    capability: int, kernel: Any, arguments: dict[str, str], constants: dict[str, Any], folder: Path,
    **options: int,
) -> Compiled:  # fmt: skip
    """Compile a kernel whose other arguments have the given types ("*fp32", "i32"), pointers and integers among them
    multiples of 16. options: num_warps, num_stages."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    nvidia = triton.knobs.nvidia
    try:
        cuobjdump, nvdisasm = nvidia.ptxas.path and nvidia.cuobjdump.path, nvidia.nvdisasm.path
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

    def output(*command: str | Path) -> str:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    usage = output(cuobjdump, "--dump-resource-usage", cubin)
    stack, local = (re.search(rf"\b{kind}:(\d+)", usage) for kind in ("STACK", "LOCAL"))
    assert stack and local, usage
    return Compiled(compiled.metadata.shared, int(stack[1]) + int(local[1]), output(nvdisasm, "-c", cubin))
