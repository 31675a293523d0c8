"""The row that docs/new_method.md shows needs no other edit than renewed tables."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

from tests.conftest import ROOT


def test_the_row_applies_as_written(tmp_path):
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    for name in listed.stdout.split("\n"):
        if (ROOT / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
    page = (ROOT / "docs" / "new_method.md").read_text()
    row = re.findall(r"```diff\n(.*?)```", page, re.S)[0]
    before, after = (
        "".join(line[1:] + "\n" for line in row.splitlines()[3:] if line[0] != mark)
        for mark in "+-"
    )
    table = tmp_path / "methods" / "table.py"
    text = table.read_text()
    assert text.count(before) == 1
    table.write_text(text.replace(before, after))

    def python(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    assert python("-m", "tests.test_readme").returncode == 0
    files = ["tests/test_argparser.py", "tests/test_readme.py", "tests/test_flags_frozen.py"]
    files += ["tests/methods/test_pieces.py", "tests/methods/test_groups.py"]
    done = python("-m", "pytest", "-q", "-p", "no:cacheprovider", *files)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "MIB-ILT" in (tmp_path / "README.md").read_text()
