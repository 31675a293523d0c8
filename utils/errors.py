"""The one exception that a user is meant to see."""


class UserError(Exception):
    """Something the user can put right: a path, a flag, a file.

    The message is one line that names the thing and the cure; `run.py` prints it without a
    traceback and exits with status 1. A DataLoader worker hands its exceptions over wrapped in the
    text of their traceback, so only what follows the last mention of this class is kept.
    """

    def __init__(self, message: str) -> None:
        _, _, tail = message.rpartition("UserError: ")
        super().__init__(" ".join(tail.split()))
