"""CamVid, the 11 classes and the 468 + 233 frames that SegNet made common: own data, described."""

from pathlib import Path

from dataset.files import Sample
from dataset.folder import find_samples, spec_of
from dataset.layout import Layout

FOLDER = "camvid"
CURE = "fetch the data with `sh data/download_camvid.sh` inside the data root"

# Frequent classes first, so that 6-5 and 7-1 learn the rare and small ones later.
IDS = {
    0: "sky",
    1: "building",
    3: "road",
    4: "pavement",
    5: "tree",
    7: "fence",
    2: "pole",
    8: "car",
    9: "pedestrian",
    6: "sign",
    10: "bicyclist",
}
LAYOUT = Layout(
    classes=["unlabelled", *IDS.values()],
    background=False,
    labels={str(key): name for key, name in IDS.items()},
    ignore=[11],
    train="train.txt",
    val="val.txt",
)


def camvid_samples(data_root: Path, split: str) -> list[Sample]:
    """Samples of a split ("train" or "val") in the order of its list."""
    return find_samples(LAYOUT, data_root / FOLDER, split, CURE)


CAMVID = spec_of(LAYOUT, "camvid", camvid_samples, ("offline", "6-5", "7-1"))
