"""What the files for Lambda, Modal, RunPod and Replicate have in common."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llmkit.checkpoint.hub import is_hub_id, is_url
from llmkit.checkpoint.model_files import PICKLE_SUFFIXES
from llmkit.checkpoint.output_directory import (
    check_not_in_source,
    check_output,
    output_lock,
    partial_path,
    write_errors,
)
from llmkit.common.errors import InputError

_PACKAGE_SUFFIXES = (".whl", ".tar.gz")
_PACKAGES = "/opt/packages"  # the folder of the file in an image


@dataclass(frozen=True)
class Package:
    """llmkit, as pip installs it in a container.

    requirement: what pip takes; for a file, its name beside the other files. file: a wheel or
    source archive that is copied there; None: pip finds the requirement by itself.
    """

    requirement: str
    file: Path | None = None

    def copy_line(self) -> str:
        """The line of a Dockerfile that copies the file into the image; "" without one."""
        return f"COPY {self.requirement} {_PACKAGES}/\n" if self.file else ""

    def system_packages(self, *others: str) -> list[str]:
        """Debian's packages in the image where pip runs: `others`, and git where pip needs it."""
        return [*others, "git"] if "git+" in self.requirement else list(others)

    def in_image(self) -> str:
        """The argument of `pip install` in the image."""
        return f"{_PACKAGES}/{self.requirement}" if self.file else self.requirement


def find_package(text: str) -> Package:
    """The package that --package names. Raises InputError for a path that is no package."""
    path = Path(text)
    if path.is_file() and path.name.endswith(_PACKAGE_SUFFIXES):
        return Package(path.name, path)
    if path.exists() or (text.endswith(_PACKAGE_SUFFIXES) and "://" not in text):
        raise InputError(
            f"--package {text} is not a file of a package",
            "A wheel (.whl), a source archive (.tar.gz), or what pip takes, such as "
            "'llmkit @ git+https://…', was expected",
            "In a clone of llmkit, `python -m build --sdist` writes one to dist/",
        )
    return Package(text)


def local_model(model: str) -> Path | None:
    """The path of a model on this machine; None for a hub id. Raises InputError for neither."""
    path = Path(model)
    if path.exists():
        return path.resolve()
    if is_hub_id(model) and not is_url(model):
        return None
    raise InputError(f"{model} does not exist", "A checkpoint's path or a hub id was expected")


def model_bytes(path: Path) -> int:
    """The size of the files that `write_files` copies of a model."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if _is_copied(file))


def write_files(
    folder: Path, texts: Mapping[str, str], copies: Mapping[str, Path | None]
) -> list[str]:
    """Write a folder, all or nothing, and return its files.

    copies: files or folders by their new name; None: none. Raises OutputError when the folder is
    not empty, ShortageError when it cannot be written.
    """
    sources = {name: path for name, path in copies.items() if path is not None}
    need_bytes = sum(map(model_bytes, sources.values()))
    for source in sources.values():
        check_not_in_source(folder, source)
    with output_lock(folder):
        check_output(folder, None, need_bytes)
        partial = partial_path(folder)
        try:
            with write_errors(folder):
                _write_partial(partial, texts, sources)
                if folder.exists():
                    folder.rmdir()  # it is empty
                partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return [str(folder / name) for name in (*texts, *sources)]


def _write_partial(folder: Path, texts: Mapping[str, str], sources: Mapping[str, Path]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    for name, source in sources.items():
        _copy(source, folder / name)
    # Images keep the modes, and Lambda runs functions as another user.
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


def _copy(source: Path, target: Path) -> None:
    """Copy a file, or the files of a folder; what links point at is copied, too."""
    if source.is_file():
        shutil.copy2(source, target)
        return
    for file in sorted(source.rglob("*")):
        if _is_copied(file):
            copy = target / file.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, copy)


def _is_copied(file: Path) -> bool:
    """Whether a model's file is copied: no pickles, which are never loaded, and no hidden files."""
    return file.is_file() and file.suffix not in PICKLE_SUFFIXES and file.name[0] != "."


def image_name(folder: Path) -> str:
    """The name of a folder's image, as Docker and AWS take it."""
    return re.sub(r"[^a-z0-9]+", "-", folder.resolve().name.lower()).strip("-") or "llmkit"


def python_list(words: list[str] | tuple[str, ...]) -> str:
    """Words as a list in a Python file, one a line."""
    if not words:
        return "[]"
    return "[\n" + "".join(f"    {python_text(word)},\n" for word in words) + "]"


def python_text(text: str) -> str:
    """A string in a Python file."""
    return json.dumps(text, ensure_ascii=False)
