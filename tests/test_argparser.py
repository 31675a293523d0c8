"""Flags: every spelling, the method table, remarks, and one line for what cannot work."""

from __future__ import annotations

import re

import pytest

from argparser import get_parser
from engine.plans import parse as parse_all
from methods.groups import pixel_terms
from methods.table import METHODS
from tests.conftest import ROOT
from utils.errors import UserError

# The eight rows of the paper as the flags that a user would have to type.
ROWS = {
    "FT": {},
    "LWF": {"loss_kd": 100},
    "LWF-MC": {"bce": True, "icarl": True, "icarl_importance": 10},
    "ILT": {"loss_kd": 100, "loss_de": 100},
    "EWC": {"regularizer": "ewc", "reg_importance": 500},
    "RW": {"regularizer": "rw", "reg_importance": 100},
    "PI": {"regularizer": "pi", "reg_importance": 500},
    "MIB": {"unce": True, "unkd": True, "loss_kd": 10, "init_balanced": True},
}
# What followed; the default task is 19-1.
MIB = ROWS["MIB"]
PLOP = {"pod": 0.01, "pod_logits": 0.0005, "pseudo": True, "init_balanced": True}
ROWS |= {
    "PLOP": PLOP,
    "MIB+EWF": {**MIB, "ewf": True},
    "PLOP+EWF": {**PLOP, "ewf": True},
    "PLOP+LGKD": {**PLOP, "lgkd_old": 5, "lgkd_new": 0.5},
}


def parse(argv: list[str]):
    """Options and remarks of a command for a single step."""
    (plan,) = parse_all(argv)
    return plan


def flags(opts) -> dict:
    return {k: v for k, v in opts.record().items() if k not in ("method", "task", "name")}


@pytest.mark.parametrize("name", ROWS)
def test_a_method_is_its_row(name: str):
    assert name in METHODS
    typed = []
    for flag, value in ROWS[name].items():
        typed += [f"--{flag}"] if value is True else [f"--{flag}", str(value)]
    assert flags(parse(["--method", name])[0]) == flags(parse(typed)[0])


@pytest.mark.parametrize("task", ["15-5s", "15-1"])
def test_mib_distils_harder_on_15_5s(task: str):
    assert parse(["--method", "MIB", "--task", task])[0].method.loss_kd == 100
    assert parse(["--method", "MIB", "--task", "15-5"])[0].method.loss_kd == 10


@pytest.mark.parametrize("spelling", ["mib", "MiB", "MIB"])
def test_methods_in_any_case(spelling: str):
    assert parse(["--method", spelling])[0].method.name == "MIB"


@pytest.mark.parametrize(
    ("argv", "flag", "value"),
    [
        (["--overlapped"], "overlap", True),
        (["--overlap"], "overlap", True),
        (["--no-pretrained"], "pretrained", False),
        (["--no_pretrained"], "pretrained", False),
        (["--local-rank=3"], "local_rank", 3),
        (["--local_rank", "3"], "local_rank", 3),
        (["--crop-size", "64"], "crop_size", 64),
        (["--no-crop-val"], "crop_val", False),
        (["--no_mask"], "mask", False),
        (["--no-visualize"], "visualize", False),
        (["--name", "my-run"], "name", "my-run"),
        (["--name=--x-y"], "name", "--x-y"),
        (["--norm_act", "std"], "norm_act", "std"),
    ],
)
def test_every_spelling_works(argv: list[str], flag: str, value):
    assert getattr(parse(argv)[0], flag) == value


def test_defaults_are_the_documented_ones():
    opts, notes = parse([])
    expected = {
        "name": "Experiment", "dataset": "voc", "data_root": "data", "task": "19-1", "step": 0,
        "overlap": False, "method": None, "random_seed": 42, "epochs": 30,
        "batch_size": 4, "crop_size": 512, "lr": 0.007, "momentum": 0.9, "weight_decay": 1e-4,
        "lr_policy": "poly", "lr_power": 0.9, "lr_decay_step": 5000, "lr_decay_factor": 0.1,
        "amp": "auto", "backbone": "resnet101", "output_stride": 16, "norm_act": "iabn_sync",
        "pooling": 32, "reg_alpha": 0.9, "reg_iterations": 10, "alpha": 1.0, "crop_val": True,
        "val_interval": 1, "ckpt_interval": 1, "logdir": "./logs", "sample_num": 0,
        "print_interval": 10, "visualize": True,
    }  # fmt: skip
    assert {k: opts.record()[k] for k in expected} == expected
    assert notes == []


