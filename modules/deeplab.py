"""The head: DeepLabv3's atrous spatial pyramid pooling (Chen et al., arXiv 1706.05587)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.residual import SLOPE, Norm
from modules.structures import DILATIONS


class DeeplabV3(nn.Module):
    """Body features B in_channels h w -> pre-logits B out_channels h w.

    Args:
        in_channels: of the features.
        out_channels: of the pre-logits.
        norm: `norm(channels)` builds a normalisation with its activation.
        output_stride: of the body, one of DILATIONS.
        pooling: window of the pooling branch in eval mode, in feature pixels
            (crop_size / output_stride, so that eval sees what training saw).
        hidden: channels of each of the five branches.
    """

    def __init__(
        self, in_channels: int, out_channels: int, norm: Norm, output_stride: int, pooling: int,
        hidden: int = 256,
    ) -> None:  # fmt: skip
        super().__init__()
        self.pooling = pooling
        self.map_convs = nn.ModuleList([nn.Conv2d(in_channels, hidden, 1, bias=False)])
        for d in DILATIONS[output_stride]:
            self.map_convs.append(
                nn.Conv2d(in_channels, hidden, 3, padding=d, dilation=d, bias=False)
            )
        self.map_bn = norm(hidden * 4)
        self.global_pooling_conv = nn.Conv2d(in_channels, hidden, 1, bias=False)
        self.global_pooling_bn = norm(hidden)
        self.red_conv = nn.Conv2d(hidden * 4, out_channels, 1, bias=False)
        self.pool_red_conv = nn.Conv2d(hidden, out_channels, 1, bias=False)
        self.red_bn = norm(out_channels)
        gain = nn.init.calculate_gain("leaky_relu", SLOPE)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_normal_(module.weight, gain)

    def forward(self, x: Tensor) -> Tensor:
        out = self.map_bn(torch.cat([conv(x) for conv in self.map_convs], 1))
        out = self.red_conv(out)
        pool = self.global_pooling_bn(self.global_pooling_conv(self._pool(x)))
        return self.red_bn(out + self.pool_red_conv(pool))

    def _pool(self, x: Tensor) -> Tensor:
        """Training: the global mean, B D 1 1. Eval: a sliding mean, replicated at the borders."""
        if self.training:
            return x.mean((2, 3), keepdim=True)
        height, width = (min(self.pooling, side) for side in x.shape[2:])
        pooled = F.avg_pool2d(x, (height, width), stride=1)
        top, left = (height - 1) // 2, (width - 1) // 2
        # An even window cannot be centred: its odd pixel of padding goes after.
        return F.pad(pooled, (left, width - 1 - left, top, height - 1 - top), mode="replicate")
