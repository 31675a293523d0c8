"""run.py with a small network and a fault: one process of a run that a test hurts.

As a script, for a launcher: `child.py FAULTS [flags of run.py]`, FAULTS being JSON.

The network is the real one with fewer blocks and channels. Faults are put around functions of the
program, which itself knows nothing of them.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch._dynamo  # the optimizer would import it: slow, and a fork server does it once
import torch.utils.tensorboard  # noqa: F401
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import dataset.incremental
import engine.fit
import engine.journal
import engine.outcome
import engine.session
import methods.objective
import run
import segmentation_module
import train
import utils.checkpoint
import utils.files
import utils.results
from modules.deeplab import DeeplabV3
from modules.residual import Norm, ResidualBlock
from utils import distributed

# {"at": place, "count": n, "signal": name}: the signal strikes this process when it comes to that
# place for the n-th time. More keys: "rank", the only one that is struck; "bytes", how much of the
# file is written by then; "launcher", to strike it instead and wait for what it does about it;
# signal "WAIT" is none, but a minute's sleep.
Fault = dict[str, Any]


class SmallBody(nn.Module):
    """Images B 3 H W -> B 16 H/16 W/16."""

    out_channels = 16

    def __init__(self, backbone: str, norm: Norm, output_stride: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4, padding=1, bias=False), norm(8))
        self.block = ResidualBlock(8, (16, 16), norm, 4, 1)

    def forward(self, x: Tensor, maps: tuple[str, ...] = ()) -> tuple[Tensor, dict[str, Tensor]]:
        early = self.stem(x)
        x = self.block(early)
        outputs = {"mod2": early, "mod3": early, "mod4": x, "mod5": x}
        return x, {name: outputs[name] for name in maps if name in outputs}


class SmallHead(DeeplabV3):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments, hidden=8)


def shrink() -> None:
    """Tests of what survives a kill need a network, not a big one."""
    segmentation_module.ResNet = SmallBody  # type: ignore[misc,assignment]
    segmentation_module.DeeplabV3 = SmallHead  # type: ignore[misc]
    segmentation_module.HEAD_CHANNELS = 8


def strike(fault: Fault) -> None:
    print(f"fault at {fault['at']}", flush=True)
    if fault["signal"] == "WAIT":
        time.sleep(60)
        return
    target = os.getppid() if fault.get("launcher") else os.getpid()
    os.kill(target, getattr(signal, f"SIG{fault['signal']}"))
    if target != os.getpid():
        time.sleep(3)


def before(function: Callable[..., Any], fault: Fault) -> Callable[..., Any]:
    """`function`, the `count`-th call of which begins with the fault."""
    calls = 0

    def wrapped(*arguments: Any, **settings: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == fault["count"]:
            strike(fault)
        return function(*arguments, **settings)

    return wrapped


class Struck:
    """A file that is struck after some bytes, which have reached the disk by then."""

    def __init__(self, file: BinaryIO, fault: Fault) -> None:
        self.file, self.fault = file, fault

    def write(self, data: Any) -> int:
        view = memoryview(data)
        rest = self.fault["bytes"] - self.file.tell()
        if 0 <= rest < len(view):
            self.file.write(view[:rest])
            self.file.flush()
            strike(self.fault)
            view = view[rest:]
        self.file.write(view)
        return len(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def in_write(module: Any, fault: Fault) -> None:
    """Strike within the `count`-th atomic write of a module."""
    plain, calls = module.atomic_write, 0

    @contextmanager
    def wrapped(path: Path) -> Iterator[Any]:
        nonlocal calls
        calls += 1
        with plain(path) as file:
            yield Struck(file, fault) if calls == fault["count"] else file

    module.atomic_write = wrapped


def arm(fault: Fault) -> None:
    if "rank" in fault and int(os.environ.get("RANK", "0")) != fault["rank"]:
        return
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):  # a fault of the first life only
        return
    place = fault["at"]
    if place == "data":
        engine.session.build_data = before(engine.session.build_data, fault)
    elif place == "between":  # steps
        engine.session.free_memory = before(engine.session.free_memory, fault)
    elif place == "survey":
        objective = methods.objective.Objective
        objective.survey = before(objective.survey, fault)  # type: ignore[method-assign]
    elif place == "save":
        engine.fit.save_progress = before(engine.fit.save_progress, fault)
    elif place == "iteration":
        train.Learner.step = before(train.Learner.step, fault)  # type: ignore[method-assign]
    elif place == "evaluation":
        train.predict = before(train.predict, fault)
    elif place == "checkpoint":
        in_write(utils.checkpoint, fault)
    elif place == "results":
        in_write(utils.results, fault)
    elif place == "journal":
        in_write(engine.journal, fault)
    elif place == "rename":  # of a checkpoint
        plain, struck = utils.files._sync_folder, before(utils.files._sync_folder, fault)
        utils.files._sync_folder = lambda folder: (
            struck if "checkpoints" in folder.parts else plain
        )(folder)
    else:
        raise ValueError(place)


def record_confusion(path: str) -> None:
    """Keep the confusion matrix of the test beside the rounded scores."""
    plain = engine.outcome.report

    def report(context: Any, metrics: Any, *more: Any) -> None:
        torch.save(metrics.confusion, path)
        plain(context, metrics, *more)

    engine.outcome.report = report


def main(faults: Sequence[Fault], argv: Sequence[str]) -> int:
    torch.set_num_threads(1)
    # A shell without job control starts background jobs that ignore Ctrl-C, which the tests send.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    shrink()
    for fault in faults:
        arm(fault)
    record_confusion("confusion.pt")
    return run.main(argv)


def main_in_float64(faults: Sequence[Fault], argv: Sequence[str]) -> int:
    """Also writes `seen-<rank>.pt`: each iteration's loss (mean over the ranks), and the images
    that this rank saw, as (epoch, index, checksum of image and labels)."""
    torch.set_default_dtype(torch.float64)
    losses: list[float] = []
    images: list[tuple[int, int, int]] = []
    step, item = train.Learner.step, dataset.incremental.IncrementalSegmentation.__getitem__

    def recorded_step(*arguments: Any) -> dict[str, Tensor]:
        terms = step(*arguments)
        total = torch.stack([term.detach() for term in terms.values()]).sum()
        losses.append(float(distributed.average(total)))
        return terms

    def recorded_item(self: Any, key: Any) -> tuple[Tensor, Tensor]:
        image, labels = item(self, key)
        if isinstance(key, tuple):
            content = image.numpy().tobytes() + labels.numpy().tobytes()
            images.append((*key, zlib.crc32(content)))
        return image, labels

    train.Learner.step = recorded_step  # type: ignore[method-assign]
    dataset.incremental.IncrementalSegmentation.__getitem__ = recorded_item  # type: ignore
    status = main(faults, argv)
    torch.save((losses, images), f"seen-{os.environ.get('RANK', '0')}.pt")
    return status


def main_unheard(faults: Sequence[Fault], argv: Sequence[str]) -> int:
    """Nobody reads what this process prints, as behind `| head -1`."""
    reading, writing = os.pipe()
    os.dup2(writing, 1)
    os.close(writing)
    os.close(reading)
    return main(faults, argv)


def main_nowhere(faults: Sequence[Fault], argv: Sequence[str]) -> int:
    """The working directory is gone."""
    os.mkdir("gone")
    os.chdir("gone")
    os.rmdir(os.getcwd())
    return main(faults, argv)


def main_with_gauges(faults: Sequence[Fault], argv: Sequence[str]) -> int:
    """Also writes `gauges.json`: memory in pages and open files after each epoch."""
    gauges: list[tuple[int, int]] = []
    plain = engine.fit.save_progress

    def save_progress(*arguments: Any) -> None:
        plain(*arguments)
        resident = int(Path("/proc/self/statm").read_text().split()[1])
        gauges.append((resident, len(os.listdir("/proc/self/fd"))))

    engine.fit.save_progress = save_progress
    status = main(faults, argv)
    Path("gauges.json").write_text(json.dumps(gauges))
    return status


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1]), sys.argv[2:]))
