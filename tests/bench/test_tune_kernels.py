"""Tuned configurations: how they are found, stored, looked up and refused, with fake kernels."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.quantized_linear_cases import Case
from support.synthetic_checkpoint import LLAMA
from support.tiny_models import tiny_checkpoint
from support.triton_checks import interpreted

from llmkit.bench.gpu import tune_kernels as tune
from llmkit.bench.gpu.model_shapes import MODEL_CONFIGS
from llmkit.bench.gpu.tune_kernels import (
    ConfigSearch,
    TuningResult,
    save_results,
    tune_weight_only_linear,
)
from llmkit.checkpoint.quantized_weight import QuantizationConfig, Scheme
from llmkit.cli import doctor, main
from llmkit.common.errors import InputError
from llmkit.kernels import paged_attention as paged
from llmkit.kernels import quantized_linear, w8a8_linear
from llmkit.kernels import tuned_configs as tuning
from llmkit.kernels.activation_quant import FP8, quantize_per_token
from llmkit.kernels.attention_metadata import AttentionMetadata
from llmkit.kernels.attention_reference import paged_attention_reference
from llmkit.kernels.input_quant import InputQuant, QuantizedInput
from llmkit.kernels.kv_cache import KVCache
from llmkit.kernels.quantized_linear import (
    FLOAT32_TILE,
    FUSED_ROWS,
    LARGE_TILES,
    LARGE_TILES_8,
    MAX_FUSED_ROWS,
    TILE,
    TILES,
    WIDE_TILE,
    rows_class,
)
from llmkit.kernels.tuned_configs import Config, Tunable
from llmkit.kernels.w8a8_linear import W8A8Linear
from llmkit.model.families import model_spec

CPU = torch.device("cpu")
GPU = torch.device("cuda")
KERNEL = Tunable("pretended", ((1, 2, 4), (10, 20), (3, 5, 7)))
SAFE = (1, 10, 3)


@pytest.fixture(autouse=True)
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An H100 and a user who has measured nothing."""
    pytest.importorskip("triton")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    gpu = SimpleNamespace(name="NVIDIA H100", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    monkeypatch.setattr(tuning.triton_support, "triton", SimpleNamespace(__version__="3.6.0"))
    _forget()
    yield tmp_path / "llmkit" / "tuned.json"
    _forget()


def _forget() -> None:
    tuning.read_configs.cache_clear()
    tuning.measured_config.cache_clear()


NAME = "NVIDIA H100 sm_90; triton 3.6.0; pretended; 4 bfloat16"
SHAPE = (4, torch.bfloat16)


def write(user: Path, content: object) -> None:
    user.parent.mkdir(parents=True, exist_ok=True)
    user.write_text(content if isinstance(content, str) else json.dumps(content))
    _forget()


def test_tuned_config_is_used_for_its_gpu_triton_and_shape(
    user: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert KERNEL.config(SHAPE, SAFE, GPU) == SAFE
    write(user, {"format": 1, "tuned": {NAME: [4, 20, 7]}})
    assert KERNEL.config(SHAPE, SAFE, GPU) == (4, 20, 7)
    assert KERNEL.config(SHAPE, SAFE, CPU) == SAFE
    assert KERNEL.config((8, torch.bfloat16), SAFE, GPU) == SAFE
    assert Tunable("another", KERNEL.choices).config(SHAPE, SAFE, GPU) == SAFE
    monkeypatch.setattr(tuning.triton_support.triton, "__version__", "3.7.0")
    _forget()
    assert KERNEL.config(SHAPE, SAFE, GPU) == SAFE


def test_tuned_config_of_the_user_comes_first(
    user: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package = tmp_path / "package"
    write(package / "tuned.json", {"format": 1, "tuned": {NAME: [2, 20, 5]}})
    monkeypatch.setattr(tuning, "__file__", str(package / "tuning.py"))
    assert KERNEL.config(SHAPE, SAFE, GPU) == (2, 20, 5)
    write(user, {"format": 1, "tuned": {NAME: [4, 20, 7]}})
    assert KERNEL.config(SHAPE, SAFE, GPU) == (4, 20, 7)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "\xff",
        {"format": 1, "tuned": [1]},
        {"format": 1, "tuned": {NAME: "fast"}},
        {"format": 1, "tuned": {NAME: [None, 1, 2]}},
        {"format": 1, "tuned": {NAME: 5}},
    ],
)
def test_tuned_config_file_that_is_malformed_is_ignored_with_a_warning(
    user: Path, content: object, capsys: pytest.CaptureFixture[str]
) -> None:
    write(user, content)
    for _ in range(3):
        assert KERNEL.config(SHAPE, SAFE, GPU) == SAFE
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"llmkit: warning: {user} is ignored (")


