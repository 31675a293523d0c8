"""The command line that started this program, and others made of it that a shell understands.

Imports no torch.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from utils import launcher

ROOT = Path(__file__).resolve().parents[1]  # where run.py and the other programs lie
FROM_LAUNCHER = ("local_rank",)  # what torch.distributed.launch adds to a command line


def again(argv: Sequence[str], without: Collection[str], **values: object) -> str:
    """This process's command with other flags, launcher included, quoted for a shell.

    Args:
        argv: the arguments that the program was started with.
        without: names of flags that are left out; each takes one value.
        values: flags to set, in the place where the first of them stood, else at the end.
    """
    typed = _without(argv, FROM_LAUNCHER)
    return shlex.join([*_before(typed), *_replaced(typed, without, values)])


def other(program: str, *arguments: str) -> str:
    """The command of another program of this folder, run by the same interpreter, quoted."""
    return shlex.join([_interpreter(), _shown(ROOT / program), *arguments])


def shown(*words: str) -> str:
    """A command, quoted for a shell."""
    return shlex.join(words)


def _flag(word: str) -> str:
    """`--step-ckpt=x` -> `step_ckpt`; empty for what is no flag."""
    name = word.partition("=")[0]
    return name[2:].replace("-", "_") if name.startswith("--") else ""


def _words(argv: Sequence[str], flags: Collection[str]) -> Iterator[tuple[str, str]]:
    """Every word with the name of the flag among `flags` that it belongs to, else ""."""
    owner = ""
    for word in argv:
        if owner:
            yield word, owner
            owner = ""
            continue
        name = _flag(word) if _flag(word) in flags else ""
        owner = "" if "=" in word else name
        yield word, name


def _without(argv: Sequence[str], flags: Collection[str]) -> list[str]:
    return [word for word, owner in _words(argv, flags) if not owner]


def _replaced(
    argv: Sequence[str], without: Collection[str], values: dict[str, object]
) -> list[str]:
    new = [text for name, value in values.items() for text in (f"--{name}", str(value))]
    result: list[str] = []
    for word, owner in _words(argv, {*without, *values}):
        if owner in values:
            result += new
            new = []
        elif not owner:
            result.append(word)
    return result + new


def _before(argv: list[str]) -> list[str]:
    """What stands before `argv` on the command line: launcher, interpreter and program."""
    started = _parent() if launcher.is_launched() else list(sys.orig_argv)
    words = len(started) - len(argv)
    own = _without(sys.argv[1:], FROM_LAUNCHER) == argv  # else the program was called from Python
    if own and words > 0 and started[words:] == argv:
        return [_short(word) for word in started[:words]]
    program = _shown(ROOT / "run.py")
    if not launcher.is_launched():
        return [_interpreter(), program]
    here = os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])
    return ["torchrun", f"--nproc_per_node={here}", program]


def _parent() -> list[str]:
    """The words of the command that started this process; none where the system does not say."""
    try:
        content = Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
    except OSError:
        return []
    words = [os.fsdecode(word) for word in content.split(b"\0")[:-1]]
    # A script with a first line `#!python` appears behind its interpreter.
    script = len(words) > 1 and Path(words[1]).name == "torchrun"
    return words[1:] if script else words


def _interpreter() -> str:
    return _short(sys.executable if launcher.is_launched() else sys.orig_argv[0])


def _short(word: str) -> str:
    """A program by its name where the shell finds the very same file by it."""
    path = Path(word)
    same = path.is_absolute() and shutil.which(path.name) == word
    return path.name if same else word


def _shown(path: Path) -> str:
    """Below the working directory without what leads there."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
