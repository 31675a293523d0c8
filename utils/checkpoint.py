"""Checkpoints: written whole or not at all, read without running code, believed only if sound."""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from methods.table import FLAGS as METHOD_FLAGS
from utils.errors import UserError
from utils.files import atomic_write

log = logging.getLogger(__name__)

VERSION = 1  # of the layout; a reader refuses any other

# What run.py writes beside `model_state`, and of which type.
FIELDS: dict[str, type | tuple[type, ...]] = {
    "optimizer_state": dict,
    "scheduler_state": dict,
    "scaler_state": dict,
    "regularizer": (dict, type(None)),
    "regularizer_state": (dict, type(None)),
    "random_state": Tensor,
    "epoch": int,
    "iteration": int,
    "best_score": float,
    "images_per_iteration": int,
    "iterations_per_epoch": int,
    "total_iterations": int,
    "finished": bool,
    "steps": list,
    "options": dict,
}
# Flags that may change from one part of a run to the next: they change nothing in what it computes.
FREE_FLAGS = {
    "name", "data_root", "num_workers", "local_rank", "logdir", "ckpt", "continue_ckpt", "test",
    "print_interval", "sample_num", "visualize", "debug", "val_interval", "ckpt_interval",
    "wandb", "wandb_project", "wandb_entity", "step_ckpt", "pretrained", "batch_size",
    "restart", "recipe", "base", "tta", "deterministic",
}  # fmt: skip
# Flags that say which run it is: with another value it is a run of its own.
IDENTITY_FLAGS = {
    "method", "random_seed", "overlap", "mask", "alpha", "icarl_disjoint", "icarl_bkg",
    "reg_alpha", "reg_iterations", "reg_no_normalize", *METHOD_FLAGS,
}  # fmt: skip


def checkpoint_path(
    root: Path, dataset: str, task: str, overlap: bool, name: str, step: int
) -> Path:
    """`checkpoints/step/<dataset>-<task>[-ov]/<name>_<step>.pth` under `root`."""
    return root / "checkpoints" / "step" / setting(dataset, task, overlap) / f"{name}_{step}.pth"


def setting(dataset: str, task: str, overlap: bool) -> str:
    """`<dataset>-<task>[-ov]`: the folder or file name of an experimental setting."""
    return f"{dataset}-{task}{'-ov' if overlap else ''}"


