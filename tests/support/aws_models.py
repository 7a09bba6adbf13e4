"""Calls of AWS' API checked against AWS' own descriptions, which botocore has."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import botocore.session
from botocore.validate import ParamValidator

# Classes of characters that Python's patterns do not have.
_CLASSES = {r"\p{Print}": "[ -~]", r"\p{L}": "a-zA-Z", r"\p{N}": "0-9", r"\p{Z}": " "}
# `aws`, for a script of calls: one line for each, with its JSON.
_FAKE_CLI = """#!/bin/sh
echo "$1 $2" >> "$CALLS"
if [ "$2" != wait ]; then printf '%s' "$4" | python3 -m json.tool > /dev/null; fi
"""


@cache
def _service(name: str) -> Any:
    return botocore.session.get_session().get_service_model(name)


def check_call(call: Mapping[str, Any]) -> None:
    """Assert that AWS' description of an operation allows these parameters."""
    shape = _service(call["service"]).operation_model(call["operation"]).input_shape
    report = ParamValidator().validate(call["parameters"], shape)
    assert not report.has_errors(), report.generate_report()
    _check_values(shape, call["parameters"], call["operation"])


def _check_values(shape: Any, value: Any, where: str) -> None:
    """Assert that strings match their patterns and numbers their limits."""
    if shape.type_name == "structure":
        for name, item in value.items():
            _check_values(shape.members[name], item, f"{where}.{name}")
    elif shape.type_name == "list":
        for item in value:
            _check_values(shape.member, item, where)
    elif shape.type_name == "map":
        for item in value.values():
            _check_values(shape.value, item, where)
    limits = shape.metadata
    if shape.type_name == "string":
        assert not limits.get("enum") or value in limits["enum"], f"{where}: {value}"
        pattern = limits.get("pattern", "")
        if pattern and "\ud800" not in pattern and r"\uD800" not in pattern:  # all of Unicode
            for unicode_class, ascii_class in _CLASSES.items():
                pattern = pattern.replace(unicode_class, ascii_class)
            assert re.fullmatch(pattern, value), f"{where}: {value}"
        assert len(value) <= limits.get("max", len(value)), f"{where}: {value}"
    if shape.type_name in ("integer", "long", "float", "double"):
        assert limits.get("min", value) <= value <= limits.get("max", value), f"{where}: {value}"


def run_script(script: Path, folder: Path) -> list[str]:
    """Run a script of calls with a fake `aws`; return "SERVICE OPERATION" of each."""
    fake = folder / "aws"
    fake.write_text(_FAKE_CLI)
    fake.chmod(0o755)
    calls = folder / "calls"
    environment = {"PATH": f"{folder}:/usr/bin:/bin", "CALLS": str(calls)}
    subprocess.run(["sh", script], env=environment, check=True)
    return calls.read_text().splitlines()
