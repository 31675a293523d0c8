"""Curves and cards read back from real files; the console beside a real progress bar."""

import importlib.metadata
import io
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_accumulator import (
    EventAccumulator as PluginEventAccumulator,
)
from tqdm import tqdm

from utils.errors import UserError
from utils.logger import Logger, WandbOptions, setup_console

ROOT = Path(__file__).parents[2]


def events(logdir: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(logdir), size_guidance={"scalars": 0, "images": 0})
    return accumulator.Reload()


def texts(accumulator: EventAccumulator, tag: str) -> list[str]:
    found = accumulator.Tensors(f"{tag}/text_summary")
    return [event.tensor_proto.string_val[0].decode() for event in found]


def points(accumulator: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in accumulator.Scalars(tag)]


def test_tensorboard_holds_what_was_logged(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
    logdir = tmp_path / "voc-15-5" / "mib"
    with Logger(logdir, config={"lr": 0.01, "data_root": Path("data|x")}) as logger:
        logger.scalars({"loss/ce": 1.5, "loss/kd": 0.25, "iou/old": float("nan")}, 10)
        logger.scalars({"loss/ce": 1.25}, 20)
        logger.image("panel/0", picture, 20)
        logger.table("iou", ["class", "IoU"], [["sofa", 0.5], ["a|b\nc", "X"]], 20)
        logger.text("note", "**bold**", 20)
    read = events(logdir)
    assert points(read, "loss/ce") == [(10, 1.5), (20, 1.25)]
    assert points(read, "loss/kd") == [(10, 0.25)]
    assert "iou/old" not in read.Tags()["scalars"]
    (image,) = read.Images("panel/0")
    assert image.step == 20
    decoded = Image.open(io.BytesIO(image.encoded_image_string))
    np.testing.assert_array_equal(np.asarray(decoded), picture)
    assert texts(read, "note") == ["**bold**"]
    assert texts(read, "iou") == ["| class | IoU |\n| --- | --- |\n| sofa | 0.5 |\n| a\\|b c | X |"]
    assert "| lr | 0.01 |" in texts(read, "options")[0]
    assert "| data_root | data\\|x |" in texts(read, "options")[0]


@pytest.mark.parametrize(("resume", "kept"), [(6, 6), (0, 0), (None, 10)])
def test_which_earlier_points_a_later_run_replaces(tmp_path, resume, kept):
    with Logger(tmp_path, resume_step=0) as logger:
        for step in range(10):
            logger.scalars({"loss": 1.0}, step)
            logger.text("note", "before", step)
    with Logger(tmp_path, resume_step=resume) as logger:
        for step in range(kept, 12):
            logger.scalars({"loss": 2.0}, step)
    again = [(step, 2.0) for step in range(kept, 12)]
    assert points(events(tmp_path), "loss") == [(step, 1.0) for step in range(kept)] + again
    # What the pages of TensorBoard are made of when it does without its data server.
    shown = PluginEventAccumulator(str(tmp_path), tensor_size_guidance={"text": 0}).Reload()
    assert [event.step for event in shown.Tensors("loss")] == list(range(12))
    assert [event.step for event in shown.Tensors("note/text_summary")] == list(range(kept))


def test_disabled_or_closed_it_does_nothing(tmp_path):
    disabled = Logger(tmp_path / "none", enabled=False, wandb=WandbOptions("project"))
    closed = Logger(tmp_path / "closed")
    closed.close()
    size = sum(path.stat().st_size for path in (tmp_path / "closed").iterdir())
    for logger in (disabled, closed):
        logger.scalars({"loss": 1.0}, 1)
        logger.image("panel", np.zeros((4, 4, 3), np.uint8), 1)
        logger.table("iou", ["class"], [["sofa"]], 1)
        logger.text("note", "text", 1)
        logger.flush()
        logger.close()
    assert not (tmp_path / "none").exists()
    assert sum(path.stat().st_size for path in (tmp_path / "closed").iterdir()) == size


def test_without_tensorboard_no_events_are_written(tmp_path):
    with Logger(tmp_path, tensorboard=False) as logger:
        logger.scalars({"loss": 1.0}, 1)
    assert list(tmp_path.iterdir()) == []


def test_a_logdir_that_cannot_be_written_is_a_user_error(tmp_path):
    (tmp_path / "logs").write_text("a file where the folder belongs")
    with pytest.raises(UserError, match="cannot write logs to .*choose another --logdir"):
        Logger(tmp_path / "logs" / "run")


def test_a_missing_wandb_is_a_user_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        Logger(tmp_path, wandb=WandbOptions("project"))
    assert list(tmp_path.iterdir()) == []


def has_wandb() -> bool:
    try:
        return bool(importlib.metadata.version("wandb"))
    except importlib.metadata.PackageNotFoundError:
        return False


needs_wandb = pytest.mark.skipif(not has_wandb(), reason="wandb is not installed")


@needs_wandb
def test_a_wandb_that_does_not_start_is_a_user_error(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "nonsense")
    with pytest.raises(UserError, match="wandb does not start .*nonsense.*leave the flag out"):
        Logger(tmp_path, wandb=WandbOptions("project"))
    assert list(tmp_path.iterdir()) == []


def wandb_records(path: Path) -> Iterator[Any]:
    """Records of a .wandb file: a log in LevelDB's format after a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # too little left of the block for another header
            at += 32768 - at % 32768
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            message = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
            message.ParseFromString(record)
            yield message
            record = b""


RUNS = """
import os, signal, sys
from pathlib import Path
import numpy as np
from utils.logger import Logger, WandbOptions

assert not {"tensorboard", "wandb", "torch"} & set(sys.modules)  # imported when needed
folder = Path(sys.argv[1])
options = WandbOptions("mib", group="voc-15-5-ov")
with Logger(folder / "run", wandb=options, name="mib_1", config={"lr": 0.5, "at": Path("x")},
            resume_step=0, tensorboard=False) as logger:
    logger.scalars({"loss/ce": 1.5, "iou/old": float("nan")}, 10)
    logger.image("panel", np.zeros((6, 8, 3), np.uint8), 10)
    logger.table("iou", ["class", "IoU"], [["sofa", "0.5"]], 10)
    logger.text("note", "a < b", 10)
    logger.scalars({"loss/ce": 1.25}, 20)
try:
    with Logger(folder / "run", wandb=options, name="mib_1", resume_step=15,
                tensorboard=False) as logger:
        logger.scalars({"loss/ce": 1.125}, 25)
        raise RuntimeError
except RuntimeError:
    pass
first = (folder / "run" / "wandb_id").read_text()
Logger(folder / "run", wandb=options, tensorboard=False).close()
assert (folder / "run" / "wandb_id").read_text() == first
Logger(folder / "run", wandb=options, resume_step=0, tensorboard=False).close()
assert (folder / "run" / "wandb_id").read_text() != first
named = WandbOptions("mib", run_id="chosen")
Logger(folder / "named", wandb=named, tensorboard=False).close()

logger = Logger(folder / "killed")
logger.scalars({"loss": 0.5}, 1)
logger.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""


@needs_wandb
def test_wandb_offline_for_real_and_a_kill_after_flush(tmp_path):
    env = {**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    command = [sys.executable, "-c", RUNS, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr

    files = sorted((tmp_path / "run").glob("wandb/offline-run-*/*.wandb"), key=os.path.getmtime)
    runs = [list(wandb_records(path)) for path in files]
    heads = [next(r.run for r in run if r.HasField("run")) for run in runs]
    ids = [head.run_id for head in heads]
    assert ids[0] == ids[1] == ids[2] != ids[3]
    assert (heads[0].project, heads[0].run_group) == ("mib", "voc-15-5-ov")
    assert heads[0].display_name == "mib_1"
    config = {item.key: item.value_json for item in heads[0].config.update}
    assert json.loads(config["lr"]) == 0.5

    logged = [
        {".".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
        for run in runs[:2]
        for record in run
        if record.HasField("history")
    ]
    assert [(row["_step"], row["loss/ce"]) for row in logged] == [
        ("10", "1.5"),
        ("20", "1.25"),
        ("25", "1.125"),
    ]
    assert not any("iou/old" in row for row in logged)
    kinds = {tag: json.loads(logged[0][f"{tag}._type"]) for tag in ("panel", "iou", "note")}
    assert kinds == {"panel": "image-file", "iou": "table-file", "note": "html-file"}
    (page,) = files[0].parent.glob("files/media/html/*.html")
    assert page.read_text() == "<pre>a &lt; b</pre>"
    (table,) = files[0].parent.glob("files/media/table/*.json")
    assert json.loads(table.read_text()) == {"columns": ["class", "IoU"], "data": [["sofa", "0.5"]]}
    codes = [[r.exit.exit_code for r in run if r.HasField("exit")] for run in runs[:2]]
    assert codes == [[0], [1]]
    assert (tmp_path / "named" / "wandb_id").read_text() == "chosen"

    assert points(events(tmp_path / "killed"), "loss") == [(1, 0.5)]


@pytest.fixture
def root_logger() -> Iterator[logging.Logger]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield root
    root.handlers, root.level = handlers, level


def speak() -> None:
    for level in ("debug", "info", "warning"):
        getattr(logging.getLogger("train"), level)("%s line", level)
    logging.getLogger("PIL.PngImagePlugin").debug("chunk after chunk")


@pytest.mark.parametrize(
    ("rank", "debug", "expected"),
    [
        (0, False, ["I info line", "W warning line"]),
        (1, False, ["W warning line"]),
        (0, True, ["D debug line", "I info line", "W warning line"]),
        (1, True, ["D debug line", "I info line", "W warning line"]),
    ],
)
def test_console_tells_by_rank(root_logger, capsys, rank, debug, expected):
    setup_console(3, True)
    setup_console(rank, debug)  # takes the place of the first
    speak()
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    prefix = f"[rank {rank}] " if rank or debug else ""
    assert all(line.startswith(prefix) for line in lines)
    times_and_texts = [line.removeprefix(prefix).split(" ", 1) for line in lines]
    assert [text for _, text in times_and_texts] == expected
    assert all(len(time) == len("00:00:00") for time, _ in times_and_texts)


def test_console_leaves_the_progress_bar_in_one_piece(root_logger, capsys):
    setup_console()
    with tqdm(total=4, desc="epoch", ncols=60, mininterval=0) as bar:
        bar.update()
        drawn = len(capsys.readouterr().err)
        logging.getLogger("train").info("saved")
        out, err = capsys.readouterr()
    assert drawn
    assert out.endswith(" I saved\n")
    assert out.count("\n") == 1
    cleared, _, redrawn = err.lstrip("\r").partition("\r")
    assert cleared.strip() == ""
    assert "1/4" in redrawn


def test_the_latest_picture_of_a_tag_is_a_png_file(tmp_path):
    pictures = [np.full((4, 5, 3), value, dtype=np.uint8) for value in (10, 200)]
    with Logger(tmp_path, tensorboard=False) as logger:
        for step, picture in enumerate(pictures):
            logger.image("samples/0", picture, step)
    with Image.open(tmp_path / "images" / "samples" / "0.png") as stored:
        assert np.array_equal(np.asarray(stored), pictures[1])
    with Logger(tmp_path / "other", enabled=False) as logger:
        logger.image("samples/0", pictures[0], 0)
    assert not (tmp_path / "other").exists()
