"""The program as a user runs it, at toy size: steps, checkpoints, tests, launchers, bad input."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import run
from segmentation_module import make_model
from tests.conftest import ROOT
from utils.results import read_results

SMALL = [
    "--backbone", "resnet18", "--no-pretrained", "--crop_size", "32", "--batch_size", "4",
    "--num_workers", "0", "--task", "15-5", "--overlap", "--lr", "0.01", "--epochs", "1",
]  # fmt: skip
SETTING = "voc-15-5-ov"


def make_toy(out: Path, dataset: str = "voc", train: int = 40, val: int = 7) -> Path:
    command = [sys.executable, ROOT / "data" / "make_toy.py", "--out", out, "--dataset", dataset]
    command += ["--train", train, "--val", val, "--size", "48"]
    subprocess.run([str(c) for c in command], check=True, capture_output=True)
    return out


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    return make_toy(tmp_path_factory.mktemp("it's $a toy"))


@pytest.fixture(scope="module")
def trained(toy, tmp_path_factory) -> tuple[Path, str]:
    """A folder in which step 0 of run "a" was trained, and what that printed."""
    folder = tmp_path_factory.mktemp("trained")
    command = [sys.executable, str(ROOT / "run.py"), "--data_root", str(toy), *SMALL]
    command += ["--name", "a", "--method", "MIB", "--sample_num", "2", "--print_interval", "3"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return folder, done.stdout


@pytest.fixture
def work(trained, tmp_path, monkeypatch) -> Path:
    """A copy of that folder to work in."""
    shutil.copytree(trained[0], tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(toy: Path, *argv: str) -> int:
    return run.main(["--data_root", str(toy), *SMALL, *argv])


def fails(capsys, toy: Path, *argv: str) -> str:
    """The one line that a run which must fail prints."""
    assert start(toy, *argv) == 1
    captured = capsys.readouterr().err.strip()
    assert len(captured.splitlines()) == 1, captured
    assert captured.startswith("error: ")
    return captured


def table(text: str) -> str:
    """The class table of a test, as printed."""
    begin = text.index("  #  class")
    return text[begin : text.index("\n", text.index("mean precision"))]


def checkpoint_file(folder: Path, name: str, step: int) -> Path:
    return folder / "checkpoints" / "step" / SETTING / f"{name}_{step}.pth"


def test_step_0_writes_what_is_promised(trained):
    folder, printed = trained
    content = torch.load(checkpoint_file(folder, "a", 0), weights_only=True)
    assert content["epoch"] == 1
    assert content["finished"] is True
    assert content["options"]["name"] == "a"
    assert "cls.0.weight" in content["model_state"]
    assert [p.suffix for p in (folder / "data" / "voc").iterdir()] == [".npz"]
    (row,) = read_results(folder / "logs" / "results" / f"{SETTING}-agg.csv")
    assert (row["name"], row["method"], row["step"], row["seed"]) == ("a", "MIB", 0, 42)
    assert f"mean IoU with background  {row['with_background']:.4f}" in printed


def test_curves_table_figure_and_panels_are_in_the_event_file(trained):
    folder, _ = trained
    logdir = folder / "logs" / SETTING / "a" / "step-0"
    events = EventAccumulator(str(logdir), size_guidance={"images": 0}).Reload()
    tags = events.Tags()
    for tag in ("train/ce", "train/lr", "train/images_per_second", "val/ce", "val/loss"):
        assert tag in tags["scalars"]
    (row,) = read_results(folder / "logs" / "results" / f"{SETTING}.csv")
    (means,) = read_results(folder / "logs" / "results" / f"{SETTING}-agg.csv")
    for what in ("val", "test"):  # of the same images with the same weights
        curves = {tag: events.Scalars(tag)[-1].value for tag in tags["scalars"] if what in tag}
        assert f"{what}/mean_iou_old" not in curves  # step 0 has no old classes
        assert curves[f"{what}/mean_iou"] == pytest.approx(means["all"], rel=1e-6)
        with_background = curves[f"{what}/mean_iou_with_background"]
        assert with_background == pytest.approx(row["mean_iou"], rel=1e-6)
        seen = {
            column.partition(":")[2]: value for column, value in row.items()
            if ":" in column and value is not None and not math.isnan(value)
        }  # fmt: skip
        found = {tag.partition("_iou/")[2] for tag in curves if tag.startswith(f"{what}_iou/")}
        assert found == seen.keys()
        for name, value in seen.items():
            assert curves[f"{what}_iou/{name}"] == pytest.approx(value, rel=1e-6)
    assert {"samples/0", "samples/1", "test/confusion"} <= set(tags["images"])
    assert any("test/classes" in tag for tag in tags["tensors"])
    assert (logdir / "images" / "samples" / "0.png").is_file()


def test_metrics_are_a_line_per_epoch_and_one_for_the_test(trained):
    folder, printed = trained
    file = folder / "logs" / SETTING / "a" / "step-0" / "metrics.jsonl"
    epoch, test = (json.loads(line) for line in file.read_text().splitlines())
    (means,) = read_results(folder / "logs" / "results" / f"{SETTING}-agg.csv")
    assert (epoch["epoch"], epoch["iterations"], test["total_iterations"]) == (1, 9, 9)
    assert epoch["terms"].keys() == epoch["validation"]["terms"].keys() == {"ce"}
    assert epoch["loss"] == epoch["terms"]["ce"]
    assert f"epoch 1/1: loss {epoch['loss']:.4f} (ce {epoch['loss']:.4f})" in printed
    assert 0 <= epoch["waiting"] <= 1
    assert epoch["images_per_second"] == pytest.approx(36 / epoch["seconds"])
    for found in (epoch["validation"], test["test"]):
        assert found["mean_iou_old"] is None
        assert found["mean_iou"] == means["all"]
        assert found["mean_iou_with_background"] == means["with_background"]
        assert len(found["iou"]) == 16


def test_the_log_says_what_happens(trained, toy):
    """In a pipe a line every third iteration, and nothing that is for a terminal."""
    folder, printed = trained
    assert "\r" not in printed
    for line in (
        "run a: voc 15-5 overlapped, step 0 of 0 to 1, method MIB",
        f"data: {toy}: 39 of 40 images to train on, 7 to validate on, 7 to test on",
        "network: resnet18 with DeepLabv3, iabn_sync, output stride 16, 16 classes, 15.3 M param",
        "iterations: 9 of 4 images in an epoch, 9 in 1 epochs",
        f"checkpoint: checkpoints/step/{SETTING}/a_0.pth",
        f"metrics: logs/{SETTING}/a/step-0/metrics.jsonl",
        f"results: logs/results/{SETTING}.csv, logs/results/{SETTING}-agg.csv",
        f"curves: tensorboard --logdir logs/{SETTING}/a",
    ):
        assert f" I {line}" in printed
    rates = r"[\d.]+ images/s, \d+ % waiting for data, at least \d+ s left\n"
    told = re.findall(
        rf"epoch 1/1, iteration (\d)/9: lr [\d.]+, loss [\d.]+ \(ce [\d.]+\), {rates}", printed
    )
    assert told == ["3", "6", "9"]
    assert printed.count(" I next: ") == 1


def test_the_next_command_is_one(work, trained, toy):
    """From the log into a shell; the data lie where quotes are needed."""
    following = re.search(" I next: (.*)", trained[1])[1]
    done = subprocess.run(following, shell=True, cwd=work, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "run a: voc 15-5 overlapped, step 1 of 0 to 1, method MIB" in done.stdout
    report, predict = re.findall(" I next: (.*)", done.stdout)
    table = subprocess.run(report, shell=True, cwd=work, capture_output=True, text=True)
    assert "a    MIB" in table.stdout, table.stderr
    photos = f"{toy}/PascalVOC12/JPEGImages"
    os.symlink(photos, work / "photos")
    done = subprocess.run(predict, shell=True, cwd=work, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert len(list((work / "predicted" / "masks").iterdir())) == 47


def test_test_prints_exactly_what_training_printed(trained, work, toy, capsys):
    before = read_results(work / "logs" / "results" / f"{SETTING}.csv")
    assert start(toy, "--name", "a", "--test", "--method", "MIB") == 0
    assert table(capsys.readouterr().out) == table(trained[1])
    assert read_results(work / "logs" / "results" / f"{SETTING}.csv") == before


def test_a_test_in_the_later_protocol_is_a_row_of_its_own(work, toy, capsys):
    """Also of a checkpoint from before there was a choice, which is MiB's."""
    path = checkpoint_file(work, "a", 0)
    content = torch.load(path, weights_only=True)
    assert content["options"].pop("protocol") == "mib"
    torch.save(content, path)
    assert start(toy, "--name", "a", "--test", "--method", "MIB", "--protocol", "plop") == 0
    assert "protocol plop: classes to come are background" in capsys.readouterr().out
    for suffix in ("", "-agg"):
        first, second = read_results(work / "logs" / "results" / f"{SETTING}{suffix}.csv")
        assert (first["name"], first["protocol"], first["split"]) == ("a", "mib", "overlapped")
        assert (second["name"], second["protocol"]) == ("a+protocol=plop", "plop")
    assert second["all"] == second["with_background"]
    assert first["all"] != first["with_background"]


