"""Cityscapes, fine annotations: where the files lie and what their ids mean."""

from pathlib import Path

from dataset.files import Sample, Tree, pair_by_name
from dataset.labels import LabelTable
from dataset.spec import DatasetSpec
from tasks import Family

FOLDER = "cityscapes"
CURE = "fetch leftImg8bit and gtFine as data/README.md says"

# The 19 classes that the benchmark scores, by id (cityscapesscripts/helpers/labels.py).
IDS = {
    7: "road",
    8: "sidewalk",
    11: "building",
    12: "wall",
    13: "fence",
    17: "pole",
    19: "traffic light",
    20: "traffic sign",
    21: "vegetation",
    22: "terrain",
    23: "sky",
    24: "person",
    25: "rider",
    26: "car",
    27: "truck",
    28: "bus",
    31: "train",
    32: "motorcycle",
    33: "bicycle",
}
CLASS_NAMES = ("unlabelled", *IDS.values())
# The other ids: the car itself, ground, parking, bridge, caravan, ...; 255 is no id but may occur.
IGNORED = [*({*range(34)} - {*IDS}), 255]


def find_samples(data_root: Path, split: str) -> list[Sample]:
    """Samples of a split ("train" or "val") by city and file name; see `pair_by_name`."""
    tree = Tree(data_root, FOLDER, CURE)
    images = f"leftImg8bit/{split}", "_leftImg8bit.png"
    return pair_by_name(tree, images, (f"gtFine/{split}", "_gtFine_labelIds.png"), CURE)


CITYSCAPES = DatasetSpec(
    name="cityscapes",
    class_names=CLASS_NAMES,
    background_is_class=False,
    void=255,
    find_samples=find_samples,
    family=Family(len(IDS), names=("offline", "14-5", "14-1", "10-1")),
    table=LabelTable({str(key): name for key, name in IDS.items()}, CLASS_NAMES, IGNORED),
)
