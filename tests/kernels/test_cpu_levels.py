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


def levels_that_pass(*command: str | Path) -> list[str]:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.split()


@pytest.fixture(scope="module")
def arm_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("arm") / "check_levels"
    return compile_program(ARM_COMPILER, program, "-static")


@needs_arm
def test_arm_level_of_bf16_equals_plain_loops(tmp_path: Path) -> None:
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


@pytest.mark.slow  # test_cpu_kernels.py runs the same levels from Python
@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "aarch64", "arm64"),
    reason="an architecture without levels",
)
def test_levels_of_this_machine_equal_plain_loops(tmp_path: Path) -> None:
    levels = levels_that_pass(compile_program("cc", tmp_path / "check_levels"))
    assert levels == (cpu_kernels.levels() or levels)
