"""/rerank, /score and /classify by HTTP, against transformers and sentence-transformers' rules."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from support.router_process import LlmkitRouter
from support.tiny_models import tiny_checkpoint, write_tokenizer
from tokenizers.processors import TemplateProcessing

from llmkit.checkpoint.classifier_config import ClassifierConfig, read_classifier_config
from llmkit.checkpoint.open_model_files import open_model_files
from llmkit.checkpoint.tokenizer import Tokenizer
from llmkit.common.chat_template import render_chat_template
from llmkit.common.errors import InputError, UsageError
from llmkit.common.options import option_fields
from llmkit.runtime.server.score_requests import is_score_template
from llmkit.runtime.server.serve_options import ServeOptions
from llmkit.runtime.server.server_state import TextResources

QUERY = "what is the capital of France?"
DOCUMENTS = ["Paris, of course.", "the lazy dog sleeps in the sun", "one two three", "hello world"]
SCORE_TEMPLATE = (
    "{% set ns = namespace(q='', d='') %}"
    "{% for m in messages %}"
    "{% if m.role == 'query' %}{% set ns.q = m.content %}{% endif %}"
    "{% if m.role == 'document' %}{% set ns.d = m.content %}{% endif %}"
    "{% endfor %}"
    "<|im_start|>{{ instruction or 'find' }}: {{ ns.q }} | {{ ns.d }}<|im_end|>answer "
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A reranker, a classifier, a model that generates text and one that says "n" or "y"."""
    folder = tmp_path_factory.mktemp("models")
    common: dict[str, Any] = {"dtype": "float32", "max_position_embeddings": 256}
    head: dict[str, Any] = {"classifier": True, **common}
    names = ("bad", "fine", "good")
    labels = {
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
    }
    paths = {
        "reranker": tiny_checkpoint(folder / "reranker", "qwen3", num_labels=1, **head),
        "labels": tiny_checkpoint(folder / "labels", "llama", **labels, **head),
        "text": tiny_checkpoint(folder / "text", "qwen3", **common),
        "yesno": tiny_checkpoint(
            folder / "yesno", "qwen3", classifier_from_token=["n", "y"], **common
        ),
    }
    write_tokenizer(paths["yesno"], chat_template=SCORE_TEMPLATE)
    return paths


@pytest.fixture(scope="module")
def server(
    models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LlmkitRouter]:
    """A server of all models, so that the router's paths are tried, too."""
    router = LlmkitRouter(tmp_path_factory.mktemp("router") / "log", models, "--max-loaded", "4")
    try:
        yield router.wait_ready()
    finally:
        router.stop()


def scores_of(http: httpx.Client, model: str, path: str = "/rerank", **fields: Any) -> list[float]:
    """The scores of DOCUMENTS for QUERY, in the order of DOCUMENTS."""
    body = {"model": model, "query": QUERY, "documents": DOCUMENTS} | fields
    answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    results = answer.json()["results"]
    found = {result["index"]: result["relevance_score"] for result in results}
    assert [result["relevance_score"] for result in results] == sorted(found.values(), reverse=True)
    return [found[index] for index in sorted(found)]


def oracle(path: Path, auto_model: Any) -> tuple[Any, Any]:
    """transformers' model and tokenizer."""
    model = auto_model.from_pretrained(path, dtype=torch.float32).eval()
    return model, transformers.AutoTokenizer.from_pretrained(path)


def sigmoid(x: float) -> float:
    return 1 / (1 + float(np.exp(-x)))


def close(found: list[float], expected: list[float]) -> bool:
    return len(found) == len(expected) and bool(np.allclose(found, expected, atol=1e-4))


@pytest.fixture(scope="module")
def pair_logits(models: dict[str, Path]) -> list[float]:
    """transformers' logits of the reranker, as sentence-transformers' CrossEncoder reads a pair."""
    model, tokenizer = oracle(models["reranker"], transformers.AutoModelForSequenceClassification)
    with torch.inference_mode():
        return [
            float(model(torch.tensor([tokenizer(QUERY, document)["input_ids"]])).logits[0, 0])
            for document in DOCUMENTS
        ]


