"""The kernels of every level against plain C loops: a C program, also run as Arm in qemu."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from llmkit.kernels.cpu import cpu_kernels

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "kernels/cpu"
ARM_COMPILER = "aarch64-linux-gnu-gcc"
EMULATOR = "qemu-aarch64"
needs_arm = pytest.mark.skipif(
    not (shutil.which(ARM_COMPILER) and shutil.which(EMULATOR)),
    reason=f"no {ARM_COMPILER} or no {EMULATOR} (CONTRIBUTING.md says how to install them)",
)


FLAGS = ("-std=gnu11", "-Wall", "-Wextra", "-Werror", "-pthread", f"-I{SOURCES}")


def compile_program(compiler: str, program: Path, *options: str, levels: str = "level*.c") -> Path:
    """levels: the files of the levels, a pattern."""
    # Without optimization, the compiler takes a fifth of the time.
    optimization = os.environ.get("LLMKIT_TEST_OPTIMIZATION", "-O0")
    sources = [*sorted(SOURCES.glob(levels)), SOURCES / "thread_pool.c"]
    sources.append(ROOT / "tests/kernels/check_levels.c")
    flags = [optimization, *FLAGS, "-ffp-contract=off"]
    command = [compiler, *flags, *options, *sources, "-lm", "-o", program]
    subprocess.run(command, check=True)
    return program


AMX_DOUBLE = ROOT / "tests/kernels/amx_emulation.h"
needs_avx512_bf16 = pytest.mark.skipif(
    shutil.which("cc") is None or "avx512_bf16" not in cpu_kernels.levels(),
    reason="no C compiler, or no AVX512-BF16, which AMX's level needs beside the double of tiles",
)


def levels_that_pass(*command: str | Path) -> list[str]:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.split()


@pytest.fixture(scope="module")
def arm_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("arm") / "check_levels"
    return compile_program(ARM_COMPILER, program, "-static")


@needs_arm
def test_arm_level_with_products_of_matrices_equals_plain_loops(tmp_path: Path) -> None:
    """The level with the most instructions, at few sizes: compiling it takes most of the time."""
    options = ("-static", "-DONLY_LEVEL=kernels_neon_bf16")
    program = compile_program(
        ARM_COMPILER, tmp_path / "check_level", *options, levels="level_neon_bf16.c"
    )
    # The emulator takes long for the pointers that this processor signs.
    assert levels_that_pass(EMULATOR, "-cpu", "max,pauth=off", program, "few") == ["neon_bf16"]


@needs_arm
@pytest.mark.parametrize("name", ["level_neon", "level_neon_dotprod"])
def test_arm_level_has_no_errors_of_the_compiler(name: str) -> None:
    command = [ARM_COMPILER, *FLAGS, "-fsyntax-only", SOURCES / f"{name}.c"]
    subprocess.run(command, check=True)


@needs_arm
@pytest.mark.slow
@pytest.mark.parametrize(
    ("cpu", "levels"),
    [
        ("cortex-a53", ["neon"]),
        ("neoverse-n1", ["neon", "neon_dotprod"]),
        ("max", ["neon", "neon_dotprod", "neon_bf16"]),
    ],
)
def test_arm_levels_equal_plain_loops(arm_program: Path, cpu: str, levels: list[str]) -> None:
    assert levels_that_pass(EMULATOR, "-cpu", cpu, arm_program) == levels


@needs_avx512_bf16
def test_amx_double_follows_the_pseudocode_of_intel(tmp_path: Path) -> None:
    program = tmp_path / "check_amx_emulation"
    source = AMX_DOUBLE.with_name("check_amx_emulation.c")
    subprocess.run(["cc", *FLAGS, "-ffp-contract=off", source, "-lm", "-o", program], check=True)
    assert levels_that_pass(program) == ["passed"]


@needs_avx512_bf16
def test_amx_level_with_a_double_of_tiles_equals_plain_loops(tmp_path: Path) -> None:
    """The level's own code on any processor with AVX512-BF16: only the tiles are emulated."""
    options = ("-include", str(AMX_DOUBLE), "-DONLY_LEVEL=kernels_amx")
    program = compile_program("cc", tmp_path / "check_amx", *options, levels="level_amx.c")
    assert levels_that_pass(program) == ["amx"]


@pytest.mark.slow  # test_cpu_kernels.py runs the same levels from Python
@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "aarch64", "arm64"),
    reason="an architecture without levels",
)
def test_levels_of_this_machine_equal_plain_loops(tmp_path: Path) -> None:
    levels = levels_that_pass(compile_program("cc", tmp_path / "check_levels"))
    assert levels == (cpu_kernels.levels() or levels)
