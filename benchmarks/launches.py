"""What an iteration asks of a GPU, counted without one.

    python -m benchmarks.launches [--methods FT MIB RW] [--tasks 100-50 15-5] [--compiled]
    python -m benchmarks.launches --world 8 [flags of run.py]

One training iteration and one validation batch are run on the CPU, with small images and every
operation seen by a TorchDispatchMode. A launch is an operation that writes values; views and
allocations are none. The backward of a convolution counts a launch per gradient, an operation on
lists as many as PyTorch's multi_tensor_apply makes of them. What a GPU would do differently is put
in its place:

    norms    the kernels of `modules/norm_triton.py`: 2 for statistics (3 over ranks), 1 to
             normalise, 3 backward
    losses   `methods/pieces.py` on meta tensors of the full size, so cut as on a device.
             `--compiled` counts a piece as Inductor fuses it, for a CPU (on a GPU it may differ by
             a kernel or two), else as it is written
    ranks    `--world`: one collective per norm and direction, one per bucket of
             DistributedDataParallel, and one copy of each gradient into its bucket

Not seen: layout conversions within cuDNN, second kernels of large reductions. Copies are those
launches that only copy or convert; synchronisations are where the host reads what is on the device.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import train
from benchmarks.counting import COLUMNS, Ledger, Operations, Reads
from benchmarks.harness import start
from benchmarks.step import Batch, context_of, random_batch
from engine.build import build_learner, new_model
from engine.context import Context
from methods import groups, pieces
from methods.objective import Objective, make_objective
from modules import norm, norm_plain, norm_sync
from train import Learner
from utils import distributed

# ------------------------------------------------------------ what a GPU does differently


def _triton(ledger: Ledger, world: int) -> SimpleNamespace:
    """Stands for `modules.norm_triton`: computes in plain operations, counts its kernels."""

    def counted(function: Callable[..., Any], launches: int) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            ledger.add("launches", launches)
            with ledger.pause():
                return function(*args)

        return call

    more = int(world > 1)  # a row per rank is made before the rows are combined
    return SimpleNamespace(
        batch_statistics=counted(norm_plain.batch_statistics, 2 + more),
        abn_=counted(norm_plain.abn_, 1),
        abn_gradients=counted(norm_plain.abn_gradients, 3),
    )


def _collectives(stack: ExitStack, ledger: Ledger, world: int) -> None:
    """Let this process take itself for one of `world` whose others have the same values."""

    def collective(function: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
        def call(x: Tensor, *_: Any) -> Tensor:
            with ledger.pause(False):
                ledger.add("collectives")
            return function(x)

        return call

    patch = mock.patch.object
    for module in (norm_plain, norm_sync):
        for name, function in (
            ("gather_rows", collective(lambda row: row.expand(world, *row.shape).clone())),
            ("sum_over_ranks_", collective(lambda means: means.mul_(world))),
        ):
            if hasattr(module, name):
                stack.enter_context(patch(module, name, function))
    stack.enter_context(patch(distributed, "world_size", lambda: world))
    stack.enter_context(patch(distributed, "all_reduce", lambda x: x))


def _buckets(learner: Learner) -> tuple[int, int]:
    """Gradients, and the buckets in which DistributedDataParallel sends them."""
    weights: list[Tensor] = [p for p in learner.model.parameters() if p.requires_grad]
    limits = [2**20, 25 * 2**20]
    made, _ = torch.distributed._compute_bucket_assignment_by_size([*reversed(weights)], limits)
    return len(weights), len(made)


def _on_meta(x: Tensor, batch: int, side: int, gradient: bool = False) -> Tensor:
    shape = (batch, *x.shape[1:-2], side, side)
    return torch.empty(shape, dtype=x.dtype, device="meta", requires_grad=gradient)


def _at_full_size(stack: ExitStack, ledger: Ledger, opts: Any, kernels: list[int]) -> None:
    """Count losses and predictions at the size that the flags say; compute them as small.

    `kernels` holds those of a compiled piece, if pieces are to be compiled.
    """
    small = opts.crop_size // opts.output_stride
    losses, predict, sums = pieces.pixel_losses, pieces.predict, pieces._sums

    def count_losses(terms, logits, old, labels, *rest, **options):  # type: ignore[no-untyped-def]
        with ledger.pause():
            value = losses(terms, logits, old, labels, *rest, **options)
        with ledger.during("loss"), mock.patch.object(torch, "autocast", nullcontext_of):
            x = _on_meta(logits, opts.batch_size, small, logits.requires_grad)
            y = _on_meta(labels, opts.batch_size, opts.crop_size)
            x_old = None if old is None else _on_meta(old, opts.batch_size, small)
            losses(terms, x, x_old, y, compiled=False)
        return value

    def count_sums(*args):  # type: ignore[no-untyped-def]
        ledger.add("pieces")
        if kernels:
            ledger.add("launches", kernels[0])
        with ledger.pause(ledger.paused or bool(kernels)):
            return sums(*args)

    def count_predict(logits, size, *rest):  # type: ignore[no-untyped-def]
        with ledger.pause():
            labels = predict(logits, size, *rest)
        x = _on_meta(logits, opts.batch_size, small)
        with ledger.during("prediction"), mock.patch.object(torch, "autocast", nullcontext_of):
            predict(x, (opts.crop_size, opts.crop_size))
        return labels

    stack.enter_context(mock.patch.object(groups, "pixel_losses", count_losses))
    stack.enter_context(mock.patch.object(pieces, "_sums", count_sums))
    stack.enter_context(mock.patch.object(train, "predict", count_predict))


def nullcontext_of(*_: Any, **__: Any) -> Any:
    return nullcontext()


def _kernels_of_a_piece(terms: Any, classes: Sequence[int], asks_teacher: bool) -> int:
    """Kernels and products that Inductor makes of values and gradient of a piece."""
    from torch._inductor.utils import run_and_get_code

    logits = torch.randn(2, sum(classes), 8, 8, requires_grad=True)
    old = torch.randn(2, sum(classes[:-1]), 8, 8) if asks_teacher else None
    labels = torch.zeros(2, 128, 128, dtype=torch.uint8)
    with mock.patch.object(pieces._compiled_sums, "compiled", None):
        _, (code, *_) = run_and_get_code(
            lambda: pieces.pixel_losses(terms, logits, old, labels, 2**30, True)
        )
    body = code.split("def call(", 1)[1]
    return sum(body.count(word) for word in ("cpp_fused", "extern_kernels."))


# ------------------------------------------------------------------------------- counting


def _watch(stack: ExitStack, ledger: Ledger, phase: str, owner: object, attribute: str) -> None:
    function = getattr(owner, attribute, None)
    if function is None:
        return

    def call(*args: Any, **kwargs: Any) -> Any:
        with ledger.during(phase):
            return function(*args, **kwargs)

    stack.enter_context(mock.patch.object(owner, attribute, call))


def _watch_phases(stack: ExitStack, ledger: Ledger, learner: Learner, objective: Objective) -> None:
    _watch(stack, ledger, "teacher", objective, "_run_teacher")
    _watch(stack, ledger, "student", objective, "_run_student")
    _watch(stack, ledger, "backward", torch.autograd, "backward")
    for name in ("update", "add_penalty_gradient", "gradients_finite"):
        _watch(stack, ledger, "regulariser", learner.regularizer, name)
    _watch(stack, ledger, "optimizer", learner.precision.scaler, "step")


def count(
    flags: Sequence[str], *, validation: bool = False, world: int = 1, compiled: bool = False,
    small: tuple[int, int] = (2, 64),
) -> Ledger:  # fmt: skip
    """What one iteration, or one validation batch, of run.py with these flags asks of a GPU.

    Every figure but those of losses and predictions comes from a batch of `small` (images, side).
    """
    context = context_of(("--norm_act", "iabn_sync", *flags), "cpu")
    opts, classes = context.opts, context.classes_per_step
    learner, objective = _made(context, training=not validation)
    terms = groups.pixel_terms(opts.method, sum(classes[:-1]) or None)
    distils = bool({"kd", "unkd", "icarl"} & terms.keys())
    kernels = [_kernels_of_a_piece(terms, classes, distils)] if compiled and not validation else []
    images, labels = random_batch(context, sum(classes))
    side = small[1]
    batch = images[: small[0], :, :side, :side], labels[: small[0], :side, :side]
    ledger, threads = Ledger(), torch.get_num_threads()
    torch.set_num_threads(1)  # a mode sees its own thread alone
    with ExitStack() as stack:
        triton = _triton(ledger, 1 if validation else world)
        stack.enter_context(mock.patch.object(norm, "_triton_for", return_value=triton))
        if world > 1:
            _collectives(stack, ledger, world)
        _at_full_size(stack, ledger, opts, kernels)
        _watch_phases(stack, ledger, learner, objective)
        _run(learner, objective, batch, sum(classes), ledger, validation)
    torch.set_num_threads(threads)
    if world > 1 and not validation:
        gradients, buckets = _buckets(learner)
        with ledger.during("backward"):
            ledger.add("launches", gradients)
            ledger.add("copies", gradients)
            ledger.add("collectives", buckets)
    return ledger


def _made(context: Context, training: bool) -> tuple[Learner, Objective]:
    """Both networks in the layout of a GPU, and a step before that held all importances."""
    opts, classes = context.opts, context.classes_per_step
    student, teacher = (
        new_model(context, n).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        for n in (classes, classes[:-1])
    )
    teacher.requires_grad_(False).eval()
    own = {k: torch.ones_like(p) for k, p in student.named_parameters()}
    stored = {"regularizer": dict.fromkeys(("ewc", "pi", "rw"), {"fisher": own, "score": own})}
    learner = build_learner(context, student.train(), teacher, stored, 1000)
    objective = make_objective(
        opts.method, student, teacher, classes, context.precision, training=training
    )
    return learner, objective


def _run(
    learner: Learner,
    objective: Objective,
    batch: Batch,
    classes: int,
    ledger: Ledger,
    validation: bool,
) -> None:
    """The second of two iterations, or what one batch more adds to an evaluation."""
    device = torch.device("cpu")
    if validation:
        runs = []
        for number in (1, 2):
            ledger.counts = {}
            with Reads(ledger), Operations(ledger):
                train.evaluate(objective, [batch] * number, classes, device)
            runs.append(ledger.counts)
        for phase, row in runs[1].items():
            row.subtract(runs[0].get(phase, {}))
        return
    for _ in range(2):
        ledger.counts = {}
        with Reads(ledger), Operations(ledger):
            ((images, labels),) = train.to_device([batch], device)
            learner.step(objective, images, labels)


def show(title: str, ledger: Ledger) -> None:
    columns = (*COLUMNS, "pieces")
    print(f"\n{title:34}", *(f"{column:>11}" for column in columns))
    for phase, row in ledger.counts.items():
        print(f"  {phase:32}", *(f"{row[column]:11}" for column in columns))
    print(f"  {'sum':32}", *(f"{ledger.total(column):11}" for column in columns), flush=True)


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--methods", nargs="+", default=["FT", "MIB", "RW"])
    p.add_argument("--tasks", nargs="+", default=["100-50", "15-5"])
    p.add_argument("--world", type=int, default=1, help="processes, of which one is counted")
    p.add_argument("--compiled", action="store_true", help="the loss as Inductor fuses it")
    args, rest = p.parse_known_args()
    for task in args.tasks:
        dataset = "ade" if task.startswith("100") else "voc"
        for method in args.methods:
            flags = ("--dataset", dataset, "--task", task, "--method", method,
                     "--batch_size", "24", "--amp", "bf16", *rest)  # fmt: skip
            for what in (False, True):
                ledger = count(flags, validation=what, world=args.world, compiled=args.compiled)
                name = "validation" if what else "training"
                show(f"{method} {task} {name}, {args.world} process(es)", ledger)


if __name__ == "__main__":
    start(main)
