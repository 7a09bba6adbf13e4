"""What the engine's options do for a client: cached prefixes, guesses, adapters, 8-bit caches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from adapters import merged, write_adapter
from serving import ServerProcess, serving
from tiny import tiny_checkpoint

from llmkit.checkpoint.source import open_checkpoint
from llmkit.runtime.engine.types import SamplingParams
from llmkit.runtime.load import EngineOptions, load_engine

PROMPT = [5, 9, 11, 300] * 20
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("options") / "model", dtype="float32")


@pytest.fixture(scope="module")
def adapter(model: Path) -> Path:
    return write_adapter(model, model.parent / "adapter")


@pytest.fixture(scope="module")
def server(model: Path, adapter: Path) -> Iterator[ServerProcess]:
    keys = model.parent / "keys"
    keys.write_text("one\ntwo\n")
    options = {
        "served_model_name": "tiny",
        "api_key_file": str(keys),
        "speculate": 3,
        "adapters": {"tuned": str(adapter)},
        "kv_cache_memory": 64 * 2**20,
    }
    with serving(model.parent / "log", model, "one", **options) as running:
        yield running


def answer(server: ServerProcess, name: str, key: str = "one", **more: object) -> tuple[list[int], int]:
    """The ids of a greedy answer and how many prompt tokens were cached."""
    body = {"model": name, "prompt": PROMPT, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    with httpx.Client(base_url=server.url, headers={"authorization": f"Bearer {key}"}, timeout=60) as client:
        got = client.post("/v1/completions", json=body | {"return_token_ids": True} | more).raise_for_status().json()
    return got["choices"][0]["token_ids"], got["usage"]["prompt_tokens_details"]["cached_tokens"]


def expected(path: Path) -> list[int]:
    options = EngineOptions(device="cpu", prefix_cache=False)
    return load_engine(open_checkpoint(path), options).generate([PROMPT], GREEDY)[0]


def test_prefixes_are_cached_for_each_key_and_guesses_change_nothing(server: ServerProcess, model: Path) -> None:
    greedy = expected(model)
    assert answer(server, "tiny") == (greedy, 0)
    assert answer(server, "tiny", priority=-5) == (greedy, 64), "all whole blocks but the last token's"
    assert answer(server, "tiny", key="two") == (greedy, 0), "another client's prompt is not told by the time it takes"
    assert server.metric("prefix_cache_hits_total") >= 64
    assert server.metric("prefix_cache_queries_total") >= 240
    assert (
        0
        < server.metric("spec_decode_num_accepted_tokens_total")
        <= server.metric("spec_decode_num_draft_tokens_total")
    )


def test_an_adapter_is_a_model(server: ServerProcess, model: Path, adapter: Path) -> None:
    with server.client() as client:
        listed = client.get("/v1/models", headers={"authorization": "Bearer one"}).json()["data"]
    assert [(one["id"], one["parent"]) for one in listed] == [("tiny", None), ("tuned", "tiny")]
    tuned, cached = answer(server, "tuned")
    assert (tuned, cached) == (expected(merged(model, adapter, model.parent / "merged")), 0)
    assert tuned != expected(model)
    with pytest.raises(httpx.HTTPStatusError, match="404"):
        answer(server, "unknown")


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_an_8_bit_cache_takes_a_third_of_the_memory(model: Path, kind: str) -> None:
    memory = 1 << 20
    engines = [
        load_engine(open_checkpoint(model), EngineOptions(device="cpu", kv_cache_memory=memory, kv_cache_dtype=dtype))
        for dtype in ("auto", kind)
    ]
    blocks = [engine.config.num_blocks for engine in engines]
    assert blocks[1] / blocks[0] == pytest.approx(64 / 20, rel=0.02), "16 codes and a scale for 16 floats"
    answers = [engine.generate([PROMPT], GREEDY)[0] for engine in engines]
    assert answers[0][:2] == answers[1][:2] or kind == "fp8", "a random model tells FP8's error from none, not int8's"


def test_a_draft_model_must_know_the_same_tokens(model: Path, tmp_path: Path) -> None:
    from llmkit.checkpoint.errors import InputError

    other = tiny_checkpoint(tmp_path / "other", vocab_size=600)
    with pytest.raises(InputError, match=r"has 600 tokens and the model 512.*same tokenizer"):
        load_engine(open_checkpoint(model), EngineOptions(device="cpu", speculate=2, draft_model=str(other)))
    drafted = load_engine(open_checkpoint(model), EngineOptions(device="cpu", speculate=2, draft_model=str(model)))
    assert drafted.generate([PROMPT], GREEDY)[0] == expected(model)
    assert drafted.stats().accepted_total == drafted.stats().drafted_total > 0
