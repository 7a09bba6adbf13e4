"""The arguments for FlashAttention-3, checked by its documented function in plain torch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.flash_attention_library import flash_attn_with_kvcache
from support.paged_cases import DECODE, MIXED, PREFILL, SCALE, Case

from llmkit.kernels import flash_attention as flash
from llmkit.kernels.attention_metadata import AttentionBatch, BlockTable
from llmkit.kernels.kv_cache import KVCache


def without(feature: str) -> Any:
    """A build that lacks a feature, which it says as the library does."""

    def run(*arguments: Any, **options: Any) -> torch.Tensor:
        wanted = {
            "paged KV cache": options.get("page_table") is not None,
            "tanh softcapping": options["softcap"] != 0,
            "local attention": options["window_size"][0] >= 0,
            "head dimension 128": arguments[0].shape[2] == 128,
            "FP16": arguments[0].dtype == torch.float16,
        }
        if wanted[feature]:
            raise RuntimeError(f"This flash attention build does not support {feature}.\nfrom C")
        return flash_attn_with_kvcache(*arguments, **options)

    return SimpleNamespace(flash_attn_with_kvcache=run)


CASES = [
    Case("decode", *DECODE),
    Case("prompts", *PREFILL),
    Case("mixed", *MIXED),
    Case("softcap", *MIXED, softcap=5.0),
    Case("window", *MIXED, window=24),
    Case("window, decode", *DECODE, window=40),
    Case("one head each", *MIXED, heads=(4, 4)),
    # The window's left edge is in the middle of a tile, whose first pages were freed.
    Case("window, long contexts", [1, 3, 60], [300, 200, 290], window=50),
    Case("window, long contexts, softcap", [1, 1], [300, 520], window=100, softcap=5.0),
]


@pytest.fixture(autouse=True)
def fresh_probes() -> Iterator[None]:
    """Nothing that was found with other builds."""
    found = (flash.installed_builds, flash._choose_library, flash._refusal)
    for function in found:
        function.cache_clear()
    yield
    for function in found:
        function.cache_clear()


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Installs builds on what passes for a Hopper GPU; the probes run on the CPU."""

    def make(*libraries: Any) -> None:
        builds = tuple(
            flash.Build(f"build {index}", library, "" if library else "its import failed: no torch")
            for index, library in enumerate(libraries)
        )
        monkeypatch.setattr(flash, "installed_builds", lambda: builds)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))

    return make


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_flash_attention_gets_documented_arguments(case: Case) -> None:
    inputs = case.inputs
    got = flash.attention(
        inputs.q,
        inputs.clean,
        inputs.batch().metadata(case.window),
        SCALE,
        case.softcap,
        SimpleNamespace(flash_attn_with_kvcache=flash_attn_with_kvcache),
    )
    assert torch.allclose(got.float(), inputs.expected(), atol=2e-3)


def test_flash_attention_in_a_graph_takes_the_most_queries_of_its_steps() -> None:
    """A graph is captured without sequences, and replayed with up to three tokens of each."""
    sizes = []

    def run(q: torch.Tensor, *_: torch.Tensor, max_seqlen_q: int, **options: Any) -> torch.Tensor:
        sizes.append(max_seqlen_q)
        return q

    nothing = np.zeros(2, dtype=np.int64)
    tables = {None: BlockTable.build([[0], [1]])}
    batch = AttentionBatch(nothing, nothing, tables, 16, torch.device("cpu"), max_query_len=3)
    flash.attention(
        torch.zeros(6, 4, 64),
        KVCache(torch.zeros(4, 2, 16, 64)),
        batch.metadata(None),
        SCALE,
        None,
        SimpleNamespace(flash_attn_with_kvcache=run),
    )
    assert sizes == [3]


def on_hopper(head_dim: int = 128, dtype: torch.dtype = torch.bfloat16) -> Any:
    """Queries that say that they are on a GPU."""
    return SimpleNamespace(
        is_cuda=True,
        element_size=lambda: dtype.itemsize,
        shape=(1, 4, head_dim),
        dtype=dtype,
        device=torch.device("cpu"),
    )


CACHE: Any = SimpleNamespace(quantized=False)


