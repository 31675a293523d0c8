"""Training a step to its end: epochs, validations, checkpoints."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader

from dataset.build import StepDatasets
from dataset.incremental import IncrementalSegmentation
from engine.build import (
    Training,
    evaluation_batches,
    evaluation_loader,
    make_loader,
    tune_convolutions,
)
from engine.context import Context
from engine.logs import TrainingLog
from engine.paths import own_checkpoint
from engine.resume import save_progress
from methods.start import finish_student
from train import Batch, LogPoint, evaluate, predict_samples, to_device, train_epoch
from utils import distributed, workers
from utils.errors import UserError
from utils.pictures import palette, sample_panel, save_png, stacked
from utils.progress import bar
from utils.signals import Interrupted, until_stopped

log = logging.getLogger(__name__)
SUMMARY_IMAGES = 6


def fit(context: Context, training: Training, data: StepDatasets, told: TrainingLog) -> None:
    """Train what is left of the step, then draw its summary.

    A checkpoint is written every `--ckpt_interval` epochs, after the last one, and where the step
    is interrupted; Interrupted then says where it lies.
    """
    opts, progress = context.opts, training.progress
    loader = make_loader(context, data.train, training.batches, persistent=True)
    validated = evaluation_loader(context, data.val, persistent=True)
    iterations = training.batches.iterations_per_epoch
    with _saved_if_interrupted(context, training, told):
        if training.objective.needs_survey:
            survey(context, training, loader)
            save(context, training, told)  # so that no kill makes it look again
        while progress.epoch < opts.epochs:
            told.begin(progress)
            if progress.iteration < iterations:  # else it was interrupted in its validation
                run_epoch(context, training, loader, told)
            distributed.broadcast_buffers(training.student)
            if (progress.epoch + 1) % opts.val_interval == 0:
                score = validate(context, training, validated, told)
                progress.best_score = max(progress.best_score, score)
            progress.epoch, progress.iteration = progress.epoch + 1, 0
            if progress.epoch == opts.epochs:
                # What a checkpoint calls unfinished never has it, so it happens once.
                finish_student(opts.method, training.student, training.teacher)
            if progress.epoch == opts.epochs or progress.epoch % opts.ckpt_interval == 0:
                save(context, training, told)
    write_summary(context, training, data.test)


def save(context: Context, training: Training, told: TrainingLog) -> None:
    """Write the checkpoint, the curves first, so that no kill makes a hole in them."""
    told.logger.flush()
    state = training.objective.state_dict()
    save_progress(context, training.learner, training.progress, training.counts, state)


@contextmanager
def _saved_if_interrupted(
    context: Context, training: Training, told: TrainingLog
) -> Iterator[None]:
    try:
        yield
    except Interrupted as wish:
        told.interrupted()
        save(context, training, told)
        raise Interrupted(f"{wish}; wrote {own_checkpoint(context.opts)}") from None
    except UserError as error:
        path = own_checkpoint(context.opts)
        left = f"the last checkpoint is good: {path}" if path.exists() else "there is no checkpoint"
        raise UserError(f"{error}; {left}") from error


def survey(context: Context, training: Training, loader: DataLoader[Any]) -> None:
    """The pass of the teacher over the training data that an objective asks for before epoch 1.

    It sees the batches of epoch 0, augmented as there. Raises Interrupted as soon as a process is
    asked to stop; the pass then starts over.
    """
    training.batches.set_epoch(0)
    tune_convolutions(context, training=False)
    where = "in the pass before epoch 1; --continue_ckpt repeats it"
    batches = until_stopped(workers.start(loader), len(training.batches), lambda: where)
    totals: dict[str, Tensor] = {}
    what, rounds = "pass before epoch 1", len(training.batches)
    log.info("%s: the teacher sees %d batches", what, rounds)
    for images, labels in bar(to_device(batches, context.device), desc=what, total=rounds):
        for name, part in training.objective.survey(images, labels).items():
            totals[name] = totals[name] + part if name in totals else part
    training.objective.learn({k: distributed.all_reduce(v) for k, v in totals.items()})


def run_epoch(
    context: Context, training: Training, loader: DataLoader[Any], told: TrainingLog
) -> None:
    """One epoch of training from where it stands, told as it goes."""
    opts, progress = context.opts, training.progress
    iterations = training.batches.iterations_per_epoch
    training.batches.set_epoch(epoch := progress.epoch, first := progress.iteration)
    tune_convolutions(context, training=True)
    batches = until_stopped(
        workers.start(loader), iterations,
        lambda: f"after iteration {progress.iteration} of epoch {epoch + 1}",
    )  # fmt: skip
    what = f"epoch {epoch + 1}/{opts.epochs}"
    with bar(desc=what, total=iterations, initial=first) as shown:

        def on_iteration(iteration: int) -> None:
            shown.update(1)
            progress.iteration = iteration

        def on_log(point: LogPoint) -> None:
            shown.set_postfix_str(told.point(point))

        train_epoch(
            training.learner, training.objective, batches, context.device,
            epoch=epoch, start=first, interval=opts.print_interval,
            on_iteration=on_iteration, on_log=on_log,
        )  # fmt: skip
    told.trained()


def validate(
    context: Context, training: Training, loader: DataLoader[Any], told: TrainingLog
) -> float:
    """Scores and loss terms on the validation set; returns the mean IoU with background."""
    begun = time.perf_counter()
    batches = evaluation_batches(context, loader, "validation")
    classes = len(context.class_names)
    metrics, terms = evaluate(training.validated, batches, classes, context.device)
    scores = context.scores(metrics)
    told.validated(terms, scores, time.perf_counter() - begun)
    if distributed.is_main():
        opts, data = context.opts, cast(IncrementalSegmentation, loader.dataset)
        iteration = (training.progress.epoch + 1) * training.batches.iterations_per_epoch
        for i, panel in enumerate(panels(context, training, data, opts.sample_num)):
            told.logger.image(f"samples/{i}", panel, iteration)
    return scores.with_background


def panels(
    context: Context,
    training: Training,
    data: IncrementalSegmentation,
    count: int,
    before: bool = False,
) -> Iterator[np.ndarray]:
    """Pictures image | truth | prediction of up to `count` samples, evenly spread over the set.

    With `before`, the teacher's prediction too, where there is one.
    """
    count = min(count, len(data))
    samples: list[Batch] = [data[i * len(data) // count] for i in range(count)]
    old: list[np.ndarray | None] = [None] * count
    if before and training.teacher is not None:
        taught = predict_samples(training.teacher, context.precision, samples)
        old = [prediction for _, _, prediction in taught]
    now = predict_samples(training.student, context.precision, samples)
    for earlier, (image, truth, prediction) in zip(old, now, strict=True):
        maps = {"truth": truth, "prediction": prediction}
        if earlier is not None:
            maps = {"truth": truth, "prediction before": earlier, "prediction after": prediction}
        yield sample_panel(
            image, maps, context.class_names, title=context.title, old=context.old_classes,
            colors=palette(context.task.seen(context.opts.step)),
        )  # fmt: skip


def write_summary(context: Context, training: Training, data: IncrementalSegmentation) -> None:
    """Beside the checkpoint, a PNG of some images: truth, prediction before the step and after."""
    if distributed.is_main():
        drawn = list(panels(context, training, data, SUMMARY_IMAGES, before=True))
        save_png(own_checkpoint(context.opts).with_suffix(".png"), stacked(drawn))
