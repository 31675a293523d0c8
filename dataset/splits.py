"""Which training images belong to which step: computed from the masks once, stored as lists.

    python -m dataset.splits --dataset voc --data_root data --task 15-5 --overlap

writes `data/<dataset>/<task>[-ov]/train-<step>.npy` for every step.
"""

import argparse
import hashlib
import io
import json
import logging
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dataset import DATASETS, get_spec
from dataset.incremental import foreign_label, read_mask
from dataset.spec import DatasetSpec, Sample
from tasks import Task, get_task
from utils.errors import UserError
from utils.files import atomic_write

log = logging.getLogger(__name__)

RECORD = "lists.json"  # beside the lists: which of them this program computed, and from what


def training_indices(
    spec: DatasetSpec,
    data_root: Path,
    task: Task,
    step: int,
    overlap: bool,
    workdir: Path = Path("."),
) -> np.ndarray:
    """(N,) int64 positions in the train list of the images of `step`.

    A list stored under `workdir` is used, the official ones for instance. If it is absent, or was
    computed here for other data, the lists of all steps are computed and stored; lists that someone
    else put there are never overwritten. Several processes: call it in one of them first.

    Raises:
        UserError: a list or its record is damaged or does not fit the data set; data errors; no
            image for the step.
    """
    indices = _stored_or_computed(spec, data_root, task, step, overlap, workdir)
    if len(indices) == 0:
        hint = "" if overlap or spec.partition else " in the disjoint setting, try --overlap"
        raise UserError(
            f"step {step} of task {task.name} has no training image in {data_root}{hint}; "
            "choose another task or other data"
        )
    return indices


def _stored_or_computed(
    spec: DatasetSpec, data_root: Path, task: Task, step: int, overlap: bool, workdir: Path
) -> np.ndarray:
    samples = spec.find_samples(data_root, "train")
    folder = list_folder(spec, task, overlap, workdir)
    path = folder / f"train-{step}.npy"
    record = _read_record(folder)
    if record and record["data"] != fingerprint(spec, samples):
        log.info("the lists in %s were computed for other data: computing them again", folder)
        _discard(folder, record)
        record = {}
    if path.exists():
        return _read_list(path, len(samples), record.get("sha256", {}).get(path.name))
    return _compute_lists(spec, samples, task, overlap, workdir)[step]


def list_folder(spec: DatasetSpec, task: Task, overlap: bool, workdir: Path) -> Path:
    """Folder of the lists; `-ov` only where overlapping makes a difference."""
    suffix = "-ov" if overlap and not spec.partition else ""
    return workdir / "data" / spec.name / f"{task.name}{suffix}"


# --- from class presence to lists ---


