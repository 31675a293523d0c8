"""The one exception that a user is meant to see, and how texts are shown."""

from collections.abc import Iterable
from difflib import get_close_matches


def printable(text: str) -> str:
    """A text from outside for a terminal: control characters are written as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def guess(typed: str, known: Iterable[str]) -> str:
    """` (did you mean X?)` for the known word that a slip in `typed` is nearest to, or nothing.

    Case and leading dashes do not count.
    """
    words = {word.lower().lstrip("-"): word for word in known}
    found = get_close_matches(typed.lower().lstrip("-"), words, n=1)
    return f" (did you mean {words[found[0]]}?)" if found else ""


class UserError(Exception):
    """Something the user can put right: a path, a flag, a file.

    The message is one line that names the thing and the cure; `run.py` prints it without a
    traceback and exits with status 1. A DataLoader worker hands its exceptions over wrapped in the
    text of their traceback, so only what follows the last mention of this class is kept.
    """

    def __init__(self, message: str) -> None:
        _, _, tail = message.rpartition("UserError: ")
        super().__init__(printable(" ".join(tail.split())))


def in_a_line(error: UserError | OSError) -> str:
    """What a program says of an error as it ends: the cure, or what the system refuses."""
    if isinstance(error, UserError):
        return str(error)
    where = f"{error.filename}: " if error.filename else ""
    return str(UserError(f"the system refuses, {where}{error.strerror or error}"))
