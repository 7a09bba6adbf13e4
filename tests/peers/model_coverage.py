"""How many of the text models that vLLM, SGLang and llm-compressor list llmkit runs.

Reads the lists from the programs' own sources: vLLM's registry in its environment, and the wheels
of SGLang and llm-compressor, which are downloaded and not installed. Writes them to
tests/data/peer_models.json, from which `make docs` writes docs/models.md, and prints the result.
Run it with `make coverage-models`.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.model_coverage import PEER_LISTS, counts, coverage, peer_lists

ROOT = Path(__file__).resolve().parents[2]
VLLM = "0.32.0"
VLLM_TABLE = "_TEXT_GENERATION_MODELS"
SGLANG = "0.5.23"
LLMCOMPRESSOR = "0.14.0.1"
CAUSAL_LM = re.compile(r"\w+(ForCausalLM|LMHeadModel)")
# SGLang's classes that are no architecture of a checkpoint: drafts, other engines' code, variants.
NO_MODEL = re.compile(
    r"Transformers|TorchNative|MindSpore|Quant|DFlash|Eagle3|Beam|Llava|YiVL"
    r"|\w*AssistantForCausalLM"
)


def vllm_models() -> list[str]:
    """The architectures of vLLM's table of text generation models."""
    (path,) = ROOT.glob(
        ".venv-vllm/lib/python3*/site-packages/vllm/model_executor/models/registry.py"
    )
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == VLLM_TABLE:
            return list(ast.literal_eval(node.value))
    raise SystemExit(f"{path} has no {VLLM_TABLE}")


def sglang_models(wheel: zipfile.ZipFile) -> list[str]:
    """The causal language models among SGLang's model classes that are not multimodal."""
    classes: set[str] = set()
    for name in wheel.namelist():
        if re.fullmatch(r"sglang/srt/models/\w+\.py", name):
            text = wheel.read(name).decode()
            entry = re.search(r"^EntryClass\s*=\s*(\[[^]]*\]|\w+)", text, re.MULTILINE)
            classes.update(re.findall(r"\w+", entry[1]) if entry else ())
    config = wheel.read("sglang/srt/configs/model_config.py").decode()
    listed = re.search(r"^multimodal_model_archs = \[(.*?)^\]", config, re.MULTILINE | re.DOTALL)
    if listed is None:
        raise SystemExit("SGLang has no multimodal_model_archs")
    multimodal = set(re.findall(r'"(\w+)"', listed[1]))
    return sorted(
        name
        for name in classes - multimodal
        if CAUSAL_LM.fullmatch(name) and not NO_MODEL.match(name)
    )


def llmcompressor_models(wheel: zipfile.ZipFile) -> list[str]:
    """The causal language models in llm-compressor's tables of mappings for AWQ and SmoothQuant."""
    found: set[str] = set()
    for name in wheel.namelist():
        if re.search(r"transform/(awq|smoothquant)/(dynamic_)?(mappings|utils)\.py$", name):
            names = re.findall(r'"(\w+)"', wheel.read(name).decode())
            found.update(filter(CAUSAL_LM.fullmatch, names))
    return sorted(found)


def wheel_of(requirement: str, directory: str) -> zipfile.ZipFile:
    """Download a package's wheel without what it depends on."""
    words = ["--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:"]
    command = [sys.executable, "-m", "pip", "download", *words, "--dest", directory, requirement]
    subprocess.run(command, check=True)
    (path,) = Path(directory).glob("*.whl")
    return zipfile.ZipFile(path)


def main() -> None:
    with TemporaryDirectory() as one, TemporaryDirectory() as other:
        sglang = sglang_models(wheel_of(f"sglang=={SGLANG}", one))
        llmcompressor = llmcompressor_models(wheel_of(f"llmcompressor=={LLMCOMPRESSOR}", other))
    entries = [
        {
            "name": "vLLM",
            "version": VLLM,
            "source": f"`{VLLM_TABLE}` of its registry",
            "architectures": vllm_models(),
        },
        {
            "name": "SGLang",
            "version": SGLANG,
            "source": "`EntryClass` of its model files: causal language models that are neither"
            " drafts nor multimodal",
            "architectures": sglang,
        },
        {
            "name": "llm-compressor",
            "version": LLMCOMPRESSOR,
            "source": "causal language models in its mappings for AWQ and SmoothQuant",
            "architectures": llmcompressor,
        },
    ]
    PEER_LISTS.write_text(json.dumps(entries, indent=1) + "\n")
    for peer in peer_lists():
        number = len(peer.architectures)
        print(f"{peer.name} {peer.version}: {number}, {counts(peer.architectures)}")
        for architecture in peer.architectures:
            print(f"  {architecture:40} {': '.join(filter(None, coverage(architecture)))}")


if __name__ == "__main__":
    main()
