"""Segment images with a trained model: `python predict.py --help`.

    python predict.py --ckpt checkpoints/step/voc-15-5/MIB_1.pth photos/ --out predicted

writes `predicted/masks/…png` (palette PNG, labels of the data set) and `predicted/overlays/…jpg`,
with the names and folders of the input.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from argparser import Options
from dataset.catalog import DATASETS, get_spec
from dataset.transform import normalize, resize
from engine.checkpoint import load
from engine.plans import parse as parse_run
from methods.averaging import average_probabilities, predict_average, versions
from modules.norm import get_norm
from modules.structures import STRUCTURES
from segmentation_module import IncrementalSegmentationModule, load_state, make_model
from tasks import check_step
from utils.errors import UserError
from utils.files import atomic_write
from utils.flags import Parser
from utils.pictures import overlay, palette
from utils.progress import bar

# Pillow reads more, some of it by starting other programs.
FORMATS = ("JPEG", "PNG", "TIFF", "WEBP", "BMP", "GIF", "PPM", "JPEG2000")
SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".tif", ".tiff", ".webp", ".bmp", ".gif", ".ppm",
            ".pgm", ".pbm", ".pnm", ".jp2")  # fmt: skip
ORIENTATION = 0x0112  # EXIF tag; from 5 on, width and height change places
LONGEST = 4  # the longer side that the network sees is at most so many times the wanted shorter one
FOLDERS = ("masks", "overlays", "scores")
SAYS_OF_ITSELF = ("dataset", "task", "step", "backbone")


@dataclass(frozen=True)
class Predictor:
    """A model and what it takes to read its answers."""

    model: IncrementalSegmentationModule
    labels: tuple[int, ...]  # original label of every channel
    class_names: tuple[str, ...]  # by original label
    size: int  # shorter side of the images that it was tested on, 0 = as they are
    binary: bool  # trained with a binary loss: probabilities are sigmoids
    summary: str


@dataclass(frozen=True)
class Job:
    """An image to segment; `name` is its place below the output folders, without suffix."""

    source: Path
    name: Path


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns its exit status: 1 if anything could not be segmented."""
    try:
        opts = parse(sys.argv[1:] if argv is None else list(argv))
        device = choose_device(opts.device)
        predictor = load_predictor(opts, device)
        jobs = plan(opts.inputs, opts.out)
        print(f"{predictor.summary}; {len(jobs)} images, on {device}")
        errors = run(predictor, jobs, opts, device)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for line in errors:
        print(f"error: {line}", file=sys.stderr)
    print(f"{len(jobs) - len(errors)} of {len(jobs)} images segmented, see {opts.out}")
    return 1 if errors else 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Command line -> options. Raises UserError."""
    parser = Parser(prog="predict.py", description=__doc__)
    add = parser.add_argument
    add("inputs", nargs="+", type=Path, metavar="INPUT", help="images, or folders of images")
    add("--ckpt", type=Path, required=True, help="checkpoint of run.py")
    add("--out", type=Path, required=True, help="folder for masks, overlays and scores")
    add("--scores", action="store_true", help="write probabilities, C H W float16, as .npz")
    add("--flip", action="store_true", help="average with the mirrored image")
    add("--scales", nargs="+", type=float, default=[1.0], help="average over these sizes")
    add("--size", type=int, help="shorter side for the network, 0 = as it is (default: as tested)")
    add("--batch_size", type=int, default=4, help="images of equal size at a time")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where to compute")
    group = parser.add_argument_group("checkpoints of the reference do not know what they are")
    group.add_argument("--dataset", choices=tuple(DATASETS))
    group.add_argument("--task")
    group.add_argument("--step", type=int)
    group.add_argument("--backbone", choices=tuple(STRUCTURES))
    opts = parser.parse_args(list(argv))
    if opts.batch_size < 1 or (opts.size is not None and opts.size < 0):
        raise UserError("--batch_size must be at least 1 and --size at least 0")
    if not all(0.1 <= scale <= 10 for scale in opts.scales):
        raise UserError("--scales must lie between 0.1 and 10")
    return opts


def choose_device(name: str) -> torch.device:
    """`--device` -> device; auto takes a GPU if there is one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here, use --device cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


# --------------------------------------------------------------------------------- model


