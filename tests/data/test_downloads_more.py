"""data/download_coco.sh and download_camvid.sh against the server of test_downloads.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.test_downloads import (
    CAMVID_FILES,
    CAMVID_SPLITS,
    CAMVID_ZIP,
    COCO_SPLITS,
    MAPS_ZIP,
    Mirror,
    assert_fails,
    download,
    mirror,
    zip_of,
)

__all__ = ["mirror"]  # the fixture


def test_coco_is_laid_out_once(tmp_path: Path, mirror: Mirror) -> None:
    result = download("coco", mirror, tmp_path)
    assert result.returncode == 0, result.stderr
    tree = tmp_path / "COCO2017"
    for kind, end in (("images", "jpg"), ("stuffthingmaps", "png")):
        for split, numbers in COCO_SPLITS.items():
            names = sorted(path.name for path in (tree / kind / split).iterdir())
            assert names == sorted(f"{number:012}.{end}" for number in numbers)
    assert sorted(path.name for path in tree.iterdir()) == ["images", "stuffthingmaps"]
    asked = list(mirror.requests)
    assert [name for name, _ in asked] == ["train2017.zip", "val2017.zip", MAPS_ZIP]
    assert "nothing to do" in download("coco", mirror, tmp_path).stdout
    assert mirror.requests == asked
    (tree / "images/val2017/000000000139.jpg").unlink()
    assert_fails(download("coco", mirror, tmp_path), "found 1 files in images/val2017", "away")


def test_coco_resumes_and_counts(tmp_path: Path, mirror: Mirror) -> None:
    mirror.cut[MAPS_ZIP] = 100
    assert_fails(download("coco", mirror, tmp_path), MAPS_ZIP, "MAPS_URL")
    assert_fails(download("coco", mirror, tmp_path, TRAIN_COUNT="4"), "found 3 files", MAPS_ZIP)
    assert not (tmp_path / "COCO2017").exists()
    assert mirror.requests[-1] == (MAPS_ZIP, "bytes=100-")
    assert download("coco", mirror, tmp_path).returncode == 0


def test_camvid_asks_for_yes(tmp_path: Path, mirror: Mirror) -> None:
    for arguments in ((), (str(tmp_path),)):
        assert_fails(download("camvid", mirror, tmp_path, *arguments), "research only", "--yes")
    assert mirror.requests == []
    assert list(tmp_path.iterdir()) == []


def test_camvid_is_laid_out_once(tmp_path: Path, mirror: Mirror) -> None:
    target = tmp_path / "new folder"
    result = download("camvid", mirror, tmp_path, "--yes", str(target))
    assert result.returncode == 0, result.stderr
    tree = target / "camvid"
    assert (tree / "train.txt").read_text() == "0001TP_1.png\n0006R0_2.png\n0016E5_3.png\n"
    assert (tree / "val.txt").read_text() == "Seq05_4.png\na.png\n"
    for stem in sum(CAMVID_SPLITS.values(), ()):
        assert (tree / f"images/{stem}.png").read_bytes() == stem.encode()
        assert (tree / f"masks/{stem}.png").read_bytes() == f"{stem}annot".encode()
    assert sorted(p.name for p in tree.iterdir()) == ["images", "masks", "train.txt", "val.txt"]
    assert not (target / "camvid.part").exists()
    assert "nothing to do" in download("camvid", mirror, tmp_path, "--yes", str(target)).stdout
    assert len(mirror.requests) == 1


@pytest.mark.parametrize(
    ("gone", "words"),
    [("/trainannot/0006R0_2", "no mask trainannot/0006R0_2"), ("/test/", "no CamVid/test")],
)
def test_camvid_that_is_not_whole(tmp_path: Path, mirror: Mirror, gone: str, words: str) -> None:
    kept = {name: content for name, content in CAMVID_FILES.items() if gone not in name}
    mirror.files[CAMVID_ZIP] = zip_of(kept)
    assert_fails(download("camvid", mirror, tmp_path, "--yes"), CAMVID_ZIP, words)
    assert not (tmp_path / "camvid").exists()
