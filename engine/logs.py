"""Where the curves of a step go."""

from __future__ import annotations

import subprocess
from pathlib import Path

from argparser import Options
from engine.paths import log_folder, setting
from utils import distributed
from utils.logger import Logger, WandbOptions


def open_logger(opts: Options, done: int | None) -> Logger:
    """The step's logger, which does nothing on other ranks than 0.

    What an earlier process logged after the `done` iterations that this one goes on from is
    dropped, all of it where the step starts over. None drops nothing.
    """
    wandb = WandbOptions(opts.wandb_project, opts.wandb_entity, group=setting(opts))
    return Logger(
        log_folder(opts),
        enabled=distributed.is_main(),
        tensorboard=opts.visualize,
        wandb=wandb if opts.wandb else None,
        name=f"{opts.name}-{opts.step}",
        config=opts.record() | {"code": git_state()},
        resume_step=done + 1 if done else done,
    )


def git_state() -> str:
    """The commit of the program, with `-dirty` where files were changed; "unknown" outside git."""
    folder = str(Path(__file__).parent)
    command = ["git", "-C", folder, "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
