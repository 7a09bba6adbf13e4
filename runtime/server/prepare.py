"""Turns a validated request into choices: chat template, tokens, limits, sampling parameters."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar

from llmkit.checkpoint.tokenizer import Detokenizer, Tokenizer
from llmkit.runtime.engine.engine_request import EngineRequest
from llmkit.runtime.engine.sampling_params import SamplingParams
from llmkit.runtime.engine.thinking_budget import ThinkingBudget
from llmkit.runtime.server.choice import Choice, Echo
from llmkit.runtime.server.engines.engine_messages import EngineReady
from llmkit.runtime.server.http.http_errors import ApiError, invalid
from llmkit.runtime.server.sandbox import SandboxError
from llmkit.runtime.server.sandbox_process import RenderTemplate
from llmkit.runtime.server.schemas.base_request import (
    INT64,
    BaseRequest,
    GenerationRequest,
    Wish,
)
from llmkit.runtime.server.schemas.chat_request import ChatCompletionRequest
from llmkit.runtime.server.schemas.completion_request import CompletionRequest
from llmkit.runtime.server.schemas.reasoning_options import ThinkingPlan, plan_thinking
from llmkit.runtime.server.schemas.structured_output import (
    check_grammar,
    combined_grammar,
    constraint_grammar,
)
from llmkit.runtime.server.server_state import SamplingDefaults, ServerState, TextResources
from llmkit.runtime.server.text.call_history import (
    has_calls,
    messages_for_template,
    with_arguments_as_text,
)
from llmkit.runtime.server.text.dialect_detection import dialect_names
from llmkit.runtime.server.text.lark_grammar import lark_mark, lark_string
from llmkit.runtime.server.text.output_parser import (
    OutputParser,
    PlainParser,
    new_output_parser,
)
from llmkit.runtime.server.text.tool_call_grammar import tool_call_grammar
from llmkit.runtime.server.text.tool_dialects import ReasoningMarks, ToolDialect

Result = TypeVar("Result")

AS_MANY_AS_FIT = -1  # of max_tokens and truncate_prompt_tokens
COMPLETION_MAX_TOKENS = 16  # OpenAI's default for completions; a chat answer may fill the context
_LONG_TEXT_CHARS = 8192  # longer texts are tokenized in a thread, so that streams keep flowing
# Fields whose value in a request must be converted for SamplingParams.
_CONVERTERS: dict[str, Callable[[Any], Any]] = {
    "stop_token_ids": tuple,
    "top_k": lambda top_k: max(0, top_k),  # -1 means all tokens, as 0 does
}


@dataclass(frozen=True)
class Prompt:
    """One prompt, and how the answers to it are decoded and parsed."""

    token_ids: list[int]
    param: str  # the request's field that it comes from
    new_detokenizer: Callable[[], Detokenizer]  # called for each answer
    new_parser: Callable[[], OutputParser] = PlainParser  # called for each answer
    echo: Echo | None = None
    grammar: str | None = None
    num_shared_tokens: int = 0  # see EngineRequest
    thinking_budget: ThinkingBudget | None = None


async def prepare_completion(
    state: ServerState, request: CompletionRequest, request_id: str, cache_salt: str = ""
) -> list[Choice]:
    """Return `n` choices for each prompt. Raises ApiError 400 for a request that can never run."""
    state.require_text_model()
    given_prompts = request.prompts
    state.check_queue_capacity(len(given_prompts) * (request.n or 1))
    tokenizer = state.text.tokenizer
    max_tokens = request.max_new_tokens
    if max_tokens is None:
        max_tokens = COMPLETION_MAX_TOKENS
    elif max_tokens == AS_MANY_AS_FIT:
        max_tokens = None
    max_prompt_tokens = prompt_limit(state, request.truncate_prompt_tokens, max_tokens or 1)
    constraint = request.output_constraint
    grammar = None
    if constraint is not None:
        answer = constraint_grammar(constraint)
        grammar = combined_grammar(
            answer, None, reasoning=None, starts_in_reasoning=False, mark=lark_string
        )
        await check_grammar(state.grammars, grammar, constraint.param)
    new_detokenizer = functools.partial(tokenizer.stream, request.skip_special_tokens is not False)
    prompts = []
    for prompt in given_prompts:
        await asyncio.sleep(0)  # other requests go on between many short prompts
        if isinstance(prompt, str):
            token_ids = await tokenize_text(
                tokenizer, prompt, request.add_special_tokens is not False, max_prompt_tokens
            )
        else:
            token_ids = prompt if max_prompt_tokens is None else prompt[-max_prompt_tokens:]
        check_token_ids(token_ids, state.engine_info.vocab_size, "prompt")
        echo = None
        if request.echo:
            echo = _echo(tokenizer, prompt, token_ids, max_prompt_tokens)
        prompts.append(Prompt(token_ids, "prompt", new_detokenizer, echo=echo, grammar=grammar))
    return _choices(state, request, request_id, prompts, max_tokens, cache_salt)


async def prepare_chat(
    state: ServerState, request: ChatCompletionRequest, request_id: str, cache_salt: str = ""
) -> list[Choice]:
    """Return `n` choices for a conversation.

    Raises ApiError 400 for a request that can never run or that the chat template refuses.
    """
    state.require_text_model()
    state.check_queue_capacity(request.n or 1)
    tokenizer = state.text.tokenizer
    tools = request.offered_tools
    dialect = _tool_dialect(state.text, bool(tools))
    marks = state.text.dialect.reasoning
    thinking = _thinking_plan(state.text, request)
    max_tokens = request.max_new_tokens
    if max_tokens == AS_MANY_AS_FIT:
        max_tokens = None
    token_ids, text = await encode_chat(
        state,
        request.conversation,
        tools,
        template_variables(state.text, request),
        request.adds_generation_prompt,
        continue_final_message=bool(request.continue_final_message),
        add_special_tokens=bool(request.add_special_tokens),
        max_prompt_tokens=prompt_limit(state, request.truncate_prompt_tokens, max_tokens or 1),
    )
    may_reason = marks is not None
    starts_in_reasoning = marks is not None and text.rstrip().endswith(marks.start.rstrip())
    begun_answer = request.conversation[-1]["content"] if request.continue_final_message else ""
    if begun_answer and marks is not None:
        # What is begun may be reasoning without an end; after an answer none follows.
        starts_in_reasoning = begun_answer.rfind(marks.start) > begun_answer.rfind(marks.end)
        may_reason = starts_in_reasoning
    thoughts = marks if may_reason or starts_in_reasoning else None
    grammar = await _chat_grammar(state, request, dialect, thoughts, starts_in_reasoning)

    def new_parser() -> OutputParser:
        return new_output_parser(
            dialect,
            request.callable_tools,
            parallel=request.allows_parallel_calls,
            required=request.requires_tool_call,
            strict=dialect is not None and _strict_calls(request, dialect),
            may_reason=may_reason,
            starts_in_reasoning=starts_in_reasoning,
            reasoning=marks,
        )

    shown_marks: list[str] = []  # special tokens that the parser needs to see
    if dialect is not None:
        shown_marks += dialect.special_tokens
    if marks is not None:
        shown_marks += marks.special_tokens
    new_detokenizer = functools.partial(
        tokenizer.stream, request.skip_special_tokens is not False, shown_marks
    )
    num_shared_tokens = 0
    if "state_bytes" in state.engine_info.plan:
        num_shared_tokens = await _num_shared_tokens(
            tokenizer, text, token_ids, request.conversation, bool(request.add_special_tokens)
        )
    prompt = Prompt(
        token_ids,
        "messages",
        new_detokenizer,
        new_parser,
        grammar=grammar,
        num_shared_tokens=num_shared_tokens,
        thinking_budget=(
            _thinking_budget(state.text, thinking.max_tokens, starts_in_reasoning, grammar)
            if thoughts is not None or state.text.dialect.channels is not None
            else None
        ),
    )
    return _choices(state, request, request_id, [prompt], max_tokens, cache_salt)


async def _num_shared_tokens(
    tokenizer: Tokenizer,
    text: str,
    token_ids: list[int],
    conversation: Sequence[dict[str, Any]],
    add_special_tokens: bool,
) -> int:
    """The tokens of a chat's prompt before the first message that is not a system message.

    text, token_ids: the prompt. They are system messages and tools, as the chat template writes
    them, which other conversations share.
    """
    end = 0
    for message in conversation:
        content = str(message.get("content") or "")
        place = text.find(content, end) if content else -1
        if message["role"] != "system":
            end = place
            break
        if place >= 0:
            end = place + len(content)
    if end <= 0:
        return 0
    shared = await tokenize_text(tokenizer, text[:end], add_special_tokens)
    # The text goes on, so its last tokens may differ from those of the part.
    pairs = enumerate(zip(shared, token_ids, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(shared), len(token_ids)))


async def encode_chat(
    state: ServerState,
    conversation: Sequence[dict[str, Any]],
    tools: Sequence[dict[str, Any]],
    template_kwargs: dict[str, Any],
    add_generation_prompt: bool = True,
    *,
    continue_final_message: bool = False,
    add_special_tokens: bool = False,
    max_prompt_tokens: int | None = None,
) -> tuple[list[int], str]:
    """Return the token ids and the text of a conversation's prompt.

    continue_final_message: the prompt ends with the content of the last message, without what the
    template writes after it. add_special_tokens: add the tokenizer's, beside the template's.
    max_prompt_tokens: keep only the last ones.
    Raises ApiError 400 when the chat template cannot express the whole conversation.
    """
    tokenizer = state.text.tokenizer
    template = tokenizer.template(bool(tools))
    if template is None:
        message = "The model has no chat template; use /v1/completions."
        raise ApiError(400, message, code="no_chat_template", param="messages")
    for index, entry in enumerate(conversation):
        if "tool_calls" in entry and "tool_calls" not in template:
            message = "The model's chat template has no place for calls."
            raise invalid(f"messages.{index}.tool_calls", message, "unsupported")
    end_mark = ""
    if continue_final_message:
        # Shows where the content ends in the text. No client can guess it.
        end_mark = uuid.uuid4().hex
        final_message = conversation[-1]
        conversation = [
            *conversation[:-1],
            {**final_message, "content": final_message["content"] + end_mark},
        ]
    conversation = messages_for_template(conversation, state.text.dialect.tools, template, tools)

    async def render(messages: Sequence[dict[str, Any]]) -> str:
        variables = tokenizer.chat_variables(
            messages, tools or None, add_generation_prompt, **template_kwargs
        )
        return await state.templates.run(RenderTemplate(template, variables))

    try:
        text = await render(conversation)
    except SandboxError as error:
        rendered = None
        if has_calls(conversation):
            with contextlib.suppress(SandboxError):
                rendered = await render(with_arguments_as_text(conversation))
        if rendered is None:
            raise invalid(
                "messages", f"The chat template refuses the messages: {error}", "chat_template"
            ) from None
        text = rendered
    if continue_final_message:
        if text.count(end_mark) != 1:
            message = "The model's chat template cannot leave the last message open."
            raise invalid("continue_final_message", message, "unsupported")
        text = text.partition(end_mark)[0]
    # The template writes the special tokens itself.
    return await tokenize_text(tokenizer, text, add_special_tokens, max_prompt_tokens), text


async def tokenize_text(
    tokenizer: Tokenizer,
    text: str,
    add_special_tokens: bool = True,
    max_tokens: int | None = None,
    keep: Literal["first", "last"] = "last",
) -> list[int]:
    """Return the token ids of `text`; long texts are tokenized in a thread.

    max_tokens, keep: see `Tokenizer.encode`.
    """
    return await in_thread_if_long(
        len(text), lambda: tokenizer.encode(text, add_special_tokens, max_tokens, keep)
    )


async def in_thread_if_long(num_chars: int, tokenize: Callable[[], Result]) -> Result:
    """Return what `tokenize` makes of `num_chars` characters; many are tokenized in a thread."""
    return tokenize() if num_chars < _LONG_TEXT_CHARS else await asyncio.to_thread(tokenize)


def prompt_limit(
    state: ServerState, truncate_prompt_tokens: int | None, num_new_tokens: int
) -> int | None:
    """Return how many tokens of a prompt are kept, if `num_new_tokens` follow it; None: all."""
    if truncate_prompt_tokens != AS_MANY_AS_FIT:
        return truncate_prompt_tokens
    # At least 1, so that a `max_tokens` that is too large is reported as such.
    return max(1, state.engine_info.max_model_len - num_new_tokens)


def check_reasoning_controls(request: BaseRequest, text: TextResources) -> None:
    """Add the fields that control reasoning and have no effect to the request's ignored fields."""
    controls = request.reasoning_controls
    if not controls:
        return
    met: set[Wish] = set()
    if request.uses_chat_template:
        can_close = _thought_tokens(text) is not None
        for template in {text.tokenizer.template(tools) or "" for tools in (False, True)}:
            met |= plan_thinking(request.thinking_wishes, template, can_close).met
    for control in controls:
        if control.wish not in met:
            request.ignored.add(control.path)


