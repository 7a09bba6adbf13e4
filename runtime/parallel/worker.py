"""The process of every rank except the first: `python -m llmkit.runtime.parallel.worker --fd N`.

Only the first rank starts it. It loads its part of the model and then runs the same engine steps as
the first rank, until the first rank ends. It ignores SIGINT and SIGTERM: the first rank handles
them.
"""

from __future__ import annotations

import sys

from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.runtime.engine.engine import Engine
from llmkit.runtime.parallel.rank_engine import load_rank
from llmkit.runtime.parallel.rank_messages import (
    Connect,
    LoadPart,
    RunStep,
    Sleep,
    ToRank,
    WakeUp,
    to_rank_decoder,
)
from llmkit.runtime.part_loader import StartupReport
from llmkit.runtime.process_channel import Channel, Failed, parent_socket
from llmkit.shard.rank_part import rank_parts


def run_worker(channel: Channel[ToRank]) -> None:
    """Load, connect to the other ranks, and run steps.

    Raises EOFError or OSError when the first rank has ended.
    """
    (load,) = channel.receive(wait=True)
    assert isinstance(load, LoadPart)
    options = load.options
    report = StartupReport()
    checkpoint = open_checkpoint(load.model, warn_of_edits=False)
    parts = rank_parts(checkpoint, options.tp, options.pp, options.ep)
    rank = load_rank(parts, load.rank, options, report, load.num_threads)
    channel.send(rank.message)
    sizes, *steps = channel.receive(wait=True)
    assert isinstance(sizes, Connect)
    rank.connect(sizes)
    engine = rank.make_engine(sizes, report, Engine)
    while True:
        for step in steps:
            match step:
                case RunStep():
                    _run_step(engine, step)
                case Sleep():
                    engine.sleep()
                case WakeUp():
                    engine.wake_up()
        steps = channel.receive(wait=True)


def _run_step(engine: Engine, step: RunStep) -> None:
    for event in step.events:
        if isinstance(event, str):
            engine.cancel(event)
        else:
            engine.add(event)
    engine.step()


def main() -> int:
    """Run the process. A failure is sent to the first rank and sets the exit code."""
    channel: Channel[ToRank] = Channel(parent_socket(), to_rank_decoder)
    try:
        run_worker(channel)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return 0
    except Exception as error:
        failed = Failed.of(error)
        channel.send(failed)
        return failed.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
