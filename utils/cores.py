"""What a process may use of its machine."""

import os

from utils.launcher import number, world_size

MOST_WORKERS = 8


def usual_workers() -> int:
    """Data processes of one process: its share of the cores it may use, at least 1, at most 8."""
    on_linux = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if on_linux else os.cpu_count() or 1
    here = number("LOCAL_WORLD_SIZE", world_size(), low=1)
    return max(1, min(MOST_WORKERS, cores // here))
