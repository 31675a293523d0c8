"""The environment that a launcher (torchrun) sets, and ending with it. Imports no torch."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

from utils.errors import UserError

LOOK_EVERY = 2.0  # seconds between looks at who the parent is
GRACE = 40.0  # seconds from the launcher's end to a process' own, if it has not stopped by then


def number(name: str, default: int, low: int = 0, high: int = 2**31 - 1) -> int:
    """A whole number out of the environment. UserError for anything else, or out of range."""
    text = os.environ.get(name, str(default))
    value = int(text) if text.isascii() and text.isdigit() and len(text) < 12 else -1
    if not low <= value <= high:
        raise UserError(
            f"the environment has {name}={text[:50]!r}, not a number of at least {low}: "
            "unset it, or start the program with torchrun"
        )
    return value


def is_launched() -> bool:
    """Whether this process is one of several that a launcher started."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def world_size() -> int:
    """Processes that the launcher started; 1 without one, whatever WORLD_SIZE says."""
    return number("WORLD_SIZE", 1, low=1) if is_launched() else 1


def check_environment() -> None:
    """UserError where the variables of a launcher are no numbers or contradict each other."""
    world = number("WORLD_SIZE", 1, low=1)
    rank, local = number("RANK", 0), number("LOCAL_RANK", 0)
    number("MASTER_PORT", 29500, high=65535)
    if is_launched() and max(rank, local) >= world:
        raise UserError(
            f"the environment has RANK={rank}, LOCAL_RANK={local} and WORLD_SIZE={world}, which "
            "contradict each other: unset them, or start the program with torchrun"
        )
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if is_launched() and name not in os.environ:
            raise UserError(f"the environment has RANK and no {name}: start it with torchrun")


def end_with_launcher() -> None:
    """Let this process end when the one that launched it is gone, however that went.

    It is then asked to stop like by a batch system (SIGTERM), and killed if that does not help:
    where a peer is gone, too, it may wait for it in a collective.
    """
    if is_launched():
        threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()


def _is_orphan() -> bool:
    """Whether torchrun died before `_watch` began: the parent is process 1, and no launcher."""
    if os.getppid() != 1 or "TORCHELASTIC_RUN_ID" not in os.environ:
        return False
    try:
        return b"torch" not in Path("/proc/1/cmdline").read_bytes()
    except OSError:
        return False


def _watch(parent: int) -> None:
    while os.getppid() == parent and not _is_orphan():
        time.sleep(LOOK_EVERY)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os.kill(os.getpid(), signal.SIGKILL)
