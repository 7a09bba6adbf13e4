"""Graphs of decode steps on a CPU: a fake capture runs the function again in each replay."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.flash_attention_library import flash_attn_with_kvcache
from support.tiny_adapters import write_adapter
from support.tiny_draft_heads import llama_with_eagle3, text_tokens
from support.tiny_models import tiny_checkpoint

from llmkit.common.errors import ShortageError
from llmkit.kernels import flash_attention
from llmkit.kernels.cpu import cpu_kernels
from llmkit.kernels.kv_cache import KVCache
from llmkit.kernels.sampling import sample
from llmkit.model.decoder import Decoder
from llmkit.model.draft_head import DraftHead
from llmkit.model.language_model import LanguageModel
from llmkit.model.lora import LoraManager, LoraSlots
from llmkit.runtime.engine.cuda_graphs import (
    BatchDescriptor,
    CudaGraphRunner,
    Sampler,
    batch_descriptors,
    capture_sizes,
    mixed_sizes,
)
from llmkit.runtime.engine.draft_model import MAX_KNOWN_TOKENS
from llmkit.runtime.engine.engine import Engine
from llmkit.runtime.engine.engine_options import EngineOptions
from llmkit.runtime.engine.engine_request import EngineRequest
from llmkit.runtime.engine.paged_model import PagedModel
from llmkit.runtime.engine.sampling_params import SamplingParams
from llmkit.runtime.engine_loader import load_engine

PROMPTS = [[5, 6, 7], [9] * 40, [11, 12], list(range(20, 60)), [3], [4, 4], [8] * 17]


class Rerun:
    """Runs a function again, where CUDA would repeat its kernels."""

    made = 0

    def __init__(self, run: Callable[[], None]) -> None:
        Rerun.made += 1
        self.replay = run
        run()


def plain(model: Path, **options: Any) -> Engine:
    one = load_engine(model, EngineOptions(device="cpu", max_model_len=128, **options))
    one.runner.graph_runner.enabled = False  # type: ignore[union-attr]
    return one


def with_spare_blocks(one: Engine, paged_model: PagedModel) -> list[KVCache]:
    """Give a model's caches a block more, as they have on CUDA; returns them."""
    paged_model.kv_caches = [
        paged_model.model.new_kv_cache(
            cache.kv.shape[1] + 1, one.config.block_size, one.config.kv_cache_dtype
        )
        for cache in paged_model.kv_caches
    ]
    return paged_model.kv_caches


