"""Whatever happens while a file is written, a reader sees the old one or the new one."""

import os
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from utils.errors import UserError
from utils.files import atomic_write

REPOSITORY = Path(__file__).parents[2]


def run(code: str, *arguments: object) -> subprocess.Popen:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)


def test_replaces_the_target_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "new" / "folder" / "file"
    for content in (b"first", b"2"):
        with atomic_write(path) as file:
            file.write(content)
            assert not path.exists() or path.read_bytes() == b"first"
        assert path.read_bytes() == content
    assert os.listdir(path.parent) == ["file"]


def test_a_link_is_replaced_and_what_it_leads_to_stays(tmp_path):
    """A step 0 that is a link to another run's is learned again: that run keeps its own."""
    target, link = tmp_path / "file", tmp_path / "link"
    target.write_bytes(b"old")
    link.symlink_to("file")
    with atomic_write(link) as file:
        file.write(b"new")
    assert (target.read_bytes(), link.read_bytes()) == (b"old", b"new")
    assert not link.is_symlink()


def test_a_linked_folder_and_a_link_to_itself(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "linked").symlink_to("disk")
    (tmp_path / "disk/loop").symlink_to("loop")
    for name in ("new/file", "loop"):
        with atomic_write(tmp_path / "linked" / name) as file:
            file.write(b"new")
        assert (tmp_path / "disk" / name).read_bytes() == b"new"
    assert (tmp_path / "linked").is_symlink()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_keeps_the_target(tmp_path, error):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def interrupted():
        with atomic_write(path) as file:
            file.write(b"half")
            raise error

    with pytest.raises(error):
        interrupted()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("count", [10_000, 1_000_000])
def test_a_full_disk_keeps_the_target_and_says_so(tmp_path, count):
    """A limit on the file size stands in for the disk; torch hides the OSError in its own error."""
    path = tmp_path / "model.pth"
    path.write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot write .*model.pth: File too large.*intact"):
            save_tensor(path, count)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["model.pth"]


def save_tensor(path: Path, count: int) -> None:
    with atomic_write(path) as file:
        torch.save({"weight": torch.zeros(count)}, file)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write .*file/list.npy"):
        save_tensor(tmp_path / "file" / "list.npy", 1)


def test_a_killed_writer_leaves_the_target_and_is_cleaned_up_by_the_next(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    writer = run(
        """
        import sys, time, pathlib
        from utils.files import atomic_write
        with atomic_write(pathlib.Path(sys.argv[1])) as file:
            file.write(b"x" * 100_000)
            print("half", flush=True)
            time.sleep(60)
        """,
        path,
    )
    assert writer.stdout is not None
    assert writer.stdout.readline() == "half\n"
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    assert path.read_bytes() == b"old"
    with atomic_write(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]


def test_two_writers_never_mix(tmp_path):
    path = tmp_path / "file"
    code = """
        import sys, pathlib
        from utils.files import atomic_write
        for _ in range(150):
            with atomic_write(pathlib.Path(sys.argv[1])) as file:
                for _ in range(20):
                    file.write(sys.argv[2].encode() * 500)
                    file.flush()
        """
    writers = [run(code, path, letter) for letter in "ab"]
    contents = set()
    while any(writer.poll() is None for writer in writers):
        if path.exists():
            contents.add(path.read_bytes())
    for writer in writers:
        assert writer.wait() == 0
        assert writer.stdout is not None
        writer.stdout.close()
    assert contents <= {b"a" * 10_000, b"b" * 10_000}
    assert os.listdir(tmp_path) == ["file"]
