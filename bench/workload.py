"""Workloads: the requests of every scenario, made from a text or from recorded conversations.

The requests depend only on the data, the tokenizer, the seed, the round and the scenario's name.
Every round repeats the same lengths with other text: the work is the same, and a prefix cache finds
nothing by accident. Rounds of recorded conversations use different ones while there are any left.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from random import Random

from llmkit.common.errors import InputError, UsageError

# Numbers of (prompt, output) tokens, one pair for each conversation.
Lengths = list[tuple[int, int]]
# Token ids of (user message, answer).
Turn = tuple[Sequence[int], Sequence[int]]
Conversation = list[Turn]


@dataclass(frozen=True)
class PromptDataset:
    """The source of prompts: a text to sample from, or recorded conversations."""

    name: str
    tokens: Sequence[int] = ()  # of the text
    conversations: Sequence[Conversation] = ()


@dataclass(frozen=True)
class Scenario:
    """The number, lengths, concurrency and arrival times of a scenario's requests."""

    name: str
    # Conversations in flight at once. The next one begins when one of them has ended.
    max_concurrency: int
    draw_lengths: Callable[[Random], Lengths]
    length_group: str  # scenarios of one group draw the same lengths
    # Tokens that all prompts of a round begin with; the prompt lengths include them.
    prefix_tokens: int = 0
    # Requests of a conversation. Each prompt holds the earlier turns with their answers.
    turns: int = 1
    # Draws the sending times of a number of conversations, in seconds and in order. None: no
    # schedule.
    draw_arrivals: Callable[[Random, int], Sequence[float]] | None = None
    load_level: float = 0.0  # of a sweep: concurrency, or requests per second


@dataclass(frozen=True)
class WorkloadRequest:
    """One request: a prompt of token ids and the exact number of tokens to generate."""

    id: str
    prompt: tuple[int, ...]
    max_tokens: int
    send_at_s: float | None = None  # after the start; None: as soon as a client is free
    # A later turn: sent by the same client after the answer to the request before it in the list.
    is_follow_up: bool = False

    @property
    def total_tokens(self) -> int:
        """Prompt and output tokens."""
        return len(self.prompt) + self.max_tokens


@dataclass(frozen=True)
class Workload:
    """The requests of each scenario, by round, and the warm-up requests."""

    seed: int
    scenarios: tuple[Scenario, ...]
    warmup: tuple[WorkloadRequest, ...]
    rounds: tuple[dict[str, tuple[WorkloadRequest, ...]], ...]  # by scenario name

    @property
    def num_rounds(self) -> int:
        """How often each scenario runs."""
        return len(self.rounds)

    @property
    def sha256(self) -> str:
        """Hash of the token ids, lengths, order, arrival times and concurrency, without warm-up."""
        content = []
        for requests in self.rounds:
            for scenario in self.scenarios:
                entries = [
                    [r.id, r.prompt, r.max_tokens, r.send_at_s, r.is_follow_up]
                    for r in requests[scenario.name]
                ]
                content.append([scenario.name, scenario.max_concurrency, entries])
        return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()

    def describe(self) -> list[dict[str, int | float | str]]:
        """The report's entry for each scenario: requests, clients, tokens and load of one round."""
        return [
            _describe_scenario(scenario, self.rounds[0][scenario.name])
            for scenario in self.scenarios
        ]


def _describe_scenario(
    scenario: Scenario, requests: Sequence[WorkloadRequest]
) -> dict[str, int | float | str]:
    entry: dict[str, int | float | str] = {
        "name": scenario.name,
        "requests": len(requests),
        "clients": scenario.max_concurrency,
        "prompt_tokens": sum(len(request.prompt) for request in requests),
        "output_tokens": sum(request.max_tokens for request in requests),
    }
    if scenario.load_level:
        entry["load"] = scenario.load_level
    times = [request.send_at_s for request in requests if request.send_at_s is not None]
    span_s = max(times) - min(times) if times else 0.0
    if span_s:
        entry["arrivals_per_s"] = (len(times) - 1) / span_s
    return entry


def _uniform_lengths(
    count: int, prompt: tuple[int, int], output: tuple[int, int]
) -> Callable[[Random], Lengths]:
    """Draws `count` lengths, uniform between two inclusive bounds.

    The first n lengths do not depend on `count`.
    """
    return lambda random: [(random.randint(*prompt), random.randint(*output)) for _ in range(count)]


SCENARIOS: dict[str, Scenario] = {
    scenario.name: scenario
    for scenario in (
        Scenario("single", 1, _uniform_lengths(4, (128, 128), (128, 128)), "single"),
        Scenario("batch", 32, _uniform_lengths(32, (64, 512), (32, 256)), "mixed"),
        Scenario("online", 16, _uniform_lengths(64, (64, 512), (32, 256)), "mixed"),
        Scenario(
            "prefix", 16, _uniform_lengths(32, (544, 544), (32, 32)), "prefix", prefix_tokens=512
        ),
        Scenario("quick", 4, _uniform_lengths(8, (64, 128), (32, 32)), "quick"),
    )
}
WARMUP = Scenario("warmup", 4, _uniform_lengths(4, (64, 64), (16, 16)), "warmup")


def builtin_prompt_text() -> str:
    """The text prompts are sampled from: `pydoc_data.topics`, which every CPython has."""
    # The module is one text of 700 kB, which most commands do not need.
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def group_conversations(requests: Sequence[WorkloadRequest]) -> list[list[WorkloadRequest]]:
    """The requests grouped by conversation, in their order."""
    conversations: list[list[WorkloadRequest]] = []
    for request in requests:
        if request.is_follow_up:
            conversations[-1].append(request)
        else:
            conversations.append([request])
    return conversations


