"""Every flag of the program, and what a method makes of them.

`parse` reads a command line, fills in the method's row and the defaults that depend on other flags,
and rejects what cannot work. Flags may be typed with `-` or `_`, methods in any case.
"""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, NoReturn

from dataset import DATASETS, OWN, get_spec
from methods.regularizer import KINDS
from methods.table import METHODS
from modules.structures import NORMS, STRIDES_AND_DILATIONS, STRUCTURES
from tasks import Task, check_step
from utils.errors import UserError

SYNONYMS = {"--overlapped": "--overlap"}  # typed by the reference's README


class Parser(argparse.ArgumentParser):
    """argparse, with the program's one-line errors and one spelling behind `-` and `_`."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `python run.py --help` lists every flag")

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        return super().parse_known_args([_canonical(a) for a in args or ()], namespace)


def _canonical(argument: str) -> str:
    """`--no-pretrained` -> `--no_pretrained`; the part behind `=` and values stay as they are."""
    if not argument.startswith("--") or argument == "--":
        return argument
    flag, equals, value = argument.partition("=")
    flag = flag.replace("-", "_").replace("__", "--", 1)
    return SYNONYMS.get(flag, flag) + equals + value


class Switch(argparse.Action):
    """`--flag` turns on, `--no_flag` turns off."""

    def __init__(self, option_strings: Sequence[str], dest: str, **settings: Any) -> None:
        flag = option_strings[0]
        super().__init__([flag, f"--no_{flag[2:]}"], dest, nargs=0, **settings)

    def __call__(self, parser, namespace, values, option_string=None):  # type: ignore[no-untyped-def]
        setattr(namespace, self.dest, not str(option_string).startswith("--no_"))


def _number(
    kind: Callable[[str], Any], low: float, high: float = math.inf, open_low: bool = False
) -> Callable[[str], Any]:
    """A type for argparse: `kind` within [low, high], or (low, high] with `open_low`; finite."""

    def convert(text: str) -> Any:
        value = kind(text)
        if not math.isfinite(value) or not low <= value <= high or (open_low and value == low):
            bounds = f"above {low}" if open_low else f"at least {low}"
            if high < math.inf:
                bounds += f", at most {high}"
            raise argparse.ArgumentTypeError(f"{text} is out of range ({bounds})")
        return value

    convert.__name__ = "whole number" if kind is int else "number"
    return convert


def _per_step(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    """A type for argparse: one value, or `first,later` for step 0 and the steps after it."""

    def pair(text: str) -> Any:
        first, comma, later = text.partition(",")
        return (convert(first), convert(later)) if comma else convert(first)

    pair.__name__ = convert.__name__
    return pair


def _regularizers(text: str) -> str:
    """A type for argparse: one or several kinds, joined by commas."""
    kinds = text.lower().split(",")
    if len(set(kinds)) < len(kinds) or not set(kinds) <= set(KINDS):
        raise argparse.ArgumentTypeError(f"{text!r}: choose from {', '.join(KINDS)}")
    return ",".join(kinds)


def get_parser() -> Parser:
    """The parser with all flags, grouped; defaults are those of the reference (SPEC section 13)."""
    parser = Parser(
        prog="run.py",
        description="Class-incremental semantic segmentation.",
        epilog="Exit status: 0 done; 1 failed, with a line that says why; 75 stopped by SIGTERM or "
        "Ctrl-C with a checkpoint written: the same command with --continue_ckpt goes on.",
    )
    _add_run(parser.add_argument_group("run"))
    _add_optimisation(parser.add_argument_group("optimisation"))
    _add_model(parser.add_argument_group("model"))
    _add_terms(parser.add_argument_group("terms (a method sets them; a flag given here wins)"))
    _add_evaluation(parser.add_argument_group("evaluation"))
    _add_logging(parser.add_argument_group("logging"))
    return parser


def _add_run(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--name", default="Experiment", help="names the checkpoint, the logs and the result rows")
    add("--dataset", default="voc", choices=(*DATASETS, OWN), help="folder = docs/own_data.md")
    add("--data_root", default="data",
        help="folder that holds PascalVOC12 or ADEChallengeData2016, or dataset.json")  # fmt: skip
    add("--task", default="19-1", help="B-I: B classes, then I at a time; or a fixed name")
    add("--step", default="0", help="steps to learn, one after the other: 2, 0-5, 0,2 or all")
    add("--overlap", action="store_true", help="overlapped setting (also --overlapped)")
    add("--method", type=str.upper, choices=tuple(METHODS), help="a row of terms; any case")
    add("--recipe", choices=("paper",), help="fill in what the authors used and you did not set: "
        "24 images in total, lr 0.01,0.001, 30 epochs (ade 60), crop 512")
    add("--base", help="share step 0: it is learned once under this name, for all runs and tasks")
    add("--restart", action="store_true", help="learn steps again that are finished")
    add("--step_ckpt", help="start the step from this checkpoint of the step before")
    add("--test", action="store_true", help="evaluate a checkpoint, train nothing")
    add("--ckpt", help="checkpoint for --test or --continue_ckpt instead of the run's own")
    add("--continue_ckpt", action="store_true", help="go on with an interrupted run of this step")
    add("--random_seed", type=_number(int, 0, 2**63 - 1), default=42, help="of weights and data")
    add("--num_workers", type=_number(int, 0), default=1, help="data processes per process")
    add("--deterministic", action="store_true", help="same bits every time on CUDA; slower")
    add("--local_rank", type=_number(int, 0), help="set by the launcher")


def _add_optimisation(group: argparse._ArgumentGroup) -> None:
    add, positive = group.add_argument, _number(float, 0, open_low=True)
    add("--epochs", type=_per_step(_number(int, 1)), default=30,
        help="passes over a step's images; 'a,b': a at step 0, b later")  # fmt: skip
    add("--batch_size", type=_number(int, 1), default=4, help="images per process")
    add("--crop_size", type=_number(int, 32), default=512, help="side of a training crop, pixels")
    add("--lr", type=_per_step(positive), default=0.007,
        help="initial learning rate; 'a,b': a at step 0, b later")  # fmt: skip
    add("--momentum", type=_number(float, 0, 1), default=0.9, help="of SGD (Nesterov)")
    add("--weight_decay", type=_number(float, 0), default=1e-4, help="of SGD")
    add("--lr_policy", default="poly", choices=("poly", "step"), help="schedule, per iteration")
    add("--lr_power", type=positive, default=0.9, help="exponent of the poly schedule")
    add("--lr_decay_step", type=_number(int, 1), default=5000, help="iterations between decays")
    add("--lr_decay_factor", type=positive, default=0.1, help="of the step schedule")
    add("--amp", default="auto", choices=("auto", "bf16", "fp16", "off"),
        help="mixed precision; auto: bf16 where the GPU has it, else fp16; off on CPU")  # fmt: skip
    add("--compile", action="store_true", help="torch.compile student and teacher: minutes at the "
        "start, for long runs (the loss is compiled on CUDA in any case)")


def _add_model(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--backbone", default="resnet101", choices=tuple(STRUCTURES), help="the body")
    add("--output_stride", type=int, default=16, choices=tuple(sorted(STRIDES_AND_DILATIONS)),
        help="image pixels per logit pixel")  # fmt: skip
    add("--norm_act", default="iabn_sync", choices=NORMS, help="normalisation and activation")
    add("--pretrained", action=Switch, default=True, help="ImageNet weights at step 0")
    add("--pooling", type=_number(int, 1),
        help="pooling window of the head in eval (default crop_size / output_stride)")  # fmt: skip
    add("--fix_bn", action="store_true", help="freeze statistics, weights and biases of all norms")
    add("--freeze", action="store_true", help="freeze the body")


def _add_terms(group: argparse._ArgumentGroup) -> None:
    add, weight = group.add_argument, _number(float, 0)
    add("--bce", action=Switch, default=False, help="binary instead of softmax cross-entropy")
    add("--unce", action=Switch, default=False, help="unbiased cross-entropy (MiB)")
    add("--loss_kd", type=weight, default=0.0, help="weight of the output distillation")
    add("--unkd", action=Switch, default=False, help="output distillation is unbiased (MiB)")
    add("--alpha", type=_number(float, 0, open_low=True), default=1.0,
        help="factor on the teacher's logits in the distillation")  # fmt: skip
    add("--loss_de", type=weight, default=0.0, help="weight of the feature distillation (ILT)")
    add("--init_balanced", action=Switch, default=False, help="classifier initialisation of MiB")
    add("--icarl", action=Switch, default=False, help="distillation of iCaRL beside BCE")
    add("--icarl_importance", type=weight, default=1.0, help="weight of --icarl")
    add("--icarl_disjoint", action="store_true", help="iCaRL as one BCE with the teacher's targets")
    add("--icarl_bkg", action="store_true", help="--icarl_disjoint, background keeps its label")
    add("--regularizer", type=_regularizers,
        help="penalty on changed weights: ewc, rw or pi; at step 0 also several, comma-separated, "
        "whose importances are collected")  # fmt: skip
    add("--reg_importance", type=weight, default=1.0, help="weight of the penalty")
    add("--reg_alpha", type=_number(float, 0, 1), default=0.9, help="update rate of the Fisher")
    add("--reg_iterations", type=_number(int, 1), default=10, help="iterations between RW scores")
    add("--reg_no_normalize", action="store_true", help="use importances as they are stored")


def _add_evaluation(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--crop_val", action=Switch, default=True, help="validate and test on centre crops")
    add("--tta", action="store_true",
        help="test once more, averaged over three scales and mirrored images")  # fmt: skip
    add("--val_on_trainset", action="store_true", help="validate and test on the whole train list")
    add("--cross_val", action="store_true", help="validate on a held-out fifth of the train list")
    add("--mask", action=Switch, default=True,
        help="old classes become background in training (--no_mask keeps them)")  # fmt: skip
    add("--val_interval", type=_number(int, 1), default=1, help="epochs between validations")
    add("--ckpt_interval", type=_number(int, 1), default=1, help="epochs between checkpoints")


def _add_logging(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--logdir", default="./logs", help="where curves and result tables go")
    add("--visualize", action=Switch, default=True, help="write TensorBoard files")
    add("--sample_num", type=_number(int, 0), default=0, help="panels per validation")
    add("--print_interval", type=_number(int, 1), default=10, help="iterations between log points")
    add("--debug", action="store_true", help="talk more, on every rank, with tracebacks")
    add("--wandb", action="store_true", help="log to Weights & Biases as well")
    add("--wandb_project", default="incremental-segmentation", help="project there")
    add("--wandb_entity", help="team or user there")


class Plan(NamedTuple):
    """One step to learn, or one checkpoint to test: final options, remarks worth logging."""

    opts: argparse.Namespace
    notes: list[str]


def parse(argv: Sequence[str]) -> list[Plan]:
    """Command line -> what to do, in order. Raises UserError."""
    parser = get_parser()
    typed = parser.parse_args(list(argv))
    # Defaults fill only what a namespace lacks, so in this one only typed flags are not None.
    bare = argparse.Namespace(**dict.fromkeys(vars(typed)))
    given = {k for k, v in vars(parser.parse_args(list(argv), bare)).items() if v is not None}
    task = get_spec(typed.dataset, typed.data_root).task(typed.task)
    plans: list[Plan] = []
    steps = step_numbers(typed.step, task)
    if typed.ckpt and len(steps) > 1:
        raise UserError("--ckpt is one file and --step names several steps: name one step")
    for step in steps:
        opts = argparse.Namespace(**vars(typed))
        opts.step = step
        if step > steps[0]:
            opts.step_ckpt = None  # the step before is this command's own
        plans.append(Plan(opts, resolve(opts, given, task)))
        if opts.base and step == 0 and not opts.test:
            # Learned as a run of its own; then tested as this run's step 0, for its table.
            tested = argparse.Namespace(**{**vars(opts), "test": True, "continue_ckpt": False})
            opts.name = opts.base
            plans.append(Plan(tested, []))
    return plans


def step_numbers(text: str, task: Task) -> list[int]:
    """`2`, `0-5`, `0,2` or `all` -> ascending step numbers. Raises UserError."""
    if text.lower() == "all":
        return list(range(task.num_steps))
    steps: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise UserError(f"--step {text!r} names no steps: use 2, 0-5, 0,2 or all")
        steps.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    for step in sorted(steps):
        check_step(task, step)
    return sorted(steps)


def resolve(opts: argparse.Namespace, given: set[str], task: Task) -> list[str]:
    """Complete the options of one step in place; `given` names the flags that the user typed.

    The recipe and the method's row fill what the user left alone. Returns remarks for the log;
    raises UserError for flags that contradict each other.
    """
    notes: list[str] = []
    opts.task = task.name
    if opts.recipe:
        notes += _follow_recipe(opts, given)
    for flag in ("lr", "epochs"):
        value = getattr(opts, flag)
        if isinstance(value, tuple):
            setattr(opts, flag, value[min(opts.step, 1)])
    if opts.method is not None:
        for flag, value in METHODS[opts.method].flags(task.name).items():
            if flag not in given:
                setattr(opts, flag, value)
            elif getattr(opts, flag) != value:
                mine = getattr(opts, flag)
                notes.append(f"--{flag} {mine} replaces {opts.method}'s own value {value}")
    if opts.pooling is None:
        opts.pooling = round(opts.crop_size / opts.output_stride)
    _imply(opts, notes)
    _reject_conflicts(opts)
    if opts.step == 0:
        idle = [f for f in ("loss_kd", "loss_de", "icarl", "init_balanced") if getattr(opts, f)]
        if idle:
            notes.append(f"step 0 has no teacher: {', '.join('--' + f for f in idle)} idle")
    return notes


PAPER_BATCH = 24  # images in one iteration, over all processes


def _follow_recipe(opts: argparse.Namespace, given: set[str]) -> list[str]:
    """What the authors used, where the user set nothing (SPEC section 9)."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if "batch_size" not in given and PAPER_BATCH % world:
        raise UserError(
            f"--recipe paper trains on {PAPER_BATCH} images at a time, which {world} processes "
            "cannot share: start another number, or give --batch_size"
        )
    recipe: dict[str, Any] = {
        "batch_size": PAPER_BATCH // world, "lr": (0.01, 0.001), "crop_size": 512,
        "epochs": 60 if opts.dataset == "ade" else 30,
    }  # fmt: skip
    for flag, value in recipe.items():
        if flag not in given:
            setattr(opts, flag, value)
    total = opts.batch_size * world
    if total == PAPER_BATCH:
        return []
    rates = opts.lr if isinstance(opts.lr, tuple) else (opts.lr,) * 2
    linear = tuple(lr * total / PAPER_BATCH for lr in recipe["lr"])
    if all(math.isclose(a, b) for a, b in zip(rates, linear, strict=True)):
        return []
    scaled = ",".join(f"{lr:g}" for lr in linear)
    return [f"{total} images per iteration, not {PAPER_BATCH}: the linear rule gives --lr {scaled}"]