def load_predictor(opts: argparse.Namespace, device: torch.device) -> Predictor:
    """The model of `--ckpt` on `device`, in eval mode."""
    content = load(opts.ckpt, "check --ckpt")
    options, steps = describe(content, opts)
    step = len(steps) - 1
    model = make_model(
        options.backbone,
        get_norm(options.norm_act),
        [len(labels) for labels in steps],
        output_stride=options.output_stride,
        pooling=options.pooling,
    )
    load_state(model, content["model_state"], f"checkpoint {opts.ckpt}", "check the flags, if any")
    if not content.get("finished", True):
        print(f"warning: {opts.ckpt} is of an unfinished run, epoch {content['epoch']}")
    names = content.get("class_names")
    if names is None:
        names = get_spec(options.dataset, options.data_root).class_names
    labels = tuple(label for step_labels in steps for label in step_labels)
    summary = (f"{opts.ckpt.name}: {options.dataset} {options.task}, step {step}, "
               f"{options.backbone}, {len(labels)} classes")  # fmt: skip
    size = options.crop_size if options.crop_val else 0
    return Predictor(
        model.to(device).eval(), labels, tuple(names), size, options.method.bce, summary
    )


def describe(content: dict[str, Any], opts: argparse.Namespace) -> tuple[Options, list[list[int]]]:
    """Options and labels per step of a checkpoint: its own, or those of the flags if it has none.

    Raises UserError for flags that are missing, or not wanted.
    """
    given = [flag for flag in SAYS_OF_ITSELF if getattr(opts, flag) is not None]
    if "options" in content and "steps" in content:
        if given:
            raise UserError(f"{opts.ckpt} knows what it is: drop --{', --'.join(given)}")
        return Options.from_record(content["options"]), content["steps"]
    if missing := [flag for flag in SAYS_OF_ITSELF if flag not in given]:
        raise UserError(
            f"{opts.ckpt} does not say what it is (a checkpoint of the reference?): "
            f"add --{', --'.join(missing)}"
        )
    task = get_spec(opts.dataset).task(opts.task)
    check_step(task, opts.step)
    flags = ["--dataset", opts.dataset, "--task", opts.task, "--backbone", opts.backbone]
    steps = [list(labels) for labels in task.steps[: opts.step + 1]]
    return parse_run(flags)[0].opts, steps


# -------------------------------------------------------------------------------- images


def plan(inputs: Sequence[Path], out: Path) -> list[Job]:
    """A job per image of the inputs, folders searched recursively for pictures.

    With several folders, each keeps its name below the output folders. Two images of one name but
    different suffixes keep these. Raises UserError where an input is missing or empty, where two
    results would have one name, and where a result would overwrite an input.
    """
    folders = [path for path in inputs if path.is_dir()]
    outputs = {(out / name).resolve() for name in FOLDERS}
    sources: dict[Path, tuple[Path, Path]] = {}  # real path -> path as given, name with suffix
    for path in inputs:
        if not path.exists():
            raise UserError(f"no image or folder {path}: check the name")
        prefix = Path(path.resolve().name) if len(folders) > 1 else Path()
        found = _pictures(path, outputs) if path in folders else [path]
        if not found:
            raise UserError(f"no picture in {path} (looked for {', '.join(SUFFIXES)})")
        for file in found:
            name = prefix / file.relative_to(path) if path in folders else Path(file.name)
            sources.setdefault(file.resolve(), (file, name))
    stems = Counter(name.with_suffix("") for _, name in sources.values())
    jobs: dict[Path, Job] = {}
    for source, name in sources.values():
        stem = name.with_suffix("")
        job = Job(source, name if stems[stem] > 1 else stem)
        if job.name in jobs:
            other = jobs[job.name].source
            raise UserError(f"{other} and {source} have one name: use two --out folders")
        jobs[job.name] = job
    for job in jobs.values():
        for target in targets(job, out).values():
            if target.resolve() in sources:
                raise UserError(f"{target} is an input: choose another --out")
    return list(jobs.values())


def _pictures(folder: Path, outputs: set[Path]) -> list[Path]:
    """Pictures in a folder and below, by name; not hidden ones, nor those of this program."""
    found = []
    for root, subfolders, names in os.walk(folder):
        subfolders[:] = sorted(
            name for name in subfolders
            if not name.startswith(".") and (Path(root) / name).resolve() not in outputs
        )  # fmt: skip
        found += [
            Path(root) / name for name in sorted(names)
            if name.lower().endswith(SUFFIXES) and not name.startswith(".")
        ]  # fmt: skip
    return found


def targets(job: Job, out: Path) -> dict[str, Path]:
    """Where a job's results go, by kind."""
    suffixes = {"masks": ".png", "overlays": ".jpg", "scores": ".npz"}
    return {
        kind: out / kind / job.name.parent / (job.name.name + suffix)
        for kind, suffix in suffixes.items()
    }


