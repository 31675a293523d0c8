"""SIGTERM and Ctrl-C: a wish to stop, granted at the next safe point."""

import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

from utils import distributed

Item = TypeVar("Item")

INTERRUPTED = 75  # exit status; EX_TEMPFAIL of sysexits.h: nothing is wrong, start it again
STOPPING = (signal.SIGTERM, signal.SIGINT)
# A scheduler that signals every process, and the launcher that passes its own signal on, reach a
# run twice within milliseconds; a person who means it comes later.
SAME_WISH = 1.0  # seconds
NOTICE = b"\nstopping after this iteration; the same signal again ends the program at once\n"


class Interrupted(Exception):
    """The run came to a safe point and stopped there because it was asked to."""


# When this process was first asked to stop, within the block of `stop_requests`.
_asked: list[float] = []


def asked_to_stop() -> bool:
    """Whether this process was, since `stop_requests` began."""
    return bool(_asked)


def until_stopped(
    batches: Iterable[Item], rounds: int, where: Callable[[], str]
) -> Iterator[Item]:
    """The batches, until a process is asked to stop: then Interrupted, in all processes at once.

    Asked before each of the first `rounds` batches, which all processes have: one with a batch
    more would ask alone. `where` says where the run was interrupted.
    """
    for number, batch in enumerate(batches):
        if number < rounds and distributed.any_process(asked_to_stop()):
            raise Interrupted(where())
        yield batch


@contextmanager
def stop_requests() -> Iterator[None]:
    """Within the block SIGTERM and SIGINT stop nothing at once: `asked_to_stop` says if one came.

    A second signal later than SAME_WISH ends the process at once, as either does outside the
    block. To be used in the main thread.
    """
    _asked.clear()

    def handle(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not _asked:
            _asked.append(now)
            os.write(2, NOTICE)  # print may be interrupted in its middle by this very handler
        elif now - _asked[0] > SAME_WISH:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    before = {number: signal.signal(number, handle) for number in STOPPING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
