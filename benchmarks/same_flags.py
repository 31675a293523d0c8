"""Does a checkout accept the command lines of another one? For benchmarks.same_bits.

The new parser is asked through the command line alone: run.py gets the flag, then a step that no
task has. If its one-line error is in argparse's words for a wrong command line, the flag was
refused; any other one-line error came after the parser was content. That a typed default changes
nothing cannot be seen this way: same_bits types all of them in a run.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.same_values import Comparisons

REFUSED = re.compile(r"argument -|unknown flag|unrecognized arguments|arguments are required")
READ = """
import argparser, json
rows = [[a.option_strings, 0 if isinstance(a.default, bool) else a.nargs, a.default,
         list(a.choices or ())]
        for a in argparser.get_parser()._actions if a.dest not in ("help", "version")]
print(json.dumps(rows + [[[flag], 0, None, []] for flag in argparser.SYNONYMS]))
"""
# Runs run.py as a program for each list of arguments, but imports torch only once.
ASK = """
import contextlib, io, json, runpy, sys
script, answers = sys.argv[1], []
sys.path.insert(0, script.rpartition("/")[0])
for arguments in json.load(sys.stdin):
    sys.argv = [script, *arguments]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = runpy.run_path(script, run_name="__main__") and 0
        except SystemExit as end:
            status = end.code
        except Exception as error:
            status = repr(error)
    answers.append([status or 0, out.getvalue(), err.getvalue()])
print(json.dumps(answers))
"""


class Flag(NamedTuple):
    """An action of the old parser; a switch has `nargs` 0 and one or two spellings."""

    strings: list[str]
    nargs: int | None
    default: Any
    choices: list[Any]

    def typed_default(self) -> list[str]:
        """The default as a user types it; empty where nothing can be typed."""
        if self.nargs == 0:
            return [self.strings[not self.default]] if len(self.strings) == 2 else []
        return [] if self.default is None else [f"{self.strings[0]}={self.default}"]

    def commands(self) -> list[list[str]]:
        """The default, every choice and every side of a switch, with `_` and with `-`."""
        if self.nargs == 0:
            typed = [[name] for name in self.strings]
        else:
            values = [*([] if self.default is None else [self.default]), *self.choices]
            typed = [[name, str(v)] for name in self.strings for v in dict.fromkeys(values)]
        dashed = [["--" + name[2:].replace("_", "-"), *value] for name, *value in typed]
        return typed + [command for command in dashed if command not in typed]


def read_flags(checkout: Path) -> list[Flag]:
    """The flags of a checkout of which `argparser.get_parser` makes the parser."""
    done = subprocess.run(
        [sys.executable, "-c", READ], cwd=checkout, capture_output=True, text=True, check=True
    )
    return [Flag(*row) for row in json.loads(done.stdout)]


def ask(checkout: Path, commands: Sequence[list[str]], cwd: Path) -> list[tuple[Any, str, str]]:
    """Exit status, stdout and stderr of run.py for each list of arguments."""
    done = subprocess.run(
        [sys.executable, "-c", ASK, str(checkout / "run.py")], cwd=cwd,
        input=json.dumps(commands), stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return [tuple(answer) for answer in json.loads(done.stdout)]


def refusal(answer: tuple[Any, str, str]) -> str:
    """Why the command line was not accepted; empty if it was."""
    status, _, said = answer
    last = (said.splitlines() or [""])[-1]  # --debug puts a traceback in front
    sound = status == 1 and last.startswith("error: ") and not REFUSED.search(last)
    return "" if sound else f"status {status}, {last!r:.200}"


def compare_flags(results: Comparisons, checkout: Path, flags: Sequence[Flag], cwd: Path) -> None:
    """--help names every flag and run.py accepts all of its commands, each alone."""
    commands = [[*command, "--step", "99"] for flag in flags for command in flag.commands()]
    answers = ask(checkout, [["--help"], ["--no_such_flag"], *commands], cwd)
    (_, text, _), unknown, *rest = answers
    results.add("an unknown flag is refused", [] if refusal(unknown) else [unknown[2]])
    said = {tuple(command): refusal(answer) for command, answer in zip(commands, rest, strict=True)}
    for flag in flags:
        own = [(*command, "--step", "99") for command in flag.commands()]
        wrong = [f"{' '.join(c[:-2])} gives {said[c]}" for c in own if said[c]]
        if flag.nargs != 0 or flag.default is not None:  # synonyms are not in the help
            wrong += [f"--help lacks {name}" for name in flag.strings
                      if not re.search(rf"(?<![\w-]){name}(?![\w-])", text)]  # fmt: skip
        how = f"{len(own)} command lines" if own else "listed; no default and no choice to type"
        results.add(f"{' '.join(flag.strings)} ({how})", wrong)
