"""From the logits of the network to the confusion matrix, as validation and test do it.

    python -m benchmarks.eval [--batch 4] [--classes 21 151] [--json FILE]

Ours predicts in pieces and counts on the device. The plain side upsamples all logits, takes the
argmax, brings it to the host and counts with numpy, image by image. The network, which both would
run alike, is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Work, compare, parser, report, start
from methods.pieces import predict
from metrics.stream_metrics import StreamSegMetrics
from utils.constants import IGNORE_INDEX


def inputs(batch: int, classes: int, small: int, size: int, device: str) -> tuple[Tensor, Tensor]:
    """Logits of the network and labels with a void margin, both on the device."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(batch, classes, small, small, generator=g)
    labels = torch.randint(0, classes, (batch, size, size), generator=g).to(torch.uint8)
    labels[:, : size // 16] = IGNORE_INDEX
    return logits.to(device), labels.to(device)


def ours(batch: int, classes: int, small: int, size: int, device: str) -> Callable[[], Tensor]:
    logits, labels = inputs(batch, classes, small, size, device)

    @torch.inference_mode()
    def confusion() -> Tensor:
        metrics = StreamSegMetrics(classes, device)
        metrics.update(labels, predict(logits, (size, size)))
        return metrics.confusion

    return confusion


def plain(batch: int, classes: int, small: int, size: int, device: str) -> Callable[[], Tensor]:
    logits, labels = inputs(batch, classes, small, size, device)

    @torch.no_grad()
    def confusion() -> Tensor:
        x = F.interpolate(logits, (size, size), mode="bilinear", align_corners=False)
        matrix = np.zeros((classes, classes), dtype=np.int64)
        predicted, truth = x.argmax(1).cpu().numpy(), labels.cpu().numpy().astype(np.int64)
        for p, t in zip(predicted, truth, strict=True):
            counted = t < classes
            pairs = classes * t[counted] + p[counted]
            matrix += np.bincount(pairs, minlength=classes**2).reshape(classes, classes)
        return torch.from_numpy(matrix)

    return confusion


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--batch", type=int, default=4)
    p.add_argument("--classes", type=int, nargs="+", default=[21, 151])
    p.add_argument("--small", type=int, default=32, help="side of the network's logits")
    p.add_argument("--size", type=int, default=512, help="side of the labels")
    args = p.parse_args()
    cases: dict[str, tuple[Work, Work]] = {}
    for classes in args.classes:
        shape = (args.batch, classes, args.small, args.size, args.device)
        name = f"batch {args.batch}, {classes} classes"
        cases[name] = (partial(ours, *shape), partial(plain, *shape))
    report(cases, compare(cases, args), args.json)


if __name__ == "__main__":
    start(main)
