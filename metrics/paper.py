"""The numbers of the paper's tables 1 and 2 (`paper.json`, which names its source), in percent."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

# Lengths of the train and val list that the paper's numbers were measured with.
LISTS = {"voc": (10582, 1449), "ade": (20210, 2000)}


def paper_scores(dataset: str, task: str, overlap: bool, method: str) -> dict[str, float]:
    """Column -> mean IoU in percent, background not counted; {} where the paper has no such row.

    Columns are old, new and all for VOC, for ADE "1-100" and so on, and all. The paper's joint
    training is the task "offline", of which only the column all is known whatever the method.
    """
    tables = _tables().get(dataset)
    if tables is None:
        return {}
    if task == "offline":
        return {"all": next(iter(tables["joint"].values()))[-1]}
    # ADE has one partition, overlapped or not.
    setting = f"{task}-ov" if overlap and dataset == "voc" else task
    values = tables.get(method, {}).get(setting)
    columns = tables["columns"] if dataset == "voc" else tables["columns"].get(task)
    return dict(zip(columns, values, strict=True)) if values else {}


@cache
def _tables() -> dict[str, Any]:
    return json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
