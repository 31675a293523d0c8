"""Checkpoints: written whole or not at all, read without running code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.errors import UserError
from utils.files import atomic_write

VERSION = 1  # of the layout; a reader refuses a newer one


def checkpoint_path(root: Path, dataset: str, task: str, overlap: bool, name: str, step: int) -> Path:
    """`checkpoints/step/<dataset>-<task>[-ov]/<name>_<step>.pth` under `root`."""
    return root / "checkpoints" / "step" / setting(dataset, task, overlap) / f"{name}_{step}.pth"


def setting(dataset: str, task: str, overlap: bool) -> str:
    """`<dataset>-<task>[-ov]`: the folder or file name of an experimental setting."""
    return f"{dataset}-{task}{'-ov' if overlap else ''}"


def save(path: Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint atomically, its layout version added."""
    with atomic_write(path) as file:
        torch.save({"version": VERSION, **content}, file)


def load(path: Path, cure: str) -> dict[str, Any]:
    """Read a checkpoint of ours or of the reference on the CPU.

    The model's keys lose their `module.` prefix. Raises UserError, ending in `cure`, where the file
    is missing, damaged, of a newer layout or not a checkpoint.
    """
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}: {cure}")
    content = load_file(path)
    if content.get("version", VERSION) != VERSION:
        raise UserError(f"{path} has layout version {content['version']}, not {VERSION}: {cure}")
    state = content.get("model_state")
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"{path} is not a checkpoint of this program (no model_state): {cure}")
    content["model_state"] = strip_module_prefix(state)
    return content


def check_fits(
    content: Mapping[str, Any],
    path: Path,
    opts: Any,
    steps: Sequence[Sequence[int]],
    step: int,
) -> None:
    """UserError unless a checkpoint is of this dataset, task, step and backbone.

    `steps` are the labels of steps 0 .. step. Two tasks that agree up to there may share the file
    (15-5 and 15-5s share their step 0). The reference's checkpoints say nothing about themselves;
    for them the shapes of the weights must do.
    """
    theirs = content.get("options")
    if theirs is None:
        return
    stored = [list(labels) for labels in content["steps"]]
    wrong = (
        ("dataset", theirs["dataset"], opts.dataset),
        ("step", len(stored) - 1, step),
        ("backbone", theirs["backbone"], opts.backbone),
        ("task", theirs["task"] if stored != [list(s) for s in steps] else opts.task, opts.task),
    )
    for what, found, wanted in wrong:
        if found != wanted:
            raise UserError(
                f"{path} is of {what} {found}, but {what} {wanted} is asked for: name another "
                f"checkpoint or the {what} it was trained with"
            )


def load_file(path: Path) -> dict[str, Any]:
    """`torch.load` on the CPU that never runs code; UserError for anything but a dict."""
    try:
        with torch.serialization.safe_globals(_numpy_scalars()):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # damaged files fail in many ways, none of them ours to tell apart
        raise UserError(
            f"{path} is damaged or holds more than weights: copy or train it again"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a checkpoint")
    return content


def strip_module_prefix(state: Mapping[str, Any]) -> dict[str, Any]:
    """Keys as saved from inside DataParallel wrappers -> plain keys."""
    return {key.removeprefix("module."): value for key, value in state.items()}


def _numpy_scalars() -> list[Any]:
    """What the reference's checkpoints hold beside tensors: a best score that is a numpy scalar."""
    scalar = np.float64(0).__reduce__()[0]
    dtypes = [type(np.dtype(kind)) for kind in (np.float32, np.float64)]
    return [np.dtype, *dtypes, (scalar, "numpy.core.multiarray.scalar"), scalar]
