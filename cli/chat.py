"""`llmkit chat`: a conversation in the terminal with a model or a running server."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from llmkit.checkpoint.hub import is_url
from llmkit.cli.error_report import INTERRUPTED
from llmkit.cli.output import Output
from llmkit.cli.servers import own_server, own_server_options, running_server
from llmkit.common.errors import InputError, LlmkitError, UsageError
from llmkit.common.formatting import nearest
from llmkit.common.option_values import within
from llmkit.common.options import Argument, Option

if TYPE_CHECKING:
    from llmkit.cli.chat_prompt import Prompt
    from llmkit.runtime.chat_client import Answer, ChatClient, Conversation
    from llmkit.runtime.server_client import Server

HISTORY_FILE = "chat_history"
WEB_SCHEMES = ("http://", "https://")
HELP = """\
/system TEXT  set the system prompt; without TEXT remove it
/retry        ask for another answer to the last message
/new          begin a new conversation; the system prompt stays
/save FILE    write the messages as JSON
/load FILE    go on with the messages of a file
/help         this list
/exit         end the chat, as Ctrl-D does
A line that ends with \\ goes on in the next one. Lines between \"\"\" and \"\"\" are one message.
A message that begins with / is written with //. Ctrl-C stops an answer."""


@dataclass(frozen=True, kw_only=True)
class ChatArguments:
    """What `llmkit chat` takes."""

    model: Annotated[
        str,
        Argument(
            "A checkpoint, which is served for this chat, or the URL of a running server.",
            metavar="MODEL|URL",
            completes_models=True,
        ),
    ]
    serve_words: Annotated[
        tuple[str, ...],
        Argument(
            "After --: options of `llmkit serve` for the server that is started.",
            metavar="-- OPTIONS",
        ),
    ] = ()
    name: Annotated[
        str | None,
        Option(
            "With a URL: which model of the server answers.",
            flags=("--model",),
            metavar="NAME",
            unset="its first",
        ),
    ] = None
    api_key_file: Annotated[
        Path | None,
        Option(
            "With a URL: a file whose first word is the server's API key.",
            metavar="FILE",
            unset="LLMKIT_API_KEY, if set",
        ),
    ] = None
    system: Annotated[str | None, Option("The system prompt.", metavar="TEXT", unset="none")] = None
    temperature: Annotated[
        float | None,
        Option(
            "0 always takes the most likely token.",
            metavar="X",
            unset="the server's",
            check=within(0, 2),
        ),
    ] = None
    top_p: Annotated[
        float | None,
        Option(
            "Sample from the most likely tokens whose probabilities sum to this.",
            metavar="X",
            unset="the server's",
            check=within(0, 1),
        ),
    ] = None
    max_tokens: Annotated[
        int | None,
        Option("Maximum tokens of an answer.", metavar="N", unset="the server's", check=within(1)),
    ] = None
    seed: Annotated[
        int | None,
        Option(
            "Sample reproducibly; /retry takes the next seed.",
            metavar="N",
            unset="random",
            check=within(0),
        ),
    ] = None
    history: Annotated[
        bool,
        Option(
            "Keep the lines that were typed in a private file, for the arrow keys.",
            flags=("--history/--no-history",),
        ),
    ] = True


def chat(output: Output, arguments: ChatArguments) -> int:
    """Chat with a model in the terminal. /help lists the commands.

    When stdin is no terminal, or with --json, all of stdin is one message: the answer goes to
    stdout and the command ends.
    """
    from llmkit.runtime.chat_client import ChatClient, Conversation, Sampling

    conversation = Conversation(arguments.system or "")
    sampling = Sampling(
        arguments.temperature, arguments.top_p, arguments.max_tokens, arguments.seed
    )
    one_question = output.as_json or not sys.stdin.isatty()
    if one_question:
        conversation.ask(_question())
    with _chat_server(output, arguments) as (name, server):
        client = ChatClient(server, name, sampling)
        if one_question:
            _answer_once(output, client, conversation)
            return 0
        return _Chat(output, client, conversation).run(_prompt(arguments.history))


def _question() -> str:
    question = sys.stdin.buffer.read().decode("utf-8", "replace").strip()
    if not question:
        raise UsageError("stdin has no question", "A text, or a terminal to type in, was expected")
    return question


@contextmanager
def _chat_server(output: Output, arguments: ChatArguments) -> Iterator[tuple[str, Server]]:
    """The model's name and the server, which is ready. An own server ends with the context."""
    model = arguments.model
    if model.startswith(WEB_SCHEMES):
        if arguments.serve_words:
            raise UsageError(
                "options of `llmkit serve` are given with a URL",
                "They configure the server that this command starts for a checkpoint",
            )
        yield running_server(model, arguments.name, _key(arguments.api_key_file))
        return
    for option, value in (
        ("--model", arguments.name),
        ("--api-key-file", arguments.api_key_file),
    ):
        if value is not None:
            raise UsageError(f"{option} is for the URL of a server, not for a checkpoint")
    if is_url(model):
        # The registries' clients are heavy: imported only for a URL.
        from llmkit.checkpoint.registry.local_copies import local_copy

        model = str(local_copy(model, output.progress()))
    name, options = own_server_options(model, arguments.serve_words)
    server = own_server(options, lambda text: output.message(f"llmkit chat: {text}"))
    assert server.process is not None
    try:
        server.process.ready.result()
        yield name, server
    finally:
        server.process.stop()


