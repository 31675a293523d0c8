"""What a program says of an error that nothing caught, where a line says more than a traceback.

A library that is not installed: how to get it. Ctrl-C outside a training, which takes it as a wish
to stop: that it was heard. Programs import this before anything else: `import utils.uncaught`.
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
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)  # Python then ends itself with the signal
    elif line is None:
        _usual(kind, error, trace)
    else:
        print(f"error: {line}", file=sys.stderr)


_usual, sys.excepthook = sys.excepthook, _tell
