"""A command line becomes plans: which steps of which runs are to be learned, in order.

`parse` fills in the method's row and the defaults that depend on other flags, and rejects what
cannot work. Nothing here imports torch, so that `--help` and a mistyped flag answer at once.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from argparser import DEFAULT_SEED, Options, get_parser
from dataset.catalog import get_spec
from methods.table import FLAGS as METHOD_FLAGS
from methods.table import METHODS, NO_METHOD, Method
from tasks import Task, step_numbers
from utils import launcher
from utils.cores import usual_workers
from utils.errors import UserError
from utils.files import is_file_name
from utils.flags import flags_of

PAPER_BATCH = 24  # images in one iteration, over all processes
PAPER_RATES = (0.01, 0.001)  # at step 0 and later


class Plan(NamedTuple):
    """One step to learn, or one checkpoint to test: final options, remarks worth logging."""

    opts: Options
    notes: list[str]


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
        notes: list[str] = []
        if isinstance(method, str):
            method, notes = self._method(method)
        values, more = self._values(step, method)
        values, notes = values | changes, more + notes
        method.check(step)
        if "name" not in self.given and "name" not in changes:
            values["name"] = self.run_name(method.name)
        opts = Options(**values | {"method": method, "typed": frozenset(self.given)})
        _reject_conflicts(opts)
        notes = [*self._remarks(step, method, opts.test), *notes]
        if step == 0 and (idle := method.idle_at_step_0()):
            notes.append(f"step 0 has no teacher: {', '.join('--' + f for f in idle)} idle")
        return Plan(opts, notes)

    def _remarks(self, step: int, method: Method, test: bool) -> list[str]:
        """What is allowed, but may be a slip: an uneven last step, a later step with no method."""
        notes = []
        task, last = self.task, self.task.num_steps - 1
        left = len(task.steps[last])
        if task.increment and left < task.increment and step in (self.steps[0], last):
            notes.append(
                f"task {task.name}: later steps learn {task.increment} classes each, but the last "
                f"one (step {last}) only the {left} left"
            )
        if step > 0 and not test and method.name == NO_METHOD.name:
            typed = ", ".join(f"--{flag}" for flag in METHOD_FLAGS if flag in self.given)
            alone = f"only what {typed} sets" if typed else "plain fine-tuning, as FT"
            notes.append(f"step {step} has no --method: {alone}")
        return notes

    def run_name(self, method: str) -> str:
        """The name of a run if none was typed: its method, and its seed unless that is usual."""
        name = self.values["name"] if method == NO_METHOD.name else method
        seed = self.given.get("random_seed", DEFAULT_SEED)
        return name if seed == DEFAULT_SEED else f"{name}-seed{seed}"

    def _values(self, step: int, method: Method) -> tuple[dict[str, Any], list[str]]:
        """The options of a step but for the method, what depends on others resolved."""
        values = {entry.name: self.values[entry.name] for entry in flags_of(Options)}
        notes: list[str] = []
        if values["recipe"]:
            notes = self._follow_recipe(values, method)
        for name in ("lr", "epochs"):
            if isinstance(values[name], tuple):
                values[name] = values[name][min(step, 1)]
        if values["pooling"] is None:
            values["pooling"] = round(values["crop_size"] / values["output_stride"])
        if values["num_workers"] is None:
            values["num_workers"] = usual_workers()
        return values | {"task": self.task.name, "step": step}, notes

    def _follow_recipe(self, values: dict[str, Any], method: Method) -> list[str]:
        """Put in what the authors used where the user set nothing; returns a remark on the rate."""
        world = launcher.world_size()
        if "batch_size" not in self.given and PAPER_BATCH % world:
            raise UserError(
                f"--recipe {values['recipe']} trains on {PAPER_BATCH} images at a time, which "
                f"{world} processes cannot share: start another number, or give --batch_size"
            )
        recipe = _recipe(values, self.task.name, method, world)
        values |= {name: value for name, value in recipe.items() if name not in self.given}
        return _remark_on_rate(values["lr"], values["batch_size"] * world)

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


def _recipe(values: Mapping[str, Any], task: str, method: Method, world: int) -> dict[str, Any]:
    """What the authors used: of MiB, or with `--recipe plop` of PLOP and the papers after it."""
    recipe: dict[str, Any] = {
        "batch_size": PAPER_BATCH // world, "lr": PAPER_RATES, "crop_size": 512,
        "epochs": 60 if values["dataset"] == "ade" else 30,
    }  # fmt: skip
    if values["recipe"] == "paper":
        return recipe
    if (values["dataset"], task) == ("voc", "10-1") and not method.ewf:
        recipe["epochs"] = (30, 10)
    partition = values["partition"] and not values["overlap"]
    return recipe | {"protocol": "plop", "ignore_void": True, "partition": partition}


def _remark_on_rate(lr: float | tuple[float, float], images: int) -> list[str]:
    """A remark unless the paper's rates are scaled linearly to the `images` in an iteration."""
    if images == PAPER_BATCH:
        return []
    rates = lr if isinstance(lr, tuple) else (lr, lr)
    linear = tuple(rate * images / PAPER_BATCH for rate in PAPER_RATES)
    if all(math.isclose(a, b) for a, b in zip(rates, linear, strict=True)):
        return []
    scaled = ",".join(f"{lr:g}" for lr in linear)
    return [
        f"{images} images per iteration, not {PAPER_BATCH}: the linear rule gives --lr {scaled}"
    ]


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
        (re.search(r"\+(tta$|\w+=)", opts.name),
         f"--name {opts.name!r} is how rows of another test of a run are called: choose another"),
    )  # fmt: skip
    for wrong, message in conflicts:
        if wrong:
            raise UserError(message)
