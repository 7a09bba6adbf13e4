"""The CPU kernels' thread pool beside helpers that do not come: a C program decides when they run.

A pool that waits for a helper that is held never ends; then the time limit fails the test.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "kernels/cpu"
TIMEOUT_S = 120  # a check takes milliseconds; a busy machine may take longer
WRAPPED = ("pthread_create", "clock_gettime", "nanosleep", "open", "close", "read")
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None,
    reason="needs a C compiler and a linker with --wrap",
)


def compile_program(program: Path, *options: str) -> Path:
    flags = [
        "-std=gnu11",
        "-O1",
        "-g",
        "-U_FORTIFY_SOURCE",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-pthread",
        f"-I{SOURCES}",
    ]
    sources = [SOURCES / "thread_pool.c", ROOT / "tests/kernels/check_thread_pool.c"]
    wrap = [f"-Wl,--wrap={name}" for name in WRAPPED]
    subprocess.run(["cc", *flags, *options, *sources, *wrap, "-o", program], check=True)
    return program


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_program(tmp_path_factory.mktemp("pool") / "check_thread_pool")


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


@pytest.mark.parametrize(
    "check",
    [
        pytest.param("absent_helpers", id="caller_takes_all_pieces_when_no_helper_comes"),
        pytest.param("held_helper", id="caller_waits_only_for_pieces_that_were_taken"),
        pytest.param("busy_pool", id="caller_is_alone_while_another_thread_has_the_helpers"),
        pytest.param("nested", id="operation_within_a_piece_runs_alone"),
        pytest.param("fewer_threads", id="unwanted_helpers_take_no_pieces"),
        pytest.param("shares", id="thread_takes_consecutive_pieces_then_those_of_others"),
        pytest.param("many_pieces", id="too_many_pieces_run_on_the_caller"),
        pytest.param("fork", id="child_process_starts_its_own_helpers"),
        pytest.param("ranges", id="ranges_have_each_item_once"),
        pytest.param("rests", id="helper_that_waits_for_a_core_rests"),
        pytest.param("rests_for_caller", id="helper_rests_when_the_caller_waits_for_a_core"),
        pytest.param("no_schedstat", id="no_rests_without_the_systems_figures"),
    ],
)
def test_thread_pool(program: Path, check: str) -> None:
    result = run(program, check)
    assert (result.returncode, result.stdout) == (0, "passed\n"), result.stderr


def test_thread_pool_has_no_data_races(tmp_path: Path) -> None:
    try:
        program = compile_program(tmp_path / "check_thread_pool", "-fsanitize=thread")
    except subprocess.CalledProcessError:
        pytest.skip("the compiler has no thread sanitizer")
    for check in ("absent_helpers", "held_helper", "busy_pool", "fewer_threads", "rests"):
        result = run(program, check)
        if "unexpected memory mapping" in result.stderr:
            pytest.skip("the thread sanitizer does not run with this system's memory layout")
        assert (result.returncode, result.stdout) == (0, "passed\n"), result.stderr
