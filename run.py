"""Learn one step of a task, or evaluate a checkpoint: `python run.py --help`.

Runs as a single process or under a launcher (torchrun, python -m torch.distributed.launch). Exit
status: 0 done, 1 failed with a line that says why, 75 interrupted (`--continue_ckpt` goes on).
"""

from __future__ import annotations

import gc
import logging
import signal
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from tqdm import tqdm

import argparser
from dataset import StepDatasets, build_datasets, get_spec
from dataset.incremental import IncrementalSegmentation, collate
from dataset.sampler import EvalBatchSampler, TrainBatchSampler
from dataset.spec import DatasetSpec
from methods.averaging import predict_average, versions
from methods.regularizer import make_regularizers
from methods.table import pixel_terms
from metrics import Scores, StreamSegMetrics, score_rows, to_table
from modules.norm import get_norm
from segmentation_module import (
    IncrementalSegmentationModule,
    load_pretrained,
    load_state,
    make_model,
)
from tasks import Task
from train import (
    Batch,
    Learner,
    LogPoint,
    Objective,
    Precision,
    Predictor,
    evaluate,
    predict_samples,
    train_epoch,
)
from utils import checkpoint, distributed, workers
from utils.compiled import check_compiler, reset_compiler
from utils.errors import UserError
from utils.lock import run_lock
from utils.logger import Logger, WandbOptions, setup_console
from utils.results import ResultKey, read_results, result_files, write_results
from utils.scheduler import make_scheduler
from utils.signals import INTERRUPTED, Interrupted, stop_requests
from utils.visual import confusion_figure, palette, sample_panel, save_png, stacked

log = logging.getLogger(__name__)
TTA_SCALES = (0.75, 1.0, 1.25)
WORKDIR = Path(".")  # checkpoints, logs and split lists live under the working directory


@dataclass(frozen=True)
class Context:
    """What every phase of a run reads and none changes."""

    opts: Namespace
    spec: DatasetSpec
    task: Task
    device: torch.device
    precision: Precision
    asked_to_stop: Callable[[], bool] = lambda: False  # whether this process was
    logger: Logger = Logger(Path(), enabled=False)  # silent until models and checkpoint are sound

    @property
    def class_names(self) -> list[str]:
        """Names of the classes seen so far, in head order."""
        return [self.spec.class_names[label] for label in self.task.seen(self.opts.step)]

    @property
    def colors(self) -> np.ndarray:
        """(256, 3) by channel: the colours of the dataset's own labels."""
        return palette(self.task.seen(self.opts.step))

    @property
    def old_classes(self) -> int | None:
        """Channels of the step before, background included; None at step 0."""
        return len(self.task.old(self.opts.step)) or None


@dataclass
class Progress:
    """How far a step has come."""

    epoch: int = 0  # epochs done, validation included
    iteration: int = 0  # iterations done in the epoch after them
    best_score: float = -1.0  # highest mean IoU of a validation


@dataclass
class Training:
    """A step ready to be trained, or to be trained on."""

    student: IncrementalSegmentationModule
    learner: Learner
    objective: Objective  # of the student as wrapped for distribution
    validated: Objective  # of the bare student: DDP is for gradients
    batches: TrainBatchSampler
    progress: Progress


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns its exit status. What a user can mend is a line, not a traceback."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    try:
        plans = argparser.parse(arguments)
        device = distributed.init(plans[0].opts.local_rank)
        torch.set_float32_matmul_precision("highest")  # some containers ask for TF32
        setup_console(distributed.rank(), plans[0].opts.debug)
        for opts, notes in plans:
            if len(plans) > 1 and is_finished_for_all(opts):
                log.info("step %d of %s is finished: skipped (--restart learns it again)",
                         opts.step, opts.name)  # fmt: skip
                continue
            if run(opts, notes, device) and opts is not plans[-1].opts:
                raise Interrupted(f"after step {opts.step}")
            free_memory(device)  # nothing of a step stays on the device when the next is built
    except Interrupted as wish:
        log.info("interrupted: %s", wish)
        distributed.shutdown()
        return INTERRUPTED
    except KeyboardInterrupt:  # before there was anything to save
        distributed.shutdown(failed=True)
        return 128 + signal.SIGINT
    except (UserError, distributed.PeerStopped, RuntimeError, OSError, EOFError) as error:
        if "--debug" in arguments:
            log.exception("stopped")
        if not isinstance(error, distributed.PeerStopped):  # rank 0 says itself why it stopped
            line = explain(error)
            if line is None:
                raise
            print(f"error: {line}", file=sys.stderr)
        # Frees the loader that was at work, and with it its workers: later, one that is still
        # starting would find its queues gone, and say so at length.
        error.__traceback__ = None
        distributed.shutdown(failed=True)
        return 1
    distributed.shutdown()
    return 0


