"""README says what is true: its commands parse, its flags table is the parser's."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest

from argparser import Switch, get_parser, parse
from tests.conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands() -> list[str]:
    """Every command line in the code blocks of README and docs that starts run.py."""
    found = []
    for page in PAGES:
        for block in re.findall(r"^```\w*\n(.*?)^```", page.read_text(), re.S | re.M):
            lines = block.replace("\\\n", " ").splitlines()
            found += [line.strip() for line in lines if re.search(r"\brun\.py\b", line)]
    return found


@pytest.mark.parametrize("command", commands())
def test_commands_parse(command: str):
    words = shlex.split(re.sub(r"\$\w+", "0", command), comments=True)
    start = next(i for i, word in enumerate(words) if word.endswith("run.py"))
    parse(words[start + 1 :])


def test_there_are_commands_for_every_launcher():
    text = "\n".join(commands())
    assert "torchrun --nnodes" in text
    assert text.count("torch.distributed.launch") >= 4


def flags_table() -> str:
    """The flags as README shows them."""
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


def test_flags_table_is_the_parsers():
    assert flags_table() in (ROOT / "README.md").read_text()


def test_paths_that_readme_names_exist():
    text = (ROOT / "README.md").read_text()
    named = set(re.findall(r"`((?:tests|utils|docs|data|pretrained)/[\w./]*)`", text))
    named = {n for n in named if "<" not in n}
    assert named
    assert {n for n in named if not Path(ROOT, n).exists()} == set()


if __name__ == "__main__":  # python -m tests.test_readme: bring README's table up to date
    page = ROOT / "README.md"
    table = re.compile(r"(?<=\n\n)\| flag \|.*?(?=\n\n)", re.S)
    page.write_text(table.sub(lambda _: flags_table(), page.read_text()))
