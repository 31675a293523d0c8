"""Learn one step of a task, or evaluate a checkpoint: `python run.py --help`.

Runs as a single process or under a launcher (torchrun, python -m torch.distributed.launch).
"""

from __future__ import annotations

import logging
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Sampler
from tqdm import tqdm

import argparser
from dataset import DATASETS, StepDatasets, build_datasets
from dataset.incremental import IncrementalSegmentation
from dataset.sampler import EvalBatchSampler, TrainBatchSampler
from metrics import StreamSegMetrics, score_rows, to_table
from modules.norm import get_norm
from segmentation_module import (
    IncrementalSegmentationModule,
    load_imagenet_weights,
    load_state,
    make_model,
)
from tasks import Task, get_task
from train import (
    Learner,
    LogPoint,
    Objective,
    Precision,
    evaluate,
    predict_samples,
    train_epoch,
)
from utils import checkpoint, distributed
from utils.errors import UserError
from utils.logger import Logger, WandbOptions, setup_console
from utils.methods import pixel_terms
from utils.regularizer import make_regularizer
from utils.results import ResultKey, write_results
from utils.scheduler import make_scheduler
from utils.visual import confusion_figure, sample_panel

log = logging.getLogger(__name__)
WORKDIR = Path(".")  # checkpoints, logs and split lists live under the working directory


@dataclass(frozen=True)
class Context:
    """What every phase of a run reads and none changes."""

    opts: Namespace
    task: Task
    device: torch.device
    precision: Precision
    logger: Logger

    @property
    def class_names(self) -> list[str]:
        """Names of the classes seen so far, in head order."""
        names = DATASETS[self.opts.dataset].class_names
        return [names[label] for label in self.task.seen(self.opts.step)]

    @property
    def old_classes(self) -> int | None:
        """Channels of the step before, background included; None at step 0."""
        return len(self.task.old(self.opts.step)) or None


@dataclass
class Progress:
    """How far a step has come."""

    epoch: int = 0  # epochs done
    iteration: int = 0  # iterations done in the epoch after them
    best_score: float = -1.0  # highest mean IoU of a validation


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns its exit status. What a user can put right is a line, not a traceback."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    try:
        opts, notes = argparser.parse(arguments)
        device = distributed.init(opts.local_rank)
        setup_console(distributed.rank(), opts.debug)
        run(opts, notes, device)
    except (UserError, distributed.PeerStopped) as error:
        if "--debug" in arguments:
            log.exception("stopped")
        if isinstance(error, UserError):  # else the process that stopped says why
            print(f"error: {error}", file=sys.stderr)
        distributed.shutdown(failed=True)
        return 1
    distributed.shutdown()
    return 0


def run(opts: Namespace, notes: Sequence[str], device: torch.device) -> None:
    """Train the step unless `--test`, then test it."""
    for note in notes:
        log.info(note)
    task = get_task(opts.dataset, opts.task)
    with distributed.main_first():
        data = build_data(opts)
    resumed = load_resumed(opts, task)
    with open_logger(opts, resumed) as logger:
        precision = Precision(device, amp_dtype(opts.amp, device))
        context = Context(opts, task, device, precision, logger)
        log.info("task %s, step %d: %d images, learns %s", task.name, opts.step, len(data.train),
                 ", ".join(context.class_names[context.old_classes or 0 :]))  # fmt: skip
        if opts.test:
            model, iteration = build_tested_model(context)
        else:
            model, iteration = learn(context, data, resumed)
        test(context, model, data.test, iteration)


# ---------------------------------------------------------------------------------- data


