"""LoRA adapters: each request gets the tokens of the model with its adapter merged."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_adapters import merged, write_adapter
from support.tiny_families import COMMON, family_oracle

from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.common.errors import InputError, ShortageError
from llmkit.model import lora
from llmkit.model.decoder import Decoder
from llmkit.model.weight_loader import load_model
from llmkit.runtime.engine.engine import Engine
from llmkit.runtime.engine.engine_config import EngineConfig
from llmkit.runtime.engine.engine_errors import RequestError
from llmkit.runtime.engine.engine_outputs import EngineOutput
from llmkit.runtime.engine.engine_request import EngineRequest
from llmkit.runtime.engine.sampling_params import SamplingParams

OUTPUT = 12
GREEDY = SamplingParams(temperature=0.0, max_tokens=OUTPUT, ignore_eos=True)
WANTED = {
    "all": "",
    "some": r"layers\.[02].*(q_proj|v_proj|qkv_proj|down_proj|w2|mlp.gate.weight)",
    "one": r"3.*o_proj",
}


@dataclass
class Case:
    """A model, its adapters, and by adapter the outputs of the merged model."""

    path: Path
    adapters: dict[str, Path]
    prompts: list[list[int]]
    expected: dict[str | None, list[list[int]]]

    def load(self) -> Decoder:
        return load_model(open_checkpoint(self.path), torch.float32)


def case(name: str, path: Path) -> Case:
    family_oracle(name, path / "base")
    generator = torch.Generator().manual_seed(5)
    prompts = [
        torch.randint(3, COMMON["vocab_size"], (n,), generator=generator).tolist()
        for n in (1, 9, 22, 40)
    ]
    adapters = {
        name: write_adapter(path / "base", path / name, wanted, seed=seed)
        for seed, (name, wanted) in enumerate(WANTED.items())
    }
    models: Mapping[str | None, Path] = {None: path / "base"} | {
        name: merged(path / "base", adapter, path / f"{name} merged")
        for name, adapter in adapters.items()
    }
    expected = {
        name: engine(load_model(open_checkpoint(model), torch.float32)).generate(prompts, GREEDY)
        for name, model in models.items()
    }
    return Case(path / "base", adapters, prompts, expected)


def engine(model: Decoder, draft: Decoder | None = None, **chosen: object) -> Engine:
    sizes = {"max_model_len": 64, "num_blocks": 200, "block_size": 16}
    config = EngineConfig(device=torch.device("cpu"), dtype=torch.float32, **(sizes | chosen))
    return Engine(model, config, draft=draft)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return case("llama", tmp_path_factory.mktemp("llama"))


def run(
    running: Engine, requests: list[EngineRequest]
) -> tuple[dict[str, list[int]], dict[str, EngineOutput]]:
    """The answers to the requests, run together, and the last output of each."""
    answers: dict[str, list[int]] = {request.request_id: [] for request in requests}
    last = {}
    for request in requests:
        running.add(request)
    while running.has_work:
        for output in running.step():
            assert output.error is None
            answers[output.request_id] += output.token_ids
            last[output.request_id] = output
    assert all(pool.num_used_blocks == 0 for pool in running.scheduler.pools)
    return answers, last


def all_at_once(case: Case, running: Engine) -> None:
    """Every prompt with every adapter and without one, at once.

    No adapter has its rows side by side.
    """
    wanted = {
        f"{name} {index}": (name, index)
        for index in range(len(case.prompts))
        for name in case.expected
    }
    answers, _ = run(
        running,
        [
            EngineRequest(i, case.prompts[n], GREEDY, adapter=name)
            for i, (name, n) in wanted.items()
        ],
    )
    assert answers == {i: case.expected[name][n] for i, (name, n) in wanted.items()}


def start(case: Case, **chosen: object) -> Engine:
    running = engine(case.load(), **chosen)
    for name, path in case.adapters.items():
        running.add_adapter(name, path)
    return running


@pytest.mark.parametrize(
    "family",
    [
        "llama",
        "llama-mha-bias-tied",
        "qwen3",
        "phi3",
        "gemma2",
        "gemma3",
        "olmo2",
        "mixtral",
        "qwen3-moe",
        "glm4",
        "starcoder2",
        "cohere2",
        "apertus",
        "glm4-moe",
        "qwen2-moe",
        "ernie4.5-moe",
        "afmoe",
        "gemma4",
    ],
)
def test_adapters_of_one_batch_equal_peft(tmp_path: Path, family: str) -> None:
    made = case(family, tmp_path)
    assert len({str(answers) for answers in made.expected.values()}) == 4, (
        "adapters change what is answered"
    )
    running = start(made)
    assert running.adapters == ["all", "some", "one"]
    all_at_once(made, running)
    for name in made.adapters:
        answers, _ = run(running, [EngineRequest("alone", made.prompts[2], GREEDY, adapter=name)])
        assert answers["alone"] == made.expected[name][2]
    for name in made.adapters:
        running.remove_adapter(name)
    assert running.generate(made.prompts, GREEDY) == made.expected[None]


def test_adapters_share_packed_weights(llama: Case, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(llama.path, base)
    weights = {
        name: tensor.bfloat16() for name, tensor in load_file(base / "model.safetensors").items()
    }
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    running = engine(load_model(open_checkpoint(base), torch.float32, packed=True))
    for name, path in llama.adapters.items():
        running.add_adapter(name, path)
        whole = load_model(open_checkpoint(merged(base, path, tmp_path / name)), torch.float32)
        answers, _ = run(
            running,
            [EngineRequest(str(i), p, GREEDY, adapter=name) for i, p in enumerate(llama.prompts)],
        )
        assert list(answers.values()) == engine(whole).generate(llama.prompts, GREEDY)


MODES: dict[str, dict[str, object]] = {
    "without a prefix cache": {"enable_prefix_caching": False},
    "chunked": {"max_num_batched_tokens": 9, "prefill_chunk_size": 5},
    "preempted": {"num_blocks": 26},
    "ahead and preempted": {"async_scheduling": True, "num_blocks": 26},
    "speculative": {"num_speculative_tokens": 3},
}


@pytest.mark.parametrize("mode", MODES)
def test_adapter_outputs_do_not_depend_on_the_engine_mode(llama: Case, mode: str) -> None:
    running = start(llama, **MODES[mode])
    all_at_once(llama, running)
    assert ("preempted" in mode) == (running.stats().preemptions_total > 0)


def test_draft_model_runs_without_adapters(llama: Case) -> None:
    model = llama.load()
    running = engine(
        model, draft=model, num_speculative_tokens=3
    )  # the same object: what is done to one is done to the other
    for name, path in llama.adapters.items():
        running.add_adapter(name, path)
    all_at_once(llama, running)
    before = running.stats()
    assert before.accepted_total < before.drafted_total
    answers, _ = run(
        running, [EngineRequest("base", llama.prompts[3], GREEDY, cache_salt="nothing cached")]
    )
    assert answers["base"] == llama.expected[None][3]
    after = running.stats()
    assert (
        after.accepted_total - before.accepted_total
        == after.drafted_total - before.drafted_total
        > 0
    )


def test_adapters_are_added_and_removed_while_requests_run(llama: Case) -> None:
    running = engine(llama.load(), max_num_batched_tokens=30)
    answers: dict[str, list[int]] = {}

    def add(name: str | None, index: int) -> None:
        answers[f"{name} {index}"] = []
        running.add(EngineRequest(f"{name} {index}", llama.prompts[index], GREEDY, adapter=name))

    def steps(count: int) -> None:
        for _ in range(count):
            for output in running.step():
                answers[output.request_id] += output.token_ids

    add(None, 2)
    steps(3)
    running.add_adapter("all", llama.adapters["all"])
    add("all", 2)
    add("all", 3)
    steps(3)
    running.add_adapter("one", llama.adapters["one"])
    add("one", 1)
    steps(20)
    assert not running.has_work
    running.remove_adapter("all")
    add("one", 3)
    add(None, 3)
    steps(30)
    assert not running.has_work
    places = {
        i: (None if i.startswith("None") else i.split()[0], int(i.split()[1])) for i in answers
    }
    assert answers == {i: llama.expected[name][n] for i, (name, n) in places.items()}


def test_prefix_cache_is_separate_for_each_adapter(llama: Case) -> None:
    running = start(llama)
    prompt = llama.prompts[3]
    names = [None, *llama.adapters]
    for cached in (0, (len(prompt) - 1) // 16 * 16):
        for name in names:
            answers, last = run(running, [EngineRequest("a", prompt, GREEDY, adapter=name)])
            assert answers["a"] == llama.expected[name][3]
            assert last["a"].cached_tokens == cached
    running.remove_adapter("one")
    running.add_adapter("one", llama.adapters["some"])
    answers, last = run(running, [EngineRequest("a", prompt, GREEDY, adapter="one")])
    assert answers["a"] == llama.expected["some"][3]
    assert last["a"].cached_tokens == 0, "another adapter has that name now"


def test_block_hashes_distinguish_salt_and_adapter(llama: Case) -> None:
    running = start(llama)
    for salt, name in (("", "all"), ("1", None), (" 1", None), ("1", "all"), ("2", "all")):
        _, last = run(
            running, [EngineRequest("a", llama.prompts[3], GREEDY, cache_salt=salt, adapter=name)]
        )
        assert last["a"].cached_tokens == 0


def test_adapter_names_that_are_refused(llama: Case) -> None:
    running = engine(llama.load(), max_num_seqs=1)
    with pytest.raises(RequestError, match="no adapter 'all'; none is loaded") as caught:
        running.add(EngineRequest("a", [5], GREEDY, adapter="all"))
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    assert not running.has_work
    running.add_adapter("all", str(llama.adapters["all"]))
    with pytest.raises(RequestError, match="no adapter ''; there are all"):
        running.add(EngineRequest("a", [5], GREEDY, adapter=""))
    with pytest.raises(RequestError, match="an adapter 'all' already") as caught:
        running.add_adapter("all", llama.adapters["one"])
    assert caught.value.code == "already_exists"
    with pytest.raises(RequestError, match="no adapter 'one'"):
        running.remove_adapter("one")
    for request in "ab":  # one runs, one waits
        running.add(EngineRequest(request, [5], GREEDY, adapter="all"))
    running.step()
    with pytest.raises(RequestError, match="2 running requests use the adapter 'all'") as caught:
        running.remove_adapter("all")
    assert caught.value.code == "in_use"
    running.cancel("a")
    running.cancel("b")
    running.remove_adapter("all")
    assert running.adapters == []


def test_adapter_that_cannot_be_loaded_leaves_no_trace(
    llama: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = engine(llama.load())
    linears = [dict(layer.linears) for layer in running.model.layers]
    with pytest.raises(InputError, match="has use_dora True"):
        running.add_adapter("a", write_adapter(llama.path, tmp_path / "a", use_dora=True))

    def fails(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(lora, "_place_rows", fails)
    with pytest.raises(ShortageError, match="not enough memory for the adapter 'a'"):
        running.add_adapter("a", llama.adapters["all"])
    assert running.adapters == []
    assert [layer.linears for layer in running.model.layers] == linears
