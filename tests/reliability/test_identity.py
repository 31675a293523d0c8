"""A finished step stays what it is: the families of commands are made from the flags themselves."""

from __future__ import annotations

import re
import shutil
from dataclasses import Field
from pathlib import Path
from typing import Any

import pytest
import torch

import run
import segmentation_module
from argparser import Options
from engine.checkpoint import all_flags
from tests.reliability import child
from tests.reliability.harness import FLAGS, SETTING, checkpoint_path, difference
from tests.reliability.test_hostile import snapshot
from utils.flags import flags_of
from utils.results import read_results

PLACE = {"step", "task", "dataset", "method", "name"}  # tried by tests of their own
NEEDED = {"unkd": ["--loss_kd", "1"]}  # what a flag cannot be typed without


@pytest.fixture
def small(monkeypatch):
    """The program with a network of a few channels, in this process."""
    for name in ("ResNet", "DeeplabV3", "HEAD_CHANNELS"):
        monkeypatch.setattr(segmentation_module, name, getattr(segmentation_module, name))
    child.shrink()


@pytest.fixture
def finished(step0, tmp_path, monkeypatch, small) -> Path:
    """A folder with a finished step 0 of run r, the working directory."""
    shutil.copytree(step0, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(toy: Path, *flags: object) -> list[str]:
    """The one that wrote the step, and more flags."""
    own = ["--batch_size", 4, "--epochs", 2, "--regularizer", "ewc,pi,rw"]
    return ["--data_root", str(toy), *FLAGS, *map(str, [*own, *flags])]


def other_value(entry: Field[Any], value: Any) -> list[str]:
    """A flag typed so that it is not `value`."""
    name, about = f"--{entry.name}", entry.metadata
    if isinstance(entry.default, bool):
        return [f"--no_{entry.name}" if value else name]
    if about["choices"]:
        return [name, next(str(c) for c in about["choices"] if c != value)]
    if entry.name == "regularizer":
        return [name, "ewc"]
    for text in ("0.25", "33", "1"):
        try:
            if about["parse"](text) not in (value, text):
                return [name, text]
        except Exception:  # noqa: S112, not a value of this flag
            continue
    return [name, "other"]


def changed(kinds: set[str]) -> list[Any]:
    flags = [f for f in all_flags() if f.metadata["resume"] in kinds and f.name not in PLACE]
    return [pytest.param(flag, id=flag.name) for flag in flags]


def trained_options(folder: Path) -> dict[str, Any]:
    return torch.load(checkpoint_path(folder), weights_only=True)["options"]


@pytest.mark.parametrize("entry", changed({"identity", "warn"}))
def test_another_value_of_any_flag_replaces_nothing(finished, toy, capsys, entry):
    if entry.name == "overlap":
        pytest.skip("it is part of the folder's name")
    typed = other_value(entry, trained_options(finished)[entry.name])
    before = snapshot(finished)
    assert run.main(command(toy, *typed, *NEEDED.get(entry.name, []))) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert "is of" in line or entry.name in line
    assert snapshot(finished) == before


@pytest.mark.parametrize("flags", [[], ["--continue_ckpt"], ["--num_workers", "1"], ["--debug"]])
def test_the_same_command_shows_the_stored_result(finished, toy, capsys, flags):
    before = snapshot(finished)
    assert run.main(command(toy, *flags)) == 0
    printed = capsys.readouterr().out
    (row,) = read_results(finished / "logs" / "results" / f"{SETTING}-agg.csv")
    assert "step 0 of r is finished" in printed
    assert re.search(rf"with_background +{row['with_background']:.4f}", printed)
    assert snapshot(finished) == before


def test_restart_replaces_it(finished, toy):
    assert run.main(command(toy, "--restart", "--lr", 0.5)) == 0
    assert trained_options(finished)["lr"] == 0.5


def test_a_learned_step_without_its_row_is_tested_and_not_learned_again(finished, toy):
    content = torch.load(checkpoint_path(finished), weights_only=True)
    rows = {p: p.read_bytes() for p in (finished / "logs" / "results").iterdir()}
    for path in rows:
        path.unlink()
    assert run.main(command(toy)) == 0
    assert not difference(torch.load(checkpoint_path(finished), weights_only=True), content)
    assert {p: p.read_bytes() for p in (finished / "logs" / "results").iterdir()} == rows


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--random_seed", 7], "--random_seed"),
        (["--bce"], "--bce"),
        (["--base", "r", "--name", "s", "--random_seed", 7], "--random_seed"),
        (["--backbone", "resnet34"], "backbone"),
    ],
)
def test_another_runs_step_is_no_teacher_unannounced(finished, toy, capsys, flags, word):
    before = snapshot(finished)
    assert run.main(command(toy, "--regularizer", "ewc", "--step", 1, *flags)) == 1
    assert word in capsys.readouterr().err
    after = snapshot(finished)
    assert {path: after[path] for path in before} == before
    assert not checkpoint_path(finished, 1).exists()


def test_a_default_name_keeps_methods_and_seeds_apart(toy, tmp_path, monkeypatch, small):
    monkeypatch.chdir(tmp_path)
    own = ["--batch_size", "4", "--epochs", "1", "--data_root", str(toy)]
    flags = [flag for flag in FLAGS if flag not in ("--name", "r")]
    for more in (["--method", "FT"], ["--method", "MIB"], ["--method", "FT", "--random_seed", "1"]):
        assert run.main([*flags, *own, *more]) == 0
    folder = tmp_path / "checkpoints" / "step" / SETTING
    assert sorted(p.stem for p in folder.glob("*.pth")) == ["FT-seed1_0", "FT_0", "MIB_0"]