def build_data(opts: Namespace) -> StepDatasets:
    """The step's training, validation and test sets."""
    return build_datasets(
        DATASETS[opts.dataset],
        Path(opts.data_root),
        get_task(opts.dataset, opts.task),
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
    workers = context.opts.num_workers
    return DataLoader(
        data,
        batch_sampler=batches,
        num_workers=workers,
        pin_memory=context.device.type == "cuda",
        persistent_workers=persistent and workers > 0,
    )


def make_evaluation_loader(context: Context, data: IncrementalSegmentation) -> DataLoader[Any]:
    """Every image once over all processes; uncropped images come one at a time."""
    size = context.opts.batch_size if context.opts.crop_val else 1
    batches = EvalBatchSampler(
        len(data), size, rank=distributed.rank(), world=distributed.world_size()
    )
    return make_loader(context, data, batches)


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
            path = Path("pretrained") / f"{opts.backbone}_iabn_sync.pth.tar"
            load_imagenet_weights(student.body, path)
        teacher, previous = None, {}
    else:
        teacher = new_model(context, task.classes_per_step(opts.step - 1))
        path, cure = previous_checkpoint(opts)
        previous = checkpoint.load(path, cure)
        checkpoint.check_fits(previous, path, opts, task.steps[: opts.step], opts.step - 1)
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
    """The network of these options on this process's device, with random weights."""
    opts = context.opts
    return make_model(
        opts.backbone,
        get_norm(opts.norm_act),
        classes_per_step,
        output_stride=opts.output_stride,
        pooling=opts.pooling,
        fix_bn=fix_bn,
    ).to(context.device)


def build_tested_model(context: Context) -> tuple[IncrementalSegmentationModule, int]:
    """The model of `--ckpt`, or of this run's own checkpoint, and its number of iterations."""
    opts, task = context.opts, context.task
    path = Path(opts.ckpt) if opts.ckpt else own_checkpoint(opts)
    cure = "train the step first, or name a checkpoint with --ckpt"
    content = checkpoint.load(path, cure)
    checkpoint.check_fits(content, path, opts, task.steps[: opts.step + 1], opts.step)
    if not content.get("finished", True):
        log.warning("%s is of an unfinished run, epoch %d", path, content["epoch"])
    model = new_model(context, task.classes_per_step(opts.step))
    load_state(model, content["model_state"], f"checkpoint {path}", cure)
    return model, content.get("total_iterations", 0)


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
    cure = f"train step {opts.step - 1} with the same --name first, or pass --step_ckpt"
    return own_checkpoint(opts, opts.step - 1), cure


def load_resumed(opts: Namespace, task: Task) -> dict[str, Any] | None:
    """The checkpoint to go on from under `--continue_ckpt`; None to start at the beginning.

    A run that was stopped before its first checkpoint has none and starts over, so a scheduler may
    always pass `--continue_ckpt`.
    """
    if not opts.continue_ckpt:
        return None
    path = Path(opts.ckpt) if opts.ckpt else own_checkpoint(opts)
    if not opts.ckpt and not path.exists():
        log.info("no checkpoint at %s yet: starting at the beginning", path)
        return None
    content = checkpoint.load(path, "check --ckpt, or start over without --continue_ckpt")
    checkpoint.check_fits(content, path, opts, task.steps[: opts.step + 1], opts.step)
    log.info("going on from %s, epoch %d", path, content["epoch"])
    return content


def save_progress(context: Context, learner: Learner, progress: Progress) -> None:
    """Write the step's checkpoint: all that its future, and the next step's, depend on."""
    opts = context.opts
    if not distributed.is_main():
        return
    regularizer = learner.regularizer
    content = {
        "model_state": learner.model.state_dict(),
        "optimizer_state": learner.optimizer.state_dict(),
        "scheduler_state": learner.scheduler.state_dict(),
        "scaler_state": learner.precision.scaler.state_dict(),
        "regularizer": regularizer.export() if regularizer else None,
        "regularizer_state": regularizer.state_dict() if regularizer else None,
        "random_state": torch.get_rng_state(),
        **asdict(progress),
        "total_iterations": learner.scheduler.last_epoch,
        "finished": progress.epoch >= opts.epochs,
        "steps": [list(labels) for labels in context.task.steps[: opts.step + 1]],
        "options": vars(opts),
    }
    checkpoint.save(own_checkpoint(opts), content)


def restore(content: dict[str, Any], learner: Learner) -> Progress:
    """Put a running step's checkpoint back; returns how far it had come."""
    load_state(learner.model, content["model_state"], "the checkpoint", "start the step over")
    try:
        learner.optimizer.load_state_dict(content["optimizer_state"])
        learner.scheduler.load_state_dict(content["scheduler_state"])
        learner.precision.scaler.load_state_dict(content["scaler_state"])
        if learner.regularizer is not None:
            learner.regularizer.load_state_dict(content["regularizer_state"])
        torch.set_rng_state(content["random_state"])
        return Progress(content["epoch"], content["iteration"], content["best_score"])
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(
            f"the checkpoint cannot be resumed with these flags ({error}): use those it was "
            "written with, or start the step over"
        ) from error


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
    )  # fmt: skip
    scheduler = make_scheduler(
        optimizer, opts.lr_policy, max_iters,
        power=opts.lr_power, decay_step=opts.lr_decay_step, decay_factor=opts.lr_decay_factor,
    )  # fmt: skip
    regularizer = make_regularizer(
        opts.regularizer, student, teacher, previous.get("regularizer"),
        normalize=not opts.reg_no_normalize, alpha=opts.reg_alpha, interval=opts.reg_iterations,
    )  # fmt: skip
    return Learner(
        student, optimizer, scheduler, context.precision, regularizer, opts.reg_importance
    )


