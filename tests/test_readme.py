"""README and docs say what is true: commands parse, tables are the program's."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import export
import predict
import report
from argparser import get_parser
from benchmarks import ceilings, data, eval, loss, norm, startup, step
from dataset import check, from_coco, splits
from dataset.voc import VOC
from engine import gallery
from engine.plans import parse
from methods.table import METHODS, Method
from tests.checkpoints import picture, write_checkpoint
from tests.conftest import ROOT
from utils.flags import Switch, flags_of
from utils.version import VERSION

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(program: str) -> list[str]:
    """The command lines in the code blocks of README and docs that hold `program`."""
    found = []
    for page in PAGES:
        for block in re.findall(r"^```\w*\n(.*?)^```", page.read_text(), re.S | re.M):
            lines = [line.strip() for line in block.replace("\\\n", " ").splitlines()]
            found += [line for line in lines if program in line.split() and line[0] not in "+-@"]
    return found


def arguments(command: str, program: str) -> list[str]:
    words = shlex.split(re.sub(r"\$\w+", "0", command), comments=True)
    return words[words.index(program) + 1 :]


@pytest.fixture
def garden(tmp_path, monkeypatch) -> None:
    """The folder of docs/own_data.md, with the dataset.json that stands there."""
    page = (ROOT / "docs" / "own_data.md").read_text()
    (text,) = re.findall(r"^```json\n(.*?)^```", page, re.S | re.M)
    for folder, save in (("images", "jpg"), ("masks", "png")):
        (tmp_path / "garden" / folder).mkdir(parents=True)
        for name in "abcde":
            picture = Image.new("RGB" if save == "jpg" else "L", (8, 8))
            picture.save(tmp_path / "garden" / folder / f"{name}.{save}")
    (tmp_path / "garden" / "dataset.json").write_text(text)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("command", commands("run.py") + commands("docs/slurm.sh"))
def test_commands_parse(command: str, garden):
    assert parse(arguments(command, "run.py" if "run.py" in command else "docs/slurm.sh"))


OTHERS = {
    "predict.py": predict, "report.py": report, "export.py": export, "dataset.check": check,
    "dataset.splits": splits, "dataset.from_coco": from_coco, "engine.gallery": gallery,
    "data/make_toy.py": None,
    **{f"benchmarks.{m.__name__.split('.')[-1]}": m
       for m in (ceilings, data, eval, loss, norm, startup, step)},
}  # fmt: skip


@pytest.mark.parametrize(("program", "command"), [(p, c) for p in OTHERS for c in commands(p)])
def test_commands_of_other_programs_parse(program: str, command: str, monkeypatch):
    class Parsed(Exception):
        pass

    def stop(self, args=None, namespace=None):
        raise Parsed(original(self, args, namespace))

    original = argparse.ArgumentParser.parse_known_args  # the others call it
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
    argv = arguments(command, program)
    if "--help" not in argv:
        with pytest.raises(Parsed):
            OTHERS[program].main(argv)


def test_make_targets_exist():
    text = "\n".join(page.read_text() for page in PAGES)
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", text, re.M))
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert {"demo", "test", "setup"} <= named
    assert named <= targets


def test_the_version_to_cite_is_this_one():
    assert f"version = {{{VERSION}}}," in (ROOT / "README.md").read_text()


def test_there_are_commands_for_every_launcher():
    text = "\n".join(commands("run.py"))
    assert "torchrun --nnodes" in text
    assert text.count("torch.distributed.launch") >= 4


def test_the_lines_of_python_run(tmp_path, monkeypatch):
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.S | re.M)
    (lines,) = (block for block in blocks if "load_predictor" in block)
    assert len(lines.splitlines()) == 3
    (path,) = re.findall(r'"(.*?\.pth)"', lines)
    monkeypatch.chdir(tmp_path)
    write_checkpoint(Path(path))
    pixels = np.array(picture(50, 40))
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    for image in (Image.fromarray(pixels), pixels, tensor, tensor / 255):
        names = {"image": image}
        exec(lines, names)
        predictor, labels = names["predictor"], names["labels"]
        assert (labels.shape, labels.dtype) == ((40, 50), np.uint8)
        assert {predictor.class_names[label] for label in np.unique(labels)} <= set(VOC.class_names)
        assert predictor.probabilities(image).shape == (len(predictor.labels), 40, 50)


def flags_table() -> str:
    """The flags as docs/flags.md shows them."""
    lines = ["| flag | default | what it does |", "|---|---|---|"]
    for group in get_parser()._action_groups:
        if group.title == "options" or group.title is None or not group._group_actions:
            continue
        lines.append(f"| **{group.title.split(' (')[0]}** | | |")
        lines += [flag_row(action) for action in group._group_actions]
    return "\n".join(lines)


def flag_row(action: argparse.Action) -> str:
    flag = max(action.option_strings[:1], key=len)
    mark = " ±" if isinstance(action, Switch) else ""
    default = "" if action.default is None else str(action.default)
    if isinstance(action.default, bool):
        default = "on" if action.default else "off"
    choices = " {" + ", ".join(map(str, action.choices)) + "}" if action.choices else ""
    text = (action.help or "").replace("%%", "%") + choices
    return f"| `{flag}`{mark} | {default} | {text} |"


def methods_table() -> str:
    """The rows of METHODS as docs/methods.md shows them."""
    lines = ["| method | paper | flags | otherwise |", "|---|---|---|---|"]
    for method in METHODS.values():
        values = {
            entry.name: value
            for entry in flags_of(Method)
            if (value := getattr(method, entry.name)) != entry.default
        }
        cases = [
            f"{case.dataset}{f' {case.task}' if case.task else ''}: {spelled(case.values)}"
            for case in method.cases
        ]
        cells = (method.name, method.paper, spelled(values), "; ".join(cases))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def papers_table() -> str:
    """The rows of METHODS as README shows them."""
    rows = [f"| {method.name} | {method.paper} |" for method in METHODS.values()]
    return "\n".join(["| method | paper |", "|---|---|", *rows])


def spelled(values: Mapping[str, object]) -> str:
    """Flags as they would be typed."""
    flags = (f"--{k}" + ("" if v is True else f" {v}") for k, v in values.items())
    return " ".join(f"`{flag}`" for flag in flags)


# Page, first cells of the table, the table.
TABLES = [
    ("docs/flags.md", "| flag |", flags_table),
    ("README.md", "| method | paper |", papers_table),
    ("docs/methods.md", "| method | paper |", methods_table),
]


@pytest.mark.parametrize(("page", "cells", "make"), TABLES)
def test_tables_are_those_of_the_program(page: str, cells: str, make):
    assert make() + "\n\n" in (ROOT / page).read_text()


def test_sections_of_the_methods_are_of_methods_that_exist():
    titles = re.findall(r"^## (.*)", (ROOT / "docs" / "methods.md").read_text(), re.M)
    named = {name for title in titles for name in title.split(", ") if name.isupper()}
    assert {"FT", "MIB", "PLOP"} <= named <= set(METHODS)


def test_paths_that_readme_names_exist():
    text = (ROOT / "README.md").read_text()
    named = set(re.findall(r"`((?:tests|utils|docs|data|pretrained)/[\w./]*)`", text))
    named |= set(re.findall(r"\]\(([^)#]+)\)", text)) - {"https://arxiv.org/abs/2002.00718"}
    named = {n for n in named if "<" not in n}
    assert named
    assert {n for n in named if not Path(ROOT, n).exists()} == set()


if __name__ == "__main__":  # python -m tests.test_readme: bring the generated tables up to date
    for name, cells, make in TABLES:
        file = ROOT / name
        table = re.compile(rf"(?<=\n\n){re.escape(cells)}.*?(?=\n\n)", re.S)
        made = make()
        file.write_text(table.sub(lambda _, made=made: made, file.read_text()))  # type: ignore[misc]
