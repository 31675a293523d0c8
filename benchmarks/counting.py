"""Counting what operations ask of a GPU, as they run on a CPU or on meta tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

COLUMNS = ("launches", "copies", "syncs", "collectives")
COPIES = {"_to_copy", "copy_", "clone", "_foreach_copy_", "_foreach_clone"}
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal"}
ALLOCATES = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view",
    "_reshape_alias", "lift_fresh", "set_", "resize_", "_local_scalar_dense", "scalar_tensor",
}  # fmt: skip
READS = {"cpu", "tolist", "numpy"}
# multi_tensor_apply: tensors per launch for 1 to 5 lists, blocks per launch, values per block.
TENSORS, BLOCKS, VALUES = (110, 64, 48, 36, 30), 320, 65536


class Ledger:
    """Counts by phase; while `paused`, nothing is counted."""

    def __init__(self) -> None:
        self.counts: dict[str, Counter[str]] = {}
        self.phase, self.paused = "rest", False

    def add(self, column: str, number: int = 1) -> None:
        if not self.paused:
            self.counts.setdefault(self.phase, Counter())[column] += number

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    @contextmanager
    def pause(self, paused: bool = True) -> Iterator[None]:
        before, self.paused = self.paused, paused
        try:
            yield
        finally:
            self.paused = before

    def total(self, column: str = "launches") -> int:
        return sum(row[column] for row in self.counts.values())


class Operations(TorchDispatchMode):
    """Writes every operation into a ledger."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        with self:  # in inference mode composite operations come whole
            result = func.decompose(*args, **(kwargs or {}))
        if result is not NotImplemented:
            return result
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in WAITS or (name == "index" and _has_mask(args[1])):
            self.ledger.add("syncs")
        number = _launches(func, name, args, result)
        self.ledger.add("launches", number)
        if name in COPIES:
            self.ledger.add("copies", number)
        return result


class Reads(TorchFunctionMode):
    """Sees values being fetched, which on a CPU is no operation."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = getattr(func, "__name__", "")
        given = (*args[1:], *(kwargs or {}).values())
        to_host = (
            name == "to"
            and not (kwargs or {}).get("non_blocking")
            and any(str(a) == "cpu" for a in given if isinstance(a, str | torch.device))
        )
        if name in READS or to_host:
            self.ledger.add("syncs")
        return func(*args, **(kwargs or {}))


def _has_mask(indices: Sequence[Tensor | None]) -> bool:
    return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)


def _launches(func: Any, name: str, args: Sequence[Any], result: Any) -> int:
    if func.is_view or name in ALLOCATES or name in ("detach", "alias"):
        return 0
    if name == "convolution_backward":
        return sum(args[10])
    lists = [a for a in args if isinstance(a, list | tuple) and a and isinstance(a[0], Tensor)]
    if "foreach" in name or name.startswith("_fused"):
        made = 0 if name.endswith("_") else 1
        return multi_tensor_launches([t.numel() for t in lists[0]], len(lists) + made)
    return 1


def multi_tensor_launches(sizes: Sequence[int], lists: int) -> int:
    """How many kernels multi_tensor_apply starts for tensors of these sizes in so many lists."""
    launches = tensors = blocks = 0
    for size in filter(None, sizes):
        tensors += 1
        for left in range(-(-size // VALUES), 0, -1):
            blocks += 1
            if blocks == BLOCKS or (left == 1 and tensors == TENSORS[min(lists, 5) - 1]):
                launches, blocks, tensors = launches + 1, 0, int(left > 1)
    return launches + (blocks > 0)
