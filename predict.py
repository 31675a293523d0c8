"""Segment images with a trained model: `python predict.py --help`.

    python predict.py --ckpt checkpoints/step/voc-15-5/MIB_1.pth photos/ --out predicted

writes `predicted/masks/…png` (palette PNG, labels of the data set) and `predicted/overlays/…jpg`,
with the names and folders of the input. From Python:

    from predict import load_predictor
    predictor = load_predictor("checkpoints/step/voc-15-5/MIB_1.pth")
    labels = predictor(image)
"""

from __future__ import annotations

import utils.uncaught  # noqa: F401  before any library

# isort: split
import argparse
import errno
import os
import sys
import warnings
from collections import Counter
from collections.abc import Collection, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image

from dataset.layout import FILE
from engine.predictor import Predictor, Segmented, View, add_reference_flags, load_predictor
from utils import streams
from utils.errors import UserError, in_a_line
from utils.files import atomic_write, real
from utils.flags import Parser, number
from utils.images import SUFFIXES, read_rgb, read_size
from utils.pictures import overlay, palette
from utils.progress import bar

FOLDERS = ("masks", "overlays", "scores")


@dataclass(frozen=True)
class Job:
    """An image to segment; `name` is its place below the output folders, without suffix."""

    source: Path
    name: Path


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns its exit status: 1 if anything could not be segmented."""
    streams.make_steady()
    try:
        opts = parse(sys.argv[1:] if argv is None else list(argv))
        view = View(opts.size, opts.window, opts.scales, opts.flip, opts.batch_size)
        jobs = plan(opts.inputs, opts.out)
        predictor = load_predictor(
            opts.ckpt, opts.device, dataset=opts.dataset, task=opts.task, step=opts.step,
            backbone=opts.backbone,
        )  # fmt: skip
        print(f"{predictor.summary}; {len(jobs)} images, on {predictor.device}")
        errors = run(predictor, jobs, view, opts)
    except (UserError, OSError) as error:
        print(f"error: {in_a_line(error)}", file=sys.stderr)
        return 1
    for line in errors:
        print(f"error: {line}", file=sys.stderr)
    print(f"{len(jobs) - len(errors)} of {len(jobs)} images segmented, see {opts.out}")
    return 1 if errors else 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Command line -> options. Raises UserError."""
    parser = Parser(
        "predict.py", words="--ckpt FILE --out DIR [flags] INPUT ...", description=__doc__
    )
    add = parser.add_argument
    scale, pixels = number(float, 0.1, 10), number(int, 0)
    add("inputs", nargs="+", type=Path, metavar="INPUT", help="images, or folders of images")
    add("--ckpt", type=Path, required=True, help="checkpoint of run.py")
    add("--out", type=Path, required=True, help="folder for masks, overlays and scores")
    add("--scores", action="store_true", help="write probabilities, C H W float16, as .npz")
    add("--flip", action="store_true", help="average with the mirrored image")
    add("--scales", nargs="+", type=scale, default=[1.0], help="average over these sizes")
    add("--size", type=pixels, help="shorter side for the network, 0 = as it is (default: as "
        "tested)")  # fmt: skip
    add("--window", type=pixels, help="see what is longer than so many pixels in overlapping "
        "windows, 0 = never (default: windows of the training crop for images whose shorter side "
        "is more than twice as long)")  # fmt: skip
    add("--batch_size", type=number(int, 1), default=4, help="images of equal size, or windows, at "
        "a time")  # fmt: skip
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where to compute")
    add_reference_flags(parser)
    return parser.parse_args(list(argv))


# -------------------------------------------------------------------------------- images


def plan(inputs: Sequence[Path], out: Path) -> list[Job]:
    """A job per image of the inputs, folders searched recursively for pictures.

    With several folders, each keeps its name below the output folders. Two images of one name but
    different suffixes keep these. Raises UserError where an input is missing or empty, where two
    results would have one name, and where a result would overwrite an input or a data set's mask.
    """
    folders = [path for path in inputs if path.is_dir()]
    outputs = {real(out / name) for name in FOLDERS}
    sources: dict[Path, tuple[Path, Path]] = {}  # real path -> path as given, name with suffix
    for path in inputs:
        if not path.exists():
            raise UserError(f"no image or folder {path}: check the name")
        if _never_ends(path):
            raise UserError(f"{path} is no file: name images, or folders of images")
        prefix = Path(real(path).name) if len(folders) > 1 else Path()
        found = _pictures(path, outputs) if path in folders else [path]
        if not found:
            raise UserError(f"no picture in {path} (looked for {', '.join(SUFFIXES)})")
        for file in found:
            name = prefix / file.relative_to(path) if path in folders else Path(file.name)
            sources.setdefault(real(file), (file, name))
    stems = Counter(name.with_suffix("") for _, name in sources.values())
    jobs: dict[Path, Job] = {}
    for source, name in sources.values():
        stem = name.with_suffix("")
        job = Job(source, name if stems[stem] > 1 else stem)
        if job.name in jobs:
            other = jobs[job.name].source
            raise UserError(f"{other} and {source} have one name: use two --out folders")
        jobs[job.name] = job
    _check_out(out, sources, jobs.values())
    return list(jobs.values())


