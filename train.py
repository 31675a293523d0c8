"""The two loops: one epoch of training and one of evaluation."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dataset.transform import normalize
from methods.objective import Objective
from methods.pieces import predict
from methods.regularizer import Regularizers
from metrics.stream_metrics import StreamSegMetrics
from utils import distributed
from utils.errors import UserError
from utils.precision import Precision
from utils.signals import Interrupted

Batch = tuple[Tensor, Tensor]  # images uint8 B 3 H W, labels uint8 B H W


@dataclass
class Learner:
    """All that changes during a step: what a checkpoint of a running step holds."""

    model: nn.Module  # the bare student
    optimizer: Optimizer
    scheduler: LRScheduler
    precision: Precision
    regularizer: Regularizers | None = None

    def step(self, objective: Objective, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """One iteration; returns the weighted terms, the regulariser's penalty among them.

        Order: backward of the data loss, `update` of the regulariser with its unscaled gradient,
        gradient of the penalty, optimizer step.
        """
        scaler = self.precision.scaler
        self.optimizer.zero_grad(set_to_none=True)
        total, terms, _ = objective(images, labels)
        scaler.scale(total).backward()
        if self.regularizer is not None:
            scaler.unscale_(self.optimizer)
            # Only a loss scaler makes gradients overflow as a matter of course.
            self.regularizer.update(self._overflow() if scaler.is_enabled() else None)
            terms = terms | self.regularizer.add_penalty_gradient()
        scaler.step(self.optimizer)
        scaler.update()
        self.scheduler.step()
        return terms

    def _overflow(self) -> Tensor:
        """Whether `unscale_` found a gradient that is not finite, as 0 or 1 on the device."""
        (found,) = self.precision.scaler._found_inf_per_device(self.optimizer).values()
        return cast(Tensor, found)


class TermLog:
    """Term values of the iterations since the last log point, kept on the device.

    Reading a value waits for the GPU, so it happens once per interval, and for all ranks at once.
    """

    def __init__(self, epoch: int, first: int) -> None:
        self.epoch, self.first = epoch, first
        self.names: list[str] = []
        self.rows: list[Tensor] = []

    def add(self, terms: Mapping[str, Tensor]) -> None:
        self.names = list(terms)
        self.rows.append(torch.stack([t.detach().double() for t in terms.values()]))

    def drain(self) -> dict[str, float]:
        """Mean of each term over iterations and ranks; empties the log.

        Raises UserError that names epoch, iteration (both from 1) and term where one is not finite.
        """
        values = distributed.average(torch.stack(self.rows)).cpu()
        for i, row in enumerate(values):
            for name, value in zip(self.names, row.tolist(), strict=True):
                if not math.isfinite(value):
                    raise UserError(
                        f"loss term {name!r} is {value} in epoch {self.epoch + 1}, iteration "
                        f"{self.first + i + 1}: training stopped; "
                        "lower --lr or use --amp off"
                    )
        self.first += len(self.rows)
        self.rows = []
        return dict(zip(self.names, values.mean(0).tolist(), strict=True))


@dataclass(frozen=True)
class LogPoint:
    """What is known at a log point: after `iteration` iterations of the epoch."""

    iteration: int
    terms: dict[str, float]  # weighted, mean over the interval and the ranks
    lr: float
    images_per_second: float  # all ranks together
    waiting: float  # share of the time that this rank waited for its data, 0 to 1
    seconds: float  # since the last log point


class Clock:
    """Images a second and the share of waiting for data, since the last log point."""

    def __init__(self) -> None:
        self.images, self.waited, self.begun = 0, 0.0, time.perf_counter()

    def wait_for(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches; the time until each of them is there counts as waiting."""
        source, end = iter(batches), object()
        while True:
            asked = time.perf_counter()
            batch = next(source, end)
            self.waited += time.perf_counter() - asked
            if batch is end:
                return
            yield cast(Batch, batch)

    def lap(self) -> tuple[float, float, float]:
        """(images a second over all ranks, share of waiting on this one, seconds); starts over."""
        passed = time.perf_counter() - self.begun
        found = self.images * distributed.world_size() / passed, self.waited / passed, passed
        self.images, self.waited, self.begun = 0, 0.0, time.perf_counter()
        return found


