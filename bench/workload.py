"""What is asked of every target: scenarios of fixed lengths, cut from a text or taken from recorded conversations.

A scenario's requests depend on the data, the tokenizer, the seed, the round and the scenario's name only. Rounds repeat
the lengths with other text, so that a repetition is the same work and never an accidental prefix-cache hit; of recorded
conversations they take others, as long as there are any.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from random import Random

from llmkit.checkpoint.errors import InputError, UsageError

Lengths = list[tuple[int, int]]  # tokens of (prompt, output), one pair a conversation
Turns = list[tuple[Sequence[int], Sequence[int]]]  # token ids of (what is said, what was answered)


@dataclass(frozen=True)
class Data:
    """What prompts are made of: a text to cut them from, or else conversations, whose lengths are their own."""

    name: str
    tokens: Sequence[int] = ()
    conversations: Sequence[Turns] = ()


@dataclass(frozen=True)
class Scenario:
    """A shape of load. Prompt lengths include `common` tokens that all prompts of a round start with."""

    name: str
    clients: int  # conversations under way at most; a client begins its next when its last has ended
    lengths: Callable[[Random], Lengths]
    mix: str  # scenarios of one mix draw the same lengths
    common: int = 0
    turns: int = 1  # requests of a conversation; each has those before it, `common` and their answers in its prompt
    arrivals: Callable[[Random, int], Sequence[float]] | None = None  # when so many are sent, in seconds, rising
    load: float = 0.0  # a level of a sweep: clients, or requests a second


@dataclass(frozen=True)
class WorkloadRequest:
    """One request: `prompt` token ids, to be continued by exactly `max_tokens` tokens."""

    id: str
    prompt: tuple[int, ...]
    max_tokens: int
    at_s: float | None = None  # when it is sent, after the start; None: as soon as a client is free
    follows: bool = False  # the same client sends it when the request before it in the list is answered

    @property
    def total_tokens(self) -> int:
        """What the request needs of a context."""
        return len(self.prompt) + self.max_tokens


@dataclass(frozen=True)
class Workload:
    """The requests of each scenario, by round, and the few that warm a target up."""

    seed: int
    scenarios: tuple[Scenario, ...]
    warmup: tuple[WorkloadRequest, ...]
    rounds: tuple[dict[str, tuple[WorkloadRequest, ...]], ...]

    @property
    def sha256(self) -> str:
        """Of everything that decides the work: token ids, lengths, order and clients. Warm-up is not measured."""
        content = [
            [
                scenario.name,
                scenario.clients,
                [[r.id, r.prompt, r.max_tokens, r.at_s, r.follows] for r in requests[scenario.name]],
            ]
            for requests in self.rounds
            for scenario in self.scenarios
        ]
        return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()

    def describe(self) -> list[dict[str, int | float | str]]:
        """Name, requests, clients, level of load and tokens of each scenario, of one round."""
        return [self._described(scenario, self.rounds[0][scenario.name]) for scenario in self.scenarios]

    def _described(self, scenario: Scenario, requests: Sequence[WorkloadRequest]) -> dict[str, int | float | str]:
        found: dict[str, int | float | str] = {
            "name": scenario.name,
            "requests": len(requests),
            "clients": scenario.clients,
            "prompt_tokens": sum(len(request.prompt) for request in requests),
            "output_tokens": sum(request.max_tokens for request in requests),
        }
        if scenario.load:
            found["load"] = scenario.load
        times = [request.at_s for request in requests if request.at_s is not None]
        span_s = max(times) - min(times) if times else 0.0
        return found | ({"arrivals_per_s": (len(times) - 1) / span_s} if span_s else {})


def _uniform(count: int, prompt: tuple[int, int], output: tuple[int, int]) -> Callable[[Random], Lengths]:
    """`count` lengths, uniform between the two bounds, both included. The first n do not depend on `count`."""
    return lambda random: [(random.randint(*prompt), random.randint(*output)) for _ in range(count)]


SCENARIOS: dict[str, Scenario] = {
    scenario.name: scenario
    for scenario in (
        Scenario("single", 1, _uniform(4, (128, 128), (128, 128)), "single"),
        Scenario("batch", 32, _uniform(32, (64, 512), (32, 256)), "mixed"),
        Scenario("online", 16, _uniform(64, (64, 512), (32, 256)), "mixed"),
        Scenario("prefix", 16, _uniform(32, (544, 544), (32, 32)), "prefix", common=512),
        Scenario("quick", 4, _uniform(8, (64, 128), (32, 32)), "quick"),
    )
}
WARMUP = Scenario("warmup", 4, _uniform(4, (64, 64), (16, 16)), "warmup")


def builtin_text() -> str:
    """The text prompts are cut from: `pydoc_data.topics`, English and code, in every CPython."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def chains(requests: Sequence[WorkloadRequest]) -> list[list[WorkloadRequest]]:
    """The requests by conversation, in their order."""
    found: list[list[WorkloadRequest]] = []
    for request in requests:
        if request.follows:
            found[-1].append(request)
        else:
            found.append([request])
    return found


