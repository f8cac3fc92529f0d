"""The one error that a person sees as a line of text."""

from __future__ import annotations


class UserError(Exception):
    """Something the caller can put right. The command line prints it as one line and exits with 2.

    The message names the file or key at fault and the remedy: ``what is wrong: what to do``.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class BudgetBroken(Exception):
    """What was measured breaks a budget that the caller named. The command line prints it and exits with 1."""