def template_variables(text: TextResources, request: ChatCompletionRequest) -> dict[str, Any]:
    """Return the variables of the chat template that a request sets.

    Those of `chat_template_kwargs` are as they are given. Raises ApiError 400.
    """
    return _thinking_plan(text, request).variables | request.template_variables


def _thinking_plan(text: TextResources, request: ChatCompletionRequest) -> ThinkingPlan:
    """Return how the chat template and the engine meet what a request says of thinking.

    Raises ApiError 400 for a budget that cannot be kept although the model thinks.
    """
    template = text.tokenizer.template(bool(request.offered_tools)) or ""
    can_close = _thought_tokens(text) is not None
    plan = plan_thinking(request.thinking_wishes, template, can_close)
    if plan.unlimitable and text.dialect.has_reasoning:
        raise invalid(
            "thinking_token_budget",
            "A thinking budget needs a mark that ends a thought and is one token; this model has "
            "none. Leave the budget out.",
            "unsupported",
        )
    if request.enable_thinking is not None and "enabled" not in plan.met:
        request.ignored.add(("enable_thinking",))
    return plan


def _thought_tokens(text: TextResources) -> tuple[tuple[int, ...], int] | None:
    """Return the tokens before a thought and the one after it; None: there is no such token."""
    marks = text.dialect.thought_marks
    if marks is None:
        return None
    end = text.tokenizer.encode(marks.end, add_special_tokens=False)
    if len(end) != 1:
        return None
    return tuple(text.tokenizer.encode(marks.start, add_special_tokens=False)), end[0]


