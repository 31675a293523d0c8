"""The body: a ResNet (He et al., CVPR 2016) that keeps its resolution by dilated convolutions."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from modules.residual import SLOPE, Norm, ResidualBlock
from modules.structures import STRIDES_AND_DILATIONS, STRUCTURES


class ResNet(nn.Module):
    """Images B 3 H W (normalised) -> features B out_channels H/output_stride W/output_stride.

    Args:
        backbone: one of STRUCTURES.
        norm: `norm(channels, activation=...)` builds a normalisation with its activation.
        output_stride: one of STRIDES_AND_DILATIONS.
    """

    def __init__(self, backbone: str, norm: Norm, output_stride: int = 16) -> None:
        super().__init__()
        depths, bottleneck = STRUCTURES[backbone]
        self.mod1 = nn.Sequential(
            OrderedDict(
                conv1=nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False),
                bn1=norm(64),
                pool1=nn.MaxPool2d(3, stride=2, padding=1),
            )
        )
        inputs = 64
        layout = zip(depths, STRIDES_AND_DILATIONS[output_stride], strict=True)
        for i, (depth, (stride, dilation)) in enumerate(layout):
            width = 64 * 2**i
            channels = (width, width, width * 4) if bottleneck else (width, width)
            blocks: list[tuple[str, nn.Module]] = []
            for k in range(depth):
                block = ResidualBlock(inputs, channels, norm, stride if k == 0 else 1, dilation)
                blocks.append((f"block{k + 1}", block))
                inputs = channels[-1]
            self.add_module(f"mod{i + 2}", nn.Sequential(OrderedDict(blocks)))
        self.out_channels = inputs
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, a=SLOPE, mode="fan_out")

    def forward(self, x: Tensor) -> Tensor:
        for module in self.children():
            x = module(x)
        return x
