"""A worker of RunPod serverless: it takes jobs from a queue and sends them to a server.

The `handler.py` that `llmkit deploy runpod` writes starts it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from llmkit.deploy.local_request import CHAT_PATH, COMPLETION_PATH, LocalRequest, RequestError
from llmkit.deploy.local_server import LocalServer
from llmkit.runtime.server.serve_options import ServeOptions


def start_worker(options: ServeOptions, concurrency: int) -> None:
    """Start a server and take jobs until RunPod stops the worker; running jobs finish first.

    concurrency: the jobs that run at the same time. Raises the LlmkitError of a failed start.
    """
    # Only RunPod's containers have it.
    import runpod

    server = LocalServer(options)
    server.wait_ready()

    async def handler(job: dict[str, Any]) -> AsyncGenerator[Any]:
        async for part in answer_job(server, job.get("input")):
            yield part

    runpod.serverless.start(
        {
            "handler": handler,
            "concurrency_modifier": lambda _current: concurrency,
            "return_aggregate_stream": True,  # /run and /runsync give all parts of a stream
        }
    )
    server.stop()


async def answer_job(server: LocalServer, job_input: Any) -> AsyncGenerator[Any]:
    """The parts of a job's output: one JSON document, or server-sent events as they arrive."""
    try:
        request = read_job(job_input, server.model)
        async for part in server.parts(request):
            yield part
    except ValueError as error:
        yield {"error": {"message": str(error), "type": "invalid_request_error"}}
    except RequestError as error:
        yield error.document


def read_job(job_input: Any, model: str) -> LocalRequest:
    """The request of a job.

    An input has `openai_route` and `openai_input`, which RunPod sends for its OpenAI-compatible
    URL, or `messages` or `prompt` with `sampling_params` and `stream`. model: the name that is used
    for an input that names none. Raises ValueError.
    """
    if not isinstance(job_input, dict):
        raise ValueError("the job's input is not an object")
    route = job_input.get("openai_route")
    if route is not None:
        if not isinstance(route, str) or not route.startswith("/"):
            raise ValueError(f"openai_route is {route!r}; a path such as {CHAT_PATH} was expected")
        body = job_input.get("openai_input")
        if not body:
            return LocalRequest("GET", route)
        if not isinstance(body, dict):
            raise ValueError("openai_input is not an object")
        return LocalRequest("POST", route, {"model": model} | body)
    sampling = job_input.get("sampling_params") or {}
    if not isinstance(sampling, dict):
        raise ValueError("sampling_params is not an object")
    body = {"model": model} | sampling | {"stream": job_input.get("stream") is True}
    for field, path in (("messages", CHAT_PATH), ("prompt", COMPLETION_PATH)):
        if field in job_input:
            return LocalRequest("POST", path, body | {field: job_input[field]})
    raise ValueError(
        "the job's input has none of messages, prompt and openai_route; one of them was expected"
    )
