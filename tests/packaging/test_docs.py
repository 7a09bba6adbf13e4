"""The documents name files, headings and tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")],
    key=lambda page: page.name,
)
BY_NAME = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def text_of(page: Path) -> str:
    """The page without its code blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", text_of(page), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in plain}


@BY_NAME
def test_docs_links_lead_to_files_and_headings(page: Path) -> None:
    for link in LINK.findall(text_of(page)):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


@BY_NAME
def test_docs_name_tests_that_exist(page: Path) -> None:
    sources = "\n".join(
        path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")
    )
    files = {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    named = set(re.findall(r"\btest_\w+\b(?!:|\.json)", page.read_text(encoding="utf-8"))) - files
    missing = {name for name in named if f"def {name}(" not in sources}
    assert missing == set()


@BY_NAME
def test_docs_name_files_that_exist(page: Path) -> None:
    """Paths in backquotes that begin with a folder of the repository."""
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and path.name[0] != "."}
    for path in re.findall(r"`([\w./-]+)`", text_of(page)):
        if path.split("/")[0] in folders and "/" in path:
            assert (ROOT / path).exists(), path


def test_security_page_names_a_test_for_most_claims() -> None:
    page = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    assert len(set(re.findall(r"\btest_\w+", page))) > 25


def test_architecture_figures_have_boxes_that_are_files() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    figures = re.findall(r"^```text\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(figures) >= 2
    for figure in figures:
        files = re.findall(r"[\w/]+\.(?:py|c|h)\b", figure)
        assert len(files) >= 5
        for file in files:
            assert (ROOT / file).is_file(), file


def test_glossary_names_are_in_their_files() -> None:
    """A row is `| terms | meaning | files |`; identifiers among the terms occur in the files."""
    names = 0
    for line in (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8").splitlines():
        cells = line.strip("|").split("|")
        paths = [ROOT / path for path in re.findall(r"`([\w/.]+)`", cells[-1])]
        if not line.startswith("|") or len(cells) < 3 or not paths:
            continue
        sources = [file for path in paths for file in [path, *path.rglob("*.py")] if file.is_file()]
        text = "\n".join([str(file) + file.read_text(encoding="utf-8") for file in sources])
        for name in re.findall(r"\b(?:[a-z]\w*_\w+|[A-Z][a-z]+[A-Z]\w*)\b", cells[0]):
            names += 1
            assert name in text, line
    assert names > 300
