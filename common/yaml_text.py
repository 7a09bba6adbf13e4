"""YAML for people: no anchors, and texts of several lines as they are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import yaml


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        """Repeat a value that occurs twice, in place of an anchor."""
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else "")


_Dumper.add_representer(str, _represent_text)


def yaml_text(documents: Iterable[Any]) -> str:
    """The documents, one after another, with keys in their order."""
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=120)
