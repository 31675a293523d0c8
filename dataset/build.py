"""The training, validation and test set of one step of a task."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dataset.draws import HOLD_OUT, generator
from dataset.incremental import IncrementalSegmentation, label_map
from dataset.spec import DatasetSpec
from dataset.splits import training_indices, with_seen_class
from dataset.transform import EvalTransform, TrainTransform
from tasks import Task, check_step
from utils.errors import UserError

HELD_OUT = 0.2  # share of the training images that --cross_val validates on


@dataclass(frozen=True)
class StepDatasets:
    """What one step trains on, validates on and is tested on.

    `list_lengths` = images in the data set's whole train and val list: they tell a toy set of the
    same layout from the real one.
    """

    train: IncrementalSegmentation
    val: IncrementalSegmentation
    test: IncrementalSegmentation
    list_lengths: tuple[int, int]


def build_datasets(
    spec: DatasetSpec, data_root: Path, task: Task, step: int, *, overlap: bool, crop_size: int,
    seed: int, masking: bool = True, ignore_void: bool = False, rest_is_background: bool = False,
    crop_val: bool = True, val_on_trainset: bool = False, cross_val: bool = False,
    workdir: Path = Path("."),
) -> StepDatasets:  # fmt: skip
    """The data of `step`, with the labels that training and evaluation see there (`label_map`).

    Test and validation use the val list, with `val_on_trainset` the train list; with `cross_val`
    validation uses a fifth of the step's training images, which training goes without. Without
    `masking` training sees labels of old classes. Without `crop_val` whole images are evaluated,
    one in a batch. With `rest_is_background` images without a class seen so far are left out of the
    evaluation, as in the tests of PLOP (Douillard et al., CVPR 2021). Given split lists and the
    cached scan of the masks lie under `workdir`: with several processes, call this in one of them
    first. Raises UserError for a step out of range and for missing or unfitting files.
    """
    check_step(task, step)
    train_samples = spec.find_samples(data_root, "train")
    val_samples = spec.find_samples(data_root, "val")
    train_indices = training_indices(spec, data_root, task, step, overlap, workdir)
    eval_labels = label_map(spec, task, step, train=False, rest_is_background=rest_is_background)
    evaluation = eval_labels, EvalTransform(crop_size if crop_val else None), seed
    seen = train_samples if val_on_trainset else val_samples
    tested = np.arange(len(seen))
    if rest_is_background:
        tested = with_seen_class(spec, seen, task, step, workdir)
    test = val = IncrementalSegmentation(spec, seen, tested, *evaluation)
    if cross_val:
        train_indices, held_out = hold_out(train_indices, seed)
        val = IncrementalSegmentation(spec, train_samples, held_out, *evaluation)
    labels = label_map(spec, task, step, train=True, masking=masking, ignore_void=ignore_void)
    transform = TrainTransform(crop_size)
    train = IncrementalSegmentation(spec, train_samples, train_indices, labels, transform, seed)
    return StepDatasets(train, val, test, (len(train_samples), len(val_samples)))


def hold_out(indices: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Hold out the share HELD_OUT of `indices` (N,), drawn by `seed`, but at least one.

    Returns (kept, held out), both in the order of `indices`. Raises UserError if N < 2.
    """
    if len(indices) < 2:
        raise UserError("--cross_val needs at least two training images: leave it out")
    number = max(1, round(HELD_OUT * len(indices)))
    held = np.zeros(len(indices), dtype=bool)
    held[generator(HOLD_OUT, seed).permutation(len(indices))[:number]] = True
    return indices[~held], indices[held]
