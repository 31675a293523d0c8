"""What a checkpoint file says of itself, looked at before it is believed.

`torch.load(weights_only=True)` runs no code, but it allocates what a file promises and builds
whatever a file describes. `check_archive` compares the promises with the file's size beforehand,
`check_content` looks at what was built before anything walks through it.
"""

from __future__ import annotations

import io
import pickletools
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

MOST_OPCODES = 400_000  # of a pickle; a ResNet-101 with three regularisers has about 150,000
MOST_BYTES = 8_000_000  # of the pickle itself, which holds names and shapes
MOST_NODES, MOST_LEVELS = 100_000, 16
LONGEST_TEXT = 10_000
BUILDERS = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter")
LEGACY_MAGIC = b"\x80\x02\x8a\n"  # how files from before torch 1.6 begin: four pickles, then data


def check_archive(path: Path) -> None:
    """Raises ValueError where the file promises more than it holds, or too much to read.

    Nothing is unpacked: sizes come from the zip's directory, the rest from the pickle's opcodes.
    """
    size = path.stat().st_size
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if sum(record.file_size for record in archive.infolist()) > size:
                raise ValueError("its records are larger than the file")
            if name := archive.testzip():  # torch.load does not look at the checksums
                raise ValueError(f"wrong checksum of {name!r}")
            pickles = [r for r in archive.infolist() if r.filename.endswith("data.pkl")]
            for record in pickles:
                if record.file_size > MOST_BYTES:
                    raise ValueError("its description is too long")
                _check_pickle(io.BytesIO(archive.read(record)), 0)
        return
    with path.open("rb") as file:
        legacy = file.read(len(LEGACY_MAGIC)) == LEGACY_MAGIC
        file.seek(0)
        count = 0
        for _ in range(5 if legacy else 1):  # the fifth names the storages
            count = _check_pickle(file, count)


def _check_pickle(file: BinaryIO, count: int) -> int:
    """Count the opcodes of one pickle; ValueError for too many, or a builder of other tensors."""
    start = file.tell()
    for code, argument, _ in pickletools.genops(file):
        count += 1
        if count > MOST_OPCODES or file.tell() - start > MOST_BYTES:
            raise ValueError("its description is too long")
        if code.name == "GLOBAL":
            module, _, name = str(argument).partition(" ")
            if "_rebuild" in name and (module != "torch._utils" or name not in BUILDERS):
                raise ValueError(f"it holds a kind of tensor that no checkpoint has ({name})")
    return count


def check_content(content: Any, size: int) -> None:
    """Raises ValueError for nested containers, numbers, texts or tensors that no checkpoint has.

    `size` is the file's, in bytes: the tensors together may not be much larger.
    """
    room, nodes = 4 * size + 2**20, 0
    pending = [(content, 0)]
    while pending:
        value, level = pending.pop()
        nodes += 1
        if nodes > MOST_NODES or level > MOST_LEVELS:
            raise ValueError("it is nested too deep or has too many parts")
        if isinstance(value, Tensor):
            room -= _plain_size(value)
            if room < 0:
                raise ValueError("its tensors are larger than the file")
        elif isinstance(value, dict):
            pending += [(inner, level + 1) for pair in value.items() for inner in pair]
        elif isinstance(value, list | tuple | set | frozenset):
            if len(value) > MOST_NODES:
                raise ValueError("it has too many parts")
            pending += [(inner, level + 1) for inner in value]
        elif isinstance(value, str | bytes) and len(value) > LONGEST_TEXT:
            raise ValueError("it holds a text that is too long")
        elif isinstance(value, int) and abs(value) >= 2**64:
            raise ValueError("it holds a number that is too large")


def _plain_size(tensor: Tensor) -> int:
    """Bytes of a dense tensor on the CPU whose numbers all lie in its storage."""
    if tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        raise ValueError("it holds a kind of tensor that no checkpoint has")
    if tensor.is_complex():
        raise ValueError("it holds complex numbers")
    size = tensor.numel() * tensor.element_size()
    if size > tensor.untyped_storage().nbytes():
        raise ValueError("it holds a tensor that is larger than its numbers")
    return size
