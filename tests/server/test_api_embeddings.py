"""/v1/embeddings through the real client: transformers' vectors, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
import transformers
from support.openai_client import openai_client
from support.server_process import LlmkitServer, serving
from support.tiny_models import tiny_checkpoint

from llmkit.checkpoint.embedding_config import read_pooling_config
from llmkit.checkpoint.open_model_files import open_model_files
from llmkit.common.errors import InputError

TEXTS = ["the quick brown fox", "hello world, how are you today? " * 20, "one two three"]
SIZE = 64


def describe(model: Path, mode: dict[str, Any], *more: str) -> None:
    """Say how embeddings are made, as sentence-transformers does."""
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"} | {
        f"3_{one}": one for one in more
    }
    modules = [
        {"path": path, "type": f"sentence_transformers.models.{kind}"}
        for path, kind in kinds.items()
    ]
    (model / "modules.json").write_text(json.dumps(modules))
    (model / "1_Pooling").mkdir(exist_ok=True)
    (model / "1_Pooling/config.json").write_text(
        json.dumps({"word_embedding_dimension": SIZE} | mode)
    )


@pytest.fixture(scope="module")
def embedding_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose embeddings are means, and may be cut to 16 numbers."""
    folder = tmp_path_factory.mktemp("embeddings") / "model"
    model = tiny_checkpoint(folder, "qwen3", dtype="float32", max_position_embeddings=512)
    config = json.loads((model / "config.json").read_text()) | {
        "is_matryoshka": True,
        "matryoshka_dimensions": [16],
    }
    (model / "config.json").write_text(json.dumps(config))
    describe(model, {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False})
    return model


@pytest.fixture(scope="module")
def embedding_server(
    embedding_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LlmkitServer]:
    log = tmp_path_factory.mktemp("server") / "log"
    with serving(
        log, embedding_model, "sk-test", max_num_batched_tokens=48
    ) as running:  # in chunks
        yield running


@pytest.fixture(scope="module")
def embedding_client(embedding_server: LlmkitServer) -> Iterator[openai.OpenAI]:
    with openai_client(embedding_server) as client:
        yield client


@pytest.fixture
def embedding_http(embedding_server: LlmkitServer) -> Iterator[httpx.Client]:
    with embedding_server.client() as client:
        yield client