def save(path: Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint atomically, its layout version added.

    Raises UserError, and keeps what was there, for values that are not finite or a full disk.
    """
    if bad := _first_not_finite(content):
        raise UserError(
            f"{bad} is no longer finite: training stopped, the last checkpoint is good; "
            "lower --lr or use --amp off"
        )
    with atomic_write(path) as file:
        torch.save({"version": VERSION, **content}, file)


def load(path: Path, cure: str) -> dict[str, Any]:
    """Read a checkpoint of ours or of the reference on the CPU.

    The model's keys lose their `module.` prefix; of the reference's, which says nothing about
    itself, nothing but `model_state` is kept. Raises UserError, ending in `cure`, where the file is
    missing, damaged, of another layout, not a checkpoint, or holds values that are not finite.
    """
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}: {cure}")
    content = load_file(path)
    state = content.get("model_state")
    if not isinstance(state, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()
    ):
        raise UserError(f"{path} is not a checkpoint of this program (no model_state): {cure}")
    if "version" not in content:
        content = {}
    elif type(content["version"]) is not int or content["version"] != VERSION:
        raise UserError(f"{path} has layout version {content['version']}, not {VERSION}: {cure}")
    if wrong := _wrong_field(content):
        raise UserError(f"{path} is damaged, its {wrong!r} cannot be one: {cure}")
    content["model_state"] = strip_module_prefix(state)
    if bad := _first_not_finite(content):
        raise UserError(f"{path} holds values that are not finite, first in {bad}: {cure}")
    return content


def check_complete(content: Mapping[str, Any], path: Path, cure: str) -> None:
    """UserError, ending in `cure`, unless a loaded checkpoint holds all that a resume needs."""
    missing = [name for name in FIELDS if name not in content]
    if missing:
        raise UserError(f"{path} holds no {missing[0]!r} and cannot be resumed: {cure}")


def check_flags(content: Mapping[str, Any], path: Path, options: Mapping[str, Any]) -> None:
    """Compare the flags of a resumed run with those that the checkpoint was written with.

    UserError where they make it another run (method, seed, terms); a warning in the log where they
    make it compute something else from here on.
    """
    theirs = content["options"]
    for name in sorted(options.keys() & theirs.keys() - FREE_FLAGS):
        if options[name] != theirs[name]:
            if name in IDENTITY_FLAGS:
                raise UserError(
                    f"{path} is of a run with --{name} {theirs[name]}, this one has "
                    f"{options[name]}: give this run another --name, or leave out --continue_ckpt"
                )
            log.warning("%s was written with --%s %s, going on with %s",
                        path, name, theirs[name], options[name])  # fmt: skip


def load_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """`optimizer.load_state_dict` that checks shapes and types, too; ValueError if one differs.

    The state gets the memory format of its weight, which the file may have from another device: a
    fused optimizer walks both in the order in which they lie.
    """
    groups = zip(state["param_groups"], optimizer.param_groups, strict=True)
    # Which implementation computes is the program's affair, not the file's.
    ours = [theirs | {k: own[k] for k in ("foreach", "fused")} for theirs, own in groups]
    state = state | {"param_groups": ours}
    kinds = [{k: type(v) for k, v in group.items()} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    if kinds != [{k: type(v) for k, v in group.items()} for group in optimizer.param_groups]:
        raise ValueError("other settings of the optimizer")
    for parameter, slots in optimizer.state.items():
        for name, value in slots.items():
            if not isinstance(value, Tensor) or value.shape != parameter.shape:
                raise ValueError(f"the optimizer's {name} does not fit its weight")
            slots[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def check_fits(
    content: Mapping[str, Any],
    path: Path,
    opts: Any,
    steps: Sequence[Sequence[int]],
    class_names: Sequence[str],
) -> None:
    """UserError unless a checkpoint is of this dataset, task, step and network.

    `steps` are the labels of the steps up to that of the checkpoint, `class_names` the names of the
    dataset by label. Two tasks that agree up to there may share the file
    (15-5 and 15-5s share their step 0). The reference's checkpoints say nothing about themselves;
    for them the shapes of the weights must do.
    """
    theirs = content.get("options")
    if theirs is None:
        return
    stored = [list(labels) for labels in content["steps"]]
    wrong = (
        ("dataset", theirs["dataset"], opts.dataset),
        ("step", len(stored) - 1, len(steps) - 1),
        ("backbone", theirs["backbone"], opts.backbone),
        ("output_stride", theirs.get("output_stride", opts.output_stride), opts.output_stride),
        # In-place norms take |w| + eps for w: the same weights are another network.
        ("norm_act", _family(theirs.get("norm_act", opts.norm_act)), _family(opts.norm_act)),
        ("task", theirs["task"] if stored != [list(s) for s in steps] else opts.task, opts.task),
    )
    for what, found, wanted in wrong:
        if found != wanted:
            raise UserError(
                f"{path} is of {what} {found}, but {what} {wanted} is asked for: name another "
                f"checkpoint or the {what} it was trained with"
            )
    if list(content.get("class_names", class_names)) != list(class_names):
        raise UserError(f"{path} is of other classes than this dataset's: name another checkpoint")


def _family(norm: str) -> str:
    """iabn or abn: what the same weights mean does not depend on synchronisation."""
    return "iabn" if norm.startswith("iabn") else "abn"


def load_file(path: Path) -> dict[str, Any]:
    """`torch.load` on the CPU that never runs code; UserError for anything but a dict."""
    try:
        if zipfile.is_zipfile(path):
            _check_sums(path)
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


def _check_sums(path: Path) -> None:
    """Raises BadZipFile where a record's CRC-32 is wrong: `torch.load` does not look at them.

    Takes half a second for a gigabyte. Files older than the zip format of torch 1.6 have no sums.
    """
    with zipfile.ZipFile(path) as archive:
        if name := archive.testzip():
            raise zipfile.BadZipFile(f"wrong checksum of {name}")


def _wrong_field(content: Mapping[str, Any]) -> str:
    """Name of a field of the wrong type or range; empty if there is none."""
    for name, kind in FIELDS.items():
        value = content.get(name)
        if name in content and not isinstance(value, kind):
            return name
        if kind is int and isinstance(value, int) and value < 0:
            return name
    for labels in content.get("steps", []):
        if not isinstance(labels, list) or not all(type(label) is int for label in labels):
            return "steps"
    options = content.get("options")
    if options is not None and not all(
        isinstance(options.get(name), str) for name in ("dataset", "task", "backbone")
    ):
        return "options"
    return ""


def _first_not_finite(content: Mapping[str, Any]) -> str:
    """Where the first value lies that is not finite, as `model_state.cls.0.bias`; else empty."""
    return next((name for name, tensor in _tensors(content, "") if not _finite(tensor)), "")


def _finite(tensor: Tensor) -> bool:
    # The sum is finite if all are (float64 has the room), and needs no second tensor.
    if tensor.layout is not torch.strided or not tensor.is_floating_point():
        return True
    return bool(tensor.sum(dtype=torch.float64).isfinite())


def _tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Tensors anywhere inside, and the way to them."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _tensors(inner, f"{name}.{key}" if name else str(key))


def _numpy_scalars() -> list[Any]:
    """What the reference's checkpoints hold beside tensors: a best score that is a numpy scalar."""
    scalar = np.float64(0).__reduce__()[0]
    dtypes = [type(np.dtype(kind)) for kind in (np.float32, np.float64)]
    return [np.dtype, *dtypes, (scalar, "numpy.core.multiarray.scalar"), scalar]
