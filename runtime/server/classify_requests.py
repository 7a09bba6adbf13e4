"""/classify: from texts or a conversation to the engine's logits of labels, and to the response."""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec

from llmkit.runtime.server.choice import Choice, Delta
from llmkit.runtime.server.http.http_errors import ApiError
from llmkit.runtime.server.label_scores import activated, label_logits
from llmkit.runtime.server.pooled_requests import input_token_ids, pooled_choices, pooled_usage
from llmkit.runtime.server.prepare import encode_chat, prompt_limit
from llmkit.runtime.server.schemas.score_request import ClassifyRequest
from llmkit.runtime.server.server_state import ServerState


async def prepare_classification(
    state: ServerState, request: ClassifyRequest, request_id: str, cache_salt: str
) -> list[Choice]:
    """Return a choice for each input. Raises ApiError 400 for a request that can never run."""
    if not state.text.classifier.all_labels:
        message = (
            "The model has no classification head, and no tokens stand for labels (see "
            "--classifier-from-token)."
        )
        raise ApiError(400, message, code="unsupported", param="model")
    if request.messages is None:
        param = "input"
        state.check_queue_capacity(len(request.inputs), param=param)
        prompts = await input_token_ids(
            state,
            request.inputs,
            request.add_special_tokens is not False,
            request.truncate_prompt_tokens,
        )
    else:
        param = "messages"
        token_ids, _ = await encode_chat(
            state,
            request.conversation,
            [],
            request.chat_template_kwargs or {},
            bool(request.add_generation_prompt),
            add_special_tokens=bool(request.add_special_tokens),
            max_prompt_tokens=prompt_limit(state, request.truncate_prompt_tokens, 0),
        )
        prompts = [token_ids]
    return pooled_choices(state, request, request_id, cache_salt, prompts, "classify", param)


class ClassifyResponseBuilder:
    """Builds responses of /classify, which cannot be streamed."""

    def __init__(self, request_id: str, request: ClassifyRequest, state: ServerState) -> None:
        self.id = request_id
        self._request = request
        self._classifier = state.text.classifier

    def full_response(self, choices: Sequence[Choice], answers: Sequence[Delta]) -> bytes:
        labels = self._classifier.all_labels
        activation = self._classifier.activation if self._request.applies_activation else "none"
        data = []
        for answer in answers:
            probs = activated(label_logits(answer), activation)
            best = max(range(len(probs)), key=lambda index: probs[index])
            entry = {
                "index": answer.index,
                "label": labels[best],
                "probs": probs,
                "num_classes": len(probs),
            }
            data.append(entry)
        document = {
            "id": self.id,
            "object": "list",
            "created": int(time.time()),
            "model": self._request.model,
            "data": data,
            "usage": pooled_usage(choices),
        }
        return msgspec.json.encode(document)