@pytest.mark.parametrize(
    ("cores", "processes", "workers"),
    [(1, None, 1), (6, None, 6), (64, None, 8), (16, 4, 4), (2, 4, 1)],
)
def test_data_workers_share_the_cores(cores, processes, workers, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
    for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    if processes:
        monkeypatch.setenv("WORLD_SIZE", "32")
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert parse([])[0].num_workers == workers
    assert parse(["--num_workers", "0"])[0].num_workers == 0


def test_a_typed_flag_beats_the_method_and_is_logged():
    opts, notes = parse(["--method", "MIB", "--step", "1", "--loss_kd", "3", "--no_init_balanced"])
    assert (opts.method.loss_kd, opts.method.init_balanced, opts.method.unce) == (3, False, True)
    assert notes == [
        "--loss_kd 3.0 replaces MIB's own value 10",
        "--init_balanced False replaces MIB's own value True",
    ]


def test_a_typed_default_counts_as_typed():
    assert parse(["--method", "LWF", "--loss_kd", "0"])[0].method.loss_kd == 0


def test_idle_distillation_at_step_0_is_logged():
    _, notes = parse(["--method", "MIB"])
    assert notes == ["step 0 has no teacher: --loss_kd, --init_balanced idle"]


def test_icarl_flags_stand_on_their_own():
    opts, notes = parse(["--icarl_bkg", "--step", "1"])
    assert list(pixel_terms(opts.method, 20)) == ["icarl"]
    both, _ = parse(["--icarl_disjoint", "--loss_kd", "10", "--step", "1"])
    assert list(pixel_terms(both.method, 20)) == ["icarl", "kd"]
    assert opts.method.icarl_disjoint
    assert opts.method.bce
    assert notes == [
        "step 1 has no --method: only what --icarl_bkg sets",
        "--icarl_bkg implies --icarl_disjoint",
        "--icarl_disjoint implies --icarl",
        "--icarl implies --bce",
    ]


UNEVEN = "task 15-6: later steps learn 6 classes each, but the last one (step 1) only the 5 left"
BARE = "step {} has no --method: plain fine-tuning, as FT"


@pytest.mark.parametrize(
    ("command", "notes"),
    [
        ("--task 15-6 --method FT --step all", [[UNEVEN], [UNEVEN]]),
        ("--task 15-5 --method FT --step all", [[], []]),
        ("--task 15-5s --method FT --step 0,5", [[], []]),
        ("--task offline", [[]]),
        ("--task 15-6", [[UNEVEN]]),
        ("--task 15-5 --step all", [[], [BARE.format(1)]]),
        ("--task 15-5 --step 1 --test", [[]]),
        ("--task 15-5s --step 2-3", [[BARE.format(2)], [BARE.format(3)]]),
        ("--step 1 --loss_kd 3", [["step 1 has no --method: only what --loss_kd sets"]]),
    ],
)
def test_what_may_be_a_slip_is_said_aloud(command: str, notes: list[list[str]]):
    assert [plan.notes for plan in parse_all(command.split())] == notes


def test_an_uneven_task_is_said_with_its_first_and_its_last_step():
    argv = ["--task", "10-4", "--method", "FT", "--step", "all"]
    said = [plan.notes for plan in parse_all(argv)]
    assert [len(notes) for notes in said] == [1, 0, 0, 1]
    assert said[0][0].endswith("learn 4 classes each, but the last one (step 3) only the 2 left")


@pytest.mark.parametrize(
    ("text", "steps"),
    [("2", [2]), ("0-5", [0, 1, 2, 3, 4, 5]), ("0,2", [0, 2]), ("all", [0, 1, 2, 3, 4, 5]),
     ("3-4,0,3", [0, 3, 4])],
)  # fmt: skip
def test_several_steps_with_values_of_their_own(text: str, steps: list[int]):
    plans = parse_all(["--task", "15-1", "--step", text, "--lr", "0.01,0.001", "--epochs", "3,2"])
    assert [p.opts.step for p in plans] == steps
    assert [p.opts.lr for p in plans] == [0.01 if step == 0 else 0.001 for step in steps]
    assert [p.opts.epochs for p in plans] == [3 if step == 0 else 2 for step in steps]


def test_one_value_serves_all_steps():
    plans = parse_all(["--task", "15-5", "--step", "all", "--lr", "0.5", "--epochs", "7"])
    assert [(p.opts.lr, p.opts.epochs) for p in plans] == [(0.5, 7)] * 2


def test_the_papers_recipe_fills_what_is_not_set(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    first, second = parse_all(["--recipe", "paper", "--task", "15-5", "--step", "all"])
    for plan, lr in ((first, 0.01), (second, 0.001)):
        opts = plan.opts
        assert (opts.batch_size, opts.lr, opts.epochs, opts.crop_size) == (12, lr, 30, 512)
    assert (first.notes, second.notes) == ([], [BARE.format(1)])
    (ade,) = parse_all(["--recipe", "paper", "--dataset", "ade", "--task", "100-50"])
    assert ade.opts.epochs == 60
    (own,) = parse_all(["--recipe", "paper", "--batch_size", "6", "--epochs", "5"])
    assert (own.opts.batch_size, own.opts.epochs) == (6, 5)
    assert own.notes == ["12 images per iteration, not 24: the linear rule gives --lr 0.005,0.0005"]
    scaled = ["--recipe", "paper", "--batch_size", "6", "--lr", "0.005,0.0005"]
    assert parse_all(scaled)[0].notes == []


PLOP_RECIPE = ["--recipe", "plop", "--step", "all", "--method"]


@pytest.mark.parametrize(
    ("argv", "epochs", "partition"),
    [
        (["PLOP", "--task", "15-1", "--overlap"], (30, 30), False),
        (["PLOP", "--task", "10-1", "--overlap"], (30, 10), False),
        (["PLOP+EWF", "--task", "10-1", "--overlap"], (30, 30), False),
        (["MIB", "--ewf", "--task", "10-1"], (30, 30), True),
        (["PLOP", "--dataset", "ade", "--task", "100-50"], (60, 60), True),
        (["PLOP", "--dataset", "ade", "--task", "100-50", "--overlap"], (60, 60), False),
        (["PLOP", "--task", "10-1", "--epochs", "3"], (3, 3), True),
    ],
)
def test_the_recipe_of_the_later_papers(argv: list[str], epochs: tuple[int, int], partition: bool):
    first, *later = [plan.opts for plan in parse_all([*PLOP_RECIPE, *argv])]
    assert (first.epochs, first.lr) == (epochs[0], 0.01)
    assert {(opts.epochs, opts.lr) for opts in later} == {(epochs[1], 0.001)}
    for opts in (first, *later):
        assert (opts.batch_size, opts.crop_size) == (24, 512)
        assert (opts.protocol, opts.ignore_void, opts.partition) == ("plop", True, partition)


def test_every_part_of_the_recipe_is_a_flag():
    typed = ["--protocol", "mib", "--no-ignore_void", "--partition", "--overlap"]
    (plan,) = parse_all(["--recipe", "plop", *typed])
    assert (plan.opts.protocol, plan.opts.ignore_void, plan.opts.partition) == ("mib", False, True)
    for argv in ([], ["--recipe", "paper", "--overlap"]):
        opts = parse_all(argv)[0].opts
        assert (opts.protocol, opts.ignore_void, opts.partition) == ("mib", False, True)
    (alone,) = parse_all(["--protocol", "plop", "--ignore_void", "--no_partition"])
    assert (alone.opts.protocol, alone.opts.ignore_void) == ("plop", True)
    assert (alone.opts.partition, alone.opts.epochs, alone.opts.batch_size) == (False, 30, 4)


def test_step_ckpt_is_for_the_first_step_alone():
    plans = parse_all(["--task", "15-5s", "--step", "1-3", "--step_ckpt", "x.pth"])
    assert [p.opts.step_ckpt for p in plans] == ["x.pth", None, None]


def test_the_recipe_needs_a_divisor_of_24(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "5")
    with pytest.raises(UserError, match="5 processes"):
        parse_all(["--recipe", "paper"])


def test_without_a_launcher_the_recipe_is_for_one_process(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")  # a batch system may set it for all it starts
    (plan,) = parse_all(["--recipe", "paper"])
    assert plan.opts.batch_size == 24


@pytest.mark.parametrize("name", ["r+tta", "r+crop_size=64"])
def test_a_name_is_none_of_another_test_of_a_run(name):
    with pytest.raises(UserError, match="choose another"):
        parse_all(["--name", name])


def test_a_shared_step_0_is_learned_under_its_own_name():
    learned, tested, later = parse_all(["--base", "b", "--name", "n", "--step", "0-1"])
    assert (learned.opts.name, learned.opts.test, learned.opts.step) == ("b", False, 0)
    assert (tested.opts.name, tested.opts.test, tested.opts.step) == ("n", True, 0)
    assert (later.opts.name, later.opts.test, later.opts.step) == ("n", False, 1)


def test_several_methods_share_what_they_can_of_step_0():
    argv = ["--task", "15-5s", "--step", "0,2", "--name", "x", "--method", "ft,LWF-MC,rw,MIB,EWC"]
    plans = [plan.opts for plan in parse_all(argv)]
    assert [(p.name, p.step, p.base) for p in plans] == [
        ("x-base", 0, "x-base"),
        ("x-FT", 2, "x-base"),
        ("x-LWF-MC", 0, None), ("x-LWF-MC", 2, None),
        ("x-RW", 2, "x-base"),
        ("x-MIB", 2, "x-base"),
        ("x-EWC", 2, "x-base"),
    ]  # fmt: skip
    shared = plans[0].method
    assert (shared.name, shared.regularizer, shared.bce) == ("none", "rw,ewc", False)
    assert plans[5].method.loss_kd == 100  # MiB's on this task


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--method", "FT,FT"], "'FT,FT'"),
        (["--method", "FT,MIB", "--step", "1", "--step_ckpt", "x.pth"], "--step_ckpt"),
        (["--step", "3-1"], "--step"),
        (["--step", "0-1", "--test", "--ckpt", "x.pth"], "--ckpt"),
        (["--restart", "--continue_ckpt"], "--restart"),
        (["--step", "0,x"], "--step"),
        (["--lr", "0.1,0"], "--lr"),
        (["--epochs", "1,2,3"], "--epochs"),
        (["--base", "a/b"], "--base"),
        (["--base", "b", "--step", "1", "--step_ckpt", "x"], "--step_ckpt"),
        (["--task", "7-7x"], "7-7x"),
        (["--task", "100-50"], "100-50"),
        (["--dataset", "ade", "--task", "15-5s"], "15-5s"),
        (["--step", "2"], "step"),
        (["--step", "-1"], "step"),
        (["--method", "MIBB"], "--method"),
        (["--epochs", "0"], "--epochs"),
        (["--lr", "nan"], "--lr"),
        (["--lr", "0"], "--lr"),
        (["--batch_size", "many"], "--batch_size"),
        (["--frobnicate"], "--frobnicate"),
        (["--unce", "--bce"], "--unce"),
        (["--unkd"], "--loss_kd"),
        (["--val_on_trainset", "--cross_val"], "--cross_val"),
        (["--test", "--continue_ckpt"], "--continue_ckpt"),
        (["--ckpt", "x.pth"], "--step_ckpt"),
        (["--step_ckpt", "x.pth"], "--step_ckpt"),
        (["--name", "a/b"], "--name"),
        (["--name", ".."], "--name"),
        (["--wandb_entity", "me"], "--wandb"),
        (["--regularizer", "ewc,si"], "'si'"),
        (["--regularizer", "ewc,pi", "--step", "1"], "step 0"),
    ],
)
def test_what_cannot_work_is_one_line(argv: list[str], words: str):
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        parse(argv)
    assert "\n" not in str(caught.value)


def test_every_flag_is_read_somewhere():
    sources = [*ROOT.glob("engine/*.py"), *ROOT.glob("methods/*.py")]
    text = "\n".join(p.read_text() for p in sources)
    read_by_argparser = {"help", "recipe", "version"}
    options = {a.dest for a in get_parser()._actions} - read_by_argparser
    unread = {o for o in options if not re.search(rf"\b(opts|method|self)\.{o}\b", text)}
    assert unread == set()


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        ([], ["Experiment"]),
        (["--random_seed", "7"], ["Experiment-seed7"]),
        (["--method", "mib"], ["MIB"]),
        (["--method", "MIB", "--random_seed", "7"], ["MIB-seed7"]),
        (["--method", "MIB", "--random_seed", "42"], ["MIB"]),
        (["--method", "MIB", "--random_seed", "7", "--name", "Experiment"], ["Experiment"]),
        (["--method", "FT,MIB", "--step", "1"], ["FT", "MIB"]),
        (["--method", "FT,MIB", "--step", "0"], ["base"]),
        (["--method", "FT,MIB", "--step", "0", "--random_seed", "7"], ["base-seed7"]),
        (["--method", "FT,MIB", "--step", "0-1", "--name", "X"], ["X-base", "X-FT", "X-MIB"]),
    ],
)
def test_names_that_are_not_typed(argv: list[str], names: list[str]):
    assert [plan.opts.name for plan in parse_all(argv)] == names


@pytest.mark.parametrize("name", ["x" * 201, "ü" * 101, "a\nb", "\udc80", ""])
def test_names_that_no_file_can_have(name: str):
    with pytest.raises(UserError, match="--name"):
        parse(["--name", name])
