"""One training iteration of MiB's second step against the loop that people write first.

    python -m benchmarks.step --task 15-5 --crop_size 512 --batch_size 24 --device cuda
    python -m benchmarks.step --variants bf16 fp16 off --phases [flags of run.py]

Ours is set up by engine/ from the flags of run.py, so what is measured is what runs: images
travel as uint8, teacher, student, objective in pieces, optimizer. The plain side is the same
network in PyTorch's default layout with `nn.BatchNorm2d` and leaky ReLU, normalised float images,
full-size logits, fp16 autocast with a scaler on a GPU, and a look at the loss in every iteration.

A variant is one or more of these words, joined by "+": bf16, fp16, off (the precision); iabn, abn
(the norm); triton, package, plain (who computes iabn); compile; plop (that method,
not MiB's). MiB of memory are beyond both networks, the "total ratio" is of all of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import cast, get_args

import torch
from torch import Tensor

import train
from benchmarks import loss
from benchmarks.harness import Row, Work, alone, compare, parser, report, start
from dataset.transform import normalize
from engine.build import build_learner, new_model
from engine.context import Context
from engine.plans import parse
from engine.session import use_true_float32
from methods import groups
from methods.objective import Objective, make_objective
from modules import norm
from train import Learner
from utils.constants import IGNORE_INDEX

WORDS = {
    "bf16": ["--amp", "bf16"], "fp16": ["--amp", "fp16"], "off": ["--amp", "off"],
    "iabn": ["--norm_act", "iabn"], "abn": ["--norm_act", "abn"], "compile": ["--compile"],
    "plop": ["--method", "PLOP"],
    "triton": [], "package": [], "plain": [],
}  # fmt: skip
Batch = tuple[Tensor, Tensor]


def context_of(flags: tuple[str, ...], device: str) -> Context:
    """What the program makes of its flags, at step 1 unless they say otherwise."""
    argv = ["--method", "MIB", "--step", "1", "--no-pretrained", "--norm_act", "iabn", *flags]
    ((opts, _),) = parse(argv)
    return Context.of(opts, torch.device(device))


def random_batch(context: Context, classes: int) -> Batch:
    """Images uint8 and labels of new classes, of background, and void, on the host."""
    opts = context.opts
    g = torch.Generator().manual_seed(0)
    shape = (opts.batch_size, opts.crop_size, opts.crop_size)
    images = torch.randint(0, 256, (shape[0], 3, *shape[1:]), generator=g, dtype=torch.uint8)
    old = context.old_classes or 1
    labels = torch.randint(old - 1, classes, shape, generator=g)
    labels[labels == old - 1] = 0
    labels[:, : opts.crop_size // 16] = IGNORE_INDEX
    return images, labels.to(torch.uint8)


def prepare_ours(
    variant: str, flags: tuple[str, ...], device: str
) -> tuple[Learner, Objective, Batch]:
    for word in variant.split("+"):
        flags += tuple(WORDS[word])
        if word in get_args(norm.Kernels):
            norm.use(cast(norm.Kernels, word))
    context = context_of(flags, device)
    opts, classes = context.opts, context.classes_per_step
    torch.backends.cudnn.benchmark = True
    use_true_float32()  # as run.py does
    torch.manual_seed(0)
    student = new_model(context, classes).train()
    teacher = new_model(context, classes[:-1]).eval().requires_grad_(False)
    learner = build_learner(context, student, teacher, {}, 1000)
    objective = make_objective(
        opts.method, student, teacher, classes, context.precision, compiled=opts.compile
    )
    images, labels = random_batch(context, sum(classes))
    if device != "cpu":  # as `dataset.incremental.collate` and the loader have them
        images = images.contiguous(memory_format=torch.channels_last).pin_memory()
        labels = labels.pin_memory()
    if objective.needs_survey:
        ((x, y),) = train.to_device([(images, labels)], context.device)
        objective.learn(objective.survey(x, y))
    return learner, objective, (images, labels)


def ours(variant: str, flags: tuple[str, ...], device: str) -> Callable[[], object]:
    learner, objective, batch = prepare_ours(variant, flags, device)

    def step() -> object:
        ((images, labels),) = train.to_device([batch], torch.device(device))
        return learner.step(objective, images, labels)

    return step


def plain(flags: tuple[str, ...], device: str) -> Callable[[], object]:
    context = context_of((*flags, "--norm_act", "std"), device)
    classes = context.classes_per_step
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    student, teacher = (
        new_model(context, n).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        for n in (classes, classes[:-1])
    )
    teacher.eval().requires_grad_(False)
    optimizer = torch.optim.SGD(
        student.parameters(), lr=0.001, momentum=0.9, nesterov=True, weight_decay=1e-4
    )
    for weight in student.parameters():  # there from the start, as ours is: both count it alike
        optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
    on_gpu = device != "cpu"
    scaler = torch.amp.GradScaler(device, enabled=on_gpu)
    images, labels = random_batch(context, sum(classes))
    images, labels = normalize(images), labels.long()

    def step() -> float:
        optimizer.zero_grad()
        x, y = images.to(device), labels.to(device)
        with torch.autocast(device, torch.float16, enabled=on_gpu):
            new = student(x).logits
            with torch.no_grad():
                old = teacher(x).logits
        value = loss.plain(new.float(), old.float(), y)
        scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()
        return value.item()

    return step


def phases(variant: str, flags: tuple[str, ...], device: str, calls: int) -> dict[str, float]:
    """Seconds of each phase of an iteration, the device being waited for after every one."""
    learner, objective, (images, labels) = prepare_ours(variant, flags, device)
    clock: dict[str, float] = {}

    def now() -> float:
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter()

    def watch(name: str, owner: object, attribute: str) -> None:
        function = getattr(owner, attribute)

        def call(*args: object, **kwargs: object) -> object:
            start = now()
            result = function(*args, **kwargs)
            clock[name] = clock.get(name, 0) + now() - start
            return result

        setattr(owner, attribute, call)

    watch("teacher forward", objective, "_run_teacher")
    watch("student forward", objective, "_run_student")
    watch("loss and its gradient", groups, "pixel_losses")
    watch("backward of the network", torch.autograd, "backward")
    watch("optimizer", learner.precision.scaler, "step")
    for i in range(calls + 2):
        if i == 2:
            clock.clear()
            begun = now()
        ((x, y),) = train.to_device([(images, labels)], torch.device(device))
        learner.step(objective, x, y)
    clock["the rest"] = now() - begun - sum(clock.values())
    return {name: seconds / calls for name, seconds in clock.items()}


def images_per_second(row: Row, batch: int) -> tuple[float, float]:
    """Ours, plain."""
    summary = row.summary()
    return batch / summary["ours s"], batch / summary["plain s"]


def print_phases(variant: str, seconds: dict[str, float]) -> None:
    total = sum(seconds.values())
    print(f"\nphases of {variant}, {total:.4g} s in all")
    for name, value in seconds.items():
        print(f"  {name:24} {value:9.4g} s {100 * value / total:5.1f} %")


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--variants", nargs="+", default=["iabn"], help="see above")
    p.add_argument("--phases", action="store_true", help="also the share of each phase")
    args, rest = p.parse_known_args()
    unknown = {word for v in args.variants for word in v.split("+")} - WORDS.keys()
    if unknown:
        p.error(f"no such variant: {', '.join(sorted(unknown))}; words are {', '.join(WORDS)}")
    if any({"bf16", "package"} <= set(v.split("+")) for v in args.variants):
        p.error("inplace-abn does not take bf16: plain operations would be measured")
    flags = tuple(rest)
    opts = context_of(flags, args.device).opts
    shared: Work = partial(plain, flags, args.device)
    name = f"{opts.dataset} {opts.task} {opts.backbone} {opts.crop_size} x{opts.batch_size}"
    cases: dict[str, tuple[Work, Work]] = {
        f"{name} {variant}": (partial(ours, variant, flags, args.device), shared)
        for variant in args.variants
    }
    rows = compare(cases, args)
    shares = {
        variant: alone(phases, variant, flags, args.device, args.calls)
        for variant in (args.variants if args.phases else [])
        if f"{name} {variant}" in {row.name for row in rows}
    }
    for variant, seconds in shares.items():
        print_phases(variant, seconds)
    rates = {row.name: images_per_second(row, opts.batch_size) for row in rows}
    for name, (mine, other) in rates.items():
        print(f"{name}: {mine:.4g} images a second, plain {other:.4g}")
    report(cases, rows, args.json, phases=shares, images_per_second=rates)


if __name__ == "__main__":
    start(main)
