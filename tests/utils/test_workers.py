"""The server that forks data workers."""

import signal
import subprocess
import sys

from tests.conftest import ROOT

PROGRAM = """
from multiprocessing import forkserver
from pathlib import PurePath
from utils import workers

workers.context(PurePath)
print(open(f"/proc/{forkserver._forkserver._forkserver_pid}/status").read())
"""


def test_ctrl_c_spares_the_server():
    """Also while it still imports: it gets the signal that a terminal sends to all processes."""
    status = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, text=True, capture_output=True, check=True
    ).stdout
    blocked = int(status.partition("SigBlk:")[2].split()[0], 16)
    for number in (signal.SIGINT, signal.SIGTERM):
        assert blocked >> (number - 1) & 1, number