def explain(error: Exception) -> str | None:
    """What happened and what to do, in a line; None for what no user can mend."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return "the GPU has no memory left: lower --batch_size, or see docs/questions.md"
    if distributed.lost_peer(error):
        return "another process of this run is gone, see what it said"
    if workers.lost(error):
        return "a data worker was killed, as a rule for want of memory: lower --num_workers"
    return None


def free_memory(device: torch.device) -> None:
    """Give back what the step before held: objects, device memory, compiled shapes."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    reset_compiler()


def run(opts: Namespace, notes: Sequence[str], device: torch.device) -> bool:
    """Train the step unless `--test`, then test it.

    Raises Interrupted if asked to stop; says whether that came when there was nothing left to stop.
    """
    for note in notes:
        log.info(note)
    if opts.deterministic:
        distributed.be_deterministic()
    if opts.compile and not opts.test:
        check_compiler(device)
    if opts.num_workers:
        workers.context()  # imports while the models are built
    spec = get_spec(opts.dataset, opts.data_root)
    task = spec.task(opts.task)
    with ExitStack() as stack:
        with distributed.main_first():
            if distributed.is_main() and not opts.test:
                path = own_checkpoint(opts)
                what = f"step {opts.step} of {opts.name!r} ({setting(opts)})"
                stack.enter_context(run_lock(path.with_name(f".{path.name}.lock"), what))
            data = build_data(opts, spec, task)
        asked = stack.enter_context(stop_requests())
        precision = Precision(device, amp_dtype(opts.amp, device))
        context = Context(opts, spec, task, device, precision, asked)
        log.info("task %s, step %d: %d images, learns %s", task.name, opts.step, len(data.train),
                 ", ".join(context.class_names[context.old_classes or 0 :]))  # fmt: skip
        if opts.test:
            model, iteration = build_tested_model(context)
            context = replace(context, logger=stack.enter_context(open_logger(opts, None)))
        else:
            training = prepare(context, data)
            done = training.learner.scheduler.last_epoch
            context = replace(context, logger=stack.enter_context(open_logger(opts, done)))
            fit(context, training, data)
            write_summary(context, training, data.test)
            model, iteration = training.student, training.learner.scheduler.last_epoch
        test(context, model, data, iteration)
        return distributed.any_process(asked())


# ---------------------------------------------------------------------------------- data


def build_data(opts: Namespace, spec: DatasetSpec, task: Task) -> StepDatasets:
    """The step's training, validation and test sets."""
    return build_datasets(
        spec,
        Path(opts.data_root),
        task,
        opts.step,
        overlap=opts.overlap,
        crop_size=opts.crop_size,
        seed=opts.random_seed,
        masking=opts.mask,
        crop_val=opts.crop_val,
        val_on_trainset=opts.val_on_trainset,
        cross_val=opts.cross_val,
        workdir=WORKDIR,
    )


