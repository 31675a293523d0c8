"""How progress is shown: as a bar to who watches a terminal, in lines of the log to everybody else.

The one place that decides it. A bar goes to standard error, and only to a terminal: a file or a
pipe would keep every state of it. Imports no torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

from utils import launcher


def has_bar() -> bool:
    """Whether bars are drawn: standard error is a terminal, and this process the one that talks.

    A terminal that knows no size of its own, as some programs give to those they start, shows none.
    """
    first = not launcher.is_launched() or launcher.number("RANK", 0) == 0
    if not first or sys.stderr is None or not sys.stderr.isatty():
        return False
    return min(os.get_terminal_size(sys.stderr.fileno())) > 0


def has_lines() -> bool:
    """Whether the log tells in lines what a bar would: standard output or error is kept."""
    return not (has_bar() and sys.stdout.isatty())


def bar(
    items: Iterable[Any] | None = None,
    *,
    desc: str,
    total: int,
    unit: str = "it",
    initial: int = 0,
) -> tqdm[Any]:
    """A bar over `items`, or one to `update` within a `with`; draws nothing unless `has_bar`.

    It leaves nothing behind when it is done. `initial` of the `total` units were done before.
    """
    return tqdm(
        items, desc=desc, total=total, unit=unit, initial=initial, leave=False, dynamic_ncols=True,
        disable=not has_bar(),
    )  # fmt: skip


def duration(seconds: float) -> str:
    """A time for people, of two units at most: 48 s, 12 min, 3 h 05 min, 2 d 4 h."""
    minutes = round(seconds / 60)
    if round(seconds) < 120:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"
