"""Whole files of absurd content: each is refused with a line, soon and in little room."""

from __future__ import annotations

import io
import random
import resource
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import checkpoint
from engine.checkpoint import all_flags
from tests.reliability.harness import checkpoint_path, difference
from utils.errors import UserError

SECONDS, KILOBYTES = 5, 1_000_000


def deep(levels: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(levels):
        value = {"a": value}
    return value


def cycle() -> dict[str, Any]:
    value: dict[str, Any] = {}
    value["a"] = value
    return value


def laughs() -> list[Any]:
    """A list of lists of lists of the same list: 10^9 parts in a few hundred bytes."""
    value: list[Any] = [0] * 10
    for _ in range(8):
        value = [value] * 10
    return value


TENSORS: dict[str, Callable[[], torch.Tensor]] = {
    "meta": lambda: torch.ones(3, device="meta"),
    "sparse": lambda: torch.ones(3).to_sparse(),
    "expanded": lambda: torch.ones(1).expand(2**29),
    "expanded a little": lambda: torch.ones(1).expand(8, 3, 3, 3),
    "complex": lambda: torch.full((8, 3, 3, 3), complex("nan")),
    "nan": lambda: torch.full((8, 3, 3, 3), float("nan")),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
}
ABSURD: dict[str, Callable[[], Any]] = {
    "cycle": cycle, "deep": lambda: deep(100), "laughs": laughs, "none": lambda: None,
    "list": lambda: [1], "minus": lambda: -5, "large": lambda: 10**30, "nan": lambda: float("nan"),
    "text": lambda: "a\x1b[2J", "long text": lambda: "x" * 10**6, "truth": lambda: True,
    "labels": lambda: [[-5]], "far labels": lambda: [[300]], "twice": lambda: [[1, 1]],
    "no labels": list, "many": lambda: [[1] * 10**6], "bytes": lambda: b"abc",
    "tensors": lambda: [torch.ones(1)] * 3, "wide": lambda: dict.fromkeys(range(200_000)),
}  # fmt: skip
FIELDS = ("steps", "class_names", "options", "epoch", "model_state", "random_state", "finished",
          "best_score", "optimizer_state", "regularizer", "more")  # fmt: skip


def structures(count: int) -> Iterator[tuple[str, Callable[[dict[str, Any]], Any]]]:
    """`count` mutations from a seed: a tensor, a field or an option becomes something absurd."""
    rng = random.Random(5)
    options = [entry.name for entry in all_flags()]
    for _ in range(count):
        kind = rng.randrange(4)
        if kind == 0:
            name, make = rng.choice(list(TENSORS.items()))
            where = rng.choice(("model_state", "regularizer_state"))
            yield f"{where}: {name}", lambda c, m=make, w=where: c[w].update(x=m())
        elif kind == 1:
            name, make = rng.choice(list(ABSURD.items()))
            field = rng.choice(FIELDS)
            yield f"{field}: {name}", lambda c, m=make, f=field: c.update({f: m()})
        else:
            name, make = rng.choice(list(ABSURD.items()))
            option = rng.choice(options)
            yield f"{option}: {name}", lambda c, m=make, o=option: c["options"].update({o: m()})


def attempt(path: Path) -> Any:
    """What `load` makes of a file within the bounds; None where it refuses with one line."""
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        content = checkpoint.load(path, "cure")
    except UserError as error:
        content, line = None, str(error)
    else:
        line = ""
    assert line.isprintable()
    assert len(line) < 500
    assert time.monotonic() - began < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < KILOBYTES
    return content


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.long)])
def test_absurd_content(step0, tmp_path, count):
    """What passes has every field as it was, but for one that nothing reads or that fits."""
    path, source = tmp_path / "x.pth", checkpoint_path(step0)
    passed = []
    for name, change in structures(count):
        content = torch.load(source, weights_only=True)
        change(content)
        torch.save(content, path)
        if attempt(path) is not None:
            passed.append(name)
    # A free text, a flag turned on, a missing value where one may miss.
    fit = ("truth", "none", "text", "nan", "labels", "list", "no labels", "minus", "bytes",
           "far labels", "twice", "tensors")  # fmt: skip
    assert all(name.split(": ")[1] in fit for name in passed), passed
    assert not [n for n in passed if n.split(":")[0] in ("steps", "class_names", "epoch")]
    assert len(passed) < count / 3, passed


@pytest.mark.parametrize("names", [[], ["background"], [""] * 21, "abc"])
def test_classes_without_a_name(step0, tmp_path, names):
    path = tmp_path / "x.pth"
    content = torch.load(checkpoint_path(step0), weights_only=True)
    torch.save({**content, "class_names": names}, path)
    assert attempt(path) is None


@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_that_no_checkpoint_has(step0, tmp_path, kind):
    path = tmp_path / "x.pth"
    content = torch.load(checkpoint_path(step0), weights_only=True)
    content["model_state"]["body.stem.0.weight"] = TENSORS[kind]()
    torch.save(content, path)
    assert attempt(path) is None


@pytest.mark.parametrize("kind", ["zip bomb", "list", "legacy list"])
def test_files_that_promise_much(tmp_path, kind):
    path = tmp_path / "x.pth"
    if kind == "zip bomb":
        plain = io.BytesIO()
        torch.save({"model_state": {"a": torch.zeros(2**28)}, "version": 1}, plain)
        with zipfile.ZipFile(plain) as source, zipfile.ZipFile(path, "w") as packed:
            for record in source.infolist():
                packed.writestr(record.filename, source.read(record), zipfile.ZIP_DEFLATED)
        del plain
    else:
        content = {"model_state": {}, "version": 1, "steps": [[1] * 10**7]}
        torch.save(content, path, _use_new_zipfile_serialization=kind == "list")
    assert attempt(path) is None


def test_a_legacy_file_is_read(step0, tmp_path):
    path = tmp_path / "x.pth"
    content = torch.load(checkpoint_path(step0), weights_only=True)
    torch.save(content, path, _use_new_zipfile_serialization=False)
    assert not difference(attempt(path), checkpoint.load(checkpoint_path(step0), "cure"))
