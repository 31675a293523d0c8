"""Data workers: forked by a server process that has no threads, stopped by their parent alone."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import BaseContext
from multiprocessing.process import parent_process
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from utils.signals import STOPPING


@cache
def context(needed: type) -> BaseContext:
    """Start a fork server that imports the module of the class `needed`; workers come from it.

    A fork of the run itself copies locks that its threads may hold (those of gloo, autograd and
    TensorBoard). Before Python 3.12 the worker then sometimes hangs, and the run with it.
    """
    root = str(Path(__file__).resolve().parent.parent)
    # Python 3.11's server looks for what it imports nowhere else.
    path = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(path)
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([needed.__module__])
    resource_tracker.ensure_running()  # the server would start it, which unblocks the signals
    with _shielded():
        forkserver.ensure_running()
    return server


def start(loader: DataLoader[Any]) -> Iterator[Any]:
    """`iter(loader)` whose workers start with the stopping signals blocked."""
    with _shielded():
        return iter(loader)


@contextmanager
def _shielded() -> Iterator[None]:
    """Processes started within the block inherit that SIGTERM and SIGINT wait."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def obey_parent(worker_id: int) -> None:
    """`worker_init_fn` of a loader: only the parent can stop its workers, and they die with it.

    Schedulers, launchers and terminals signal whole groups of processes, but the iteration that is
    to be finished still wants its batches.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    parent = parent_process()
    assert parent is not None

    def listen() -> None:
        while signal.sigwaitinfo(STOPPING).si_pid != parent.pid:
            pass

    for wait in (listen, parent.join):
        threading.Thread(target=_exit_after, args=(wait,), daemon=True).start()


def _exit_after(wait: Callable[[], None]) -> None:
    wait()
    os._exit(0)


def lost(error: BaseException) -> bool:
    """Whether `error` is a loader's about a worker that died, by a signal as a rule.

    With pinned memory the thread that pins may be the first to notice. Who is just fetching a batch
    finds the worker's end of the connection closed.
    """
    signs = ("DataLoader worker", "in pin memory thread", "Pin memory thread")
    closed = isinstance(error, (ConnectionError, EOFError))
    return closed or any(sign in str(error) for sign in signs)