def choose(scenarios: Sequence[str], rounds: int, limit: int | None) -> tuple[Scenario, ...]:
    """The scenarios by name, each once. Raises UsageError for an unknown one, and when there would be no request."""
    unknown = [name for name in scenarios if name not in SCENARIOS]
    if unknown or not scenarios:
        raise UsageError(f"no such scenario: {', '.join(unknown) or '(none)'}", f"Scenarios are {', '.join(SCENARIOS)}")
    if rounds < 1:
        raise UsageError(f"{rounds} rounds measure nothing", "1 or more were expected")
    if limit is not None and limit < 1:
        raise UsageError(f"a limit of {limit} requests leaves nothing", "1 or more was expected")
    return tuple(SCENARIOS[name] for name in dict.fromkeys(scenarios))


def build_workload(
    data: Data, scenarios: Sequence[Scenario], rounds: int = 1, seed: int = 0, limit: int | None = None
) -> Workload:
    """Make the requests of `scenarios` from the data.

    limit: only the first so many conversations of each scenario. Raises InputError when there is too little text.
    """
    return Workload(
        seed,
        tuple(scenarios),
        _requests(WARMUP, Data(data.name, data.tokens), seed, 0, None),
        tuple(
            {scenario.name: _requests(scenario, data, seed, number, limit) for scenario in scenarios}
            for number in range(rounds)
        ),
    )


def require_context(workload: Workload, context_tokens: int, target: str) -> None:
    """Raises InputError when a request does not fit a context of so many tokens."""
    for scenario in workload.scenarios:
        longest = max(request.total_tokens for requests in workload.rounds for request in requests[scenario.name])
        if longest > context_tokens:
            fitting = [name for name, other in SCENARIOS.items() if _longest(other, workload.seed) <= context_tokens]
            raise InputError(
                f"scenario {scenario.name} needs a context of {longest} tokens and {target} has {context_tokens}",
                "Prompts are never shortened",
                f"Scenarios that fit: {', '.join(fitting) or 'none'}",
            )


def _lengths(scenario: Scenario, seed: int) -> Lengths:
    return scenario.lengths(Random(f"{seed}/{scenario.mix}/lengths"))  # noqa: S311


def _longest(scenario: Scenario, seed: int) -> int:
    return max(sum(pair) for pair in _lengths(scenario, seed))


def _requests(scenario: Scenario, data: Data, seed: int, number: int, limit: int | None) -> tuple[WorkloadRequest, ...]:
    random = Random(f"{seed}/{scenario.name}/{number}")  # noqa: S311
    lengths = _lengths(scenario, seed)[:limit]
    arrivals = Random(f"{seed}/{scenario.mix}/arrivals")  # noqa: S311
    times = scenario.arrivals(arrivals, len(lengths)) if scenario.arrivals else None
    order = Random(f"{seed}/{scenario.name}/0").sample(range(len(data.conversations)), len(data.conversations))  # noqa: S311
    head = () if order else _cut(data.tokens, random, scenario.common)

    def talk(index: int) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
        prompt, output = lengths[index]
        for turn in range(scenario.turns):
            said = _cut(data.tokens, random, prompt - scenario.common)
            last = turn + 1 == scenario.turns
            yield said, range(output) if last else _cut(data.tokens, random, output)

    requests = []
    for index in range(len(lengths)):
        prompt = head
        turns = data.conversations[order[(number * len(lengths) + index) % len(order)]] if order else talk(index)
        for turn, (said, answered) in enumerate(islice(turns, scenario.turns)):
            name = f"{scenario.name}-{number}-{index}" + (f"-{turn}" if scenario.turns > 1 else "")
            prompt += tuple(said)
            at_s = times[index] if times and turn == 0 else None
            requests.append(WorkloadRequest(name, prompt, len(answered), at_s, follows=turn > 0))
            prompt += tuple(answered)
    return tuple(requests)


def _cut(tokens: Sequence[int], random: Random, length: int) -> tuple[int, ...]:
    if length >= len(tokens):
        raise InputError(
            f"the workload's text is {len(tokens)} tokens long",
            f"More than {length} are needed",
            "Check the model's tokenizer",
        )
    start = random.randrange(len(tokens) - length)
    return tuple(tokens[start : start + length])
