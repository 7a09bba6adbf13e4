"""Mutation testing: which small changes of the code does no test notice?

    make mutants                           lines that the last commit has changed
    make mutants MUTANTS="--since v0.1"    lines changed since v0.1
    make mutants MUTANTS="--all shard bench/gates.py --sample 50"

Each mutant changes one operator, comparison, number or condition in a clone of the last commit. The
tests of the module, its folder and the modules that import it run on it, after they have passed
without it. A mutant that passes all of them has survived. The mutations are those of cosmic-ray,
which the environment must have.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from cosmic_ray.ast import ast_nodes, get_ast_from_path
from cosmic_ray.mutating import use_mutation
from cosmic_ray.operators.operator import Operator
from cosmic_ray.plugins import get_operator
from cosmic_ray.work_item import MutationSpec

ROOT = Path(__file__).resolve().parents[2]
TEST_TIMEOUT_S = 600.0
MAX_SURVIVING_PERCENT = 10.0
# Mutations that always mean something. Others of cosmic-ray change annotations (`int | None`) or
# replace an operator by one that fails at once.
OPERATORS = (
    "AddNot",
    "NumberReplacer",
    "ReplaceAndWithOr",
    "ReplaceBinaryOperator_Add_Sub",
    "ReplaceBinaryOperator_FloorDiv_Mul",
    "ReplaceBinaryOperator_Mod_Add",
    "ReplaceBinaryOperator_Mul_Add",
    "ReplaceBinaryOperator_Sub_Add",
    "ReplaceBreakWithContinue",
    "ReplaceComparisonOperator_Eq_NotEq",
    "ReplaceComparisonOperator_GtE_Gt",
    "ReplaceComparisonOperator_Gt_GtE",
    "ReplaceComparisonOperator_LtE_Lt",
    "ReplaceComparisonOperator_Lt_LtE",
    "ReplaceComparisonOperator_NotEq_Eq",
    "ReplaceContinueWithBreak",
    "ReplaceFalseWithTrue",
    "ReplaceOrWithAnd",
    "ReplaceTrueWithFalse",
    "ReplaceUnaryOperator_Delete_Not",
    "ZeroIterationForLoop",
)
# The folder in tests/ by the beginning of a module's path; the first that fits.
TEST_FOLDERS = {
    "runtime/server": "server",
    "runtime": "engine",
    **{name: name for name in ("bench", "checkpoint", "cli", "deploy", "kernels", "model")},
    **{name: name for name in ("pipeline", "quant", "shard")},
    "": "cli",
}


def git(*arguments: str) -> str:
    """The output of a git command in the repository."""
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def changed_lines(since: str) -> dict[str, set[int]]:
    """The lines of each file that the commits after `since` have added or changed."""
    lines: dict[str, set[int]] = {}
    file = ""
    for line in git("diff", "--unified=0", since, "HEAD", "--", "*.py").splitlines():
        if line.startswith("+++ b/"):
            file = line.removeprefix("+++ b/")
        hunk = re.match(r"@@ -\S+ \+(\d+)(?:,(\d+))? @@", line)
        if hunk:
            start = int(hunk[1])
            lines.setdefault(file, set()).update(range(start, start + int(hunk[2] or 1)))
    return lines


def copy_repository(target: Path, python: str) -> None:
    """A clone of the last commit, with its compiled kernels."""
    subprocess.run(["git", "clone", "--quiet", "--shared", ROOT, target], check=True)
    build = [python, "-c", "import setuptools; setuptools.setup()", "build_ext", "--inplace"]
    subprocess.run(build, cwd=target, check=True, capture_output=True)


def importers(module: str, files: Iterable[Path]) -> list[Path]:
    """The files that import a module, given by its path."""
    dotted = "llmkit." + module.removesuffix(".py").replace("/", ".")
    package, _, name = dotted.rpartition(".")
    imports = re.compile(rf"{re.escape(dotted)}\b|from {re.escape(package)} import .*\b{name}\b")
    return [file for file in files if imports.search(file.read_text(encoding="utf-8"))]


def tests_of(module: str, root: Path) -> list[str]:
    """The test files for a module, given by its path; those that find a mutant soonest come first.

    They import the module, are in its folder, or import a module that imports it.
    """
    tests = sorted((root / "tests").rglob("test_*.py"))
    direct = importers(module, tests)
    direct.sort(key=lambda file: Path(module).stem not in file.stem)  # its own tests first
    folder = next(name for start, name in TEST_FOLDERS.items() if module.startswith(start))
    indirect = [
        test
        for file in importers(module, chosen_files(["."], root))
        for test in importers(str(file.relative_to(root)), tests)
    ]
    of_folder = sorted((root / "tests" / folder).glob("test_*.py"))
    return [str(file) for file in dict.fromkeys([*direct, *of_folder, *indirect])]


def mutations(module: Path) -> Iterator[MutationSpec]:
    """All mutations of a module."""
    tree = get_ast_from_path(module)
    for name in OPERATORS:
        operator_name = f"core/{name}"
        operator_class = get_operator(operator_name)
        positions = (
            position
            for node in ast_nodes(tree)
            for position in operator_class().mutation_positions(node)
        )
        for occurrence, (start, end) in enumerate(positions):
            yield MutationSpec(
                module_path=module,
                operator_name=operator_name,
                occurrence=occurrence,
                start_pos=start,
                end_pos=end,
            )


def chosen_files(paths: list[str], root: Path) -> list[Path]:
    """The product's Python files among `paths`, which are files and folders."""
    files = []
    for path in paths:
        found = [root / path] if path.endswith(".py") else sorted((root / path).rglob("*.py"))
        for file in found:
            folder = file.relative_to(root).parts[0]
            if folder not in ("tests", "recipes") and not folder.startswith("."):
                files.append(file)
    return files


