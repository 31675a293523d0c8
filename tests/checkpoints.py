"""Checkpoints as run.py writes them, of a small network with random weights, and pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from engine.plans import parse
from modules.norm import get_norm
from segmentation_module import make_model
from tasks import get_task
from utils import checkpoint

STEPS = [[0, 3, 7], [1, 12]]  # head order is not label order
SEEN = [0, 3, 7, 1, 12]
FLAGS = ["--backbone", "resnet18", "--crop_size", "64", "--norm_act", "abn"]


def write_checkpoint(path: Path, knows_itself: bool = True, **changes) -> Path:
    """A ResNet-18 with random weights and a balanced guess, with options as run.py stores them."""
    opts = parse(FLAGS)[0].opts
    steps = STEPS if knows_itself else get_task("voc", "15-5").steps[:1]
    torch.manual_seed(0)
    pooling = opts.pooling if knows_itself else 32
    model = make_model(
        "resnet18", get_norm("abn"), [len(labels) for labels in steps], pooling=pooling
    )
    for classifier in model.cls:
        torch.nn.init.normal_(classifier.weight, std=1.0)
    content = {"model_state": model.state_dict()}
    if knows_itself:
        options = opts.record() | {"step": len(steps) - 1}
        content |= {"options": options, "steps": steps, **changes}
    checkpoint.save(path, content)
    return path


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
