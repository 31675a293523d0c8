"""Checkpoint files: written whole or not at all, read without running code."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from utils.errors import UserError
from utils.files import atomic_write
from utils.untrusted import check_archive, check_content

VERSION = 1  # of the layout; a reader refuses any other


def save(path: Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint atomically, its layout version added.

    Raises UserError, and keeps what was there, for values that are not finite or a full disk.
    """
    if bad := first_not_finite(content):
        raise UserError(
            f"{bad} is no longer finite: training stopped; "
            "lower --lr or use --amp off"
        )
    with atomic_write(path) as file:
        torch.save({"version": VERSION, **content}, file)


def checksum(weights: Mapping[str, Tensor]) -> int:
    """CRC-32 of named tensors, whatever their device, memory format and order."""
    total = 0
    for name in sorted(weights):
        total = zlib.crc32(name.encode(), total)
        values = weights[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        total = zlib.crc32(values.numpy().data, total)
    return total


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


def load_file(path: Path) -> dict[str, Any]:
    """`torch.load` on the CPU that never runs code; UserError for anything but a dict.

    Size and structure are checked before they are believed, see `utils/untrusted.py`.
    """
    if not path.is_file():  # a pipe or a device may never end
        raise UserError(f"{path} is no file")
    try:
        check_archive(path)
        with torch.serialization.safe_globals(_numpy_scalars()):
            content = torch.load(path, map_location="cpu", weights_only=True)
        check_content(content, path.stat().st_size)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # damaged files fail in many ways, none of them ours to tell apart
        raise UserError(
            f"{path} is damaged or holds more than weights{_why(error)}: copy or train it again"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a checkpoint")
    return content


def _why(error: Exception) -> str:
    """What our own checks found, in brackets; the words of others help nobody."""
    return f" ({error})" if type(error) is ValueError and len(str(error)) < 200 else ""


def strip_module_prefix(state: Mapping[str, Any]) -> dict[str, Any]:
    """Keys as saved from inside DataParallel wrappers -> plain keys."""
    return {key.removeprefix("module."): value for key, value in state.items()}


def first_not_finite(content: Mapping[str, Any]) -> str:
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