def drawn(logits: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
    """What the Triton kernel gives."""
    logits = logits.float()
    return torch.where(logits.sum(-1).isfinite(), sample(logits, *parameters), -1)


def graphed(
    model: Path,
    most: int = 7,
    sampler: Sampler | None = drawn,
    max_mixed_tokens: int = 0,
    **options: Any,
) -> Engine:
    """An engine as it is on CUDA: a block more in every cache, and graphs."""
    adapters = options.pop("adapters", {})
    one = plain(model, max_num_seqs=most, **options)
    runner = one.runner
    longest = -(-one.config.max_model_len // one.config.block_size)
    runner.adapters = LoraManager(one.model, uses_slots=True)
    for name, directory in adapters.items():
        one.add_adapter(name, directory)
    runner.graph_runner = CudaGraphRunner(
        decoder(one.model),
        with_spare_blocks(one, runner.paged_model),
        longest,
        one.config.block_size,
        most,
        Rerun,
        sampler,
        max_query_len=1 + one.config.num_speculative_tokens,
        max_mixed_tokens=max_mixed_tokens,
        adapters=runner.adapters,
        hidden_size=0 if runner.draft_head is None else runner.draft_head.input_size,
    )
    draft = runner.draft_model
    if draft is not None:
        is_head = runner.draft_head is not None
        draft.graph_runner = CudaGraphRunner(
            decoder(draft.paged_model.model),
            with_spare_blocks(one, draft.paged_model),
            longest,
            one.config.block_size,
            most,
            Rerun,
            sampler,
            max_query_len=(1 + one.config.num_speculative_tokens if is_head else MAX_KNOWN_TOKENS),
            max_mixed_tokens=max_mixed_tokens,
            hidden_size=one.model.spec.hidden_size if is_head else 0,
        )
    return one


def decoder(model: LanguageModel | DraftHead) -> Decoder | DraftHead:
    assert isinstance(model, Decoder | DraftHead)
    return model


def answers(one: Engine, temperature: float = 0.7) -> list[list[int]]:
    """Requests that end one after the other, so that steps of every size come."""
    sampling = [
        SamplingParams(
            temperature=temperature * (index % 2),
            seed=index,
            max_tokens=6 + 5 * index,
            ignore_eos=True,
        )
        for index in range(len(PROMPTS))
    ]
    return one.generate(PROMPTS, sampling)


@pytest.mark.parametrize(
    ("architecture", "config", "options"),
    [
        ("llama", {}, {}),
        ("llama", {}, {"kv_cache_dtype": "int8"}),
        ("mistral", {"sliding_window": 24}, {}),
        ("gemma2", {"sliding_window": 24}, {}),
        ("qwen3", {}, {}),
        ("phi3", {}, {}),
    ],
    ids=["llama", "quantized", "window", "gemma2", "qwen3", "phi3"],
)
def test_cuda_graphs_give_the_same_tokens_as_eager_steps(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    architecture: str,
    config: dict[str, Any],
    options: dict[str, Any],
) -> None:
    model = tiny_checkpoint(tmp_path, architecture, **config)
    expected = answers(plain(model, **options))
    one = graphed(model, **options)
    seen = []
    call = Decoder.__call__

    def counted(self: Decoder, tokens: torch.Tensor, *arguments: Any) -> torch.Tensor:
        seen.append(len(tokens))
        return call(self, tokens, *arguments)

    monkeypatch.setattr(Decoder, "__call__", counted)
    assert answers(one) == expected
    decoding = seen[seen.index(7) :] if 7 in seen else seen
    assert {1, 2, 4, 7} >= set(decoding[-30:]), "every step has the size of a graph"
    assert answers(one, 0.0) == answers(plain(model, **options), 0.0), (
        "the most probable ids come from the graph"
    )


def test_cuda_graphs_of_all_sizes_are_captured_at_the_start(tmp_path: Path) -> None:
    one = graphed(tiny_checkpoint(tmp_path), most=44)
    graphs = one.runner.graph_runner
    assert isinstance(graphs, CudaGraphRunner)
    before = Rerun.made
    progress: list[tuple[int, int]] = []
    graphs.capture_all(lambda *counts: progress.append(counts))
    sizes = [1, 2, 4, 8, 16, 24, 32, 40, 44]
    assert [key.num_reqs for key in graphs.graphs] == sizes[::-1], "the largest first"
    assert progress == [(number, 9) for number in range(1, 10)]
    assert Rerun.made == before + 9
    assert graphs.can_replay([1] * 44) and not graphs.can_replay([1] * 45)
    asked = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    one.generate([[5, 6 + number] for number in range(44)], asked)
    answers(one)
    assert Rerun.made == before + 9, "nothing is captured while requests run"


def test_cuda_graph_sizes_end_with_the_largest_step_or_the_option() -> None:
    assert capture_sizes(1) == [1]
    assert capture_sizes(2) == [1, 2]
    assert capture_sizes(8) == [1, 2, 4, 8]
    assert capture_sizes(20) == [1, 2, 4, 8, 16, 20]
    assert capture_sizes(256)[-3:] == [240, 248, 256]
    assert capture_sizes(256, 1, 16) == [1, 2, 4, 8, 16]
    assert capture_sizes(256, 5, 16) == [1, 2, 3]
    assert capture_sizes(256, 5, 4) == capture_sizes(256, 1, 0) == []


@pytest.mark.parametrize("limit", [0, 9])
def test_cuda_graphs_over_the_option_are_never_captured(tmp_path: Path, limit: int) -> None:
    one = plain(tiny_checkpoint(tmp_path))
    paged = one.runner.paged_model
    model = decoder(one.model)
    limits = {"max_query_len": 4, "max_capture_size": limit}
    graphs = CudaGraphRunner(model, paged.kv_caches, 8, 16, 40, Rerun, drawn, **limits)
    before = Rerun.made
    graphs.capture_all()
    # For one token each 1, 2, 4, 8 and 9 sequences; for four tokens 1 and 2.
    assert Rerun.made - before == (7 if limit else 0)
    assert [graphs.can_replay([1] * rows) for rows in (1, 9, 10)] == [limit > 0, limit > 0, False]
    assert [graphs.can_replay([4] * rows) for rows in (1, 2, 3)] == [limit > 0, limit > 0, False]
    assert not graphs.can_replay([5])


LOOPING = [[5, 6, 7, 8] * 6, [9] * 20, [11, 12, 11, 12, 11], [3], [4, 4], [8, 9, 10] * 9]


DRAFTED = [("llama", {}), ("gemma2", {"sliding_window": 24})]


@pytest.mark.parametrize(
    ("architecture", "config", "drafter"),
    [
        *((*model, drafter) for model in DRAFTED for drafter in ("n-gram", "draft model")),
        *((*model, "the model itself") for model in DRAFTED),
        ("llama", {}, "EAGLE-3 head"),
    ],
)
def test_cuda_graphs_verify_drafts_as_eager_steps_do(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    architecture: str,
    config: dict[str, Any],
    drafter: str,
) -> None:
    options: dict[str, Any] = {"speculate": 3}
    prompts = LOOPING
    if drafter == "EAGLE-3 head":
        model, head, _, _ = llama_with_eagle3(tmp_path, steps=40)
        prompts = [text_tokens(10 + 3 * n, 7 * n) for n in range(len(LOOPING))]
        options["draft_model"] = str(head)
    else:
        model = tiny_checkpoint(tmp_path / "model", architecture, **config)
    if drafter == "the model itself":
        options["draft_model"] = str(model)
    elif drafter == "draft model":  # its drafts are often wrong
        draft = tiny_checkpoint(tmp_path / "draft", "llama", seed=5)
        options["draft_model"] = str(draft)
    asked = [
        SamplingParams(temperature=0.5 * (n % 2), seed=n, max_tokens=9 + 4 * n, ignore_eos=True)
        for n in range(len(LOOPING))
    ]
    expected = plain(model).generate(prompts, asked)
    one = graphed(model, **options)
    one.runner.capture_graphs()
    eager: list[int] = []
    forward = PagedModel.forward

    def counted(self: PagedModel, tokens: torch.Tensor, inputs: Any) -> torch.Tensor:
        eager.append(len(tokens))
        return forward(self, tokens, inputs)

    monkeypatch.setattr(PagedModel, "forward", counted)
    before = Rerun.made
    assert one.generate(prompts, asked) == expected
    assert Rerun.made == before
    stats = one.stats()
    assert stats.drafted_total > stats.accepted_total or drafter == "the model itself"
    assert stats.accepted_total > 0 or drafter == "n-gram"
    # The prompts, by the model and by the draft model; and what the prefix cache left of them.
    assert len(eager) <= (1 if drafter == "n-gram" else 2), "only prompts run without a graph"
    runner = one.runner.graph_runner
    assert isinstance(runner, CudaGraphRunner)
    assert {key.max_query_len for key in runner.graphs} == {1, 4}


def test_cuda_graphs_have_adapters_as_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_checkpoint(tmp_path / "model")
    wanted = {"all": ("", 4), "some": (r"(q_proj|down_proj)", 12), "one": (r"1.*o_proj", 3)}
    folders = {
        name: str(
            write_adapter(
                model, tmp_path / name, modules, seed=seed, rank=lambda _, rank=rank: rank, r=rank
            )
        )
        for seed, (name, (modules, rank)) in enumerate(wanted.items())
    }
    names = ["all", None, "some", "one", "all", None, "one"]

    def generate(one: Engine, names: list[str | None]) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for number, (name, prompt) in enumerate(zip(names, PROMPTS, strict=False)):
            asked = SamplingParams(temperature=0, max_tokens=6 + 3 * number, ignore_eos=True)
            one.add(EngineRequest(f"{number}", prompt, asked, adapter=name))
        while one.has_work:
            for output in one.step():
                found.setdefault(output.request_id, []).extend(output.token_ids)
        return found

    eager = plain(model, adapters=folders)
    expected = generate(eager, names)
    assert expected != generate(eager, [None] * 7), "adapters change the answers"
    one = graphed(model)
    for name in ("all", "some"):
        one.add_adapter(name, folders[name])
    one.runner.capture_graphs()
    runner = one.runner.graph_runner
    assert isinstance(runner, CudaGraphRunner)
    assert {key.has_lora for key in runner.graphs} == {True, False}
    one.add_adapter("one", folders["one"])  # two slots are taken: all graphs are captured again
    before = Rerun.made
    for _ in range(2):
        assert generate(one, names) == expected
    one.remove_adapter("one")
    one.remove_adapter("some")
    # Into a free slot, whose rank is enough.
    one.add_adapter("again", folders["some"])
    again = ["again" if name in ("one", "some") else name for name in names]
    renamed = ["some" if name == "again" else name for name in again]
    assert generate(one, again) == generate(eager, renamed)
    assert Rerun.made == before, "ids of adapters are no part of a graph"


def test_cuda_graphs_are_captured_again_after_an_adapter_that_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_checkpoint(tmp_path / "model")
    one = graphed(model)
    one.add_adapter("first", write_adapter(model, tmp_path / "first"))
    one.runner.capture_graphs()
    asked = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)

    def generate(name: str) -> list[int]:
        one.add(EngineRequest(name, [5, 6, 7], asked, adapter=name))
        outputs = [one.step() for _ in range(8)]
        return [token for (output,) in outputs for token in output.token_ids]

    expected = generate("first")
    second = write_adapter(model, tmp_path / "second", seed=1)
    calls = []
    grow = LoraSlots.grow

    def short(self: LoraSlots, *sizes: Any) -> None:
        calls.append(self)
        if len(calls) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        grow(self, *sizes)

    before = Rerun.made
    with monkeypatch.context() as patch:
        patch.setattr(LoraSlots, "grow", short)
        with pytest.raises(ShortageError, match="not enough memory for the adapter 'second'"):
            one.add_adapter("second", second)
    assert one.adapters == ["first"]
    assert Rerun.made > before, "some linears have moved to larger memory"
    assert generate("first") == expected
    one.add_adapter("second", second)
    eager = plain(model, adapters={"second": str(second)})
    eager.add(EngineRequest("second", [5, 6, 7], asked, adapter="second"))
    wanted = [token for _ in range(8) for token in eager.step()[0].token_ids]
    assert generate("second") == wanted


def test_cuda_graphs_leave_adapters_of_experts_to_eager_steps(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model", "mixtral")
    one = graphed(model)
    one.add_adapter("attention", write_adapter(model, tmp_path / "a", "q_proj"))
    one.add_adapter("experts", write_adapter(model, tmp_path / "b", r"experts\.0\.w1"))
    manager = one.runner.adapters
    assert [manager.slot(id_) for id_ in (0, *manager.adapter_ids.values())] == [0, 1, None]


def test_cuda_graph_rows_without_a_sequence_write_to_the_padding_block_only(tmp_path: Path) -> None:
    one = graphed(tiny_checkpoint(tmp_path), most=8)
    one.generate(
        [[5, 6, 7]] * 3, SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
    )  # 3 of 4 rows
    used = {
        int(block)
        for cache in one.runner.paged_model.kv_caches
        for block in cache.kv.flatten(2).any(-1).any(0).nonzero()
    }
    spare = one.runner.paged_model.kv_caches[0].kv.shape[1] - 1
    assert spare in used and 1 <= len(used - {spare}) <= 3, (
        "a block for each of three short requests"
    )
    assert all(bool(torch.isfinite(cache.kv).all()) for cache in one.runner.paged_model.kv_caches)


def test_cuda_graphs_are_off_for_experts_routed_on_the_host(tmp_path: Path) -> None:
    one = graphed(tiny_checkpoint(tmp_path, "mixtral"))
    before = Rerun.made
    one.runner.graph_runner.capture_all()  # type: ignore[union-attr]
    assert answers(one) == answers(plain(tmp_path))
    assert Rerun.made == before


def test_cuda_graphs_are_not_used_for_prompts(tmp_path: Path) -> None:
    """A step that does not sample after all of its tokens takes no graph."""
    one = graphed(tiny_checkpoint(tmp_path))
    asked: list[tuple[int, bool]] = []  # requests, is_mixed
    can_replay = one.runner.graph_runner.can_replay
    one.runner.graph_runner.can_replay = lambda lens, *more: (  # type: ignore[method-assign]
        asked.append((len(lens), more[-1])) or can_replay(lens, *more)
    )
    one.generate([[5] * 40], SamplingParams(temperature=0, max_tokens=5, ignore_eos=True))
    assert asked == [(1, True)] + [(1, False)] * 4, "the prompt is a mixed step"


@pytest.mark.parametrize(("architecture", "is_scaled"), [("llama", False), ("gemma2", True)])
def test_cuda_graph_logits_keep_the_models_dtype_unless_they_are_scaled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, is_scaled: bool
) -> None:
    monkeypatch.setattr(cpu_kernels, "library", None)  # they would compute in float32
    one = graphed(tiny_checkpoint(tmp_path, architecture), most=1, sampler=argmax, dtype="bfloat16")
    asked = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, logprobs=1)
    one.add(EngineRequest("a", [5, 6, 7], asked))
    found = [output for _ in range(4) for output in one.step()]
    runner = one.runner.graph_runner
    assert isinstance(runner, CudaGraphRunner)
    (graph,) = runner.graphs.values()
    assert graph.logits.dtype == (torch.float32 if is_scaled else torch.bfloat16)
    for output in found:
        assert output.logprobs is not None
        assert output.logprobs[0].logprob == pytest.approx(output.logprobs[0].top[0][1])


