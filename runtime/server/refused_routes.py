"""Routes of OpenAI's and Ollama's APIs that this server does not have, refused by name.

They answer 404: a 501 says the same, but clients send the request again after a 5xx.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fastapi import FastAPI, Request, Response

from llmkit.runtime.server.http.http_errors import ApiError

_METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE"]
# By path: what the server does not do, and what to do instead.
REFUSED = {
    "/v1/audio/{rest:path}": "Speech and transcription are not supported: models here read and "
    "write text.",
    "/v1/images/{rest:path}": "Images are not supported: models here read and write text.",
    "/v1/videos": "Videos are not supported: models here read and write text.",
    "/v1/videos/{rest:path}": "Videos are not supported: models here read and write text.",
    "/v1/moderations": "Moderation is not supported. /classify runs a model that classifies texts.",
    "/v1/files": "Files are not stored here. `llmkit batch FILE` runs a file of requests.",
    "/v1/files/{rest:path}": "Files are not stored here. `llmkit batch FILE` runs a file of "
    "requests.",
    "/v1/uploads": "Files are not stored here. `llmkit batch FILE` runs a file of requests.",
    "/v1/uploads/{rest:path}": "Files are not stored here. `llmkit batch FILE` runs a file of "
    "requests.",
    "/v1/batches": "Batches are not run by the server. `llmkit batch FILE` runs a file of "
    "requests.",
    "/v1/batches/{rest:path}": "Batches are not run by the server. `llmkit batch FILE` runs a file "
    "of requests.",
    "/v1/fine_tuning/{rest:path}": "Fine-tuning is not supported.",
    "/v1/assistants": "Assistants are not supported; use /v1/responses.",
    "/v1/assistants/{rest:path}": "Assistants are not supported; use /v1/responses.",
    "/v1/threads": "Threads are not supported; use /v1/responses.",
    "/v1/threads/{rest:path}": "Threads are not supported; use /v1/responses.",
    "/v1/vector_stores": "Vector stores are not supported. /v1/embeddings makes the vectors.",
    "/v1/vector_stores/{rest:path}": "Vector stores are not supported. /v1/embeddings makes the "
    "vectors.",
    "/api/pull": "Models are not pulled through the API: `llmkit serve MODEL` downloads them.",
    "/api/push": "Models are not pushed. `huggingface-cli upload` uploads a checkpoint.",
    "/api/create": "Models are not created through the API; see `llmkit quantize` and "
    "`llmkit convert`.",
    "/api/copy": "Models are not copied through the API. `llmkit serve --served-model-name` "
    "gives a model more names.",
    "/api/delete": "Models are not deleted through the API.",
    "/api/blobs/{rest:path}": "Files are not stored here.",
}


def add_refused_routes(app: FastAPI) -> None:
    """Add a route for each of REFUSED to `app`. They are not in /openapi.json."""
    for path, message in REFUSED.items():
        app.add_route(path, _endpoint(message), methods=_METHODS)


def _endpoint(message: str) -> Callable[[Request], Awaitable[Response]]:
    async def refuse(request: Request) -> Response:
        raise ApiError(404, message, code="not_supported")

    return refuse