def test_flash_attention_supports(
    install: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = CASES[0].inputs
    assert not flash.supports(inputs.q, inputs.clean), "it is not installed, and this is no GPU"
    install(SimpleNamespace(flash_attn_with_kvcache=flash_attn_with_kvcache))
    assert not flash.supports(inputs.q, inputs.clean), "this is no GPU"
    for capability, wanted in (((9, 0), True), ((8, 0), False), ((12, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert flash.supports(on_hopper(), CACHE) is wanted
        assert flash.supports(on_hopper(), CACHE, 100, 30.0) is wanted
        assert not flash.supports(on_hopper(512), CACHE)
        assert not flash.supports(on_hopper(dtype=torch.float32), CACHE)
    quantized_cache: Any = SimpleNamespace(quantized=True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert not flash.supports(on_hopper(), quantized_cache)


@pytest.mark.parametrize(
    ("feature", "plain", "window", "softcap", "half", "narrow"),
    [
        ("paged KV cache", False, False, False, False, False),  # as fa3-fwd
        ("tanh softcapping", True, True, False, True, True),  # as tokenspeed-fa3
        ("local attention", True, False, True, True, True),
        ("head dimension 128", False, False, False, False, True),
        ("FP16", True, True, True, False, True),
    ],
)
def test_flash_attention_is_used_for_what_its_build_can_do(
    feature: str,
    plain: bool,
    window: bool,
    softcap: bool,
    half: bool,
    narrow: bool,
    install: Callable[..., None],
) -> None:
    install(without(feature))
    assert flash.supports(on_hopper(), CACHE) is plain
    assert flash.supports(on_hopper(), CACHE, window=64) is window
    assert flash.supports(on_hopper(), CACHE, softcap=30.0) is softcap
    assert flash.supports(on_hopper(dtype=torch.float16), CACHE) is half
    assert flash.supports(on_hopper(64), CACHE) is narrow


def test_flash_attention_is_not_used_where_its_result_is_wrong(
    install: Callable[..., None],
) -> None:
    def run(*arguments: Any, **options: Any) -> torch.Tensor:
        return flash_attn_with_kvcache(*arguments, **(options | {"softmax_scale": 1.0}))

    install(SimpleNamespace(flash_attn_with_kvcache=run))
    assert not flash.supports(on_hopper(), CACHE)
    used, why = flash.status(torch.device("cpu"))
    assert not used and "its result on a small problem is wrong by" in why


def test_flash_attention_status_says_what_is_used_and_why(
    install: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert flash.status() == (False, "no CUDA device")
    install()
    used, why = flash.status(torch.device("cpu"))
    assert not used and "flash_attn_interface, fa3_fwd_interface is installed" in why
    install(None, without("paged KV cache"), without("tanh softcapping"))
    assert flash.status(torch.device("cpu")) == (
        True,
        "build 2 for layers with full attention, build 2 for sliding windows, not for soft-capped "
        "layers (build 0: its import failed: no torch; "
        "build 1: This flash attention build does not support paged KV cache.; "
        "build 2: This flash attention build does not support tanh softcapping.)",
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert flash.status(torch.device("cpu"))[1].startswith("it needs a Hopper GPU")


def test_flash_attention_probes_a_build_once_for_a_kind_of_layer(
    install: Callable[..., None],
) -> None:
    calls: list[int] = []

    def run(*arguments: Any, **options: Any) -> torch.Tensor:
        calls.append(1)
        return flash_attn_with_kvcache(*arguments, **options)

    install(SimpleNamespace(flash_attn_with_kvcache=run))
    for _ in range(3):
        assert flash.supports(on_hopper(), CACHE)
    assert len(calls) == 1
    assert flash.supports(on_hopper(), CACHE, window=10)
    assert flash.supports(on_hopper(), CACHE, window=20)
    assert len(calls) == 2, "the length of a window makes no difference"


def test_flash_attention_finds_builds_by_both_module_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "fa3_fwd_interface.py").write_text(
        "raise ImportError('libcudart.so.12 is missing')"
    )
    (tmp_path / "flash_attn_interface.py").write_text("flash_attn_with_kvcache = None")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    source, forward_only = flash.installed_builds()
    assert source.name == "flash_attn_interface" and source.library is not None
    assert forward_only.library is None
    assert forward_only.error == "its import failed: libcudart.so.12 is missing"
    monkeypatch.delitem(sys.modules, "flash_attn_interface")
