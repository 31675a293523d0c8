"""Data sets: a row each in DATASETS; the images and labels of one step of a task."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dataset.ade import ADE
from dataset.folder import folder_spec
from dataset.incremental import IncrementalSegmentation, label_map
from dataset.sampler import HOLD_OUT, generator
from dataset.spec import DatasetSpec
from dataset.transform import EvalTransform, TrainTransform
from dataset.voc import VOC
from tasks import Task, check_step
from utils.errors import UserError

DATASETS: dict[str, DatasetSpec] = {spec.name: spec for spec in (VOC, ADE)}
OWN = "folder"  # the data set that describes itself, in <data_root>/dataset.json

HELD_OUT = 0.2  # share of the training images that --cross_val validates on


@dataclass(frozen=True)
class StepDatasets:
    """What one step trains on, validates on and is tested on.

    `lists` = lengths of the data set's whole train and val list: they tell a toy set of the same
    layout from the real one.
    """

    train: IncrementalSegmentation
    val: IncrementalSegmentation
    test: IncrementalSegmentation
    lists: tuple[int, int]


def get_spec(name: str, data_root: str | Path = "data") -> DatasetSpec:
    """A row of DATASETS, or for "folder" what `data_root` says of itself.

    Raises UserError for another name, and for a data root without a fitting dataset.json.
    """
    if name == OWN:
        return folder_spec(Path(data_root))
    if name not in DATASETS:
        known = ", ".join([*DATASETS, OWN])
        raise UserError(f"unknown dataset {name!r}: choose one of {known}")
    return DATASETS[name]


def build_datasets(
    spec: DatasetSpec,
    data_root: Path,
    task: Task,
    step: int,
    *,
    overlap: bool,
    crop_size: int,
    seed: int,
    masking: bool = True,
    crop_val: bool = True,
    val_on_trainset: bool = False,
    cross_val: bool = False,
    workdir: Path = Path("."),
) -> StepDatasets:
    """The data of `step`, with the labels that training and evaluation see there.

    `masking` False keeps old labels in training; without `crop_val` validation and test see whole
    images of differing sizes, so batches of one. Validation uses the val list, with
    `val_on_trainset` the whole train list, with `cross_val` a fifth of the step's training images,
    which training then goes without. The test uses the val list, too, or with `val_on_trainset`
    the train list. A missing split list is
    computed and stored under `workdir`: with several processes, call this in one of them first.

    Raises:
        UserError: a step out of range, a negative seed, missing or unfitting files.
    """
    # Imported here, else `python -m dataset.splits` would find itself imported already.
    from dataset.splits import training_indices

    check_step(task, step)
    if seed < 0:
        raise UserError(f"random seed {seed} is negative: use --random_seed 0 or more")
    train_samples = spec.find_samples(data_root, "train")
    val_samples = spec.find_samples(data_root, "val")
    train_indices = training_indices(spec, data_root, task, step, overlap, workdir)
    eval_labels = label_map(spec, task, step, train=False)
    evaluation = eval_labels, EvalTransform(crop_size if crop_val else None), seed
    seen = train_samples if val_on_trainset else val_samples
    test = val = IncrementalSegmentation(spec, seen, np.arange(len(seen)), *evaluation)
    if cross_val:
        train_indices, held_out = hold_out(train_indices, seed)
        val = IncrementalSegmentation(spec, train_samples, held_out, *evaluation)
    labels = label_map(spec, task, step, train=True, masking=masking)
    transform = TrainTransform(crop_size)
    train = IncrementalSegmentation(spec, train_samples, train_indices, labels, transform, seed)
    return StepDatasets(train, val, test, (len(train_samples), len(val_samples)))


def hold_out(indices: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(kept, held out): `indices` split at random by `seed` alone, order kept, at least one each.

    Raises UserError if there are fewer than two.
    """
    if len(indices) < 2:
        raise UserError("--cross_val needs at least two training images: leave it out")
    number = max(1, round(HELD_OUT * len(indices)))
    held = np.zeros(len(indices), dtype=bool)
    held[generator(HOLD_OUT, seed).permutation(len(indices))[:number]] = True
    return indices[~held], indices[held]
