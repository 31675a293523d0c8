"""EWF against the official code (tests/golden2/ewf.json)."""

from __future__ import annotations

import json

import pytest
import torch

from methods.fusion import fuse, fusion_rate
from tests.conftest import GOLDEN2

GOLDEN = json.loads((GOLDEN2 / "ewf.json").read_text())


def state(values: dict, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {
        k: torch.tensor(v, dtype=dtype if isinstance(v, list) else None) for k, v in values.items()
    }


@pytest.mark.parametrize("step", sorted(GOLDEN["alpha"]))
def test_rate(step):
    old, new, expected = GOLDEN["alpha"][step]
    assert fusion_rate(new, old) == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize(("name", "rtol"), [("float32", 1e-6), ("float64", 1e-14)])
def test_blend(name, rtol):
    golden, dtype = GOLDEN["blend"][name], getattr(torch, name)
    old, new = (state(golden[side], dtype) for side in ("old", "new"))
    fused = fuse(old, new, fusion_rate(golden["classes"][1], golden["classes"][0]))
    assert fused.keys() == golden["fused"].keys()
    for key, expected in state(golden["fused"], dtype).items():
        if key.endswith("num_batches_tracked"):
            assert fused[key].dtype == torch.int64
            assert fused[key] == new[key]
        else:
            torch.testing.assert_close(fused[key], expected, rtol=rtol, atol=0)
            assert (key in old) != torch.equal(fused[key], new[key])


@pytest.mark.parametrize("rate", [0.218, 0.704])
def test_what_is_equal_stays_equal_to_the_last_bit(rate):
    frozen = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(fuse({"a": frozen}, {"a": frozen.clone()}, rate)["a"], frozen)


def test_states_of_different_models_are_refused():
    weight = {"module.a": torch.ones(2)}
    with pytest.raises(ValueError, match="lacks 1 keys of the old: module.a"):
        fuse(weight, {"a": torch.ones(2)}, 0.5)
