"""`llmkit deploy trtllm` beside NVIDIA's own generator of TensorRT-LLM's options.

The package aiconfigurator has a template of the options for each version of TensorRT-LLM, whose
classes refuse unknown fields. Its templates are rendered here; the package is never imported.
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jinja2
import pytest
import yaml
from support.tiny_models import tiny_checkpoint

from llmkit.cli.main import run

VERSIONS = re.compile(r"extra_engine_args\.(1\.[2-9]\S*)\.yaml\.j2")
# Values for what a template needs. Others have defaults in the templates.
VALUES = {
    "tensor_parallel_size": 2,
    "pipeline_parallel_size": 1,
    "max_batch_size": 64,
    "max_num_tokens": 8192,
    "max_seq_len": 4096,
    "kv_cache_config": {"tokens_per_block": 32},
    "cuda_graph_config": {},
    "cache_transceiver_config": {},
    "speculative_config": {},
}
# A field of CudaGraphConfig beside `batch_sizes`, which the templates use in its place.
NOT_IN_TEMPLATES = {"cuda_graph_config.max_batch_size"}
# Options that some of the templates leave to the command line (`cli_args.j2`).
ON_COMMAND_LINE = {"max_batch_size", "max_num_tokens", "max_seq_len"}
Read = pytest.CaptureFixture[str]


def templates() -> dict[str, Path]:
    """The templates of TensorRT-LLM 1.2 and later, by version."""
    package = find_spec("aiconfigurator")
    assert package is not None and package.origin is not None
    folder = Path(package.origin).parent / "generator/config/backend_templates/trtllm"
    found = {path: VERSIONS.fullmatch(path.name) for path in sorted(folder.iterdir())}
    return {match[1]: path for path, match in found.items() if match}


def field_types(options: dict[str, Any], prefix: str = "") -> dict[str, type]:
    """The types of all fields, by path: `kv_cache_config.dtype`."""
    types: dict[str, type] = {}
    for name, value in options.items():
        if isinstance(value, dict):
            types |= field_types(value, f"{prefix}{name}.")
        else:
            types[prefix + name] = type(value)
    return types


@pytest.mark.parametrize("version", templates())
def test_trtllm_options_are_those_of_nvidias_generator(
    version: str, tmp_path: Path, capsys: Read
) -> None:
    rendered = jinja2.Template(templates()[version].read_text()).render(VALUES)
    theirs = field_types(yaml.safe_load(rendered))
    assert len(theirs) > 12
    model = tiny_checkpoint(tmp_path / "model")
    words = ["deploy", "trtllm", str(model), "--gpu", "h200", "--tokens", "64"]
    assert run([*words, "--kv-cache-dtype", "fp8", "--max-num-seqs", "32"]) == 0
    ours = field_types(yaml.safe_load(capsys.readouterr().out))
    assert ours.keys() - theirs.keys() - ON_COMMAND_LINE == NOT_IN_TEMPLATES
    assert {name: theirs[name] for name in ours.keys() & theirs.keys()} == {
        name: kind for name, kind in ours.items() if name in theirs
    }


def test_trtllm_templates_are_of_several_versions() -> None:
    found = templates()
    assert len(found) >= 9 and any(version.startswith("1.3") for version in found)
    command_line = (next(iter(found.values())).parent / "cli_args.j2").read_text()
    for name in ON_COMMAND_LINE:
        assert f"--{name.replace('_', '-')}" in command_line
