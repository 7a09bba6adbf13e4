"""`--dtype` on a CPU: the type of weights, inputs and keys, beside float32 hidden states."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from support.tiny_adapters import merged, write_adapter
from support.tiny_draft_heads import glm_with_mtp
from support.tiny_fallback import make_oracle
from support.tiny_families import FAMILIES, REPRESENTATIVES, family_oracle, oracle_logits
from support.tiny_models import tiny_checkpoint

from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.common.errors import ShortageError
from llmkit.kernels.cpu import cpu_kernels
from llmkit.model.families import checkpoint_spec
from llmkit.model.full_forward import window_logits
from llmkit.model.linear import held_dtype
from llmkit.model.weight_loader import load_model
from llmkit.runtime.engine.cpu_graphs import CpuGraphRunner
from llmkit.runtime.engine.engine import Engine
from llmkit.runtime.engine.engine_options import EngineOptions
from llmkit.runtime.engine.engine_request import EngineRequest
from llmkit.runtime.engine.sampling_params import SamplingParams
from llmkit.runtime.engine_loader import load_engine
from llmkit.runtime.engine_plan import plan_engine
from llmkit.runtime.memory_plan import loaded_bytes
from llmkit.runtime.part_loader import StartupReport, load_part

needs_library = pytest.mark.skipif(
    cpu_kernels.library is None, reason=f"compiled kernels: {cpu_kernels.status()}"
)
FLOAT, BRAIN, HALF = torch.float32, torch.bfloat16, torch.float16
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
PROMPTS = [[5, 6, 7], [9] * 20, list(range(20, 50))]
TOKENS = torch.randint(3, 60, (24,), generator=torch.Generator().manual_seed(4))
SHORT_PROMPTS = torch.randint(3, 60, (15, 4), generator=torch.Generator().manual_seed(5))
# The most mean KL of tiny models, whose logits are of a standard deviation of about 1.
MAX_KL = {"bfloat16": 1e-3, "float16": 1e-4}


def engine(model: Path, report: StartupReport | None = None, **options: Any) -> Engine:
    sizes = {"max_model_len": 64, "kv_cache_memory": 1 << 22, "max_num_seqs": 8}
    return load_engine(model, EngineOptions(device="cpu", **(sizes | options)), report)


def mean_kl(expected: torch.Tensor, logits: torch.Tensor) -> float:
    wanted, found = (values.double().log_softmax(-1) for values in (expected, logits))
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


def kl_of_prompts(oracle: torch.nn.Module, one: Engine) -> float:
    """The mean KL on a prompt; with experts, the median of those of many short prompts.

    Rounding makes a router choose other experts now and then, and the tokens that follow attend to
    the token concerned.
    """
    prompts = TOKENS[None] if one.model.spec.moe is None else SHORT_PROMPTS
    found = []
    for prompt, logits in zip(prompts, window_logits(one.model, prompts), strict=True):
        found.append(mean_kl(oracle_logits(oracle, prompt), logits))
    return median(found)


def prompt_logprobs(one: Engine, adapter: str | None = None) -> torch.Tensor:
    sampling = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    one.add(EngineRequest("0", PROMPTS[2], sampling, adapter=adapter))
    found: list[float] = []
    while one.has_work:
        for output in one.step():
            found += [entry.logprob for entry in output.prompt_logprobs or ()]
    return torch.tensor(found)


@pytest.mark.parametrize(
    ("stored", "dtype", "held"),
    [
        (FLOAT, FLOAT, FLOAT),
        (FLOAT, BRAIN, BRAIN),
        (FLOAT, HALF, HALF),
        (BRAIN, FLOAT, BRAIN),
        (BRAIN, BRAIN, BRAIN),
        (BRAIN, HALF, HALF),
        (HALF, FLOAT, HALF),
        (HALF, BRAIN, BRAIN),
        (HALF, HALF, HALF),
    ],
)
def test_held_dtype_is_the_stored_one_where_it_loses_nothing(
    stored: torch.dtype, dtype: torch.dtype, held: torch.dtype
) -> None:
    assert held_dtype(stored, dtype) == held


@needs_library
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", REPRESENTATIVES)
def test_dtype_of_a_cpu_runs_recorded_steps_and_keeps_the_logits(
    tmp_path: Path, name: str, dtype: str
) -> None:
    check_dtype(tmp_path, name, dtype)


@needs_library
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in REPRESENTATIVES])
def test_dtype_of_a_cpu_of_all_families(tmp_path: Path, name: str) -> None:
    check_dtype(tmp_path, name, "bfloat16")


def check_dtype(path: Path, name: str, dtype: str) -> None:
    """A float32 checkpoint, whose weights are rounded."""
    oracle = family_oracle(name, path)
    one = engine(path, dtype=dtype)
    one.generate(PROMPTS, GREEDY)
    runner = one.runner.graph_runner
    assert isinstance(runner, CpuGraphRunner)
    assert runner.enabled, "an operator of torch computes in its decode steps"
    assert runner.num_graphs > 0
    assert one.model.dtype == FLOAT
    assert one.config.dtype_name == dtype
    assert one.config.kv_cache_dtype == dtype
    assert kl_of_prompts(oracle, one) < MAX_KL[dtype]


@needs_library
def test_dtype_of_a_cpu_in_the_fallback(tmp_path: Path) -> None:
    oracle = make_oracle("gpt2", tmp_path)
    one = engine(tmp_path, dtype="bfloat16")
    assert one.model.spec.transformers is not None
    assert one.model.dtype == FLOAT
    logits = next(window_logits(one.model, TOKENS[None]))
    assert mean_kl(oracle_logits(oracle, TOKENS), logits) < MAX_KL["bfloat16"]


@needs_library
def test_weights_of_a_float32_checkpoint_take_half_the_memory_as_planned(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint(tmp_path, dtype="float32"))
    norms = 5 * 64 * 4
    held = {}
    for dtype in ("auto", "float32", "bfloat16", "float16"):
        plan = plan_engine(checkpoint, EngineOptions(device="cpu", dtype=dtype, max_model_len=64))
        model = load_model(checkpoint, plan.dtype, packed=True, weight_dtype=plan.weight_dtype)
        held[dtype] = loaded_bytes(model) - norms
        assert plan.memory.weight_bytes == loaded_bytes(model)
        assert plan.as_dict()["dtype"] == ("float32" if dtype == "auto" else dtype)
    assert held["auto"] == held["float32"] == 2 * held["bfloat16"] == 2 * held["float16"]


@needs_library
def test_weights_that_fit_in_bfloat16_only_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_checkpoint(tmp_path, dtype="float32")
    plan = plan_engine(open_checkpoint(path), EngineOptions(device="cpu", max_model_len=64))
    monkeypatch.setattr(
        "llmkit.runtime.engine_plan.free_bytes", lambda *_: plan.memory.weight_bytes - 1
    )
    with pytest.raises(ShortageError, match=r"in float32 and cpu has .*Use --dtype bfloat16"):
        engine(path)


@needs_library
def test_dtype_of_a_bfloat16_checkpoint_changes_no_logit_of_float32_inputs(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path)
    auto, brain = (
        engine(path, dtype=dtype, cpu_activations="float32") for dtype in ("auto", "bfloat16")
    )
    first, second = (next(window_logits(one.model, TOKENS[None])) for one in (auto, brain))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("dtype", "wanted", "used"),
    [
        ("auto", "auto", "auto"),
        ("bfloat16", "auto", "auto"),
        ("float32", "auto", "float32"),
        ("float16", "auto", "float32"),
        ("float32", "int8", "int8"),
        ("bfloat16", "float32", "float32"),
    ],
)
def test_inputs_are_rounded_to_bfloat16_unless_another_dtype_is_asked_for(
    model: Path, dtype: str, wanted: Any, used: str
) -> None:
    options = EngineOptions(device="cpu", dtype=dtype, cpu_activations=wanted, max_model_len=64)
    assert plan_engine(open_checkpoint(model), options).cpu_activations == used


@pytest.mark.parametrize(
    ("dtype", "used"), [("bfloat16", "auto"), ("float32", "float32"), ("float16", "float32")]
)
def test_inputs_of_a_checkpoint_in_another_dtype_stay_in_float32(
    tmp_path: Path, dtype: str, used: str
) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint(tmp_path, dtype=dtype))
    options = EngineOptions(device="cpu", max_model_len=64)
    assert plan_engine(checkpoint, options).cpu_activations == used


def test_start_says_what_inputs_are_rounded_to(model: Path) -> None:
    report = StartupReport()
    engine(model, report, dtype="float32")
    line = next(path for path in report.fast_paths if path.startswith("CPU activations: "))
    assert ("float32" if cpu_kernels.library is not None else "the model's dtype") in line


@needs_library
def test_dtype_of_a_cpu_is_that_of_a_draft_head(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(glm_with_mtp(tmp_path))
    heads = []
    for dtype in ("float32", "bfloat16"):
        options = EngineOptions(device="cpu", dtype=dtype, speculate="mtp:2", max_model_len=64)
        part = load_part(checkpoint, checkpoint_spec(checkpoint), options, StartupReport())
        assert part.draft is not None
        assert part.draft.dtype == FLOAT
        heads.append(loaded_bytes(part.draft))
    assert heads[1] < 0.65 * heads[0]
    expected = engine(tmp_path, dtype="bfloat16").generate(PROMPTS, GREEDY)
    assert (
        engine(tmp_path, dtype="bfloat16", speculate="mtp:2").generate(PROMPTS, GREEDY) == expected
    )


@needs_library
def test_adapters_are_applied_to_weights_of_the_dtype(tmp_path: Path) -> None:
    family_oracle("llama", tmp_path / "base")
    adapter = write_adapter(tmp_path / "base", tmp_path / "adapter")
    rounded = engine(tmp_path / "base", dtype="bfloat16", adapters={"one": str(adapter)})
    whole = engine(merged(tmp_path / "base", adapter, tmp_path / "merged"))
    found = prompt_logprobs(rounded, "one")
    wanted = prompt_logprobs(whole)
    assert (found - wanted).abs().mean() < 0.05 * (prompt_logprobs(rounded) - wanted).abs().mean()


@needs_library
def test_draft_model_follows_the_dtype(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, dtype="float32")
    one = engine(path, dtype="bfloat16", draft_model=str(path), speculate=3)
    assert one.generate(PROMPTS, GREEDY) == engine(path, dtype="bfloat16").generate(PROMPTS, GREEDY)


def test_dtype_of_a_cpu_without_compiled_kernels_is_that_of_hidden_states(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_kernels, "library", None)
    path = tiny_checkpoint(tmp_path, dtype="float32")
    one = engine(path, dtype="bfloat16")
    assert one.model.dtype == BRAIN
    assert one.config.kv_cache_dtype is None
    assert loaded_bytes(one.model) == loaded_bytes(engine(path).model) // 2
    assert all(len(tokens) == GREEDY.max_tokens for tokens in one.generate(PROMPTS, GREEDY))