def test_next_step_starts_from_the_one_before(work, toy, capsys):
    assert start(toy, "--name", "a", "--step", "1", "--method", "MIB") == 0
    assert "unkd" in capsys.readouterr().out
    old = torch.load(checkpoint_file(work, "a", 0), weights_only=True)
    new = torch.load(checkpoint_file(work, "a", 1), weights_only=True)
    assert new["steps"] == [list(range(16)), list(range(16, 21))]
    assert new["model_state"].keys() - old["model_state"].keys() == {"cls.1.weight", "cls.1.bias"}
    difference = (new["model_state"]["body.mod1.conv1.weight"]
                  - old["model_state"]["body.mod1.conv1.weight"])  # fmt: skip
    assert 0 < difference.abs().max() < 0.5


def test_a_whole_task_shares_step_0_and_skips_what_is_finished(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    task = ["--task", "15-5", "--step", "all", "--base", "b"]
    assert start(toy, *task, "--name", "m", "--method", "MIB") == 0
    assert start(toy, *task, "--name", "f", "--method", "FT") == 0
    printed = capsys.readouterr().out
    assert printed.count("step 0 of b is finished: skipped") == 1
    rows = read_results(tmp_path / "logs" / "results" / f"{SETTING}-agg.csv")
    assert [(r["name"], r["step"]) for r in rows] == [
        ("b", 0), ("m", 0), ("m", 1), ("f", 0), ("f", 1),
    ]  # fmt: skip
    assert len({r["all"] for r in rows if r["step"] == 0}) == 1
    assert checkpoint_file(tmp_path, "m", 1).with_suffix(".png").is_file()

    stamp = checkpoint_file(tmp_path, "m", 1).stat().st_mtime_ns
    assert start(toy, *task, "--name", "m", "--method", "MIB") == 0
    assert "step 1 of m is finished: skipped" in capsys.readouterr().out
    assert checkpoint_file(tmp_path, "m", 1).stat().st_mtime_ns == stamp
    assert "--random_seed" in fails(capsys, toy, *task, "--name", "s", "--random_seed", "5")

    content = torch.load(checkpoint_file(tmp_path, "m", 1), weights_only=True)
    torch.save({**content, "finished": False}, checkpoint_file(tmp_path, "m", 1))
    assert start(toy, *task, "--name", "m", "--method", "MIB") == 0  # its row is of an older run
    assert torch.load(checkpoint_file(tmp_path, "m", 1), weights_only=True)["finished"]

    shutil.rmtree(tmp_path / "logs")  # the shared step is MIB's, and tested again for FT
    assert start(toy, *task, "--name", "f", "--method", "FT") == 0
    rows = read_results(tmp_path / "logs" / "results" / f"{SETTING}-agg.csv")
    assert [(r["name"], r["step"]) for r in rows] == [("b", 0), ("f", 0), ("f", 1)]


@pytest.mark.parametrize("flags", [("--method", "FT"), ("--method", "MIB", "--random_seed", "7")])
def test_a_run_does_not_go_on_with_the_checkpoint_of_another(work, toy, capsys, flags):
    before = checkpoint_file(work, "a", 0).read_bytes()
    line = fails(capsys, toy, "--name", "a", "--continue_ckpt", *flags)
    assert "--name" in line
    assert checkpoint_file(work, "a", 0).read_bytes() == before


def test_step_ckpt_and_ckpt_name_other_files(work, toy, capsys):
    elsewhere = work / "elsewhere.pth"
    checkpoint_file(work, "a", 0).rename(elsewhere)
    assert start(toy, "--name", "b", "--step", "1", "--step_ckpt", str(elsewhere)) == 0
    assert start(toy, "--name", "c", "--test", "--ckpt", str(elsewhere)) == 0


@pytest.mark.parametrize("method", ["LWF", "LWF-MC", "ILT", "EWC", "RW", "PI"])
def test_every_method_runs_two_steps_frozen_too(toy, tmp_path, monkeypatch, method: str, capsys):
    monkeypatch.chdir(tmp_path)
    assert start(toy, "--method", method, "--fix_bn") == 0
    assert start(toy, "--method", method, "--step", "1", "--freeze", "--fix_bn") == 0
    old, new = (torch.load(checkpoint_file(tmp_path, method, step), weights_only=True)
                for step in (0, 1))  # fmt: skip
    for key, value in old["model_state"].items():
        if key.startswith("body.") or "running" in key:
            assert torch.equal(value, new["model_state"][key]), key
    assert (new["regularizer"] is not None) == (method in ("EWC", "RW", "PI"))
    assert "nan" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags",
    [
        ("--val_on_trainset",),
        ("--cross_val", "--no_mask"),
        ("--no_crop_val", "--no_visualize"),
        ("--norm_act", "abn", "--output_stride", "8", "--lr_policy", "step"),
        ("--amp", "bf16", "--debug", "--tta"),
        ("--icarl_bkg", "--val_interval", "2"),
    ],
    ids=" ".join,
)
def test_flags_that_change_a_step_run(work, toy, flags: tuple[str, ...], capsys):
    assert start(toy, "--name", "f", *flags) == 0
    assert "mean IoU with background" in capsys.readouterr().out


