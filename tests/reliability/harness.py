"""Real processes, started cheaply: a fork server has imported torch and the program already."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.conftest import ROOT
from tests.reliability import child
from tests.reliability.child import Fault

FLAGS = [
    "--task", "15-5", "--overlap", "--name", "r", "--backbone", "resnet18", "--no-pretrained",
    "--crop_size", "32", "--lr", "0.01", "--print_interval", "3", "--num_workers", "0",
]  # fmt: skip
SETTING = "voc-15-5-ov"
LIMIT = 240  # seconds after which a process counts as hanging

# Python 3.11's fork server looks for what it imports beforehand nowhere else.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["tests.reliability.child"])


@dataclass
class Outcome:
    """Exit statuses by rank (negative: the signal) and what all of them printed."""

    status: list[int | None]
    output: str


@dataclass
class Run:
    """Processes of one run under way in `folder`."""

    folder: Path
    processes: list[Any] = field(default_factory=list)

    @property
    def output(self) -> str:
        return "".join(p.read_text(errors="replace") for p in sorted(self.folder.glob("out-*")))

    def wait(self) -> Outcome:
        """Every process to its end; fails the test where one hangs."""
        deadline = time.monotonic() + LIMIT
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        hanging = [process for process in self.processes if process.exitcode is None]
        for process in hanging:
            process.kill()
        assert not hanging, f"hangs: {self.output}"
        return Outcome([process.exitcode for process in self.processes], self.output)

    def wait_for(self, text: str) -> None:
        """Until the run has printed `text`."""
        deadline = time.monotonic() + LIMIT
        while text not in self.output:
            assert time.monotonic() < deadline, f"never printed {text!r}: {self.output}"
            assert any(p.exitcode is None for p in self.processes), self.output
            time.sleep(0.02)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Signal all processes that live."""
        for process in self.processes:
            if process.exitcode is None:
                os.kill(process.pid, number)


def make_toy(out: Path, train: int = 48, val: int = 7) -> Path:
    """A data root of tiny images."""
    command = [sys.executable, ROOT / "data" / "make_toy.py", "--out", out, "--size", "48"]
    command += ["--train", train, "--val", val]
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
    return out


def launch(
    folder: Path,
    *flags: object,
    world: int = 1,
    faults: Sequence[Fault] = (),
    entry: Callable[[Sequence[Fault], Sequence[str]], int] = child.main,
) -> Run:
    """Start `entry` (the child's main) in `folder`, once per rank; several get what a launcher
    sets."""
    folder.mkdir(parents=True, exist_ok=True)
    port = str(_free_port())
    argv = [*FLAGS, *map(str, flags)]
    started = Run(folder)
    for rank in range(world):
        environment = {
            "OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        } if world > 1 else {"OMP_NUM_THREADS": "1"}  # fmt: skip
        arguments = (entry, str(folder), environment, rank, list(faults), argv)
        process = _server.Process(target=_enter, args=arguments)
        process.start()
        started.processes.append(process)
    return started


def torchrun(
    folder: Path, *flags: object, world: int, faults: Sequence[Fault] = (), restarts: int = 0
) -> subprocess.CompletedProcess[str]:
    """The same under the real launcher."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}",
        f"--max-restarts={restarts}", child.__file__, json.dumps(faults), *FLAGS, *map(str, flags),
    ]  # fmt: skip
    return subprocess.run(
        command, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=LIMIT, check=False,
    )  # fmt: skip


def go(folder: Path, *flags: object, **settings: Any) -> Outcome:
    """`launch` and wait."""
    return launch(folder, *flags, **settings).wait()


def _enter(
    entry: Callable[[Sequence[Fault], Sequence[str]], int],
    folder: str,
    environment: dict[str, str],
    rank: int,
    faults: list[Fault],
    argv: list[str],
) -> None:
    os.environ.update(environment)
    os.chdir(folder)
    output = os.open(f"out-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    sys.exit(entry(faults, argv))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def checkpoint_path(folder: Path, step: int = 0) -> Path:
    return folder / "checkpoints" / "step" / SETTING / f"r_{step}.pth"


def read(folder: Path, step: int = 0) -> dict[str, Any]:
    """A checkpoint without what may differ: the flags that say how it came about."""
    content = torch.load(checkpoint_path(folder, step), weights_only=True)
    del content["options"]
    return content


def rows(folder: Path) -> dict[str, bytes]:
    """The result files."""
    return {p.name: p.read_bytes() for p in sorted((folder / "logs" / "results").glob("*.csv"))}


def difference(a: Any, b: Any, name: str = "") -> str:
    """Where two nested values differ in a bit; empty if nowhere."""
    if isinstance(a, torch.Tensor):
        same = isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
        return "" if same else name
    if isinstance(a, dict):
        if not isinstance(b, dict) or list(a) != list(b):
            return name or "keys"
        return next((d for k in a if (d := difference(a[k], b[k], f"{name}.{k}"))), "")
    if isinstance(a, list | tuple):
        if type(a) is not type(b) or len(a) != len(b):
            return name
        pairs = enumerate(zip(a, b, strict=True))
        return next((d for i, (x, y) in pairs if (d := difference(x, y, f"{name}[{i}]"))), "")
    return "" if a == b else name


def descendants(pid: int) -> set[int]:
    """Living children of a process, and theirs."""
    found: set[int] = set()
    with suppress(FileNotFoundError, ProcessLookupError):  # it may end while it is looked at
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            for number in task.read_text().split():
                found |= {int(number)} | descendants(int(number))
    return found
