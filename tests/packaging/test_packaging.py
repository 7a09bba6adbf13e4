"""The folders, pyproject.toml and .typecheck say the same of what the package is."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import hypothesis

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]
NOT_PACKAGES = {"tests", "docs", "build", "dist"}


def package_folders() -> list[Path]:
    """Every folder with an __init__.py, relative to the root."""
    tops = [
        p
        for p in ROOT.iterdir()
        if p.is_dir() and not p.name.startswith(".") and p.name not in NOT_PACKAGES
    ]
    return sorted(
        init.parent.relative_to(ROOT) for top in tops for init in top.rglob("__init__.py")
    )


def dotted(folder: Path) -> str:
    return ".".join(("llmkit", *folder.parts))


def test_every_subpackage_is_listed_and_nothing_else() -> None:
    expected = {dotted(folder): folder.as_posix() for folder in package_folders()}
    # The folder of `python -m llmkit`. It has no __init__.py: llmkit is a namespace package.
    expected["llmkit"] = "cli/program"
    assert set(SETUPTOOLS["packages"]) == set(expected)
    assert SETUPTOOLS["package-dir"] == expected


def test_every_subpackage_is_typed() -> None:
    top = [folder for folder in package_folders() if len(folder.parts) == 1]
    assert [folder for folder in top if not (ROOT / folder / "py.typed").exists()] == []
    assert "py.typed" in SETUPTOOLS["package-data"]["*"]


def test_type_checker_links_lead_to_the_folders() -> None:
    links = ROOT / ".typecheck" / "llmkit"
    top = {folder.name for folder in package_folders() if len(folder.parts) == 1}
    assert {link.name for link in links.iterdir()} == top
    for link in links.iterdir():
        assert link.is_symlink()
        assert not link.readlink().is_absolute()
        assert link.resolve() == ROOT / link.name


def test_packages_import_nothing_by_themselves() -> None:
    """Importing a package runs its __init__.py, and `llmkit --help` must not import torch."""
    for folder in package_folders():
        tree = ast.parse((ROOT / folder / "__init__.py").read_text())
        (docstring,) = tree.body
        assert isinstance(docstring, ast.Expr), folder


def test_import_rules_cover_every_package() -> None:
    roots = set(PROJECT["tool"]["importlinter"]["root_packages"])
    assert roots == {dotted(folder) for folder in package_folders() if len(folder.parts) == 1} - {
        "llmkit.recipes"
    }


def product_files(*suffixes: str) -> list[Path]:
    """The files of the packages with these suffixes, relative to the root."""
    tops = {folder.parts[0] for folder in package_folders()}
    found = []
    for top in sorted(tops):
        found += [
            path.relative_to(ROOT) for path in (ROOT / top).rglob("*") if path.suffix in suffixes
        ]
    return found


def test_product_files_have_different_names() -> None:
    names: dict[str, list[str]] = {}
    for path in product_files(".py"):
        if path.name != "__init__.py":
            names.setdefault(path.name, []).append(path.as_posix())
    assert {name: paths for name, paths in names.items() if len(paths) > 1} == {}


def test_no_line_is_longer_than_100_columns() -> None:
    tests = [path.relative_to(ROOT) for path in (ROOT / "tests").rglob("*.py")]
    long_lines = []
    for path in [*product_files(".py", ".c", ".h", ".js"), *tests]:
        if "vendor" in path.parts or path.name.endswith(".min.js"):
            continue
        for number, line in enumerate((ROOT / path).read_text().splitlines(), start=1):
            if len(line) > 100:
                long_lines.append(f"{path}:{number}")
    assert long_lines == []


def test_hypothesis_tries_the_same_examples_in_every_run() -> None:
    """By the profile in tests/conftest.py; no test has an exception of its own."""
    assert hypothesis.settings().derandomize is True
    assert hypothesis.settings(max_examples=3).deadline is None
    for path in (ROOT / "tests").rglob("*.py"):
        if path.name != "conftest.py":
            calls = re.findall(r"settings\(([^)]*)", path.read_text())
            assert not any("derandomize=" in call or "deadline=" in call for call in calls), path


def test_versions_agree() -> None:
    newest = next(
        line
        for line in (ROOT / "CHANGELOG.md").read_text().splitlines()
        if line.startswith("## [0")
    )
    assert newest == f"## [{PROJECT['project']['version']}]"


def test_license_is_apache_2() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License\n                           Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
