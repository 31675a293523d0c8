"""A trained model from Python: load a checkpoint, segment images.

    predictor = load_predictor("checkpoints/step/voc-15-5/MIB_1.pth")
    labels = predictor(image)  # H W uint8
    names = [predictor.class_names[label] for label in np.unique(labels)]
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from argparser import Options
from dataset.catalog import DATASETS, get_spec
from dataset.transform import normalize, resize
from engine.checkpoint import load
from engine.plans import parse
from methods.averaging import average_probabilities, predict_average, versions
from methods.windows import Corner, blend
from modules.norm import get_norm
from modules.structures import STRUCTURES
from segmentation_module import IncrementalSegmentationModule, load_state, make_model
from tasks import check_step
from utils.errors import UserError
from utils.pixels import Picture, as_pixels

log = logging.getLogger(__name__)

SMALLEST = 32  # pixels of a window
LONGEST = 4  # the longer side that the network sees is at most so many times the wanted shorter one


@dataclass(frozen=True)
class View:
    """How the network is shown an image.

    Attributes:
        size: Shorter side in pixels, 0 = the image's own; None = as the model was tested, in
            windows the image's own.
        window: What is longer than this many pixels, at that size, is seen in overlapping windows
            of them, whose probabilities are blended; 0 = never. None = in windows of the training
            crop if the shorter side is more than twice as long.
        scales: Probabilities are averaged over these multiples of the image, or of each window,
            0.1 to 10.
        flip: Averaged with the mirrored image or window, too.
        batch: Windows that the network sees at a time.

    Raises UserError for values out of range.
    """

    size: int | None = None
    window: int | None = None
    scales: Sequence[float] = (1.0,)
    flip: bool = False
    batch: int = 4

    def __post_init__(self) -> None:
        if self.size is not None and self.size < 0:
            raise UserError(f"size {self.size}: give pixels, 0 for an image's own")
        if self.window and self.window < SMALLEST:
            raise UserError(f"window {self.window}: give at least {SMALLEST} pixels, 0 for none")
        if not self.scales or not all(0.1 <= scale <= 10 for scale in self.scales):
            raise UserError("scales must lie between 0.1 and 10")


AS_TESTED = View()


class Layout(NamedTuple):
    """How an image is shown to the network."""

    size: tuple[int, int]  # width, height of the whole
    window: int  # side of the windows in it, in the same pixels; 0 = all at once


class Segmented(NamedTuple):
    """What a predictor says of an image."""

    labels: np.ndarray  # H W uint8, original labels of the data set
    probabilities: np.ndarray | None  # C H W float16, channels as in `Predictor.labels`


@dataclass(frozen=True)
class Predictor:
    """A trained model, and what it takes to read its answers.

    Attributes:
        model: In eval mode, on the device it computes on.
        labels: Original label of every channel.
        class_names: By original label.
        size: Shorter side of the images that the model was tested on, 0 = as they are.
        binary: Trained with a binary loss: probabilities are sigmoids.
        options: What it was trained with.
        summary: A line for people.
    """

    model: IncrementalSegmentationModule
    labels: tuple[int, ...]
    class_names: tuple[str, ...]
    size: int
    binary: bool
    options: Options
    summary: str

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.model.parameters()).device

    def __call__(
        self, image: Picture, *, size: int | None = None, window: int | None = None,
        scales: Sequence[float] = (1.0,), flip: bool = False,
    ) -> np.ndarray:  # fmt: skip
        """The label of every pixel, H W uint8: original labels of the data set.

        Args:
            image: a PIL image of any mode, as its pixels lie (`ImageOps.exif_transpose` turns it);
                an array H W 3 of uint8; a tensor 3 H W of uint8, or of floats in 0..1, which are
                rounded to 8 bit. RGB, not normalised, of any size.
            size, window, scales, flip: see `View`.

        Raises UserError for anything else.
        """
        found = self.segment([as_pixels(image)], View(size, window, scales, flip))
        return next(found).labels

    def probabilities(
        self, image: Picture, *, size: int | None = None, window: int | None = None,
        scales: Sequence[float] = (1.0,), flip: bool = False,
    ) -> np.ndarray:  # fmt: skip
        """The probability of every class in every pixel, C H W float16; arguments as of a call.

        Channel i is that of label `labels[i]`. They sum to one, unless the model is `binary`.
        """
        found = self.segment([as_pixels(image)], View(size, window, scales, flip), scores=True)
        probabilities = next(found).probabilities
        assert probabilities is not None
        return probabilities

    def layout(self, width: int, height: int, view: View = AS_TESTED) -> Layout:
        """How an image of this size is shown to the network."""
        size, window = network_size(width, height, view.size or 0), view.window
        if window is None:
            crop = self.options.crop_size
            window = crop if min(size) > 2 * crop else 0
        if 0 < window < max(size):
            return Layout(size, window)
        shorter = self.size if view.size is None else view.size
        return Layout(network_size(width, height, shorter), 0)

    @torch.inference_mode()
    def segment(
        self, images: Sequence[np.ndarray], view: View = AS_TESTED, scores: bool = False
    ) -> Iterator[Segmented]:
        """Segment a batch of uint8 images H W 3 of one size, in order; it may be empty.

        With `scores` come their probabilities; these are large, so that they are computed for one
        image after the other.
        """
        if not images:
            return
        height, width = images[0].shape[:2]
        layout = self.layout(width, height, view)
        if layout.window:
            yield from (self._in_windows(image, layout, view, scores) for image in images)
            return
        inputs = torch.stack([resize(image, layout.size) for image in images])
        maps = self._look(inputs, view)
        classes = predict_average(maps, (height, width), self.binary).cpu().numpy()
        for i, channels in enumerate(classes):
            probabilities = None
            if scores:
                one = [logits[i : i + 1] for logits in maps]
                found = average_probabilities(one, (height, width), self.binary)
                probabilities = found[0].cpu().numpy()
            yield Segmented(self._table[channels], probabilities)

    def _in_windows(
        self, image: np.ndarray, layout: Layout, view: View, scores: bool
    ) -> Segmented:
        """Segment an image, uint8 H W 3, in windows: nothing but the results has its size."""
        (height, width), seen = image.shape[:2], layout.size
        shown = (min(layout.window, seen[0]), min(layout.window, seen[1]))  # width, height
        rows, columns = -(-shown[1] * height // seen[1]), -(-shown[0] * width // seen[0])

        def look(corners: Sequence[Corner]) -> list[Tensor]:
            parts = []
            for first in range(0, len(corners), view.batch):
                some = corners[first : first + view.batch]
                cut = [image[top : top + rows, left : left + columns] for top, left in some]
                parts.append(self._look(torch.stack([resize(c, shown) for c in cut]), view))
            return [torch.cat(version) for version in zip(*parts, strict=True)]

        labels = np.empty((height, width), dtype=np.uint8)
        probabilities = None
        if scores:
            probabilities = np.empty((len(self.labels), height, width), dtype=np.float16)
        for band, found in blend(look, (height, width), (rows, columns), self.binary):
            labels[band] = self._table[found.argmax(1).cpu().numpy()]
            if probabilities is not None:
                probabilities[:, band] = found.transpose(0, 1).half().cpu().numpy()
        return Segmented(labels, probabilities)

    def _look(self, inputs: Tensor, view: View) -> list[Tensor]:
        """uint8 images B 3 H W -> logits of each version of them, B C h w."""
        images = normalize(inputs.to(self.device))
        return versions(lambda x: self.model(x).logits, images, view.scales, view.flip)

    @property
    def _table(self) -> np.ndarray:
        """Channel -> original label."""
        return np.array(self.labels, dtype=np.uint8)


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


# ----------------------------------------------------------------------------- checkpoints


def choose_device(name: str) -> torch.device:
    """auto, cpu or cuda -> device; auto takes a GPU if there is one. Raises UserError."""
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"device {name!r}: choose from auto, cpu, cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here, use --device cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def add_reference_flags(parser: argparse.ArgumentParser) -> None:
    """What a checkpoint of the reference does not say of itself: see `load_predictor`."""
    group = parser.add_argument_group("checkpoints of the reference do not know what they are")
    group.add_argument("--dataset", choices=tuple(DATASETS), help="that it was trained on")
    group.add_argument("--task", help="as for run.py")
    group.add_argument("--step", type=int, help="that it was trained for")
    group.add_argument("--backbone", choices=tuple(STRUCTURES), help="its body")


def load_predictor(
    path: str | Path,
    device: str = "auto",
    *,
    dataset: str | None = None,
    task: str | None = None,
    step: int | None = None,
    backbone: str | None = None,
) -> Predictor:
    """The model of a checkpoint, in eval mode, on `device`: auto, cpu or cuda.

    A checkpoint of run.py knows what it is; one of the reference has to be told, by the other
    arguments. Raises UserError for a file that is missing, damaged or no checkpoint, for arguments
    that are missing or not wanted, and for cuda where there is no GPU.
    """
    path, where = Path(path), choose_device(device)
    content = load(path, "check the path")
    told = {"dataset": dataset, "task": task, "step": step, "backbone": backbone}
    content.pop("optimizer_state", None)  # as large as the model
    options, steps = describe(content, path, told)
    model = make_model(
        options.backbone,
        get_norm(options.norm_act),
        [len(labels) for labels in steps],
        output_stride=options.output_stride,
        pooling=options.pooling,
    )
    load_state(model, content["model_state"], f"checkpoint {path}", "check the flags, if any")
    if not content.get("finished", True):
        log.warning("%s is of an unfinished run, epoch %s", path, content["epoch"])
    names = content.get("class_names")
    if names is None:
        names = get_spec(options.dataset, options.data_root).class_names
    labels = tuple(label for step_labels in steps for label in step_labels)
    summary = (f"{path.name}: {options.dataset} {options.task}, step {len(steps) - 1}, "
               f"{options.backbone}, {len(labels)} classes")  # fmt: skip
    size = options.crop_size if options.crop_val else 0
    return Predictor(
        model.to(where).eval(), labels, tuple(names), size, options.method.bce, options, summary
    )


def describe(
    content: Mapping[str, Any], path: Path, told: Mapping[str, Any]
) -> tuple[Options, list[list[int]]]:
    """Options and labels per step of a checkpoint: its own, or those it is `told` if it has none.

    Raises UserError for what is missing, or not wanted.
    """
    given = [name for name, value in told.items() if value is not None]
    if "options" in content and "steps" in content:
        if given:
            raise UserError(f"{path} knows what it is: drop --{', --'.join(given)}")
        return Options.from_record(content["options"]), content["steps"]
    if missing := [name for name in told if name not in given]:
        raise UserError(
            f"{path} does not say what it is (a checkpoint of the reference?): "
            f"add --{', --'.join(missing)}"
        )
    task = get_spec(told["dataset"]).task(told["task"])
    check_step(task, told["step"])
    flags = [word for name in ("dataset", "task", "backbone") for word in (f"--{name}", told[name])]
    steps = [list(labels) for labels in task.steps[: told["step"] + 1]]
    return parse(flags)[0].opts, steps
