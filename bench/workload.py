"""What is asked of every target: scenarios of fixed lengths over CPython's own documentation text.

A scenario's requests depend on the tokenizer, the seed, the round and the scenario's name only. Rounds repeat the
lengths with other text, so that a repetition is the same work and never an accidental prefix-cache hit.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from llmkit.checkpoint.errors import InputError, UsageError

Lengths = list[tuple[int, int]]  # tokens of (prompt, output), one pair a request


@dataclass(frozen=True)
class Scenario:
    """A shape of load. Prompt lengths include `common` tokens that all prompts of a round start with."""

    name: str
    clients: int  # requests in flight at most; a client sends its next request when its last is answered
    lengths: Callable[[Random], Lengths]
    mix: str  # scenarios of one mix draw the same lengths
    common: int = 0


@dataclass(frozen=True)
class WorkloadRequest:
    """One request: `prompt` token ids, to be continued by exactly `max_tokens` tokens."""

    id: str
    prompt: tuple[int, ...]
    max_tokens: int

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
            [scenario.name, scenario.clients, [[r.id, r.prompt, r.max_tokens] for r in requests[scenario.name]]]
            for requests in self.rounds
            for scenario in self.scenarios
        ]
        return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()

    def describe(self) -> list[dict[str, int | str]]:
        """Name, requests, clients and tokens of each scenario, of one round."""
        return [
            {
                "name": scenario.name,
                "requests": len(requests),
                "clients": scenario.clients,
                "prompt_tokens": sum(len(request.prompt) for request in requests),
                "output_tokens": sum(request.max_tokens for request in requests),
            }
            for scenario in self.scenarios
            for requests in (self.rounds[0][scenario.name],)
        ]


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
    tokens: Sequence[int], scenarios: Sequence[str], rounds: int = 1, seed: int = 0, limit: int | None = None
) -> Workload:
    """Cut the requests of `scenarios` from the text's `tokens`.

    limit: only the first so many requests of each scenario. Raises as `choose` does, and InputError when the text is
    too short.
    """
    chosen = choose(scenarios, rounds, limit)
    return Workload(
        seed,
        chosen,
        _requests(WARMUP, tokens, seed, 0, None),
        tuple(
            {scenario.name: _requests(scenario, tokens, seed, number, limit) for scenario in chosen}
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


def _requests(
    scenario: Scenario, tokens: Sequence[int], seed: int, number: int, limit: int | None
) -> tuple[WorkloadRequest, ...]:
    random = Random(f"{seed}/{scenario.name}/{number}")  # noqa: S311

    def cut(length: int) -> tuple[int, ...]:
        if length >= len(tokens):
            raise InputError(
                f"the workload's text is {len(tokens)} tokens long",
                f"More than {length} are needed",
                "Check the model's tokenizer",
            )
        start = random.randrange(len(tokens) - length)
        return tuple(tokens[start : start + length])

    head = cut(scenario.common)
    return tuple(
        WorkloadRequest(f"{scenario.name}-{number}-{index}", head + cut(prompt - scenario.common), output)
        for index, (prompt, output) in enumerate(_lengths(scenario, seed)[:limit])
    )