def make_loader(
    context: Context, data: IncrementalSegmentation, batches: Sampler[Any], persistent: bool = False
) -> DataLoader[Any]:
    """Batches of (images uint8 B 3 H W, labels uint8 B H W)."""
    count = context.opts.num_workers
    return DataLoader(
        data,
        batch_sampler=batches,
        num_workers=count,
        multiprocessing_context=workers.context() if count else None,
        worker_init_fn=workers.obey_parent,
        collate_fn=collate if context.device.type == "cuda" else None,
        generator=torch.Generator(),  # else a restart would shift torch's own random numbers
        pin_memory=context.device.type == "cuda",
        persistent_workers=persistent and count > 0,
    )


def evaluation_batches(context: Context, data: IncrementalSegmentation) -> Iterator[Batch]:
    """Every image once over all processes; uncropped images come one at a time.

    Raises Interrupted as soon as a process is asked to stop, in all of them after the same batch.
    """
    size = context.opts.batch_size if context.opts.crop_val else 1
    batches = EvalBatchSampler(
        len(data), size, rank=distributed.rank(), world=distributed.world_size()
    )
    tune_convolutions(context, same_size=context.opts.crop_val)
    for number, batch in enumerate(workers.start(make_loader(context, data, batches))):
        # Only as often as all have a batch, or the one with a batch more would ask alone.
        if number < batches.rounds and distributed.any_process(context.asked_to_stop()):
            raise Interrupted("during an evaluation; --continue_ckpt repeats it")
        yield batch


# -------------------------------------------------------------------------------- models


def build_models(
    context: Context, imagenet: bool
) -> tuple[IncrementalSegmentationModule, IncrementalSegmentationModule | None, dict[str, Any]]:
    """Student, frozen teacher (None at step 0) and the checkpoint that the teacher came from.

    The student of step t > 0 starts from the teacher's weights; at step 0 it starts from ImageNet
    weights if `imagenet`, else from random ones.
    """
    opts, task = context.opts, context.task
    torch.manual_seed(opts.random_seed)
    student = new_model(context, task.classes_per_step(opts.step), fix_bn=opts.fix_bn)
    if opts.step == 0:
        if imagenet:
            load_pretrained(student.body, opts.backbone)
        teacher, previous = None, {}
    else:
        teacher = new_model(context, task.classes_per_step(opts.step - 1))
        path, cure = previous_checkpoint(opts)
        previous = checkpoint.load(path, cure)
        checkpoint.check_fits(
            previous, path, opts, task.steps[: opts.step], context.spec.class_names
        )
        if not previous.get("finished", True) and not opts.step_ckpt:
            raise UserError(
                f"{path} is of an unfinished run: finish it with --continue_ckpt, or pass the file "
                "as --step_ckpt to start from it as it is"
            )
        state, what = previous["model_state"], f"checkpoint {path}"
        load_state(teacher, state, what, cure)
        load_state(student, state, what, cure, may_miss=(f"cls.{opts.step}.",))
        if opts.init_balanced:
            student.init_balanced()
        teacher.requires_grad_(False).eval()
        log.info("teacher: %s", path)
    if opts.freeze:
        student.body.requires_grad_(False)
    return student, teacher, previous


def new_model(
    context: Context, classes_per_step: list[int], fix_bn: bool = False
) -> IncrementalSegmentationModule:
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
        fix_bn=fix_bn,
    ).to(context.device)
    return model.to(memory_format=torch.channels_last) if on_gpu else model  # type: ignore[call-overload]


def build_tested_model(context: Context) -> tuple[IncrementalSegmentationModule, int]:
    """The model of `--ckpt`, or of this run's own checkpoint, and its number of iterations."""
    opts, task = context.opts, context.task
    path = Path(opts.ckpt) if opts.ckpt else own_checkpoint(opts)
    if opts.base and opts.step == 0 and not opts.ckpt:
        path = base_checkpoint(opts)
    cure = "train the step first, or name a checkpoint with --ckpt"
    content = checkpoint.load(path, cure)
    steps = task.steps[: opts.step + 1]
    checkpoint.check_fits(content, path, opts, steps, context.spec.class_names)
    if not content.get("finished", True):
        log.warning("%s is of an unfinished run, epoch %d", path, content["epoch"])
    model = new_model(context, task.classes_per_step(opts.step))
    load_state(model, content["model_state"], f"checkpoint {path}", cure)
    opts.bce = content.get("options", {}).get("bce", opts.bce)  # how --tta reads the logits
    return model, content.get("total_iterations", 0)


