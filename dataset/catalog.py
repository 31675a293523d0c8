"""The data sets by name. Imports no torch, so that the command line can be read without it."""

from pathlib import Path

from dataset.ade import ADE
from dataset.camvid import CAMVID
from dataset.cityscapes import CITYSCAPES
from dataset.coco import COCO
from dataset.folder import folder_spec
from dataset.spec import DatasetSpec
from dataset.voc import VOC
from utils.errors import UserError

ROWS = (VOC, ADE, CITYSCAPES, COCO, CAMVID)
DATASETS: dict[str, DatasetSpec] = {spec.name: spec for spec in ROWS}
OWN = "folder"  # the data set that describes itself, in <data_root>/dataset.json


def get_spec(name: str, data_root: str | Path = "data") -> DatasetSpec:
    """A row of DATASETS, or for "folder" what `data_root` says of itself.

    Raises UserError for another name, and for a data root without a fitting dataset.json.
    """
    if name == OWN:
        return folder_spec(Path(data_root))
    if name not in DATASETS:
        known = ", ".join([*DATASETS, OWN])
        raise UserError(f"unknown dataset {name!r}: choose one of {known}")
    return DATASETS[name]
