"""Learn steps of a task, or test what was learned: `python run.py --help`.

Runs as a single process or under a launcher (torchrun, python -m torch.distributed.launch). Exit
status: 0 done, 1 failed with a line that says why, 75 interrupted (`--continue_ckpt` goes on).
What happens in which order stands in `engine/session.py`.
"""

from __future__ import annotations

import utils.uncaught  # noqa: F401  before any library

# isort: split
import sys
from collections.abc import Sequence

from engine.plans import parse
from utils import launcher, streams
from utils.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns its exit status. What a user can mend is a line, not a traceback."""
    streams.make_steady()
    try:
        launcher.check_environment()
        launcher.end_with_launcher()
        argv = sys.argv[1:] if argv is None else list(argv)
        plans = parse(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    # Imported this late because it imports torch, which takes seconds: `--help` and a mistyped flag
    # answer at once.
    from engine.session import execute

    return execute(plans, argv)


if __name__ == "__main__":
    sys.exit(main())
