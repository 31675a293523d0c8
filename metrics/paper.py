"""The numbers of the papers' tables, in percent (`paper.json`, which names its sources)."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

# Lengths of the train and val list that the paper's numbers were measured with.
LISTS = {"voc": (10582, 1449), "ade": (20210, 2000)}


def paper_scores(dataset: str, task: str, overlap: bool, method: str) -> dict[str, float]:
    """MiB's table: column -> mean IoU without background; {} where it has no such row.

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


def plop_scores(dataset: str, task: str, method: str) -> dict[str, float]:
    """PLOP's tables: old, new, all, average over the steps -> mean IoU, as far as they are known.

    Old and all count the background. The setting is the overlapped one, on ADE with every image
    that shows a new class. {} where there is no such row.
    """
    tables = _tables()["plop"]
    values = tables.get(dataset, {}).get(method, {}).get(task, ())
    named = zip(tables["columns"], values, strict=False)
    return {column: value for column, value in named if value is not None}


def plop_source() -> str:
    """Where the numbers of `plop_scores` were published."""
    return str(_tables()["plop"]["source"])


@cache
def _tables() -> dict[str, Any]:
    return json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
