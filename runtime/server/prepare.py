"""Turns a validated request into choices: chat template, tokens, limits, sampling parameters."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from llmkit.checkpoint.tokenizer import Detokenizer, Tokenizer
from llmkit.runtime.engine.engine_request import EngineRequest
from llmkit.runtime.engine.sampling_params import SamplingParams
from llmkit.runtime.server.choice import Choice, Echo
from llmkit.runtime.server.engines.engine_messages import EngineReady
from llmkit.runtime.server.http.http_errors import ApiError, invalid
from llmkit.runtime.server.sandbox import SandboxError
from llmkit.runtime.server.sandbox_process import RenderTemplate
from llmkit.runtime.server.schemas.base_request import (
    INT64,
    BaseRequest,
    GenerationRequest,
)
from llmkit.runtime.server.schemas.chat_request import ChatCompletionRequest
from llmkit.runtime.server.schemas.completion_request import CompletionRequest
from llmkit.runtime.server.schemas.structured_output import (
    check_grammar,
    combined_grammar,
    constraint_grammar,
    lark_string,
    tool_call_grammars,
)
from llmkit.runtime.server.server_state import SamplingDefaults, ServerState
from llmkit.runtime.server.text.output_parser import (
    THINK_END,
    THINK_START,
    OutputParser,
    has_reasoning,
)
from llmkit.runtime.server.text.tool_calls import (
    ToolCallFormat,
    ToolCallParser,
    detect_tool_call_format,
)

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
    new_parser: Callable[[], OutputParser] = OutputParser  # called for each answer
    echo: Echo | None = None
    grammar: str | None = None
    num_shared_tokens: int = 0  # see EngineRequest


async def prepare_completion(
    state: ServerState, request: CompletionRequest, request_id: str, cache_salt: str = ""
) -> list[Choice]:
    """Return `n` choices for each prompt. Raises ApiError 400 for a request that can never run."""
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
            answer, [], may_reason=False, starts_in_reasoning=False, lark=lark_string
        )
        await check_grammar(state.grammars, grammar, constraint.param)
    new_detokenizer = functools.partial(tokenizer.stream, request.skip_special_tokens is not False)
    prompts = []
    for prompt in given_prompts:
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
    state.check_queue_capacity(request.n or 1)
    tokenizer = state.text.tokenizer
    tools = request.offered_tools
    call_format = _tool_call_format(tokenizer) if tools else None
    max_tokens = request.max_new_tokens
    if max_tokens == AS_MANY_AS_FIT:
        max_tokens = None
    token_ids, text = await encode_chat(
        state,
        request.conversation,
        tools,
        request.template_variables,
        request.adds_generation_prompt,
        continue_final_message=bool(request.continue_final_message),
        add_special_tokens=bool(request.add_special_tokens),
        max_prompt_tokens=prompt_limit(state, request.truncate_prompt_tokens, max_tokens or 1),
    )
    template = tokenizer.template(bool(tools)) or ""
    if request.enable_thinking is not None and "enable_thinking" not in template:
        request.ignored.add(("enable_thinking",))
    may_reason = THINK_START in template
    starts_in_reasoning = text.rstrip().endswith(THINK_START)
    begun_answer = request.conversation[-1]["content"] if request.continue_final_message else ""
    if begun_answer:
        # What is begun may be reasoning without an end; after an answer none follows.
        starts_in_reasoning = begun_answer.rfind(THINK_START) > begun_answer.rfind(THINK_END)
        may_reason = starts_in_reasoning
    grammar = await _chat_grammar(state, request, call_format, may_reason, starts_in_reasoning)
    tool_names = [tool["function"]["name"] for tool in request.callable_tools]

    def new_parser() -> OutputParser:
        calls = None
        if call_format is not None:
            calls = ToolCallParser(
                call_format,
                tool_names,
                parallel=request.allows_parallel_calls,
                required=request.requires_tool_call,
                strict=_strict_calls(request, call_format),
            )
        return OutputParser(may_reason, starts_in_reasoning, calls)

    shown_marks: list[str] = []  # special tokens that the parser needs to see
    if call_format is not None:
        shown_marks += [call_format.opener, call_format.closer]
    if may_reason:
        shown_marks += [THINK_START, THINK_END]
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
    variables = tokenizer.chat_variables(
        conversation, tools or None, add_generation_prompt, **template_kwargs
    )
    try:
        text = await state.templates.run(RenderTemplate(template, variables))
    except SandboxError as error:
        raise invalid(
            "messages", f"The chat template refuses the messages: {error}", "chat_template"
        ) from None
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
    if len(text) < _LONG_TEXT_CHARS:
        return tokenizer.encode(text, add_special_tokens, max_tokens, keep)
    return await asyncio.to_thread(tokenizer.encode, text, add_special_tokens, max_tokens, keep)


def prompt_limit(
    state: ServerState, truncate_prompt_tokens: int | None, num_new_tokens: int
) -> int | None:
    """Return how many tokens of a prompt are kept, if `num_new_tokens` follow it; None: all."""
    if truncate_prompt_tokens != AS_MANY_AS_FIT:
        return truncate_prompt_tokens
    # At least 1, so that a `max_tokens` that is too large is reported as such.
    return max(1, state.engine_info.max_model_len - num_new_tokens)


def check_reasoning_controls(request: BaseRequest, tokenizer: Tokenizer) -> None:
    """Settle the fields that control how much the model reasons.

    They have no effect where the chat template has no reasoning, and are added to the request's
    ignored fields. Raises ApiError 400 where it has, unless the value means the default.
    """
    controls = request.reasoning_controls
    if not controls:
        return
    templates = [tokenizer.template(tools) or "" for tools in (False, True)]
    can_reason = request.uses_chat_template and any(map(has_reasoning, templates))
    for control in controls:
        if can_reason and not control.is_default:
            param = ".".join(map(str, control.path))
            raise invalid(
                param,
                f"{param} is not supported with this value for a model that reasons: leave it out. "
                "chat_template_kwargs sets what its chat template has.",
                "unsupported",
            )
        request.ignored.add(control.path)


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
    call_format: ToolCallFormat | None,
    may_reason: bool,
    starts_in_reasoning: bool,
) -> str | None:
    """The grammar that the answer must follow; None when it may be any text."""
    constraint = request.output_constraint
    if not (request.requires_tool_call or constraint is not None or request.strict_tool_calls):
        return None
    lark = functools.partial(_lark_mark, state.text.tokenizer)
    calls = []
    if call_format is not None:
        calls = tool_call_grammars(
            call_format,
            request.callable_tools,
            parallel=request.allows_parallel_calls,
            optional=not request.requires_tool_call and constraint is None,
            lark=lark,
        )
    answer = constraint_grammar(constraint) if constraint is not None else None
    grammar = combined_grammar(answer, calls, may_reason, starts_in_reasoning, lark)
    param = constraint.param if constraint is not None else "tools"
    await check_grammar(state.grammars, grammar, param)
    return grammar


def _strict_calls(request: ChatCompletionRequest, call_format: ToolCallFormat) -> bool:
    """Whether the grammar of `_chat_grammar` lets only a call begin as calls do."""
    if request.output_constraint is None:
        return request.strict_tool_calls
    # A call without an opener may look like an answer in JSON.
    return not call_format.whole_answer


def _lark_mark(tokenizer: Tokenizer, text: str) -> str:
    """Return a Lark expression that matches `text`; a special token is written as its id."""
    special_id = tokenizer.special_id(text)
    return lark_string(text) if special_id is None else f"<[{special_id}]>"


def _tool_call_format(tokenizer: Tokenizer) -> ToolCallFormat:
    """Return the format of the model's tool calls.

    Raises ApiError 400 when the chat template has no tools, or when the format is unknown.
    """
    template = tokenizer.template(tools=True) or ""
    call_format = detect_tool_call_format(template)
    if "tools" not in template:
        raise invalid("tools", "The model's chat template has no place for tools.", "unsupported")
    if call_format is None:
        message = (
            "How this model writes calls is not known: its chat template names no format that "
            "llmkit can read."
        )
        raise invalid("tools", message, "unsupported")
    return call_format
