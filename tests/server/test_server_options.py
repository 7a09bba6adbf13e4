"""Options of the engine as a client sees them: prefix cache, drafts, adapters, 8-bit KV cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from support.server_process import LlmkitServer, serving
from support.tiny_adapters import merged, write_adapter
from support.tiny_models import tiny_checkpoint

from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.runtime.engine.engine_options import EngineOptions
from llmkit.runtime.engine.sampling_params import SamplingParams
from llmkit.runtime.engine_loader import load_engine

MODEL = {"dtype": "float32"}
PROMPT = [5, 9, 11, 300] * 20
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def adapter(model: Path) -> Path:
    return write_adapter(model, model.parent / "adapter")


@pytest.fixture(scope="module")
def adapter_server(model: Path, adapter: Path) -> Iterator[LlmkitServer]:
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


def answer(
    server: LlmkitServer, name: str, key: str = "one", **more: object
) -> tuple[list[int], int]:
    """The ids of a greedy answer and how many prompt tokens were cached."""
    body = {"model": name, "prompt": PROMPT, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    with httpx.Client(
        base_url=server.url, headers={"authorization": f"Bearer {key}"}, timeout=60
    ) as client:
        got = (
            client.post("/v1/completions", json=body | {"return_token_ids": True} | more)
            .raise_for_status()
            .json()
        )
    return got["choices"][0]["token_ids"], got["usage"]["prompt_tokens_details"]["cached_tokens"]


def expected(path: Path) -> list[int]:
    options = EngineOptions(device="cpu", prefix_cache=False)
    return load_engine(open_checkpoint(path), options).generate([PROMPT], GREEDY)[0]


def test_options_prefix_cache_per_key_and_speculation_keep_outputs(
    adapter_server: LlmkitServer, model: Path
) -> None:
    greedy = expected(model)
    assert answer(adapter_server, "tiny") == (greedy, 0)
    assert answer(adapter_server, "tiny", priority=-5) == (greedy, 64), (
        "all whole blocks but the last token's"
    )
    assert answer(adapter_server, "tiny", key="two") == (greedy, 0), (
        "timing does not reveal another client's prompt"
    )
    assert adapter_server.metric("prefix_cache_hits_total") >= 64
    assert adapter_server.metric("prefix_cache_queries_total") >= 240
    assert (
        0
        < adapter_server.metric("spec_decode_num_accepted_tokens_total")
        <= adapter_server.metric("spec_decode_num_draft_tokens_total")
    )


def test_options_adapter_is_a_model(
    adapter_server: LlmkitServer, model: Path, adapter: Path
) -> None:
    with adapter_server.client() as client:
        listed = client.get("/v1/models", headers={"authorization": "Bearer one"}).json()["data"]
    assert [(one["id"], one["parent"]) for one in listed] == [("tiny", None), ("tuned", "tiny")]
    tuned, cached = answer(adapter_server, "tuned")
    assert (tuned, cached) == (expected(merged(model, adapter, model.parent / "merged")), 0)
    assert tuned != expected(model)
    with pytest.raises(httpx.HTTPStatusError, match="404"):
        answer(adapter_server, "unknown")


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_options_8_bit_kv_cache_takes_a_third_of_the_memory(model: Path, kind: str) -> None:
    memory = 1 << 20
    engines = [
        load_engine(
            open_checkpoint(model),
            EngineOptions(device="cpu", kv_cache_memory=memory, kv_cache_dtype=dtype),
        )
        for dtype in ("auto", kind)
    ]
    blocks = [engine.config.num_blocks for engine in engines]
    assert blocks[1] / blocks[0] == pytest.approx(64 / 20, rel=0.02), (
        "16 quantized values and a scale for 16 floats"
    )
    answers = [engine.generate([PROMPT], GREEDY)[0] for engine in engines]
    assert answers[0][:2] == answers[1][:2] or kind == "fp8", (
        "a random model tells FP8's error from none, not int8's"
    )


def test_options_draft_model_must_have_the_same_tokens(model: Path, tmp_path: Path) -> None:
    from llmkit.common.errors import InputError

    other = tiny_checkpoint(tmp_path / "other", vocab_size=600)
    with pytest.raises(InputError, match=r"has 600 tokens and the model 512.*same tokenizer"):
        load_engine(
            open_checkpoint(model), EngineOptions(device="cpu", speculate=2, draft_model=str(other))
        )
    drafted = load_engine(
        open_checkpoint(model), EngineOptions(device="cpu", speculate=2, draft_model=str(model))
    )
    assert drafted.generate([PROMPT], GREEDY)[0] == expected(model)
    assert drafted.stats().accepted_total == drafted.stats().drafted_total > 0
