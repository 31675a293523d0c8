"""From two files to a training sample: ours against an ordinary pipeline of PIL and torchvision.

    python -m benchmarks.data [--data_root FOLDER] [--crop_size 512] [--json FILE]
    python -m benchmarks.data --workers 0 1 2 4         through the DataLoader of a run

FOLDER holds data in the layout of VOC; without one, toy data is made. The images are read as they
are and resized to a longer side of 500 (those of VOC) and 2000 pixels, each in two forms: `ready`
counts all work up to a normalised batch on the device, `worker` the part that workers do, without
which no GPU can start. Ours leaves the normalisation to the device. All on one core, with the same
crops on both sides, in float32.

The plain side is written here as such pipelines usually are: open, crop, resize and flip two PIL
images, look the labels up in a table, ToTensor, Normalize.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms import functional as TF

from benchmarks.harness import Row, Work, compare, parser, report, start
from dataset.draws import AUGMENT, generator
from dataset.files import Sample
from dataset.incremental import IncrementalSegmentation, collate, label_map
from dataset.sampler import TrainBatchSampler
from dataset.transform import FLIP_PROBABILITY, TrainTransform, normalize, random_crop
from dataset.voc import VOC
from tasks import get_task
from utils import workers
from utils.constants import IMAGENET_MEAN, IMAGENET_STD

SEED = 0
LABELS = label_map(VOC, get_task("voc", "15-5"), 1, train=True)

Samples = Sequence[Sample]
Pipeline = tuple[Dataset[tuple[Tensor, Tensor]], Callable[[Any], Any]]  # with its collate function


def ours(samples: Samples, size: int) -> Pipeline:
    indices = np.arange(len(samples))
    transform = TrainTransform(size)
    return IncrementalSegmentation(VOC, samples, indices, LABELS, transform, SEED), collate


def plain(samples: Samples, size: int) -> Pipeline:
    return Plain(samples, size), default_collate


class Plain(Dataset[tuple[Tensor, Tensor]]):
    """Normalised float32 images (3 H W) and labels uint8 (H W)."""

    def __init__(self, samples: Samples, size: int) -> None:
        self.samples = list(samples)
        self.size = [size, size]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        epoch, i = key
        image = Image.open(self.samples[i].image).convert("RGB")
        mask = Image.open(self.samples[i].mask)
        rng = generator(AUGMENT, SEED, epoch, i)
        left, top, width, height = random_crop(rng, *image.size)
        box = (top, left, height, width)
        image = TF.resized_crop(image, *box, self.size, TF.InterpolationMode.BILINEAR)
        mask = TF.resized_crop(mask, *box, self.size, TF.InterpolationMode.NEAREST)
        if rng.random() < FLIP_PROBABILITY:
            image, mask = TF.hflip(image), TF.hflip(mask)
        pixels = TF.normalize(TF.to_tensor(image), IMAGENET_MEAN, IMAGENET_STD)
        return pixels, torch.from_numpy(LABELS[np.array(mask)])


def in_turn(
    build: Callable[[Samples, int], Pipeline],
    samples: Samples, size: int, batch: int, device: str | None,
) -> Callable[[], object]:  # fmt: skip
    """Reads every sample; batches are normalised on `device`, or with None left as they come."""
    torch.set_num_threads(1)
    data, collate_fn = build(samples, size)
    if device == "cpu":
        collate_fn = default_collate  # a network on a CPU wants its images transposed
    batches = list(TrainBatchSampler(len(samples), batch, seed=SEED))

    def read() -> None:
        for keys in batches:
            images, _ = collate_fn([data[key] for key in keys])
            if device:
                images = images.to(device)
                if images.dtype is torch.uint8:
                    normalize(images)

    return read


def through_loader(
    build: Callable[[Samples, int], Pipeline], samples: Samples, size: int, batch: int, count: int
) -> Callable[[], object]:
    """One epoch as `run.py` loads it for a GPU, with `count` workers that persist."""
    torch.set_num_threads(1)
    data, collate_fn = build(samples, size)
    loader = DataLoader(
        data,
        batch_sampler=TrainBatchSampler(len(samples), batch, seed=SEED),
        collate_fn=collate_fn,
        num_workers=count,
        multiprocessing_context=workers.context() if count else None,
        worker_init_fn=workers.obey_parent,
        persistent_workers=count > 0,
    )

    def read() -> None:
        for _ in workers.start(loader):
            pass

    return read


def find(root: Path | None, count: int, folder: Path) -> Samples:
    """The first `count` training samples below `root`; without it, of toy data made in `folder`."""
    if root is None:
        root = folder / "toy"
        script = Path(__file__).resolve().parents[1] / "data" / "make_toy.py"
        command = [script, "--out", root, "--train", count, "--val", 1, "--size", 320]
        subprocess.run([sys.executable, *map(str, command)], check=True, stdout=subprocess.DEVNULL)
    return VOC.find_samples(root, "train")[:count]


def resized(samples: Samples, side: int, folder: Path) -> Samples:
    """Copies in `folder` of size `side` x 3/4 `side` or the other way round, as JPEG and PNG."""
    folder.mkdir()
    copies = []
    for i, sample in enumerate(samples):
        copies.append(Sample(str(folder / f"{i}.jpg"), str(folder / f"{i}.png")))
        image, mask = Image.open(sample.image), Image.open(sample.mask)
        size = (side, side * 3 // 4) if image.width >= image.height else (side * 3 // 4, side)
        image.resize(size, Image.Resampling.BICUBIC).save(copies[-1].image, quality=92)
        mask.resize(size, Image.Resampling.NEAREST).save(copies[-1].mask)
    return copies


def rates(rows: Sequence[Row], count: int) -> None:
    """Print the medians by sample."""
    print()
    for row in rows:
        seconds = row.summary()["ours s"] / count, row.summary()["plain s"] / count
        text = (f"{1000 * s:.2f} ms ({1 / s:.0f} a second)" for s in seconds)
        print("{}: a sample takes {}, plain {}".format(row.name, *text))


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--data_root", type=Path, metavar="FOLDER", help="data in the layout of VOC")
    p.add_argument("--samples", type=int, default=64, help="so many of the training list")
    p.add_argument("--crop_size", type=int, default=512)
    p.add_argument("--batch_size", type=int, default=4)
    p.add_argument("--sides", type=int, nargs="*", default=[500, 2000], help="resize to, too")
    p.add_argument("--workers", type=int, nargs="+", help="measure the loader with so many instead")
    args = p.parse_args()
    cases: dict[str, tuple[Work, Work]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        samples = find(args.data_root, args.samples, folder)
        sets = {"photographs" if args.data_root else "toy data": samples}
        if args.workers is None:
            sets |= {f"{s} pixels": resized(samples, s, folder / str(s)) for s in args.sides}
        for name, found in sets.items():
            shape = (found, args.crop_size, args.batch_size)
            for count in args.workers or ():
                loads = partial(through_loader, ours, *shape, count)
                cases[f"{count} workers"] = loads, partial(through_loader, plain, *shape, count)
            for form, device in (("ready", args.device), ("worker", None)):
                if args.workers is None:
                    reads = partial(in_turn, ours, *shape, device)
                    cases[f"{name}, {form}"] = reads, partial(in_turn, plain, *shape, device)
        rows = compare(cases, args)
    rates(rows, len(samples) // args.batch_size * args.batch_size)
    report(cases, rows, args.json)


if __name__ == "__main__":
    start(main)
