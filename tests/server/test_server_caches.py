"""The response cache, and the prefix cache on disk across a restart."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from support.engine_requests import engine_request
from support.openai_client import openai_client
from support.server_process import LlmkitServer, serving, wait_for
from support.tiny_families import family_oracle
from support.tiny_models import VOCAB, write_tokenizer

from llmkit.runtime.engine.engine_outputs import EngineOutput
from llmkit.runtime.server.response_cache import ResponseCache

MODEL = {"max_position_embeddings": 4096}
HEADER = "x-llmkit-cache"
LONG = "the quick brown fox jumps over the lazy dog " * 60
BODY: dict[str, Any] = {
    "model": "tiny",
    "prompt": "hello, how are you?",
    "temperature": 0,
    "max_tokens": 8,
}


@pytest.fixture(scope="module")
def cache_options(model: Path) -> dict[str, Any]:
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
def caching_server(model: Path, cache_options: dict[str, Any]) -> Iterator[LlmkitServer]:
    with serving(model.parent / "log", model, "one", **cache_options) as running:
        yield running


@pytest.fixture(scope="module")
def caching_client(caching_server: LlmkitServer) -> Iterator[openai.OpenAI]:
    with openai_client(caching_server) as client:
        yield client


@pytest.fixture
def caching_http(caching_server: LlmkitServer) -> Iterator[httpx.Client]:
    with caching_server.client() as client:
        yield client


def completed(http: httpx.Client, **more: Any) -> tuple[str | None, dict[str, Any]]:
    """What the header tells, and the answer without what is new in each."""
    answer = http.post("/v1/completions", json=BODY | more)
    document = answer.raise_for_status().json()
    return answer.headers.get(HEADER), {
        key: document[key] for key in document.keys() - {"id", "created"}
    }


def test_response_cache_repeats_answer_and_usage_without_the_engine(
    caching_server: LlmkitServer, caching_http: httpx.Client
) -> None:
    first_header, first = completed(caching_http, logprobs=2)
    steps = caching_server.metric("iteration_tokens_total_count")
    second_header, second = completed(caching_http, logprobs=2)
    other_order = caching_http.post(
        "/v1/completions", json=dict(reversed(list((BODY | {"logprobs": 2, "user": "me"}).items())))
    )
    assert (first_header, second_header, other_order.headers[HEADER]) == ("miss", "hit", "hit")
    assert first == second
    assert first["usage"]["completion_tokens"] == 8
    assert caching_server.metric("iteration_tokens_total_count") == steps
    assert caching_server.metric("response_cache_hits_total") == 2
    assert caching_server.metric("response_cache_queries_total") == 3
    assert 100 < caching_server.metric("response_cache_bytes") < 1 << 20


def test_response_cache_serves_streams_chats_and_several_answers(
    caching_client: openai.OpenAI, caching_http: httpx.Client
) -> None:
    whole = completed(caching_http, prompt="a stream")[1]["choices"][0]["text"]
    stream = caching_client.completions.with_raw_response.create(
        **BODY | {"prompt": "a stream", "stream": True}
    )
    assert stream.headers[HEADER] == "hit"
    assert "".join(chunk.choices[0].text for chunk in stream.parse()) == whole
    chat: Any = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "hi"}],
        "temperature": 0,
        "max_tokens": 9,
    }
    answers = [caching_client.chat.completions.with_raw_response.create(**chat) for _ in range(2)]
    assert [one.headers[HEADER] for one in answers] == ["miss", "hit"]
    assert (
        answers[0].parse().choices[0].message.content
        == answers[1].parse().choices[0].message.content
    )
    several = {"prompt": "several", "n": 3, "temperature": 1, "seed": 7}
    assert completed(caching_http, **several)[0] == "miss"
    assert completed(caching_http, **several | {"n": 2})[0] == "hit", (
        "each answer is remembered by itself"
    )
    assert completed(caching_http, **several | {"n": 4})[0] == "miss"


@pytest.mark.parametrize(
    "change",
    [
        {"max_tokens": 7},
        {"prompt": "hello, how are you"},
        {"min_tokens": 3},
        {"logit_bias": {"5": 1}},
        {"logprobs": 1},
        {"repetition_penalty": 1.1},
        {"ignore_eos": True},
        {"stop": ["zzz"]},
        {"guided_choice": ["a", "b"]},
    ],
)
def test_response_cache_key_covers_what_changes_the_answer(
    caching_http: httpx.Client, change: dict[str, Any]
) -> None:
    completed(caching_http)
    assert completed(caching_http, **change)[0] == "miss"
    assert completed(caching_http, **change)[0] == "hit"


def test_response_cache_keeps_answers_that_end_at_a_stop_string(caching_http: httpx.Client) -> None:
    text = completed(caching_http, prompt="stops", max_tokens=20, ignore_eos=True)[1]["choices"][0][
        "text"
    ]
    stop = {
        "prompt": "stops",
        "max_tokens": 20,
        "ignore_eos": True,
        "stop": text[len(text) // 2 :][:3],
    }
    answers = [completed(caching_http, **stop) for _ in range(2)]
    assert [header for header, _ in answers] == ["miss", "hit"]
    assert answers[0][1] == answers[1][1]
    assert answers[0][1]["choices"][0]["finish_reason"] == "stop"


def test_response_cache_skips_random_answers(caching_http: httpx.Client) -> None:
    assert completed(caching_http, temperature=0.5)[0] is None
    assert completed(caching_http, temperature=0.5)[0] is None
    caching_http.post(
        "/v1/completions", json=BODY | {"prompt": "x" * 9000}
    )  # refused: nothing is kept of it
    long: dict[str, Any] = {"max_tokens": 1000, "ignore_eos": True}
    with caching_http.stream("POST", "/v1/completions", json=BODY | long | {"stream": True}):
        pass  # gone before the end
    assert completed(caching_http, **long)[0] == "miss"


def test_response_cache_is_separate_for_each_client(
    caching_server: LlmkitServer, caching_http: httpx.Client
) -> None:
    completed(caching_http, prompt="mine")
    with httpx.Client(
        base_url=caching_server.url, headers={"x-api-key": "two"}, timeout=60
    ) as other:
        assert completed(other, prompt="mine")[0] == "miss"


def test_response_cache_evicts_the_least_recently_used() -> None:
    cache = ResponseCache(1100)
    keys = [cache.key(engine_request("x", [index], 4, temperature=0), ()) for index in range(4)]
    outputs = [EngineOutput("x", list(range(20)), "length", None, 1, 0)]
    known = [key for key in keys if key is not None]
    assert len(set(known)) == 4
    for key in known[:3]:
        cache.put(key, outputs)
    assert cache.get(known[0]) == outputs
    cache.put(known[3], outputs)
    assert [cache.get(key) is not None for key in known] == [True, False, True, True]
    assert 0 < cache.bytes <= 1100
    cache.put(b"large", [EngineOutput("x", list(range(9000)), "length", None, 1, 0)])
    assert cache.get(b"large") is None
    assert (
        cache.key(
            engine_request("x", [1], 4, temperature=0, adapter="may be another one tomorrow"), ()
        )
        is None
    )


def test_prefix_store_survives_a_restart_for_its_client(
    caching_server: LlmkitServer,
    model: Path,
    cache_options: dict[str, Any],
    caching_http: httpx.Client,
) -> None:
    answers = [completed(caching_http, prompt=LONG + end)[1] for end in ("a", "b", "c")]
    texts = [answer["choices"][0]["text"] for answer in answers]
    kept = answers[0]["usage"]["prompt_tokens"] // 256  # pages
    assert kept >= 2
    wait_for(lambda: len(list((model.parent / "prefixes").glob("*.kv"))) == kept)
    assert caching_server.metric("prefix_store_bytes") > 0
    with serving(model.parent / "log2", model, "one", **cache_options) as restarted:
        with httpx.Client(
            base_url=restarted.url, headers={"x-api-key": "two"}, timeout=60
        ) as other:
            usage = completed(other, prompt=LONG + "c")[1]["usage"]
            assert usage["prompt_tokens_details"]["cached_tokens"] == 0
        with restarted.client() as mine:
            answer = completed(mine, prompt=LONG + "c")[1]
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 256 * kept
        assert answer["choices"][0]["text"] == texts[2]
        assert restarted.metric("external_prefix_cache_hits_total") == 256 * kept
        assert restarted.metric("external_prefix_cache_queries_total") >= 2 * 256 * kept
        assert restarted.metric("prefix_store_damaged_total") == 0


@pytest.mark.slow  # the test before has a model without states
def test_second_turn_of_a_hybrid_model_finds_the_first_after_the_server_was_killed(
    tmp_path: Path,
) -> None:
    model = tmp_path / "hybrid"
    family_oracle("qwen3.5", model, vocab_size=VOCAB, max_position_embeddings=4096)
    write_tokenizer(model)
    prefixes = tmp_path / "prefixes"
    options = {
        "served_model_name": "tiny",
        "prefix_cache_dir": str(prefixes),
        "kv_cache_memory": 1 << 23,
        "max_num_seqs": 4,
    }
    conversation = [{"role": "user", "content": LONG}]
    body: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": 8}

    def answer(server: LlmkitServer) -> tuple[str, dict[str, Any]]:
        with server.client() as client:
            answered = client.post("/v1/chat/completions", json=body | {"messages": conversation})
        document = answered.raise_for_status().json()
        return document["choices"][0]["message"]["content"], document["usage"]

    def cached_tokens(usage: dict[str, Any]) -> int:
        cached: int = usage["prompt_tokens_details"]["cached_tokens"]
        return cached

    with serving(tmp_path / "log", model, **options) as server:
        text, first_usage = answer(server)
        num_pages = first_usage["prompt_tokens"] // 256
        assert num_pages >= 2
        conversation.append({"role": "assistant", "content": text})
        conversation.append({"role": "user", "content": "And then?"})
        text, usage = answer(server)
        assert cached_tokens(usage) >= first_usage["prompt_tokens"] // 16 * 16
        # The pages of the first turn, and the states after the last of them.
        wait_for(lambda: len(list(prefixes.glob("*.kv"))) == num_pages + 1)
        num_states = server.metric("state_cache_checkpoints")
        assert 2 <= num_states <= server.metric("state_cache_max_checkpoints")
        assert server.metric("state_cache_bytes") % num_states == 0 < num_states
        # The second turn continued where the first one ended.
        assert server.metric("prefix_cache_without_state_total") == 0
        # The second conversation with a system prompt finds the state after it.
        system = {"role": "system", "content": LONG[::-1]}
        num_system_tokens = 0
        two_turns = conversation
        for question in ("a?", "Something else?"):
            conversation = [system, {"role": "user", "content": question}]
            _, usage = answer(server)
            assert cached_tokens(usage) >= num_system_tokens
            num_system_tokens = (usage["prompt_tokens"] - 20) // 16 * 16
        assert cached_tokens(usage) > 256
        conversation = two_turns
    with serving(tmp_path / "log2", model, **options) as restarted:
        text_again, usage = answer(restarted)
        assert (text_again, cached_tokens(usage)) == (text, 256 * num_pages)
