"""The schemas of /score, /rerank and /classify, as vLLM has them; /rerank as Cohere and Jina."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field

from llmkit.runtime.server.http.http_errors import invalid
from llmkit.runtime.server.schemas.base_request import (
    BaseRequest,
    CacheSalt,
    NeutralValues,
    NonNegativeInt,
    TimeoutSeconds,
    TruncatePromptTokens,
    any_of_schema,
    check_truncation,
    take_alias,
)
from llmkit.runtime.server.schemas.chat_request import (
    MAX_MESSAGES,
    ChatMessage,
    check_template_kwargs,
    parse_chat_messages,
)
from llmkit.runtime.server.schemas.completion_request import (
    MAX_PROMPTS,
    PROMPTS_SCHEMA,
    prompt_list,
)

_TEXT_SCHEMA = {"type": "string", "minLength": 1}
_DOCUMENT_SCHEMA = {
    "type": "object",
    "required": ["text"],
    "properties": {"text": _TEXT_SCHEMA},
}
_DOCUMENTS_SCHEMA = {
    "type": "array",
    "minItems": 1,
    "maxItems": MAX_PROMPTS,
    "items": {"anyOf": [_TEXT_SCHEMA, _DOCUMENT_SCHEMA]},
}
Texts = Annotated[Any, any_of_schema(_TEXT_SCHEMA, _DOCUMENT_SCHEMA, _DOCUMENTS_SCHEMA)]
# The pairs of names that clients give to the two sides of /score.
_SIDES = (
    ("text_1", "text_2"),
    ("queries", "documents"),
    ("queries", "items"),
    ("data_1", "data_2"),
)


class PooledFields(BaseRequest):
    """The fields of every request for scores. Null means the default everywhere."""

    truncate_prompt_tokens: TruncatePromptTokens | None = None
    use_activation: bool | None = None
    activation: bool | None = None  # vLLM's former name of use_activation
    cache_salt: CacheSalt | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None
    timeout: TimeoutSeconds | None = None
    user: str | None = None

    def check(self) -> None:
        take_alias(self, "activation", "use_activation")
        check_truncation(self.truncate_prompt_tokens)

    @property
    def applies_activation(self) -> bool:
        """Whether logits become probabilities."""
        return self.use_activation is not False


class PairFields(PooledFields):
    """The fields of requests that score pairs of texts."""

    max_tokens_per_query: NonNegativeInt | None = None  # 0: no limit
    max_tokens_per_doc: NonNegativeInt | None = None
    instruction: Annotated[str, Field(max_length=16_384)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def check(self) -> None:
        super().check()
        check_template_kwargs(self.chat_template_kwargs)

    @property
    def template_variables(self) -> dict[str, Any]:
        """The variables of the chat template besides the pair."""
        variables = {} if self.instruction is None else {"instruction": self.instruction}
        return variables | (self.chat_template_kwargs or {})


class RerankRequest(PairFields):
    """POST /rerank, /v1/rerank and /v2/rerank: the order of documents for a query."""

    # How Cohere cuts long documents into parts, of which the best one counts.
    neutral_values: ClassVar[NeutralValues] = {"max_chunks_per_doc": (1,)}

    query: Annotated[str, Field(min_length=1)]
    documents: Annotated[Any, any_of_schema(_DOCUMENTS_SCHEMA, null=False)]
    top_n: NonNegativeInt | None = None  # 0: all
    return_documents: bool | None = None

    def check(self) -> None:
        super().check()
        if not isinstance(self.documents, list):
            raise invalid("documents", "documents must be a list of texts.", "invalid_type")
        _ = self.texts  # raises ApiError when a document is invalid

    @property
    def texts(self) -> list[str]:
        """The text of each document. Raises ApiError for one that is neither a text nor has one."""
        return text_list(self.documents, "documents")


class ScoreRequest(PairFields):
    """POST /score and /v1/score: the score of each pair of texts."""

    text_1: Texts = None
    text_2: Texts = None
    queries: Texts = None
    documents: Texts = None
    items: Texts = None
    data_1: Texts = None
    data_2: Texts = None

    def check(self) -> None:
        super().check()
        _ = self.pairs  # raises ApiError when a side is invalid

    @property
    def pairs(self) -> tuple[list[str], list[str]]:
        """The texts of both sides, as many of one as of the other.

        One text on the first side is paired with each of the second side. Raises ApiError for sides
        of other lengths, and for a request that does not have exactly one of `_SIDES`.
        """
        first_name, second_name = self._side_names
        first = text_list(getattr(self, first_name), first_name)
        second = text_list(getattr(self, second_name), second_name)
        if len(first) == 1:
            first *= len(second)
        if len(first) != len(second):
            message = (
                f"{first_name} has {len(first)} texts and {second_name} {len(second)}; give one "
                f"text in {first_name}, or as many as in {second_name}."
            )
            raise invalid(first_name, message)
        return first, second

    @property
    def second_side(self) -> str:
        """The name of the field of the second side."""
        return self._side_names[1]

    @property
    def _side_names(self) -> tuple[str, str]:
        names = {name for side in _SIDES for name in side if getattr(self, name) is not None}
        given = [side for side in _SIDES if names == set(side)]
        if len(given) != 1:
            expected = ", or ".join(" and ".join(side) for side in _SIDES)
            raise invalid("text_1", f"Give {expected}.")
        return given[0]


class ClassifyRequest(PooledFields):
    """POST /classify: the labels of texts, or of one conversation."""

    input: Annotated[Any, PROMPTS_SCHEMA] = None
    messages: (
        Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
        | None
    ) = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def check(self) -> None:
        super().check()
        if (self.input is None) == (self.messages is None):
            raise invalid("input", "Give either input or messages.")
        for name in ("add_generation_prompt", "chat_template_kwargs"):
            if self.messages is None and getattr(self, name) is not None:
                raise invalid(name, f"{name} goes with messages, not with input.")
        check_template_kwargs(self.chat_template_kwargs)
        # Raises ApiError when the input is invalid.
        _ = self.inputs if self.messages is None else self.conversation

    @property
    def inputs(self) -> list[str | list[int]]:
        """A text or a list of token ids for each result. Raises ApiError: see `prompt_list`."""
        return prompt_list(self.input, "input")

    @property
    def conversation(self) -> list[dict[str, Any]]:
        """The messages as chat templates take them. Raises ApiError for an invalid message."""
        return parse_chat_messages(self.messages or [], self.ignored)


def text_list(value: Any, param: str) -> list[str]:
    """Return the texts in the field `param`: a text, an object with a text, or a list of them.

    Raises ApiError for anything else, and for empty texts.
    """
    entries = value if isinstance(value, list) else [value]
    if not 1 <= len(entries) <= MAX_PROMPTS:
        raise invalid(param, f"{param} has {len(entries)} texts; 1 to {MAX_PROMPTS} are possible.")
    texts = []
    for index, entry in enumerate(entries):
        text = entry.get("text") if isinstance(entry, dict) else entry
        path = f"{param}.{index}" if isinstance(value, list) else param
        if not isinstance(text, str):
            message = f"{path} must be a text, or an object with a text."
            raise invalid(path, message, "invalid_type")
        if not text:
            raise invalid(path, f"{path} is empty.")
        texts.append(text)
    return texts
