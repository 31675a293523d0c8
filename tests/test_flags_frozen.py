"""The public command line: flags.json holds what users have typed into scripts, so it must stay.

A flag, a spelling or a choice may be added without touching the file; none may go, and no default
may change but those named here.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from argparser import get_parser

# The reference has 1; what is fastest depends on the machine (`utils.cores.usual_workers`).
DEFAULT_OF_THE_MACHINE = {"--num_workers"}
FROZEN = json.loads((Path(__file__).parent / "flags.json").read_text())


@pytest.mark.parametrize("spellings", FROZEN)
def test_a_flag_keeps_its_spellings_default_and_choices(spellings: str):
    frozen, parser = FROZEN[spellings], get_parser()
    known = {name: action for action in parser._actions for name in action.option_strings}
    assert set(spellings.split()) <= known.keys()
    (action,) = {known[name] for name in spellings.split()}
    default = None if spellings in DEFAULT_OF_THE_MACHINE else frozen["default"]
    assert getattr(parser.parse_args([]), action.dest) == default
    assert set(frozen.get("choices", ())) <= set(action.choices or frozen.get("choices", ()))


@pytest.mark.parametrize("spellings", FROZEN)
def test_a_flag_typed_with_its_default_leaves_the_default(spellings: str):
    frozen, parser = FROZEN[spellings], get_parser()
    on, *off = spellings.split()
    dest = next(a.dest for a in parser._actions if on in a.option_strings)
    default = frozen["default"]
    if frozen.get("switch"):
        assert getattr(parser.parse_args([on]), dest) is True
        assert [getattr(parser.parse_args([name]), dest) for name in off] == [False] * len(off)
    elif default is None:  # nothing that a user could type
        assert getattr(parser.parse_args([]), dest) is None
    else:
        typed = getattr(parser.parse_args([on, str(default)]), dest)
        assert (typed, type(typed)) == (default, type(default))


@pytest.mark.parametrize("spellings", [name for name in FROZEN if "choices" in FROZEN[name]])
def test_every_choice_is_accepted(spellings: str):
    parser = get_parser()
    dest = next(a.dest for a in parser._actions if spellings in a.option_strings)
    for choice in FROZEN[spellings]["choices"]:
        assert getattr(parser.parse_args([spellings, str(choice)]), dest) == choice


@pytest.mark.parametrize("spellings", FROZEN)
def test_dashes_stand_for_underscores(spellings: str):
    frozen, parser = FROZEN[spellings], get_parser()
    unset = {"--regularizer": "ewc", "--method": "MIB", "--recipe": "paper"}.get(spellings, "1")
    value = unset if frozen["default"] is None else str(frozen["default"])
    for name in spellings.split():
        words = [] if frozen.get("switch") else [value]
        dashed = "--" + name[2:].replace("_", "-")
        assert parser.parse_args([dashed, *words]) == parser.parse_args([name, *words])


def test_the_spelling_of_the_reference_is_known():
    assert get_parser().parse_args(["--overlapped"]).overlap is True