def train_epoch(
    learner: Learner, objective: Objective, batches: Iterable[Batch], device: torch.device, *,
    epoch: int, start: int = 0, interval: int = 10,
    on_iteration: Callable[[int], None] = lambda iteration: None,
    on_log: Callable[[LogPoint], None] = lambda point: None,
) -> None:  # fmt: skip
    """Train over `batches`, the first of which is iteration `start` of the epoch.

    `on_iteration` is called after every iteration with the number done in this epoch, `on_log`
    every `interval` of them and after the last. Raises UserError for a loss that is not finite, and
    Interrupted as `batches` does.
    """
    objective.student.train()
    log, clock, done = TermLog(epoch, start), Clock(), start
    there = to_device(clock.wait_for(batches), device)

    def log_point() -> None:
        if log.rows:
            terms, lr = log.drain(), float(learner.scheduler.get_last_lr()[-1])
            on_log(LogPoint(done, terms, lr, *clock.lap()))

    try:
        for done, (images, labels) in enumerate(there, start + 1):
            log.add(learner.step(objective, images, labels))
            clock.images += len(images)
            on_iteration(done)
            if done % interval == 0:
                log_point()
    except Interrupted:
        log_point()
        raise
    log_point()


# Normalised images B 3 H W, their logits, (H, W) -> the class of every pixel, B H W.
Classify = Callable[[Tensor, Tensor, tuple[int, int]], Tensor]


@torch.inference_mode()
def evaluate(
    objective: Objective, batches: Iterable[Batch], num_classes: int, device: torch.device,
    classify: Classify = lambda images, logits, size: predict(logits, size),
) -> tuple[StreamSegMetrics, dict[str, float]]:  # fmt: skip
    """Confusion matrix over all ranks' batches, and each term's mean over the images.

    Rows of the matrix are the truth; labels >= num_classes (void, future classes) count nowhere.
    The student, which must not be wrapped, is left in eval mode.
    """
    objective.student.eval()
    metrics = StreamSegMetrics(num_classes, device)
    names = objective.names
    sums = torch.zeros(len(names) + 1, dtype=torch.float64, device=device)  # the last counts images
    for images, labels in to_device(batches, device):
        _, terms, logits = objective(images, labels)
        values = [terms[name].double() for name in names]
        sums += len(images) * torch.stack([*values, torch.ones_like(sums[0])])
        size = (labels.shape[1], labels.shape[2])
        metrics.update(labels, classify(images, logits, size))
    distributed.all_reduce(metrics.confusion)
    *totals, count = distributed.all_reduce(sums).tolist()
    return metrics, {name: total / count for name, total in zip(names, totals, strict=True)}


@torch.inference_mode()
def predict_samples(
    model: nn.Module, precision: Precision, samples: Iterable[Batch]
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(image H W 3, truth H W, prediction H W), all uint8, for single samples without batch.

    The model is left in eval mode.
    """
    model.eval()
    for image, truth in samples:
        with precision.autocast():
            images = normalize(image[None].to(precision.device), torch.get_default_dtype())
            logits = model(images).logits
        prediction = predict(logits, (truth.shape[0], truth.shape[1]))[0]
        yield (
            image.permute(1, 2, 0).numpy(),
            truth.numpy(),
            prediction.to("cpu", torch.uint8).numpy(),
        )


def to_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Copy batches to the device and normalise the images there: a quarter of the traffic."""
    for images, labels in batches:
        images = images.to(device, non_blocking=True)
        yield normalize(images, torch.get_default_dtype()), labels.to(device, non_blocking=True)
