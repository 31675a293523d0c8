"""One epoch of training and one of evaluation. No method names: terms come with their weights."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dataset.transform import normalize
from methods.features import feature_distillation
from methods.loss import WeightedTerm
from methods.pieces import pixel_losses, predict
from methods.regularizer import Regularizers
from metrics import StreamSegMetrics
from segmentation_module import Output
from utils import distributed
from utils.errors import UserError

Network = Callable[[Tensor], Output]  # images B 3 H W, normalised
Batch = tuple[Tensor, Tensor]  # images uint8 B 3 H W, labels uint8 B H W


@dataclass
class Precision:
    """Automatic mixed precision: an autocast context and a loss scaler that may do nothing.

    `dtype` None switches both off. Only float16 needs the scaler.
    """

    device: torch.device
    dtype: torch.dtype | None = None
    scaler: torch.amp.GradScaler = field(init=False)

    def __post_init__(self) -> None:
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=self.dtype is torch.float16
        )

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)


class Losses(NamedTuple):
    """One evaluation of an objective."""

    total: Tensor  # scalar, differentiable
    terms: dict[str, Tensor]  # name -> weighted scalar, detached
    logits: Tensor  # B C h w, the student's


class Objective:
    """Student + teacher -> one scalar to minimise and its named, weighted terms.

    Args:
        student: the model, as trained (wrapped for distribution) or bare for validation.
        teacher: the model of the step before, frozen and in eval mode; None at step 0.
        terms: pixel terms by name.
        feature_weight: of the distillation of body features ("de"); 0 leaves it out.
        compiled: run both networks, and the terms on a CPU too, through torch.compile.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        terms: Mapping[str, WeightedTerm],
        feature_weight: float,
        precision: Precision,
        compiled: bool = False,
    ) -> None:
        self.student = student
        self.teacher = teacher
        run: Callable[[nn.Module], Network] = torch.compile if compiled else lambda module: module
        self._run_student = run(student)
        self._run_teacher = run(teacher) if teacher is not None else None
        self._compile_terms = compiled or None
        self.terms = terms
        self.feature_weight = feature_weight if teacher is not None else 0.0
        self.precision = precision

    def __call__(self, images: Tensor, labels: Tensor) -> Losses:
        """Images B 3 H W (normalised), labels B H W (head order, IGNORE_INDEX ignored)."""
        with self.precision.autocast():
            old = self._ask_teacher(images)  # first, while nothing is kept for a backward pass
            new = self._run_student(images)
        total, terms = new.logits.new_zeros(()), dict[str, Tensor]()
        if self.terms:
            old_logits = old.logits if old else None
            total, terms = pixel_losses(
                self.terms, new.logits, old_logits, labels, compiled=self._compile_terms
            )
        if old is not None and self.feature_weight:
            feature = self.feature_weight * feature_distillation(new.features, old.features)
            total, terms = total + feature, {**terms, "de": feature.detach()}
        return Losses(total, terms, new.logits)

    def _ask_teacher(self, images: Tensor) -> Output | None:
        if self._run_teacher is None:
            return None
        with torch.inference_mode():
            output = self._run_teacher(images)
        # Copies, because what was made in that mode cannot take part in a gradient.
        features = output.features.clone() if self.feature_weight else output.features
        return output._replace(logits=output.logits.clone(), features=features)


