"""The network with a classifier that grows: body -> head -> one 1x1 convolution per step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from modules.deeplab import DeeplabV3
from modules.norm import ABN
from modules.pretrained import CURE, match_norms, read_weights
from modules.residual import Norm
from modules.resnet import ResNet
from utils.errors import UserError

HEAD_CHANNELS = 256


# What a forward pass can return beside the logits: the outputs of the body's modules (mod5 is the
# body's own output), after their activation, and that of the head.
MAPS = ("mod1", "mod2", "mod3", "mod4", "mod5", "pre_logits")


class Output(NamedTuple):
    """What a forward pass returns."""

    logits: Tensor  # B C h w, channels in head order; h w = H W / output stride
    maps: dict[str, Tensor]  # of MAPS, those that were asked for, B D h w each


class IncrementalSegmentationModule(nn.Module):
    """DeepLabv3 whose classifier has one 1x1 convolution per step, concatenated.

    Args:
        classes_per_step: channels of cls.0, cls.1, ...; the first includes background.
    """

    def __init__(self, body: ResNet, head: DeeplabV3, classes_per_step: Sequence[int]) -> None:
        super().__init__()
        self.body = body
        self.head = head
        self.cls = nn.ModuleList(nn.Conv2d(HEAD_CHANNELS, n, 1) for n in classes_per_step)
        self.classes_per_step = tuple(classes_per_step)
        self._frozen_norms: list[ABN] = []

    def forward(self, images: Tensor, maps: tuple[str, ...] = ()) -> Output:
        """Images B 3 H W, ImageNet-normalised -> logits and the `maps` asked for, of MAPS."""
        features, kept = self.body(images, maps)
        pre_logits = self.head(features)
        logits = torch.cat([classifier(pre_logits) for classifier in self.cls], 1)
        if "pre_logits" in maps:
            kept["pre_logits"] = pre_logits
        return Output(logits, kept)

    def train(self, mode: bool = True) -> IncrementalSegmentationModule:
        super().train(mode)
        for norm in self._frozen_norms:
            norm.eval()
        return self

    def freeze_norms(self) -> None:
        """Keep statistics, weights and biases of all norms as they are, in training too."""
        self._frozen_norms = [m for m in self.modules() if isinstance(m, ABN)]
        for norm in self._frozen_norms:
            norm.requires_grad_(False)
            norm.eval()

    @torch.no_grad()
    def init_balanced(self) -> None:
        """Share the background's probability among background and the N newest classes.

        Cermelli et al., CVPR 2020, eq. 10-11: each new weight is the background's; each new bias
        and the background's own become the old background bias - log(N + 1).
        """
        first, newest = (cast(nn.Conv2d, self.cls[i]) for i in (0, -1))
        assert first.bias is not None
        assert newest.bias is not None
        bias = first.bias[0] - math.log(newest.bias.numel() + 1)
        newest.weight.copy_(first.weight[:1].expand_as(newest.weight))
        newest.bias.fill_(bias)
        first.bias[0] = bias


def make_model(
    backbone: str, norm: Norm, classes_per_step: Sequence[int], *, output_stride: int = 16,
    pooling: int = 32,
) -> IncrementalSegmentationModule:  # fmt: skip
    """Build the network with random weights (seed torch beforehand to fix them)."""
    body = ResNet(backbone, norm, output_stride)
    head = DeeplabV3(body.out_channels, HEAD_CHANNELS, norm, output_stride, pooling)
    return IncrementalSegmentationModule(body, head, classes_per_step)


def load_pretrained(body: nn.Module, backbone: str, source: str | Path | None = None) -> None:
    """Load ImageNet weights into a body, which then computes what their own network computed.

    `source` is a file, the word "torchvision", or None for
    `pretrained/<backbone>_iabn_sync.pth.tar`: `modules/pretrained.py` says which layouts it reads
    and how weights are carried between plain norms and those in place. Raises UserError, and leaves
    the body as it was, for a file that is missing or unreadable, a layout that is unknown, weights
    that cannot be fetched, and keys or shapes that do not fit (another backbone).
    """
    weights = read_weights(backbone, source)
    cure = f"give weights of a {backbone} or choose their --backbone; {CURE}"
    load_state(body, weights.state, weights.origin, cure)
    match_norms(body, weights.in_place)


def load_state(
    module: nn.Module, state: Mapping[str, Tensor], what: str, cure: str,
    may_miss: tuple[str, ...] = (),
) -> None:  # fmt: skip
    """Load a state dict; UserError (and an untouched module) where keys or shapes differ.

    Keys that start with a prefix in `may_miss` may be absent. Older files have no
    `num_batches_tracked`; nothing is computed from it, so it may be absent as well.
    """
    own = module.state_dict()
    missing = [
        k
        for k in own
        if k not in state
        and not (may_miss and k.startswith(may_miss))
        and not k.endswith("num_batches_tracked")
    ]
    unexpected = [k for k in state if k not in own]
    shapes = [k for k in own if k in state and own[k].shape != state[k].shape]
    faults = {"missing": missing, "unknown": unexpected, "of another shape": shapes}
    faults["not finite"] = [
        k for k, v in state.items() if v.is_floating_point() and not v.isfinite().all()
    ]
    for kind, keys in faults.items():
        if keys:
            raise UserError(
                f"{what} does not fit: {len(keys)} keys {kind}, first {keys[0]}: {cure}"
            )
    module.load_state_dict(dict(state), strict=False)
