"""What an operator can ask of the engine processes; `EngineChanges` does it."""

from __future__ import annotations

from typing import Literal, Protocol

SleepLevel = Literal[1, 2]
# vLLM's levels of sleep.
KEEP_WEIGHTS: SleepLevel = 1
DROP_WEIGHTS: SleepLevel = 2


class EngineControl(Protocol):
    """Changes of the engine processes, one after the other. All raise ApiError."""

    async def sleep(self, mode: str, level: SleepLevel) -> SleepLevel:
        """Free memory; return the level that was reached. mode: "abort" or "wait"."""
        ...

    async def wake_up(self) -> None:
        """Take requests again."""
        ...

    async def reload(self, root: str) -> list[str]:
        """Serve the weights of a directory; return what else has changed."""
        ...

    def close(self) -> None:
        """Stop what still runs, at the end of the server."""
        ...
