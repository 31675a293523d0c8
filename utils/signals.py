"""SIGTERM and Ctrl-C: a wish to stop, granted at the next safe point."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 75  # exit status; EX_TEMPFAIL of sysexits.h: nothing is wrong, start it again
STOPPING = (signal.SIGTERM, signal.SIGINT)
# A scheduler that signals every process, and the launcher that passes its own signal on, reach a
# run twice within milliseconds; a person who means it comes later.
SAME_WISH = 1.0  # seconds
NOTICE = b"\nstopping after this iteration; the same signal again ends the program at once\n"


class Interrupted(Exception):
    """The run came to a safe point and stopped there because it was asked to."""


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Within the block SIGTERM and SIGINT stop nothing; the function yielded says if one came.

    A second signal later than SAME_WISH ends the process at once, as either does outside the
    block. To be used in the main thread.
    """
    asked: list[float] = []

    def handle(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not asked:
            asked.append(now)
            os.write(2, NOTICE)  # print may be interrupted in its middle by this very handler
        elif now - asked[0] > SAME_WISH:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    before = {number: signal.signal(number, handle) for number in STOPPING}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