def start_pytest_server(python: str, root: Path) -> subprocess.Popen[str]:
    """Start the process that runs the tests of the clone at `root`."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(root / ".typecheck"),
        "OMP_NUM_THREADS": "1",
        # Python compares times in seconds: two mutants within one could share their bytecode.
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    compile_all = ["-m", "compileall", "-q", "--invalidation-mode", "checked-hash", "."]
    subprocess.run([python, *compile_all], cwd=root, check=True)
    return subprocess.Popen(
        [python, Path(__file__).with_name("pytest_server.py")],
        cwd=root,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def run_tests(server: subprocess.Popen[str], tests: list[str]) -> str:
    """The exit code of pytest on `tests`, or `timeout`."""
    assert server.stdin is not None and server.stdout is not None
    print(json.dumps({"tests": tests, "timeout_s": TEST_TIMEOUT_S}), file=server.stdin, flush=True)
    outcome = server.stdout.readline().strip()
    if not outcome:
        raise RuntimeError("the process that runs the tests has ended")
    return outcome


def operator_of(mutation: MutationSpec) -> Operator:
    """What makes the mutation."""
    operator: Operator = get_operator(mutation.operator_name)()
    return operator


def changed_text(before: str, after: str) -> list[str]:
    """The lines that differ, with `-` and `+`."""
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=0)
    return [line for line in lines if re.match(r"[+-](?![+-])", line)]


def run(arguments: argparse.Namespace, root: Path) -> int:
    """Try the mutants in the clone at `root`; the exit code."""
    lines = None
    if not arguments.all:
        lines = changed_lines(arguments.since)
    files = chosen_files(arguments.paths or sorted(lines or ()), root)
    modules = [str(file.relative_to(root)) for file in files]
    found = [(module, mutation) for module in modules for mutation in mutations(root / module)]
    if lines is not None:
        found = [(m, spec) for m, spec in found if spec.start_pos[0] in lines.get(m, ())]
    random.Random(arguments.seed).shuffle(found)
    found = found[: arguments.sample]
    os.chdir(root)
    server = start_pytest_server(arguments.python, root)
    survived = 0
    passes_unchanged: dict[str, bool] = {}
    for index, (module, mutation) in enumerate(found, start=1):
        tests = tests_of(module, root)
        if arguments.tests:
            tests = [str(root / path) for path in arguments.tests]
        if module not in passes_unchanged:
            passes_unchanged[module] = run_tests(server, tests) == "0"
        if not passes_unchanged[module]:
            raise RuntimeError(f"the tests of {module} fail without a mutant: {' '.join(tests)}")
        with use_mutation(root / module, operator_of(mutation), mutation.occurrence) as codes:
            outcome = run_tests(server, tests)
        is_survivor = outcome == "0"
        survived += is_survivor
        where = f"{module}:{mutation.start_pos[0]}"
        name = mutation.operator_name.removeprefix("core/")
        verdict = "SURVIVED" if is_survivor else "timeout" if outcome == "timeout" else "killed"
        print(f"{index}/{len(found)} {verdict} {where} {name}", flush=True)
        if is_survivor:
            print("\n".join(changed_text(*codes)), flush=True)
    server.terminate()
    percent = 100 * survived / max(len(found), 1)
    print(f"{survived} of {len(found)} mutants survived ({percent:.0f} %)")
    return int(percent > MAX_SURVIVING_PERCENT)


def main() -> int:
    """Run the program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("paths", nargs="*", help="files and folders; default: all that changed")
    parser.add_argument("--all", action="store_true", help="all lines, not only changed ones")
    parser.add_argument("--since", default="HEAD~1", help="the commit before the changes")
    parser.add_argument("--sample", type=int, default=100, help="at most so many mutants")
    parser.add_argument("--tests", nargs="*", help="run these test files only")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--python", default=str(ROOT / ".venv/bin/python"), help="runs the tests")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "llmkit"
        copy_repository(root, arguments.python)
        return run(arguments, root)


if __name__ == "__main__":
    sys.exit(main())
