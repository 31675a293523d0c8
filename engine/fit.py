"""Training a step to its end: epochs, validations, checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

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
from engine.paths import own_checkpoint
from engine.resume import save_progress
from methods.start import finish_student
from train import Batch, LogPoint, evaluate, predict_samples, to_device, train_epoch
from utils import distributed, workers
from utils.errors import UserError
from utils.logger import Logger
from utils.pictures import palette, sample_panel, save_png, stacked
from utils.signals import Interrupted, until_stopped

log = logging.getLogger(__name__)
SUMMARY_IMAGES = 6


def fit(context: Context, training: Training, data: StepDatasets, logger: Logger) -> None:
    """Train what is left of the step, then draw its summary.

    A checkpoint is written every `--ckpt_interval` epochs, after the last one, and where the step
    is interrupted; Interrupted then says where it lies.
    """
    opts, progress = context.opts, training.progress
    loader = make_loader(context, data.train, training.batches, persistent=True)
    validated = evaluation_loader(context, data.val, persistent=True)
    iterations = training.batches.iterations_per_epoch
    with _saved_if_interrupted(context, training, logger):
        if training.objective.needs_survey:
            survey(context, training, loader)
            save(context, training, logger)  # so that no kill makes it look again
        while progress.epoch < opts.epochs:
            if progress.iteration < iterations:  # else it was interrupted in its validation
                run_epoch(context, training, loader, logger)
            distributed.broadcast_buffers(training.student)
            if (progress.epoch + 1) % opts.val_interval == 0:
                score = validate(context, training, validated, logger)
                progress.best_score = max(progress.best_score, score)
            progress.epoch, progress.iteration = progress.epoch + 1, 0
            if progress.epoch == opts.epochs:
                # What a checkpoint calls unfinished never has it, so it happens once.
                finish_student(opts.method, training.student, training.teacher)
            if progress.epoch == opts.epochs or progress.epoch % opts.ckpt_interval == 0:
                save(context, training, logger)
    write_summary(context, training, data.test)


def save(context: Context, training: Training, logger: Logger) -> None:
    """Write the checkpoint, the curves first, so that no kill makes a hole in them."""
    logger.flush()
    state = training.objective.state_dict()
    save_progress(context, training.learner, training.progress, training.counts, state)


@contextmanager
def _saved_if_interrupted(context: Context, training: Training, logger: Logger) -> Iterator[None]:
    try:
        yield
    except Interrupted as wish:
        save(context, training, logger)
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
    bar = tqdm(
        to_device(batches, context.device), desc="pass before epoch 1", unit="it", leave=False,
        total=len(training.batches), disable=None if distributed.is_main() else True,
    )  # fmt: skip
    for images, labels in bar:
        for name, part in training.objective.survey(images, labels).items():
            totals[name] = totals[name] + part if name in totals else part
    training.objective.learn({k: distributed.all_reduce(v) for k, v in totals.items()})


def run_epoch(
    context: Context, training: Training, loader: DataLoader[Any], logger: Logger
) -> None:
    """One epoch of training from where it stands, with a progress bar and curves."""
    opts, progress = context.opts, training.progress
    iterations = training.batches.iterations_per_epoch
    training.batches.set_epoch(epoch := progress.epoch, first := progress.iteration)
    tune_convolutions(context, training=True)
    waiting: list[float] = []
    batches = until_stopped(
        workers.start(loader), iterations,
        lambda: f"after iteration {progress.iteration} of epoch {epoch + 1}",
    )  # fmt: skip
    with tqdm(
        total=iterations, initial=first, desc=f"epoch {epoch + 1}/{opts.epochs}", unit="it",
        disable=None if distributed.is_main() else True, leave=False,
    ) as bar:  # fmt: skip

        def on_iteration(iteration: int) -> None:
            bar.update(1)
            progress.iteration = iteration

        def on_log(point: LogPoint) -> None:
            waiting.append(point.waiting)
            loss = sum(point.terms.values())
            bar.set_postfix(loss=f"{loss:.3f}", img_s=f"{point.images_per_second:.1f}")
            values = {
                **point.terms, "loss": loss, "lr": point.lr, "waiting": point.waiting,
                "images_per_second": point.images_per_second,
            }  # fmt: skip
            tags = {f"train/{name}": value for name, value in values.items()}
            logger.scalars(tags, epoch * iterations + point.iteration)

        means = train_epoch(
            training.learner, training.objective, batches, context.device,
            epoch=epoch, start=first, interval=opts.print_interval,
            on_iteration=on_iteration, on_log=on_log,
        )  # fmt: skip
    log.info("epoch %d/%d: loss %.4f (%s), %.0f %% of the time waiting for data", epoch + 1,
             opts.epochs, sum(means.values()), _join(means), 100 * np.mean(waiting))  # fmt: skip


def validate(
    context: Context, training: Training, loader: DataLoader[Any], logger: Logger
) -> float:
    """Scores and loss terms on the validation set, as curves; returns the mean IoU."""
    iteration = (training.progress.epoch + 1) * training.batches.iterations_per_epoch
    batches = evaluation_batches(context, loader)
    classes = len(context.class_names)
    metrics, terms = evaluate(training.validated, batches, classes, context.device)
    scores = context.scores(metrics)
    values = {f"val/{name}": value for name, value in terms.items()}
    values["val/loss"] = sum(terms.values())
    values |= {f"val/{name}": value for name, value in scores.means().items()}
    logger.scalars(values, iteration)
    if distributed.is_main():
        opts, data = context.opts, cast(IncrementalSegmentation, loader.dataset)
        for i, panel in enumerate(panels(context, training, data, opts.sample_num)):
            logger.image(f"samples/{i}", panel, iteration)
    log.info("validation: mean IoU %.4f (%s)", scores.with_background, _join(terms))
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


def _join(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in values.items())
