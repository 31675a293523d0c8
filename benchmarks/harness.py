"""What all benchmarks share: ours against plain in turns, each time in a fresh process.

A benchmark names for each of its cases two `Work`s, functions without arguments that prepare what
they need and return the call to be measured. They are sent to the fresh process, so they are
functions of a module or `functools.partial`s of one, not lambdas.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from multiprocessing import get_context
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import TypeVar

import torch

from utils.errors import UserError

Work = Callable[[], Callable[[], object]]
Result = TypeVar("Result")
MIB = 2**20
M_MMAP_THRESHOLD = -3  # of malloc.h
PRELOADED = ["torch", "train", "engine.build", "engine.plans"]


@dataclass(frozen=True)
class Sample:
    """One process: seconds of the call (the fastest of `calls`) and memory at its peak, MiB."""

    seconds: float
    peak: float  # beyond what the preparation had left
    total: float  # all of it


@dataclass
class Row:
    """All samples of a case; `ours` and `plain` are in step, taken one right after the other."""

    name: str
    ours: list[Sample] = field(default_factory=list)
    plain: list[Sample] = field(default_factory=list)

    def ratios(self) -> list[float]:
        return [a.seconds / b.seconds for a, b in zip(self.ours, self.plain, strict=True)]

    def summary(self) -> dict[str, float]:
        """Medians: seconds, MiB, and of the paired ratios ours / plain with their range."""
        ratios = self.ratios()
        sides = (self.ours, self.plain)
        peak, plain_peak = (statistics.median(s.peak for s in samples) for samples in sides)
        total, plain_total = (statistics.median(s.total for s in samples) for samples in sides)
        return {
            "ours s": statistics.median(s.seconds for s in self.ours),
            "plain s": statistics.median(s.seconds for s in self.plain),
            "time ratio": statistics.median(ratios),
            "lowest": min(ratios),
            "highest": max(ratios),
            "ours MiB": peak,
            "plain MiB": plain_peak,
            "memory ratio": peak / plain_peak if plain_peak else float("nan"),
            "total ratio": total / plain_total,
        }


def parser(description: str | None) -> argparse.ArgumentParser:
    """The flags every benchmark has."""
    result = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--json", type=Path, metavar="FILE", help="write all samples there too")
    result.add_argument("--repeats", type=int, default=5, help="fresh processes per variant")
    result.add_argument("--calls", type=int, default=2, help="timed calls per process")
    result.add_argument("--device", type=_device, default="cpu", help="cpu or cuda")
    return result


def _device(name: str) -> str:
    if name not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{name} is neither cpu nor cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("torch finds no CUDA device here")
    return name


def start(main: Callable[[], None]) -> None:
    """A benchmark as a program: what its user can mend is a line, not a traceback."""
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")


def compare(
    cases: Mapping[str, tuple[Work, Work]],
    args: argparse.Namespace,
    measure: Callable[[Work, int, str], Sample] | None = None,
) -> list[Row]:
    """Measure (ours, plain) of every case in turns, as the flags of `parser` say.

    A plain side that several cases share (the same object) is measured once per repeat. Progress
    goes to stderr, and so does the error of a case that fails, which ends that case alone. The JSON
    file is written after every measurement, for a benchmark may be stopped.
    """
    measure = measure or in_fresh_process
    rows = {name: Row(name) for name in cases}
    for repeat in range(args.repeats):
        known: dict[int, Sample] = {}
        for name, (ours, plain) in cases.items():
            if name not in rows:
                continue
            print(f"{name}: {repeat + 1} of {args.repeats}", file=sys.stderr, flush=True)
            try:
                sample = measure(ours, args.calls, args.device)
                if id(plain) not in known:
                    known[id(plain)] = measure(plain, args.calls, args.device)
            except Exception as error:  # whatever a GPU, a compiler or a file may lack
                print(f"{name} failed: {error!r}", file=sys.stderr, flush=True)
                del rows[name]
                continue
            rows[name].ours.append(sample)
            rows[name].plain.append(known[id(plain)])
            write(list(rows.values()), args.json)
    return list(rows.values())


def report(
    cases: Mapping[str, object], rows: Sequence[Row], file: Path | None, **more: object
) -> None:
    """Print the table, write the JSON file with `more` in it; SystemExit if a case is missing."""
    if rows:
        columns = list(rows[0].summary())
        width = max(len(row.name) for row in rows)
        print(" " * width, *(f"{column:>12}" for column in columns))
        for row in rows:
            cells = (f"{value:12.4g}" for value in row.summary().values())
            print(f"{row.name:{width}}", *cells)
        write(rows, file, **more)
    if len(rows) < len(cases):
        sys.exit(f"{len(cases) - len(rows)} of {len(cases)} cases failed")


def write(rows: Sequence[Row], file: Path | None, **more: object) -> None:
    """Samples, summaries, machine and `more` as JSON, if there is a file."""
    if file:
        content = {
            "command": sys.argv,
            "machine": machine(),
            "cases": [asdict(row) | {"summary": row.summary()} for row in rows if row.ours],
            **more,
        }
        file.write_text(json.dumps(content, indent=1) + "\n")


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    cpu = platform.processor()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(": ")[1] for line in lines if line.startswith("model name")), cpu)
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def in_fresh_process(work: Work, calls: int, device: str) -> Sample:
    """Time and memory of a `Work`."""
    return alone(_measure, work, calls, device)


def alone(function: Callable[..., Result], *args: object) -> Result:
    """What the function returns in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=_server()) as pool:
        return pool.submit(function, *args).result()


@cache
def _server() -> BaseContext:
    """Starts fresh processes that need not import everything again.

    `run` alone would not do: it imports torch late.
    """
    server = get_context("forkserver")
    server.set_forkserver_preload(PRELOADED)
    return server


def _measure(work: Work, calls: int, device: str) -> Sample:
    """The fastest of `calls` calls, after one to warm up, and the most memory.

    On a GPU that is the memory of the timed calls, because warming up tries out algorithms and
    compiles. On a CPU it is that of the first one, because what is freed stays with the process.
    """
    on_gpu = device != "cpu"
    if not on_gpu:
        _map_blocks_above(MIB)
    call = work()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the preparation
    before = _in_use(on_gpu)
    call()
    if on_gpu:
        call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    total = _peak(on_gpu)
    _map_blocks_above(32 * MIB)  # what glibc comes to by itself
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    if on_gpu:
        total = _peak(on_gpu)
    return Sample(min(times), total - before, total)


def _map_blocks_above(size: int) -> None:
    """Let glibc get larger blocks from the kernel and return them as soon as they are free.

    What it keeps in its heaps depends on all that a process did before, up to twice what a call
    needs. Where the C library is another one, nothing happens.
    """
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, size)


def _in_use(on_gpu: bool) -> float:
    """MiB at present; on a CPU, whose peak has just been forgotten, the most since then."""
    return torch.cuda.memory_allocated() / MIB if on_gpu else _peak(on_gpu)


def _peak(on_gpu: bool) -> float:
    """Most memory that was in use so far, MiB: of the GPU's allocator, or resident."""
    if on_gpu:
        return torch.cuda.max_memory_allocated() / MIB
    # Not getrusage: its ru_maxrss starts from that of the parent process.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 1024