SCORES = [f for f in flags_of(Options) if f.metadata.get("score")]


@pytest.mark.parametrize("entry", SCORES, ids=lambda entry: entry.name)
def test_a_test_is_as_the_training_was(finished, toy, entry, capsys):
    """Not typed, what changes a score comes from the checkpoint; typed, the row says so."""
    means = finished / "logs" / "results" / f"{SETTING}-agg.csv"
    before = means.read_bytes()
    bare = ["--data_root", str(toy), "--task", "15-5", "--num_workers", "0", "--test"]
    assert run.main([*bare, "--ckpt", str(checkpoint_path(finished)), "--name", "mine"]) == 0
    assert means.read_bytes() == before
    typed = other_value(entry, trained_options(finished)[entry.name])
    assert run.main([*bare, "--overlap", "--name", "r", *typed]) == 0
    first, second = read_results(means)
    assert first["name"] == "r"
    assert second["name"].startswith(f"r+{entry.name}=")
    assert f"tested with --{entry.name}" in capsys.readouterr().out


def test_a_test_of_another_method_is_refused(finished, toy, capsys):
    before = snapshot(finished)
    assert run.main(command(toy, "--test", "--method", "FT")) == 1
    assert "--method" in capsys.readouterr().err
    assert snapshot(finished) == before


def rows_of(folder: Path) -> dict[str, Any]:
    (row,) = read_results(folder / "logs" / "results" / f"{SETTING}-agg.csv")
    return row


def test_a_row_of_earlier_weights_is_no_result(finished, toy):
    """As after --restart, or after --test of an unfinished step, and a kill before the test."""
    right = rows_of(finished)
    content = torch.load(checkpoint_path(finished), weights_only=True)
    other = {k: torch.zeros_like(v) for k, v in content["model_state"].items()}
    torch.save({**content, "model_state": other}, checkpoint_path(finished))
    assert run.main(command(toy, "--test")) == 0
    assert rows_of(finished)["weights"] != right["weights"]
    torch.save(content, checkpoint_path(finished))
    assert run.main(command(toy)) == 0
    assert rows_of(finished) == right


def test_another_networks_row_is_not_replaced(finished, toy, tmp_path, capsys):
    elsewhere = tmp_path / "elsewhere.pth"
    content = torch.load(checkpoint_path(finished), weights_only=True)
    torch.save(content, elsewhere)
    assert run.main(command(toy, "--test", "--ckpt", elsewhere)) == 0  # a copy: the same result
    content["model_state"]["cls.0.bias"] += 1
    torch.save(content, elsewhere)
    before = snapshot(finished)
    assert run.main(command(toy, "--test", "--ckpt", elsewhere)) == 1
    assert "would replace that of another network" in capsys.readouterr().err
    assert snapshot(finished) == before
    assert run.main(command(toy, "--test", "--ckpt", elsewhere, "--logdir", "other")) == 0


@pytest.mark.parametrize("flags", [[], ["--continue_ckpt"]])
def test_the_step_before_is_the_one_it_began_from(finished, toy, capsys, flags):
    later = command(toy, "--regularizer", "ewc", "--step", 1, "--epochs", 1)
    assert run.main(later) == 0
    if flags:
        unfinish(finished, 1)
    else:
        assert run.main(later) == 0  # finished: skipped
    content = torch.load(checkpoint_path(finished), weights_only=True)
    content["model_state"]["cls.0.bias"] += 1
    torch.save(content, checkpoint_path(finished))
    before = snapshot(finished)
    capsys.readouterr()
    assert run.main([*later, *flags, "--epochs", "2"] if flags else later) == 1
    assert re.search("learned (again|from another)", capsys.readouterr().err)
    after = snapshot(finished)
    kept = [path for path in before if path.suffix in (".pth", ".csv", ".jsonl")]
    assert {path: after[path] for path in kept} == {path: before[path] for path in kept}
    assert run.main([*later, "--restart"]) == 0


def unfinish(folder: Path, step: int = 0) -> None:
    content = torch.load(checkpoint_path(folder, step), weights_only=True)
    torch.save({**content, "finished": False}, checkpoint_path(folder, step))


@pytest.mark.parametrize(
    ("flag", "value", "key"),
    [("lr", 0.5, "initial_lr"), ("momentum", 0.5, "momentum"),
     ("weight_decay", 0.1, "weight_decay")],
)  # fmt: skip
def test_flags_of_the_optimizer_take_effect_on_going_on(finished, toy, flag, value, key):
    unfinish(finished)
    flags = ["--continue_ckpt", "--epochs", 3, f"--{flag}", value]
    assert run.main(command(toy, *flags)) == 0
    content = torch.load(checkpoint_path(finished), weights_only=True)
    assert content["options"][flag] == value
    assert {group[key] for group in content["optimizer_state"]["param_groups"]} == {value}


def test_going_on_to_an_epoch_that_is_past_changes_nothing(finished, toy, capsys):
    unfinish(finished)
    before = snapshot(finished)
    assert run.main(command(toy, "--continue_ckpt", "--epochs", 1)) == 1
    assert "past --epochs 1" in capsys.readouterr().err
    assert snapshot(finished) == before


def test_base_is_a_name_and_no_pattern(finished, toy, capsys):
    assert run.main(command(toy, "--base", "*", "--name", "s", "--step", 1, "--regularizer",
                            "ewc")) == 1  # fmt: skip
    assert "*_0.pth" in capsys.readouterr().err