def learn(
    context: Context, data: StepDatasets, resumed: dict[str, Any] | None
) -> tuple[IncrementalSegmentationModule, int]:
    """Train the step from its beginning, or from where `resumed` stood.

    Returns the student and the number of iterations it has seen.
    """
    opts = context.opts
    batches = TrainBatchSampler(
        len(data.train), opts.batch_size, seed=opts.random_seed,
        rank=distributed.rank(), world=distributed.world_size(),
    )  # fmt: skip
    iterations = batches.iterations_per_epoch
    student, teacher, previous = build_models(context, opts.pretrained and resumed is None)
    learner = build_learner(context, student, teacher, previous, opts.epochs * iterations)
    progress = restore(resumed, learner) if resumed is not None else Progress()
    terms = pixel_terms(opts, context.old_classes)
    wrapped = distributed.wrap(student, context.device)
    objective = Objective(wrapped, teacher, terms, opts.loss_de, context.precision)
    # DDP is for gradients; validation runs the bare student.
    unwrapped = Objective(student, teacher, terms, opts.loss_de, context.precision)
    loader = make_loader(context, data.train, batches, persistent=True)

    for epoch in range(progress.epoch, opts.epochs):
        batches.set_epoch(epoch, progress.iteration)
        train_one_epoch(context, learner, objective, loader, epoch, progress.iteration, iterations)
        progress.epoch, progress.iteration = epoch + 1, 0
        distributed.broadcast_buffers(student)
        last = progress.epoch == opts.epochs
        if progress.epoch % opts.val_interval == 0:
            score = validate(context, unwrapped, data.val, progress.epoch * iterations)
            progress.best_score = max(progress.best_score, score)
        if last or progress.epoch % opts.ckpt_interval == 0:
            save_progress(context, learner, progress)
    return student, opts.epochs * iterations


def train_one_epoch(
    context: Context,
    learner: Learner,
    objective: Objective,
    loader: DataLoader[Any],
    epoch: int,
    start: int,
    iterations: int,
) -> None:
    """`train_epoch` with a progress bar and curves."""
    opts, logger = context.opts, context.logger
    with tqdm(
        total=iterations, initial=start, desc=f"epoch {epoch + 1}/{opts.epochs}", unit="it",
        disable=None if distributed.is_main() else True, leave=False,
    ) as bar:  # fmt: skip

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
            learner, objective, loader, context.device,
            epoch=epoch, start=start, interval=opts.print_interval,
            on_iteration=lambda iteration: bar.update(1) and None, on_log=on_log,
        )  # fmt: skip
    log.info("epoch %d/%d: loss %.4f (%s)", epoch + 1, opts.epochs, sum(means.values()),
             _join(means))  # fmt: skip


# ---------------------------------------------------------------------------- evaluation


def validate(
    context: Context, objective: Objective, data: IncrementalSegmentation, iteration: int
) -> float:
    """Scores and loss terms on the validation set, as curves; returns the mean IoU."""
    loader = make_evaluation_loader(context, data)
    metrics, terms = evaluate(objective, loader, len(context.class_names), context.device)
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
    """`--sample_num` panels image | truth | prediction, evenly spread over the set."""
    count = min(context.opts.sample_num, len(data))
    if not count or not distributed.is_main():
        return
    chosen = [i * len(data) // count for i in range(count)]
    samples = predict_samples(objective, (data[i] for i in chosen), context.device)
    for i, (image, truth, prediction) in enumerate(samples):
        panel = sample_panel(image, truth, prediction, context.class_names)
        context.logger.image(f"samples/{i}", panel, iteration)


def test(
    context: Context,
    model: IncrementalSegmentationModule,
    data: IncrementalSegmentation,
    iteration: int,
) -> None:
    """The step's result: console table, curves' end points, result files."""
    objective = Objective(model, None, {}, 0.0, context.precision)
    loader = make_evaluation_loader(context, data)
    metrics, _ = evaluate(objective, loader, len(context.class_names), context.device)
    if distributed.is_main():
        report(context, metrics, iteration)


def report(context: Context, metrics: StreamSegMetrics, iteration: int) -> None:
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
    every = DATASETS[opts.dataset].class_names
    in_head_order = [every[i] for labels in context.task.steps for i in labels]
    key = ResultKey(opts.name, opts.method or "none", opts.step, opts.random_seed)
    write_results(Path(opts.logdir), setting(opts), key, scores, in_head_order)


# ------------------------------------------------------------------------------- logging


def setting(opts: Namespace) -> str:
    """`<dataset>-<task>[-ov]`: one experimental setting."""
    return checkpoint.setting(opts.dataset, opts.task, opts.overlap)


def open_logger(opts: Namespace, resumed: dict[str, Any] | None) -> Logger:
    """Curves of the step under `<logdir>/<setting>/<name>/step-<t>`; nothing on other ranks.

    What an interrupted run logged after the checkpoint that it goes on from is dropped, and all
    that an earlier run of the same name logged where the step starts over.
    """
    first = resumed["total_iterations"] + 1 if resumed else 0
    wandb = WandbOptions(opts.wandb_project, opts.wandb_entity, group=setting(opts))
    return Logger(
        Path(opts.logdir) / setting(opts) / opts.name / f"step-{opts.step}",
        enabled=distributed.is_main(),
        tensorboard=opts.visualize,
        wandb=wandb if opts.wandb else None,
        name=f"{opts.name}-{opts.step}",
        config=vars(opts),
        resume_step=None if opts.test else first,
    )


def _join(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in values.items())


if __name__ == "__main__":
    sys.exit(main())
