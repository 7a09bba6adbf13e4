"""--method auto and --effort: which algorithm they choose."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llmkit.common.errors import UsageError
from llmkit.quant.algorithm import Algorithm, AutoRound, NormTuning
from llmkit.quant.awq import AwqSmoother
from llmkit.quant.gptq import GptqQuantizer
from llmkit.quant.grid import FULL_SEARCH
from llmkit.quant.methods import ASYMMETRY, MethodOptions
from llmkit.quant.quantize_options import Effort
from llmkit.quant.smoothquant import SmoothQuant

DAMP = 0.02
GPTQ = GptqQuantizer(DAMP, FULL_SEARCH)


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        ("w4a16", Algorithm(GPTQ.asymmetric(ASYMMETRY))),
        ("w8a8", Algorithm(replace(GPTQ, search=None).asymmetric(ASYMMETRY), SmoothQuant())),
        ("fp8", Algorithm(replace(GPTQ, search=None).asymmetric(ASYMMETRY))),
        ("mxfp8", Algorithm(GPTQ.asymmetric(ASYMMETRY))),
        ("nvfp4", Algorithm(GPTQ.asymmetric(ASYMMETRY))),
        ("nvfp4a16", Algorithm(GPTQ.asymmetric(ASYMMETRY))),
    ],
)
def test_auto_method_chooses_by_scheme(scheme: str, expected: Algorithm) -> None:
    options = MethodOptions("auto", scheme_name=scheme, damp=DAMP)
    options.check()
    assert options.calibrated
    assert options.algorithm() == expected


def test_auto_method_does_not_compare_with_the_dense_model_in_the_fallback_or_a_hurry() -> None:
    fast = MethodOptions("auto", effort="fast", damp=DAMP).algorithm()
    assert fast == Algorithm(replace(GPTQ, search=None))
    assert MethodOptions("auto", damp=DAMP).algorithm(is_native=False) == Algorithm(GPTQ)


def test_auto_method_writes_symmetric_compressed_tensors_unless_told_otherwise() -> None:
    formats = {}
    for name in (None, "gptq", "awq"):
        options = MethodOptions("auto", format=name)
        options.check()
        scheme = options.scheme(64)
        assert scheme is not None
        formats[options.chosen_format] = scheme.symmetric
    assert formats == {"compressed-tensors": True, "gptq": True, "awq": False}


@pytest.mark.parametrize(
    ("effort", "learning"),
    [("fast", None), ("normal", None), ("high", AutoRound(20, 4096)), ("max", AutoRound(60, 8192))],
)
@pytest.mark.parametrize("method", ["auto", "gptq", "awq"])
def test_effort_chooses_the_steps_of_learned_rounding(
    method: str, effort: Effort, learning: AutoRound | None
) -> None:
    options = MethodOptions(method, effort=effort, damp=DAMP)
    options.check()
    algorithm = options.algorithm()
    assert algorithm.auto_round == learning
    assert algorithm.norm_tuning == (None if learning is None else NormTuning())
    if learning is not None and method != "auto":
        assert (algorithm.quantizer, algorithm.smoother) == (GPTQ, AwqSmoother())


@pytest.mark.parametrize(
    ("method", "scheme", "expected"),
    [
        ("auto", "w4a16", ("fast", "normal", "high", "max")),
        ("auto", "w4afp8", ("fast", "normal", "high", "max")),
        ("auto", "nvfp4", ("fast", "normal", "high", "max")),
        ("gptq", "w4a16", ("fast", "normal", "high", "max")),
        ("auto", "fp8", ("fast", "normal")),
        ("gptq", "w8a8", ("fast", "normal")),
        ("fp8", "fp8", ("fast", "normal", "high", "max")),
        ("rtn", "nvfp4", ("fast", "normal")),
    ],
)
def test_efforts_that_change_nothing_are_refused(
    method: str, scheme: str, expected: tuple[Effort, ...]
) -> None:
    efforts: tuple[Effort, ...] = ("fast", "normal", "high", "max")
    for effort in efforts:
        options = MethodOptions(method, scheme_name=scheme, effort=effort)
        assert options.useful_efforts == expected
        if effort in expected:
            options.check()
            continue
        message = f"--effort {effort} (does nothing with|takes four times as long as normal with)"
        with pytest.raises(UsageError, match=message):
            options.check()


@pytest.mark.parametrize(
    ("method", "scheme", "effort", "expected"),
    [
        ("auto", "w4a16", "normal", 0.01),
        ("auto", "w4a16", "high", 0.1),
        ("gptq", "w4a16", "max", 0.1),
        ("auto", "nvfp4", "high", 0.1),
        ("auto", "fp8", "high", 0.01),  # FP8's rounding is not learned
        ("auto", "w8a8", "max", 0.01),
    ],
)
def test_damping_leaves_room_for_learned_rounding(
    method: str, scheme: str, effort: Effort, expected: float
) -> None:
    options = MethodOptions(method, scheme_name=scheme, effort=effort)
    assert options.dampening_frac == expected
    assert replace(options, damp=0.03).dampening_frac == 0.03