def _pictures(folder: Path, outputs: set[Path]) -> list[Path]:
    """Pictures in a folder and below, by name; not hidden ones, nor those of this program."""
    found = []
    for root, subfolders, names in os.walk(folder):
        subfolders[:] = sorted(
            name for name in subfolders
            if not name.startswith(".") and real(Path(root) / name) not in outputs
        )  # fmt: skip
        found += [
            Path(root) / name for name in sorted(names)
            if name.lower().endswith(SUFFIXES) and not name.startswith(".")
            and not _never_ends(Path(root) / name)
        ]  # fmt: skip
    return found


def _never_ends(path: Path) -> bool:
    """Whether it is a pipe or a device; a link to nowhere is not, and is told when it is read."""
    return path.exists() and not path.is_file() and not path.is_dir()


def _check_out(out: Path, sources: Container[Path], jobs: Iterable[Job]) -> None:
    """UserError where a result would take the place of one of the sources or of a true mask.

    A folder that `dataset.json` describes may keep its masks anywhere; one without may become a
    data set in the layout of own data, where images/x.png has the mask masks/x.png.
    """
    described = (out / FILE).exists()
    for job in jobs:
        if described or real(job.source.parent) == real(out / "images" / job.name.parent):
            raise UserError(
                f"{out} holds a data set, whose masks could be lost: choose another --out"
            )
        for target in targets(job, out).values():
            if real(target) in sources:
                raise UserError(f"{target} is an input: choose another --out")


def targets(job: Job, out: Path) -> dict[str, Path]:
    """Where a job's results go, by kind."""
    suffixes = {"masks": ".png", "overlays": ".jpg", "scores": ".npz"}
    return {
        kind: out / kind / job.name.parent / (job.name.name + suffix)
        for kind, suffix in suffixes.items()
    }


# ---------------------------------------------------------------------------- prediction


def run(
    predictor: Predictor, jobs: Sequence[Job], view: View, opts: argparse.Namespace
) -> list[str]:
    """Segment all images; returns a line for each that could not be."""
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    errors: list[str] = []
    sizes: dict[Job, tuple[int, int]] = {}
    for job in jobs:
        try:
            sizes[job] = read_size(job.source)
        except UserError as error:
            errors.append(str(error))
    windows = {job: predictor.layout(*size, view).window for job, size in sizes.items()}
    large = [job for job in windows if windows[job]]
    if large:
        why = "" if view.window else ", more than twice as large; --window 0 switches them off"
        print(f"windows of {windows[large[0]]} pixels for {len(large)} images{why}")
    with bar(desc="images", total=len(sizes), unit="image") as shown:
        for batch in batches(sizes, opts.batch_size, large):
            errors += segment(predictor, batch, view, opts)
            shown.update(len(batch))
    return errors


def segment(
    predictor: Predictor, batch: Sequence[Job], view: View, opts: argparse.Namespace
) -> list[str]:
    """Segment images of one size and write the results; returns a line for each that failed.

    A name too long for the results is the affair of its image alone; any other failure to write
    would meet the next image, too, and is raised.
    """
    errors: list[str] = []
    images: dict[Job, np.ndarray] = {}
    for job in batch:
        try:
            images[job] = np.asarray(read_rgb(job.source))
        except UserError as error:
            errors.append(str(error))
    found = predictor.segment(list(images.values()), view, opts.scores)
    for (job, image), result in zip(images.items(), found, strict=True):
        try:
            write(predictor, targets(job, opts.out), image, result)
        except UserError as error:
            if getattr(error.__cause__, "errno", None) != errno.ENAMETOOLONG:
                raise
            errors.append(f"{job.source}: File name too long for its results: rename it")
    return errors


def batches(
    sizes: dict[Job, tuple[int, int]], most: int, alone: Collection[Job] = ()
) -> Iterator[list[Job]]:
    """Jobs of equal size, `most` at a time, those that are `alone` one at a time."""
    for _, group in groupby(sorted(sizes, key=sizes.__getitem__), sizes.__getitem__):
        same = list(group)
        count = 1 if same[0] in alone else most
        yield from (same[i : i + count] for i in range(0, len(same), count))


def write(
    predictor: Predictor, paths: dict[str, Path], image: np.ndarray, found: Segmented
) -> None:
    """Mask, overlay and, if there are any, scores of one image, uint8 H W 3."""
    mask = Image.fromarray(found.labels)
    mask.putpalette(palette().tobytes())
    with atomic_write(paths["masks"]) as file:
        mask.save(file, "PNG")
    panel = Image.fromarray(overlay(image, found.labels, predictor.class_names))
    with atomic_write(paths["overlays"]) as file:
        panel.save(file, "JPEG", quality=92, subsampling=0)
    if found.probabilities is not None:
        names = [predictor.class_names[label] for label in predictor.labels]
        with atomic_write(paths["scores"]) as file:
            np.savez_compressed(
                file, probabilities=found.probabilities, labels=predictor.labels,
                class_names=names,
            )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