def test_rerank_of_a_cross_encoder_equals_transformers(
    http: httpx.Client, pair_logits: list[float]
) -> None:
    expected = [sigmoid(logit) for logit in pair_logits]
    for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
        assert close(scores_of(http, "reranker", path), expected)
    assert close(scores_of(http, "reranker", use_activation=False), pair_logits)


def test_rerank_has_the_shapes_of_cohere_and_jina(http: httpx.Client) -> None:
    # What langchain's JinaRerank and Cohere's client send.
    body: dict[str, Any] = {
        "model": "reranker",
        "query": QUERY,
        "documents": [{"text": text} for text in DOCUMENTS],
        "top_n": 2,
        "return_documents": True,
    }
    answer = http.post("/v1/rerank", json=body).json()
    assert answer["id"].startswith("rerank-")
    assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] > 20
    assert len(answer["results"]) == 2
    for result in answer["results"]:
        assert result["document"] == {"text": DOCUMENTS[result["index"]]}
        assert 0 < result["relevance_score"] < 1
    bare = http.post(
        "/v2/rerank",
        json=body | {"return_documents": False, "top_n": 0, "max_tokens_per_doc": 4096},
    )
    assert [set(result) for result in bare.json()["results"]] == [{"index", "relevance_score"}] * 4
    refused = http.post("/v2/rerank", json=body | {"documents": []})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "documents")


def test_rerank_cuts_long_texts(http: httpx.Client) -> None:
    words = "one two three " * 40
    whole = scores_of(http, "text", documents=[words, "one two three one two three"])
    cut = scores_of(
        http, "text", documents=[words, words[:27]], max_tokens_per_doc=6, query="hello world"
    )
    assert cut[0] == pytest.approx(cut[1], abs=1e-6)
    assert whole[0] != whole[1]
    limited = http.post(
        "/score",
        json={"model": "reranker", "text_1": words * 3, "text_2": "a", "truncate_prompt_tokens": 9},
    )
    assert limited.json()["usage"]["prompt_tokens"] == 9
    too_long = http.post("/score", json={"model": "reranker", "text_1": words * 9, "text_2": "a"})
    assert too_long.json()["error"]["code"] == "context_length_exceeded"


def test_score_of_a_model_that_generates_is_the_cosine_of_embeddings(
    http: httpx.Client, models: dict[str, Path]
) -> None:
    model, tokenizer = oracle(models["text"], transformers.AutoModel)
    with torch.inference_mode():
        vectors = [
            model(torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0, -1].numpy()
            for text in (QUERY, *DOCUMENTS)
        ]
    units = [vector / np.linalg.norm(vector) for vector in vectors]
    expected = [float(units[0] @ unit) for unit in units[1:]]
    assert close(scores_of(http, "text"), expected)
    sides: list[dict[str, Any]] = [
        {"text_1": QUERY, "text_2": DOCUMENTS},
        {"queries": [QUERY], "documents": DOCUMENTS},
        {"queries": [QUERY] * 4, "items": DOCUMENTS},
        {"data_1": [{"text": QUERY}], "data_2": [{"text": text} for text in DOCUMENTS]},
    ]
    for path, side in zip(("/score", "/v1/score", "/score", "/score"), sides, strict=True):
        answer = http.post(path, json={"model": "text"} | side).json()
        assert [entry["index"] for entry in answer["data"]] == [0, 1, 2, 3]
        assert close([entry["score"] for entry in answer["data"]], expected)
    same = http.post("/score", json={"model": "text", "text_1": QUERY, "text_2": QUERY}).json()
    assert same["data"][0]["score"] == pytest.approx(1.0)
    assert same["usage"]["prompt_tokens"] == len(tokenizer(QUERY)["input_ids"])  # embedded once


