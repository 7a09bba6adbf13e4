"""The project's exceptions. Each carries its exit code and a sentence a user can act on."""

from __future__ import annotations

import errno


class LlmkitError(Exception):
    """An error with an exit code, told as what happened, what was expected and what to do.

    `what` names the thing and its value; `expected` and `todo` are whole sentences without the final
    full stop. `str()` joins them into the one line that is printed.
    """

    exit_code = 70

    def __init__(self, what: str, expected: str = "", todo: str = "") -> None:
        self.what, self.expected, self.todo = what, expected, todo
        super().__init__(". ".join(part.rstrip(".") for part in (what, expected, todo) if part) + ".")


class GateError(LlmkitError):
    """A measured figure is worse than the user allowed."""

    exit_code = 1


class UsageError(LlmkitError):
    """The command line, a configuration file or an environment variable is wrong."""

    exit_code = 2


class InputError(LlmkitError):
    """A file, a checkpoint or a value in one is bad."""

    exit_code = 3


class ShortageError(LlmkitError):
    """The environment lacks something: a device, memory, disk, a port, a network, a permission."""

    exit_code = 4


class OutputError(LlmkitError):
    """The output is in the way: it exists, is the source, or another run holds it."""

    exit_code = 5


class ChatTemplateError(ValueError):
    """A chat template is missing or malformed, or it refused these messages."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out, of a device or of the host.

    By name and text: torch must not be imported only to ask whether an error is its own.
    """
    text = str(error)
    return (
        isinstance(error, MemoryError)
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and any(sign in text for sign in _OUT_OF_MEMORY))
    )


_OUT_OF_MEMORY = ("DefaultCPUAllocator: can't allocate memory", "out of memory", "STATUS_ALLOC_FAILED")