@pytest.mark.parametrize(
    ("architecture", "config", "beside"),
    [
        ("llama", {}, ""),
        ("gemma2", {"sliding_window": 24}, ""),
        ("llama", {}, "adapters"),
        ("llama", {}, "n-gram"),
        ("gemma2", {"sliding_window": 24}, "draft model"),
        ("llama", {}, "EAGLE-3 head"),
        ("llama", {}, "n-gram and adapters"),
    ],
)
def test_cuda_graphs_run_prompts_beside_decodes_as_eager_steps_do(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    architecture: str,
    config: dict[str, Any],
    beside: str,
) -> None:
    options: dict[str, Any] = {"max_num_batched_tokens": 48}
    prompts = [*LOOPING, *PROMPTS[:2], list(range(30, 90)), [7, 7, 7]]
    if beside == "EAGLE-3 head":
        model, head, _, _ = llama_with_eagle3(tmp_path, steps=40)
        prompts = [text_tokens(10 + 6 * n, 7 * n) for n in range(len(prompts))]
        drafts: dict[str, Any] = {"speculate": 3, "draft_model": str(head)}
    else:
        model = tiny_checkpoint(tmp_path / "model", architecture, **config)
        drafts = {"speculate": 3} if "n-gram" in beside else {}
    if beside == "draft model":
        drafts = {"speculate": 3, "draft_model": str(model)}
    names: list[str | None] = [None] * len(prompts)
    if "adapters" in beside:
        names = [("one", "two", None)[n % 3] for n in range(len(prompts))]
        options["adapters"] = {
            name: str(write_adapter(model, tmp_path / name, seed=seed))
            for seed, name in enumerate(("one", "two"))
        }
    eager: list[int] = []
    forward = PagedModel.forward

    def generate(one: Engine) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for number, prompt in enumerate(prompts):  # one after the other, beside the others' decodes
            asked = SamplingParams(
                temperature=0.7 * (number % 2), seed=number, max_tokens=20, ignore_eos=True
            )
            one.add(EngineRequest(f"{number}", prompt, asked, adapter=names[number]))
            for output in one.step() + one.step():
                found.setdefault(output.request_id, []).extend(output.token_ids)
        while one.has_work:
            for output in one.step():
                found.setdefault(output.request_id, []).extend(output.token_ids)
        return found

    def counted(self: PagedModel, tokens: torch.Tensor, inputs: Any) -> torch.Tensor:
        eager.append(len(tokens))
        return forward(self, tokens, inputs)

    expected = generate(plain(model, **options))
    one = graphed(model, 10, max_mixed_tokens=40, **options, **drafts)
    one.runner.capture_graphs()
    before = Rerun.made
    monkeypatch.setattr(PagedModel, "forward", counted)
    assert generate(one) == expected
    assert Rerun.made == before
    assert eager and min(eager) > 40, "only steps with more tokens than a graph has"
    assert one.stats().accepted_total > 0 or not drafts
    runner = one.runner.graph_runner
    assert isinstance(runner, CudaGraphRunner)
    mixed = [key for key in runner.graphs if not key.is_uniform and not key.has_lora]
    assert [(key.num_reqs, key.num_tokens) for key in mixed] == [(11, 40), (11, 32), (11, 16)]
    with_lora = {key for key in runner.graphs if key.has_lora}
    wanted = {key._replace(has_lora=True) for key in runner.graphs if "adapters" in beside}
    assert with_lora == wanted