def read_size(path: Path) -> tuple[int, int]:
    """(width, height) of an image as it is meant to be seen; reads its header only."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            turned = image.getexif().get(ORIENTATION, 1) >= 5
            return (image.height, image.width) if turned else image.size
    except Exception as error:  # a decoder raises nearly anything when a file is damaged
        raise _unreadable(path, error) from error


def read_rgb(path: Path) -> Image.Image:
    """Any image as RGB: upright, transparent parts white, deep grey values scaled to 8 bit.

    Raises UserError naming a file that cannot be read.
    """
    try:
        with Image.open(path, formats=FORMATS) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith(("I", "F")):
                image = _to_8_bit(image)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image)
            return image.convert("RGB")
    except Exception as error:
        raise _unreadable(path, error) from error


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Grey values of more than 8 bit: 16 bit by its range, others by their own."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float64)).clip(0)
    highest = values.max(initial=0)
    limit = 255 if highest <= 255 and not image.mode.startswith("I;16") else 65535
    return Image.fromarray((values * (255 / max(limit, highest))).round().astype(np.uint8))


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = str(error) or type(error).__name__
    if "cannot identify" in reason:
        reason = f"no {', '.join(FORMATS)} image"
    return UserError(f"{path} cannot be read ({reason})")


# ---------------------------------------------------------------------------- prediction


def run(
    predictor: Predictor, jobs: Sequence[Job], opts: argparse.Namespace, device: torch.device
) -> list[str]:
    """Segment all images; returns a line for each that could not be read."""
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    errors: list[str] = []
    sizes: dict[Job, tuple[int, int]] = {}
    for job in jobs:
        try:
            sizes[job] = read_size(job.source)
        except UserError as error:
            errors.append(str(error))
    with bar(desc="images", total=len(sizes), unit="image") as shown:
        for batch in batches(sizes, opts.batch_size):
            images = {}
            for job in batch:
                try:
                    images[job] = read_rgb(job.source)
                except UserError as error:
                    errors.append(str(error))
            if images:
                segment(predictor, images, opts, device)
            shown.update(len(batch))
    return errors


def batches(sizes: dict[Job, tuple[int, int]], most: int) -> Iterator[list[Job]]:
    """Jobs of equal size, `most` at a time."""
    for _, group in groupby(sorted(sizes, key=sizes.__getitem__), sizes.__getitem__):
        same = list(group)
        yield from (same[i : i + most] for i in range(0, len(same), most))


@torch.inference_mode()
def segment(
    predictor: Predictor,
    images: dict[Job, Image.Image],
    opts: argparse.Namespace,
    device: torch.device,
) -> None:
    """Predict and write images of one size."""
    width, height = next(iter(images.values())).size
    shorter = predictor.size if opts.size is None else opts.size
    size = network_size(width, height, shorter)
    inputs = torch.stack([resize(image, size) for image in images.values()])
    inputs = normalize(inputs.to(device))
    maps = versions(lambda x: predictor.model(x).logits, inputs, opts.scales, opts.flip)
    channels = predict_average(maps, (height, width), predictor.binary).cpu().numpy()
    for i, (job, image) in enumerate(images.items()):
        labels = np.array(predictor.labels, dtype=np.uint8)[channels[i]]
        scores = None
        if opts.scores:  # one image at a time: these are large
            one = [logits[i : i + 1] for logits in maps]
            scores = average_probabilities(one, (height, width), predictor.binary)[0].cpu().numpy()
        write(predictor, targets(job, opts.out), image, labels, scores)


def network_size(width: int, height: int, shorter: int) -> tuple[int, int]:
    """(width, height) that the network sees of an image; `shorter` 0 leaves it as it is.

    Rounded as in evaluation, but very long images get smaller than `shorter`.
    """
    if shorter == 0:
        return width, height
    short, long = sorted((width, height))
    if long > LONGEST * short:
        shorter, short = LONGEST * shorter, long
    return max(1, width * shorter // short), max(1, height * shorter // short)


def write(
    predictor: Predictor,
    paths: dict[str, Path],
    image: Image.Image,
    labels: np.ndarray,
    scores: np.ndarray | None,
) -> None:
    """Mask, overlay and, if there are any, scores of one image."""
    mask = Image.fromarray(labels)
    mask.putpalette(palette().tobytes())
    with atomic_write(paths["masks"]) as file:
        mask.save(file, "PNG")
    panel = Image.fromarray(overlay(np.asarray(image), labels, predictor.class_names))
    with atomic_write(paths["overlays"]) as file:
        panel.save(file, "JPEG", quality=92, subsampling=0)
    if scores is not None:
        names = [predictor.class_names[label] for label in predictor.labels]
        with atomic_write(paths["scores"]) as file:
            np.savez_compressed(
                file, probabilities=scores, labels=predictor.labels, class_names=names
            )


if __name__ == "__main__":
    sys.exit(main())