@pytest.fixture(scope="module")
def means(embedding_model: Path) -> list[np.ndarray]:
    """transformers' mean hidden state of each text."""
    oracle = transformers.AutoModel.from_pretrained(embedding_model, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(embedding_model)
    vectors = []
    for text in TEXTS:
        with torch.inference_mode():
            ids = torch.tensor([tokenizer.encode(text)])
            vectors.append(oracle(ids).last_hidden_state[0].mean(0).numpy())
    return vectors


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def close(vectors: list[float], expected: np.ndarray) -> bool:
    return (
        len(vectors) == len(expected)
        and float(np.abs(np.array(vectors) - unit(expected)).max()) < 1e-4
    )


def test_embeddings_of_texts_have_length_one(
    embedding_client: openai.OpenAI, means: list[np.ndarray]
) -> None:
    answer = embedding_client.embeddings.create(
        model="model", input=TEXTS, user="someone"
    )  # in base64, which it asks for
    assert [one.index for one in answer.data] == [0, 1, 2]
    assert all(close(one.embedding, mean) for one, mean in zip(answer.data, means, strict=True))
    single = embedding_client.embeddings.create(
        model="model", input=TEXTS[0], encoding_format="float"
    )
    assert close(single.data[0].embedding, means[0])
    assert single.usage.prompt_tokens == single.usage.total_tokens > 1
    assert single.model == "model"


def test_embeddings_of_token_ids_run_beside_generation(
    embedding_client: openai.OpenAI, embedding_http: httpx.Client, means: list[np.ndarray]
) -> None:
    ids = [
        embedding_http.post("/tokenize", json={"prompt": text}).json()["tokens"] for text in TEXTS
    ]
    body: dict[str, Any] = {"model": "model", "prompt": "hello", "max_tokens": 40, "temperature": 0}
    alone = (
        embedding_client.completions.create(**body, extra_body={"ignore_eos": True}).choices[0].text
    )
    with embedding_client.completions.create(
        **body, stream=True, extra_body={"ignore_eos": True}
    ) as stream:
        text = next(iter(stream)).choices[0].text
        several = embedding_client.embeddings.create(model="model", input=ids)
        assert close(
            embedding_client.embeddings.create(model="model", input=ids[1]).data[0].embedding,
            means[1],
        )
        text += "".join(chunk.choices[0].text for chunk in stream)
    assert all(close(one.embedding, mean) for one, mean in zip(several.data, means, strict=True))
    assert text == alone


def test_embeddings_are_cut_for_matryoshka_models_only(
    embedding_client: openai.OpenAI, means: list[np.ndarray]
) -> None:
    for size in (16, SIZE):
        vectors = (
            embedding_client.embeddings.create(model="model", input=TEXTS[0], dimensions=size)
            .data[0]
            .embedding
        )
        assert close(vectors, means[0][:size])
    with pytest.raises(openai.BadRequestError) as refused:
        embedding_client.embeddings.create(model="model", input=TEXTS[0], dimensions=17)
    assert (refused.value.code, refused.value.param) == ("unsupported", "dimensions")


def test_embeddings_may_fill_the_context(embedding_http: httpx.Client) -> None:
    body = {"model": "model", "input": [7] * 512}
    assert embedding_http.post("/v1/embeddings", json=body).status_code == 200
    refused = embedding_http.post("/v1/embeddings", json=body | {"input": [7] * 513})
    assert (refused.status_code, refused.json()["error"]["code"]) == (
        400,
        "context_length_exceeded",
    )


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"input": ""}, "input", "invalid_value"),
        ({"input": [[5], []]}, "input", "invalid_value"),
        ({"input": ["text", [5]]}, "input", "invalid_type"),
        ({"input": 5}, "input", "invalid_type"),
        ({"input": [512]}, "input", "invalid_token_id"),
        ({"input": ["a"] * 2000}, "input", "too_many_prompts"),
        ({"encoding_format": "int8"}, "encoding_format", "invalid_value"),
        ({"dimensions": 0}, "dimensions", "invalid_value"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "invalid_value"),
        ({"cache_salt": ""}, "cache_salt", "invalid_value"),
        ({"priority": 2**40}, "priority", "invalid_value"),
        ({"timeout": 0}, "timeout", "invalid_value"),
    ],
)
def test_embeddings_refuse_wrong_requests(
    embedding_http: httpx.Client, fields: dict[str, Any], param: str, code: str
) -> None:
    answer = embedding_http.post(
        "/v1/embeddings", json={"model": "model", "input": "text"} | fields
    )
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, param, code)


def test_embeddings_use_the_checkpoints_pooling_or_the_option(
    embedding_model: Path, means: list[np.ndarray], tmp_path: Path
) -> None:
    with (
        serving(tmp_path / "log", embedding_model, pooling="last") as running,
        running.client() as http,
    ):
        ids = http.post("/tokenize", json={"prompt": TEXTS[1]}).json()["tokens"]
        answers = [
            http.post("/v1/embeddings", json={"model": "model", "input": ids}).json()
            for _ in range(2)
        ]
        unknown = http.post("/v1/embeddings", json={"model": "other", "input": ids})
    oracle = transformers.AutoModel.from_pretrained(embedding_model, dtype=torch.float32).eval()
    with torch.inference_mode():
        last = oracle(torch.tensor([ids])).last_hidden_state[0, -1].numpy()
    assert all(close(answer["data"][0]["embedding"], last) for answer in answers)
    cached = [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in answers]
    assert cached == [0, (len(ids) - 1) // 16 * 16]
    assert unknown.status_code == 404


@pytest.mark.parametrize(
    ("mode", "more", "expected"),
    [
        ({"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}, (), "last"),
        ({"pooling_mode": "mean"}, (), "mean"),
        ({"pooling_mode_cls_token": True}, (), "cls_token"),
        (
            {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True},
            (),
            "mean and max_tokens",
        ),
        ({"pooling_mode_mean_tokens": True}, ("Dense",), "Dense"),
    ],
)
def test_embedding_config_of_a_checkpoint(
    tmp_path: Path, mode: dict[str, Any], more: tuple[str, ...], expected: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": SIZE}))
    assert read_pooling_config(open_model_files(tmp_path)).pooling == "last"
    describe(tmp_path, mode, *more)
    assert read_pooling_config(open_model_files(tmp_path)).pooling == expected
    (tmp_path / "modules.json").write_text("{")
    with pytest.raises(InputError, match=r"modules\.json"):
        read_pooling_config(open_model_files(tmp_path))
