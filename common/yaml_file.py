"""Reads YAML files and keeps line numbers, so that an error message can name the line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from llmkit.common.errors import UsageError


class YamlFile:
    """The `content` of a YAML file, and the `line` of each part.

    Raises UsageError, with file and line, for a file that cannot be read, for one that is not a
    mapping, and for a key that is set twice.
    """

    def __init__(self, path: str | Path, name: str = "") -> None:
        """name: the file's name in messages; default: its path."""
        self.name = name or str(path)
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{self.name}: {getattr(error, 'strerror', None) or error}") from error
        try:
            self._root = yaml.compose(text, Loader=yaml.SafeLoader)
            self.content: dict[str, Any] = yaml.safe_load(text) or {}
        except (yaml.YAMLError, RecursionError) as error:
            mark = getattr(error, "problem_mark", None)
            where = f"{self.name}:{mark.line + 1}" if mark else self.name
            raise UsageError(
                f"{where}: not valid YAML ({getattr(error, 'problem', None) or error})"
            ) from error
        if not isinstance(self.content, dict):
            raise UsageError(f"{self.name}:1: a list of `key: value` lines was expected")
        self._require_unique(self._root, set())

    def line(self, path: Sequence[str | int]) -> int:
        """The line of a path of keys and list indices, or of its longest part that exists."""
        node = self._root
        line = 1
        for step in path:
            if isinstance(node, yaml.MappingNode):
                for key, value in node.value:
                    if key.value == str(step):
                        line = key.start_mark.line + 1
                        node = value
                        break
            elif (
                isinstance(node, yaml.SequenceNode)
                and isinstance(step, int)
                and step < len(node.value)
            ):
                node = node.value[step]
                line = node.start_mark.line + 1
        return line

    def where(self, path: Sequence[str | int]) -> str:
        """The place of a path for a message: "recipe.yaml:12"."""
        return f"{self.name}:{self.line(path)}"

    def _require_unique(self, node: yaml.Node | None, seen: set[int]) -> None:
        if node is None or id(node) in seen:
            return
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            for item in node.value:
                self._require_unique(item, seen)
        elif isinstance(node, yaml.MappingNode):
            lines: dict[str, int] = {}
            for key, value in node.value:
                line = key.start_mark.line + 1
                if key.value in lines:
                    raise UsageError(
                        f"{self.name}:{line}: {key.value!r} was already set"
                        f" in line {lines[key.value]}"
                    )
                lines[key.value] = line
                self._require_unique(value, seen)
