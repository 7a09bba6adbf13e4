"""N-gram lookup and suffix decoding side by side: how many draft tokens a model accepts.

    python tests/peers/bench_drafting.py [--model DIR | --work DIR] [--tokens 4 8 16]

The requests are an agent's: tool results in JSON that the model writes again with one field
changed, and one question about one thing after the other. Answers are greedy and equal in all
runs. Counts only; how long a step takes depends on the machine.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import replace
from pathlib import Path

from common import real_model, table
from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.checkpoint.tokenizer import load_tokenizer
from llmkit.runtime.engine.engine_options import EngineOptions
from llmkit.runtime.engine.sampling_params import SamplingParams
from llmkit.runtime.engine_loader import load_engine

METHODS = ("ngram", "suffix")
CONCURRENT = 4  # requests that run at the same time
CITIES = ("Paris", "Oslo", "Lima", "Cairo", "Quito", "Hanoi", "Accra", "Dhaka")
STATES = ("open", "in progress", "waiting for parts", "closed")


def order(chosen: random.Random) -> dict[str, object]:
    """A tool's result: an order of a workshop."""
    return {
        "order_id": chosen.randrange(10_000, 99_999),
        "customer": {"name": chosen.choice(("A. Berg", "J. Silva", "M. Sato")), "vip": False},
        "city": chosen.choice(CITIES),
        "status": chosen.choice(STATES),
        "items": [
            {
                "sku": f"PART-{chosen.randrange(100, 999)}",
                "quantity": chosen.randrange(1, 9),
                "unit_price_eur": chosen.randrange(10, 400),
                "in_stock": chosen.random() < 0.5,
            }
            for _ in range(2)
        ],
    }


def conversations() -> dict[str, list[list[dict[str, str]]]]:
    """The messages of each request, by the kind of work."""
    chosen = random.Random(7)
    edits = []
    for number in range(8):
        result = json.dumps(order(chosen), indent=1)
        status = STATES[number % len(STATES)]
        edits.append(
            f"The tool get_order returned:\n```json\n{result}\n```\n"
            f'Write the same JSON again, with "status" set to "{status}" and nothing else changed.'
        )
    example = {"name": "get_weather", "arguments": {"city": "Rome", "unit": "celsius", "days": 3}}
    calls = [
        "Answer only with a call of the tool get_weather, as JSON like this:\n"
        f"{json.dumps(example, indent=1)}\nWhat will the weather be in {city}?"
        for city in CITIES
    ]
    return {
        "JSON written again with one change": [[{"role": "user", "content": t}] for t in edits],
        "the same question about 8 cities": [[{"role": "user", "content": text}] for text in calls],
    }


def prompts(checkpoint: Checkpoint) -> dict[str, list[list[int]]]:
    """The token ids of each request, by the kind of work."""
    tokenizer = load_tokenizer(checkpoint)
    return {
        kind: [
            tokenizer.encode(tokenizer.render_chat(messages), add_special_tokens=False)
            for messages in requests
        ]
        for kind, requests in conversations().items()
    }


def main() -> None:
    """Run every kind of work with every method, and print a table of counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--work", type=Path, default=Path(".bench-drafting"))
    parser.add_argument("--tokens", type=int, nargs="+", default=[4, 8, 16])
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    checkpoint = open_checkpoint(arguments.model or real_model(arguments.work))
    options = EngineOptions(device="cpu", max_model_len=2048, max_num_seqs=CONCURRENT)
    sampling = SamplingParams(temperature=0.0, max_tokens=320)
    requests = prompts(checkpoint)
    plain = load_engine(checkpoint, options)
    expected = {kind: plain.generate(ids, sampling) for kind, ids in requests.items()}
    rows = []
    for num_tokens in arguments.tokens:
        for method in METHODS:
            drafting = replace(options, speculate=f"{method}:{num_tokens}")
            for kind, ids in requests.items():
                engine = load_engine(checkpoint, drafting)
                assert engine.generate(ids, sampling) == expected[kind]
                stats = engine.stats()
                # A request's first token comes from the step that computes the end of its prompt.
                generated = stats.generation_tokens_total - len(ids)
                steps = generated - stats.accepted_total
                rows.append(
                    [
                        kind,
                        f"{num_tokens}",
                        method,
                        f"{stats.drafted_total:,}",
                        f"{stats.accepted_total:,}",
                        f"{stats.accepted_total / max(1, stats.drafted_total):.0%}",
                        f"{generated / steps:.2f}",
                    ]
                )
    head = ["requests", "`--speculate`", "method", "drafted", "accepted", "rate", "tokens a step"]
    print(table(head, sorted(rows, key=lambda row: -list(requests).index(row[0]), reverse=True)))


if __name__ == "__main__":
    main()
