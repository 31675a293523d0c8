"""What a step tells while it runs: lines of the log, curves, and metrics.jsonl."""

from __future__ import annotations

import logging
import math
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from argparser import Options
from engine.context import Context
from engine.journal import NAME, Epoch, Journal
from engine.pace import Pace
from engine.paths import log_folder, setting
from engine.resume import Progress
from metrics.stream_metrics import Scores
from train import LogPoint
from utils import distributed
from utils.logger import Logger, WandbOptions
from utils.progress import duration, has_lines

log = logging.getLogger(__name__)


def open_logger(opts: Options, done: int | None) -> Logger:
    """The step's curves, which do nothing on other ranks than 0.

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


def open_journal(opts: Options) -> Journal:
    """The step's metrics.jsonl, which does nothing on other ranks than 0."""
    return Journal(log_folder(opts) / NAME, distributed.is_main())


class TrainingLog:
    """Tells what training measures, on rank 0.

    Args:
        iterations: of an epoch.
        images: of a validation, and of the test after the last epoch.
        current: what is known of an epoch that was interrupted in its middle.
    """

    def __init__(
        self,
        context: Context,
        logger: Logger,
        journal: Journal,
        *,
        iterations: int,
        images: tuple[int, int],
        current: Epoch | None = None,
    ) -> None:
        self.logger = logger
        self._context, self._journal = context, journal
        self._iterations, self._images = iterations, images
        self._epoch = current or Epoch(0)
        self._pace = Pace()

    def begin(self, progress: Progress) -> None:
        """Training goes on with an epoch, at its first iteration or after an interruption."""
        number = progress.epoch + 1
        if self._epoch.epoch != number:
            self._epoch = Epoch(number, progress.iteration)

    def point(self, point: LogPoint) -> str:
        """A log point in the curves and, where there is no bar, in a line; returns the bar's."""
        opts, epoch = self._context.opts, self._epoch
        self._pace.lap(point.iteration - epoch.iterations, point.seconds)
        epoch.add(point)
        loss, memory = sum(point.terms.values()), self._memory()
        values = {
            **point.terms, "loss": loss, "lr": point.lr, "waiting": point.waiting,
            "images_per_second": point.images_per_second, **memory,
        }  # fmt: skip
        total = (epoch.epoch - 1) * self._iterations + point.iteration
        self.logger.scalars({f"train/{name}": value for name, value in values.items()}, total)
        rates = [
            f"{point.images_per_second:.1f} images/s",
            f"{100 * point.waiting:.0f} % waiting for data",
            *(f"{value:.1f} GiB" for value in memory.values()),
            self._pace.left(*self._left(total)),
        ]
        if has_lines() and point.iteration % opts.print_interval == 0:
            log.info("epoch %d/%d, iteration %d/%d: lr %.3g, loss %s, %s", epoch.epoch, opts.epochs,
                     point.iteration, self._iterations, point.lr, joined(point.terms),
                     ", ".join(rates))  # fmt: skip
        return ", ".join([f"loss {loss:.3f}", *rates])

    def interrupted(self) -> None:
        """Keep what is known of the epoch for the process that goes on with it."""
        if self._epoch.terms:
            self._journal.put(self._line())

    def trained(self) -> None:
        """An epoch's training is over; its validation may follow."""
        epoch = self._epoch
        self._journal.put(self._line())
        log.info("epoch %d/%d: loss %s, %s, %.1f images/s, %.0f %% of the time waiting for data",
                 epoch.epoch, self._context.opts.epochs, joined(epoch.terms),
                 duration(epoch.seconds), epoch.images_per_second or 0,
                 100 * (epoch.waiting or 0))  # fmt: skip

    def validated(self, terms: Mapping[str, float], scores: Scores, seconds: float) -> None:
        """The epoch's validation: its loss terms and scores, and how long it took."""
        self._pace.evaluated(self._images[0], seconds)
        loss = sum(terms.values())
        values = {f"val/{name}": value for name, value in {**terms, "loss": loss}.items()}
        values |= score_curves(self._context, scores, "val")
        self.logger.scalars(values, self._epoch.epoch * self._iterations)
        found = {"loss": loss, "terms": dict(terms), **scores_of(self._context, scores)}
        self._journal.put(self._line() | {"validation": found | {"seconds": seconds}})
        log.info("validation: %s; loss %s, %s", in_words(scores), joined(terms), duration(seconds))

    def _line(self) -> dict[str, Any]:
        return self._epoch.line() | self._memory()

    def _memory(self) -> dict[str, float]:
        """GiB of the GPU that torch took at most so far; nothing on a CPU."""
        device = self._context.device
        if device.type != "cuda":
            return {}
        return {"gpu_memory_gib": torch.cuda.max_memory_reserved(device) / 2**30}

    def _left(self, done: int) -> tuple[int, int]:
        """Iterations of training and images of evaluations that are still to come."""
        opts, (validated, tested) = self._context.opts, self._images
        past = (self._epoch.epoch - 1) // opts.val_interval
        validations = opts.epochs // opts.val_interval - past
        return opts.epochs * self._iterations - done, validations * validated + tested


def joined(terms: Mapping[str, float]) -> str:
    """The loss and its terms."""
    each = ", ".join(f"{name} {value:.4f}" for name, value in terms.items())
    return f"{sum(terms.values()):.4f} ({each})"


def in_words(scores: Scores) -> str:
    """The mean IoUs that there are, for a line of the log."""
    return "mean IoU " + ", ".join(
        f"{value:.4f} {what}"
        for what, value in (("with background", scores.with_background), ("all", scores.all),
                            ("old", scores.old), ("new", scores.new))
        if not math.isnan(value)
    )  # fmt: skip


def scores_of(context: Context, scores: Scores) -> dict[str, Any]:
    """The scores for metrics.jsonl: means by their names in the curves, IoU by class."""
    return {**scores.named(), "iou": dict(zip(context.class_names, scores.iou.tolist(),
                                              strict=True))}  # fmt: skip


def score_curves(context: Context, scores: Scores, what: str) -> dict[str, float]:
    """The scores as points of curves: `<what>/mean_iou_old`, ..., `<what>_iou/<class>`."""
    means = {f"{what}/{name}": value for name, value in scores.named().items()}
    names = tag_names(context.class_names)
    return means | {
        f"{what}_iou/{name}": value for name, value in zip(names, scores.iou.tolist(), strict=True)
    }


def tag_names(class_names: Sequence[str]) -> list[str]:
    """Class names as the last part of a tag: letters, digits, `_-.`, all different."""
    tags: list[str] = []
    for name in class_names:
        tag = re.sub(r"[^-.\w]+", "_", name)
        while tag in tags:
            tag += "_"
        tags.append(tag)
    return tags