def test_ade_runs_two_steps(tmp_path, monkeypatch, capsys):
    ade = make_toy(tmp_path / "toy", "ade", train=120, val=5)
    monkeypatch.chdir(tmp_path)
    argv = ["--dataset", "ade", "--task", "100-50", "--name", "x", "--method", "MIB"]
    for step in ("0", "1"):
        assert start(ade, *argv, "--step", step) == 0
    rows = read_results(tmp_path / "logs" / "results" / "ade-100-50-ov.csv")
    assert [row["step"] for row in rows] == [0, 1]
    assert "150" in capsys.readouterr().out


def launch(module: list[str], folder: Path, toy: Path, *argv: str) -> subprocess.CompletedProcess:
    """Two processes under a launcher, one without."""
    several = ["-m", *module, "--nproc_per_node=2", "--standalone"] if module else []
    command = [sys.executable, *several]
    command += [str(ROOT / "run.py"), "--data_root", str(toy), *SMALL, *argv]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("launcher", ["torch.distributed.run", "torch.distributed.launch"])
def test_two_processes_under_both_launchers(work, toy, launcher: str):
    argv = ["--name", "a", "--step", "1", "--method", "MIB", "--batch_size", "2"]
    done = launch([launcher], work, toy, *argv)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("mean IoU with background") == 1
    assert "[rank" not in done.stdout
    for line in (" I run a: ", " I data: ", " I epoch 1/1: ", " I metrics: "):
        assert done.stdout.count(line) == 1
    file = work / "logs" / SETTING / "a" / "step-1" / "metrics.jsonl"
    assert len(file.read_text().splitlines()) == 2
    tested = launch([launcher], work, toy, *argv, "--test")
    assert table(tested.stdout) == table(done.stdout)


