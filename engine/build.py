"""Data, networks and optimizer of a step, made from its options."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.utils.data import DataLoader, Sampler

from argparser import Options
from dataset.build import StepDatasets, build_datasets
from dataset.incremental import IncrementalSegmentation, collate
from dataset.sampler import EvalBatchSampler, TrainBatchSampler
from engine.checkpoint import check_fits, load
from engine.context import Context
from engine.identity import check_teacher
from engine.paths import WORKDIR, previous_checkpoint
from engine.resume import Progress, batch_counts, restore, restore_learned
from methods.objective import Objective, make_objective
from methods.regularizer import make_regularizers
from methods.start import start_student
from modules.norm import get_norm, traceable
from segmentation_module import (
    IncrementalSegmentationModule,
    load_pretrained,
    load_state,
    make_model,
)
from train import Batch, Learner
from utils import distributed, workers
from utils.errors import UserError
from utils.progress import bar
from utils.scheduler import make_scheduler
from utils.signals import until_stopped

log = logging.getLogger(__name__)


# ---------------------------------------------------------------------------------- data


def build_data(context: Context) -> StepDatasets:
    """The step's training, validation and test sets."""
    opts = context.opts
    return build_datasets(
        context.spec,
        Path(opts.data_root),
        context.task,
        opts.step,
        overlap=opts.overlap,
        crop_size=opts.crop_size,
        seed=opts.random_seed,
        masking=opts.mask,
        ignore_void=opts.ignore_void,
        rest_is_background=opts.protocol == "plop",
        crop_val=opts.crop_val,
        val_on_trainset=opts.val_on_trainset,
        cross_val=opts.cross_val,
        workdir=WORKDIR,
    )


def start_workers(context: Context) -> None:
    """Start the process that forks data workers, if there will be any: its imports take seconds."""
    if context.opts.num_workers:
        workers.context(IncrementalSegmentation)


def make_loader(
    context: Context, data: IncrementalSegmentation, batches: Sampler[Any], persistent: bool = False
) -> DataLoader[Any]:
    """Batches of (images uint8 B 3 H W, labels uint8 B H W)."""
    count = context.opts.num_workers
    on_gpu = context.device.type == "cuda"
    return DataLoader(
        data,
        batch_sampler=batches,
        num_workers=count,
        multiprocessing_context=workers.context(IncrementalSegmentation) if count else None,
        worker_init_fn=workers.obey_parent,
        collate_fn=collate if on_gpu else None,
        generator=torch.Generator(),  # else a restart would shift torch's own random numbers
        pin_memory=on_gpu,
        persistent_workers=persistent and count > 0,
    )


def evaluation_loader(
    context: Context, data: IncrementalSegmentation, persistent: bool = False
) -> DataLoader[Any]:
    """Every image once over all processes; uncropped images come one at a time.

    `persistent` workers stay for the next evaluation.
    """
    size = context.opts.batch_size if context.opts.crop_val else 1
    batches = EvalBatchSampler(
        len(data), size, rank=distributed.rank(), world=distributed.world_size()
    )
    return make_loader(context, data, batches, persistent)


def evaluation_batches(context: Context, loader: DataLoader[Any], what: str) -> Iterable[Batch]:
    """The batches of an `evaluation_loader`, with a progress bar called `what`.

    Raises Interrupted as soon as a process is asked to stop, in all of them after the same batch.
    """
    tune_convolutions(context, training=False)
    rounds = cast(EvalBatchSampler, loader.batch_sampler).rounds
    where = "during an evaluation; --continue_ckpt repeats it"
    batches = until_stopped(workers.start(loader), rounds, lambda: where)
    return bar(batches, desc=what, total=len(loader))


# -------------------------------------------------------------------------------- models


def new_model(context: Context, classes_per_step: list[int]) -> IncrementalSegmentationModule:
    """The network of these options on this process's device, with random weights.

    On CUDA it computes in channels_last, which tensor cores want. On a CPU that gains a twentieth,
    and is not worth other roundings than those of the reference.
    """
    opts, on_gpu = context.opts, context.device.type == "cuda"
    model = make_model(
        opts.backbone,
        get_norm(opts.norm_act),
        classes_per_step,
        output_stride=opts.output_stride,
        pooling=opts.pooling,
    ).to(context.device)
    return model.to(memory_format=torch.channels_last) if on_gpu else model  # type: ignore[call-overload]


def build_models(
    context: Context, imagenet: bool
) -> tuple[IncrementalSegmentationModule, IncrementalSegmentationModule | None, dict[str, Any]]:
    """Student, frozen teacher (None at step 0) and the checkpoint that the teacher came from.

    The student of step t > 0 starts from the teacher's weights; at step 0 it starts from ImageNet
    weights if `imagenet`, else from random ones.
    """
    opts, classes = context.opts, context.classes_per_step
    torch.manual_seed(opts.random_seed)
    student = new_model(context, classes)
    teacher, previous = None, {}
    if opts.step > 0:
        teacher = new_model(context, classes[:-1])
        previous = load_teacher(context, teacher, student)
    elif imagenet:
        source = opts.pretrained if isinstance(opts.pretrained, str) else None
        load_pretrained(student.body, opts.backbone, source)
    start_student(opts.method, student, opts.step)
    return student, teacher, previous