def tune_convolutions(context: Context, same_size: bool) -> None:
    """On CUDA, time the algorithms of a convolution when a size is first met, if one is met often.

    The fastest ones may differ from run to run, in the last bits of what they compute.
    """
    torch.backends.cudnn.benchmark = same_size and not context.opts.deterministic


def amp_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """`--amp` -> the autocast dtype, None for off."""
    if amp == "auto":
        if device.type != "cuda":
            return None
        return torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float16
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]


# --------------------------------------------------------------------------- checkpoints


def own_checkpoint(opts: Namespace, step: int | None = None) -> Path:
    """Where this run's checkpoint of a step (default: its own) lies."""
    step = opts.step if step is None else step
    return checkpoint.checkpoint_path(
        WORKDIR, opts.dataset, opts.task, opts.overlap, opts.name, step
    )


def previous_checkpoint(opts: Namespace) -> tuple[Path, str]:
    """Where step t - 1 lies, and what to do if it does not."""
    if opts.step_ckpt:
        return Path(opts.step_ckpt), "check --step_ckpt"
    if opts.base and opts.step == 1:
        return base_checkpoint(opts), f"train step 0 with --base {opts.base} first"
    cure = f"train step {opts.step - 1} with the same --name first, or pass --step_ckpt"
    return own_checkpoint(opts, opts.step - 1), cure


def base_checkpoint(opts: Namespace) -> Path:
    """The step 0 shared under `--base`: of this task, else of one that agrees on its classes."""
    own = checkpoint.checkpoint_path(
        WORKDIR, opts.dataset, opts.task, opts.overlap, opts.base, 0
    )
    if own.exists():
        return own
    classes = [list(get_spec(opts.dataset, opts.data_root).task(opts.task).steps[0])]
    for path in sorted(own.parent.parent.glob(f"{opts.dataset}-*/{own.name}")):
        if path.parent.name.endswith("-ov") == opts.overlap:
            content = checkpoint.load(path, "move it away")
            if content.get("steps") == classes and content.get("finished"):
                return path
    return own


def check_base(opts: Namespace, path: Path, content: dict[str, Any]) -> None:
    """UserError where the shared step 0 read from `path` is not what this run would learn."""
    theirs = content.get("options", {})
    for flag in ("random_seed", "bce", "backbone"):
        if flag in theirs and theirs[flag] != getattr(opts, flag):
            raise UserError(
                f"{path} was learned with --{flag} {theirs[flag]}, this run has "
                f"{getattr(opts, flag)}: give --base another name"
            )


def is_finished_for_all(opts: Namespace) -> bool:
    """`is_finished` as rank 0 finds it: on unshared disks the others might see something else."""
    with distributed.main_first():
        finished = distributed.is_main() and is_finished(opts)
    return distributed.any_process(finished)


def is_finished(opts: Namespace) -> bool:
    """Whether a step of a longer plan was learned and tested before, and need not be again."""
    if opts.restart or opts.test:
        return False
    if opts.base and opts.step == 0:
        path = base_checkpoint(opts)
        if not path.exists():
            return False
        content = checkpoint.load(path, "move it away")
        check_base(opts, path, content)
        return content.get("finished", True)
    _, means = result_files(Path(opts.logdir), setting(opts))
    rows = read_results(means) if means.exists() else []
    key = asdict(result_key(opts))
    own = own_checkpoint(opts)
    if not own.exists() or not any(key.items() <= row.items() for row in rows):
        return False
    return checkpoint.load(own, "move it away").get("finished", True)


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
    content = checkpoint.load(path, cure)
    steps = context.task.steps[: opts.step + 1]
    checkpoint.check_fits(content, path, opts, steps, context.spec.class_names)
    checkpoint.check_complete(content, path, cure)
    checkpoint.check_flags(content, path, vars(opts))
    log.info("going on from %s, epoch %d, iteration %d", path,
             content["epoch"] + 1, content["iteration"])  # fmt: skip
    return content


