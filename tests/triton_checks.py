"""Checking Triton kernels without a GPU: run by Triton's interpreter, and compiled for Hopper."""

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
_RUN = """
import importlib, sys, torch
module, function, path = sys.argv[1:]
run = getattr(importlib.import_module(module), function)
torch.save([run(*call) for call in torch.load(path)], path)
"""


def interpreted(module: str, function: str, calls: list[tuple[Any, ...]], folder: Path) -> list[Any]:
    """What a launching function of `module` returns for each call, its kernels run on the CPU by the interpreter.

    In a process of its own, because Triton decides when it is imported whether it interprets.
    """
    pytest.importorskip("triton")
    path = folder / f"{function}.pt"
    torch.save(calls, path)
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", _RUN, module, function, str(path)], env=environment, check=True, timeout=240)
    results: list[Any] = torch.load(path)
    return results


@dataclass(frozen=True)
class Compiled:
    """What a program of a kernel takes on sm_90a."""

    shared_bytes: int
    stack_bytes: int  # of each thread; registers are spilled there


def compiled_for_hopper(kernel: Any, arguments: dict[str, str], constants: dict[str, Any], folder: Path) -> Compiled:
    """Compile a kernel whose other arguments have the given types ("*fp32", "i32"), all of them aligned to 16."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    try:
        cuobjdump = triton.knobs.nvidia.ptxas.path and triton.knobs.nvidia.cuobjdump.path
    except RuntimeError as error:
        pytest.skip(str(error))
    signature = arguments | dict.fromkeys(constants, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(arguments))}
    source = ASTSource(kernel, signature, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": True})
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = subprocess.run(
        [cuobjdump, "--dump-resource-usage", cubin], check=True, capture_output=True, text=True
    ).stdout
    stack, local = (re.search(rf"\b{kind}:(\d+)", usage) for kind in ("STACK", "LOCAL"))
    assert stack and local, usage
    return Compiled(compiled.metadata.shared, int(stack[1]) + int(local[1]))