def step_indices(
    spec: DatasetSpec, presence: np.ndarray, task: Task, overlap: bool
) -> list[np.ndarray]:
    """Ascending positions of the images of every step.

    Args:
        presence: (N, K) bool: image n holds class k + 1.
        overlap: Take every image with a new class (overlapped); otherwise only those without future
            classes (disjoint). Ignored by a partitioned data set.
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
    120·(1 − added_k / n_k) + Σ_j n_j / n_k over the image's classes j; the first best decides.
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
    # Threads: decoding leaves the interpreter free, and they are safe beside CUDA and DDP.
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        rows = pool.map(lambda sample: _labels_in(spec, sample.mask), samples)
        bar = tqdm(rows, desc=f"classes in {spec.name} masks", total=len(samples), unit="mask")
        present = np.stack(list(bar))
    table = present[:, 1 : spec.num_classes + 1]
    with atomic_write(cache) as file:
        np.savez_compressed(file, presence=np.packbits(table, axis=1))
    return table


def _labels_in(spec: DatasetSpec, mask_path: str) -> np.ndarray:
    """(256,) bool: labels in a mask."""
    present = np.array(read_mask(mask_path).histogram()) > 0
    if (present & ~spec.known_labels).any():
        raise foreign_label(spec, mask_path, np.flatnonzero(present))
    return present


def _read_presence(cache: Path, shape: tuple[int, int]) -> np.ndarray | None:
    """The stored table, or None if there is none or it is damaged."""
    if not cache.exists():
        return None
    try:
        with np.load(cache, allow_pickle=False) as stored:
            table = np.unpackbits(stored["presence"], axis=1, count=shape[1]).astype(bool)
    except Exception as error:  # zip, header and array code all have their own
        log.warning("%s is damaged (%s): scanning the masks again", cache, error)
        return None
    return table if table.shape == shape else None


def fingerprint(spec: DatasetSpec, samples: Sequence[Sample]) -> str:
    """16 hex digits that change with the train list, or with size or time of any mask."""
    digest = hashlib.sha256(f"{spec.name} {spec.num_classes}\n".encode())
    for sample in samples:
        stat = os.stat(sample.mask)
        name = os.path.basename(sample.mask)
        digest.update(os.fsencode(f"{name} {stat.st_size} {stat.st_mtime_ns}\n"))
    return digest.hexdigest()[:16]


# --- stored lists ---


def _compute_lists(
    spec: DatasetSpec, samples: Sequence[Sample], task: Task, overlap: bool, workdir: Path
) -> list[np.ndarray]:
    """The lists of all steps, from the masks; those not there yet are stored."""
    data = fingerprint(spec, samples)
    cache = workdir / "data" / spec.name / f"presence-{data}.npz"
    lists = step_indices(spec, presence_table(spec, samples, cache), task, overlap)
    folder = list_folder(spec, task, overlap, workdir)
    encoded = {folder / f"train-{step}.npy": _encode(list_) for step, list_ in enumerate(lists)}
    recorded = _read_record(folder).get("sha256", {})
    ours = {
        path.name: hashlib.sha256(content).hexdigest()
        for path, content in encoded.items()
        if path.name in recorded or not path.exists() or path.read_bytes() == content
    }
    # The record comes first: a list without one counts as somebody else's.
    with atomic_write(folder / RECORD) as file:
        file.write(json.dumps({"data": data, "sha256": ours}, indent=1).encode())
    for path, content in encoded.items():
        if not path.exists():
            with atomic_write(path) as file:
                file.write(content)
    return lists


def _encode(indices: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, indices)
    return buffer.getvalue()


def _read_list(path: Path, num_samples: int, sha256: str | None) -> np.ndarray:
    """A stored list. Raises UserError if it is damaged or does not fit the data set."""
    cure = "delete it and it will be computed again"
    try:
        content = path.read_bytes()
        indices = np.load(io.BytesIO(content), allow_pickle=False)
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
    if sha256 not in (None, hashlib.sha256(content).hexdigest()):
        raise UserError(
            f"split list {path} was changed after it was computed: {cure}, "
            f"or delete {path.with_name(RECORD)} to use it as it is"
        )
    return indices.astype(np.int64)


def _read_record(folder: Path) -> dict:
    """The record of the lists computed here: {} or {"data": fingerprint, "sha256": {name: …}}."""
    path = folder / RECORD
    if not path.exists():
        return {}
    try:
        record = json.loads(path.read_bytes())
        if not (isinstance(record["data"], str) and isinstance(record["sha256"], dict)):
            raise ValueError("not a record of lists")
    except Exception as error:  # not text, not JSON, not a dictionary …
        cure = "delete it and the lists beside it"
        raise UserError(f"{path} is damaged ({error}): {cure}") from error
    return record


def _discard(folder: Path, record: dict) -> None:
    """Remove the lists of `record` that are as they were computed, and the record."""
    for name, sha256 in record["sha256"].items():
        path = folder / os.path.basename(name)
        if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
            path.unlink()
    (folder / RECORD).unlink(missing_ok=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: store the lists of all steps and print how many images each has."""
    parser = argparse.ArgumentParser(prog="python -m dataset.splits", description=__doc__)
    parser.add_argument("--dataset", choices=list(DATASETS), default="voc")
    parser.add_argument("--data_root", "--data-root", type=Path, default=Path("data"))
    parser.add_argument("--task", default="19-1")
    parser.add_argument("--overlap", "--overlapped", action="store_true")
    options = parser.parse_args(arguments)
    try:
        spec, task = get_spec(options.dataset), get_task(options.dataset, options.task)
        folder = list_folder(spec, task, options.overlap, Path("."))
        for step in range(task.num_steps):
            indices = _stored_or_computed(
                spec, options.data_root, task, step, options.overlap, Path(".")
            )
            print(f"step {step}: {len(indices)} images, {folder / f'train-{step}.npy'}")
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
