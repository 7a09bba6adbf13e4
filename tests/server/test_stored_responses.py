"""Stored responses of /v1/responses, with the real openai client."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from support.openai_client import openai_client
from support.router_process import LlmkitRouter
from support.server_process import LlmkitServer, serving, wait_for
from support.tiny_models import never_ends

from llmkit.common.errors import InputError
from llmkit.runtime.server.http.api_keys import Client
from llmkit.runtime.server.http.http_errors import ApiError
from llmkit.runtime.server.stored_responses.response_store import (
    MissingResponseError,
    ResponseStore,
    StoredResponse,
    model_hash,
    model_hash_in,
    new_response_id,
)

MODEL = {"max_position_embeddings": 32_768}
edit_model = never_ends
STORE_METRICS = ("stored_responses", "stored_responses_bytes")
KEYS = ("key-of-one", "key-of-two", "key-of-three max_requests=1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store") / "responses"


@pytest.fixture(scope="module")
def stored_server(
    model: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LlmkitServer]:
    """A server that keeps responses in a file, with three keys."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("\n".join(KEYS))
    log = tmp_path_factory.mktemp("log") / "log"
    options = {
        "api_key_file": str(keys),
        "response_store": str(folder),
        "served_model_name": "tiny",
        "kv_cache_memory": 2**25,
    }
    with serving(log, model, KEYS[0], **options) as server:
        yield server


@pytest.fixture(scope="module")
def one(stored_server: LlmkitServer) -> openai.OpenAI:
    return openai_client(stored_server)


@pytest.fixture(scope="module")
def two(stored_server: LlmkitServer) -> openai.OpenAI:
    return openai_client(stored_server).with_options(api_key=KEYS[1])


def create(client: openai.OpenAI, text: Any, **fields: Any) -> Any:
    fields = {"max_output_tokens": 4, "temperature": 0} | fields
    return client.responses.create(model="tiny", input=text, **fields)


def test_response_is_stored_and_retrieved(one: openai.OpenAI) -> None:
    response = create(one, "hello")
    assert response.store is True
    again = one.responses.retrieve(response.id)
    assert again.output_text == response.output_text
    assert again.usage == response.usage


def test_response_streamed_is_stored(one: openai.OpenAI) -> None:
    *_, last = create(one, "hello", stream=True)
    final = last.response
    assert one.responses.retrieve(final.id).output_text == final.output_text


def test_response_with_store_false_is_not_stored(one: openai.OpenAI) -> None:
    response = create(one, "hello", store=False)
    assert response.store is False
    with pytest.raises(openai.NotFoundError):
        one.responses.retrieve(response.id)


def test_previous_response_id_continues_as_the_whole_conversation_does(one: openai.OpenAI) -> None:
    first = create(one, "hello", instructions="Be brief.")
    second = create(one, "and then?", previous_response_id=first.id)
    third = create(one, "more", previous_response_id=second.id)
    question = {"role": "user", "content": "and then?"}
    items = [{"role": "user", "content": "hello"}, *first.to_dict()["output"], question]
    items += [*second.to_dict()["output"], {"role": "user", "content": "more"}]
    whole = create(one, items)
    assert third.previous_response_id == second.id
    # Without the instructions, which are not carried over.
    assert third.usage.input_tokens == whole.usage.input_tokens
    assert third.output_text == whole.output_text


def test_previous_response_id_of_another_key_is_not_found(
    one: openai.OpenAI, two: openai.OpenAI
) -> None:
    response = create(one, "a secret")
    for call in (
        lambda: two.responses.retrieve(response.id),
        lambda: two.responses.delete(response.id),
        lambda: two.responses.cancel(response.id),
        lambda: two.responses.input_items.list(response.id),
    ):
        with pytest.raises(openai.NotFoundError):
            call()
    with pytest.raises(openai.BadRequestError) as caught:
        create(two, "what was it?", previous_response_id=response.id)
    assert caught.value.code == "previous_response_not_found"
    assert one.responses.retrieve(response.id).id == response.id