@pytest.mark.long
@pytest.mark.parametrize("world", [1, 2])
def test_compiled_training_computes_the_same(work, toy, world: int):
    """Student, teacher and loss through torch.compile, under DDP too; then the test as usual."""
    curves = []
    for name in ("plain", "compiled"):
        argv = ["--name", name, "--step", "1", "--method", "ILT", "--print_interval", "1"]
        argv += ["--step_ckpt", str(checkpoint_file(work, "a", 0)), "--norm_act", "iabn"]
        argv += ["--batch_size", str(4 // world), *(["--compile"] if name == "compiled" else [])]
        launcher = ["torch.distributed.run"] if world == 2 else []
        done = launch(launcher, work, toy, *argv)
        assert done.returncode == 0, done.stderr
        events = EventAccumulator(str(work / "logs" / SETTING / name / "step-1")).Reload()
        curves.append([[e.value for e in events.Scalars(f"train/{t}")] for t in ("ce", "kd", "de")])
    first, later = (np.array(curves)[..., i] for i in (0, slice(1, None)))
    np.testing.assert_allclose(first[1], first[0], rtol=1e-5)
    np.testing.assert_allclose(later[1], later[0], rtol=2e-2)  # four images, three iterations


def test_both_processes_stop_with_one_line_of_ours(work, toy):
    done = launch(["torch.distributed.run"], work, work / "nothing", "--name", "x")
    assert done.returncode != 0
    ours = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(ours) == 1
    assert "no data root" in ours[0]


def test_a_reference_checkpoint_is_tested_and_continued(work, toy):
    """The official code saves keys with `module.` and, as best score, a numpy scalar."""
    path = checkpoint_file(work, "a", 0)
    state = torch.load(path, weights_only=True)["model_state"]
    prefixed = {f"module.{k}": v for k, v in state.items() if "num_batches" not in k}
    content = {"model_state": prefixed, "epoch": 29, "best_score": np.float64(0.7)}
    torch.save({**content, "optimizer_state": {}, "trainer_state": {}}, work / "theirs.pth")
    assert start(toy, "--name", "r", "--test", "--ckpt", "theirs.pth") == 0
    assert start(toy, "--name", "r", "--step", "1", "--step_ckpt", "theirs.pth") == 0


def test_wandb_offline_run(work, toy):
    """In a process of its own: wandb reads its settings once."""
    command = [sys.executable, str(ROOT / "run.py"), "--data_root", str(toy), *SMALL]
    environment = os.environ | {"WANDB_MODE": "offline"}
    subprocess.run(
        [*command, "--name", "w", "--wandb"], cwd=work, env=environment, check=True,
        capture_output=True,
    )  # fmt: skip
    assert list((work / "logs" / SETTING / "w" / "step-0" / "wandb").glob("offline-run-*/*.wandb"))


class TestBadInput:
    """Each gets one line that names the thing; nothing is half-written."""

    @pytest.mark.parametrize(
        ("argv", "words"),
        [
            (["--task", "16-5x"], "16-5x"),
            (["--task", "100-10"], "--dataset ade"),
            (["--step", "2"], "--step 0 to 1"),
            (["--step", "1", "--name", "nobody"], "nobody_0.pth"),
            (["--test", "--name", "nobody"], "nobody_0.pth"),
            (["--test", "--ckpt", "missing.pth"], "missing.pth"),
            (["--step", "1", "--name", "a", "--task", "10-5", "--step_ckpt", "CKPT"], "task 15-5"),
            (["--step", "1", "--name", "a", "--backbone", "resnet34"], "backbone"),
            (["--step", "1", "--name", "a", "--norm_act", "abn"], "norm_act"),
            (["--test", "--name", "a", "--output_stride", "8"], "output_stride"),
            (["--test", "--step", "1", "--ckpt", "CKPT"], "step 0"),
            (["--pretrained"], "pretrained/README.md"),
            (["--batch_size", "400"], "--batch_size"),
            (["--batch_size", "1", "--norm_act", "abn"], "--batch_size"),
            (["--unce", "--bce"], "--unce"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_flags(self, work, toy, capsys, argv: list[str], words: str):
        argv = [str(checkpoint_file(work, "a", 0)) if a == "CKPT" else a for a in argv]
        before = sorted(work.rglob("*.pth"))
        assert words in fails(capsys, toy, *argv)
        assert sorted(work.rglob("*.pth")) == before

    @pytest.mark.parametrize("kind", ["foreign label", "sizes", "JPEG", "PNG", "missing"])
    def test_files(self, work, toy, capsys, kind: str):
        data = work / "broken"
        shutil.copytree(toy, data)
        root = data / "PascalVOC12"
        image = sorted((root / "JPEGImages").glob("*train*"))[3]
        mask = root / "SegmentationClassAug" / f"{image.stem}.png"
        if kind == "foreign label":
            pixels = np.array(Image.open(mask))
            pixels[0, 0] = 77
            Image.fromarray(pixels).save(mask)
        elif kind == "sizes":
            Image.new("RGB", (20, 20)).save(image)
        elif kind == "JPEG":
            image.write_bytes(image.read_bytes()[:300])
        elif kind == "PNG":
            mask.write_bytes(mask.read_bytes()[:100])
        else:
            mask.unlink()
        line = fails(capsys, data, "--name", "x", "--epochs", "2", "--num_workers", "1")
        assert mask.stem in line
        assert "77" in line or kind != "foreign label"
        assert not checkpoint_file(work, "x", 0).exists()

    def test_weights_of_another_network(self, work, toy, capsys):
        from modules.norm import get_norm

        body = make_model("resnet34", get_norm("abn"), [2]).body
        (work / "pretrained").mkdir()
        path = work / "pretrained" / "resnet18_iabn_sync.pth.tar"
        torch.save({"state_dict": body.state_dict()}, path)
        assert "block3" in fails(capsys, toy, "--pretrained", "--name", "x")

    def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(self, work, toy, capsys):
        before = checkpoint_file(work, "a", 0).read_bytes()
        flags = ("--lr", "1e30", "--epochs", "3", "--method", "MIB", "--restart")
        line = fails(capsys, toy, "--name", "a", *flags)
        assert re.search(r"'ce' is (nan|inf|-inf) in epoch \d, iteration \d+", line)
        assert checkpoint_file(work, "a", 0).read_bytes() == before
        metrics = work / "logs" / SETTING / "a" / "step-0" / "metrics.jsonl"
        assert "test" not in metrics.read_text()  # --restart started over

    def test_an_unfinished_step_is_no_start_for_the_next(self, work, toy, capsys):
        path = checkpoint_file(work, "a", 0)
        content = torch.load(path, weights_only=True)
        torch.save({**content, "finished": False}, path)
        assert "--continue_ckpt" in fails(capsys, toy, "--name", "a", "--step", "1")
