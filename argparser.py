"""The command line: every flag is a typed field of `Options` or of a method (`methods/table.py`).

`parse` reads a command line, fills in the method's row and the defaults that depend on other flags,
rejects what cannot work, and says which steps of which runs are to be learned, in order. Nothing
here imports torch, so that `--help` and a mistyped flag answer at once.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from platform import python_version
from typing import Any, NamedTuple

from dataset.catalog import DATASETS, OWN, get_spec
from methods.table import FLAGS as METHOD_FLAGS
from methods.table import METHODS, NO_METHOD, Method
from modules.structures import NORMS, STRIDES_AND_DILATIONS, STRUCTURES
from tasks import Task, step_numbers
from utils import launcher
from utils.cores import usual_workers
from utils.errors import UserError
from utils.files import is_file_name
from utils.flags import Parser, add_flags, flag, flags_of, number, per_step, several
from utils.version import VERSION

SYNONYMS = {"--overlapped": "--overlap"}  # typed by the reference's README
DEFAULT_SEED = 42
PAPER_BATCH = 24  # images in one iteration, over all processes
_positive = number(float, 0, open_low=True)


def _free(default: Any, help: str, **settings: Any) -> Any:
    """A flag on which nothing depends that is computed."""
    return flag(default, help, resume="free", **settings)


@dataclass(frozen=True)
class Options:
    """What one step of one run is to do. Flags that depend on others are resolved here."""

    name: str = _free(
        "Experiment", "names the checkpoint, the logs and the result rows; with several methods a "
        "prefix; not typed: the method's name and, if not 42, the seed", group="run",
    )  # fmt: skip
    dataset: str = flag("voc", "folder = docs/own_data.md", choices=(*DATASETS, OWN), group="run")
    data_root: str = _free(
        "data", "folder that holds PascalVOC12, ADEChallengeData2016, ... (data/README.md), or "
        "dataset.json", group="run",
    )  # fmt: skip
    task: str = flag("19-1", "B-I: B classes, then I at a time; or a fixed name", group="run")
    step: int = flag("0", "steps to learn, one after the other: 2, 0-5, 0,2 or all", group="run")
    overlap: bool = flag(
        False, "overlapped setting (also --overlapped)", resume="identity", group="run"
    )
    method: Method = flag(
        None, "a row of terms, any case; several, joined by commas, share what they can of step 0: "
        + ", ".join(METHODS), parse=several(METHODS, upper=True), resume="identity", group="run",
    )  # fmt: skip
    recipe: str | None = _free(
        None, "fill in what the authors used and you did not set: 24 images in total, "
        "lr 0.01,0.001, 30 epochs (ade 60), crop 512", choices=("paper",), group="run",
    )  # fmt: skip
    base: str | None = _free(
        None, "share step 0: it is learned once under this name, for all runs and tasks",
        group="run",
    )  # fmt: skip
    restart: bool = _free(False, "learn steps again that are finished", group="run")
    step_ckpt: str | None = _free(
        None, "start the step from this checkpoint of the step before", group="run"
    )
    test: bool = _free(False, "evaluate a checkpoint, train nothing", group="run")
    ckpt: str | None = _free(
        None, "checkpoint for --test or --continue_ckpt instead of the run's own", group="run"
    )
    continue_ckpt: bool = _free(False, "go on with an interrupted run of this step", group="run")
    random_seed: int = flag(
        DEFAULT_SEED, "of weights and data", parse=number(int, 0, 2**63 - 1), resume="identity",
        group="run",
    )  # fmt: skip
    num_workers: int = _free(
        None, "data processes per process (default: as many as it has cores, at most 8)",
        parse=number(int, 0), group="run",
    )  # fmt: skip
    deterministic: bool = _free(False, "same bits every time on CUDA; slower", group="run")
    local_rank: int | None = _free(None, "set by the launcher", parse=number(int, 0), group="run")

    epochs: int = flag(
        30, "passes over a step's images; 'a,b': a at step 0, b later",
        parse=per_step(number(int, 1)), group="optimisation",
    )  # fmt: skip
    batch_size: int = _free(4, "images per process", parse=number(int, 1), group="optimisation")
    crop_size: int = flag(
        512, "side of a training crop, pixels", parse=number(int, 32), score=True,
        group="optimisation",
    )  # fmt: skip
    lr: float = flag(
        0.007, "initial learning rate; 'a,b': a at step 0, b later",
        parse=per_step(_positive), group="optimisation",
    )  # fmt: skip
    momentum: float = flag(
        0.9, "of SGD (Nesterov)", parse=number(float, 0, 1), group="optimisation"
    )
    weight_decay: float = flag(1e-4, "of SGD", parse=number(float, 0), group="optimisation")
    lr_policy: str = flag(
        "poly", "schedule, per iteration", choices=("poly", "step"), group="optimisation"
    )
    lr_power: float = flag(
        0.9, "exponent of the poly schedule", parse=_positive, group="optimisation"
    )
    lr_decay_step: int = flag(
        5000, "iterations between decays", parse=number(int, 1), group="optimisation"
    )
    lr_decay_factor: float = flag(
        0.1, "of the step schedule", parse=_positive, group="optimisation"
    )
    amp: str = flag(
        "auto", "mixed precision; auto: bf16 where the GPU has it, else fp16; off on CPU",
        choices=("auto", "bf16", "fp16", "off"), score=True, group="optimisation",
    )  # fmt: skip
    compile: bool = flag(
        False, "torch.compile student and teacher: minutes at the start, for long runs (the loss "
        "is compiled on CUDA in any case)", group="optimisation",
    )  # fmt: skip

    backbone: str = flag("resnet101", "the body", choices=tuple(STRUCTURES), group="model")
    output_stride: int = flag(
        16, "image pixels per logit pixel", parse=int, group="model",
        choices=tuple(sorted(STRIDES_AND_DILATIONS)),
    )  # fmt: skip
    norm_act: str = flag("iabn_sync", "normalisation and activation", choices=NORMS, group="model")
    pretrained: bool | str = _free(
        True, "ImageNet weights at step 0: a file, torchvision to fetch its own, or nothing for "
        "pretrained/<backbone>_iabn_sync.pth.tar", negatable=True, takes_value=True, group="model",
    )  # fmt: skip
    pooling: int = flag(
        None, "pooling window of the head in eval (default crop_size / output_stride)",
        parse=number(int, 1), score=True, group="model",
    )  # fmt: skip

    crop_val: bool = flag(
        True, "validate and test on centre crops", negatable=True, score=True, group="evaluation"
    )
    tta: bool = _free(
        False, "test once more, averaged over three scales and mirrored images",
        group="evaluation",
    )  # fmt: skip
    val_on_trainset: bool = flag(
        False, "validate and test on the whole train list", score=True, group="evaluation"
    )
    cross_val: bool = flag(
        False, "validate on a held-out fifth of the train list", group="evaluation"
    )
    mask: bool = flag(
        True, "old classes become background in training (--no_mask keeps them)",
        negatable=True, resume="identity", group="evaluation",
    )  # fmt: skip
    val_interval: int = _free(
        1, "epochs between validations", parse=number(int, 1), group="evaluation"
    )
    ckpt_interval: int = _free(
        1, "epochs between checkpoints", parse=number(int, 1), group="evaluation"
    )

    logdir: str = _free("./logs", "where curves and result tables go", group="logging")
    visualize: bool = _free(True, "write TensorBoard files", negatable=True, group="logging")
    sample_num: int = _free(0, "panels per validation", parse=number(int, 0), group="logging")
    print_interval: int = _free(
        10, "iterations between log points", parse=number(int, 1), group="logging"
    )
    debug: bool = _free(False, "talk more, on every rank, with tracebacks", group="logging")
    wandb: bool = _free(False, "log to Weights & Biases as well", group="logging")
    wandb_project: str = _free("incremental-segmentation", "project there", group="logging")
    wandb_entity: str | None = _free(None, "team or user there", group="logging")

    typed: frozenset[str] = frozenset()  # the flags that the user typed; no flag itself

    def record(self) -> dict[str, Any]:
        """Flag -> value, those of the method beside the others: what a checkpoint keeps."""
        own = {entry.name: getattr(self, entry.name) for entry in flags_of(self)}
        name = None if self.method.name == NO_METHOD.name else self.method.name
        return {**own, "method": name, **self.method.flags()}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Options:
        """The options of a `record`; flags that an older program did not write have defaults."""
        known = default_record() | dict(record)
        row = METHODS.get(str(known["method"]), NO_METHOD)
        method = Method(row.name, row.paper, **{name: known[name] for name in METHOD_FLAGS})
        own = {entry.name: known[entry.name] for entry in flags_of(cls)}
        return cls(**own | {"method": method})


class Plan(NamedTuple):
    """One step to learn, or one checkpoint to test: final options, remarks worth logging."""

    opts: Options
    notes: list[str]


def get_parser() -> Parser:
    """The parser with all flags, grouped; defaults are those of the reference."""
    parser = Parser(
        prog="run.py",
        synonyms=SYNONYMS,
        description="Class-incremental semantic segmentation.",
        epilog="Exit status: 0 done; 1 failed, with a line that says why; 75 stopped by SIGTERM or "
        "Ctrl-C with a checkpoint written: the same command with --continue_ckpt goes on.",
    )
    version = f"run.py {VERSION} (Python {python_version()})"
    parser.add_argument("--version", action="version", version=version)
    groups: dict[str, list[Any]] = {}
    for entry in flags_of(Options):
        groups.setdefault(entry.metadata["group"], []).append(entry)
        if entry.name == "pooling":  # the last of the model's: a method's flags come next
            groups["terms (a method sets them; a flag given here wins)"] = list(flags_of(Method))
    for title, entries in groups.items():
        add_flags(parser.add_argument_group(title), entries)
    return parser


def default_record() -> dict[str, Any]:
    """The record of an empty command line."""
    return parse([])[0].opts.record()


def parse(argv: Sequence[str]) -> list[Plan]:
    """Command line -> what to do, in order. Raises UserError."""
    parser = get_parser()
    typed = vars(parser.parse_args(list(argv)))
    # Defaults fill only what a namespace lacks, so in this one only typed flags are not None.
    bare = argparse.Namespace(**dict.fromkeys(typed))
    given = {k: v for k, v in vars(parser.parse_args(list(argv), bare)).items() if v is not None}
    task = get_spec(typed["dataset"], typed["data_root"]).task(typed["task"])
    steps = step_numbers(typed["step"], task)
    if typed["ckpt"] and len(steps) > 1:
        raise UserError("--ckpt is one file and --step names several steps: name one step")
    names = typed["method"].split(",") if typed["method"] else [NO_METHOD.name]
    make = _several_methods if len(names) > 1 else _one_method
    return list(make(_Command(typed, given, task, steps), names))


class _Command(NamedTuple):
    """A command line as it was typed."""

    values: dict[str, Any]  # of all flags of the parser
    given: dict[str, Any]  # of the flags that the user typed
    task: Task
    steps: list[int]

    def plan(self, step: int, method: str | Method, **changes: Any) -> Plan:
        """A step with a method (of the table by its name), some options changed."""
        if step > self.steps[0]:
            changes = {"step_ckpt": None} | changes  # the step before is this command's own
        values, notes = self._values(step)
        values |= changes
        if isinstance(method, str):
            method, more = self._method(method)
            notes += more
        method.check(step)
        if "name" not in self.given and "name" not in changes:
            values["name"] = self.run_name(method.name)
        opts = Options(**values | {"method": method, "typed": frozenset(self.given)})
        _reject_conflicts(opts)
        if step == 0 and (idle := method.idle_at_step_0()):
            notes.append(f"step 0 has no teacher: {', '.join('--' + f for f in idle)} idle")
        return Plan(opts, notes)

    def run_name(self, method: str) -> str:
        """What a run is called whose name was not typed: its method, and a seed of its own."""
        name = self.values["name"] if method == NO_METHOD.name else method
        seed = self.given.get("random_seed", DEFAULT_SEED)
        return name if seed == DEFAULT_SEED else f"{name}-seed{seed}"

    def _values(self, step: int) -> tuple[dict[str, Any], list[str]]:
        """The options of a step but for the method, what depends on others resolved."""
        values = {entry.name: self.values[entry.name] for entry in flags_of(Options)}
        notes: list[str] = []
        if values["recipe"]:
            notes = _follow_recipe(values, self.given)
        for name in ("lr", "epochs"):
            if isinstance(values[name], tuple):
                values[name] = values[name][min(step, 1)]
        if values["pooling"] is None:
            values["pooling"] = round(values["crop_size"] / values["output_stride"])
        if values["num_workers"] is None:
            values["num_workers"] = usual_workers()
        return values | {"task": self.task.name, "step": step}, notes

    def _method(self, name: str) -> tuple[Method, list[str]]:
        """A row of the table on this task, the flags that the user typed put in."""
        row = METHODS.get(name, NO_METHOD).at(self.task.dataset, self.task.name)
        typed = {flag: self.given[flag] for flag in METHOD_FLAGS if flag in self.given}
        notes = [
            f"--{flag} {value} replaces {name}'s own value {getattr(row, flag)}"
            for flag, value in typed.items()
            if name != NO_METHOD.name and getattr(row, flag) != value
        ]
        method, implied = replace(row, **typed).completed()
        return method, notes + implied


def _one_method(command: _Command, names: Sequence[str]) -> Iterator[Plan]:
    """Every step; a step 0 under `--base` is learned as a run of its own, then tested as ours."""
    (name,) = names
    for step in command.steps:
        base = command.values["base"]
        if base is None or step > 0 or command.values["test"]:
            yield command.plan(step, name)
        else:
            yield command.plan(step, name, name=base)
            opts = command.plan(step, name).opts
            yield Plan(replace(opts, test=True, continue_ckpt=False), [])


def _several_methods(command: _Command, names: Sequence[str]) -> Iterator[Plan]:
    """Step 0 once for all methods that agree on it, then each later step of each method."""
    prefix, given_base = command.given.get("name"), command.values["base"]
    if command.values["step_ckpt"] or command.values["ckpt"]:
        raise UserError("--step_ckpt and --ckpt are of one run: name one --method beside them")
    methods = {name: command._method(name)[0] for name in names}
    groups: dict[Method, list[str]] = {}
    for name, method in methods.items():
        groups.setdefault(method.at_step_0(), []).append(name)
    bases: dict[str, str | None] = {}
    shared = 0
    for first, members in groups.items():
        base = None
        if len(members) > 1:
            own = f"{prefix}-base" if prefix else command.run_name("base")
            base = (given_base or own) + (f"-{shared}" if shared else "")
            shared += 1
            if 0 in command.steps:
                yield command.plan(0, _collecting(first, methods, members), name=base, base=base)
        bases |= dict.fromkeys(members, base)
    for name in names:
        for step in command.steps:
            if step > 0 or bases[name] is None:
                called = f"{prefix}-{name}" if prefix else command.run_name(name)
                yield command.plan(step, name, name=called, base=bases[name])


def _collecting(first: Method, methods: Mapping[str, Method], members: Sequence[str]) -> Method:
    """The shared step 0, with the regularisers of all whose importances it collects."""
    kinds = dict.fromkeys(kind for name in members if (kind := methods[name].regularizer))
    return replace(first, regularizer=",".join(kinds) or None)


def _follow_recipe(values: dict[str, Any], given: Mapping[str, Any]) -> list[str]:
    """Put in what the authors used where the user set nothing; returns a remark on the rate."""
    world = launcher.number("WORLD_SIZE", 1, low=1)
    if "batch_size" not in given and PAPER_BATCH % world:
        raise UserError(
            f"--recipe paper trains on {PAPER_BATCH} images at a time, which {world} processes "
            "cannot share: start another number, or give --batch_size"
        )
    recipe: dict[str, Any] = {
        "batch_size": PAPER_BATCH // world, "lr": (0.01, 0.001), "crop_size": 512,
        "epochs": 60 if values["dataset"] == "ade" else 30,
    }  # fmt: skip
    values |= {name: value for name, value in recipe.items() if name not in given}
    total = values["batch_size"] * world
    if total == PAPER_BATCH:
        return []
    rates = values["lr"] if isinstance(values["lr"], tuple) else (values["lr"],) * 2
    linear = tuple(lr * total / PAPER_BATCH for lr in recipe["lr"])
    if all(math.isclose(a, b) for a, b in zip(rates, linear, strict=True)):
        return []
    scaled = ",".join(f"{lr:g}" for lr in linear)
    return [f"{total} images per iteration, not {PAPER_BATCH}: the linear rule gives --lr {scaled}"]


def _reject_conflicts(opts: Options) -> None:
    too_small = 3 * opts.output_stride  # local POD cuts the smallest map into 4 x 4 squares
    pod = (opts.method.pod or opts.method.pod_logits) and opts.step > 0 and not opts.test
    conflicts = (
        (pod and opts.crop_size <= too_small,
         f"--crop_size {opts.crop_size} leaves fewer than 4 x 4 cells for --pod: give at least "
         f"{too_small + 1}, or --pod 0 --pod_logits 0"),
        (opts.val_on_trainset and opts.cross_val,
         "--val_on_trainset and --cross_val exclude each other"),
        (opts.test and opts.continue_ckpt, "--test and --continue_ckpt exclude each other"),
        (opts.restart and opts.continue_ckpt, "--restart and --continue_ckpt exclude each other"),
        (opts.ckpt and not (opts.test or opts.continue_ckpt),
         "--ckpt is read by --test or --continue_ckpt; to start a step from it use --step_ckpt"),
        (opts.step_ckpt and opts.step == 0, "step 0 has no step before: drop --step_ckpt"),
        (opts.momentum == 0, "--momentum 0 has no Nesterov form: give a value in (0, 1]"),
        (opts.wandb_entity and not opts.wandb, "--wandb_entity needs --wandb"),
        (opts.base is not None and opts.step_ckpt, "--base and --step_ckpt exclude each other"),
        (opts.base is not None and not is_file_name(opts.base),
         f"--base {opts.base!r} cannot be a file name: use at most 200 bytes, no slash"),
        (not is_file_name(opts.name),
         f"--name {opts.name!r} cannot be a file name: use at most 200 bytes, no slash"),
    )  # fmt: skip
    for wrong, message in conflicts:
        if wrong:
            raise UserError(message)