def select_scenarios(names: Sequence[str], rounds: int, limit: int | None) -> tuple[Scenario, ...]:
    """The scenarios with these names, each once.

    Raises UsageError for an unknown name, and when no request would be left.
    """
    unknown = [name for name in names if name not in SCENARIOS]
    if unknown or not names:
        raise UsageError(
            f"no such scenario: {', '.join(unknown) or '(none)'}",
            f"Scenarios are {', '.join(SCENARIOS)}",
        )
    if rounds < 1:
        raise UsageError(f"{rounds} rounds measure nothing", "1 or more were expected")
    if limit is not None and limit < 1:
        raise UsageError(f"a limit of {limit} requests leaves nothing", "1 or more was expected")
    return tuple(SCENARIOS[name] for name in dict.fromkeys(names))


def build_workload(
    data: PromptDataset,
    scenarios: Sequence[Scenario],
    rounds: int = 1,
    seed: int = 0,
    limit: int | None = None,
) -> Workload:
    """Make the requests of `scenarios` from the data.

    limit: keep only the first conversations of each scenario, up to this number.
    Raises InputError when the text is too short.
    """
    warmup = _scenario_requests(WARMUP, PromptDataset(data.name, data.tokens), seed, 0, None)
    requests = [
        {
            scenario.name: _scenario_requests(scenario, data, seed, round_number, limit)
            for scenario in scenarios
        }
        for round_number in range(rounds)
    ]
    return Workload(seed, tuple(scenarios), warmup, tuple(requests))


def check_context_length(workload: Workload, context_tokens: int, target: str) -> None:
    """Raises InputError when a request is longer than the context of the target."""
    for scenario in workload.scenarios if workload.rounds else ():
        longest = max(
            request.total_tokens
            for requests in workload.rounds
            for request in requests[scenario.name]
        )
        if longest > context_tokens:
            fitting = [
                name
                for name, other in SCENARIOS.items()
                if _longest_request(other, workload.seed) <= context_tokens
            ]
            raise InputError(
                f"scenario {scenario.name} needs a context of {longest} tokens"
                f" and {target} has {context_tokens}",
                "Prompts are never shortened",
                f"Scenarios that fit: {', '.join(fitting) or 'none'}",
            )


def _seeded_lengths(scenario: Scenario, seed: int) -> Lengths:
    return scenario.draw_lengths(Random(f"{seed}/{scenario.length_group}/lengths"))  # noqa: S311


def _longest_request(scenario: Scenario, seed: int) -> int:
    return max(prompt + output for prompt, output in _seeded_lengths(scenario, seed))


def _scenario_requests(
    scenario: Scenario, data: PromptDataset, seed: int, round_number: int, limit: int | None
) -> tuple[WorkloadRequest, ...]:
    """The requests of one scenario in one round."""
    random = Random(f"{seed}/{scenario.name}/{round_number}")  # noqa: S311
    lengths = _seeded_lengths(scenario, seed)[:limit]
    send_times: Sequence[float] = ()
    if scenario.draw_arrivals:
        arrival_random = Random(f"{seed}/{scenario.length_group}/arrivals")  # noqa: S311
        send_times = scenario.draw_arrivals(arrival_random, len(lengths))
    # The order of recorded conversations is the same in every round, so that none comes twice.
    order_random = Random(f"{seed}/{scenario.name}/0")  # noqa: S311
    order = order_random.sample(range(len(data.conversations)), len(data.conversations))
    prefix: tuple[int, ...] = ()
    if not order:
        prefix = _sample_span(data.tokens, random, scenario.prefix_tokens)

    def synthetic_turns(index: int) -> Iterator[Turn]:
        prompt_tokens, output_tokens = lengths[index]
        for turn in range(scenario.turns):
            message = _sample_span(data.tokens, random, prompt_tokens - scenario.prefix_tokens)
            if turn + 1 == scenario.turns:
                # No prompt holds the last answer: only its length is used.
                yield message, range(output_tokens)
            else:
                yield message, _sample_span(data.tokens, random, output_tokens)

    requests = []
    for index in range(len(lengths)):
        turns: Iterator[Turn] | Conversation
        if order:
            position = round_number * len(lengths) + index
            turns = data.conversations[order[position % len(order)]]
        else:
            turns = synthetic_turns(index)
        prompt = prefix
        for turn, (message, answer) in enumerate(islice(turns, scenario.turns)):
            request_id = f"{scenario.name}-{round_number}-{index}"
            if scenario.turns > 1:
                request_id += f"-{turn}"
            prompt += tuple(message)
            send_at_s = send_times[index] if send_times and turn == 0 else None
            requests.append(
                WorkloadRequest(request_id, prompt, len(answer), send_at_s, is_follow_up=turn > 0)
            )
            prompt += tuple(answer)
    return tuple(requests)


def _sample_span(tokens: Sequence[int], random: Random, length: int) -> tuple[int, ...]:
    """A random span of `length` tokens. Raises InputError when the text is too short."""
    if length >= len(tokens):
        raise InputError(
            f"the workload's text is {len(tokens)} tokens long",
            f"More than {length} are needed",
            "Check the model's tokenizer",
        )
    start = random.randrange(len(tokens) - length)
    return tuple(tokens[start : start + length])
