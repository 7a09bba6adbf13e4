"""The interface between the engine and a compiled grammar."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


class GrammarMatcher(Protocol):
    """Follows one output through a grammar and says which tokens may come next."""

    def fill_bitmask(self, bitmask: torch.Tensor) -> None:
        """Write which tokens may come next, at least one, to int32 [words] on the CPU.

        See `kernels.token_bitmask`. A token that ends the output counts too. Tokens that the
        grammar does not know may not come.
        """

    def accept_token(self, token_id: int) -> None:
        """Advance by the output's next token."""

    def is_terminated(self) -> bool:
        """Whether no token can follow."""
