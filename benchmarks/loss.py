"""The objective in pieces against the plain formulation on full-size logits.

    python -m benchmarks.loss [--batch 4] [--old 101] [--new 50] [--json FILE]
    python -m benchmarks.loss --growth          batch 1-8, then 21-151 classes

Unbiased CE + 10 * unbiased KD, forward and backward to the logits of the network. The plain side is
written here from the formulas (Cermelli et al., CVPR 2020, eq. 5-9), as such losses usually are:
both maps upsampled, log-probabilities, autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Work, compare, parser, report, start
from methods.loss import UnbiasedCrossEntropy, UnbiasedKnowledgeDistillation, WeightedTerm
from methods.pieces import pixel_losses
from utils.constants import IGNORE_INDEX

KD_WEIGHT = 10.0


def inputs(
    batch: int, old: int, new: int, small: int, size: int, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, teacher's logits and labels (new classes and background, a void margin)."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(batch, old + new, small, small, generator=g)
    old_logits = torch.randn(batch, old, small, small, generator=g)
    labels = torch.randint(old - 1, old + new, (batch, size, size), generator=g)
    labels[labels == old - 1] = 0
    labels[:, : size // 16] = IGNORE_INDEX
    return logits.to(device).requires_grad_(), old_logits.to(device), labels.to(device)


def ours(
    logits: Tensor, old_logits: Tensor, labels: Tensor, compiled: bool | None = None
) -> Tensor:
    terms = {
        "unce": WeightedTerm(UnbiasedCrossEntropy(old_logits.shape[1]), 1.0),
        "unkd": WeightedTerm(UnbiasedKnowledgeDistillation(), KD_WEIGHT),
    }
    return pixel_losses(terms, logits, old_logits, labels, compiled=compiled)[0]


def plain(logits: Tensor, old_logits: Tensor, labels: Tensor) -> Tensor:
    """-log p(background or old | y < C_old, y otherwise), and -sum q log p' / C_old."""
    old, size = old_logits.shape[1], labels.shape[1:]
    x = F.interpolate(logits, size, mode="bilinear", align_corners=False)
    x_old = F.interpolate(old_logits, size, mode="bilinear", align_corners=False)

    lse = x.logsumexp(1, keepdim=True)
    background = x[:, :old].logsumexp(1, keepdim=True) - lse
    log_p = torch.cat([background, x[:, old:] - lse], 1)
    target = (labels - old + 1).clamp(min=0).masked_fill(labels == IGNORE_INDEX, IGNORE_INDEX)
    ce = F.nll_loss(log_p, target, ignore_index=IGNORE_INDEX, reduction="none").mean()

    background = torch.cat([x[:, :1], x[:, old:]], 1).logsumexp(1, keepdim=True) - lse
    log_p = torch.cat([background, x[:, 1:old] - lse], 1)
    kd = -(x_old.softmax(1) * log_p).sum(1).mean() / old
    return ce + KD_WEIGHT * kd


def prepare(
    objective: Callable[[Tensor, Tensor, Tensor], Tensor],
    batch: int, old: int, new: int, small: int, size: int, device: str,
) -> Callable[[], object]:  # fmt: skip
    """The measured call: value and gradient."""
    objective(*inputs(1, 2, 1, 2, 4, device)).backward()  # loads what torch loads at first use
    # In a training step activations of a network came and went before the loss. From the first
    # block of such a size on, glibc keeps what is freed instead of returning it page by page.
    del_me = torch.ones(2**22)
    del del_me
    logits, old_logits, labels = inputs(batch, old, new, small, size, device)

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(objective(logits, old_logits, labels), logits)

    return step


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--batch", type=int, default=4)
    p.add_argument("--old", type=int, default=101, help="classes of the teacher")
    p.add_argument("--new", type=int, default=50, help="classes of this step")
    p.add_argument("--small", type=int, default=32, help="side of the network's logits")
    p.add_argument("--size", type=int, default=512, help="side of the labels")
    p.add_argument("--growth", action="store_true", help="over batch and number of classes")
    p.add_argument("--compile", action="store_true", help="ours compiled on a CPU, too")
    args = p.parse_args()
    shapes = [(args.batch, args.old, args.new)]
    if args.growth:
        shapes = [(batch, args.old, args.new) for batch in (1, 2, 4, 8)]
        shapes += [(args.batch, old, new) for old, new in ((16, 5), (41, 20), (81, 20), (101, 50))]
    cases: dict[str, tuple[Work, Work]] = {}
    for batch, old, new in shapes:
        shape = (batch, old, new, args.small, args.size, args.device)
        cases[f"batch {batch}, {old} + {new} classes"] = (
            partial(prepare, partial(ours, compiled=args.compile or None), *shape),
            partial(prepare, plain, *shape),
        )
    report(cases, compare(cases, args), args.json)


if __name__ == "__main__":
    start(main)
