"""The test of a step, and what becomes of its scores."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from argparser import Options
from dataset.build import StepDatasets
from engine.build import evaluation_batches, evaluation_loader, new_model
from engine.checkpoint import check_fits, load
from engine.context import Context
from engine.journal import Journal
from engine.logs import score_curves, scores_of
from engine.paths import result_key, setting, tested_checkpoint
from methods.averaging import predict_average, versions
from methods.objective import Objective
from metrics.stream_metrics import Scores, StreamSegMetrics, score_rows, to_table
from segmentation_module import IncrementalSegmentationModule, load_state
from train import Classify, evaluate
from utils import distributed
from utils.checkpoint import checksum
from utils.errors import printable
from utils.logger import Logger
from utils.pictures import confusion_figure
from utils.results import WEIGHTS, write_results

log = logging.getLogger(__name__)
TTA_SCALES = (0.75, 1.0, 1.25)


class Tested(NamedTuple):
    """A model to test, and what a checkpoint says about it."""

    model: IncrementalSegmentationModule
    iteration: int  # that it was trained for
    binary: bool  # trained with a binary loss: probabilities are sigmoids


def load_tested(context: Context) -> Tested:
    """The model of `--ckpt`, or of this run's own checkpoint."""
    opts, task = context.opts, context.task
    path = tested_checkpoint(opts, task)
    cure = "train the step first, or name a checkpoint with --ckpt"
    content = load(path, cure)
    check_fits(content, path, opts, task.steps[: opts.step + 1], context.spec.class_names)
    if not content.get("finished", True):
        log.warning("%s is of an unfinished run, epoch %d", path, content["epoch"])
    model = new_model(context, context.classes_per_step)
    load_state(model, content["model_state"], f"checkpoint {path}", cure)
    binary = content.get("options", {}).get("bce", opts.method.bce)
    return Tested(model, content.get("total_iterations", 0), binary)


def test(
    context: Context, tested: Tested, data: StepDatasets, logger: Logger, journal: Journal
) -> None:
    """The step's result: console table, curves' end points, metrics.jsonl, result files.

    `--tta` adds a second one, with predictions averaged over versions of each image, to the console
    and, under `<name>+tta`, to the result files.
    """
    objective = Objective([], tested.model, None, context.precision)
    classes, device = len(context.class_names), context.device
    loader = evaluation_loader(context, data.test)
    log.info("test: %d images", len(data.test))
    begun = time.perf_counter()
    metrics, _ = evaluate(objective, evaluation_batches(context, loader, "test"), classes, device)
    if distributed.is_main():
        scores = scores_of(context, context.scores(metrics))
        seconds = time.perf_counter() - begun
        journal.put({"test": scores | {"seconds": seconds}, "total_iterations": tested.iteration})
        report(context, metrics, tested, data.list_lengths, logger)
    if context.opts.tta:
        averaged, _ = evaluate(
            objective, evaluation_batches(context, loader, "test, averaged"), classes, device,
            averaging(context, tested),
        )  # fmt: skip
        if distributed.is_main():
            report_averaged(context, averaged, tested, data.list_lengths)


def averaging(context: Context, tested: Tested) -> Classify:
    """Classifies by the average over TTA_SCALES, each mirrored as well."""

    def network(images: Tensor) -> Tensor:
        with context.precision.autocast():
            return tested.model(images).logits

    def classify(images: Tensor, logits: Tensor, size: tuple[int, int]) -> Tensor:
        maps = versions(network, images, TTA_SCALES, flip=True)
        return predict_average(maps, size, binary=tested.binary)

    return classify


def report(
    context: Context, metrics: StreamSegMetrics, tested: Tested, list_lengths: tuple[int, int],
    logger: Logger,
) -> None:  # fmt: skip
    """Print and write a tested step's scores."""
    names = [printable(name) for name in context.class_names]
    scores, iteration = context.scores(metrics), tested.iteration
    if context.opts.protocol == "plop":
        print("protocol plop: classes to come are background, which counts in old and all")
    print(to_table(names, scores), flush=True)
    header, rows, means = score_rows(names, scores)
    logger.table("test/classes", header, rows, iteration)
    logger.table("test/means", ["score", "value"], means, iteration)
    logger.scalars(score_curves(context, scores, "test"), iteration)
    figure = confusion_figure(
        metrics.confusion.cpu().numpy(), names, title=context.title, old=context.old_classes
    )
    logger.image("test/confusion", figure, iteration)
    write_scores(context, context.opts, scores, tested, list_lengths)


def report_averaged(
    context: Context, metrics: StreamSegMetrics, tested: Tested, list_lengths: tuple[int, int]
) -> None:
    """Print and write the scores of `--tta`, apart from the plain ones."""
    scores = context.scores(metrics)
    scales = ", ".join(map(str, TTA_SCALES))
    print(f"\nAveraged over scales {scales}, each mirrored as well:", flush=True)
    print(to_table(list(map(printable, context.class_names)), scores), flush=True)
    opts = replace(context.opts, name=f"{context.opts.name}+tta")
    write_scores(context, opts, scores, tested, list_lengths)


def write_scores(
    context: Context, opts: Options, scores: Scores, tested: Tested, list_lengths: tuple[int, int]
) -> None:
    """Add a row to the result files, for the run that `opts` name."""
    in_head_order = [context.spec.class_names[i] for labels in context.task.steps for i in labels]
    write_results(
        Path(opts.logdir), setting(opts), result_key(opts), scores.iou.tolist(), scores.means(),
        in_head_order, list_lengths,
        {"protocol": opts.protocol, "split": context.split,
         WEIGHTS: str(checksum(tested.model.state_dict()))},
    )  # fmt: skip
