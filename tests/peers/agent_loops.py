"""An agent of several turns through one client library: think, call, think, call, think, answer.

    python tests/peers/agent_loops.py CLIENT --url URL --model NAME --prompt TEXT --results A B

Runs in the environment of the library, against a scripted model (tests/support/thinking_model.py):
the prompt makes it call the first tool, whose result A makes it call the second, whose result B
makes it answer. The last line of the output is JSON: `done` says what was done.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from typing import Any

ANSWER = "Sunny, and 2."
TURNS = ["reasoning", "call", "result", "reasoning", "call", "result", "reasoning", "text"]


def expect(holds: object, what: str) -> None:
    """Fail with `what` unless it holds."""
    assert holds, what


def openai_agents(url: str, model: str, prompt: str, results: list[str]) -> str:
    """By Responses and by chat completions, streamed and not."""
    import agents
    import openai

    agents.set_tracing_disabled(True)
    kinds = {
        "reasoning_item": "reasoning",
        "tool_call_item": "call",
        "tool_call_output_item": "result",
        "message_output_item": "text",
    }

    @agents.function_tool
    def get_weather(city: str) -> str:
        """The weather of a city."""
        return results[0]

    @agents.function_tool
    def add(a: int) -> str:
        """Add one."""
        return results[1]

    async def run(api: Any, stream: bool) -> Any:
        settings = agents.ModelSettings(temperature=0, max_tokens=200)
        agent = agents.Agent("Agent", tools=[get_weather, add], model=api, model_settings=settings)
        if not stream:
            return await agents.Runner.run(agent, prompt)
        streamed = agents.Runner.run_streamed(agent, prompt)
        async for _ in streamed.stream_events():
            pass
        return streamed

    for kind in (agents.OpenAIResponsesModel, agents.OpenAIChatCompletionsModel):
        for stream in (False, True):
            api = kind(model, openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none"))
            done = asyncio.run(run(api, stream))
            turns = [kinds[item.type] for item in done.new_items]
            expect(done.final_output == ANSWER, f"{kind.__name__}: {done.final_output}")
            expect(turns == TURNS, f"{kind.__name__}, stream={stream}: {turns}")
    return "an agent of three turns with thoughts and two tools, in both, streamed and not"


def pydantic_ai(url: str, model: str, prompt: str, results: list[str]) -> str:
    """By chat completions and by Responses."""
    from pydantic_ai import Agent, ModelSettings
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
    from pydantic_ai.providers.openai import OpenAIProvider

    kinds = {
        "ThinkingPart": "reasoning",
        "ToolCallPart": "call",
        "ToolReturnPart": "result",
        "TextPart": "text",
    }

    def get_weather(city: str) -> str:
        """The weather of a city."""
        return results[0]

    def add(a: int) -> str:
        """Add one."""
        return results[1]

    provider = OpenAIProvider(base_url=f"{url}/v1", api_key="none")
    for kind in (OpenAIChatModel, OpenAIResponsesModel):
        settings = ModelSettings(temperature=0, max_tokens=200)
        agent = Agent(
            kind(model, provider=provider), model_settings=settings, tools=[get_weather, add]
        )
        done = agent.run_sync(prompt)
        parts = [type(part).__name__ for message in done.all_messages() for part in message.parts]
        turns = [kinds[part] for part in parts if part in kinds]
        expect(done.output == ANSWER, f"{kind.__name__}: {done.output}")
        expect(turns == TURNS, f"{kind.__name__}: {turns}")
    return "an agent of three turns with thoughts and two tools, in both"


LOOPS = {"openai-agents": openai_agents, "pydantic-ai": pydantic_ai}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("client", choices=sorted(LOOPS))
    parser.add_argument("--url", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--results", nargs=2, required=True)
    arguments = parser.parse_args()
    os.environ.setdefault("OPENAI_API_KEY", "none")
    loop = LOOPS[arguments.client]
    done = loop(arguments.url, arguments.model, arguments.prompt, arguments.results)
    print(json.dumps({"done": done}))


if __name__ == "__main__":
    main()
