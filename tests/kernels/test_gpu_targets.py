"""All kernels that engines launch on a GPU, compiled for each kind of GPU.

An engine runs on a CPU that acts as the GPU, so that it chooses kernels and tiles as there. Triton
then compiles what was launched, with the same types, constants and alignments.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.test_cuda_devices import LOADED, MADE, _loaded, _steps, loaded_checkpoint
from support.fake_cuda import GPU
from support.fake_cuda_api import fake_gpu
from support.triton_checks import SHARED_BYTES, interpreted

from llmkit.bench.gpu.kernel_code import all_cases, kernel_code
from llmkit.bench.gpu.model_shapes import MODEL_CONFIGS, WEIGHT_SCHEMES, random_model
from llmkit.checkpoint.quantized_weight import Scheme
from llmkit.model.families import model_spec
from llmkit.runtime.engine.engine import Engine
from llmkit.runtime.engine.engine_config import EngineConfig

FP8_BLOCKS = Scheme(8, 64, kind="float", inputs="group", block_rows=64)
ENGINES = ("plain", "experts", "fp8 cache", "delta net", "mamba", *MADE, "fp8 blocks")


@dataclass(frozen=True)
class Target:
    """A kind of GPU."""

    capability: tuple[int, int]
    shared_bytes: int  # that a program may use
    amd: str = ""  # the architecture of an AMD GPU

    @property
    def engines(self) -> list[str]:
        """Those that run in Triton's kernels there: attention over FP8 needs FP8 products."""
        has_fp8 = self.capability >= (8, 9) and not self.amd
        return [engine for engine in ENGINES if has_fp8 or engine != "fp8 cache"]


TARGETS = {
    "sm_80": Target((8, 0), SHARED_BYTES[80]),
    "sm_86": Target((8, 6), 99 * 1024),
    "sm_89": Target((8, 9), 99 * 1024),
    "sm_90a": Target((9, 0), SHARED_BYTES[90]),
    "gfx90a": Target((9, 0), 64 * 1024, "gfx90a"),
    "gfx942": Target((9, 4), 64 * 1024, "gfx942"),
}
# Of a thread: a few registers, as some kernels need for the tiny models' odd sizes. The tests of
# each kernel have usual sizes, and allow nothing.
MAX_SPILLED_BYTES = 8
# kernel, its constants, shared bytes, spilled bytes, and an error or nothing
Row = tuple[str, str, int, int, str]


def compile_launches(engine: str, path: str, target_name: str, only: str = "") -> list[Row]:
    """Compile what an engine launches on a GPU, each kernel once for each set of constants.

    only: the beginning of the names of kernels; empty: all.
    """
    target = TARGETS[target_name]
    launched: dict[tuple[str, str], tuple[Any, ...]] = {}
    with fake_gpu() as gpu, _record_launches(launched):
        properties = torch.cuda.get_device_properties(0)
        properties.major, properties.minor = target.capability
        gpu.patch.setattr(torch.cuda, "get_device_capability", lambda *_: target.capability)
        gpu.patch.setattr(torch.version, "hip", "7.2" if target.amd else None)
        made = _made(engine) if engine in MADE or engine == "fp8 blocks" else None
        wrong = _steps(engine, made or _loaded(engine, Path(path)), path, gpu.device)
    assert not wrong
    return [
        _compile(target, name, constants, *launch)
        for (name, constants), launch in launched.items()
        if name.startswith(only)
    ]


def _made(weights: str) -> Engine:
    spec = model_spec(MODEL_CONFIGS["SmolLM2-135M"] | {"num_hidden_layers": 2, "vocab_size": 512})
    scheme = FP8_BLOCKS if weights == "fp8 blocks" else WEIGHT_SCHEMES[weights]
    model = random_model(spec, torch.bfloat16, GPU, scheme)
    return Engine(
        model,
        EngineConfig(128, 40, GPU, torch.bfloat16, max_num_seqs=6, max_num_batched_tokens=48),
    )


