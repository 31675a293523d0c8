"""What happens once in a step."""

from __future__ import annotations

import engine.fit
import run
from tests.test_run import SMALL, make_toy


def test_a_student_is_finished_once_after_its_last_epoch(tmp_path, monkeypatch):
    saved: list[str] = []
    finish, save = engine.fit.finish_student, engine.fit.save_progress

    def finished(*arguments):
        saved.append("finished")
        finish(*arguments)

    def written(*arguments, **more):
        saved.append("saved")
        save(*arguments, **more)

    toy = make_toy(tmp_path / "toy")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(engine.fit, "finish_student", finished)
    monkeypatch.setattr(engine.fit, "save_progress", written)
    argv = ["--data_root", str(toy), *SMALL, "--epochs", "2", "--step", "all"]
    assert run.main([*argv, "--method", "MIB+EWF"]) == 0
    assert saved == ["saved", "finished", "saved"] * 2