def test_delete_removes_the_response_from_chains(one: openai.OpenAI) -> None:
    first = create(one, "hello")
    second = create(one, "more", previous_response_id=first.id)
    one.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        one.responses.delete(first.id)
    with pytest.raises(openai.BadRequestError, match=first.id):
        create(one, "again", previous_response_id=second.id)


def test_input_items_are_listed_in_pages(one: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": f"part {index}"} for index in range(5)]
    response = create(one, messages)
    page = one.responses.input_items.list(response.id, limit=2, order="asc")
    assert page.has_more
    texts = [item.content[0].text for item in page]  # iterates over all pages
    assert texts == [f"part {index}" for index in range(5)]
    newest = one.responses.input_items.list(response.id, limit=1).data[0]
    assert newest.content[0].text == "part 4"


@pytest.mark.parametrize("query", ["limit=0", "limit=x", "order=up", "after=nothing"])
def test_input_items_refuse_a_wrong_query(
    one: openai.OpenAI, stored_server: LlmkitServer, query: str
) -> None:
    response = create(one, "hello")
    with stored_server.client() as http:
        answer = http.get(f"/v1/responses/{response.id}/input_items?{query}")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == query.partition("=")[0]


def poll(client: openai.OpenAI, response_id: str) -> Any:
    found: list[Any] = []

    def has_ended() -> bool:
        found.append(client.responses.retrieve(response_id))
        return found[-1].status not in ("queued", "in_progress")

    wait_for(has_ended)
    return found[-1]


def test_background_response_completes_without_a_connection(one: openai.OpenAI) -> None:
    response = create(one, "hello", background=True, max_output_tokens=20)
    assert response.status == "queued"
    ended = poll(one, response.id)
    assert ended.status in ("completed", "incomplete")
    assert ended.output_text == create(one, "hello", max_output_tokens=20).output_text


def test_background_stream_resumes_behind_an_event(one: openai.OpenAI) -> None:
    stream = create(one, "hello", background=True, stream=True, max_output_tokens=8)
    events = list(stream)
    response_id = events[0].response.id
    assert [event.sequence_number for event in events] == list(range(len(events)))
    again = one.responses.retrieve(response_id, stream=True, starting_after=2)
    assert [event.sequence_number for event in again] == list(range(3, len(events)))


def test_background_streams_are_kept_up_to_a_size(one: openai.OpenAI) -> None:
    responses = []
    for _ in range(3):  # the text is in three events of each
        metadata = {"text": "x" * 7_500_000}
        responses.append(create(one, "hello", background=True, metadata=metadata))
        poll(one, responses[-1].id)
    assert len(list(one.responses.retrieve(responses[-1].id, stream=True))) > 3
    with pytest.raises(openai.BadRequestError, match="has no events"):
        one.responses.retrieve(responses[0].id, stream=True)
    for response in responses:
        one.responses.delete(response.id)


def test_background_response_is_cancelled(one: openai.OpenAI, stored_server: LlmkitServer) -> None:
    stream = create(
        one,
        "hello",
        background=True,
        stream=True,
        max_output_tokens=32_000,  # it would take a minute
        extra_body={"timeout": 600},
    )
    response_id = next(stream).response.id
    stream.close()  # the run goes on
    assert one.responses.retrieve(response_id).status in ("queued", "in_progress")
    assert stored_server.metric("background_responses") == 1
    cancelled = one.responses.cancel(response_id)
    assert cancelled.status == "cancelled"
    assert one.responses.retrieve(response_id).status == cancelled.status
    assert one.responses.cancel(response_id).status == cancelled.status
    wait_for(lambda: stored_server.metric("num_requests_running") == 0)
    wait_for(lambda: stored_server.metric("background_responses") == 0)


def test_stored_responses_are_in_the_metrics(
    one: openai.OpenAI, stored_server: LlmkitServer
) -> None:
    before = [stored_server.metric(name) for name in STORE_METRICS]
    response = create(one, "hello " * 200)
    assert one.responses.retrieve(response.id).status == "incomplete"  # it is written
    count, size = (stored_server.metric(name) for name in STORE_METRICS)
    assert count == before[0] + 1
    assert size > before[1] + 1000
    one.responses.delete(response.id)
    wait_for(lambda: [stored_server.metric(name) for name in STORE_METRICS] == before)


def test_background_response_counts_for_its_key() -> None:
    client = Client.of("key")
    client.max_requests = 1
    admission = client.admit()
    successor = client.hand_over(admission)
    client.release(admission)  # the request has ended, and its work goes on
    with pytest.raises(ApiError, match="running answers"):
        client.admit()
    client.release(successor)
    client.admit()


def test_background_response_of_a_limited_key_is_cancelled(stored_server: LlmkitServer) -> None:
    three = openai_client(stored_server).with_options(api_key="key-of-three")
    response = create(three, "hello", background=True, max_output_tokens=200)
    three.responses.cancel(response.id)
    assert create(three, "hello").status == "incomplete"


def test_background_needs_store(one: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="stored"):
        create(one, "hello", background=True, store=False)


def test_cancel_of_a_foreground_response_is_refused(one: openai.OpenAI) -> None:
    response = create(one, "hello")
    with pytest.raises(openai.BadRequestError, match="background"):
        one.responses.cancel(response.id)


@pytest.mark.parametrize("stream", [False, True])
def test_include_logprobs_are_those_of_a_chat(one: openai.OpenAI, stream: bool) -> None:
    fields: dict[str, Any] = {
        "include": ["message.output_text.logprobs"],
        "top_logprobs": 2,
        "max_output_tokens": 6,
    }
    chat = one.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "hello"}],
        temperature=0,
        max_tokens=6,
        logprobs=True,
        top_logprobs=2,
    )
    expected = chat.choices[0].logprobs.content
    if stream:
        events = create(one, "hello", stream=True, **fields)
        found = [
            entry
            for event in events
            if event.type == "response.output_text.delta"
            for entry in event.logprobs
        ]
    else:
        found = create(one, "hello", **fields).output[0].content[0].logprobs
    assert [entry.token for entry in found] == [entry.token for entry in expected]
    for entry, other in zip(found, expected, strict=True):
        assert entry.logprob == pytest.approx(other.logprob, abs=1e-3)
        assert len(entry.top_logprobs) == 2


