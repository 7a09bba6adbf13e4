"""From a validated body to engine requests: chat template, tokens, limits, defaults."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from llmkit.checkpoint.tokenizer import Detokenizer, Tokenizer
from llmkit.runtime.server.bodies.base import INT64, GenerationBody
from llmkit.runtime.server.bodies.chat import ChatBody
from llmkit.runtime.server.bodies.completions import CompletionBody
from llmkit.runtime.server.bodies.structure import answer_grammar, call_grammars, check_grammar, quoted, whole_grammar
from llmkit.runtime.server.engines.messages import Add, Ready
from llmkit.runtime.server.generation import Choice, Echo
from llmkit.runtime.server.http.errors import ApiError, invalid
from llmkit.runtime.server.sandbox import SandboxError
from llmkit.runtime.server.sandbox_process import Render
from llmkit.runtime.server.state import State, TextSide
from llmkit.runtime.server.text.calls import CallFormat, Calls, call_format
from llmkit.runtime.server.text.parts import END_THINK, THINK, Parts

COMPLETION_MAX_TOKENS = 16  # OpenAI's default for completions; a chat answer may fill the context
_LONG_TEXT_CHARS = 8192  # longer texts are tokenized in a thread, so that streams keep flowing


@dataclass(frozen=True)
class Prompt:
    """One prompt and how the answers to it are read. param: the field that it comes from."""

    tokens: list[int]
    param: str
    echo: Echo | None = None
    parser: Callable[[], Parts] = Parts
    detokenizer: Callable[[], Detokenizer] | None = None
    grammar: str | None = None


async def prepare_completion(state: State, body: CompletionBody, request_id: str, salt: str = "") -> list[Choice]:
    """`n` choices per prompt. ApiError 400 for what can never be run."""
    given = body.prompts
    state.check_room(len(given) * (body.n or 1))
    tokenizer = state.text.tokenizer
    grammar = None
    if body.form is not None:
        grammar = whole_grammar(answer_grammar(body.form), [], False, False, quoted)
        await check_grammar(state.grammars, grammar, body.form.param)
    prompts = []
    for prompt in given:
        tokens = await tokenized(tokenizer, prompt) if isinstance(prompt, str) else prompt
        check_ids(tokens, state.facts.vocab_size, "prompt")
        echo = _echo(tokenizer, prompt, tokens) if body.echo else None
        prompts.append(Prompt(tokens, "prompt", echo, grammar=grammar))
    limit = COMPLETION_MAX_TOKENS if body.output_limit is None else body.output_limit
    return _choices(state, body, request_id, prompts, limit, salt)


def _echo(tokenizer: Tokenizer, prompt: str | list[int], tokens: list[int]) -> Echo:
    if not isinstance(prompt, str):
        return Echo(tokenizer.decode(tokens, skip_special_tokens=False))
    added = tokens[0] == tokenizer.bos_id and not prompt.startswith(tokenizer.id_to_token(tokens[0]))
    return Echo(prompt, int(added))


async def tokenized(tokenizer: Tokenizer, text: str, special: bool = True) -> list[int]:
    """The ids of `text`; special: with those that the tokenizer puts around it."""
    if len(text) < _LONG_TEXT_CHARS:
        return tokenizer.encode(text, special)
    return await asyncio.to_thread(tokenizer.encode, text, special)


async def prepare_chat(state: State, body: ChatBody, request_id: str, salt: str = "") -> list[Choice]:
    """`n` choices of a conversation. ApiError 400 for what can never be run or the template refuses."""
    state.check_room(body.n or 1)
    tokenizer = state.text.tokenizer
    tools = body.offered_tools
    form = _call_format(tokenizer) if tools else None
    tokens, text = await encode_chat(state, body.conversation, tools, body.chat_template_kwargs or {})
    names = [tool["function"]["name"] for tool in body.callable_tools]
    thinks = THINK in (tokenizer.template(bool(tools)) or "")
    begun = text.rstrip().endswith(THINK)

    def parser() -> Parts:
        return Parts(thinks, begun, Calls(form, names, body.several_calls) if form else None)

    grammar = None
    if body.must_call or body.form is not None or body.strict_calls:
        mark = functools.partial(_mark, tokenizer)
        free = not body.must_call and body.form is None
        calls = call_grammars(form, body.callable_tools, body.several_calls, free, mark) if form else []
        answer = answer_grammar(body.form) if body.form else None
        grammar = whole_grammar(answer, calls, thinks, begun, mark)
        await check_grammar(state.grammars, grammar, body.form.param if body.form else "tools")
    marks = [*([form.opener, form.closer] if form else []), *([THINK, END_THINK] if thinks else [])]
    prompt = Prompt(tokens, "messages", None, parser, lambda: tokenizer.stream(shown=marks), grammar)
    return _choices(state, body, request_id, [prompt], body.output_limit, salt)


async def encode_chat(
    state: State,
    conversation: Sequence[dict[str, Any]],
    tools: Sequence[dict[str, Any]],
    variables: dict[str, Any],
    add_generation_prompt: bool = True,
) -> tuple[list[int], str]:
    """The tokens and the text of a conversation's prompt. ApiError 400 where the template cannot say all of it."""
    tokenizer = state.text.tokenizer
    template = tokenizer.template(bool(tools))
    if template is None:
        message = "The model has no chat template; use /v1/completions."
        raise ApiError(400, message, code="no_chat_template", param="messages")
    for index, entry in enumerate(conversation):
        if "tool_calls" in entry and "tool_calls" not in template:
            message = "The model's chat template has no place for calls."
            raise invalid(f"messages.{index}.tool_calls", message, "unsupported")
    known = tokenizer.chat_variables(conversation, tools or None, add_generation_prompt, **variables)
    try:
        text = await state.templates.ask(Render(template, known))
    except SandboxError as error:
        raise invalid("messages", f"The chat template refuses the messages: {error}", "chat_template") from None
    return await tokenized(tokenizer, text, special=False), text  # the template writes the special tokens itself