def _imply(opts: argparse.Namespace, notes: list[str]) -> None:
    """iCaRL's variants build on each other and on binary cross-entropy."""
    chain = ("icarl_bkg", "icarl_disjoint", "icarl", "bce")
    for flag, needed in pairwise(chain):
        if getattr(opts, flag) and not getattr(opts, needed):
            setattr(opts, needed, True)
            notes.append(f"--{flag} implies --{needed}")


def _reject_conflicts(opts: argparse.Namespace) -> None:
    conflicts = (
        (opts.unce and opts.bce, "--unce is a softmax loss, --bce (or --icarl) is not: drop one"),
        (opts.unkd and not opts.loss_kd, "--unkd needs a weight: add --loss_kd W with W > 0"),
        (opts.icarl_disjoint and opts.icarl_importance != 1 and opts.method is None,
         "--icarl_disjoint is one loss without a weight: drop --icarl_importance"),
        (opts.val_on_trainset and opts.cross_val,
         "--val_on_trainset and --cross_val exclude each other"),
        (opts.test and opts.continue_ckpt, "--test and --continue_ckpt exclude each other"),
        (opts.restart and opts.continue_ckpt, "--restart and --continue_ckpt exclude each other"),
        (opts.ckpt and not (opts.test or opts.continue_ckpt),
         "--ckpt is read by --test or --continue_ckpt; to start a step from it use --step_ckpt"),
        (opts.step > 0 and "," in (opts.regularizer or ""),
         "several --regularizer can only collect at step 0: name one"),
        (opts.step_ckpt and opts.step == 0, "step 0 has no step before: drop --step_ckpt"),
        (opts.momentum == 0, "--momentum 0 has no Nesterov form: give a value in (0, 1]"),
        (opts.wandb_entity and not opts.wandb, "--wandb_entity needs --wandb"),
        (opts.base is not None and opts.step_ckpt, "--base and --step_ckpt exclude each other"),
        (opts.base is not None and not _is_file_name(opts.base),
         f"--base {opts.base!r} cannot be a file name: drop the slashes"),
        (not _is_file_name(opts.name),
         f"--name {opts.name!r} cannot be a file name: drop the slashes"),
    )  # fmt: skip
    for wrong, message in conflicts:
        if wrong:
            raise UserError(message)


def _is_file_name(name: str) -> bool:
    return bool(name) and "/" not in name and "\0" not in name and name not in (".", "..")