@pytest.mark.parametrize("config", [[4, 20], [3, 20, 7], [4, 20, 7, 1], [-1, 10, 3], []], ids=str)
def test_tuned_config_that_is_no_choice_is_not_used(user: Path, config: list[int]) -> None:
    write(user, {"format": 1, "tuned": {NAME: config}})
    assert KERNEL.config(SHAPE, SAFE, GPU) == SAFE


def test_tuned_config_of_another_format_is_not_used(
    user: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(user, {"format": 2, "tuned": {NAME: [4, 20, 7]}})
    assert KERNEL.config(SHAPE, SAFE, GPU) == SAFE
    assert capsys.readouterr().err == ""


class FakeKernel:
    """A kernel whose time, spills and answers depend on its configuration."""

    def __init__(self, ms: Callable[[Config], float]) -> None:
        self.ms = ms
        self.spills = set[Config]()
        self.broken = set[Config]()
        self.wrong = set[Config]()
        self.kernel = self
        self.last = SAFE
        self.launched: list[Config] = []

    def __getitem__(self, grid: Config) -> Callable[[], SimpleNamespace]:
        def launch() -> SimpleNamespace:
            from triton.errors import TritonError

            if self.last in self.broken:
                raise TritonError
            self.launched.append(self.last)
            return SimpleNamespace(n_spills=int(self.last in self.spills))

        return launch

    def run(self) -> torch.Tensor:
        self.last = KERNEL.config(SHAPE, SAFE, GPU)
        KERNEL.notify_observer(self.kernel[self.last]())
        return torch.tensor([1.0, torch.nan if self.last in self.wrong else 2.0])

    def search(self) -> ConfigSearch:
        return ConfigSearch(
            KERNEL, self.run, torch.tensor([1.0, 2.0]), 1e-3, lambda run: self.ms(self.last)
        )


def test_tuner_finds_the_fastest_config_number_by_number() -> None:
    one = FakeKernel(lambda config: 1 / config[0] + abs(config[1] - 20) + config[2])
    search = one.search()
    assert (search.shape, search.default) == (SHAPE, SAFE)
    assert search.search() == 1 / 4 + 3
    found = search.result(GPU)
    assert found == TuningResult(NAME, (4, 20, 3), 3.25, SAFE, 14.0, 3 + 1 + 2, 0)
    assert tuning.trials == {} and tuning.launch_observers == {}


def test_tuner_refuses_configs_that_spill_fail_or_are_wrong() -> None:
    one = FakeKernel(lambda config: 1 / (config[0] * config[1] * config[2]))
    one.spills = {(4, 10, 3)}
    one.broken = {(2, 20, 3)}
    one.wrong = {(2, 10, 7)}
    search = one.search()
    search.search()
    found = search.result(GPU)
    assert (found.config, found.refused) == ((2, 10, 5), 3)


def test_tuner_finds_nothing_when_all_configs_are_refused() -> None:
    one = FakeKernel(lambda config: 1.0)
    one.wrong = {(a, b, c) for a in (1, 2, 4) for b in (10, 20) for c in (3, 5, 7)}
    assert one.search().search() is None


def test_tuner_adds_entries_to_the_file(user: Path) -> None:
    write(user, {"format": 1, "tuned": {"another": [1], NAME: [1, 10, 3]}})
    assert KERNEL.config(SHAPE, SAFE, GPU) == (1, 10, 3)
    save_results([TuningResult(NAME, (4, 20, 7), 1.0, SAFE, 2.0, 6, 0)], user)
    assert KERNEL.config(SHAPE, SAFE, GPU) == (4, 20, 7)
    assert json.loads(user.read_text()) == {
        "format": 1,
        "tuned": {"another": [1], NAME: [4, 20, 7]},
    }
    assert [file.name for file in user.parent.iterdir()] == ["tuned.json"]


class Product:
    """In the place of a WeightOnlyLinear: it asks for configurations as that does."""

    def __init__(self) -> None:
        self.dense = torch.randn(48, 64)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        assert FUSED_ROWS.config((4, 128), (MAX_FUSED_ROWS,), GPU) == (MAX_FUSED_ROWS,)
        self.rows = len(x)
        self.config = TILE.config((4, 128, len(x)), TILES[0][1:], GPU)
        return x @ self.dense.T

    def dequantize(self, columns: int, dtype: torch.dtype) -> torch.Tensor:
        self.rows = 0
        self.config = ()
        return self.dense


def test_tuner_measures_linear_for_all_rows(monkeypatch: pytest.MonkeyPatch, user: Path) -> None:
    write(
        user, {"format": 1, "tuned": {"NVIDIA H100 sm_90; triton 3.6.0; grouped_rows; 4 128": [32]}}
    )
    product = Product()

    def clock(run: Callable[[], Any]) -> float:
        run()
        return (
            product.rows / 100 / (1 + product.config[0] / 1000) if product.rows else 2.0
        )  # 128 rows: 1.2 ms

    found = tune_weight_only_linear(product, 64, torch.float32, CPU, clock)
    *tiles, rows = found
    assert [one.name.rpartition(" ")[2] for one in tiles] == [str(rows) for rows in tune.ROWS]
    assert all(one.config == (256, *TILES[0][2:]) for one in tiles)
    assert rows.name.endswith("; grouped_rows; 4 128") and rows.config == (128,)
    save_results(found, user)
    assert FUSED_ROWS.config((4, 128), (MAX_FUSED_ROWS,), GPU) == (128,)


@pytest.mark.parametrize("new", [1, 64])
@pytest.mark.parametrize("window", [None, 40])
def test_tuner_measures_attention_in_the_models_shape(
    window: int | None, new: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "CONTEXT", 64)
    monkeypatch.setattr(paged, "supports", lambda *_: True)
    seen: list[tuple[int, ...]] = []

    def attention(
        q: torch.Tensor, cache: KVCache, group: AttentionMetadata, *more: Any
    ) -> torch.Tensor:
        tokens, *_ = paged.TILE.config((len(q),), (64, 4, 3, 4), CPU)
        seen.append(tuple(q.shape))
        answer = paged_attention_reference(q, cache, group, *more)
        return answer if tokens < 128 else answer + 1

    monkeypatch.setattr(paged, "attention", attention)
    spec = replace(
        model_spec(LLAMA),
        layers=tuple(replace(one, sliding_window=window) for one in model_spec(LLAMA).layers),
    )
    (found,) = tune.tune_attention(spec, new, torch.float32, CPU, lambda run: 1.0)
    assert set(seen) == {(32 if new == 1 else 64, spec.num_heads, spec.head_dim)}
    assert (found.safe, found.refused) == ((64, 4, 3, 4), 1)


def test_default_configs_are_among_the_choices() -> None:
    for *_, config in [
        (tile[0], tile[1:])
        for tile in (*TILES, WIDE_TILE, *LARGE_TILES, *LARGE_TILES_8, FLOAT32_TILE)
    ]:
        assert len(config) == len(TILE.choices)
        assert all(number in choices for number, choices in zip(config, TILE.choices, strict=True))
    assert MAX_FUSED_ROWS in FUSED_ROWS.choices[0] and max(tune.ROWS) == MAX_FUSED_ROWS
    classes = [rows_class(rows) for rows in range(1, MAX_FUSED_ROWS + 1)]
    assert [rows_class(rows) for rows in tune.ROWS] == sorted(set(classes))
    assert all(fused in tune.ROWS for fused in FUSED_ROWS.choices[0])
    assert "TILE.notify_observer(compiled)" in inspect.getsource(quantized_linear.WordsLinear)
    assert "TILE.notify_observer(compiled)" in inspect.getsource(paged)


def test_linear_is_right_with_every_config(tmp_path: Path) -> None:
    """By Triton's interpreter, which spills nothing and has all the memory it wants."""
    cases = [Case(4, 32, 17, 33, 192, symmetric=False, splits=2), Case(8, 64, 3, 17, 128)]
    for times in interpreted(
        "support.quantized_linear_cases",
        "measure_configs",
        [case.arguments() for case in cases],
        tmp_path,
    ):
        assert len(times) == 1 + sum(len(choices) - 1 for choices in TILE.choices)
        assert None not in times.values()


def test_tuner_selects_weights_with_tuned_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmkit.model.weight_loader.gpu_capability", lambda _: (9, 0))
    fp8 = Scheme(8, kind="float", inputs="token")
    odd = ("model.layers.0.mlp.down_proj", Scheme(8, inputs="token"))
    other = ("model.layers.1.self_attn.o_proj", fp8)
    checkpoint = SimpleNamespace(
        quantization=QuantizationConfig("gptq", Scheme(4, 32), ("lm_head",), (odd, other))
    )
    spec = model_spec(LLAMA)
    found = tune.tuned_weights(checkpoint, spec, torch.bfloat16, GPU)
    q = spec.num_heads * spec.head_dim
    kv = spec.num_kv_heads * spec.head_dim
    h = spec.hidden_size
    i = spec.intermediate_size
    assert {shape for scheme, shape in found if scheme == Scheme(4, 32)} == {
        (q + 2 * kv, h),
        (h, q),
        (2 * i, h),
        (h, i),
    }
    assert [shape for scheme, shape in found if scheme != Scheme(4, 32)] == [(h, q)]
    assert (fp8, (h, q)) in found


@pytest.mark.parametrize(
    ("scheme", "shape", "capability"),
    [
        (Scheme(8, kind="float", inputs="token"), (32, 64), (8, 0)),
        (Scheme(8, kind="float", inputs="token"), (40, 64), (9, 0)),
        (Scheme(8, kind="float"), (32, 64), (9, 0)),
        (Scheme(8, inputs="token"), (32, 64), (9, 0)),
    ],
)
def test_tuner_leaves_out_kernels_without_configurations(
    scheme: Scheme,
    shape: tuple[int, int],
    capability: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tune, "gpu_capability", lambda _: capability)

    def serve(*_: object) -> None:
        raise AssertionError("no layer is made")

    monkeypatch.setattr(tune, "serving_linear", serve)
    assert tune.tune_weight(scheme, shape, torch.bfloat16, CPU, lambda run: 1.0) == []


def test_tuner_measures_whether_few_fp8_rows_are_padded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def quantize(x: torch.Tensor, quant: InputQuant) -> QuantizedInput:
        empty = quant.empty(*x.shape, x)
        values, scales = quantize_per_token(x, "fp8")
        empty.values.zero_()[: len(x)] = values.to(FP8)
        empty.scales.zero_()[: len(x)] = scales
        return empty

    monkeypatch.setattr(w8a8_linear, "quantize_input", quantize)
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    q, scales = quantize_per_token(weight, "fp8")
    kernel = W8A8Linear(q.to(FP8), scales, None)
    asked = []

    def clock(run: Callable[[], object]) -> float:
        run()
        rows = kernel.input_quant.min_rows
        asked.append(rows)
        return float(rows)

    (result,) = tune.tune_fp8_rows(kernel, torch.bfloat16, CPU, clock)
    assert result.config == (1,) and result.safe == (17,)
    assert result.name.endswith("; scaled_mm_rows; 32 64")
    assert sorted(asked) == [1, 17] and result.refused == 0


def test_tuner_takes_shapes_without_a_checkpoint(tmp_path: Path) -> None:
    """A name, or a config.json: 4-bit and FP8 weights of all linear layers, and attention."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps(MODEL_CONFIGS["Qwen3-0.6B"]))
    for model in ("Qwen3-0.6B", str(config)):
        target = tune.tuning_target(model, GPU)
        assert target.dtype == torch.bfloat16 and target.spec.hidden_size == 1024
        shapes = {shape for scheme, shape in target.weights if scheme == Scheme(4, 128)}
        assert shapes == {(4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072)}
        names = [name for name, _ in target.problems()]
        assert names[:2] == ["attention, 1 new tokens", "attention, 4096 new tokens"]
        assert "linear [4096, 1024], 4 bits, groups of 128" in names


@pytest.mark.parametrize("content", [None, "{"])
def test_tuner_refuses_a_config_that_is_none(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=r"config\.json is no config\.json"):
        tune.tuning_target(str(path), GPU)


def test_tuner_ends_with_the_best_config_so_far() -> None:
    one = FakeKernel(lambda config: 1 / config[0] + abs(config[1] - 20) + config[2])
    search = one.search()
    search.is_over = lambda: len(search.times) >= 2
    assert search.search() == 1 / 2 + 10 + 3
    assert search.result(GPU).config == (2, 10, 3) and search.result(GPU).tried == 2


def test_tuner_needs_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    model = tiny_checkpoint(tmp_path / "model")
    assert main.run(["doctor", "--tune", str(model), "--json"]) == 4
    captured = capsys.readouterr()
    assert "--tune, and PyTorch sees no CUDA device" in captured.err
    assert json.loads(captured.out)["error"]["exit_code"] == 4


def test_doctor_shows_tuning_results(
    tmp_path: Path, user: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_checkpoint(tmp_path / "model")
    found = [
        TuningResult(NAME, (4, 20, 7), 0.25, SAFE, 0.5, 6, 1),
        TuningResult(NAME, (2, 10, 3), 0.125, SAFE, None, 6, 2),
    ]
    monkeypatch.setattr(
        tune, "tune", lambda checkpoint, report: report("attention, 1 new tokens") or found
    )
    capsys.readouterr()
    assert main.run(["doctor", "--tune", str(model), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["file"] == str(user)
    assert document["tuned"][0]["config"] == [4, 20, 7] and document["tuned"][1]["safe_ms"] is None
    assert main.run(["doctor", "--tune", str(model)]) == 0
    captured = capsys.readouterr()
    assert "attention, 1 new tokens" in captured.err and str(user) in captured.err.replace("\n", "")
    for part in ("pretended", "4 bfloat16", "4 20 7", "0.2500", "0.5000"):
        assert part in captured.out


def test_doctor_says_whether_triton_runs() -> None:
    def triton(gpus: list[dict[str, Any]], version: str | None) -> tuple[bool, str]:
        paths = doctor.fast_paths(gpus, "13.0", "AVX512", "0.2", version)
        return next(
            (path["active"], path["why"]) for path in paths if path["name"] == "Triton kernels"
        )

    gpu: dict[str, Any] = {"name": "NVIDIA H100"}
    assert triton([gpu], "3.6.0") == (True, "triton 3.6.0")
    assert not triton([gpu], None)[0] and "not installed" in triton([gpu], None)[1]
    assert not triton([], "3.6.0")[0] and "need a CUDA device" in triton([], "3.6.0")[1]