def test_cuda_graphs_share_a_block_table_for_each_window(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path, "gemma2", sliding_window=24)
    one = graphed(model, 9, max_mixed_tokens=40, speculate=2)
    one.runner.capture_graphs()
    runner = one.runner.graph_runner
    assert isinstance(runner, CudaGraphRunner)
    tables = {
        (window, table.data_ptr(), table.stride())
        for graph in runner.graphs.values()
        for window in graph.padding_blocks
        for table in [graph.batch.metadata(window).device_tensors().block_table]
    }
    assert len(runner.graphs) > 8 and len(tables) == 2
    rows = {
        len(graph.batch.metadata(None).device_tensors().block_table)
        for graph in runner.graphs.values()
    }
    assert rows == {key.num_reqs for key in runner.graphs} and max(rows) == 10


@pytest.mark.parametrize("speculate", [0, 2])
def test_cuda_graphs_read_no_other_sequences_values_where_blocks_were_freed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, speculate: int
) -> None:
    """FlashAttention-3 multiplies what lies before a window by 0, and 0 times NaN is NaN."""
    model = tiny_checkpoint(tmp_path, "mistral", sliding_window=24)
    calls: list[int] = []

    def counted(*arguments: Any, **options: Any) -> torch.Tensor:
        calls.append(len(arguments[0]))
        return flash_attn_with_kvcache(*arguments, **options)

    library = SimpleNamespace(flash_attn_with_kvcache=counted)
    attention = partial(flash_attention.attention, library=library)
    monkeypatch.setattr(cpu_kernels, "library", None)  # keys and values as a GPU has them
    monkeypatch.setattr(flash_attention, "supports", lambda *_: True)
    monkeypatch.setattr(flash_attention, "attention", attention)
    found = []
    for left_behind in (0.0, float("nan")):  # by sequences before
        one = graphed(
            model, max_mixed_tokens=40, speculate=speculate, dtype="bfloat16", prefix_cache=False
        )
        caches = [cache for cache in one.runner.paged_model.kv_caches if isinstance(cache, KVCache)]
        for cache in caches:
            cache.kv[:, 1:] = left_behind
        one.runner.capture_graphs()
        found.append(answers(one))
        assert not any(cache.kv[:, 0].any() for cache in caches), "the null block stays zero"
    assert found[0] == found[1] and calls


