"""COCO 2017, its 80 kinds of things, by the pixel maps of COCO-Stuff: where the files lie."""

from dataset.files import PairsByName
from dataset.labels import LabelTable
from dataset.spec import DatasetSpec
from tasks import Family

# The categories of instances_train2017.json, in the order of their ids.
_NAMES = """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light,
    fire hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant,
    bear, zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard,
    sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle,
    wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot,
    hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop,
    mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock,
    vase, scissors, teddy bear, hair drier, toothbrush"""
THINGS = tuple(" ".join(_NAMES.split()).split(", "))
UNUSED = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91}  # category ids up to 91 without a category
# A pixel holds the category's id less one; 91 to 181 are stuff, which is background here.
RAW = [category - 1 for category in range(1, 92) if category not in UNUSED]
CLASS_NAMES = ("background", *THINGS)
BACKGROUND_IDS = {*range(182)} - {*RAW}
LABELS = dict.fromkeys(map(str, BACKGROUND_IDS), "background")
LABELS |= {str(raw): name for raw, name in zip(RAW, THINGS, strict=True)}


COCO = DatasetSpec(
    name="coco",
    class_names=CLASS_NAMES,
    background_is_class=True,
    void=255,
    find_samples=PairsByName(
        "COCO2017",
        images=("images/{}2017", ".jpg"),
        masks=("stuffthingmaps/{}2017", ".png"),
        cure="fetch the data with `sh data/download_coco.sh` inside the data root",
    ),
    family=Family(len(THINGS), names=("offline", "60-20", "40-40", "60-5")),
    table=LabelTable(LABELS, CLASS_NAMES, ignore=[255]),
)