def save_progress(context: Context, training: Training) -> None:
    """Write the step's checkpoint: all that its future, and the next step's, depend on.

    The curves reach the disk first, so that no kill makes a hole in them. Raises PeerStopped where
    rank 0 cannot write.
    """
    opts, learner, progress = context.opts, training.learner, training.progress
    regularizer = learner.regularizer
    with distributed.main_first():
        if not distributed.is_main():
            return
        context.logger.flush()
        content = {
            "model_state": training.student.state_dict(),
            "optimizer_state": learner.optimizer.state_dict(),
            "scheduler_state": learner.scheduler.state_dict(),
            "scaler_state": learner.precision.scaler.state_dict(),
            "regularizer": regularizer.export() if regularizer else None,
            "regularizer_state": regularizer.state_dict() if regularizer else None,
            "random_state": torch.get_rng_state(),
            **asdict(progress),
            **training_shape(context, training.batches),
            "total_iterations": learner.scheduler.last_epoch,
            "finished": progress.epoch >= opts.epochs,
            "steps": [list(labels) for labels in context.task.steps[: opts.step + 1]],
            "class_names": list(context.spec.class_names),
            "options": vars(opts),
        }
        checkpoint.save(own_checkpoint(opts), content)


def training_shape(context: Context, batches: TrainBatchSampler) -> dict[str, int]:
    """What must be the same for the position in an epoch to mean the same images."""
    return {
        "images_per_iteration": context.opts.batch_size * distributed.world_size(),
        "iterations_per_epoch": batches.iterations_per_epoch,
    }


def restore(content: dict[str, Any], learner: Learner, shape: dict[str, int]) -> Progress:
    """Put a running step's checkpoint back; returns how far it had come.

    `shape` is the `training_shape` of this run. Raises UserError where anything does not fit.
    """
    for what, mine in shape.items():
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
        learner.precision.scaler.load_state_dict(content["scaler_state"])
        if learner.regularizer is not None:
            learner.regularizer.load_state_dict(content["regularizer_state"])
        torch.set_rng_state(content["random_state"])
        progress = Progress(content["epoch"], content["iteration"], content["best_score"])
        done = progress.epoch * shape["iterations_per_epoch"] + progress.iteration
        if not learner.scheduler.last_epoch == content["total_iterations"] == done:
            raise ValueError("it disagrees with itself about the number of iterations")
    except Exception as error:  # state of other flags fails in as many ways as there are flags
        raise UserError(
            f"the checkpoint cannot be resumed with these flags ({error}): use those it was "
            "written with, or start the step over"
        ) from error
    return progress


# ------------------------------------------------------------------------------ training


def build_learner(
    context: Context,
    student: IncrementalSegmentationModule,
    teacher: nn.Module | None,
    previous: dict[str, Any],
    max_iters: int,
) -> Learner:
    """Fresh optimizer and schedule for the step; groups body / head / cls."""
    opts = context.opts
    rooms = (student.body, student.head, student.cls)
    groups = [{"params": [p for p in room.parameters() if p.requires_grad]} for room in rooms]
    optimizer = torch.optim.SGD(
        [group for group in groups if group["params"]],
        lr=opts.lr, momentum=opts.momentum, nesterov=True, weight_decay=opts.weight_decay,
        # The other forms are slower and, with a loss scaler, wait for the GPU in every iteration to
        # learn whether a gradient overflowed.
        fused=True,
    )  # fmt: skip
    # A fused first step that overflows would leave behind a momentum that nobody has written.
    for weight in (p for group in optimizer.param_groups for p in group["params"]):
        optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
    scheduler = make_scheduler(
        optimizer, opts.lr_policy, max_iters,
        power=opts.lr_power, decay_step=opts.lr_decay_step, decay_factor=opts.lr_decay_factor,
    )  # fmt: skip
    regularizer = make_regularizers(
        opts.regularizer, student, teacher, previous.get("regularizer"),
        normalize=not opts.reg_no_normalize, alpha=opts.reg_alpha, interval=opts.reg_iterations,
    )  # fmt: skip
    return Learner(
        student, optimizer, scheduler, context.precision, regularizer, opts.reg_importance
    )


