"""Kernels that compute something else than plain operations are not used."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed", exc_type=ImportError)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("check") / "found.pt"
    subprocess.run(
        [sys.executable, "-m", "tests.modules.norm_check_worker", str(file)],
        env=os.environ | {"TRITON_INTERPRET": "1"},  # read when Triton is imported
        cwd=Path(__file__).parents[2],
        check=True,
        timeout=240,
    )
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(
    ("fault", "kernels"),
    [
        ("a pixel less", "statistics of contiguous_format"),
        ("a program for all tiles", "statistics of contiguous_format"),
        ("momentum", "statistics of contiguous_format"),  # whose second half is `combine`
        ("a row less", "statistics of contiguous_format"),
        ("slope", "normalise of contiguous_format"),
        ("slope of z", "gradient_sums of contiguous_format"),
        ("a sum less", "gradient_sums of contiguous_format"),  # whose second half is `add_up`
        ("eps", "input_gradient of contiguous_format"),
        ("channels_last", "normalise of channels_last"),
        ("bfloat16 in bfloat16", "normalise of contiguous_format"),
    ],
)
def test_a_wrong_kernel_leaves_one_log_line_and_the_plain_path(
    fault: str, kernels: str, found: dict[str, Any]
) -> None:
    dtype = "bfloat16" if fault.endswith("bfloat16") else "float32"
    (line,) = found[fault]["lines"]
    expected = f"our Triton kernels differ from plain operations on cpu in {dtype} ({kernels} maps"
    assert expected in line
    assert found[fault]["plain"]
    assert found[fault]["equal"]


@pytest.mark.parametrize("fault", ["none", "bfloat16"])
def test_right_kernels_serve_each_type_on_its_own(fault: str, found: dict[str, Any]) -> None:
    assert not found[fault]["lines"]
    assert not found[fault]["plain"]


def test_the_check_draws_no_random_number(found: dict[str, Any]) -> None:
    assert found["draws nothing"]
