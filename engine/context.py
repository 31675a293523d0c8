"""What every phase of a step reads and none changes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from argparser import Options
from dataset.catalog import get_spec
from dataset.spec import DatasetSpec
from metrics.stream_metrics import Scores, StreamSegMetrics
from tasks import Task
from utils.precision import Precision


@dataclass(frozen=True)
class Context:
    """A step of a run: its options, its classes, and what it computes with."""

    opts: Options
    spec: DatasetSpec
    task: Task
    device: torch.device
    precision: Precision

    @classmethod
    def of(cls, opts: Options, device: torch.device) -> Context:
        """The context that options mean. Raises UserError for a data set that is not there."""
        spec = get_spec(opts.dataset, Path(opts.data_root))
        spec = replace(spec, partition=spec.partition and opts.partition)
        task = spec.task(opts.task)
        return cls(opts, spec, task, device, Precision.of(opts.amp, device))

    @property
    def class_names(self) -> list[str]:
        """Names of the classes seen so far, in head order."""
        return [self.spec.class_names[label] for label in self.task.seen(self.opts.step)]

    @property
    def old_classes(self) -> int | None:
        """Channels of the step before, background included; None at step 0."""
        return len(self.task.old(self.opts.step)) or None

    @property
    def classes_per_step(self) -> list[int]:
        """Channels of the classifiers up to this step."""
        return self.task.classes_per_step(self.opts.step)

    @property
    def split(self) -> str:
        """How training images are chosen for a step: partition, overlapped or disjoint."""
        if self.spec.partition:
            return "partition"
        return "overlapped" if self.opts.overlap else "disjoint"

    def scores(self, metrics: StreamSegMetrics) -> Scores:
        """The scores of an evaluation at this step, by `--protocol`."""
        return metrics.scores(self.old_classes, background=self.opts.protocol == "plop")

    @property
    def title(self) -> str:
        """What a picture shows: run, method, task and step."""
        opts = self.opts
        kind = " overlapped" if opts.overlap else ""
        method = "" if opts.method.name == opts.name else f", {opts.method.name}"
        return f"{opts.name}{method}, {opts.dataset} {opts.task}{kind}, step {opts.step}"