def _key(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        words = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--api-key-file {path} cannot be read ({error})") from None
    if not words:
        raise InputError(f"--api-key-file {path} has no key", "A line with a key was expected")
    return words[0]


def _prompt(history: bool) -> Prompt:
    from llmkit.cli.chat_prompt import Prompt
    from llmkit.common.user_folders import state_folder

    return Prompt(state_folder() / HISTORY_FILE if history else None)


def _answer_once(output: Output, client: ChatClient, conversation: Conversation) -> None:
    """Print the answer, or with --json one document."""
    from llmkit.cli.chat_display import answer_view
    from llmkit.runtime.chat_client import Answer

    answer = Answer()
    if output.as_json:
        client.ask(conversation, answer, lambda: None)
    else:
        with answer_view(output.console) as view:
            client.ask(conversation, answer, lambda: view.update(answer))
    conversation.answered(answer.content)
    if output.as_json:
        output.result(_document(client, conversation, answer), lambda console: None)
    elif answer.finish_reason == "length":
        output.message("llmkit chat: the answer was cut at the maximum of tokens")


def _document(client: ChatClient, conversation: Conversation, answer: Answer) -> dict[str, Any]:
    return {
        "model": client.model,
        "content": answer.content,
        "reasoning": answer.reasoning or None,
        "finish_reason": answer.finish_reason,
        "usage": answer.usage,
        "messages": conversation.document(),
    }


class _Chat:
    """A chat in the terminal."""

    def __init__(self, output: Output, client: ChatClient, conversation: Conversation) -> None:
        self._output = output
        self._client = client
        self._conversation = conversation
        self._commands: dict[str, Callable[[str], None]] = {
            "/system": self._set_system,
            "/retry": self._retry,
            "/new": self._new,
            "/save": self._save,
            "/load": self._load,
            "/help": self._help,
            "/exit": self._exit,
            "/quit": self._exit,
        }

    def run(self, prompt: Prompt) -> int:
        """Read and answer messages until the user ends the chat. Returns the exit code."""
        self._output.message(
            f"{self._client.model}: /help lists the commands, Ctrl-D ends the chat"
        )
        interrupted = False  # at the prompt, since the last line
        while True:
            try:
                text = prompt.read().strip()
            except EOFError:
                self._output.notes.print()
                return 0
            except KeyboardInterrupt:
                self._output.notes.print()
                if interrupted:
                    return INTERRUPTED
                interrupted = True
                self._output.message("Ctrl-C again ends the chat")
                continue
            interrupted = False
            try:
                self._handle(text)
            except EOFError:
                return 0
            except LlmkitError as error:
                if self._client.server_has_ended:
                    raise
                self._output.notes.print(
                    f"error: {error}", style="red", highlight=False, markup=False, soft_wrap=True
                )

    def _handle(self, text: str) -> None:
        """Answer a message, or run a command. Raises EOFError for /exit."""
        if text.startswith("//"):
            text = text[1:]
        elif text.startswith("/"):
            name, _, argument = text.partition(" ")
            if name not in self._commands:
                raise UsageError(
                    f"no such command: {name}",
                    nearest(name, self._commands),
                    "Begin a message with // to send it with a /",
                )
            self._commands[name](argument.strip())
            return
        if text:
            self._conversation.ask(text)
            self._answer()

    def _answer(self) -> None:
        from llmkit.cli.chat_display import answer_view
        from llmkit.runtime.chat_client import Answer

        answer = Answer()
        try:
            with answer_view(self._output.console) as view:
                self._client.ask(self._conversation, answer, lambda: view.update(answer))
        except KeyboardInterrupt:
            self._output.message("(stopped)")
        finally:
            # What had arrived stays in the conversation, so that the next message can refer to it.
            if answer.content:
                self._conversation.answered(answer.content)
        if answer.finish_reason == "length":
            self._output.message("(cut at the maximum of tokens)")

    def _set_system(self, text: str) -> None:
        self._conversation.system = text
        self._output.message("system prompt set" if text else "no system prompt")

    def _retry(self, _: str) -> None:
        if not self._conversation.retry():
            raise UsageError("there is no message to answer")
        self._answer()

    def _new(self, _: str) -> None:
        self._conversation.clear()
        self._output.message("new conversation")

    def _save(self, file: str) -> None:
        self._conversation.save(_path("/save", file))
        self._output.message(f"saved {file}")

    def _load(self, file: str) -> None:
        self._conversation.load(_path("/load", file))
        self._output.message(f"loaded {len(self._conversation.messages)} messages")

    def _help(self, _: str) -> None:
        self._output.notes.print(HELP, highlight=False, markup=False)

    def _exit(self, _: str) -> None:
        raise EOFError


def _path(command: str, file: str) -> Path:
    if not file:
        raise UsageError(f"{command} needs a file", f"{command} FILE was expected")
    return Path(file)
