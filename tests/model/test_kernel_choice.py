"""Which kernel computes what on GPUs that this machine does not have."""

from __future__ import annotations

import json

import pytest
import torch

from llmkit.cli import doctor, main
from llmkit.kernels import triton_support
from llmkit.kernels.cpu import cpu_kernels
from llmkit.model import linear
from llmkit.model.kernel_choice import (
    WORKS,
    Gpu,
    KernelChoice,
    cpu_kernel_choices,
    gpu_kernel_choices,
)


def choices(gpu: Gpu) -> dict[str, KernelChoice]:
    found = gpu_kernel_choices(gpu)
    assert tuple(choice.work for choice in found) == WORKS
    assert all(choice.kernel for choice in found)
    return {choice.work: choice for choice in found}


DEQUANTIZED = "torch, dequantized when loaded"
WEIGHT_ONLY = "Triton, weight-only"
FP8_PRODUCTS = ("Triton, FP8 products", "Triton, FP8 products")  # of blocks and of MXFP8
SCALED_AFTER = "torch._scaled_mm, scales in a Triton kernel after it"


@pytest.mark.parametrize(
    ("capability", "version", "expected"),
    [
        ((7, 5), "2.13.0", [DEQUANTIZED] * 8),
        ((8, 0), "2.13.0", [WEIGHT_ONLY, "torch._int_mm", *[WEIGHT_ONLY] * 6]),
        ((8, 6), "2.11.0", [WEIGHT_ONLY, "torch._int_mm", *[WEIGHT_ONLY] * 6]),
        (
            (8, 9),
            "2.11.0+cu130",
            [WEIGHT_ONLY, "torch._int_mm", SCALED_AFTER, *FP8_PRODUCTS, *[WEIGHT_ONLY] * 3],
        ),
        (
            (8, 9),
            "2.12.0",
            [WEIGHT_ONLY, "torch._int_mm", "torch._scaled_mm", *FP8_PRODUCTS, *[WEIGHT_ONLY] * 3],
        ),
        (
            (9, 0),
            "2.11.0",
            [WEIGHT_ONLY, "torch._int_mm", "torch._scaled_mm", *FP8_PRODUCTS, *[WEIGHT_ONLY] * 3],
        ),
    ],
)
def test_kernel_choice_by_capability(
    capability: tuple[int, int], version: str, expected: list[str]
) -> None:
    found = choices(Gpu(capability=capability, torch_version=version))
    assert [found[work].kernel for work in WORKS[1:-1]] == expected
    assert found["attention"].kernel == found["sampler"].kernel == "Triton"


def test_kernel_choice_has_products_of_fp4_from_blackwell_on() -> None:
    blackwell = choices(Gpu(capability=(10, 0), torch_version="2.13.0"))
    assert blackwell["NVFP4"].kernel == blackwell["MXFP4"].kernel == "Triton, FP4 products"
    assert blackwell["W4AFP8"].kernel == WEIGHT_ONLY


def test_kernel_choice_says_why() -> None:
    ampere = choices(Gpu(capability=(8, 0)))
    assert ampere["FP8"].why == "sm_80 has no products of this FP8"
    assert ampere["FP8 blocks"].why == ampere["FP8"].why
    assert choices(Gpu(capability=(7, 0)))["W4A16"].why == "sm_70 is older than sm_80"
    ada = choices(Gpu(capability=(8, 9), torch_version="2.11.0+cu130"))
    assert "torch 2.11.0 (pytorch#177651)" in ada["FP8"].why
    amd = choices(Gpu(capability=triton_support.AMD_CAPABILITY, is_amd=True))
    assert amd["FP8"].kernel == WEIGHT_ONLY and amd["FP8"].why.startswith("an AMD GPU has no")
    bare = choices(Gpu(capability=(9, 0), has_triton=False))
    assert bare["W4A16"].why == "Triton is not installed" and bare["attention"].kernel == "torch"
    flash = choices(Gpu(capability=(9, 0), flash_attention=(True, "fa3 1.0 for all layers")))
    assert flash["attention"] == KernelChoice(
        "attention", "FlashAttention-3", "fa3 1.0 for all layers"
    )


@pytest.mark.parametrize("hip", [None, "7.2"])
def test_amd_gpus_count_as_their_products(hip: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 4))  # gfx942
    monkeypatch.setattr(linear, "tl", object())
    monkeypatch.setattr(triton_support, "interprets", False)
    assert linear.gpu_capability("cuda") == ((9, 4) if hip is None else (8, 0))
    assert triton_support.runs_ptx() == (hip is None)
    monkeypatch.setattr(linear, "tl", None)
    assert linear.gpu_capability("cuda") == (0, 0)


def test_doctor_shows_the_kernel_of_each_kind_of_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(["doctor", "--json"]) == 0
    kernels = json.loads(capsys.readouterr().out)["kernels"]
    assert tuple(choice["work"] for choice in kernels) == WORKS
    ampere = gpu_kernel_choices(Gpu(capability=(8, 0)))
    monkeypatch.setattr(doctor, "kernel_choices", lambda _: ampere)
    monkeypatch.setenv("COLUMNS", "200")
    assert main.run(["doctor"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if "FP8 blocks" in line]
    assert len(rows) == 1
    assert WEIGHT_ONLY in rows[0] and "sm_80 has no products of this FP8" in rows[0]


def test_doctor_examines_the_current_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 6))
    found = {choice.work: choice for choice in doctor.kernel_choices(has_triton=True)}
    assert found["FP8"].why == "sm_86 has no products of this FP8"
    assert found["attention"].kernel == "Triton" and found["attention"].why
    found = {choice.work: choice for choice in doctor.kernel_choices(has_triton=False)}
    assert found["sampler"].kernel == "torch"


def test_kernel_choice_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    found = cpu_kernel_choices()
    assert tuple(choice.work for choice in found) == WORKS
    if cpu_kernels.library is not None:
        assert {choice.kernel for choice in found} == {f"compiled, level {cpu_kernels.level()}"}
    monkeypatch.setattr(cpu_kernels, "library", None)
    assert cpu_kernel_choices()[0].kernel == "torch"
    assert tuple(choice.work for choice in cpu_kernel_choices()) == WORKS
