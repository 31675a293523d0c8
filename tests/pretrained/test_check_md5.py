"""pretrained/check_md5.py, run as a user runs it."""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "pretrained" / "check_md5.py"


def check(script: Path, *arguments: str) -> tuple[int, str]:
    """Exit status and the one line printed."""
    result = subprocess.run(
        [sys.executable, str(script), *arguments], text=True, capture_output=True
    )
    assert result.stderr == ""
    (line,) = result.stdout.splitlines()
    return result.returncode, line


def script_expecting(content: bytes, folder: Path) -> Path:
    """A copy of the script that takes `content` for the right file."""
    text = SCRIPT.read_text()
    assert text.count("1552ae0f3d610108df702135f56bd27b") == 1
    copy = folder / SCRIPT.name
    copy.write_text(
        text.replace("1552ae0f3d610108df702135f56bd27b", hashlib.md5(content).hexdigest())
    )
    return copy


def test_right_file(tmp_path: Path) -> None:
    """Named or found beside the script; longer than the blocks it is read in."""
    content = bytes(range(256)) * 5000
    script = script_expecting(content, tmp_path)
    (tmp_path / "resnet101_iabn_sync.pth.tar").write_bytes(content)
    status, line = check(script)
    assert status == 0
    assert line.startswith("matches: ")
    shutil.copy(tmp_path / "resnet101_iabn_sync.pth.tar", tmp_path / "other name")
    assert check(script, str(tmp_path / "other name"))[0] == 0


def test_wrong_file(tmp_path: Path) -> None:
    wrong = tmp_path / "resnext101.pth.tar"
    wrong.write_bytes(b"another network")
    status, line = check(SCRIPT, str(wrong))
    assert status == 1
    assert line.startswith(f"wrong file: {wrong} ")
    assert hashlib.md5(b"another network").hexdigest() in line
    assert "1552ae0f3d610108df702135f56bd27b" in line


def test_missing_file(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", tmp_path):  # a folder is no file either
        status, line = check(SCRIPT, str(path))
        assert status == 2
        assert line.startswith(f"missing: {path} ")
        assert "pretrained/README.md" in line