def prepare(context: Context, data: StepDatasets) -> Training:
    """Models, optimizer and data order: at the step's beginning, or where a checkpoint stood."""
    opts = context.opts
    resumed = load_resumed(context)
    batches = TrainBatchSampler(
        len(data.train), opts.batch_size, seed=opts.random_seed,
        rank=distributed.rank(), world=distributed.world_size(),
    )  # fmt: skip
    student, teacher, previous = build_models(context, opts.pretrained and resumed is None)
    max_iters = opts.epochs * batches.iterations_per_epoch
    learner = build_learner(context, student, teacher, previous, max_iters)
    shape = training_shape(context, batches)
    progress = restore(resumed, learner, shape) if resumed is not None else Progress()
    terms = pixel_terms(opts, context.old_classes)
    wrapped = distributed.wrap(student, context.device)
    objective, bare = (
        Objective(model, teacher, terms, opts.loss_de, context.precision, compiled)
        for model, compiled in ((wrapped, opts.compile), (student, False))
    )
    return Training(student, learner, objective, bare, batches, progress)


def fit(context: Context, training: Training, data: StepDatasets) -> None:
    """Train what is left of the step; checkpoints after validations and where it is interrupted."""
    loader = make_loader(context, data.train, training.batches, persistent=True)
    try:
        while training.progress.epoch < context.opts.epochs:
            fit_epoch(context, training, loader, data.val)
    except Interrupted as wish:
        save_progress(context, training)
        raise Interrupted(f"{wish}; wrote {own_checkpoint(context.opts)}") from None


def fit_epoch(
    context: Context, training: Training, loader: DataLoader[Any], val: IncrementalSegmentation
) -> None:
    """What is left of one epoch, and what comes after it. Raises Interrupted if asked to stop."""
    opts, progress = context.opts, training.progress
    iterations = training.batches.iterations_per_epoch
    if progress.iteration < iterations:  # else it was interrupted in its validation
        train_one_epoch(context, training, loader)
    distributed.broadcast_buffers(training.student)
    if (progress.epoch + 1) % opts.val_interval == 0:
        score = validate(context, training.validated, val, (progress.epoch + 1) * iterations)
        progress.best_score = max(progress.best_score, score)
    progress.epoch, progress.iteration = progress.epoch + 1, 0
    if progress.epoch == opts.epochs or progress.epoch % opts.ckpt_interval == 0:
        save_progress(context, training)


