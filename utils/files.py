"""Files that a reader never sees half-written."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from utils.errors import UserError

LONGEST_NAME = 200  # bytes; file systems allow 255, what stands around a name takes the rest


def is_file_name(name: object) -> bool:
    """Whether a text can be (part of) a file's name everywhere, endings and locks included."""
    if not isinstance(name, str) or not name or name in (".", "..") or "/" in name:
        return False
    try:
        return len(name.encode()) <= LONGEST_NAME and name.isprintable()
    except UnicodeEncodeError:  # half a surrogate pair
        return False


def real(path: Path) -> Path:
    """`path.resolve()` that a link to itself does not stop: it is left as it is."""
    return Path(os.path.realpath(path))


def followed(path: Path) -> Path:
    """Where a link leads; any other path as it is, also in a working directory that is gone."""
    return real(path) if path.is_symlink() else path


def check_writable(folder: Path) -> None:
    """UserError unless files can be made in a folder or, if it is missing, the folder itself."""
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    try:
        usable = there.is_dir() and os.access(there.resolve(strict=True), os.W_OK | os.X_OK)
    except OSError:  # a working directory that was removed
        usable = False
    if not usable:
        raise UserError(
            f"cannot write to {folder}: {there} is no folder that you may write to; choose another"
        )


def _open_exclusive(path: Path) -> BinaryIO:
    """`path`, empty and locked: another writer waits, and what a killed one left is reused."""
    while True:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "w+b")
        fcntl.flock(file, fcntl.LOCK_EX)
        # While this process waited, the writer before it may have renamed the file to its target.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(file.fileno())):
                file.truncate()
                return file
        file.close()


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Yield a seekable binary file that takes the place of `path` once it is complete.

    The content goes to `.<name>.tmp` beside the target, is flushed to the disk and then renamed;
    missing folders are made. After any exception the target is as it was before. A link is
    replaced, what it leads to stays.

    Raises:
        UserError: an OSError in here (disk full, no permission), even when the library that wrote
            to the file turned it into an exception of its own.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        with _open_exclusive(temporary) as file:
            try:
                yield file
                file.flush()
                os.fsync(file.fileno())
                os.replace(temporary, path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        _sync_folder(path.parent)
    except Exception as error:
        cause = _first_os_error(error)
        if cause is None:
            raise
        raise UserError(
            f"cannot write {path}: {cause.strerror or cause}; "
            "what was there before is intact, make room or choose another folder"
        ) from error


def _first_os_error(error: BaseException | None) -> OSError | None:
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error