def load_teacher(
    context: Context, teacher: IncrementalSegmentationModule, student: IncrementalSegmentationModule
) -> dict[str, Any]:
    """Give both the weights of the step before, freeze the teacher; returns that checkpoint."""
    opts = context.opts
    path, cure = previous_checkpoint(opts, context.task)
    previous = load(path, cure)
    steps = context.task.steps[: opts.step]
    check_fits(previous, path, opts, steps, context.spec.class_names)
    check_teacher(previous, path, opts)
    if not previous.get("finished", True) and not opts.step_ckpt:
        raise UserError(
            f"{path} is of an unfinished run: finish it with --continue_ckpt, or pass the file "
            "as --step_ckpt to start from it as it is"
        )
    state, what = previous["model_state"], f"checkpoint {path}"
    load_state(teacher, state, what, cure)
    load_state(student, state, what, cure, may_miss=(f"cls.{opts.step}.",))
    teacher.requires_grad_(False).eval()
    log.info("teacher: %s", path)
    return previous


def tune_convolutions(context: Context, training: bool) -> None:
    """On CUDA and in training, time the algorithms of a convolution when a size is first met.

    The fastest ones may differ from run to run, in the last bits of what they compute. An
    evaluation is to give the same digits every time, whether training came before it or not.
    """
    torch.backends.cudnn.benchmark = training and not context.opts.deterministic


# ------------------------------------------------------------------------------ training


@dataclass
class Training:
    """A step that `engine.fit` can train: at its beginning, or where a checkpoint stood."""

    student: IncrementalSegmentationModule
    teacher: IncrementalSegmentationModule | None
    learner: Learner
    objective: Objective  # of the student as wrapped for distribution
    validated: Objective  # of the bare student: DDP is for gradients
    batches: TrainBatchSampler
    counts: dict[str, int]  # see `engine.resume.batch_counts`
    progress: Progress


def build_learner(
    context: Context, student: IncrementalSegmentationModule, teacher: nn.Module | None,
    previous: dict[str, Any], max_iters: int,
) -> Learner:  # fmt: skip
    """Fresh optimizer and schedule for the step; parameter groups body / head / cls.

    `previous` is the checkpoint of the step before, whose importances a regulariser reads.
    """
    opts = context.opts
    parts = (student.body, student.head, student.cls)
    groups = [{"params": [p for p in part.parameters() if p.requires_grad]} for part in parts]
    optimizer = torch.optim.SGD(
        [group for group in groups if group["params"]],
        lr=opts.lr, momentum=opts.momentum, nesterov=True, weight_decay=opts.weight_decay,
        # The other forms are slower and, with a loss scaler, wait for the GPU in every iteration to
        # learn whether a gradient overflowed.
        fused=True,
    )  # fmt: skip
    # Without this a fused first step that overflows leaves uninitialised memory as momentum.
    for weight in (p for group in optimizer.param_groups for p in group["params"]):
        optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
    scheduler = make_scheduler(
        optimizer, opts.lr_policy, max_iters,
        power=opts.lr_power, decay_step=opts.lr_decay_step, decay_factor=opts.lr_decay_factor,
    )  # fmt: skip
    regularizer = make_regularizers(opts.method, student, teacher, previous.get("regularizer"))
    return Learner(student, optimizer, scheduler, context.precision, regularizer)


def warn_of_broken_graphs(opts: Options, student: nn.Module) -> None:
    """A line in the log where `--compile` meets norms that synchronise; trains in any case."""
    if opts.compile and not traceable(student.train()):
        log.warning(
            "--compile with --norm_act %s over several processes breaks the graph at every norm: "
            "minutes at the start and little gained; drop --compile", opts.norm_act,
        )  # fmt: skip


def build_training(
    context: Context, data: StepDatasets, resumed: dict[str, Any] | None
) -> Training:
    """Models, optimizer and data order: at the step's beginning, or as `resumed` has them."""
    opts = context.opts
    batches = TrainBatchSampler(
        len(data.train), opts.batch_size, seed=opts.random_seed,
        rank=distributed.rank(), world=distributed.world_size(),
    )  # fmt: skip
    imagenet = opts.pretrained is not False and resumed is None
    student, teacher, previous = build_models(context, imagenet)
    max_iters = opts.epochs * batches.iterations_per_epoch
    learner = build_learner(context, student, teacher, previous, max_iters)
    warn_of_broken_graphs(opts, student)
    counts = batch_counts(context, batches, data.train, previous)
    progress = Progress() if resumed is None else restore(resumed, learner, counts, opts)
    objective, validated = (
        make_objective(
            opts.method, model, teacher, context.classes_per_step, context.precision,
            training=training, compiled=opts.compile,
        )
        for model, training in ((distributed.wrap(student, context.device), True), (student, False))
    )  # fmt: skip
    if resumed is not None:
        restore_learned(resumed, objective)
    return Training(student, teacher, learner, objective, validated, batches, counts, progress)