def train_one_epoch(context: Context, training: Training, loader: DataLoader[Any]) -> None:
    """`train_epoch` with a progress bar and curves, from where the epoch stands.

    Raises Interrupted, in all processes after the same iteration, if one was asked to stop.
    """
    opts, logger, learner = context.opts, context.logger, training.learner
    progress, iterations = training.progress, training.batches.iterations_per_epoch
    epoch, first = progress.epoch, progress.iteration
    training.batches.set_epoch(epoch, first)
    tune_convolutions(context, same_size=True)
    with tqdm(
        total=iterations, initial=first, desc=f"epoch {epoch + 1}/{opts.epochs}", unit="it",
        disable=None if distributed.is_main() else True, leave=False,
    ) as bar:  # fmt: skip

        def on_iteration(iteration: int) -> bool:
            bar.update(1)
            progress.iteration = iteration
            return distributed.any_process(context.asked_to_stop())

        def on_log(point: LogPoint) -> None:
            loss = sum(point.terms.values())
            bar.set_postfix(loss=f"{loss:.3f}", img_s=f"{point.images_per_second:.1f}")
            values = {f"train/{name}": value for name, value in point.terms.items()}
            values |= {
                "train/loss": loss, "train/lr": point.lr,
                "train/images_per_second": point.images_per_second,
            }  # fmt: skip
            logger.scalars(values, epoch * iterations + point.iteration)

        means = train_epoch(
            learner, training.objective, workers.start(loader), context.device,
            epoch=epoch, start=first, interval=opts.print_interval,
            on_iteration=on_iteration, on_log=on_log,
        )  # fmt: skip
    if progress.iteration < iterations:
        raise Interrupted(f"after iteration {progress.iteration} of epoch {epoch + 1}")
    log.info("epoch %d/%d: loss %.4f (%s)", epoch + 1, opts.epochs, sum(means.values()),
             _join(means))  # fmt: skip


# ---------------------------------------------------------------------------- evaluation


def validate(
    context: Context, objective: Objective, data: IncrementalSegmentation, iteration: int
) -> float:
    """Scores and loss terms on the validation set, as curves; returns the mean IoU."""
    batches = evaluation_batches(context, data)
    metrics, terms = evaluate(objective, batches, len(context.class_names), context.device)
    scores = metrics.scores(context.old_classes)
    values = {f"val/{name}": value for name, value in terms.items()}
    values["val/loss"] = sum(terms.values())
    values |= {f"val/{name}": value for name, value in scores.means().items()}
    context.logger.scalars(values, iteration)
    log_samples(context, objective, data, iteration)
    log.info("validation: mean IoU %.4f (%s)", scores.with_background, _join(terms))
    return scores.with_background


def log_samples(
    context: Context, objective: Objective, data: IncrementalSegmentation, iteration: int
) -> None:
    """`--sample_num` panels image | truth | prediction."""
    if not distributed.is_main():
        return
    samples = spread(data, context.opts.sample_num)
    predicted = predict_samples(objective, samples, context.device)
    for i, (image, truth, prediction) in enumerate(predicted):
        panel = sample_panel(
            image, truth, prediction, context.class_names, colors=context.colors
        )
        context.logger.image(f"samples/{i}", panel, iteration)


def write_summary(context: Context, training: Training, data: IncrementalSegmentation) -> None:
    """Beside the checkpoint, a PNG of six images: truth, prediction before the step and after."""
    if not distributed.is_main():
        return
    samples, after = spread(data, 6), training.validated
    before: list[np.ndarray | None] = [None] * len(samples)
    if after.teacher is not None:
        teacher = Objective(after.teacher, None, {}, 0.0, context.precision)
        before = [p for _, _, p in predict_samples(teacher, samples, context.device)]
    panels = [
        sample_panel(
            image, truth, prediction, context.class_names, before=old, colors=context.colors
        )
        for old, (image, truth, prediction) in zip(
            before, predict_samples(after, samples, context.device), strict=True
        )
    ]
    save_png(own_checkpoint(context.opts).with_suffix(".png"), stacked(panels))


