"""Which training images belong to which step, computed from the masks.

    python -m dataset.splits --dataset voc --data_root data --task 15-5 --overlap [--out DIR]

prints how many images every step has and, if asked to, stores the lists as DIR/train-<step>.npy.
"""

import utils.uncaught  # noqa: F401  before any library

# isort: split
import hashlib
import logging
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from dataset.catalog import DATASETS, OWN, get_spec
from dataset.files import Sample
from dataset.spec import DatasetSpec
from tasks import Task, get_task
from utils.errors import UserError
from utils.files import atomic_write
from utils.flags import Parser
from utils.progress import bar

log = logging.getLogger(__name__)


def training_indices(
    spec: DatasetSpec, data_root: Path, task: Task, step: int, overlap: bool,
    workdir: Path = Path("."),
) -> np.ndarray:  # fmt: skip
    """(N,) int64 positions in the train list of the images of `step`.

    A list that the user put at `workdir`/data/<dataset>/<task>[-ov]/train-<step>.npy is used as it
    is, an official one for instance. Otherwise the list is computed.

    Raises:
        UserError: a given list is damaged or does not fit the data set; data errors; no image for
            the step.
    """
    samples = spec.find_samples(data_root, "train")
    suffix = "-ov" if overlap and not spec.partition else ""  # only where it makes a difference
    path = workdir / "data" / spec.name / f"{task.name}{suffix}" / f"train-{step}.npy"
    if _is_given(path):
        log.info("split list %s is used as it is", path)
        indices = _read_list(path, len(samples))
    else:
        indices = compute_lists(spec, samples, task, overlap, workdir)[step]
    if len(indices) == 0:
        hint = "" if overlap or spec.partition else " in the disjoint setting, try --overlap"
        raise UserError(
            f"step {step} of task {task.name} has no training image in {data_root}{hint}; "
            "choose another task or other data"
        )
    return indices


def _is_given(path: Path) -> bool:
    """Whether a user put a split list at `path`.

    An earlier version of the program stored the lists that it computed, perhaps for other data,
    and listed their names in lists.json.
    """
    if not path.exists():
        return False
    record = path.with_name("lists.json")
    if record.is_file() and f'"{path.name}"'.encode() in record.read_bytes():
        cure = f"delete {record} to use it as it is"
        log.info("split list %s of an earlier version is computed again; %s", path, cure)
        return False
    return True


def _read_list(path: Path, num_samples: int) -> np.ndarray:
    """A given list. Raises UserError if it is damaged or does not fit the data set."""
    cure = "delete it and the list is computed"
    try:
        if not path.is_file():  # a pipe or a device may never end
            raise OSError("it is no file")
        with path.open("rb") as file:
            indices = np.load(file, allow_pickle=False)
    except Exception as error:  # header and array code have many
        raise UserError(f"split list {path} cannot be read ({error}): {cure}") from error
    if not isinstance(indices, np.ndarray) or indices.ndim != 1 or indices.dtype.kind not in "iu":
        raise UserError(f"split list {path} is no one-dimensional array of integers: {cure}")
    if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < num_samples:
        raise UserError(
            f"split list {path} reaches outside of the {num_samples} training images: {cure}"
        )
    if len(np.unique(indices)) < len(indices):
        raise UserError(f"split list {path} names an image twice: {cure}")
    return indices.astype(np.int64)


# --- from class presence to lists ---


def compute_lists(
    spec: DatasetSpec, samples: Sequence[Sample], task: Task, overlap: bool, workdir: Path
) -> list[np.ndarray]:
    """Ascending positions in `samples` of the images of every step.

    The masks are scanned once; what they hold is cached as
    `workdir`/data/<dataset>/presence-<fingerprint>.npz, so the fingerprint tells other data.
    """
    return step_indices(spec, _presence(spec, samples, workdir), task, overlap)


def with_seen_class(
    spec: DatasetSpec, samples: Sequence[Sample], task: Task, step: int, workdir: Path
) -> np.ndarray:
    """Ascending positions in `samples` of images with a class of the steps up to `step`.

    The masks are scanned once, as by `compute_lists`. Raises UserError where no image is left.
    """
    seen = _presence(spec, samples, workdir)[:, _columns(task.seen(step))]
    indices = np.flatnonzero(seen.any(axis=1))
    if len(indices) == 0:
        raise UserError(
            f"no image to test holds a class of the steps up to {step}: --protocol mib tests all"
        )
    return indices


def _presence(spec: DatasetSpec, samples: Sequence[Sample], workdir: Path) -> np.ndarray:
    """`presence_table` with its place under `workdir`."""
    cache = workdir / "data" / spec.name / f"presence-{fingerprint(spec, samples)}.npz"
    return presence_table(spec, samples, cache)


def step_indices(
    spec: DatasetSpec, presence: np.ndarray, task: Task, overlap: bool
) -> list[np.ndarray]:
    """Ascending positions of the images of every step.

    Args:
        presence: (N, K) bool: image n holds class k + 1.
        overlap: Take every image with a new class (overlapped); otherwise only those without future
            classes (disjoint). Ignored where `spec.partition` holds.
    """
    if spec.partition:
        return _partition(spec, presence, task)
    lists = []
    for step in range(task.num_steps):
        chosen = presence[:, _columns(task.new(step))].any(axis=1)
        if not overlap:
            unseen = np.ones(presence.shape[1], dtype=bool)
            unseen[_columns(task.seen(step))] = False
            chosen &= ~presence[:, unseen].any(axis=1)
        lists.append(np.flatnonzero(chosen))
    return lists


def _columns(labels: Sequence[int]) -> list[int]:
    return [label - 1 for label in labels if label > 0]


