"""The models of a Triton ensemble: tokenizer, model from ids to ids, detokenizer.

The model is decoupled: it sends a stream of responses, and Triton runs the detokenizer once for
each. Triton keeps no state between these runs, because a client's request is no sequence. The
detokenizer has none either: a response carries the last tokens before it, which say where a
character that is not complete began.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np

from llmkit.checkpoint.open_model_files import open_model_files
from llmkit.checkpoint.tokenizer import Tokenizer, load_tokenizer
from llmkit.deploy.triton_model import ServerModel, model_options
from llmkit.runtime.server.http.http_errors import ApiError
from llmkit.runtime.server.kserve.kserve_request import sampling_fields

# The tokens before a response that its text may depend on. A character has at most four bytes, and
# a token that is not special at least one.
CONTEXT_TOKENS = 32
# Parameters that work on text, which the model does not see, or give several answers; with the
# values that change nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "stop": (None, [], ""),
    "include_stop_str_in_output": (None, False),
    "n": (None, 1),
    "best_of": (None, 1),
}


class _TextModel:
    """A model that answers each request with one response, and needs the tokenizer only."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the tokenizer. Raises LlmkitError, which Triton shows."""
        import triton_python_backend_utils as utils

        self._utils = utils
        self._tokenizer = load_tokenizer(open_model_files(model_options(args).model))

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer each request, or say what is wrong with it."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        try:
            tensors = self._run(request)
        except Exception as error:
            return self._utils.InferenceResponse(error=self._utils.TritonError(str(error)))
        return self._utils.InferenceResponse(output_tensors=tensors)

    def _run(self, request: Any) -> list[Any]:
        """The output tensors."""
        raise NotImplementedError

    def _values(self, request: Any, name: str) -> list[Any]:
        tensor = self._utils.get_input_tensor_by_name(request, name)
        values: list[Any] = tensor.as_numpy().reshape(-1).tolist()
        return values


class TokenizerModel(_TextModel):
    """Text to ids, with the special tokens that /v1/completions adds."""

    def _run(self, request: Any) -> list[Any]:
        texts = self._values(request, "text_input")
        if len(texts) != 1:
            raise ValueError(f"text_input has {len(texts)} values; one was expected")
        ids = self._tokenizer.encode(texts[0].decode())
        return [self._utils.Tensor("input_ids", np.array(ids, dtype=np.int64))]


class DetokenizerModel(_TextModel):
    """Ids of a response to its text; see `GeneratorModel`."""

    def _run(self, request: Any) -> list[Any]:
        ids = self._values(request, "output_ids")
        start, end = self._values(request, "text_range")
        (skip_special_tokens,) = self._values(request, "skip_special_tokens")
        (finish_reason,) = self._values(request, "finish_reason")
        detokenizer = self._tokenizer.stream(bool(skip_special_tokens))
        detokenizer.add(ids[:start])
        text = detokenizer.add(ids[start:end])
        if finish_reason:
            text += detokenizer.flush()
        values = np.array([text.encode()], dtype=np.object_)
        return [self._utils.Tensor("text_output", values)]


class GeneratorModel(ServerModel):
    """Ids to ids: a server process, like the model of text to text."""

    def initialize(self, args: dict[str, str]) -> None:
        """Start the server. Raises LlmkitError, which Triton shows."""
        super().initialize(args)
        # The server lists the token that ended an answer; it is not part of the text.
        tokenizer: Tokenizer = load_tokenizer(open_model_files(model_options(args).model))
        self._eos_token_ids = frozenset(tokenizer.eos_token_ids)

    async def _stream(self, request: Any, sender: Any) -> None:
        ids = self._utils.get_input_tensor_by_name(request, "input_ids").as_numpy().reshape(-1)
        inputs = self._inputs(request, ("stream", "sampling_parameters"))
        body = self._completion(inputs, json.loads(request.parameters() or "{}"))
        body["prompt"] = [int(index) for index in ids]
        end_ids = self._eos_token_ids | frozenset(body.get("stop_token_ids") or ())
        context: deque[int] = deque(maxlen=CONTEXT_TOKENS)
        async for document in self._documents("/v1/completions", body):
            (choice,) = document["choices"]
            response_ids: list[int] = choice["token_ids"]
            output_ids = [*context, *response_ids]
            end = len(context) + len(response_ids)
            is_stop = choice["finish_reason"] == "stop"
            if is_stop and response_ids and response_ids[-1] in end_ids:
                end -= 1
            tensors = {
                "output_ids": np.array(output_ids, dtype=np.int64),
                "text_range": np.array([len(context), end], dtype=np.int64),
                "skip_special_tokens": np.array([body.get("skip_special_tokens", True)]),
                "finish_reason": np.array(
                    [(choice["finish_reason"] or "").encode()], dtype=np.object_
                ),
                "num_input_tokens": np.array([len(ids)], dtype=np.uint32),
                "num_output_tokens": np.array([len(response_ids)], dtype=np.uint32),
            }
            sender.send(
                self._utils.InferenceResponse(
                    output_tensors=[
                        self._utils.Tensor(name, values) for name, values in tensors.items()
                    ]
                )
            )
            context.extend(response_ids)

    def _completion(
        self, inputs: Mapping[str, Any], parameters: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The body of a completion, without the prompt. Raises ValueError for what it lacks."""
        try:
            fields = sampling_fields(inputs.get("sampling_parameters", "{}"), parameters)
        except ApiError as error:
            raise ValueError(error.message) from None
        for name, allowed in _UNSUPPORTED.items():
            if fields.get(name) not in allowed:
                raise ValueError(
                    f"{name} is not supported in an ensemble, where the model sees ids alone; "
                    "deploy the model without --ensemble"
                )
        settings = {
            "model": self._model,
            "stream": bool(inputs.get("stream", False)),
            "return_token_ids": True,
        }
        return fields | settings
