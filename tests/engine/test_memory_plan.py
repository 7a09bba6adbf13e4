"""The memory plan: its arithmetic, its errors, and `llmkit serve --plan`."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.float_format_cases import INPUT_SCALE, SCHEMES, random_quantized
from support.tiny_models import tiny_checkpoint

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.checkpoint.quantized_weight import QuantizationConfig, Scheme
from llmkit.cli import main
from llmkit.common.errors import InputError, ShortageError, is_out_of_memory
from llmkit.kernels.cpu import cpu_kernels
from llmkit.model import linear
from llmkit.model.device import lazy_zeros
from llmkit.model.families import model_spec
from llmkit.model.linear import (
    ActivationQuant,
    PackedLinear,
    gpu_kernel_type,
    keeps_weights_packed,
    pack_weight,
    serving_linear,
)
from llmkit.model.spec import ModelSpec
from llmkit.model.weight_loader import load_model
from llmkit.quant.inspect_checkpoint import parameter_count
from llmkit.runtime import engine_plan
from llmkit.runtime import memory_plan as memory
from llmkit.runtime.engine.engine_options import EngineOptions
from llmkit.runtime.engine_loader import load_engine
from llmkit.runtime.engine_plan import plan_engine
from llmkit.runtime.memory_plan import (
    MemoryPlan,
    StateMemory,
    estimate_workspace,
    free_bytes,
    loaded_bytes,
    plan_memory,
    weight_bytes,
)
from llmkit.runtime.part_loader import StartupReport

BLOCK = 2 * 2 * 2 * 16 * 4 * 16  # bytes: k and v, layers, KV heads, head_dim, float32, tokens
MEBI = 1 << 20


@pytest.fixture(scope="module")
def spec(model: Path) -> ModelSpec:
    return model_spec(open_checkpoint(model).config)


def plan(spec: ModelSpec, free: int, device: str = "cpu", **given: Any) -> MemoryPlan:
    chosen: dict[str, Any] = {
        "weight_bytes": 1000,
        "workspace_bytes": 100,
        "kv_bytes_per_token": BLOCK // 16,
        "max_model_len": None,
        "max_num_seqs": 256,
        "kv_cache_memory": None,
    }
    return plan_memory(spec, device, free_bytes=free, **(chosen | given))


def test_kv_cache_gets_what_weights_and_workspace_leave(spec: ModelSpec) -> None:
    half = plan(spec, 1100 + 40 * BLOCK + 1)
    size = 1100 + 40 * BLOCK + 1
    assert half == MemoryPlan(size, 1000, 100, 20, BLOCK, 16, 256, 256, max_num_seqs=256)
    assert (half.kv_cache_bytes, half.num_requests(256), half.num_requests(33)) == (
        20 * BLOCK,
        1,
        6,
    )
    assert plan(spec, 1100 + 20 * BLOCK, "cuda").num_blocks == 20
    assert plan(spec, 1100 + 20 * BLOCK, "cuda", kv_bytes_per_token=BLOCK // 32).num_blocks == 40
    assert plan(spec, 1 << 40, max_num_seqs=3).num_blocks == 3 * 16  # no more than can be used
    assert plan(spec, 1 << 40, "cuda", max_model_len=17, max_num_seqs=5).num_blocks == 5 * 2


def test_kv_cache_on_a_cpu_is_small_unless_one_request_needs_more(spec: ModelSpec) -> None:
    many = {"max_num_seqs": 1 << 20}
    assert plan(spec, 1 << 40, **many).kv_cache_bytes == memory.CPU_KV_CACHE_BYTES
    long = replace(spec, max_position_embeddings=1 << 22)
    assert (
        plan(long, 1 << 40, **many).num_blocks * 16 == plan(long, 1 << 40).max_model_len == 1 << 22
    )
    assert plan(long, 1 << 40, max_model_len=64, **many).kv_cache_bytes == memory.CPU_KV_CACHE_BYTES
    assert plan(long, 1100 + 80 * BLOCK).max_model_len == 40 * 16  # the most that fits
    assert plan(long, 1 << 40, kv_cache_memory=100 * BLOCK).max_model_len == 1600


@pytest.mark.parametrize(
    ("kind", "given", "free", "message"),
    [
        (
            InputError,
            {"max_model_len": 257},
            1 << 40,
            "--max-model-len 257 is over .* At most 256 tokens .*len 256",
        ),
        (
            ShortageError,
            {},
            1099,
            "workspace do not fit on cpu. The weights leave 99 .*--max-num-batched-tokens",
        ),
        (
            ShortageError,
            {"kv_cache_memory": 6},
            1105,
            "--kv-cache-memory 6 bytes does not fit .* leave 5 bytes",
        ),
        (
            ShortageError,
            {"kv_cache_memory": 6 * BLOCK, "max_model_len": 200},
            1 << 40,
            "one request of 200 tokens: that needs .* At most 96 tokens fit. "
            "Use --kv-cache-memory 1MiB or use --max-model-len 96",
        ),
        (
            ShortageError,
            {},
            1105,
            "holds 0 tokens. At least 256 for one request .* Free some memory or use a smaller",
        ),
        (
            ShortageError,
            {"kv_cache_memory": 15 * BLOCK},
            1 << 40,
            "is too small: it holds 240 tokens. At least 256 for one request were expected; that "
            r"needs 131072 bytes .* and there are 122880 bytes .*\. Use --kv-cache-memory 1MiB or "
            "use --max-model-len 240 if so short a context is enough",
        ),
    ],
)
def test_plan_memory_refuses_what_does_not_fit(
    spec: ModelSpec, kind: type[InputError], given: dict[str, Any], free: int, message: str
) -> None:
    with pytest.raises(kind, match=message):
        plan(spec, free, **given)


@pytest.mark.parametrize("packs", [False, True])
def test_weight_bytes_are_those_in_memory(
    spec: ModelSpec, model: Path, monkeypatch: pytest.MonkeyPatch, packs: bool
) -> None:
    monkeypatch.setattr(memory, "keeps_weights_packed", lambda: packs)
    count = parameter_count(spec)
    cpu = torch.device("cpu")
    cuda = torch.device("cuda")
    stored = SimpleNamespace(
        quantization=None, tensors=open_checkpoint(model).tensors
    )  # of bfloat16
    norms = 5 * 64
    assert weight_bytes(stored, spec, torch.float32, cuda) == count * 4
    assert weight_bytes(stored, spec, torch.float32, cpu) == (
        2 * count + 2 * norms if packs else count * 4
    )
    stored.quantization = QuantizationConfig("compressed-tensors", Scheme(8))
    assert weight_bytes(stored, spec, torch.bfloat16, cuda) == count * 2
    layer = (64 + 32 + 32) * 64 + 64 * 64 + 2 * 128 * 64 + 64 * 128  # qkv, o, gate_up, down
    rows = (64 + 32 + 32) + 64 + 2 * 128 + 64
    packed = 2 * (layer + 4 * rows) + 2 * (count - 2 * layer)
    assert weight_bytes(stored, spec, torch.bfloat16, cpu) == (packed if packs else count * 2)
    tied = replace(spec, tie_word_embeddings=True)
    more = 512 * 64 * 2 if packs else 0  # looked up, and multiplied with
    table = 512 * 64 * 2
    assert (
        weight_bytes(stored, tied, torch.bfloat16, cpu)
        == (packed if packs else count * 2) - table + more
    )


def test_kv_bytes_per_token(spec: ModelSpec) -> None:
    assert spec.kv_bytes_per_token(4) == BLOCK // 16
    assert spec.kv_bytes_per_token(2) == BLOCK // 32
    assert spec.kv_bytes_per_token(1, per_token_head_scales=True) == 2 * 2 * 2 * (
        16 + 4
    )  # quantized values and a float32 scale


@pytest.mark.parametrize(
    ("kv_cache_dtype", "itemsize"),
    [("auto", 0), ("float32", 4), ("bfloat16", 2), ("float16", 2), ("int8", 1), ("fp8", 1)],
)
def test_kv_cache_is_as_large_as_planned(
    spec: ModelSpec, model: Path, kv_cache_dtype: str, itemsize: int
) -> None:
    checkpoint = open_checkpoint(model)
    itemsize = itemsize or (2 if cpu_kernels.has_bfloat16() else 4)  # the model is in bfloat16
    plan = plan_engine(checkpoint, EngineOptions(device="cpu", kv_cache_dtype=kv_cache_dtype))
    decoder = load_model(open_checkpoint(model), torch.float32)
    cache = decoder.new_kv_cache(10, 16, plan.kv_cache_dtype)
    size = cache.kv.nbytes + (0 if cache.scales is None else cache.scales.nbytes)
    assert size * len(spec.layers) == 160 * plan.memory.as_dict()["kv_bytes_per_token"]
    assert plan.memory.as_dict()["kv_bytes_per_token"] == spec.kv_bytes_per_token(
        itemsize, per_token_head_scales=itemsize == 1
    )


@pytest.mark.parametrize(("capability", "expected"), [((8, 0), None), ((8, 9), "fp8")])
def test_kv_cache_is_fp8_as_the_checkpoint_says_on_gpus_that_have_it(
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    expected: str | None,
) -> None:
    monkeypatch.setattr(engine_plan, "resolve_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(engine_plan, "free_bytes", lambda *_: 1 << 30)
    monkeypatch.setattr(engine_plan, "gpu_capability", lambda _: capability)
    checkpoint = open_checkpoint(model)
    checkpoint.quantization = QuantizationConfig("compressed-tensors", None, kv="fp8")
    monkeypatch.setattr(engine_plan, "check_checkpoint", lambda *_: None)
    options = EngineOptions(dtype="bfloat16", max_model_len=64, max_cudagraph_capture_size=0)
    assert plan_engine(checkpoint, options).kv_cache_dtype == expected


@pytest.mark.parametrize("has_bfloat16", [False, True])
def test_kv_cache_of_a_cpu_is_bfloat16_for_models_in_it(
    model: Path, monkeypatch: pytest.MonkeyPatch, has_bfloat16: bool
) -> None:
    monkeypatch.setattr(cpu_kernels, "has_bfloat16", lambda: has_bfloat16)

    def planned(own_dtype: str, **options: Any) -> str | None:
        checkpoint = open_checkpoint(model)
        checkpoint.config["dtype"] = checkpoint.config["torch_dtype"] = own_dtype
        return plan_engine(checkpoint, EngineOptions(device="cpu", **options)).kv_cache_dtype

    assert planned("bfloat16") == ("bfloat16" if has_bfloat16 else None)
    assert planned("float32") is planned("float16") is None
    assert planned("bfloat16", cpu_activations="float32") is None
    assert planned("bfloat16", kv_cache_dtype="float32") == "float32"
    assert planned("bfloat16", dtype="float32") is None
    assert planned("bfloat16", kv_cache_dtype="float32", dtype="bfloat16") == "float32"
    for dtype in ("bfloat16", "float16"):
        assert planned("float32", dtype=dtype) == (dtype if keeps_weights_packed() else None)


@pytest.mark.parametrize("tied", [False, True])
def test_loaded_bytes_count_shared_weights_once(tmp_path: Path, tied: bool) -> None:
    source = open_checkpoint(tiny_checkpoint(tmp_path, tie_word_embeddings=tied))
    count = parameter_count(model_spec(source.config))
    assert loaded_bytes(load_model(source, torch.float32)) == count * 4
    packed = load_model(source, torch.float32, packed=True)
    products = [one for layer in packed.layers for one in layer.linears.values()] + [packed.head]
    if all(isinstance(one, PackedLinear) for one in products):
        norms = 5 * 64 * 4
        assert (
            loaded_bytes(packed)
            == sum(one.kernel.nbytes for one in products) + 512 * 64 * 2 + norms
        )


def test_workspace_is_the_widest_activations_and_the_logits(spec: ModelSpec) -> None:
    assert (
        estimate_workspace(spec, torch.float32, 10, 3)
        == 10 * (2 * 64 + 3 * 128) * 4 + 3 * 512 * memory.BYTES_PER_LOGIT
    )


def test_free_bytes_are_what_a_container_limit_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1000))
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    cpu = torch.device("cpu")
    assert free_bytes(cpu, 0.9) == 1000  # no such files
    for name, text in (
        ("memory.max", "900\n"),
        ("memory.current", "700\n"),
        ("memory.stat", "anon 500\nfile 150\n"),
    ):
        (tmp_path / name).write_text(text)
    assert free_bytes(cpu, 0.9) == 900 - 700 + 150
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes(cpu, 0.9) == 1000


def test_memory_is_planned_before_weights_are_read(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_kernels, "library", None)
    weights = parameter_count(model_spec(open_checkpoint(model).config)) * 4
    monkeypatch.setattr(Checkpoint, "read", lambda *_: pytest.fail("read a tensor"))
    monkeypatch.setattr(Checkpoint, "read_info", lambda *_: pytest.fail("read a tensor"))
    for free, todo in (
        (1000, "Use a smaller model or a larger device"),
        (weights - 1, "Use --dtype bfloat16"),
    ):
        monkeypatch.setattr(
            "psutil.virtual_memory", lambda free=free: SimpleNamespace(available=free)
        )
        with pytest.raises(
            ShortageError,
            match=rf"the weights need {weights} bytes .* in float32 and cpu has.*{todo}",
        ):
            load_engine(model, EngineOptions(device="cpu"))


def test_engine_follows_its_plan(model: Path) -> None:
    report = StartupReport()
    engine = load_engine(
        model,
        EngineOptions(
            kv_cache_memory=6 * BLOCK + 1,
            max_model_len=96,
            device="cpu",
            kv_cache_dtype="float32",
        ),
        report,
    )
    assert (engine.config.num_blocks, engine.config.max_model_len) == (6, 96)
    assert report.plan is not None
    assert report.plan.as_dict()["kv_cache_bytes"] == 6 * BLOCK
    assert list(report.seconds) == [
        "checkpoint check",
        "memory plan",
        "building",
        "waiting for the disk",
        "KV cache",
    ]
    assert all(spent >= 0 for spent in report.seconds.values())
    assert report.fast_paths


def test_checkpoint_that_changes_while_it_is_read_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    real = Checkpoint.read

    def read(self: Checkpoint, name: str) -> torch.Tensor:
        os.utime(tmp_path / "model.safetensors")
        return real(self, name)

    monkeypatch.setattr(Checkpoint, "read", read)
    with pytest.raises(InputError, match=r"model\.safetensors was changed while it was read"):
        load_engine(tmp_path, EngineOptions(device="cpu"))


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_zeros_take_no_memory_until_they_are_written() -> None:
    before = resident()
    zeros = lazy_zeros((64, MEBI), torch.float32, torch.device("cpu"))
    assert (zeros.shape, zeros.dtype, resident() - before < 16 * MEBI) == (
        (64, MEBI),
        torch.float32,
        True,
    )
    assert zeros[5].sum() == 0
    zeros[:16] = 1.5
    assert resident() - before > 60 * MEBI
    assert (zeros[:16].min(), zeros[:16].max(), zeros[16, 0]) == (1.5, 1.5, 0)
    del zeros
    assert resident() - before < 16 * MEBI
    assert lazy_zeros((0, 3), torch.bfloat16, torch.device("cpu")).shape == (0, 3)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (
            RuntimeError(
                "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
            ),
            True,
        ),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), False),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_is_out_of_memory_recognizes_allocation_errors(
    error: BaseException, expected: bool
) -> None:
    assert is_out_of_memory(error) is expected


def test_is_out_of_memory_recognizes_what_torch_raises_on_a_host() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def serve_plan(decoder: Path, *options: str) -> int:
    """`llmkit serve --plan`: its exit code."""
    return main.run(["serve", str(decoder), "--plan", "--device", "cpu", *options])


FLOAT32_CACHE = ("--kv-cache-dtype", "float32")


def test_serve_plan_prints_the_plan(
    model: Path, spec: ModelSpec, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ("--kv-cache-memory", str(100 * BLOCK), "--dtype", "bfloat16")
    assert serve_plan(model, "--json", *sizes) == 0
    done = capsys.readouterr()
    assert done.err == ""
    document = json.loads(done.out)
    assert document.pop("free_bytes") > document["weight_bytes"]
    # Hidden states and norms stay float32 where the compiled kernels run.
    hidden = torch.bfloat16 if cpu_kernels.library is None else torch.float32
    norms = (2 * len(spec.layers) + 1) * spec.hidden_size
    assert document == {
        "model": str(model),
        "device": "cpu",
        "dtype": "bfloat16",
        "kv_cache_dtype": "bfloat16",
        "max_num_batched_tokens": 512,
        "weight_bytes": parameter_count(spec) * 2 + norms * (hidden.itemsize - 2),
        "workspace_bytes": estimate_workspace(spec, hidden, 512, 256),
        "kv_cache_bytes": 100 * BLOCK,
        "kv_blocks": 200,
        "kv_block_tokens": 16,
        "kv_bytes_per_token": BLOCK // 32,
        "kv_cache_tokens": 3200,
        "max_model_len": 256,
        "model_limit": 256,
        "requests": {"256": 12},
    }
    short = ("--kv-cache-memory", str(5 * BLOCK), "--max-model-len", "80", *FLOAT32_CACHE)
    assert serve_plan(model, *short) == 0
    table = capsys.readouterr().out
    for part in (
        "cpu in float32",
        "80 (5 blocks)",
        "80 of the model's 256",
        "requests of 80 tokens at once",
    ):
        assert part in table


@pytest.mark.parametrize(
    ("options", "code", "parts"),
    [
        (("--max-model-len", "300"), 3, ["over the model's limit", "Use --max-model-len 256"]),
        (
            ("--kv-cache-memory", str(5 * BLOCK), "--max-model-len", "100"),
            4,
            ["100 tokens", "Use --kv-cache-memory 1MiB or use --max-model-len 80"],
        ),
        (
            ("--kv-cache-memory", str(5 * BLOCK)),
            4,
            ["the KV cache is too small: it holds 80 tokens. At least 256 for one request"],
        ),
        (("--kv-cache-memory", "1000TB"), 4, ["does not fit on cpu", "Use a smaller one"]),
    ],
)
def test_serve_plan_reports_what_does_not_fit(
    model: Path,
    options: tuple[str, ...],
    code: int,
    parts: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert serve_plan(model, *options, *FLOAT32_CACHE) == code
    done = capsys.readouterr()
    assert done.out == ""
    (line,) = done.err.splitlines()
    assert line.startswith("llmkit serve: error: ")
    assert all(part in line for part in parts)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_workspace_on_cuda_is_measured(model: Path) -> None:
    report = StartupReport()
    options = EngineOptions(device="cuda", max_num_batched_tokens=1024, gpu_memory_utilization=0.5)
    engine = load_engine(model, options, report)
    assert report.plan is not None
    plan = report.plan.memory
    spec = engine.model.spec
    assert plan.workspace_bytes != estimate_workspace(spec, report.plan.dtype, 1024, 256)
    assert plan.workspace_bytes >= 1024 * 2 * spec.intermediate_size * 2  # gate and up alone
    assert plan.weight_bytes + plan.workspace_bytes + plan.kv_cache_bytes <= plan.free_bytes
    assert torch.cuda.memory_allocated() >= plan.kv_cache_bytes


def test_recurrent_states_leave_the_kv_cache_its_size(spec: ModelSpec) -> None:
    """Fewer requests run at the same time where the states of all do not fit."""
    states = StateMemory(bytes_per_state=1000)
    free = 1100 + 100 * BLOCK + 100_000
    sized = plan(spec, free, "cuda", kv_cache_memory=100 * BLOCK, states=states)
    assert sized.num_blocks == 100
    assert (sized.max_num_seqs, sized.num_state_snapshots) == (75, 25)
    assert sized.num_state_rows == 100
    halves = plan(spec, 1100 + 400_000, "cuda", states=states)
    assert (halves.max_num_seqs, halves.num_state_snapshots) == (150, 50)
    assert 0 < halves.kv_cache_bytes <= 200_000
    given = replace(states, checkpoint_bytes=90_000, states_per_request=2)
    few = plan(spec, free, "cuda", kv_cache_memory=100 * BLOCK, states=given)
    assert (few.max_num_seqs, few.num_state_snapshots, few.num_state_rows) == (5, 90, 100)
    assert plan(spec, free, "cpu", states=states).as_dict()["state_bytes_per_request"] == 1000
    with pytest.raises(ShortageError, match="states of one request"):
        plan(spec, 1100 + 1000, "cuda", states=states)


PACKED_SHAPES = [(64, 256), (48, 320), (32, 130), (16, 64)]


@pytest.mark.skipif(cpu_kernels.library is None, reason="without the compiled kernels")
@pytest.mark.parametrize("name", SCHEMES)
def test_memory_plan_counts_quantized_weights_as_a_cpu_holds_them(name: str) -> None:
    scheme = SCHEMES[name]
    for rows, columns in PACKED_SHAPES:
        if scheme.bits == 4 and columns % scheme.group_size:
            continue
        held = pack_weight(random_quantized(scheme, rows, columns)).nbytes
        assert memory._packed_bytes(scheme, rows, columns, None) == held


@pytest.mark.parametrize(
    ("capability", "is_expert"), [((9, 0), False), ((9, 0), True), ((10, 0), False)]
)
@pytest.mark.parametrize("name", SCHEMES)
def test_memory_plan_counts_quantized_weights_as_a_gpu_holds_them(
    name: str, capability: tuple[int, int], is_expert: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheme = SCHEMES[name]
    monkeypatch.setattr(linear, "gpu_capability", lambda _: capability)
    for shape in PACKED_SHAPES:
        kernel = gpu_kernel_type(scheme, shape, torch.bfloat16, capability, is_expert)
        if kernel is None:
            continue
        quant = ActivationQuant.of(scheme, INPUT_SCALE)
        served = serving_linear(
            [random_quantized(scheme, *shape)],
            None,
            quant,
            torch.bfloat16,
            "cuda",
            is_expert=is_expert,
        )
        assert isinstance(served, PackedLinear) and isinstance(served.kernel, kernel)
        assert memory._packed_bytes(scheme, *shape, kernel) == served.kernel.nbytes
