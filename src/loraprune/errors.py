"""Errors: what a user can do something about, said in three lines.

Reads    nothing
Gives    UserError, nearest
Source   -
Symbols  what (with the numbers), why (what would go wrong), fix (a flag by name)
"""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake the user can mend; the command line prints it without a traceback and exits with 2."""

    def __init__(self, what: str, why: str, fix: str) -> None:
        super().__init__(what, why, fix)  # all of them: what is unpickled in another process is made anew from these
        self.what, self.why, self.fix = what, why, fix

    def __str__(self) -> str:
        return f"error  {self.what}\nwhy    {self.why}\nfix    {self.fix}"


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Return the known word most like `word`, or None when nothing resembles it."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return close[0] if close else None
