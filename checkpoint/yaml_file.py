"""A YAML file with the line of everything in it, so that a mistake can be told where it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from llmkit.checkpoint.errors import UsageError


class YamlFile:
    """`content` is what the file says, `line` where it says it.

    Raises UsageError, with file and line, for what cannot be read, is no mapping, or sets a key twice.
    """

    def __init__(self, path: str | Path, name: str = "") -> None:
        """name: what messages call the file."""
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
            raise UsageError(f"{where}: not valid YAML ({getattr(error, 'problem', None) or error})") from error
        if not isinstance(self.content, dict):
            raise UsageError(f"{self.name}:1: a list of `key: value` lines was expected")
        self._require_unique(self._root, set())

    def line(self, place: Sequence[str | int]) -> int:
        """The line of the deepest part of a path of keys and list indices that is in the file."""
        node, line = self._root, 1
        for step in place:
            found = None
            if isinstance(node, yaml.MappingNode):
                found = next(((key, value) for key, value in node.value if key.value == str(step)), None)
            elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
                found = node.value[step], node.value[step]
            if found is not None:
                line, node = found[0].start_mark.line + 1, found[1]
        return line

    def where(self, place: Sequence[str | int]) -> str:
        """ "recipe.yaml:12", for a message."""
        return f"{self.name}:{self.line(place)}"

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
                    raise UsageError(f"{self.name}:{line}: {key.value!r} was already set in line {lines[key.value]}")
                lines[key.value] = line
                self._require_unique(value, seen)
