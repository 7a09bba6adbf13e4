"""The interface between the engine and a compiled grammar."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


class GrammarMatcher(Protocol):
    """Follows one output through a grammar and says which tokens may come next."""

    def allowed_tokens(self) -> torch.Tensor:
        """bool [vocab], at least one of them true. A token that ends the output counts too."""

    def accept_token(self, token_id: int) -> None:
        """Advance by the output's next token."""

    def is_terminated(self) -> bool:
        """Whether no token can follow."""