def spread(data: IncrementalSegmentation, count: int) -> list[Batch]:
    """Up to `count` samples, evenly spread over the set."""
    count = min(count, len(data))
    return [data[i * len(data) // count] for i in range(count)]


def test(
    context: Context,
    model: IncrementalSegmentationModule,
    data: StepDatasets,
    iteration: int,
) -> None:
    """The step's result: console table, curves' end points, result files.

    `--tta` adds a second one, with predictions averaged over versions of each image, to the console
    and, under `<name>+tta`, to the result files.
    """
    objective = Objective(model, None, {}, 0.0, context.precision)
    classes, device = len(context.class_names), context.device
    metrics, _ = evaluate(objective, evaluation_batches(context, data.test), classes, device)
    if distributed.is_main():
        report(context, metrics, iteration, data.lists)
    if context.opts.tta:
        averaged, _ = evaluate(
            objective, evaluation_batches(context, data.test), classes, device,
            averaging_predictor(context, model),
        )  # fmt: skip
        if distributed.is_main():
            report_averaged(context, averaged, data.lists)


def averaging_predictor(context: Context, model: IncrementalSegmentationModule) -> Predictor:
    """Averages over TTA_SCALES, each mirrored as well."""

    def network(images: Tensor) -> Tensor:
        with context.precision.autocast():
            return model(images).logits

    def predictor(images: Tensor, logits: Tensor, size: tuple[int, int]) -> Tensor:
        maps = versions(network, images, TTA_SCALES, flip=True)
        return predict_average(maps, size, binary=context.opts.bce)

    return predictor


def report_averaged(
    context: Context, metrics: StreamSegMetrics, lists: tuple[int, int]
) -> None:
    """Print and write the scores of `--tta`, apart from the plain ones."""
    scores = metrics.scores(context.old_classes)
    scales = ", ".join(map(str, TTA_SCALES))
    print(f"\nAveraged over scales {scales}, each mirrored as well:", flush=True)
    print(to_table(context.class_names, scores), flush=True)
    key = result_key(context.opts)
    write_scores(context, replace(key, name=f"{key.name}+tta"), scores, lists)


def write_scores(
    context: Context, key: ResultKey, scores: Scores, lists: tuple[int, int]
) -> None:
    """Add a row to the result files."""
    in_head_order = [context.spec.class_names[i] for labels in context.task.steps for i in labels]
    write_results(
        Path(context.opts.logdir), setting(context.opts), key, scores, in_head_order, lists
    )


def report(
    context: Context, metrics: StreamSegMetrics, iteration: int, lists: tuple[int, int]
) -> None:
    """Print and write a tested step's scores."""
    opts, logger = context.opts, context.logger
    names = context.class_names
    scores = metrics.scores(context.old_classes)
    print(to_table(names, scores), flush=True)
    header, rows, means = score_rows(names, scores)
    logger.table("test/classes", header, rows, iteration)
    logger.table("test/means", ["score", "value"], means, iteration)
    logger.scalars({f"test/{name}": value for name, value in scores.means().items()}, iteration)
    confusion = metrics.confusion.cpu().numpy()
    logger.image("test/confusion", confusion_figure(confusion, names), iteration)
    write_scores(context, result_key(opts), scores, lists)


# ------------------------------------------------------------------------------- logging


def setting(opts: Namespace) -> str:
    """`<dataset>-<task>[-ov]`: one experimental setting."""
    return checkpoint.setting(opts.dataset, opts.task, opts.overlap)


def result_key(opts: Namespace) -> ResultKey:
    """What the step's rows in the result files are found by."""
    return ResultKey(opts.name, opts.method or "none", opts.step, opts.random_seed)


def open_logger(opts: Namespace, done: int | None) -> Logger:
    """Curves of the step under `<logdir>/<setting>/<name>/step-<t>`; nothing on other ranks.

    What an earlier process logged after the `done` iterations that this one goes on from is
    dropped, all of it where the step starts over. None drops nothing.
    """
    wandb = WandbOptions(opts.wandb_project, opts.wandb_entity, group=setting(opts))
    return Logger(
        Path(opts.logdir) / setting(opts) / opts.name / f"step-{opts.step}",
        enabled=distributed.is_main(),
        tensorboard=opts.visualize,
        wandb=wandb if opts.wandb else None,
        name=f"{opts.name}-{opts.step}",
        config=vars(opts) | {"code": git_state()},
        resume_step=done + 1 if done else done,
    )


def git_state() -> str:
    """The commit of the program, with `-dirty` where files were changed; "unknown" outside git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _join(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in values.items())


if __name__ == "__main__":
    sys.exit(main())