def _thinking_budget(
    text: TextResources, max_tokens: int | None, starts_open: bool, grammar: str | None
) -> ThinkingBudget | None:
    """Return the budget that the engine keeps; None: thoughts have no limit.

    grammar: of the answer; it decides what comes after a thought.
    """
    tokens = _thought_tokens(text)
    if max_tokens is None or tokens is None:
        return None
    start, end = tokens
    again: tuple[int, ...] = ()
    channels = text.dialect.channels
    if channels is not None:
        # After a thought comes another message, which may be a thought again.
        answer = "" if grammar is not None else channels.header(channels.answer_channel)
        again = (end, *text.tokenizer.encode(answer, add_special_tokens=False))
    return ThinkingBudget(max_tokens, start, end, (end,), starts_open, again)


def check_token_ids(token_ids: list[int], vocab_size: int, param: str) -> None:
    """Raise ApiError for an id that is not in the vocabulary."""
    # min and max are much faster than a loop, and prompts can be long.
    if not token_ids or (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        return
    wrong = next(token_id for token_id in token_ids if not 0 <= token_id < vocab_size)
    raise invalid(
        param,
        f"Token id {wrong} is outside the vocabulary (0 to {vocab_size - 1}).",
        "invalid_token_id",
    )


def sampling_params(
    request: GenerationRequest, defaults: SamplingDefaults, **resolved: Any
) -> SamplingParams:
    """Build the SamplingParams of a request.

    The value of a field is the first of these that exists: the one in `resolved`, the request's,
    the checkpoint's default, the default of SamplingParams.
    """
    values: dict[str, Any] = {}
    for field in fields(SamplingParams):
        name = field.name
        value = getattr(request, name, None)
        if value is not None and name in _CONVERTERS:
            value = _CONVERTERS[name](value)
        if value is None:
            value = getattr(defaults, name, None)
        if value is not None:
            values[name] = value
    return SamplingParams(**(values | resolved))


def _choices(
    state: ServerState,
    request: GenerationRequest,
    request_id: str,
    prompts: list[Prompt],
    max_tokens: int | None,
    cache_salt: str,
) -> list[Choice]:
    """Return `n` choices for each prompt. `max_tokens` None: the rest of the context."""
    engine_info = state.engine_info
    for prompt in prompts:
        _check_length(len(prompt.token_ids), max_tokens, engine_info, prompt.param)
    check_token_ids(request.stop_token_ids or [], engine_info.vocab_size, "stop_token_ids")
    check_token_ids(list(request.logit_bias or ()), engine_info.vocab_size, "logit_bias")
    adapter = None if request.model in state.base_model_names else request.model
    cache_salt = combined_salt(cache_salt, request.cache_salt, request.cache_prompt is not False)
    stop_strings = request.stop_strings
    n = request.n or 1
    choices = []
    for index in range(len(prompts) * n):
        prompt = prompts[index // n]
        limit = max_tokens
        if limit is None:
            limit = engine_info.max_model_len - len(prompt.token_ids)
        if (request.min_tokens or 0) > limit:
            raise invalid(
                "min_tokens",
                f"min_tokens ({request.min_tokens}) is more than can be generated ({limit}).",
            )
        engine_request = EngineRequest(
            request_id=f"{request_id}-{index}",
            prompt_token_ids=prompt.token_ids,
            sampling_params=sampling_params(
                request,
                state.text.defaults,
                max_tokens=max(1, limit),  # the engine generates one token at least
                seed=_choice_seed(request.seed, index % n),
                logprobs=request.num_logprobs,
                prompt_logprobs=_num_prompt_logprobs(request, prompt),
                thinking_budget=prompt.thinking_budget,
            ),
            priority=request.priority or 0,
            cache_salt=cache_salt,
            adapter=adapter,
            grammar=prompt.grammar,
            num_shared_tokens=prompt.num_shared_tokens,
        )
        choices.append(
            Choice(
                engine_request,
                index,
                prompt.new_detokenizer(),
                stop_strings,
                prompt.new_parser(),
                prompt.echo,
                empty=limit == 0,
                include_stop=bool(request.include_stop_str_in_output),
            )
        )
    return choices


def combined_salt(client_salt: str, cache_salt: str | None, cache_prompt: bool = True) -> str:
    """Return the salt of a request's cached prefixes.

    Requests share them if they have the same client and `cache_salt`. Without `cache_prompt` a
    request shares none.
    """
    if not cache_prompt:
        return f"{client_salt} {uuid.uuid4().hex}"
    if cache_salt is None:
        return client_salt
    return f"{client_salt} {hashlib.sha256(cache_salt.encode()).hexdigest()}"


def _choice_seed(seed: int | None, index: int) -> int | None:
    """The seed of answer `index` to a prompt: `seed + index`, wrapped to the range of int64."""
    if seed is None:
        return None
    return (seed + index + INT64) % (2 * INT64) - INT64


def _num_prompt_logprobs(request: GenerationRequest, prompt: Prompt) -> int | None:
    """The number of alternatives for each prompt token.

    An echoed prompt has at least as many as the answer.
    """
    if prompt.echo is not None and request.num_logprobs is not None:
        return max(request.num_logprobs, request.prompt_logprobs or 0)
    return request.prompt_logprobs


def _check_length(
    num_prompt_tokens: int, max_tokens: int | None, engine_info: EngineReady, param: str
) -> None:
    """Raise ApiError unless the prompt and `max_tokens`, at least one, fit into the context."""
    if num_prompt_tokens == 0:
        raise invalid(param, "The prompt is empty; at least one token is needed.")
    num_tokens = num_prompt_tokens + (max_tokens or 1)
    if num_tokens > engine_info.max_model_len:
        parts = f"{num_prompt_tokens} in the prompt and {max_tokens or 'at least 1'} to generate"
        prompt_too_long = num_prompt_tokens >= engine_info.max_model_len
        raise ApiError(
            400,
            f"The context of {engine_info.max_model_len} tokens is too short for "
            f"{num_tokens} tokens ({parts}).",
            code="context_length_exceeded",
            param=param if prompt_too_long or max_tokens is None else "max_tokens",
        )


def _echo(
    tokenizer: Tokenizer,
    prompt: str | list[int],
    token_ids: list[int],
    max_prompt_tokens: int | None,
) -> Echo:
    """Return the echo of a prompt of which at most `max_prompt_tokens` are kept: `token_ids`."""
    if not isinstance(prompt, str):
        return Echo(tokenizer.decode(token_ids, skip_special_tokens=False))
    has_bos = bool(token_ids) and token_ids[0] == tokenizer.bos_token_id
    prompt_has_bos = has_bos and prompt.startswith(tokenizer.id_to_token(token_ids[0]))
    num_added_tokens = int(has_bos and not prompt_has_bos)
    if len(token_ids) == max_prompt_tokens:  # the prompt may have been cut
        prompt = tokenizer.decode(token_ids[num_added_tokens:], skip_special_tokens=False)
    return Echo(prompt, num_added_tokens)


async def _chat_grammar(
    state: ServerState,
    request: ChatCompletionRequest,
    dialect: ToolDialect | None,
    reasoning: ReasoningMarks | None,
    starts_in_reasoning: bool,
) -> str | None:
    """The grammar that the answer must follow; None when it may be any text."""
    constraint = request.output_constraint
    if not (request.requires_tool_call or constraint is not None or request.strict_tool_calls):
        return None
    mark = functools.partial(lark_mark, special_id=state.text.tokenizer.special_id)
    calls = None
    channels = None
    if dialect is not None:
        channels = dialect.channels
        if request.callable_tools:
            calls = tool_call_grammar(
                dialect,
                request.callable_tools,
                parallel=request.allows_parallel_calls,
                optional=not request.requires_tool_call and constraint is None,
                mark=mark,
            )
    answer = constraint_grammar(constraint) if constraint is not None else None
    grammar = combined_grammar(answer, calls, reasoning, starts_in_reasoning, mark, channels)
    param = constraint.param if constraint is not None else "tools"
    await check_grammar(state.grammars, grammar, param)
    return grammar


def _strict_calls(request: ChatCompletionRequest, dialect: ToolDialect) -> bool:
    """Whether the grammar of `_chat_grammar` lets only a call begin as calls do."""
    if request.output_constraint is None:
        return request.strict_tool_calls
    # A call without an opener may look like an answer in JSON.
    return not dialect.whole_answer


def _tool_dialect(text: TextResources, has_tools: bool) -> ToolDialect | None:
    """Return how the answer is read; None: it has no calls, and no channels.

    Raises ApiError 400 when there are tools and the chat template has none, or the dialect is
    unknown.
    """
    dialect = text.dialect.tools
    if not has_tools:
        return dialect if dialect is not None and dialect.channels is not None else None
    if "tools" not in (text.tokenizer.template(tools=True) or ""):
        raise invalid("tools", "The model's chat template has no place for tools.", "unsupported")
    if dialect is None:
        message = (
            "How this model writes calls is not known: its chat template has the marks of no "
            f"dialect. Start the server with --tool-parser NAME: {', '.join(dialect_names())}."
        )
        raise invalid("tools", message, "unsupported")
    return dialect
