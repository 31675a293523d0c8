"""One run of a name at a time: a lock that vanishes with the process that holds it."""

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from utils.errors import UserError


@contextmanager
def run_lock(path: Path, what: str) -> Iterator[None]:
    """Hold the lock `path` within the block; the file, which says who holds it, stays behind.

    The lock lives in the kernel, so one that a killed process left blocks nobody.

    Raises:
        UserError: another process holds it (`what` is then said to be running), or the file
            cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(
            f"cannot make {path}: {error.strerror}; choose another working directory"
        ) from error
    try:
        _take(descriptor, path, what)
        yield
    finally:
        os.close(descriptor)


def _take(descriptor: int, path: Path, what: str) -> None:
    try:
        # Not flock: a forked process that outlives the run would hold that one on. The package
        # filelock uses it; up to 3.29 (tried) it also wipes out the text of a lock that is held.
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise UserError(f"cannot lock {path}: {error.strerror}") from error
        holder = os.read(descriptor, 200).decode(errors="replace").strip() or "unknown process"
        raise UserError(
            f"{what} is already running ({holder}): wait for it, or choose another --name"
        ) from error
    with suppress(OSError):  # on a full disk the lock holds without saying whose it is
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
