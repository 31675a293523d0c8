"""Cityscapes, fine annotations: where the files lie and what their ids mean."""

from dataset.files import PairsByName
from dataset.labels import LabelTable
from dataset.spec import DatasetSpec
from tasks import Family

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


CITYSCAPES = DatasetSpec(
    name="cityscapes",
    class_names=CLASS_NAMES,
    background_is_class=False,
    void=255,
    find_samples=PairsByName(
        "cityscapes",
        images=("leftImg8bit/{}", "_leftImg8bit.png"),
        masks=("gtFine/{}", "_gtFine_labelIds.png"),
        cure="fetch leftImg8bit and gtFine as data/README.md says",
    ),
    family=Family(len(IDS), names=("offline", "14-5", "14-1", "10-1")),
    table=LabelTable({str(key): name for key, name in IDS.items()}, CLASS_NAMES, IGNORED),
)
