"""The caches behind options, from outside: prefixes on disk over a restart, and answers that are given again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from serving import ServerProcess, serving, wait_for
from tiny import tiny_checkpoint

from llmkit.runtime.server.engines.messages import Add, Output
from llmkit.runtime.server.response_cache import ResponseCache

HEADER = "x-llmkit-cache"
LONG = "the quick brown fox jumps over the lazy dog " * 60
BODY: dict[str, Any] = {"model": "tiny", "prompt": "hello, how are you?", "temperature": 0, "max_tokens": 8}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("caches") / "model", max_position_embeddings=4096)


@pytest.fixture(scope="module")
def options(model: Path) -> dict[str, Any]:
    keys = model.parent / "keys"
    keys.write_text("one\ntwo\n")
    return {
        "served_model_name": "tiny",
        "api_key_file": str(keys),
        "prefix_cache_dir": str(model.parent / "prefixes"),
        "response_cache": 1 << 20,
        "kv_cache_memory": 1 << 23,
    }


@pytest.fixture(scope="module")
def server(model: Path, options: dict[str, Any]) -> Iterator[ServerProcess]:
    with serving(model.parent / "log", model, "one", **options) as running:
        yield running


def completed(http: httpx.Client, **more: Any) -> tuple[str | None, dict[str, Any]]:
    """What the header tells, and the answer without what is new in each."""
    answer = http.post("/v1/completions", json=BODY | more)
    document = answer.raise_for_status().json()
    return answer.headers.get(HEADER), {key: document[key] for key in document.keys() - {"id", "created"}}


def test_the_same_request_gets_the_same_answer_and_usage_without_the_engine(
    server: ServerProcess, http: httpx.Client
) -> None:
    said, first = completed(http, logprobs=2)
    steps = server.metric("iteration_tokens_total_count")
    again, second = completed(http, logprobs=2)
    other_order = http.post(
        "/v1/completions", json=dict(reversed(list((BODY | {"logprobs": 2, "user": "me"}).items())))
    )
    assert (said, again, other_order.headers[HEADER]) == ("miss", "hit", "hit")
    assert first == second
    assert first["usage"]["completion_tokens"] == 8
    assert server.metric("iteration_tokens_total_count") == steps
    assert server.metric("response_cache_hits_total") == 2
    assert server.metric("response_cache_queries_total") == 3
    assert 100 < server.metric("response_cache_bytes") < 1 << 20


def test_a_stream_a_chat_and_several_answers_are_remembered_too(client: openai.OpenAI, http: httpx.Client) -> None:
    whole = completed(http, prompt="a stream")[1]["choices"][0]["text"]
    stream = client.completions.with_raw_response.create(**BODY | {"prompt": "a stream", "stream": True})
    assert stream.headers[HEADER] == "hit"
    assert "".join(chunk.choices[0].text for chunk in stream.parse()) == whole
    chat: Any = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "temperature": 0, "max_tokens": 9}
    told = [client.chat.completions.with_raw_response.create(**chat) for _ in range(2)]
    assert [one.headers[HEADER] for one in told] == ["miss", "hit"]
    assert told[0].parse().choices[0].message.content == told[1].parse().choices[0].message.content
    several = {"prompt": "several", "n": 3, "temperature": 1, "seed": 7}
    assert completed(http, **several)[0] == "miss"
    assert completed(http, **several | {"n": 2})[0] == "hit", "each answer is remembered by itself"
    assert completed(http, **several | {"n": 4})[0] == "miss"


@pytest.mark.parametrize("change", [
    {"max_tokens": 7}, {"prompt": "hello, how are you"}, {"min_tokens": 3}, {"logit_bias": {"5": 1}},
    {"logprobs": 1}, {"repetition_penalty": 1.1}, {"ignore_eos": True}, {"stop": ["zzz"]},
    {"guided_choice": ["a", "b"]},
])  # fmt: skip
def test_whatever_changes_the_answer_makes_another_request(http: httpx.Client, change: dict[str, Any]) -> None:
    completed(http)
    assert completed(http, **change)[0] == "miss"
    assert completed(http, **change)[0] == "hit"


def test_answers_that_stop_at_a_text_are_remembered(http: httpx.Client) -> None:
    text = completed(http, prompt="stops", max_tokens=20, ignore_eos=True)[1]["choices"][0]["text"]
    stop = {"prompt": "stops", "max_tokens": 20, "ignore_eos": True, "stop": text[len(text) // 2 :][:3]}
    told = [completed(http, **stop) for _ in range(2)]
    assert [header for header, _ in told] == ["miss", "hit"]
    assert told[0][1] == told[1][1]
    assert told[0][1]["choices"][0]["finish_reason"] == "stop"


def test_what_chance_has_a_part_in_is_not_remembered(http: httpx.Client) -> None:
    assert completed(http, temperature=0.5)[0] is None
    assert completed(http, temperature=0.5)[0] is None
    http.post("/v1/completions", json=BODY | {"prompt": "x" * 9000})  # refused: nothing is kept of it
    long: dict[str, Any] = {"max_tokens": 1000, "ignore_eos": True}
    with http.stream("POST", "/v1/completions", json=BODY | long | {"stream": True}):
        pass  # gone before the end
    assert completed(http, **long)[0] == "miss"


def test_no_client_is_told_what_another_was(server: ServerProcess, http: httpx.Client) -> None:
    completed(http, prompt="mine")
    with httpx.Client(base_url=server.url, headers={"x-api-key": "two"}, timeout=60) as other:
        assert completed(other, prompt="mine")[0] == "miss"


def test_the_cache_has_a_limit_and_forgets_what_was_not_asked_for_longest() -> None:
    cache = ResponseCache(1100)
    keys = [cache.key(Add("x", [index], 4, temperature=0), ()) for index in range(4)]
    said = [Output("x", list(range(20)), "length", None, 1, 0)]
    known = [key for key in keys if key is not None]
    assert len(set(known)) == 4
    for key in known[:3]:
        cache.put(key, said)
    assert cache.get(known[0]) == said
    cache.put(known[3], said)
    assert [cache.get(key) is not None for key in known] == [True, False, True, True]
    assert 0 < cache.bytes <= 1100
    cache.put(b"large", [Output("x", list(range(9000)), "length", None, 1, 0)])
    assert cache.get(b"large") is None
    assert cache.key(Add("x", [1], 4, temperature=0, adapter="may be another one tomorrow"), ()) is None


def test_a_long_prefix_outlives_the_server_for_its_own_client(
    server: ServerProcess, model: Path, options: dict[str, Any], http: httpx.Client
) -> None:
    texts = [completed(http, prompt=LONG + end)[1]["choices"][0]["text"] for end in ("a", "b", "c")]
    wait_for(lambda: server.metric("prefix_store_bytes") > 0)
    kept = len(list((model.parent / "prefixes").glob("*.kv")))
    assert kept >= 2
    with serving(model.parent / "log2", model, "one", **options) as again:
        with httpx.Client(base_url=again.url, headers={"x-api-key": "two"}, timeout=60) as other:
            usage = completed(other, prompt=LONG + "c")[1]["usage"]
            assert usage["prompt_tokens_details"]["cached_tokens"] == 0
        with again.client() as mine:
            told = completed(mine, prompt=LONG + "c")[1]
        assert told["usage"]["prompt_tokens_details"]["cached_tokens"] == 256 * kept
        assert told["choices"][0]["text"] == texts[2]
        assert again.metric("external_prefix_cache_hits_total") == 256 * kept
        assert again.metric("external_prefix_cache_queries_total") >= 2 * 256 * kept
        assert again.metric("prefix_store_damaged_total") == 0
