"""Where the files of a run lie, and the files that it starts from."""

from __future__ import annotations

from glob import escape
from pathlib import Path

from argparser import Options
from engine.checkpoint import load
from tasks import Task
from utils.results import ResultKey

WORKDIR = Path(".")  # checkpoints, logs and split lists lie under the working directory


def setting(opts: Options) -> str:
    """`<dataset>-<task>[-ov]`: one experimental setting."""
    return f"{opts.dataset}-{opts.task}{'-ov' if opts.overlap else ''}"


def checkpoint_path(opts: Options, name: str, step: int) -> Path:
    """`checkpoints/step/<setting>/<name>_<step>.pth`."""
    return WORKDIR / "checkpoints" / "step" / setting(opts) / f"{name}_{step}.pth"


def own_checkpoint(opts: Options) -> Path:
    """Where the checkpoint of this step of this run lies."""
    return checkpoint_path(opts, opts.name, opts.step)


def log_folder(opts: Options) -> Path:
    """`<logdir>/<setting>/<name>/step-<t>`: curves and pictures of the step."""
    return Path(opts.logdir) / setting(opts) / opts.name / f"step-{opts.step}"


def result_key(opts: Options) -> ResultKey:
    """What the step's rows in the result files are found by."""
    return ResultKey(opts.name, opts.method.name, opts.step, opts.random_seed)


def previous_checkpoint(opts: Options, task: Task) -> tuple[Path, str]:
    """The checkpoint of step t - 1, and what a user is to do where it is missing."""
    if opts.step_ckpt:
        return Path(opts.step_ckpt), "check --step_ckpt"
    if opts.base and opts.step == 1:
        return base_checkpoint(opts, task), f"train step 0 with --base {opts.base} first"
    cure = f"train step {opts.step - 1} with the same --name first, or pass --step_ckpt"
    return checkpoint_path(opts, opts.name, opts.step - 1), cure


def base_checkpoint(opts: Options, task: Task) -> Path:
    """The step 0 shared under `--base`: of this task, else of one that agrees on its classes."""
    assert opts.base is not None
    own = checkpoint_path(opts, opts.base, 0)
    if own.exists():
        return own
    # --base and dataset are names, not patterns
    for path in sorted(own.parent.parent.glob(f"{escape(opts.dataset)}-*/{escape(own.name)}")):
        if path.parent.name.endswith("-ov") == opts.overlap:
            content = load(path, "move it away")
            if content.get("steps") == [list(task.steps[0])] and content.get("finished"):
                return path
    return own


def tested_checkpoint(opts: Options, task: Task) -> Path:
    """What `--test` reads: `--ckpt`, the shared step 0, or this run's own checkpoint."""
    if opts.ckpt:
        return Path(opts.ckpt)
    return base_checkpoint(opts, task) if opts.base and opts.step == 0 else own_checkpoint(opts)
