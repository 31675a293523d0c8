"""Standard streams: whatever becomes of them, a run goes on and nothing else is written there."""

import io
import os
import sys
from typing import Any


class _Steady(io.FileIO):
    """A stream whose text is dropped once nobody takes it: a pipe without reader, a full disk."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())
            os.close(null)
            return len(memoryview(data).cast("B"))


def make_steady() -> None:
    """Let stdout and stderr of this process outlive their readers; call it before anything else.

    Streams that are closed lead to nowhere from here on (else the next file that is opened, a
    checkpoint perhaps, would get their number, and with it what libraries print). Characters that
    the stream's encoding lacks become escapes. Streams that something else stands in for are left
    alone.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    sys.stdout = _steady(sys.stdout, sys.__stdout__, 1)
    sys.stderr = _steady(sys.stderr, sys.__stderr__, 2)


def _steady(stream: Any, first: Any, descriptor: int) -> Any:
    if stream is not first or (stream is not None and stream.fileno() != descriptor):
        return stream
    if stream is not None:
        stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Steady(descriptor, "w", closefd=False)),
        encoding=getattr(stream, "encoding", "utf-8"), errors="backslashreplace",
        line_buffering=descriptor == 2 or getattr(stream, "line_buffering", False),
    )  # fmt: skip