def test_score_of_label_tokens_equals_transformers(
    http: httpx.Client, models: dict[str, Path]
) -> None:
    model, tokenizer = oracle(models["yesno"], transformers.AutoModelForCausalLM)
    n, y = tokenizer.convert_tokens_to_ids(["n", "y"])
    logits = {}
    for instruction in ("find", "judge"):
        logits[instruction] = []
        for document in DOCUMENTS:
            text = f"<|im_start|>{instruction}: {QUERY} | {document}<|im_end|>answer "
            with torch.inference_mode():
                last = model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0, -1]
            logits[instruction].append(float(last[y] - last[n]))
    found = scores_of(http, "yesno")
    assert close(found, [sigmoid(logit) for logit in logits["find"]])
    found = scores_of(http, "yesno", instruction="judge", use_activation=False)
    assert close(found, logits["judge"])
    # A model that generates still does.
    chat = http.post("/v1/completions", json={"model": "yesno", "prompt": "a", "max_tokens": 2})
    assert chat.status_code == 200
    labels = http.post("/classify", json={"model": "yesno", "input": "a"}).json()["data"][0]
    assert labels["label"] in ("n", "y")
    assert sum(labels["probs"]) == pytest.approx(1.0)


def test_classify_equals_transformers(http: httpx.Client, models: dict[str, Path]) -> None:
    model, tokenizer = oracle(models["labels"], transformers.AutoModelForSequenceClassification)
    ids = [tokenizer(text)["input_ids"] for text in DOCUMENTS]
    with torch.inference_mode():
        logits = [model(torch.tensor([one])).logits[0] for one in ids]
    expected = [one.softmax(0).tolist() for one in logits]
    for value in (DOCUMENTS, ids):
        answer = http.post("/classify", json={"model": "labels", "input": value}).json()
        assert all(
            close(entry["probs"], probs)
            for entry, probs in zip(answer["data"], expected, strict=True)
        )
        names = [("bad", "fine", "good")[int(np.argmax(probs))] for probs in expected]
        assert [entry["label"] for entry in answer["data"]] == names
        assert {entry["num_classes"] for entry in answer["data"]} == {3}
        assert answer["usage"]["prompt_tokens"] == sum(map(len, ids))
    body = {"model": "labels", "input": DOCUMENTS[0], "use_activation": False}
    plain = http.post("/classify", json=body).json()
    assert close(plain["data"][0]["probs"], logits[0].tolist())
    chat = http.post(
        "/classify",
        json={"model": "labels", "messages": [{"role": "user", "content": "hello"}]},
    ).json()
    text = "<|im_start|>user\nhello<|im_end|>\n"
    with torch.inference_mode():
        found = model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0].softmax(0)
    assert close(chat["data"][0]["probs"], found.tolist())


@pytest.mark.parametrize(
    ("path", "model", "fields", "param", "code"),
    [
        ("/rerank", "reranker", {"query": QUERY}, "documents", "missing_required_parameter"),
        ("/rerank", "reranker", {"query": QUERY, "documents": "a"}, "documents", "invalid_type"),
        ("/rerank", "reranker", {"query": "", "documents": ["a"]}, "query", "invalid_value"),
        ("/rerank", "text", {"query": "q", "documents": [""]}, "documents.0", "invalid_value"),
        ("/rerank", "text", {"query": "q", "documents": [5]}, "documents.0", "invalid_type"),
        (
            "/rerank",
            "text",
            {"query": "q", "documents": ["a"], "top_n": -1},
            "top_n",
            "invalid_value",
        ),
        (
            "/rerank",
            "text",
            {"query": "q", "documents": ["a"], "max_chunks_per_doc": 3},
            "max_chunks_per_doc",
            "unsupported",
        ),
        ("/rerank", "labels", {"query": "q", "documents": ["a"]}, "model", "unsupported"),
        ("/score", "reranker", {"text_1": "a"}, "text_1", "invalid_value"),
        ("/score", "reranker", {"text_1": "a", "documents": "b"}, "text_1", "invalid_value"),
        (
            "/score",
            "reranker",
            {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]},
            "text_1",
            "invalid_value",
        ),
        ("/classify", "text", {"input": "a"}, "model", "unsupported"),
        ("/classify", "labels", {}, "input", "invalid_value"),
        ("/classify", "labels", {"input": [512]}, "input", "invalid_token_id"),
        ("/v1/completions", "labels", {"prompt": "a"}, "model", "not_supported"),
        (
            "/v1/chat/completions",
            "reranker",
            {"messages": [{"role": "user", "content": "a"}]},
            "model",
            "not_supported",
        ),
        ("/v1/embeddings", "reranker", {"input": "a"}, "model", "not_supported"),
    ],
)
def test_rerank_refuses_wrong_requests(
    http: httpx.Client, path: str, model: str, fields: dict[str, Any], param: str, code: str
) -> None:
    answer = http.post(path, json={"model": model} | fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, param, code)