def _mark(tokenizer: Tokenizer, text: str) -> str:
    """`text` as a Lark grammar names it: special tokens are no text."""
    special = tokenizer.special_id(text)
    return quoted(text) if special is None else f"<[{special}]>"


def _call_format(tokenizer: Tokenizer) -> CallFormat:
    """How the model calls tools. ApiError 400 when its template takes none, or it is not known."""
    template = tokenizer.template(tools=True) or ""
    form = call_format(template)
    if "tools" not in template:
        raise invalid("tools", "The model's chat template has no place for tools.", "unsupported")
    if form is None:
        message = "How this model writes calls is not known: its chat template names no format that llmkit can read."
        raise invalid("tools", message, "unsupported")
    return form


def _choices(
    state: State, body: GenerationBody, request_id: str, prompts: list[Prompt], limit: int | None, salt: str
) -> list[Choice]:
    facts, text, stops, count = state.facts, state.text, body.stops, body.n or 1
    adapter = None if body.model in state.names else body.model
    for prompt in prompts:
        _check_length(len(prompt.tokens), limit, facts, prompt.param)
    check_ids(body.stop_token_ids or [], facts.vocab_size, "stop_token_ids")
    check_ids(list(body.logit_bias or ()), facts.vocab_size, "logit_bias")
    choices = []
    for index in range(len(prompts) * count):
        prompt = prompts[index // count]
        most = facts.max_model_len - len(prompt.tokens) if limit is None else limit
        if (body.min_tokens or 0) > most:
            raise invalid("min_tokens", f"min_tokens ({body.min_tokens}) is more than can be generated ({most}).")
        request = _request(body, f"{request_id}-{index}", prompt, max(1, most), text)
        if body.seed is not None:
            seed = (body.seed + index % count + INT64) % (2 * INT64) - INT64
            request = msgspec.structs.replace(request, seed=seed)
        choices.append(
            Choice(
                msgspec.structs.replace(request, salt=salt, adapter=adapter),
                index,
                (prompt.detokenizer or text.tokenizer.stream)(),
                stops,
                prompt.parser(),
                prompt.echo,
                empty=most == 0,
            )
        )
    return choices


def _request(body: GenerationBody, request_id: str, prompt: Prompt, limit: int, text: TextSide) -> Add:
    defaults, logprobs, prompt_logprobs = text.defaults, body.told_logprobs, body.prompt_logprobs
    if prompt.echo is not None and logprobs is not None:
        prompt_logprobs = max(logprobs, prompt_logprobs or 0)
    return Add(
        id=request_id,
        prompt=prompt.tokens,
        max_tokens=limit,
        temperature=defaults.temperature if body.temperature is None else body.temperature,
        top_k=defaults.top_k if body.top_k is None else max(0, body.top_k),
        top_p=defaults.top_p if body.top_p is None else body.top_p,
        min_p=defaults.min_p if body.min_p is None else body.min_p,
        ignore_eos=bool(body.ignore_eos),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        min_tokens=body.min_tokens or 0,
        repetition_penalty=body.repetition_penalty or defaults.repetition_penalty,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=body.logit_bias or {},
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        priority=body.priority or 0,
        grammar=prompt.grammar,
    )


def check_ids(tokens: list[int], vocab_size: int, param: str) -> None:
    """ApiError for an id that the model has no row for."""
    if tokens and not (min(tokens) >= 0 and max(tokens) < vocab_size):
        wrong = next(token for token in tokens if not 0 <= token < vocab_size)
        raise invalid(param, f"Token id {wrong} is outside the vocabulary (0 to {vocab_size - 1}).", "invalid_token_id")


def _check_length(prompt: int, limit: int | None, facts: Ready, param: str) -> None:
    """ApiError unless the prompt and `limit` new tokens (at least one) fit into the context."""
    if prompt == 0:
        raise invalid(param, "The prompt is empty; at least one token is needed.")
    if prompt + (limit or 1) > facts.max_model_len:
        asked = f"{prompt} in the prompt and {limit or 'at least 1'} to generate"
        raise ApiError(
            400,
            f"The context of {facts.max_model_len} tokens is too short for {prompt + (limit or 1)} tokens ({asked}).",
            code="context_length_exceeded",
            param=param if prompt >= facts.max_model_len or limit is None else "max_tokens",
        )
