"""Going on with an interrupted step, skipping a finished one, and writing what both need."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR, StepLR

from argparser import Options
from dataset.incremental import IncrementalSegmentation
from dataset.sampler import TrainBatchSampler
from engine.checkpoint import check_complete, check_fits, check_flags, load
from engine.context import Context
from engine.paths import own_checkpoint
from methods.objective import Objective
from segmentation_module import load_state
from train import Learner
from utils import checkpoint, distributed
from utils.errors import UserError
from utils.version import VERSION

log = logging.getLogger(__name__)


@dataclass
class Progress:
    """How far a step has come."""

    epoch: int = 0  # epochs done, validation included
    iteration: int = 0  # iterations done in the epoch after them
    best_score: float = -1.0  # highest mean IoU of a validation


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
    if opts.method.ewf and opts.step > 0 and content["finished"] and content["epoch"] < opts.epochs:
        raise UserError(
            f"{path} holds weights that --ewf has blended, nothing to train on: give the --epochs "
            "it was written with, or start the step over without --continue_ckpt"
        )
    if not content["finished"] and content["epoch"] >= opts.epochs:
        raise UserError(
            f"{path} is past --epochs {opts.epochs}: {content['epoch']} epochs and "
            f"{content['iteration']} iterations are done; nothing was changed, give more --epochs"
        )
    log.info("going on from %s, epoch %d, iteration %d", path,
             content["epoch"] + 1, content["iteration"])  # fmt: skip
    return content


def batch_counts(
    context: Context, batches: TrainBatchSampler, images: IncrementalSegmentation,
    previous: Mapping[str, Any],
) -> dict[str, int]:  # fmt: skip
    """What must be the same in a run that goes on: which images an epoch's positions mean, and, at
    step > 0, the checkpoint of the step before."""
    counts = {
        "images_per_iteration": context.opts.batch_size * distributed.world_size(),
        "iterations_per_epoch": batches.iterations_per_epoch,
        "images_checksum": images.checksum(),
    }
    if previous:
        counts["teacher_checksum"] = checkpoint.checksum(previous["model_state"])
    return counts


# What the rate of an iteration is computed from.
_RATE = ("lr", "lr_policy", "lr_power", "lr_decay_step", "lr_decay_factor", "epochs")


def follow_flags(learner: Learner, theirs: Mapping[str, Any], opts: Options) -> None:
    """Let changed flags of the optimizer and the schedule take effect in a run that goes on.

    Unchanged ones leave what was loaded as it is, to the last bit.
    """
    ours = opts.record()
    changed = {name for name in ours if name in theirs and ours[name] != theirs[name]}
    groups, scheduler = learner.optimizer.param_groups, learner.scheduler
    for group in groups:
        group |= {name: ours[name] for name in ("momentum", "weight_decay") if name in changed}
    if not changed.intersection(_RATE):
        return
    done = scheduler.last_epoch
    factor = (
        scheduler.lr_lambdas[0](done) if isinstance(scheduler, LambdaLR)
        else opts.lr_decay_factor ** (done // opts.lr_decay_step)
    )  # fmt: skip
    scheduler.base_lrs = [opts.lr] * len(groups)
    if isinstance(scheduler, StepLR):  # its settings came with the state
        scheduler.step_size, scheduler.gamma = opts.lr_decay_step, opts.lr_decay_factor
    for group in groups:
        group |= {"initial_lr": opts.lr, "lr": opts.lr * factor}
    scheduler._last_lr = [group["lr"] for group in groups]


def restore(
    content: dict[str, Any], learner: Learner, counts: dict[str, int], opts: Options
) -> Progress:
    """Put a running step's checkpoint back; returns how far it had come.

    `counts` are the `batch_counts` of this run. Raises UserError where anything does not fit.
    """
    for what, mine in counts.items():
        if content.get(what, mine) == mine:  # older programs kept no checksums
            continue
        if what == "teacher_checksum":
            raise UserError(
                "the step before was learned again since this one began: put its checkpoint back, "
                "or start the step over with --restart"
            )
        raise UserError(
            f"the checkpoint was written with {content[what]} {what.replace('_', ' ')}, this "
            f"run has {mine}: use the same data, and a --batch_size that makes --batch_size x "
            "processes what it was, or start the step over"
        )
    load_state(learner.model, content["model_state"], "the checkpoint", "start the step over")
    with _of_these_flags():
        checkpoint.load_optimizer(learner.optimizer, content["optimizer_state"])
        learner.scheduler.load_state_dict(content["scheduler_state"])
        follow_flags(learner, content["options"], opts)
        if content["scaler_state"]:  # else written without a scaler, as with bf16: ours starts anew
            learner.precision.scaler.load_state_dict(content["scaler_state"])
        if learner.regularizer is not None:
            learner.regularizer.load_state_dict(content["regularizer_state"])
        torch.set_rng_state(content["random_state"])
        progress = Progress(content["epoch"], content["iteration"], content["best_score"])
        done = progress.epoch * counts["iterations_per_epoch"] + progress.iteration
        if not learner.scheduler.last_epoch == content["total_iterations"] == done:
            raise ValueError("it disagrees with itself about the number of iterations")
    return progress


def restore_learned(content: dict[str, Any], objective: Objective) -> None:
    """Put back what an objective learned before the first epoch. Raises UserError."""
    with _of_these_flags():
        objective.load_state_dict(content.get("objective_state", {}))


@contextmanager
def _of_these_flags() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # state of other flags fails in as many ways as there are flags
        raise UserError(
            f"the checkpoint cannot be resumed with these flags ({error}): use those it was "
            "written with, or start the step over"
        ) from error


def save_progress(
    context: Context,
    learner: Learner,
    progress: Progress,
    counts: dict[str, int],
    objective_state: dict[str, Tensor],
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
            "objective_state": objective_state,
            "random_state": torch.get_rng_state(),
            **asdict(progress),
            **counts,
            "total_iterations": learner.scheduler.last_epoch,
            "finished": progress.epoch >= opts.epochs,
            "steps": [list(labels) for labels in context.task.steps[: opts.step + 1]],
            "class_names": list(context.spec.class_names),
            "options": opts.record(),
            "program": VERSION,
        }
        checkpoint.save(own_checkpoint(opts), content)
