"""How every failure ends: one line on stderr and an exit code."""

from __future__ import annotations

import errno
import sys
import traceback
from typing import Any

from llmkit.checkpoint.errors import InputError, LlmkitError, UsageError, is_out_of_memory
from llmkit.checkpoint.text import nearest
from llmkit.cli.settings import Defaults

BUG, INTERRUPTED, TERMINATED = 70, 130, 143
SHORTAGE = 4
SHORT_OF = {  # what the operating system refuses that is the environment's fault and not ours
    errno.ENOSPC: "no space left on the disk",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EMFILE: "too many open files",
    errno.ENOMEM: "out of memory",
}

WRONG_PATH = (errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP)


class Stopped(BaseException):
    """SIGINT or SIGTERM arrived; `code` is the exit code. No `except Exception` may swallow it."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def report(error: BaseException, command: str, debug: bool, resume: str = "") -> int:
    """Prints the one line for an error of a command and returns the exit code.

    command: "quantize", or "" for llmkit itself. resume: the command that takes up the work again.
    """
    if debug:
        traceback.print_exception(error, file=sys.stderr)
    message, code = _explain(error, debug)
    if isinstance(error, (Stopped, KeyboardInterrupt)) and resume:
        message += f" To resume: {resume}"
    program = f"llmkit {command}".rstrip()
    line = " ".join(message.split())
    sys.stderr.write(f"{program}: error: {line}\n")
    return code


def _explain(error: BaseException, debug: bool) -> tuple[str, int]:
    if isinstance(error, LlmkitError):
        return str(error), error.exit_code
    if isinstance(error, Stopped):
        return "stopped.", error.code
    if isinstance(error, KeyboardInterrupt):
        return "stopped.", INTERRUPTED
    if isinstance(error, OSError) and error.errno in SHORT_OF:
        where = f" ({error.filename})" if error.filename else ""
        return f"{SHORT_OF[error.errno]}{where}.", SHORTAGE
    if isinstance(error, OSError) and error.errno in WRONG_PATH and error.filename:
        return f"{error.filename}: {error.strerror}. Another path was expected.", InputError.exit_code
    if is_out_of_memory(error):
        return f"out of memory ({str(error).splitlines()[0] if str(error) else type(error).__name__}).", SHORTAGE
    hint = "" if debug else " Run it again with --debug for the traceback."
    return f"{type(error).__name__}: {error}. This is a bug in llmkit.{hint}", BUG


def usage_error(error: Any, arguments: list[str], defaults: Defaults) -> UsageError:
    """The command-line parser's complaint in our words, with the nearest option.

    The parser's exceptions are known by their attributes: which library raises them is Typer's affair.
    """
    context = getattr(error, "ctx", None)
    if hasattr(error, "option_name") and hasattr(error, "possibilities"):
        known = [spelling for p in (context.command.params if context else []) for spelling in _spellings(p)]
        return UsageError(f"no such option: {error.option_name}", nearest(error.option_name, known, "Options are"))
    message = str(error.format_message()).rstrip(".").replace("Value error, ", "")
    message = message[:1].lower() + message[1:]
    parameter = getattr(error, "param", None)
    name = getattr(parameter, "name", "") or ""
    given = [_value(spelling, arguments) for spelling in _spellings(parameter)] if parameter else []
    value = next((one for one in given if one is not None), None)
    if value is None and (origin := defaults.origins.get(name)):
        message, value = f"{origin}: {message}", str(defaults.values[name])
    if value and "invalid value" in message and value not in message:
        message += f" ({value})"
    return UsageError(message, todo=f"`{context.command_path} --help` lists what it takes" if context else "")


def _value(spelling: str, arguments: list[str]) -> str | None:
    """What the command line gives an option, "" for nothing; None where it does not have it."""
    for word, after in zip(arguments, [*arguments[1:], ""], strict=True):
        option, equals, value = word.partition("=")
        if option == spelling:
            return value if equals else after
    return None


def _spellings(parameter: Any) -> list[str]:
    return [*parameter.opts, *parameter.secondary_opts] if parameter.param_type_name == "option" else []