def test_cuda_graphs_give_the_sampler_aligned_parameters(tmp_path: Path) -> None:
    """Triton would compile the sampler again for other alignments."""
    places: set[int] = set()

    def noted(logits: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        places.update(parameter.data_ptr() % 16 for parameter in parameters)
        return argmax(logits)

    model = tiny_checkpoint(tmp_path, "gemma2")
    one = graphed(model, 9, noted, max_mixed_tokens=40, speculate=2)
    one.runner.capture_graphs()
    assert places == {0}


def test_mixed_cuda_graphs_end_with_the_largest_step() -> None:
    assert mixed_sizes(0) == mixed_sizes(8192, 0) == []
    assert mixed_sizes(40) == [16, 32, 40]
    assert mixed_sizes(8192) == [16, 32, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512]
    assert mixed_sizes(8192, 20) == [16, 20]


def test_cuda_graphs_have_room_for_what_a_step_samples() -> None:
    def mixed(*sizes: int) -> list[BatchDescriptor]:
        return [one for one in batch_descriptors(*sizes) if not one.is_uniform]

    plain = mixed(100, 1, 8192, 8192)
    assert [one.num_reqs for one in plain][:4] == [17, 33, 65, 97], "one stays unused"
    assert [one.num_logits for one in plain][-3:] == [100] * 3
    assert [one.num_logits for one in mixed(100, 4, 8192, 8192)][-3:] == [384, 400, 400]
    verified = [one for one in batch_descriptors(3, 4) if one.max_query_len == 4]
    assert verified == [BatchDescriptor(n, 4 * n, 4 * n) for n in (1, 2, 3)]


def argmax(logits: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
    return logits.argmax(-1)
