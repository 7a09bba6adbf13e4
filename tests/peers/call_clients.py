"""Calls a server through one client library, as an application would.

    python tests/peers/call_clients.py CLIENT --url http://127.0.0.1:8000 --model NAME

Runs in the environment of the library. The last line of the output is JSON: `done` says what was
done. An answer that is missing something is an AssertionError.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Callable
from typing import Any, Literal

QUESTION = "What is the weather in Oslo?"
CITY = {"type": "object", "properties": {"city": {"enum": ["Oslo"]}}, "required": ["city"]}
SEED = 7


def expect(holds: object, what: str) -> None:
    """Fail with `what` unless it holds."""
    assert holds, what


def openai_agents(url: str, model: str) -> str:
    """A whole agent: the model calls a Python function and answers with its result."""
    import agents
    import openai

    called: list[str] = []

    @agents.function_tool
    def get_weather(city: str) -> str:
        """The weather of a city."""
        called.append(city)
        return "It rains in Oslo."

    agents.set_tracing_disabled(True)
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none")
    settings = agents.ModelSettings(
        tool_choice="required", parallel_tool_calls=False, temperature=0, max_tokens=96
    )
    models = (
        agents.OpenAIResponsesModel(model, client),
        agents.OpenAIChatCompletionsModel(model, client),
    )

    async def run() -> None:
        for api in models:
            caller = agents.Agent(
                "Caller",
                tools=[get_weather],
                model=api,
                model_settings=settings,
                tool_use_behavior="stop_on_first_tool",  # a small model would call for ever
            )
            speaker = agents.Agent(
                "Speaker",
                instructions="Answer in one sentence.",
                model=api,
                model_settings=agents.ModelSettings(temperature=0, max_tokens=400),
            )
            result = await agents.Runner.run(caller, QUESTION)
            expect(result.final_output == "It rains in Oslo.", f"no result: {result.final_output}")
            stream = agents.Runner.run_streamed(caller, QUESTION)
            kinds = [event.name async for event in stream.stream_events() if hasattr(event, "name")]
            expect("tool_called" in kinds, f"no call in the stream: {kinds}")
            # The items of the first run, with the call and its result, are sent back.
            told = agents.Runner.run_streamed(speaker, result.to_input_list())
            events = [event.type async for event in told.stream_events()]
            expect("raw_response_event" in events and told.final_output, "no streamed answer")

    asyncio.run(run())
    expect(len(called) == 4, f"the tool ran {len(called)} times in 4 runs")
    return (
        "an agent that calls a tool and one that gets the result, by Responses and by chat "
        "completions, streamed too"
    )


def langchain(url: str, model: str) -> str:
    """Text, batches, tools and structured output of ChatOpenAI, and an agent."""
    from langchain.agents import create_agent
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_core.tools import tool
    from langchain_openai import ChatOpenAI, OpenAI
    from pydantic import BaseModel, ConfigDict

    class Weather(BaseModel):
        """What the weather is like."""

        model_config = ConfigDict(extra="forbid")
        city: Literal["Oslo"]
        rains: bool

    @tool(return_direct=True)  # a small model would call for ever
    def get_weather(city: str) -> str:
        """The weather of a city."""
        return f"It rains in {city}."

    fields: dict[str, Any] = {"base_url": f"{url}/v1", "api_key": "none", "temperature": 0}
    chat = ChatOpenAI(model=model, seed=SEED, max_completion_tokens=12, **fields)
    longer = ChatOpenAI(model=model, seed=SEED, max_completion_tokens=96, **fields)
    answer = chat.invoke(QUESTION)
    usage = answer.usage_metadata
    expect(answer.content and usage and usage["output_tokens"] > 0, "no text or usage")
    streamed = list(chat.stream(QUESTION, stream_usage=True))
    expect("".join(chunk.text for chunk in streamed) == answer.content, "the stream differs")
    expect(any(chunk.usage_metadata for chunk in streamed), "no usage in the stream")
    expect(len(chat.batch([QUESTION, "Hello"])) == 2, "no batch")

    caller = longer.bind_tools([get_weather], tool_choice="any", parallel_tool_calls=False)
    first = caller.invoke(QUESTION)
    (call,) = first.tool_calls
    result = ToolMessage(get_weather.invoke(call["args"]), tool_call_id=call["id"])
    expect(chat.invoke([HumanMessage(QUESTION), first, result]).content, "no answer to a result")
    chunks = [chunk for part in caller.stream(QUESTION) for chunk in part.tool_call_chunks]
    expect(chunks, "no streamed call")

    for method in ("json_schema", "function_calling"):
        found = longer.with_structured_output(Weather, method=method).invoke(QUESTION)
        expect(isinstance(found, Weather), f"{method}: {found}")

    responses = ChatOpenAI(model=model, use_responses_api=True, max_completion_tokens=12, **fields)
    expect(responses.invoke(QUESTION).text, "no text by Responses")
    expect(OpenAI(model=model, max_tokens=8, **fields).invoke("The capital of France is"), "none")
    agent = create_agent(longer, tools=[get_weather])
    expect(agent.invoke({"messages": [HumanMessage(QUESTION)]})["messages"][-1].content, "no agent")
    return (
        "text, stream, batch, a tool call and its result, streamed calls, structured output in "
        "two ways, Responses, completions, an agent"
    )


def pydantic_ai(url: str, model: str) -> str:
    """An agent with a typed result, a tool, and streams."""
    from pydantic import BaseModel, ConfigDict
    from pydantic_ai import Agent, ModelSettings, NativeOutput
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
    from pydantic_ai.providers.openai import OpenAIProvider

    class Weather(BaseModel):
        model_config = ConfigDict(extra="forbid")
        city: Literal["Oslo"]
        rains: bool

    provider = OpenAIProvider(base_url=f"{url}/v1", api_key="none")
    chat = OpenAIChatModel(model, provider=provider)
    settings = ModelSettings(temperature=0, max_tokens=64, seed=SEED)
    typed = Agent(chat, output_type=Weather, model_settings=settings)  # by a required call
    expect(isinstance(typed.run_sync(QUESTION).output, Weather), "no typed output")
    with_schema = Agent(chat, output_type=NativeOutput(Weather), model_settings=settings)
    expect(isinstance(with_schema.run_sync(QUESTION).output, Weather), "no output by a schema")

    for api in (chat, OpenAIResponsesModel(model, provider=provider)):
        plain = Agent(api, instructions="Answer briefly.", model_settings={"max_tokens": 12})

        @plain.tool_plain
        def get_weather(city: str) -> str:
            """The weather of a city."""
            return f"It rains in {city}."

        answer = plain.run_sync(QUESTION)
        expect(answer.output and answer.usage.output_tokens > 0, "no text or usage")

        async def stream(agent: Any = plain) -> list[str]:
            async with agent.run_stream(QUESTION) as result:
                return [text async for text in result.stream_text(delta=True)]

        expect(asyncio.run(stream()), "no streamed text")
    return (
        "typed output by a required call and by a schema, an agent with a tool by chat completions "
        "and by Responses, each also streamed"
    )


def litellm(url: str, model: str) -> str:
    """Chats, completions, responses and tools by the generic `openai` provider."""
    import litellm as library

    library.telemetry = False
    name = f"openai/{model}"
    where: dict[str, Any] = {"api_base": f"{url}/v1", "api_key": "none"}
    messages = [{"role": "user", "content": QUESTION}]
    common: dict[str, Any] = {"model": name, "messages": messages, "max_tokens": 48, **where}
    answer = library.completion(**common, temperature=0, seed=SEED)
    expect(answer.choices[0].message.content and answer.usage.completion_tokens, "no text, usage")
    stream = library.completion(
        **common, temperature=0, seed=SEED, stream=True, stream_options={"include_usage": True}
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    expect(text == answer.choices[0].message.content, "the stream differs")

    tool = {"type": "function", "function": {"name": "get_weather", "parameters": CITY}}
    calling = library.completion(**common, tools=[tool], tool_choice="required")
    message = calling.choices[0].message
    expect(json.loads(message.tool_calls[0].function.arguments) == {"city": "Oslo"}, "no call")
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "It rains."}
    conversation = [*messages, message.model_dump(), result]
    after = library.completion(**common | {"messages": conversation}, tools=[tool])
    expect(after.choices[0].finish_reason, "no answer to a result")
    parts = library.completion(**common, tools=[tool], tool_choice="required", stream=True)
    expect(any(part.choices[0].delta.tool_calls for part in parts), "no streamed call")

    completion = library.text_completion(
        model=f"text-completion-openai/{model}",
        prompt="The capital of France is",
        max_tokens=8,
        **where,
    )
    expect(completion.choices[0].text, "no completion")
    expect(library.responses(model=name, input=QUESTION, max_output_tokens=16, **where).output, "-")
    vllm = library.completion(**common | {"model": f"hosted_vllm/{model}"})
    expect(vllm.choices[0].message.content, "no text by the provider hosted_vllm")
    claude = {"model": f"anthropic/{model}", "api_base": url}
    expect(library.completion(**common | claude).choices[0].message.content, "no text by Messages")
    embedding = library.embedding(model=name, input=["Oslo"], encoding_format="float", **where)
    expect(embedding.data[0]["embedding"], "no embedding")
    return (
        "chats, streams, tool calls and a result, completions, Responses, embeddings; the "
        "providers openai, hosted_vllm and anthropic"
    )


CLIENTS: dict[str, Callable[[str, str], str]] = {
    "openai-agents": openai_agents,
    "langchain": langchain,
    "pydantic-ai": pydantic_ai,
    "litellm": litellm,
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("client", choices=CLIENTS)
    parser.add_argument("--url", required=True)
    parser.add_argument("--model", required=True)
    arguments = parser.parse_args()
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # no download of a price list
    print(json.dumps({"done": CLIENTS[arguments.client](arguments.url, arguments.model)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
