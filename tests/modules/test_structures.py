"""The names and numbers of the networks, and that reading them takes no torch."""

import subprocess
import sys
from pathlib import Path

import pytest

from modules.norm import ABN, InPlaceABN, get_norm
from modules.structures import DILATIONS, NORMS, STRIDES_AND_DILATIONS, STRUCTURES


def test_importing_the_names_imports_no_torch() -> None:
    program = (
        "import sys, modules.structures\n"
        "assert not {'torch', 'numpy', 'triton'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize(("name", "layers"), [("resnet18", 18), ("resnet34", 34), ("resnet50", 50),
                                              ("resnet101", 101), ("resnet152", 152)])  # fmt: skip
def test_a_resnet_is_called_by_its_layers(name: str, layers: int) -> None:
    depths, bottleneck = STRUCTURES[name]  # with stem and classifier
    assert sum(depths) * (3 if bottleneck else 2) + 2 == layers


@pytest.mark.parametrize("output_stride", [8, 16])
def test_strides_make_the_output_stride_and_dilations_keep_the_field_of_view(
    output_stride: int,
) -> None:
    resolution, field = 4, 4  # after the stem
    for stride, dilation in STRIDES_AND_DILATIONS[output_stride]:
        assert stride == 1 or dilation == 1
        resolution, field = resolution * stride, max(field * stride, resolution * dilation)
    assert resolution == output_stride
    assert field == 32  # of a classifier
    assert DILATIONS[output_stride] == tuple(96 * i // output_stride for i in (1, 2, 3))


def test_every_norm_is_built_by_its_name() -> None:
    for name in NORMS:
        layer = get_norm(name)(3)
        assert type(layer) is (InPlaceABN if name.startswith("iabn") else ABN)
        assert layer.sync == name.endswith("_sync")
