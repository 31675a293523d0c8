"""Every benchmark runs, at toy size, and both of its sides compute the same."""

from __future__ import annotations

import builtins
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import pytest
import torch

from benchmarks import ceilings, eval, harness, startup, step
from modules import norm
from tests.conftest import ROOT

TOY_NETWORK = ["--backbone", "resnet18", "--crop_size", "32", "--batch_size", "2"]


def start(module, monkeypatch, *argv: str) -> None:
    """The benchmark's main, which measures in this process."""
    monkeypatch.setattr(harness, "in_fresh_process", harness._measure)
    monkeypatch.setattr(sys, "argv", [module.__name__, *argv])
    module.main()


def cases(file) -> list[dict]:
    return json.loads(file.read_text())["cases"]


def test_eval(tmp_path, monkeypatch, capsys):
    shape = ["--batch", "2", "--classes", "3", "5", "--small", "2", "--size", "8"]
    file = tmp_path / "eval.json"
    start(eval, monkeypatch, *shape, "--repeats", "2", "--calls", "1", "--json", str(file))
    assert [len(case["ours"]) for case in cases(file)] == [2, 2]
    assert all(case["name"] in capsys.readouterr().out for case in cases(file)[:1])


def test_both_sides_of_eval_count_the_same():
    shape = 2, 5, 3, 40, "cpu"
    ours, plain = eval.ours(*shape)(), eval.plain(*shape)()
    assert torch.equal(ours, plain)
    assert ours.sum() == 2 * 40 * (40 - 40 // 16)


def test_step_with_phases(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(step, "alone", lambda function, *args: function(*args))
    for owner, name in ((step.groups, "pixel_losses"), (torch.autograd, "backward")):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # phases wraps them
    file = tmp_path / "step.json"
    start(
        step, monkeypatch, "--repeats", "1", "--calls", "1", "--json", str(file), "--phases",
        "--variants", "off", "off+abn", "--task", "15-5", *TOY_NETWORK,
    )  # fmt: skip
    first, second = cases(file)
    assert first["plain"] == second["plain"]  # measured once
    seconds = json.loads(file.read_text())["phases"]["off"]
    assert set(seconds) == {
        "teacher forward", "student forward", "loss and its gradient", "backward of the network",
        "optimizer", "the rest",
    }  # fmt: skip
    assert all(value > 0 for value in seconds.values())
    printed = capsys.readouterr().out
    assert "phases of off+abn" in printed
    assert printed.count("images a second") == 2


def test_both_sides_of_step_see_the_same_problem(monkeypatch):
    """Same weights, same batch: the plain side's loss is the sum of our terms."""
    flags = ("--task", "15-5", "--norm_act", "std", *TOY_NETWORK)
    terms = step.ours("off", flags, "cpu")()
    value = step.plain(flags, "cpu")()
    assert float(sum(terms.values())) == pytest.approx(value, rel=1e-4)


def test_a_case_that_fails_leaves_the_others(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(norm, "_package", lambda: None)
    file = tmp_path / "step.json"
    flags = ["--repeats", "1", "--calls", "1", "--json", str(file), "--task", "15-5", *TOY_NETWORK]
    with pytest.raises(SystemExit, match="1 of 2 cases failed"):
        start(step, monkeypatch, "--variants", "off+package", "off", *flags)
    assert [case["name"][-4:] for case in cases(file)] == [" off"]
    assert "off+package failed: UserError" in capsys.readouterr().err


def test_step_runs_plop():
    """Its pass is done beforehand, on the batch that is measured."""
    flags = ("--backbone", "resnet18", "--crop_size", "64", "--batch_size", "2")
    assert set(step.ours("off+abn+plop", flags, "cpu")()) == {"ce", "pod"}


@pytest.mark.parametrize("wrong", ["fp8", "off+turbo"])
def test_step_names_an_unknown_variant(wrong, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        start(step, monkeypatch, "--variants", wrong)
    assert f"no such variant: {wrong.removeprefix('off+')}" in capsys.readouterr().err


@pytest.mark.parametrize("side", ["run_until_first_iteration", "plain_until_first_iteration"])
def test_startup_launches_both_sides(side, tmp_path):
    data = startup.make_data(tmp_path, 20, 48)
    argv = ("--data_root", str(data), *startup.FLAGS, *TOY_NETWORK)
    work = partial(startup.launch, side, False, argv, tmp_path)
    assert work()() > 50  # MiB
    assert (tmp_path / startup.LISTS).exists() == side.startswith("run")


@pytest.mark.long
def test_startup(tmp_path, monkeypatch):
    file = tmp_path / "startup.json"
    start(
        startup, monkeypatch, "--images", "20", "--size", "48", "--repeats", "1", "--calls", "1",
        "--json", str(file), *TOY_NETWORK,
    )  # fmt: skip
    names = [case["name"] for case in cases(file)]
    assert names == ["20 images, no lists", "20 images, lists cached"]


def test_startup_says_what_a_failed_launch_said(tmp_path):
    call = startup.launch("run_until_first_iteration", True, ("--task", "0-0"), tmp_path)
    with pytest.raises(RuntimeError, match="run_until_first_iteration failed:\n.*0-0"):
        call()


def test_ceilings(monkeypatch, capsys, tmp_path):
    file = tmp_path / "c.json"
    start(ceilings, monkeypatch, "--side", "32", "--repeats", "1", "--json", str(file))
    values = json.loads(file.read_text())["ceilings"]
    assert all(value > 0 for value in values.values())
    assert len(capsys.readouterr().out.splitlines()) == len(values) == 3


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["step", "--task", "99-9"], "error: unknown task '99-9'"),
        (["data", "--data_root", "/nowhere"], "error: no data root /nowhere"),
        (["norm", "--kernels", "package"], "error: In-Place ABN cannot use package here: make"),
        (["loss", "--device", "tpu"], "tpu is neither cpu nor cuda"),
    ],
)
def test_mistakes_end_in_a_line(argv, line, monkeypatch, capsys):
    monkeypatch.setattr(norm, "_package", lambda: None)
    module = importlib.import_module(f"benchmarks.{argv[0]}")
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as stopped:
        harness.start(module.main)
    assert line in f"{stopped.value.code}{capsys.readouterr().err}"


def test_a_fresh_process_measures_time_and_memory():
    sample = harness.in_fresh_process(partial(partial, torch.ones, 2**22), 1, "cpu")
    assert 15 < sample.peak < 60
    assert sample.total > sample.peak + 50
    assert sample.seconds > 0


def test_fresh_processes_have_imported_torch_already():
    assert harness.alone(builtins.eval, "'torch' in __import__('sys').modules")


def with_holes() -> Callable[[], None]:
    """A call that needs 6 MiB at a time and would leave a heap of 40 MiB behind."""
    torch.ones(2**22)  # freed: from here on glibc would take what is smaller from its heap

    def call() -> None:
        kept = []
        for i in range(8):
            block = torch.ones(2**20 + i * 2**16)
            kept.append(torch.ones(2**14))  # lies behind the block
            del block

    return call


def test_memory_is_what_a_call_needs_and_not_what_the_allocator_keeps():
    assert harness.in_fresh_process(with_holes, 1, "cpu").peak < 20


def test_both_sides_of_step_get_the_settings_of_cudnn_they_run_with(monkeypatch):
    flags = ("--task", "15-5", *TOY_NETWORK)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    for side in (partial(step.plain, flags, "cpu"), partial(step.ours, "off", flags, "cpu")):
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
        side()
        assert torch.backends.cudnn.benchmark
    assert not torch.backends.cudnn.allow_tf32


def for_a_gpu(out, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), str(out)]
    settings = os.environ | {"TOY": "1", "PYTHON": sys.executable} | environment
    return subprocess.run(command, env=settings, capture_output=True, text=True)


def test_for_a_gpu_says_in_a_line_what_is_missing(tmp_path):
    bare = tmp_path / "bare"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    done = for_a_gpu(tmp_path / "out", PYTHON=str(bare))
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {bare} lacks torch torchvision numpy")
    assert len(done.stderr.splitlines()) == 1
    assert "/none does not run" in for_a_gpu(tmp_path / "out", PYTHON="/none").stderr


def test_for_a_gpu_begins_nothing_for_which_no_time_is_left(tmp_path):
    done = for_a_gpu(tmp_path / "out", BUDGET="9")
    assert done.returncode == 1
    assert done.stdout.startswith("failed or out of time: step-100-50 loss ")
    assert not list((tmp_path / "out").glob("*.json"))


def test_everything_for_a_gpu_runs_at_toy_size(tmp_path):
    done = for_a_gpu(tmp_path / "out", BUDGET="3000")
    assert done.returncode == 0, done.stdout
    written = {path.stem for path in (tmp_path / "out").glob("*.json")}
    steps = {f"step-{s}" for s in ("100-50", "15-5", "100-50-others", "100-50-compile")}
    assert written == steps | {"ceilings", "loss", "norm", "eval"}
    assert "== eval" in (tmp_path / "out" / "log.txt").read_text()
