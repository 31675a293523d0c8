"""docs/slurm.sh with stand-ins for Slurm's two commands: two launchers on loopback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT
from tests.test_run import SMALL, make_toy
from utils.results import read_results

SRUN = """#!/bin/bash
# Two nodes, one task each, as `srun` starts them with --ntasks-per-node=1.
SLURM_NODEID=0 "$@" & first=$!
SLURM_NODEID=1 "$@" & second=$!
wait $first && wait $second
"""


def test_two_nodes_learn_a_step(tmp_path: Path):
    toy = make_toy(tmp_path / "toy")
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", "#!/bin/sh\necho localhost\n")):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    # The script runs from the repository; a link stands for it, so that files land in tmp_path.
    (tmp_path / "run.py").symlink_to(ROOT / "run.py")
    environment = os.environ | {
        "PATH": f"{commands}:{os.environ['PATH']}", "PYTHON": sys.executable, "PROCESSES": "1",
        "SLURM_NNODES": "2", "SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "node[0-1]",
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = ["bash", str(ROOT / "docs" / "slurm.sh"), "--data_root", str(toy), *SMALL]
    command += ["--batch_size", "2", "--name", "s"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("mean IoU with background") == 1
    (row,) = read_results(tmp_path / "logs" / "results" / "voc-15-5-ov-agg.csv")
    assert row["name"] == "s"
