"""What clients write at the beginning of a system prompt that differs in each request.

It means nothing to a model and would spoil the prefix cache: no two prompts would share even their
first block. Only the exact forms in the table are removed; `--keep-client-nonce` keeps them.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class ClientNonce(NamedTuple):
    """One client's form. It stands at the very beginning of a system prompt."""

    name: str  # in `x-llmkit-ignored`
    pattern: re.Pattern[str]  # what is removed
    client: str  # for the documentation


CLIENT_NONCES = (
    # Since 2.1.36 Claude Code's first system block is
    # "x-anthropic-billing-header: cc_version=2.1.117.48f; cc_entrypoint=cli; cch=71fea;", with
    # another `cch` in each request (anthropics/claude-code#68900, ggml-org/llama.cpp#21793).
    ClientNonce(
        "x-anthropic-billing-header",
        re.compile(r"x-anthropic-billing-header:(?: ?(?:cc_[a-z_]{1,32}|cch)=[^;\s]{0,64};)+\n?"),
        "Claude Code",
    ),
)


def strip_client_nonces(system: str) -> tuple[str, list[str]]:
    """Return a system prompt without what the table has, and the names of what was removed."""
    names = []
    for nonce in CLIENT_NONCES:
        match = nonce.pattern.match(system)
        if match is not None:
            system = system[match.end() :]
            names.append(nonce.name)
    return system, names
