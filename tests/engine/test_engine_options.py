"""The defaults and limits of the engine's options and sizes."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any, get_type_hints

import pytest
import torch

from llmkit.common.errors import UsageError
from llmkit.common.options import Option
from llmkit.runtime.engine.engine_config import EngineConfig
from llmkit.runtime.engine.engine_options import ADAPTERS, EngineOptions, parse_adapters

# The least and the largest value of each number; None: no limit.
LIMITS: dict[str, tuple[float, float | None]] = {
    "max_num_seqs": (1, None),
    "max_num_batched_tokens": (1, None),
    "max_cudagraph_capture_size": (0, None),
    "gpu_memory_utilization": (0.05, 1),
    "tp": (1, None),
    "pp": (1, None),
    "ep": (1, None),
    "speculate": (0, 64),
    "dp": (1, 64),
}


def option(name: str) -> Option:
    hint = get_type_hints(EngineOptions, include_extras=True)[name]
    return next(value for value in hint.__metadata__ if isinstance(value, Option))


@pytest.mark.parametrize("name", LIMITS)
def test_engine_options_refuse_numbers_beyond_their_limits(name: str) -> None:
    low, high = LIMITS[name]
    check = option(name).check
    assert check is not None
    step = 0.001 if name == "gpu_memory_utilization" else 1
    for allowed in (low, low + step, 1000 if high is None else high):
        check("--it", allowed)
    for refused in (low - step, *([] if high is None else [high + step])):
        with pytest.raises(UsageError, match=r"--it: .* is out of range"):
            check("--it", refused)


def test_engine_options_with_limits_are_all_listed() -> None:
    assert {name for name in get_type_hints(EngineOptions) if option(name).check} == LIMITS.keys()


def test_engine_options_plan_sizes_unless_they_are_given() -> None:
    options = EngineOptions()
    assert (options.device, options.dtype, options.kv_cache_dtype) == ("auto", "auto", "auto")
    assert (options.max_model_len, options.max_num_batched_tokens) == (None, None)
    assert (options.kv_cache_memory, options.draft_model) == (None, None)
    assert (options.max_num_seqs, options.gpu_memory_utilization) == (256, 0.9)
    assert (options.tp, options.pp, options.ep, options.dp) == (1, 1, 1, 1)
    assert (options.cpu_offload, options.speculate, options.adapters) == (0, 0, {})
    assert (options.prefix_cache, options.require_native) == (True, False)
    with pytest.raises(FrozenInstanceError):
        options.tp = 2  # type: ignore[misc]


def test_engine_config_defaults_to_one_step_at_a_time_with_a_prefix_cache() -> None:
    config = EngineConfig(100, 10, torch.device("cpu"), torch.float32)
    assert (config.max_num_seqs, config.max_num_batched_tokens) == (256, 8192)
    assert (config.block_size, config.prefill_chunk_size) == (16, 2048)
    assert (config.sliding_windows, config.num_window_blocks) == ((None,), None)
    assert (config.pipeline_parallel_size, config.num_speculative_tokens) == (1, 0)
    assert (config.enable_prefix_caching, config.async_scheduling) == (True, False)
    assert not config.enforce_eager


@pytest.mark.parametrize(
    ("window", "window_blocks", "blocks"),
    [(None, None, 10), (None, 4, 10), (8, None, 10), (8, 4, 4)],
)
def test_engine_config_has_fewer_blocks_for_windows_when_they_are_given(
    window: int | None, window_blocks: int | None, blocks: int
) -> None:
    config: Any = EngineConfig(
        100, 10, torch.device("cpu"), torch.float32, num_window_blocks=window_blocks
    )
    assert config.num_blocks_for(window) == blocks


@pytest.mark.parametrize("value", ["it", "=dir", "it=", "="])
def test_adapters_need_a_name_and_a_directory(value: str) -> None:
    with pytest.raises(UsageError, match=r"--lora .* is not NAME=DIR"):
        parse_adapters("--lora", [value])


def test_adapters_have_a_name_each() -> None:
    adapters = parse_adapters("--lora", ["a=x", "b=y=z"])
    assert adapters == {"a": "x", "b": "y=z"}
    assert ADAPTERS.format(adapters) == ["a=x", "b=y=z"]
    with pytest.raises(UsageError, match="'a=y': the name 'a' is given twice"):
        parse_adapters("--lora", ["a=x", "a=y"])