def test_store_file_is_private_and_survives_a_restart(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "responses"
    with serving(
        tmp_path / "log", model, response_store=str(folder), served_model_name="tiny"
    ) as server:
        client = openai_client(server)
        first = create(client, "hello")
        client.responses.retrieve(first.id)  # it has been written when it can be read
    files = list(folder.iterdir())
    assert files
    assert all(file.stat().st_mode & 0o777 == 0o600 for file in files)
    with serving(
        tmp_path / "log2", model, response_store=str(folder), served_model_name="tiny"
    ) as server:
        client = openai_client(server)
        assert client.responses.retrieve(first.id).output_text == first.output_text
        second = create(client, "more", previous_response_id=first.id)
    assert second.previous_response_id == first.id


@pytest.mark.slow  # a router and two models; test_router.py has a stored response, too
def test_router_finds_the_model_of_a_response(model: Path, tmp_path: Path) -> None:
    folder = str(tmp_path / "responses")  # a model that is unloaded keeps its responses
    models = {"a": model, "b": model}
    router = LlmkitRouter(tmp_path / "log", models, "--response-store", folder)
    try:
        router.wait_ready()
        client = openai_client(router)
        first = client.responses.create(model="b", input="hello", max_output_tokens=4)
        assert client.responses.retrieve(first.id).model == "b"
        assert client.responses.input_items.list(first.id).data[0].content[0].text == "hello"
        second = client.responses.create(
            model="b", input="more", previous_response_id=first.id, background=True
        )
        assert client.responses.cancel(second.id).status != "in_progress"
        with client.responses.connect() as connection:
            for name in ("a", "b"):
                connection.response.create(
                    model=name, input="hello", max_output_tokens=4, temperature=0
                )
                while (event := connection.recv()).type != "response.incomplete":
                    assert event.type not in ("response.completed", "error")
                assert event.response.model == name
        client.responses.delete(first.id)
        for response_id in (first.id, "resp_1"):
            with pytest.raises(openai.NotFoundError):
                client.responses.retrieve(response_id)
    finally:
        router.process.kill()
        router.process.wait()


# The store alone


def stored(response_id: str, owner: str = "one", **fields: Any) -> StoredResponse:
    response = {
        "id": response_id,
        "status": "completed",
        "previous_response_id": None,
        "output": [{"id": f"msg_{response_id}"}],
    }
    return StoredResponse(owner, response | fields, [{"id": f"in_{response_id}"}])


def test_store_evicts_the_least_recently_used() -> None:
    async def check() -> None:
        store = ResponseStore(None, 3000, 3600)
        text = "x" * 200
        for name in "abc":
            store.put(stored(name, text=text))
        assert await store.get("one", "a") is not None
        store.put(stored("d", text=text))
        assert await store.get("one", "b") is None
        assert await store.get("one", "a") is not None
        count, size = store.usage
        assert count >= 2 and 0 < size <= 3000
        store.close()

    asyncio.run(check())


def test_store_keeps_the_others_when_a_response_is_larger_than_all_of_it() -> None:
    async def check() -> None:
        store = ResponseStore(None, 3000, 3600)
        store.put(stored("a"))
        store.put(stored("b", status="queued"))
        store.put(stored("b", text="x" * 3000))
        assert await store.get("one", "a") is not None
        assert await store.get("one", "b") is None  # not the state from before
        store.close()

    asyncio.run(check())


def test_store_forgets_what_has_expired() -> None:
    async def check() -> None:
        store = ResponseStore(None, 1 << 20, -1)
        store.put(stored("a"))
        assert await store.get("one", "a") is None
        store.close()

    asyncio.run(check())


def test_store_names_what_is_missing_in_a_chain() -> None:
    async def check() -> None:
        store = ResponseStore(None, 1 << 20, 3600)
        store.put(stored("b", previous_response_id="a"))
        with pytest.raises(MissingResponseError) as caught:
            await store.history("one", "b")
        assert caught.value.response_id == "a"
        store.put(stored("a", status="in_progress"))
        with pytest.raises(MissingResponseError, match="in_progress"):
            await store.history("one", "b")
        store.put(stored("a"))
        items = await store.history("one", "b")
        assert [item["id"] for item in items] == ["in_a", "msg_a", "in_b", "msg_b"]
        store.close()

    asyncio.run(check())


def test_store_after_a_crash_says_that_running_responses_failed(tmp_path: Path) -> None:
    async def check() -> None:
        path = tmp_path / "store"
        store = ResponseStore(path, 1 << 20, 3600)
        store.put(stored("a", status="in_progress"))
        store.close()
        store = ResponseStore(path, 1 << 20, 3600)
        found = await store.get("one", "a")
        assert found is not None
        assert found.status == "failed"
        assert found.response["error"]["code"] == "server_error"
        store.close()

    asyncio.run(check())


def test_store_refuses_a_file_that_is_in_use_or_is_no_store(tmp_path: Path) -> None:
    path = tmp_path / "store"
    store = ResponseStore(path, 1 << 20, 3600)
    with pytest.raises(InputError, match="cannot be opened"):
        ResponseStore(path, 1 << 20, 3600)
    store.close()
    other = tmp_path / "other"
    other.write_bytes(os.urandom(4096))
    with pytest.raises(InputError, match="cannot be opened"):
        ResponseStore(other, 1 << 20, 3600)


def test_response_id_has_the_hash_of_its_model() -> None:
    assert model_hash_in(new_response_id("small")) == model_hash("small")
    assert model_hash("small") != model_hash("large")