@pytest.mark.parametrize("model", ["reranker", "yesno"])
def test_rerank_ends_at_the_first_pair_that_is_too_long(http: httpx.Client, model: str) -> None:
    fields = {"query": "hello " * 300, "documents": ["a", "b", "c"]}
    error = http.post("/rerank", json={"model": model} | fields).json()["error"]
    assert (error["param"], error["code"]) == ("documents", "context_length_exceeded")
    answer = http.post("/rerank", json={"model": model, "truncate_prompt_tokens": -1} | fields)
    assert answer.status_code == 200
    assert answer.json()["usage"]["prompt_tokens"] == 3 * 256


def test_pairs_are_tokenized_as_one_by_one(models: dict[str, Path]) -> None:
    oracle = tokenizers.Tokenizer.from_file(str(models["reranker"] / "tokenizer.json"))
    marks = ("<|im_start|>", "<|im_end|>")
    oracle.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>",
        pair="<|im_start|> $A <|im_end|> $B:1 <|im_end|>:1",
        special_tokens=[(mark, oracle.token_to_id(mark)) for mark in marks],
    )
    tokenizer = Tokenizer(oracle, {}, {}, None, ())
    pairs = [(QUERY, document) for document in (*DOCUMENTS, "")]
    expected = [oracle.encode(*pair).ids for pair in pairs]
    assert list(tokenizer.encode_pairs(pairs)) == expected
    for count in (1, 3, 9):
        assert list(tokenizer.encode_pairs(pairs, count)) == [ids[:count] for ids in expected]


def test_label_tokens_must_be_two_tokens(models: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="classifier_from_token has 'zebra'"):
        TextResources.load(str(models["text"]), label_tokens=("n", "zebra"))
    option = next(
        field for field in option_fields(ServeOptions) if field.path[-1] == "classifier_from_token"
    )
    assert option.read("no,yes") == "no,yes"
    with pytest.raises(UsageError, match="no,"):
        option.read("no,")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, ClassifierConfig()),
        (
            {"architectures": ["Qwen3ForSequenceClassification"], "num_labels": 1},
            ClassifierConfig(labels=("LABEL_0",)),
        ),
        (
            {
                "architectures": ["Qwen3ForSequenceClassification"],
                "id2label": {"0": "x", "1": "y"},
                "problem_type": "multi_label_classification",
            },
            ClassifierConfig(labels=("x", "y"), activation="sigmoid"),
        ),
        (
            {"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"},
            ClassifierConfig(score_activation="none"),
        ),
        (
            {"sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Tanh"}},
            ClassifierConfig(score_activation="Tanh"),
        ),
    ],
)
def test_classifier_config_of_a_checkpoint(
    tmp_path: Path, config: dict[str, Any], expected: ClassifierConfig
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_classifier_config(open_model_files(tmp_path)) == expected


def test_reranker_template_of_the_docs_renders_a_pair() -> None:
    page = (Path(__file__).parents[2] / "docs/serve.md").read_text(encoding="utf-8")
    template = page.split("```jinja\n")[1].split("```")[0]
    assert is_score_template(template)
    messages = [{"role": "query", "content": "Q?"}, {"role": "document", "content": "D."}]
    text = render_chat_template(template, messages, instruction=None)
    assert text.startswith("<|im_start|>system\nJudge whether")
    assert "<Query>: Q?\n<Document>: D.<|im_end|>\n<|im_start|>assistant\n" in text
    assert text.endswith("<think>\n\n</think>\n\n")
