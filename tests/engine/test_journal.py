"""metrics.jsonl: what is kept, replaced and forgotten, and an epoch in two parts."""

from __future__ import annotations

import json

import pytest

from engine.journal import Epoch, Journal
from engine.pace import Pace
from train import LogPoint
from utils.errors import UserError


def point(iteration: int, loss: float, *, speed: float, waiting: float, seconds: float) -> LogPoint:
    return LogPoint(iteration, {"ce": loss, "kd": 2 * loss}, 0.5, speed, waiting, seconds)


def lines(journal: Journal) -> list[dict]:
    """As a strict reader of JSON has them, which knows no NaN."""

    def refuse(name: str) -> None:
        raise ValueError(name)

    text = journal.path.read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in text]


def epoch(number: int, **more: object) -> dict:
    return Epoch(number, 4, {"ce": 1.0}, 0.1, 2.0, 8.0, 0.5).line() | more


def test_an_epoch_adds_up_by_iterations_and_by_time():
    """6 iterations of loss 1 and 2 of loss 5; 3 s at 8 images a second and 1 s at 4."""
    found = Epoch(1)
    found.add(point(6, 1.0, speed=8.0, waiting=0.0, seconds=3.0))
    found.add(point(8, 5.0, speed=4.0, waiting=1.0, seconds=1.0))
    assert found.line() == {
        "epoch": 1, "iterations": 8, "terms": {"ce": 2.0, "kd": 4.0}, "lr": 0.5, "seconds": 4.0,
        "images_per_second": 7.0, "waiting": 0.25, "loss": 6.0,
    }  # fmt: skip


def test_an_interrupted_epoch_goes_on_as_one(tmp_path):
    journal = Journal(tmp_path / "logs" / "metrics.jsonl")
    first = Epoch(3)
    first.add(point(6, 1.0, speed=8.0, waiting=0.0, seconds=3.0))
    journal.put(epoch(1))
    journal.put(epoch(2))
    journal.put(first.line())
    later = Journal(journal.path).go_on(2, 6)
    assert later == first
    later.add(point(8, 5.0, speed=4.0, waiting=1.0, seconds=1.0))
    journal.put(later.line())
    assert [line["epoch"] for line in lines(journal)] == [1, 2, 3]
    assert lines(journal)[2]["terms"] == {"ce": 2.0, "kd": 4.0}


@pytest.mark.parametrize(
    ("epochs", "iterations", "kept"),
    [
        (3, 0, [1, 2, 3]),  # learned, to be tested again
        (2, 4, [1, 2, 3]),  # in the validation of epoch 3
        (2, 3, [1, 2]),  # what is known of epoch 3 is about more iterations
        (2, 0, [1, 2]),
        (0, 0, []),  # the step starts over
    ],
)
def test_what_a_checkpoint_does_not_know_is_forgotten(tmp_path, epochs, iterations, kept):
    journal = Journal(tmp_path / "metrics.jsonl")
    for number in (1, 2, 3):
        journal.put(epoch(number, validation={"mean_iou": 0.5}))
    journal.put({"test": {"mean_iou": 0.5}})
    found = journal.go_on(epochs, iterations)
    assert [line["epoch"] for line in lines(journal)] == kept
    assert (found is None) == (iterations != 4)
    if found:
        assert "validation" not in lines(journal)[-1]


def test_a_later_line_takes_the_place_of_an_earlier_one(tmp_path):
    journal = Journal(tmp_path / "metrics.jsonl")
    for line in (epoch(1), epoch(2), {"test": {"mean_iou": 0.1}}, {"test": {"mean_iou": 0.2}}):
        journal.put(line)
    assert [line.get("test") for line in lines(journal)] == [None, None, {"mean_iou": 0.2}]
    journal.put(epoch(2, validation={}))
    assert lines(journal) == [epoch(1), epoch(2, validation={})]


def test_what_is_not_finite_is_null(tmp_path):
    journal = Journal(tmp_path / "metrics.jsonl")
    journal.put({"test": {"mean_iou_old": float("nan"), "iou": {"bus": float("inf"), "car": 1.0}}})
    assert lines(journal) == [{"test": {"mean_iou_old": None, "iou": {"bus": None, "car": 1.0}}}]


def test_half_a_line_is_survived(tmp_path):
    journal = Journal(tmp_path / "metrics.jsonl")
    whole = [json.dumps(epoch(number)) for number in (1, 2, 3)]
    rubbish = ["[]", "7", '{"epoch": "x"}', "{}", "[" * 100_000, "\udce4"]
    text = "\n".join([whole[0], *rubbish, whole[1], whole[2][:50]])
    journal.path.write_text(text, errors="surrogateescape")
    assert journal.go_on(2, 3) is None
    journal.put(epoch(3))
    assert lines(journal) == [epoch(1), epoch(2), epoch(3)]


@pytest.mark.parametrize("damage", [{"lr": "x"}, {"terms": 7}, {"terms": {"ce": []}}, "seconds"])
def test_a_damaged_epoch_starts_over(tmp_path, damage):
    journal = Journal(tmp_path / "metrics.jsonl")
    line = epoch(1)
    if isinstance(damage, str):
        del line[damage]
    else:
        line |= damage
    journal.put(line)
    assert journal.go_on(0, 4) is None
    assert lines(journal) == []


def test_other_ranks_write_nothing(tmp_path):
    journal = Journal(tmp_path / "logs" / "metrics.jsonl", enabled=False)
    journal.put(epoch(1))
    assert journal.go_on(0, 0) is None
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_a_line(tmp_path):
    (tmp_path / "logs").write_text("a file where the folder belongs")
    with pytest.raises(UserError, match="cannot write .*metrics.jsonl"):
        Journal(tmp_path / "logs" / "metrics.jsonl").put(epoch(1))


def test_time_left():
    """The first lap warms up; evaluations count once one was seen."""
    pace = Pace()
    pace.lap(10, 100.0)
    assert pace.left(6, 0) == "60 s left"
    assert pace.left(6, 8) == "at least 60 s left"
    pace.lap(10, 20.0)
    pace.lap(5, 10.0)
    assert pace.left(30, 8) == "at least 60 s left"
    pace.evaluated(4, 2.0)
    assert pace.left(30, 80) == "100 s left"
    assert pace.left(0, 0) == "0 s left"
