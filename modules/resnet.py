"""The body: a dilated ResNet (SPEC section 5)."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from modules.residual import SLOPE, Norm, ResidualBlock

# Blocks of mod2..mod5 and whether they are bottlenecks.
STRUCTURES: dict[str, tuple[tuple[int, int, int, int], bool]] = {
    "resnet18": ((2, 2, 2, 2), False),
    "resnet34": ((3, 4, 6, 3), False),
    "resnet50": ((3, 4, 6, 3), True),
    "resnet101": ((3, 4, 23, 3), True),
    "resnet152": ((3, 8, 36, 3), True),
}

# Output stride -> (stride, dilation) of mod2..mod5. A dilated module does not stride.
STRIDES_AND_DILATIONS = {
    16: ((1, 1), (2, 1), (2, 1), (1, 2)),
    8: ((1, 1), (2, 1), (1, 2), (1, 4)),
}


class ResNet(nn.Module):
    """Images B 3 H W (normalised) -> features B out_channels H/output_stride W/output_stride."""

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
