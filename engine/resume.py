"""Going on with an interrupted step, skipping a finished one, and writing what both need."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from argparser import Options
from dataset.catalog import get_spec
from dataset.sampler import TrainBatchSampler
from engine.checkpoint import check_complete, check_fits, check_flags, load
from engine.context import Context
from engine.paths import base_checkpoint, check_base, own_checkpoint, result_key, setting
from segmentation_module import load_state
from train import Learner
from utils import checkpoint, distributed
from utils.errors import UserError
from utils.results import read_results, result_files

log = logging.getLogger(__name__)


@dataclass
class Progress:
    """How far a step has come."""

    epoch: int = 0  # epochs done, validation included
    iteration: int = 0  # iterations done in the epoch after them
    best_score: float = -1.0  # highest mean IoU of a validation


def is_finished_for_all(opts: Options) -> bool:
    """`is_finished` as rank 0 finds it: on unshared disks the others might see something else."""
    with distributed.main_first():
        finished = distributed.is_main() and is_finished(opts)
    return distributed.any_process(finished)


def is_finished(opts: Options) -> bool:
    """Whether a step of a longer plan was learned and tested before, and need not be again."""
    if opts.restart or opts.test:
        return False
    if opts.base and opts.step == 0:
        path = base_checkpoint(opts, get_spec(opts.dataset, opts.data_root).task(opts.task))
        if not path.exists():
            return False
        content = load(path, "move it away")
        check_base(opts, path, content)
        return content.get("finished", True)
    _, means = result_files(Path(opts.logdir), setting(opts))
    rows = read_results(means) if means.exists() else []
    key = asdict(result_key(opts))
    own = own_checkpoint(opts)
    if not own.exists() or not any(key.items() <= row.items() for row in rows):
        return False
    return load(own, "move it away").get("finished", True)


def load_resumed(context: Context) -> dict[str, Any] | None:
    """The checkpoint to go on from under `--continue_ckpt`; None to start at the beginning.

    A run that was stopped before its first checkpoint has none and starts over, so a scheduler may
    always pass `--continue_ckpt`.
    """
    opts = context.opts
    if not opts.continue_ckpt:
        return None
    path = Path(opts.ckpt) if opts.ckpt else own_checkpoint(opts)
    if not opts.ckpt and not path.exists():
        log.info("no checkpoint at %s yet: starting at the beginning", path)
        return None
    cure = "check --ckpt, or start over without --continue_ckpt"
    content = load(path, cure)
    steps = context.task.steps[: opts.step + 1]
    check_fits(content, path, opts, steps, context.spec.class_names)
    check_complete(content, path, cure)
    check_flags(content, path, opts)
    log.info("going on from %s, epoch %d, iteration %d", path,
             content["epoch"] + 1, content["iteration"])  # fmt: skip
    return content


def batch_counts(context: Context, batches: TrainBatchSampler) -> dict[str, int]:
    """What must be the same for the position in an epoch to mean the same images."""
    return {
        "images_per_iteration": context.opts.batch_size * distributed.world_size(),
        "iterations_per_epoch": batches.iterations_per_epoch,
    }


def restore(content: dict[str, Any], learner: Learner, counts: dict[str, int]) -> Progress:
    """Put a running step's checkpoint back; returns how far it had come.

    `counts` are the `batch_counts` of this run. Raises UserError where anything does not fit.
    """
    for what, mine in counts.items():
        if content[what] != mine:
            raise UserError(
                f"the checkpoint was written with {content[what]} {what.replace('_', ' ')}, this "
                f"run has {mine}: use the same data, and a --batch_size that makes --batch_size x "
                "processes what it was, or start the step over"
            )
    load_state(learner.model, content["model_state"], "the checkpoint", "start the step over")
    try:
        checkpoint.load_optimizer(learner.optimizer, content["optimizer_state"])
        learner.scheduler.load_state_dict(content["scheduler_state"])
        if content["scaler_state"]:  # else written without a scaler, as with bf16: ours starts anew
            learner.precision.scaler.load_state_dict(content["scaler_state"])
        if learner.regularizer is not None:
            learner.regularizer.load_state_dict(content["regularizer_state"])
        torch.set_rng_state(content["random_state"])
        progress = Progress(content["epoch"], content["iteration"], content["best_score"])
        done = progress.epoch * counts["iterations_per_epoch"] + progress.iteration
        if not learner.scheduler.last_epoch == content["total_iterations"] == done:
            raise ValueError("it disagrees with itself about the number of iterations")
    except Exception as error:  # state of other flags fails in as many ways as there are flags
        raise UserError(
            f"the checkpoint cannot be resumed with these flags ({error}): use those it was "
            "written with, or start the step over"
        ) from error
    return progress


def save_progress(
    context: Context, learner: Learner, progress: Progress, counts: dict[str, int]
) -> None:
    """Write the step's checkpoint: all that its future, and the next step's, depend on.

    Rank 0 writes. Raises PeerStopped on the others where it cannot.
    """
    opts, regularizer = context.opts, learner.regularizer
    with distributed.main_first():
        if not distributed.is_main():
            return
        content = {
            "model_state": learner.model.state_dict(),
            "optimizer_state": learner.optimizer.state_dict(),
            "scheduler_state": learner.scheduler.state_dict(),
            "scaler_state": learner.precision.scaler.state_dict(),
            "regularizer": regularizer.export() if regularizer else None,
            "regularizer_state": regularizer.state_dict() if regularizer else None,
            "random_state": torch.get_rng_state(),
            **asdict(progress),
            **counts,
            "total_iterations": learner.scheduler.last_epoch,
            "finished": progress.epoch >= opts.epochs,
            "steps": [list(labels) for labels in context.task.steps[: opts.step + 1]],
            "class_names": list(context.spec.class_names),
            "options": opts.record(),
        }
        checkpoint.save(own_checkpoint(opts), content)
