"""Help that says everything, slips that are guessed, and a line where a library is missing."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest

import export
import predict
import report
import run
from argparser import get_parser
from dataset import check, from_coco, splits
from engine import gallery
from methods.table import FLAGS
from tests.conftest import ROOT
from utils.uncaught import explain

PROGRAMS: dict[str, Callable[..., int | None]] = {
    "run.py": run.main, "predict.py": predict.main, "report.py": report.main,
    "export.py": export.main,
    "-m dataset.check": check.main, "-m dataset.splits": splits.main,
    "-m dataset.from_coco": from_coco.main, "-m engine.gallery": gallery.main,
}  # fmt: skip


def help_of(program: str, capsys) -> str:
    with pytest.raises(SystemExit) as end:
        PROGRAMS[program](["--help"])
    assert end.value.code == 0
    return capsys.readouterr().out


def refusal(program: str, argv: list[str], capsys) -> str:
    """The line with which a program refuses a command line."""
    try:
        status = PROGRAMS[program](argv)
    except SystemExit as end:  # python -m dataset.splits
        print(end.code, file=sys.stderr)
        status = 1
    out, err = capsys.readouterr()
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("error: ")
    return err


@pytest.mark.parametrize("program", PROGRAMS)
def test_usage_is_one_line_and_every_flag_shows_its_default(program: str, capsys):
    usage, blank, *rest = help_of(program, capsys).splitlines()
    assert usage.startswith(f"usage: python {program} ")
    assert len(usage) < 100
    assert blank == ""
    entries = re.split(r"\n  (?=-)", "\n".join(rest))[1:]
    assert len(entries) > 1
    for entry in entries:
        name = entry.split()[0].rstrip(",")
        if name not in ("-h", "--version") and not re.search(rf" {name} (FILE|DIR)", usage):
            assert "default" in entry, name


def test_defaults_are_those_of_the_parser(capsys):
    text = " ".join(help_of("run.py", capsys).split())
    for words in (
        "--epochs EPOCHS passes over a step's images; 'a,b': a at step 0, b later (default: 30)",
        "--weight_decay WEIGHT_DECAY of SGD (default: 0.0001)",
        "--overlap overlapped setting (also --overlapped) (default: off)",
        "--mask, --no_mask old classes become background in training (--no_mask keeps them) "
        "(default: on)",
        "--reg_alpha REG_ALPHA update rate of the Fisher (default: 0.9)",
        "--loss_kd LOSS_KD weight of the output distillation (default: 0.0)",
        "--bce, --no_bce binary instead of softmax cross-entropy (default: off)",
        "comma-separated, whose importances are collected (default: none)",
    ):
        assert words in text
    shown = set(re.findall(r"--(\w+)", text))
    assert {action.dest for action in get_parser()._actions} <= shown
    assert set(FLAGS) <= shown


@pytest.mark.parametrize(
    ("program", "argv", "words"),
    [
        ("run.py", ["--metod", "MIB"], "unknown flag --metod (did you mean --method?)"),
        ("run.py", ["--batch-sise=3"], "unknown flag --batch-sise (did you mean --batch_size?)"),
        ("run.py", ["-method", "MIB"], "unknown flag -method (did you mean --method?)"),
        ("run.py", ["--frobnicate"], "unknown flag --frobnicate;"),
        ("run.py", ["--method", "MBI"], "'MBI' is none of FT, LWF"),
        ("run.py", ["--method", "FT,mibb"], "'mibb' is none of FT, LWF"),
        ("run.py", ["--method", "FT,mibb"], "(did you mean MIB?)"),
        ("run.py", ["--method", ""], "--method: an empty name: a comma too many?"),
        ("run.py", ["--method", "FT,"], "--method: an empty name: a comma too many?"),
        ("run.py", ["--method", "FT, ,MIB"], "--method: an empty name: a comma too many?"),
        ("run.py", ["--method", "plop-ewf"], "(did you mean PLOP+EWF?)"),
        ("run.py", ["--dataset", "VOC"], "'VOC' is none of voc, ade"),
        ("run.py", ["--dataset", "cityscape"], "(did you mean cityscapes?)"),
        ("run.py", ["--backbone", "resnet-50"], "(did you mean resnet50?)"),
        ("run.py", ["--output_stride", "15"], "'15' is none of 8, 16"),
        ("run.py", ["--regularizer", "ewcc"], "(did you mean ewc?)"),
        ("predict.py", ["--ckptt", "x", "y", "--out", "z"], "--ckptt (did you mean --ckpt?)"),
        ("predict.py", ["x"], "required: --ckpt, --out"),
        ("export.py", ["--out", "x.onnx", "--chpt", "y"], "--chpt (did you mean --ckpt?)"),
        ("report.py", ["--plt", "x.png"], "--plt (did you mean --plot?)"),
        ("report.py", ["--format", "txt"], "(did you mean text?)"),
        ("-m dataset.check", ["x", "--taks", "3-2"], "--taks (did you mean --task?)"),
        ("-m dataset.splits", ["--dataset", "ad"], "(did you mean ade?)"),
        ("-m dataset.from_coco", ["x.json"], "required: --images, --out"),
        ("-m engine.gallery", ["--ot", "x"], "--ot (did you mean --out?)"),
    ],
)
def test_a_slip_is_guessed_and_points_to_the_programs_own_help(program, argv, words, capsys):
    line = refusal(program, argv, capsys)
    assert words in line
    assert line.endswith(f"; `python {program} --help` lists every flag\n")


@pytest.mark.parametrize("value", ["--x y", "-3 degrees", "-"])
def test_what_only_looks_like_a_flag_is_a_value(value: str):
    assert get_parser().parse_args(["--name", value]).name == value


def test_a_plot_of_another_kind_is_refused_before_the_work(capsys):
    line = refusal("report.py", ["nowhere", "--plot", "x.jpg"], capsys)
    assert line == "error: cannot draw x.jpg: its name must end in .png, .pdf, .svg\n"


@pytest.mark.parametrize("program", PROGRAMS)
def test_without_the_libraries_a_line_names_the_cure(program: str):
    command = [sys.executable, "-S", *program.split(), "--help"]  # no site-packages
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert re.match(r"error: .* has no module (PIL|numpy|torch): run `make setup`", done.stderr)
    assert "pip install -r requirements.txt" in done.stderr


def test_modules_that_no_requirement_brings_keep_their_traceback():
    assert explain("pydantic.main") is not None
    for name in ("dataset.nonsense", "run", "_lzma", ""):
        assert explain(name) is None


@pytest.mark.parametrize("program", ["run", "predict", "dataset.check"])
def test_ctrl_c_that_nothing_catches_is_a_line(program: str):
    """While libraries are imported, for one."""
    # A shell without job control starts background jobs that ignore the signal.
    heard = "signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"import signal, {program}; {heard}; signal.raise_signal(signal.SIGINT)"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (-signal.SIGINT, "interrupted\n")


@pytest.mark.parametrize("program", ["run", "report"])
def test_help_imports_no_torch(program: str):
    code = f"import sys, {program}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
