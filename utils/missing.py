"""A library that is not installed ends a program with a line that says how to get it.

Programs import this before anything else: `import utils.missing`.
"""

import sys
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).resolve().parent.parent


def explain(name: str) -> str | None:
    """What to do about a missing module; None for one of Python's or of this program."""
    top = name.partition(".")[0]
    ours = (ROOT / top).is_dir() or (ROOT / f"{top}.py").is_file()
    if ours or top in sys.stdlib_module_names or not top:
        return None
    return (
        f"{sys.executable} has no module {top}: run `make setup` once and call .venv/bin/python, "
        "or `pip install -r requirements.txt`"
    )


def _tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    line = explain(error.name or "") if isinstance(error, ModuleNotFoundError) else None
    if line is None:
        _usual(kind, error, trace)
    else:
        print(f"error: {line}", file=sys.stderr)


_usual, sys.excepthook = sys.excepthook, _tell
