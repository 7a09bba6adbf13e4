"""Configurations of kernels: how they are found, kept, looked up and refused, with kernels that only pretend to run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from quantized_products import Case
from synthetic import LLAMA
from tiny import tiny_checkpoint
from triton_checks import interpreted

from llmkit.bench import tune
from llmkit.bench.tune import Trials, Tuned, keep, tune_product
from llmkit.checkpoint.quantized import QuantizationConfig, Scheme
from llmkit.cli import doctor, main
from llmkit.kernels import paged, quantized_linear, tuning
from llmkit.kernels.attention import KvCache, paged_attention_reference
from llmkit.kernels.paging import Group
from llmkit.kernels.quantized_linear import CROSSOVER, MOST_ROWS, TILE, TILE_OF_FLOAT32, TILES
from llmkit.kernels.tuning import Config, Tunable
from llmkit.model.families import model_spec

CPU, GPU = torch.device("cpu"), torch.device("cuda")
KERNEL = Tunable("pretended", ((1, 2, 4), (10, 20), (3, 5, 7)))
SAFE = (1, 10, 3)


@pytest.fixture(autouse=True)
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An H100 and a user who has measured nothing."""
    pytest.importorskip("triton")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    gpu = SimpleNamespace(name="NVIDIA H100", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    monkeypatch.setattr(tuning.jit, "triton", SimpleNamespace(__version__="3.6.0"))
    _forget()
    yield tmp_path / "llmkit" / "tuned.json"
    _forget()


def _forget() -> None:
    tuning.entries.cache_clear()
    tuning._measured.cache_clear()


NAME = "NVIDIA H100 sm_90; triton 3.6.0; pretended; 4 bfloat16"
SHAPE = (4, torch.bfloat16)


def write(user: Path, content: object) -> None:
    user.parent.mkdir(parents=True, exist_ok=True)
    user.write_text(content if isinstance(content, str) else json.dumps(content))
    _forget()


def test_what_was_measured_is_used_on_that_gpu_and_triton_and_for_that_shape(
    user: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert KERNEL.config(SHAPE, SAFE, GPU) == SAFE
    write(user, {"format": 1, "tuned": {NAME: [4, 20, 7]}})
    assert KERNEL.config(SHAPE, SAFE, GPU) == (4, 20, 7)
    assert KERNEL.config(SHAPE, SAFE, CPU) == SAFE
    assert KERNEL.config((8, torch.bfloat16), SAFE, GPU) == SAFE
    assert Tunable("another", KERNEL.choices).config(SHAPE, SAFE, GPU) == SAFE
    monkeypatch.setattr(tuning.jit.triton, "__version__", "3.7.0")
    _forget()
    assert KERNEL.config(SHAPE, SAFE, GPU) == SAFE


def test_the_users_figures_go_before_the_packages(user: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "package"
    write(package / "tuned.json", {"format": 1, "tuned": {NAME: [2, 20, 5]}})
    monkeypatch.setattr(tuning, "__file__", str(package / "tuning.py"))
    assert KERNEL.config(SHAPE, SAFE, GPU) == (2, 20, 5)
    write(user, {"format": 1, "tuned": {NAME: [4, 20, 7]}})
    assert KERNEL.config(SHAPE, SAFE, GPU) == (4, 20, 7)


@pytest.mark.parametrize("content", [
    "{", "[]", "\xff", {"format": 1, "tuned": [1]}, {"format": 1, "tuned": {NAME: "fast"}},
    {"format": 1, "tuned": {NAME: [None, 1, 2]}}, {"format": 1, "tuned": {NAME: 5}},
])  # fmt: skip
def test_a_malformed_file_is_ignored_with_a_warning(
    user: Path, content: object, capsys: pytest.CaptureFixture[str]
) -> None:
    write(user, content)
    for _ in range(3):
        assert KERNEL.config(SHAPE, SAFE, GPU) == SAFE
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"llmkit: warning: {user} is ignored (")


@pytest.mark.parametrize("config", [[4, 20], [3, 20, 7], [4, 20, 7, 1], [-1, 10, 3], []], ids=str)
def test_an_entry_that_the_kernel_does_not_take_is_not_used(user: Path, config: list[int]) -> None:
    write(user, {"format": 1, "tuned": {NAME: config}})
    assert KERNEL.config(SHAPE, SAFE, GPU) == SAFE


def test_entries_of_another_format_are_not_used(user: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(user, {"format": 2, "tuned": {NAME: [4, 20, 7]}})
    assert KERNEL.config(SHAPE, SAFE, GPU) == SAFE
    assert capsys.readouterr().err == ""


class Pretended:
    """A kernel whose time, spills and answers depend on its configuration."""

    def __init__(self, ms: Callable[[Config], float]) -> None:
        self.ms, self.spills, self.broken, self.wrong = ms, set[Config](), set[Config](), set[Config]()
        self.kernel, self.last = self, SAFE
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
        self.kernel[self.last]()
        return torch.tensor([1.0, torch.nan if self.last in self.wrong else 2.0])

    def trials(self, monkeypatch: pytest.MonkeyPatch) -> Trials:
        monkeypatch.setitem(tune.KERNELS, KERNEL, (self, "kernel"))  # type: ignore[arg-type]
        return Trials(KERNEL, self.run, torch.tensor([1.0, 2.0]), 1e-3, lambda run: self.ms(self.last))


def test_the_fastest_is_found_number_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Pretended(lambda config: 1 / config[0] + abs(config[1] - 20) + config[2])
    trials = one.trials(monkeypatch)
    assert (trials.shape, trials.safe) == (SHAPE, SAFE)
    assert trials.search() == 1 / 4 + 3
    found = trials.result(GPU)
    assert found == Tuned(NAME, (4, 20, 3), 3.25, SAFE, 14.0, 3 + 1 + 2, 0)
    assert tuning.trials == {} and one.kernel is one


def test_what_spills_fails_or_is_wrong_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Pretended(lambda config: 1 / (config[0] * config[1] * config[2]))
    one.spills, one.broken, one.wrong = {(4, 10, 3)}, {(2, 20, 3)}, {(2, 10, 7)}
    trials = one.trials(monkeypatch)
    trials.search()
    found = trials.result(GPU)
    assert (found.config, found.refused) == ((2, 10, 5), 3)


def test_where_all_are_refused_nothing_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Pretended(lambda config: 1.0)
    one.wrong = {(a, b, c) for a in (1, 2, 4) for b in (10, 20) for c in (3, 5, 7)}
    assert one.trials(monkeypatch).search() is None


def test_entries_are_added_to_the_file(user: Path) -> None:
    write(user, {"format": 1, "tuned": {"another": [1], NAME: [1, 10, 3]}})
    assert KERNEL.config(SHAPE, SAFE, GPU) == (1, 10, 3)
    keep([Tuned(NAME, (4, 20, 7), 1.0, SAFE, 2.0, 6, 0)], user)
    assert KERNEL.config(SHAPE, SAFE, GPU) == (4, 20, 7)
    assert json.loads(user.read_text()) == {"format": 1, "tuned": {"another": [1], NAME: [4, 20, 7]}}
    assert [file.name for file in user.parent.iterdir()] == ["tuned.json"]


class Product:
    """In the place of a GroupedProduct: it asks for configurations as that does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.dense = torch.randn(48, 64)
        monkeypatch.setitem(tune.KERNELS, TILE, (self, "kernel"))  # type: ignore[arg-type]
        self.kernel = object()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        assert MOST_ROWS.config((4, 128), (CROSSOVER,), GPU) == (CROSSOVER,)
        self.rows, self.config = len(x), TILE.config((4, 128, len(x)), TILES[0][1:], GPU)
        return x @ self.dense.T

    def dequantize(self, columns: int, dtype: torch.dtype) -> torch.Tensor:
        self.rows, self.config = 0, ()
        return self.dense


def test_a_product_is_tuned_for_all_numbers_of_rows_and_up_to_where_it_is_faster(
    monkeypatch: pytest.MonkeyPatch, user: Path
) -> None:
    write(user, {"format": 1, "tuned": {"NVIDIA H100 sm_90; triton 3.6.0; grouped_rows; 4 128": [32]}})
    product = Product(monkeypatch)

    def clock(run: Callable[[], Any]) -> float:
        run()
        return product.rows / 100 / (1 + product.config[0] / 1000) if product.rows else 2.0  # 128 rows: 1.2 ms

    found = tune_product(product, 64, torch.float32, CPU, clock)  # type: ignore[arg-type]
    *tiles, rows = found
    assert [one.name.rpartition(" ")[2] for one in tiles] == [str(rows) for rows in tune.ROWS]
    assert all(one.config == (64, *TILES[0][2:]) for one in tiles)
    assert rows.name.endswith("; grouped_rows; 4 128") and rows.config == (128,)
    keep(found, user)
    assert MOST_ROWS.config((4, 128), (CROSSOVER,), GPU) == (128,)


@pytest.mark.parametrize("new", [1, 64])
@pytest.mark.parametrize("window", [None, 40])
def test_attention_is_tuned_on_steps_of_the_models_shape(
    window: int | None, new: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "CONTEXT", 64)
    monkeypatch.setattr(paged, "attends", lambda *_: True)
    monkeypatch.setitem(tune.KERNELS, paged.TILE, (SimpleNamespace(kernel=None), "kernel"))  # type: ignore[arg-type]
    seen: list[tuple[int, ...]] = []

    def attention(q: torch.Tensor, cache: KvCache, group: Group, *more: Any) -> torch.Tensor:
        tokens, *_ = paged.TILE.config((len(q),), (64, 4, 3, 4), CPU)
        seen.append(tuple(q.shape))
        answer = paged_attention_reference(q, cache, group, *more)
        return answer if tokens < 128 else answer + 1

    monkeypatch.setattr(paged, "attention", attention)
    spec = replace(model_spec(LLAMA), layers=tuple(replace(one, window=window) for one in model_spec(LLAMA).layers))
    (found,) = tune.tune_attention(spec, new, torch.float32, CPU, lambda run: 1.0)
    assert set(seen) == {(32 if new == 1 else 64, spec.heads, spec.head_dim)}
    assert (found.safe, found.refused) == ((64, 4, 3, 4), 1)


def test_safe_configurations_are_among_the_choices() -> None:
    for *_, config in [(tile[0], tile[1:]) for tile in (*TILES, TILE_OF_FLOAT32)]:
        assert len(config) == len(TILE.choices)
        assert all(number in choices for number, choices in zip(config, TILE.choices, strict=True))
    assert CROSSOVER in MOST_ROWS.choices[0] and max(tune.ROWS) == CROSSOVER
    assert quantized_linear.TILE in tune.KERNELS and paged.TILE in tune.KERNELS
    assert all(hasattr(module, name) for module, name in tune.KERNELS.values())


def test_every_configuration_of_a_product_is_right(tmp_path: Path) -> None:
    """By Triton's interpreter, which spills nothing and has all the memory it wants."""
    cases = [Case(4, 32, 20, 70, 320, symmetric=False, splits=2), Case(8, 64, 3, 33, 256)]
    for times in interpreted("quantized_products", "tried", [case.arguments() for case in cases], tmp_path):
        assert len(times) == 1 + sum(len(choices) - 1 for choices in TILE.choices)
        assert None not in times.values()


def test_which_weights_are_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmkit.model.loader.gpu_capability", lambda _: (9, 0))
    odd = ("model.layers.0.mlp.down_proj", Scheme(8, inputs="token"))
    checkpoint = SimpleNamespace(quantization=QuantizationConfig("gptq", Scheme(4, 32), ("lm_head",), (odd,)))
    spec = model_spec(LLAMA)
    found = tune.weights(checkpoint, spec, torch.bfloat16, GPU)  # type: ignore[arg-type]
    q, kv, h, i = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim, spec.hidden, spec.intermediate
    assert dict(found).keys() == {Scheme(4, 32)}
    assert {shape for _, shape in found} == {(q + 2 * kv, h), (h, q), (2 * i, h), (h, i)}


def test_without_a_gpu_it_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    model = tiny_checkpoint(tmp_path / "model")
    assert main.run(["doctor", "--tune", str(model), "--json"]) == 4
    captured = capsys.readouterr()
    assert captured.out == "" and "--tune, and PyTorch sees no CUDA device" in captured.err


def test_what_was_found_is_shown(
    tmp_path: Path, user: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_checkpoint(tmp_path / "model")
    found = [Tuned(NAME, (4, 20, 7), 0.25, SAFE, 0.5, 6, 1), Tuned(NAME, (2, 10, 3), 0.125, SAFE, None, 6, 2)]
    monkeypatch.setattr(tune, "tune", lambda checkpoint, told: told("attention, 1 new tokens") or found)
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
        return next((path["active"], path["why"]) for path in paths if path["name"] == "Triton kernels")

    gpu: dict[str, Any] = {"name": "NVIDIA H100"}
    assert triton([gpu], "3.6.0") == (True, "triton 3.6.0")
    assert not triton([gpu], None)[0] and "not installed" in triton([gpu], None)[1]
    assert not triton([], "3.6.0")[0] and "need a CUDA device" in triton([], "3.6.0")[1]
