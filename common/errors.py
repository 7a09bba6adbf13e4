"""The project's exceptions. Each has an exit code and a message that says what to do."""

from __future__ import annotations

import errno


class LlmkitError(Exception):
    """An error with an exit code. Its message says what happened, what was expected, what to do.

    `what` names the thing and its value. `expected` and `todo` are sentences without the final full
    stop. `str()` joins all three into the line that is printed.
    """

    exit_code = 70

    def __init__(self, what: str, expected: str = "", todo: str = "") -> None:
        self.what = what
        self.expected = expected
        self.todo = todo
        super().__init__(
            ". ".join(part.rstrip(".") for part in (what, expected, todo) if part) + "."
        )


class GateError(LlmkitError):
    """A measured value is worse than the limit that the user set."""

    exit_code = 1


class UsageError(LlmkitError):
    """The command line, a configuration file or an environment variable is wrong."""

    exit_code = 2


class InputError(LlmkitError):
    """A file, a checkpoint or a value in it is invalid."""

    exit_code = 3


class ShortageError(LlmkitError):
    """The environment lacks something: a device, memory, disk, a port, a network, a permission."""

    exit_code = 4


class OutputError(LlmkitError):
    """The output cannot be used: it exists, is the source, or another run writes it."""

    exit_code = 5


class ChatTemplateError(ValueError):
    """A chat template is missing or malformed, or it refused these messages."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host ran out of memory.

    The type is compared by name, because torch should not be imported for this check.
    """
    text = str(error)
    return (
        isinstance(error, MemoryError)
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and any(part in text for part in _OUT_OF_MEMORY_TEXTS))
    )


_OUT_OF_MEMORY_TEXTS = (
    "DefaultCPUAllocator: can't allocate memory",
    "out of memory",
    "STATUS_ALLOC_FAILED",
)
