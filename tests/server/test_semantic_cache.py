"""The semantic cache: what is found and what is not, and whose answers they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anthropic
import httpx
import numpy as np
import pytest
from support.openai_client import openai_client
from support.server_process import LlmkitServer, serving, wait_for
from support.tiny_models import tiny_checkpoint

from llmkit.common.errors import InputError, UsageError
from llmkit.runtime.engine.engine_outputs import EngineOutput
from llmkit.runtime.server.semantic.question_facts import differing_facts
from llmkit.runtime.server.semantic.semantic_cache import SemanticCache, Vector
from llmkit.runtime.server.semantic.semantic_options import check_semantic_options
from llmkit.runtime.server.serve_options import ServeOptions

MODEL = {"dtype": "float32", "max_position_embeddings": 512}
# All questions of a tiny random model are alike, so that only their facts and namespaces differ.
SERVER = {"semantic_cache": 0.01, "semantic_cache_requests": "asked", "semantic_cache_ttl": 600}
API_KEYS = ["first-key", "second-key"]
# They end nearly every answer of a random model early.
STOP = ["fi", "ine", "wor", "co", "ow", "ven", "te", "th", "ps", "ap"]
QUESTION = "What is the capital of France?"
PARAPHRASE = "Which city is the capital of France?"
NEAR_MISS = "What is the capital of Finland?"


def chat(http: httpx.Client, text: str = QUESTION, **fields: Any) -> httpx.Response:
    body: dict[str, Any] = {
        "model": "model",
        "messages": [{"role": "user", "content": text}],
        "temperature": 0,
        "max_tokens": 200,
        "stop": STOP,
        "semantic_cache": True,
    }
    headers = fields.pop("headers", {})
    answer = http.post("/v1/chat/completions", json=body | fields, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer


def kind(answer: httpx.Response) -> str | None:
    return answer.headers.get("x-llmkit-cache")


def content(answer: httpx.Response) -> Any:
    choice = answer.json()["choices"][0]
    return choice["message"]["content"], choice["finish_reason"]


def system(text: str) -> list[dict[str, str]]:
    """A conversation of QUESTION after a system prompt, which no other test has."""
    return [{"role": "system", "content": text}, {"role": "user", "content": QUESTION}]


def test_semantic_cache_answers_a_paraphrase_and_says_so(http: httpx.Client) -> None:
    first = chat(http)
    assert (kind(first), content(first)[1]) == ("miss", "stop")
    assert content(first)[0]
    assert "semantic_cache" not in first.json()
    second = chat(http, PARAPHRASE)
    assert kind(second) == "semantic"
    similarity = float(second.headers["x-llmkit-cache-similarity"])
    assert 0 < similarity < 1
    assert second.json()["semantic_cache"] == {"similarity": similarity}
    assert content(second) == content(first)
    completion_tokens = [one.json()["usage"]["completion_tokens"] for one in (first, second)]
    assert completion_tokens[0] == completion_tokens[1] > 0
    same = chat(http, f"  {QUESTION}\n")
    assert (kind(same), same.headers["x-llmkit-cache-similarity"]) == ("semantic", "1.0000")
    assert kind(chat(http, NEAR_MISS)) == "miss"
    assert kind(chat(http, NEAR_MISS)) == "semantic"  # its own answer by now


def test_semantic_cache_serves_streams_and_other_apis(
    http: httpx.Client, server: LlmkitServer
) -> None:
    messages = system("streams")
    first = chat(http, messages=messages)
    assert kind(first) == "miss"
    with openai_client(server) as client:
        raw = client.chat.completions.with_raw_response.create(
            model="model",
            messages=messages,  # type: ignore[arg-type]
            temperature=0,
            max_tokens=200,
            stop=STOP,
            stream=True,
            extra_headers={"x-llmkit-semantic-cache": "on"},
        )
        assert raw.headers["x-llmkit-cache"] == "semantic"
        chunks = list(raw.parse())
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == content(first)[0]
    # Entries hold the engine's outputs, so another API gives the same answer in its own shape.
    with anthropic.Anthropic(base_url=server.url, api_key=server.key, max_retries=0) as other:
        reply = other.messages.with_raw_response.create(
            model="model",
            system="streams",
            messages=[{"role": "user", "content": PARAPHRASE}],
            extra_body={"temperature": 0},
            max_tokens=200,
            stop_sequences=STOP,
            extra_headers={"x-llmkit-semantic-cache": "on"},
        )
    assert reply.headers["x-llmkit-cache"] == "semantic"
    block = reply.parse().content[0]
    assert block.type == "text"
    assert block.text == content(first)[0]


@pytest.mark.parametrize(
    "changed",
    [
        {"temperature": 0.5},
        {"max_tokens": 100},
        {"stop": [*STOP, "x"]},
        {"frequency_penalty": 0.5},
        {"logit_bias": {"300": 1}},
        {"min_tokens": 1},
        {"cache_salt": "tenant"},
        {"skip_special_tokens": False},
        {"messages": system("other")},
        {"messages": [{"role": "user", "content": "x"}, *system("one")[1:]]},
        {"chat_template_kwargs": {"style": "short"}},
        {"include_stop_str_in_output": True},
    ],
)
def test_semantic_cache_keeps_requests_apart(http: httpx.Client, changed: dict[str, Any]) -> None:
    messages = system("apart")
    chat(http, messages=messages)
    assert kind(chat(http, messages=messages)) == "semantic"
    if "messages" not in changed:
        changed = changed | {"messages": messages}
    assert kind(chat(http, **changed)) == "miss"


def test_semantic_cache_keeps_keys_apart(http: httpx.Client) -> None:
    messages = system("keys")
    chat(http, messages=messages)
    other = {"authorization": "Bearer second-key"}
    assert kind(chat(http, messages=messages, headers=other)) == "miss"
    assert kind(chat(http, messages=messages, headers=other)) == "semantic"


def test_semantic_cache_is_off_unless_asked(http: httpx.Client) -> None:
    messages = system("asked")
    chat(http, messages=messages)
    on = {"x-llmkit-semantic-cache": "on"}
    assert kind(chat(http, messages=messages, semantic_cache=None)) is None
    assert kind(chat(http, messages=messages, semantic_cache=False, headers=on)) is None
    assert kind(chat(http, messages=messages, semantic_cache=None, headers=on)) == "semantic"
    refused = http.post(
        "/v1/chat/completions",
        json={"model": "model", "messages": messages},
        headers={"x-llmkit-semantic-cache": "yes"},
    )
    assert (refused.status_code, refused.json()["error"]["param"]) == (
        400,
        "x-llmkit-semantic-cache",
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 2},
        {"logprobs": True},
        {"response_format": {"type": "json_object"}, "max_tokens": 5, "stop": []},
        {"return_token_ids": True},
        {"truncate_prompt_tokens": 5},
        {"messages": [{"role": "user", "content": "<|extra_10|>" * 200}]},
        {
            "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        },
    ],
)
def test_semantic_cache_leaves_other_requests_alone(
    http: httpx.Client, fields: dict[str, Any]
) -> None:
    assert [kind(chat(http, **fields)) for _ in range(2)] == [None, None]


def test_semantic_cache_keeps_no_answer_that_was_cut(http: httpx.Client) -> None:
    fields: dict[str, Any] = {"messages": system("cut"), "max_tokens": 3, "stop": []}
    answers = [chat(http, ignore_eos=True, **fields) for _ in range(2)]
    assert [kind(answer) for answer in answers] == ["miss", "miss"]
    assert content(answers[1])[1] == "length"


def test_semantic_cache_has_metrics(http: httpx.Client) -> None:
    def value(name: str) -> float:
        line = next(
            line
            for line in http.get("/metrics").text.splitlines()
            if line.startswith(f"llmkit:semantic_cache_{name} ")
        )
        return float(line.split()[1])

    before = {name: value(name) for name in ("queries_total", "hits_total", "rejected_total")}
    messages = system("metrics")
    chat(http, messages=messages)
    chat(http, messages=messages)
    chat(http, messages=[messages[0], {"role": "user", "content": NEAR_MISS}])
    after = {name: value(name) for name in before}
    assert [after[name] - before[name] for name in before] == [3, 1, 1]
    assert value("entries") > 1
    assert value("bytes") > 1000


def test_semantic_cache_for_all_requests_with_a_model_beside(model: Path, tmp_path: Path) -> None:
    beside = tiny_checkpoint(tmp_path / "beside", "qwen3", hidden_size=32, head_dim=8)
    options: dict[str, Any] = {
        "semantic_cache": 0.01,
        "semantic_cache_requests": "all",
        "semantic_cache_model": str(beside),
        "semantic_cache_ttl": 0,
        "response_cache": 1 << 20,
    }
    with serving(tmp_path / "log", model, **options) as running, running.client() as http:
        first = chat(http, semantic_cache=None)
        answers = [chat(http, text, semantic_cache=None) for text in (PARAPHRASE, QUESTION)]
        assert [kind(one) for one in (first, *answers)] == ["miss", "semantic", "hit"]
        assert [content(one) for one in answers] == [content(first)] * 2
        warm = [chat(http, temperature=1.0, semantic_cache=asked) for asked in (None, True, True)]
        assert [kind(one) for one in warm] == [None, "miss", "semantic"]
        steps = http.get("/metrics").text
        assert "llmkit:semantic_cache_entries 2.0" in steps
        embedder = max(running.engines(), key=lambda process: process.create_time())
        embedder.kill()
        wait_for(lambda: "--semantic-cache-model: it is back" in running.log.read_text())
        assert "Restarting it (1 of 3 times in an hour)" in running.log.read_text()
        again = chat(http, PARAPHRASE + "?", semantic_cache=None)
        assert (kind(again), content(again)) == ("semantic", content(first))


def test_semantic_cache_options_are_checked(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs --semantic-cache"):
        check_semantic_options(ServeOptions("model", semantic_cache_model="other"))
    classifier = tiny_checkpoint(tmp_path / "head", "qwen3", classifier=True, num_labels=1)
    log = tmp_path / "log"
    server = LlmkitServer(log, classifier, semantic_cache=0.9)
    assert server.process.wait(120) == InputError("x").exit_code
    assert "has a classification head" in log.read_text()


# The cache itself, with vectors of the test's own.


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def unit(*numbers: float) -> Vector:
    vector = np.array(numbers, np.float32)
    return vector / np.float32(np.linalg.norm(vector))


def outputs(text: str, size: int = 1) -> list[EngineOutput]:
    return [EngineOutput(text, [len(text)] * size, "stop", None, 5, 0)]


def test_semantic_cache_finds_the_most_similar_question_above_the_threshold() -> None:
    cache = SemanticCache(0.9, 1 << 20)
    cache.put(b"a", "first question", unit(1, 0), outputs("first"))
    cache.put(b"a", "something long about rivers in spring", unit(1, 0.3), outputs("second"))
    hit = cache.find(b"a", "third thing to ask now, in other words", unit(1, 0.29))
    assert hit is not None
    assert hit.outputs == outputs("second")
    assert hit.similarity == pytest.approx(1.0, abs=1e-3)
    assert cache.find(b"a", "third thing to ask now, in other words", unit(0, 1)) is None
    assert cache.find(b"b", "first question", unit(1, 0)) is None
    assert cache.find(b"a", "first question", unit(1, 0, 0)) is None  # another model's vector
    assert (cache.queries, cache.hits) == (4, 1)


def test_semantic_cache_goes_on_after_a_question_with_other_facts() -> None:
    cache = SemanticCache(0.5, 1 << 20)
    cache.put(b"a", "How far is 5 km?", unit(1, 0), outputs("five"))
    cache.put(b"a", "How far is it for 7 km?", unit(1, 0.5), outputs("seven"))
    hit = cache.find(b"a", "How far are 7 km?", unit(1, 0.01))
    assert hit is not None
    assert hit.outputs == outputs("seven")
    assert (cache.hits, cache.rejected) == (1, 1)


def test_semantic_cache_entries_expire() -> None:
    clock = Clock()
    cache = SemanticCache(0.9, 1 << 20, ttl_s=10, clock=clock)
    cache.put(b"a", "q", unit(1, 0), outputs("x"))
    clock.now = 9.9
    assert cache.find(b"a", "q", unit(1, 0)) is not None
    clock.now = 10.0
    assert cache.find(b"a", "q", unit(1, 0)) is None
    assert (len(cache), cache.bytes) == (0, 0)


def test_semantic_cache_size_is_bounded() -> None:
    cache = SemanticCache(0.9, 20_000)
    generator = np.random.default_rng(0)
    vectors = [unit(*generator.normal(size=16)) for _ in range(300)]
    for number, vector in enumerate(vectors):
        # Many namespaces, and many questions in one of them.
        namespace = b"one" if number % 2 else str(number).encode()
        cache.put(namespace, f"question {number}", vector, outputs(f"{number}", 20))
        assert cache.bytes <= 20_000
    assert 10 < len(cache) < 100
    for number in (299, 297, 295):  # the last ones, whose rows were moved often
        hit = cache.find(b"one", f"question {number}", vectors[number])
        assert hit is not None
        assert hit.outputs == outputs(f"{number}", 20)
    assert cache.find(b"one", "question 1", vectors[1]) is None
    cache.put(b"one", "large", vectors[0], outputs("large", 100_000))
    assert cache.find(b"one", "large", vectors[0]) is None
    cache.clear()
    assert (len(cache), cache.bytes) == (0, 0)


def test_semantic_cache_keeps_one_answer_to_a_question() -> None:
    cache = SemanticCache(0.9, 1 << 20)
    for text in ("old", "new"):
        cache.put(b"a", "q", unit(1, 0), outputs(text))
    hit = cache.find(b"a", "q", unit(1, 0))
    assert (len(cache), hit and hit.outputs) == (1, outputs("new"))


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (QUESTION, PARAPHRASE, None),
        (QUESTION, "the capital of france is what?", None),
        (QUESTION, NEAR_MISS, "names"),
        ("Is it 3 km?", "Is it three km?", None),
        ("Is it 3 km?", "Is it 4 km?", "numbers"),
        ("What is in version 1.2?", "What does version 1.3 have?", "numbers"),
        ("Can I eat it?", "Can I not eat it?", "negation"),
        ("Why does it work?", "Why doesn\u2019t it work?", "negation"),
        ("How do I enable it?", "How do I disable it?", "negation"),
        ("How long in hours?", "How long in minutes?", "units"),
        ("What does the liver do?", "What does the pancreas do?", "words"),
        ("How do I bake bread?", "How do I bake bread without yeast?", "negation"),
        ("How do I bake bread?", "How do I bake dark bread?", "words"),
        ("", "", None),
        ("Wie hei\u00dft die Hauptstadt?", "Wie heisst die Hauptstadt von Peru?", "names"),
    ],
)
def test_question_facts_that_differ(first: str, second: str, expected: str | None) -> None:
    assert differing_facts(first, second) == expected
    assert differing_facts(second, first) == expected


def test_question_facts_of_long_questions_differ_with_every_word() -> None:
    # A comparison word by word would take seconds, in which no other request is answered.
    first, second = "x y " * 500, "x z " * 500
    assert differing_facts(first, second) == "words"
    assert differing_facts(first, first) is None
