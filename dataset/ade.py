"""ADE20K in the form of SceneParse150: where the files lie."""

from dataset.files import PairsByName
from dataset.spec import DatasetSpec

# objectInfo150.txt of the benchmark, the first synonym of each class.
_NAMES = """background, wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass,
    cabinet, sidewalk, person, earth, door, table, mountain, plant, curtain, chair, car, water,
    painting, sofa, shelf, house, sea, mirror, rug, field, armchair, seat, fence, desk, rock,
    wardrobe, lamp, bathtub, railing, cushion, base, box, column, signboard, chest of drawers,
    counter, sand, sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway,
    case, pool table, pillow, screen door, stairway, river, bridge, bookcase, blind, coffee
    table, toilet, flower, book, hill, bench, countertop, stove, palm, kitchen island, computer,
    swivel chair, boat, bar, arcade machine, hovel, bus, towel, light, truck, tower, chandelier,
    awning, streetlight, booth, television receiver, airplane, dirt track, apparel, pole, land,
    bannister, escalator, ottoman, bottle, buffet, poster, stage, van, ship, fountain, conveyer
    belt, canopy, washer, plaything, swimming pool, stool, barrel, basket, waterfall, tent, bag,
    minibike, cradle, oven, ball, food, step, tank, trade name, microwave, pot, animal, bicycle,
    lake, dishwasher, screen, blanket, sculpture, hood, sconce, vase, traffic light, tray,
    ashcan, fan, pier, crt screen, plate, monitor, bulletin board, shower, radiator, glass,
    clock, flag"""
CLASS_NAMES = tuple(" ".join(_NAMES.split()).split(", "))


ADE = DatasetSpec(
    name="ade",
    class_names=CLASS_NAMES,
    background_is_class=False,
    void=None,
    find_samples=PairsByName(
        "ADEChallengeData2016",
        images=("images/{}", ".jpg"),
        masks=("annotations/{}", ".png"),
        cure="fetch the data with `sh data/download_ade.sh` inside the data root",
        splits=("training", "validation"),
    ),
    partition=True,
    # The authors cut 100-50 out of their lists of 100-10.
    joined={f"100-50{order}": f"100-10{order}" for order in ("", "b", "c")},
)
