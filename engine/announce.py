"""What a step says of itself before it begins, and where everything is when it is over."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from argparser import Options
from dataset.build import StepDatasets
from dataset.catalog import get_spec
from engine.build import Training
from engine.context import Context
from engine.journal import NAME
from engine.paths import log_folder, own_checkpoint, setting, tested_checkpoint
from segmentation_module import IncrementalSegmentationModule
from utils import command, distributed
from utils.precision import Precision
from utils.results import result_files

log = logging.getLogger(__name__)


def announce_step(context: Context, data: StepDatasets) -> None:
    """The step, its classes and its images."""
    opts, last = context.opts, context.task.num_steps - 1
    log.info("run %s: %s %s %s, step %d of 0 to %d, method %s", opts.name, opts.dataset, opts.task,
             context.split, opts.step, last, opts.method.name)  # fmt: skip
    log.info("classes: learns %s", ", ".join(context.class_names[context.old_classes or 0 :]))
    listed = len(data.train) if opts.test else data.list_lengths[0]
    train = f"{len(data.train)} of {listed} images to train on, "
    val = f"{len(data.val)} to validate on, "
    log.info("data: %s: %s%d to test on", Path(opts.data_root), "" if opts.test else train + val,
             len(data.test))  # fmt: skip


def announce_model(context: Context, model: IncrementalSegmentationModule) -> None:
    """The network, and what it computes with."""
    opts = context.opts
    parameters = list(model.parameters())
    frozen = sum(p.numel() for p in parameters if not p.requires_grad)
    log.info("network: %s with DeepLabv3, %s, output stride %d, %d classes, %s parameters%s",
             opts.backbone, opts.norm_act, opts.output_stride, len(context.class_names),
             millions(sum(p.numel() for p in parameters)),
             f", {millions(frozen)} of them frozen" if frozen else "")  # fmt: skip
    log.info("device: %s, %s", computer(context.device), numbers(context.precision))


def announce_training(context: Context, training: Training) -> None:
    """How long the step is, and where its files go."""
    opts, counts = context.opts, training.counts
    each, done = counts["iterations_per_epoch"], training.learner.scheduler.last_epoch
    log.info("iterations: %d of %d images in an epoch, %d in %d epochs%s", each,
             counts["images_per_iteration"], each * opts.epochs, opts.epochs,
             f", {done} of them done" if done else "")  # fmt: skip
    log.info("checkpoint: will be %s", own_checkpoint(opts))
    log.info("curves and %s: will be in %s", NAME, log_folder(opts))
    log.info("results: will be in %s", results(opts))


def announce_end(opts: Options) -> None:
    """Where everything of a step is that was learned or tested."""
    if not opts.test:
        path = own_checkpoint(opts)
        log.info("checkpoint: %s", path)
        log.info("pictures: %s", path.with_suffix(".png"))
    folder = log_folder(opts)
    if opts.visualize:
        log.info("curves: %s", command.shown("tensorboard", "--logdir", str(folder.parent)))
    log.info("metrics: %s", folder / NAME)
    log.info("results: %s", results(opts))


def announce_next(opts: Options, argv: Sequence[str], tested: bool) -> None:
    """The command that comes after this one, started with `argv`, whose last step `opts` are of.

    Learned: the same for the next step or, after the last, those that show what was learned. Only
    `tested`: the table.
    """
    task = get_spec(opts.dataset, opts.data_root).task(opts.task)
    if opts.step + 1 < task.num_steps and not tested:
        # The step before will be this run's own, wherever this step came from.
        log.info("next: %s", command.again(argv, ("step_ckpt", "ckpt"), step=opts.step + 1))
        return
    folder = result_files(Path(opts.logdir), setting(opts))[0].parent
    log.info("next: %s", command.other("report.py", str(folder)))
    if not tested:
        path = str(tested_checkpoint(opts, task))
        log.info("next: %s", command.other("predict.py", "--ckpt", path, "photos",
                                           "--out", "predicted"))  # fmt: skip


def results(opts: Options) -> str:
    """The result files."""
    per_class, means = result_files(Path(opts.logdir), setting(opts))
    return f"{per_class}, {means}"


def millions(count: int) -> str:
    """A number of parameters for people."""
    return f"{count / 1e6:.1f} M" if count >= 1e6 else f"{count / 1e3:.1f} k"


def computer(device: torch.device) -> str:
    """What computes, in how many processes."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        threads = torch.get_num_threads()
        name = f"CPU, {threads} thread{'s' if threads > 1 else ''}"
    world = distributed.world_size()
    return f"{name}, {world} processes" if world > 1 else name


def numbers(precision: Precision) -> str:
    """The type that networks compute in."""
    dtype = precision.dtype or torch.get_default_dtype()
    scaled = " with loss scaling" if precision.scaler.is_enabled() else ""
    return f"{str(dtype).removeprefix('torch.')}{scaled}"