@contextmanager
def _record_launches(launched: dict[tuple[str, str], tuple[Any, ...]]) -> Iterator[None]:
    """Keep what Triton would compile, by kernel and constants."""
    from triton.runtime.jit import JITFunction

    stand_in = JITFunction._do_compile

    def record(
        self: Any, key: Any, signature: Any, device: Any, constants: Any, options: Any, *rest: Any
    ) -> Any:
        names = {self.arg_names[path[0]]: value for path, value in constants.items()}
        chosen = {name: value for name, value in names.items() if name.isupper() or value is None}
        launch = (self, signature, constants, options, rest[0])
        launched.setdefault((self.__name__, str(chosen)), launch)
        return stand_in(self, key, signature, device, constants, options, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "_do_compile", record)
        yield


def _compile(
    target: Target,
    name: str,
    constants: str,
    kernel: Any,
    signature: dict[str, str],
    values: dict[Any, Any],
    options: Any,
    attributes: Any,
) -> Row:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    gpu = GPUTarget("cuda", 10 * target.capability[0] + target.capability[1], 32)
    if target.amd:
        gpu = GPUTarget("hip", target.amd, 64)
    source = ASTSource(kernel, signature, values, attributes)
    chosen = {"num_warps": options.num_warps, "num_stages": options.num_stages}
    try:
        compiled = triton.compile(source, target=gpu, options=chosen)
    except Exception as error:  # the compiler's own exceptions are of all kinds
        return name, constants, 0, 0, f"{type(error).__name__}: {error}"[:400]
    return name, constants, compiled.metadata.shared, _spilled_bytes(compiled, target), ""


def _spilled_bytes(compiled: Any, target: Target) -> int:
    """The bytes of a thread that do not fit into registers."""
    if target.amd:
        lines = compiled.asm["amdgcn"].splitlines()
        found = [line.split(":")[1] for line in lines if ".private_segment_fixed_size:" in line]
        return int(found[0])
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    stack, local = (re.search(rf"\b{kind}:(\d+)", usage) for kind in ("STACK", "LOCAL"))
    assert stack and local, usage
    return int(stack[1]) + int(local[1])


def assert_fits(rows: list[Row], target: str) -> None:
    """Everything compiled, in registers and within the shared memory of the GPU."""
    assert rows
    for name, constants, shared_bytes, spilled_bytes, error in rows:
        what = f"{name} for {target}, {constants}"
        assert not error, f"{what}: {error}"
        assert shared_bytes <= TARGETS[target].shared_bytes, what
        assert spilled_bytes <= MAX_SPILLED_BYTES, what


def test_gpu_targets_take_kernels_of_8_bit_weights(tmp_path: Path) -> None:
    """Some of what `test_gpu_target_takes_every_kernel` checks."""
    calls = [
        ("fp8 blocks", "", "sm_86", "_fp8_block_linear"),
        ("fp8", "", "sm_89", "_add_norm"),
        ("int8", "", "gfx942", "_quantize_input"),
    ]
    results = interpreted(
        "kernels.test_gpu_targets", "compile_launches", calls, tmp_path, interpret=False
    )
    for (*_, target, _), rows in zip(calls, results, strict=True):
        assert_fits(rows, target)


@pytest.mark.parametrize("target", ["sm_86", "sm_89"])
@pytest.mark.parametrize("name", ["w4-1", "attention-decode-bf16", "attention-prefill-bf16"])
def test_gpus_with_little_shared_memory_take_kernels(name: str, target: str) -> None:
    """The tiles for 4-bit weights and attention, where nothing is tuned."""
    pytest.importorskip("triton")
    major, minor = TARGETS[target].capability
    (case,) = (case for case in all_cases(10 * major + minor) if case.name == name)
    code = kernel_code(case, target)
    # A thread of a prompt's tile spills two registers.
    assert code.spill_bytes <= (MAX_SPILLED_BYTES if "prefill" in name else 0)
    assert code.shared_bytes <= TARGETS[target].shared_bytes


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("target", TARGETS)
def test_gpu_target_takes_every_kernel(target: str, tmp_path: Path) -> None:
    for engine in TARGETS[target].engines:
        model = tmp_path / engine
        if engine in LOADED:
            loaded_checkpoint(model, engine)
        calls = [(engine, str(model), target)]
        (rows,) = interpreted(
            "kernels.test_gpu_targets", "compile_launches", calls, tmp_path, interpret=False
        )
        assert_fits(rows, target)
