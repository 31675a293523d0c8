"""Without norms the network computes what it computed with them, at every size."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from modules.deeplab import DeeplabV3
from modules.folding import FoldedHead, affine, fold_body, sliding_mean
from modules.norm import ABN, get_norm
from modules.resnet import ResNet
from tests.modules.test_pretrained import draw_norms

SIZES = [(1, 1), (3, 8), (4, 5), (9, 6), (13, 2)]  # of maps, windows of 4 and 5 in mind


def random(*shape: int) -> Tensor:
    g = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def build(kind: Callable[..., nn.Module], *arguments: object) -> nn.Module:
    torch.manual_seed(0)
    module = kind(*arguments).double().eval()
    draw_norms(module, 1)
    return module


def assert_same(folded: nn.Module, module: nn.Module, x: Tensor) -> None:
    """Equal to 1e-10 of the largest, in float64, and nothing was changed on the way."""
    before = copy.deepcopy(module.state_dict())
    with torch.no_grad():
        expected, actual = (m(x) for m in (module, folded))
    if isinstance(expected, tuple):
        expected, actual = expected[0], actual[0]
    assert expected.abs().max() > 0
    assert (actual - expected).abs().max() <= 1e-10 * expected.abs().max()
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def assert_no_norms(module: nn.Module) -> None:
    kinds = {type(m) for m in module.modules() if not list(m.children())}
    assert kinds <= {nn.Conv2d, nn.LeakyReLU, nn.Identity, nn.MaxPool2d}
    assert not any(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize("norm", ["abn", "iabn"])
@pytest.mark.parametrize("stride", [16, 8])
@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
def test_the_body_computes_the_same(backbone: str, stride: int, norm: str):
    body = build(ResNet, backbone, get_norm(norm), stride)
    folded = fold_body(body)
    assert_no_norms(folded)
    for size in ((40, 56), (33, 17)):
        assert_same(folded, body, random(2, 3, *size))


@pytest.mark.parametrize("norm", ["abn", "iabn"])
@pytest.mark.parametrize("pooling", [1, 4, 5])
def test_the_head_computes_the_same(pooling: int, norm: str):
    head = build(DeeplabV3, 12, 8, get_norm(norm), 16, pooling, 6)
    folded = FoldedHead(head)
    assert_no_norms(folded)
    for size in SIZES:
        assert_same(folded, head, random(2, 12, *size))


def test_the_mean_is_over_a_window_that_stays_inside():
    """Position by position, in both axes: the formula written out."""
    for size in SIZES:
        for window in (1, 2, 4, 5, 7):
            x = random(2, 3, *size)
            spans = []
            for side in size:
                length = min(window, side)
                first = [min(max(i - (length - 1) // 2, 0), side - length) for i in range(side)]
                spans.append([slice(start, start + length) for start in first])
            expected = torch.stack([
                torch.stack([x[:, :, rows, columns].mean((2, 3)) for columns in spans[1]], 2)
                for rows in spans[0]
            ], 2)  # fmt: skip
            torch.testing.assert_close(sliding_mean(x, window), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("norm", ["abn", "iabn", "abn_sync", "iabn_sync"])
def test_a_norm_is_its_scale_and_shift(norm: str):
    layer: ABN = build(get_norm(norm), 6)
    scale, shift = (v.view(-1, 1, 1) for v in affine(layer))
    x = random(2, 6, 3, 4)
    expected = torch.nn.functional.leaky_relu(scale * x + shift, 0.01)
    with torch.no_grad():
        torch.testing.assert_close(layer(x.clone()), expected, rtol=0, atol=1e-13)
    assert (scale < 0).any() == norm.startswith("abn")