@dataclass
class Learner:
    """All that changes during a step: what a checkpoint of a running step holds."""

    model: nn.Module  # the bare student
    optimizer: Optimizer
    scheduler: LRScheduler
    precision: Precision
    regularizer: Regularizers | None = None
    reg_importance: float = 1.0

    def step(self, objective: Objective, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """One iteration; returns the weighted terms, the penalty ("reg") among them.

        Order (SPEC section 8): backward of the data loss, `update` of the regulariser with its
        unscaled gradient, gradient of the penalty, optimizer step.
        """
        scaler = self.precision.scaler
        self.optimizer.zero_grad(set_to_none=True)
        total, terms, _ = objective(images, labels)
        scaler.scale(total).backward()
        if self.regularizer is not None:
            scaler.unscale_(self.optimizer)
            # Only a loss scaler makes gradients overflow as a matter of course; looking waits.
            if not scaler.is_enabled() or self.regularizer.gradients_finite():
                self.regularizer.update()
            penalty = self.regularizer.add_penalty_gradient(self.reg_importance)
            if penalty is not None:
                terms = {**terms, "reg": penalty}
        scaler.step(self.optimizer)
        scaler.update()
        self.scheduler.step()
        return terms


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
                        f"{self.first + i + 1}: training stopped, the last checkpoint is good; "
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


def train_epoch(
    learner: Learner,
    objective: Objective,
    batches: Iterable[Batch],
    device: torch.device,
    *,
    epoch: int,
    start: int = 0,
    interval: int = 10,
    on_iteration: Callable[[int], bool] = lambda iteration: False,
    on_log: Callable[[LogPoint], None] = lambda point: None,
) -> dict[str, float]:
    """Train over `batches`, the first of which is iteration `start` of the epoch.

    `on_iteration` is called after every iteration with the number done in this epoch and says
    whether to stop there, `on_log` every `interval` of them. Returns the mean of each term over
    the iterations run here. Raises UserError for a loss that is not finite.
    """
    objective.student.train()
    log, means, counts = TermLog(epoch, start), [], []
    begun, seen, done = time.perf_counter(), 0, start

    def log_point() -> None:
        nonlocal begun, seen
        lr = float(learner.scheduler.get_last_lr()[-1])
        counts.append(len(log.rows))
        means.append(log.drain())
        now = time.perf_counter()
        rate = seen * distributed.world_size() / (now - begun)
        on_log(LogPoint(done, means[-1], lr, rate))
        begun, seen = time.perf_counter(), 0

    for images, labels in to_device(batches, device):
        log.add(learner.step(objective, images, labels))
        done, seen = done + 1, seen + len(images)
        if done % interval == 0:
            log_point()
        if on_iteration(done):
            break
    if log.rows:
        log_point()
    return {
        name: float(np.average([m[name] for m in means], weights=counts)) for name in log.names
    }


# Normalised images B 3 H W, their logits, (H, W) -> the class of every pixel, B H W.
Predictor = Callable[[Tensor, Tensor, tuple[int, int]], Tensor]


@torch.inference_mode()
def evaluate(
    objective: Objective,
    batches: Iterable[Batch],
    num_classes: int,
    device: torch.device,
    predictor: Predictor = lambda images, logits, size: predict(logits, size),
) -> tuple[StreamSegMetrics, dict[str, float]]:
    """Confusion matrix over all ranks' batches, and each term's mean over the images.

    Rows of the matrix are the truth; labels >= num_classes (void, future classes) count nowhere.
    The student, which must not be wrapped, is left in eval mode.
    """
    objective.student.eval()
    metrics = StreamSegMetrics(num_classes, device)
    names = [*objective.terms, *(["de"] if objective.feature_weight else [])]
    sums = torch.zeros(len(names) + 1, dtype=torch.float64, device=device)  # the last counts images
    for images, labels in to_device(batches, device):
        _, terms, logits = objective(images, labels)
        values = [terms[name].double() for name in names]
        sums += len(images) * torch.stack([*values, torch.ones_like(sums[0])])
        size = (labels.shape[1], labels.shape[2])
        metrics.update(labels, predictor(images, logits, size))
    distributed.all_reduce(metrics.confusion)
    *totals, count = distributed.all_reduce(sums).tolist()
    return metrics, {name: total / count for name, total in zip(names, totals, strict=True)}


@torch.inference_mode()
def predict_samples(
    objective: Objective, samples: Iterable[Batch], device: torch.device
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(image H W 3, truth H W, prediction H W), all uint8, for single samples without batch."""
    objective.student.eval()
    for image, truth in samples:
        with objective.precision.autocast():
            images = normalize(image[None].to(device), torch.get_default_dtype())
            logits = objective.student(images).logits
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
