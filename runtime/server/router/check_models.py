"""Checks the models of a router before it listens, in a process of its own.

So the router's process imports no torch, and its own imports run meanwhile.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

import msgspec

from llmkit.common.errors import ChatTemplateError, LlmkitError
from llmkit.runtime.process_channel import Channel, Failed, end_process, parent_socket, spawn
from llmkit.runtime.server.ollama.model_facts import ModelFacts
from llmkit.runtime.server.serve_options import ServeOptions, template_error

if TYPE_CHECKING:
    from llmkit.checkpoint.tokenizer import Tokenizer

_PROCESS = "llmkit.runtime.server.router.check_models"


class CheckModels(msgspec.Struct, tag=True):
    """The first message to the process."""

    options: dict[str, Any]  # of ServeOptions; `model` is ignored
    models: dict[str, str]  # directories or hub ids, by name


class Checked(msgspec.Struct, tag=True):
    """The result: the first error, or what Ollama's API tells of each model, by name."""

    failed: Failed | None
    facts: dict[str, ModelFacts] = {}


class ModelCheck:
    """The running check. Use it as a context manager, which ends the process if need be."""

    def __init__(self, options: ServeOptions, models: Mapping[str, str]) -> None:
        message = CheckModels(options.to_dict(), dict(models))
        self._process, socket = spawn(_PROCESS, message, {})
        self._channel = Channel(socket, msgspec.msgpack.Decoder(Checked))

    def __enter__(self) -> ModelCheck:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    def wait(self) -> Mapping[str, ModelFacts]:
        """Return the facts about each model, by name.

        Raises the LlmkitError that loading the first wrong model would.
        """
        try:
            (result,) = self._channel.receive(wait=True)
        except EOFError:
            raise LlmkitError("the process that checks the models ended") from None
        finally:
            self._end()
        if result.failed is not None:
            raise result.failed.error()
        return result.facts

    def _end(self) -> None:
        self._channel.close()
        end_process(self._process)


def check_models(options: ServeOptions, models: Mapping[str, str]) -> Checked:
    """Open the models and plan their memory; no tensor is read."""
    # Imported here, because the parent process imports this module without torch.
    from llmkit.checkpoint.open_checkpoint import open_checkpoint
    from llmkit.checkpoint.tokenizer import load_tokenizer
    from llmkit.runtime.engine_plan import plan_engine
    from llmkit.runtime.model_card import model_card
    from llmkit.runtime.server.server_state import SamplingDefaults
    from llmkit.runtime.server.text.dialect_detection import detect_chat_dialect

    facts = {}
    for name, reference in models.items():
        try:
            checkpoint = open_checkpoint(reference, warn_of_edits=False)
            dtype = str(plan_engine(checkpoint, options.engine).as_dict()["dtype"])
            tokenizer = load_tokenizer(checkpoint, options.chat_template)
            _check_templates(tokenizer, reference)
            defaults = SamplingDefaults.from_generation_config(checkpoint.generation_config)
            card = model_card(checkpoint)
            dialect = detect_chat_dialect(
                tokenizer.chat_templates,
                tokenizer.settings,
                options.tool_parser,
                options.reasoning_parser,
            )
            facts[name] = ModelFacts.read(
                checkpoint, tokenizer, dialect, card, dtype, vars(defaults)
            )
        except Exception as error:
            if options.debug or not isinstance(error, LlmkitError):
                traceback.print_exc()
            failed = Failed.of(error)
            failed.what = f"the model {name}: {failed.what}"
            return Checked(failed)
    return Checked(None, facts)


def _check_templates(tokenizer: Tokenizer, reference: str) -> None:
    # Imported here for the same reason.
    from llmkit.common.chat_template import check_chat_template

    for template in tokenizer.chat_templates.values():
        try:
            check_chat_template(template)
        except ChatTemplateError as error:
            raise template_error(f"the chat template of {reference}", error) from None


def main() -> int:
    """Run the process and return its exit code."""
    channel = Channel(parent_socket(), msgspec.msgpack.Decoder(CheckModels))
    try:
        (message,) = channel.receive(wait=True)
    except EOFError:  # the parent has ended before it sent the message
        return 0
    channel.send(check_models(ServeOptions.from_dict(message.options), message.models))
    return 0


if __name__ == "__main__":
    sys.exit(main())