def _partition(spec: DatasetSpec, presence: np.ndarray, task: Task) -> list[np.ndarray]:
    """One step per image, as the authors of the reference drew ADE's lists.

    Rare classes that still lack images attract: the score of a class k of the image is
    120·(1 − added_k / n_k) + Σ_j n_j / n_k over the image's classes j; the class with the highest
    score, of several the first, takes the image to its step.
    """
    if finer := (spec.joined or {}).get(task.name):
        parts = get_task(spec.name, finer)
        home = np.full(len(presence), -1)
        for labels, images in zip(parts.steps, _partition(spec, presence, parts), strict=True):
            home[images] = next(t for t in range(task.num_steps) if labels[-1] in task.new(t))
        return [np.flatnonzero(home == step) for step in range(task.num_steps)]
    step_of = np.empty(presence.shape[1], dtype=np.int64)
    for step in range(task.num_steps):
        step_of[_columns(task.new(step))] = step
    count = presence.sum(axis=0)
    added = np.zeros_like(count)
    home = np.full(len(presence), -1)
    # Class by class, each time the images not yet visited: sorted by their first class.
    for image in np.argsort(presence.argmax(axis=1), kind="stable"):
        classes = np.flatnonzero(presence[image])
        if len(classes) == 0:
            continue
        n = count[classes]
        score = 120 * (1 - added[classes] / n) + n.sum() / n
        home[image] = step_of[classes[score.argmax()]]
        added[classes[step_of[classes] == home[image]]] += 1
    return [np.flatnonzero(home == step) for step in range(task.num_steps)]


# --- from masks to class presence ---


def presence_table(spec: DatasetSpec, samples: Sequence[Sample], cache: Path) -> np.ndarray:
    """(N, K) bool: the mask of sample n holds class k + 1.

    Read from `cache` if that fits, otherwise every mask is scanned, with a progress bar, and the
    result stored. Raises UserError for a mask that cannot be read or holds a foreign label.
    """
    table = _read_presence(cache, (len(samples), spec.num_classes))
    if table is not None:
        return table
    log.info("reading which classes %d masks hold; kept in %s", len(samples), cache)
    # Threads: decoding leaves the interpreter free, and they are safe beside CUDA and DDP.
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        rows = pool.map(lambda sample: _labels_in(spec, sample.mask), samples)
        what = f"classes in {spec.name} masks"
        present = np.stack(list(bar(rows, desc=what, total=len(samples), unit="mask")))
    table = present[:, 1 : spec.num_classes + 1]
    with atomic_write(cache) as file:
        np.savez_compressed(file, presence=np.packbits(table, axis=1))
    return table


def _labels_in(spec: DatasetSpec, mask_path: str) -> np.ndarray:
    """(256,) bool: labels in a mask."""
    histogram = spec.read_mask(mask_path).histogram()
    spec.check_labels(mask_path, histogram)
    return np.array(histogram) > 0


def _read_presence(cache: Path, shape: tuple[int, int]) -> np.ndarray | None:
    """The stored table, or None if there is none or it is damaged."""
    if not cache.is_file():
        return None
    try:
        with np.load(cache, allow_pickle=False) as stored:
            table = np.unpackbits(stored["presence"], axis=1, count=shape[1]).astype(bool)
    except Exception as error:  # zip, header and array code all have their own
        log.warning("%s is damaged (%s): scanning the masks again", cache, error)
        return None
    return table if table.shape == shape else None


def fingerprint(spec: DatasetSpec, samples: Sequence[Sample]) -> str:
    """16 hex digits that change with train list, label table, or size or time of any mask."""
    digest = hashlib.sha256(f"{spec.name} {spec.num_classes}\n".encode())
    if spec.table is not None:
        digest.update(repr(spec.table.entries).encode())
    for sample in samples:
        stat = os.stat(sample.mask)
        name = os.path.basename(sample.mask)
        digest.update(os.fsencode(f"{name} {stat.st_size} {stat.st_mtime_ns}\n"))
    return digest.hexdigest()[:16]


# --- the command ---


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: print how many images each step has; with --out store the lists."""
    parser = Parser("-m dataset.splits", description=__doc__)
    add = parser.add_argument
    add("--dataset", choices=[*DATASETS, OWN], default="voc", help="folder = docs/own_data.md")
    add("--data_root", type=Path, default=Path("data"), metavar="DIR", help="as for run.py")
    add("--task", default="19-1", help="B-I: B classes, then I at a time; or a fixed name")
    add("--overlap", "--overlapped", action="store_true", help="overlapped setting")
    add("--no_partition", action="store_true", help="as for run.py")
    add("--out", type=Path, metavar="DIR", help="store the lists in this folder")
    try:
        options = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
        spec = get_spec(options.dataset, options.data_root)
        if options.no_partition:
            spec = replace(spec, partition=False)
        task = spec.task(options.task)
        samples = spec.find_samples(options.data_root, "train")
        lists = compute_lists(spec, samples, task, options.overlap, Path("."))
        for step, indices in enumerate(lists):
            stored = "" if options.out is None else _store(options.out, step, indices)
            print(f"step {step}: {len(indices)} images{stored}")
    except UserError as error:
        sys.exit(f"error: {error}")


def _store(folder: Path, step: int, indices: np.ndarray) -> str:
    """Write a list, say where. Raises UserError where there is one already."""
    path = folder / f"train-{step}.npy"
    if path.exists():
        raise UserError(f"split list {path} exists: delete it or choose another --out")
    with atomic_write(path) as file:
        np.save(file, indices)
    return f", {path}"


if __name__ == "__main__":
    main()
