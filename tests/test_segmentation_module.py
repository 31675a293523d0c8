"""Networks, their state dict and initialisation against the official code's numbers."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from modules.norm import get_norm
from segmentation_module import MAPS, load_pretrained, load_state, make_model
from tests.conftest import GOLDEN
from tests.reference import SEED, batch, fill
from utils.errors import UserError


def build(backbone: str, norm: str, stride: int = 16, pooling: int = 4):
    model = make_model(backbone, get_norm(norm), [4, 3], output_stride=stride, pooling=pooling)
    fill(model)
    return model


def upsampled(logits: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    full = F.interpolate(logits, images.shape[2:], mode="bilinear", align_corners=False)
    return full[:, :, ::8, ::8]


def close(name: str, actual: torch.Tensor, golden: np.ndarray, atol: float) -> None:
    deviation = np.abs(actual.detach().numpy() - golden).max()
    print(f"network.npz {name}: max deviation {deviation:.2e}, allowed {atol:.2e}")
    assert deviation <= atol


@pytest.mark.parametrize("norm", ["abn", "iabn"])
@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
def test_forward_agrees_with_the_official_code(backbone: str, norm: str):
    golden, name = np.load(GOLDEN / "network.npz"), f"{backbone}_{norm}"
    model, (images, _) = build(backbone, norm), batch(99, [0])
    with torch.no_grad():
        out = model.eval()(images, ("mod5", "pre_logits"))
        for key, value in (
            ("eval_logits", upsampled(out.logits, images)),
            ("eval_body_mean", out.maps["mod5"].mean((2, 3))),
            ("eval_prelogits", out.maps["pre_logits"].mean((2, 3))),
        ):
            expected = golden[f"{name}_{key}"]
            close(f"{name}_{key}", value, expected, 1e-5 * np.abs(expected).max())
        out = model.train()(images)
    close(f"{name}_train_logits", upsampled(out.logits, images),
          golden[f"{name}_train_logits"], 2e-3)  # fmt: skip
    close(f"{name}_running_mean", model.head.map_bn.running_mean[:64],
          golden[f"{name}_running_mean_after"], 2e-3)  # fmt: skip


@pytest.mark.parametrize(
    ("case", "stride", "pooling", "size"),
    [
        ("wide", 16, 4, (96, 144)),
        ("stride8", 8, 8, (64, 64)),
        ("stride8_wide", 8, 8, (72, 136)),
    ],
)
def test_eval_pooling_and_stride_agree(case: str, stride: int, pooling: int, size: tuple[int, int]):
    golden, name = np.load(GOLDEN / "network.npz"), f"resnet18_abn_{case}"
    g = torch.Generator().manual_seed(SEED * 1000 + 98)
    images = torch.randn(2, 3, *size, generator=g)
    with torch.no_grad():
        model = build("resnet18", "abn", stride, pooling).eval()
        out = model(images, ("pre_logits",))
    for key, value in (
        ("eval_logits", upsampled(out.logits, images)),
        ("eval_prelogits", out.maps["pre_logits"].mean((2, 3))),
    ):
        expected = golden[f"{name}_{key}"]
        close(f"{name}_{key}", value, expected, 1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("norm", ["iabn_sync", "abn"])
def test_state_dict_has_the_reference_keys_and_shapes(norm: str):
    with torch.device("meta"):
        model = make_model("resnet101", get_norm(norm), [16, 5])
    found = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert found == json.loads((GOLDEN / "state_dict_resnet101_16_5.json").read_text())


@pytest.mark.parametrize("stride", [8, 16])
@pytest.mark.parametrize("backbone", ["resnet34", "resnet101", "resnet152"])
def test_every_backbone_keeps_the_output_stride(backbone: str, stride: int):
    with torch.device("meta"):
        model = make_model(backbone, get_norm("abn"), [2], output_stride=stride, pooling=4)
        out = model(torch.empty(2, 3, 64, 96))
    assert out.logits.shape == (2, 2, 64 // stride, 96 // stride)


def test_balanced_init_shares_the_background_probability():
    """Eq. 10-11: old background = background + new, the other old classes as they were."""
    model = make_model("resnet18", get_norm("abn"), [4, 3], pooling=4).double().eval()
    old = make_model("resnet18", get_norm("abn"), [4], pooling=4).double().eval()
    load_state(model, old.state_dict(), "old", "", may_miss=("cls.1.",))
    model.init_balanced()
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    p, q = model(images).logits.softmax(1), old(images).logits.softmax(1)
    assert torch.allclose(p[:, 0] + p[:, 4:].sum(1), q[:, 0], rtol=1e-12)
    assert torch.allclose(p[:, 1:4], q[:, 1:4], rtol=1e-12)
    assert torch.allclose(p[:, 4], p[:, 0])
    assert model.cls[0].bias[0] == old.cls[0].bias[0] - math.log(4)


def test_only_the_maps_asked_for_are_kept():
    model = make_model("resnet18", get_norm("abn"), [2], pooling=4).eval()
    images = torch.randn(1, 3, 64, 64)
    assert model(images).maps == {}
    everything = model(images, MAPS).maps
    assert {name: map_.shape[1:] for name, map_ in everything.items()} == {
        "mod1": (64, 16, 16), "mod2": (64, 16, 16), "mod3": (128, 8, 8), "mod4": (256, 4, 4),
        "mod5": (512, 4, 4), "pre_logits": (256, 4, 4),
    }  # fmt: skip


def test_frozen_norms_survive_train_mode():
    model = make_model("resnet18", get_norm("iabn"), [2], pooling=4)
    model.freeze_norms()
    before = {k: v.clone() for k, v in model.state_dict().items() if "running" in k}
    model.train()(torch.randn(2, 3, 64, 64)).logits.sum().backward()
    assert model.head.training
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    assert model.body.mod1.bn1.weight.grad is None
    assert model.body.mod1.conv1.weight.grad is not None


class TestImagenetWeights:
    def write(self, path, change=lambda state: None):
        body = make_model("resnet18", get_norm("iabn"), [2]).body
        state = {f"module.{k}": v for k, v in body.state_dict().items()}
        state |= {"module.classifier.fc.weight": torch.zeros(3, 3)}
        change(state)
        torch.save({"state_dict": state, "epoch": 3}, path)
        return body

    def test_load_into_the_body(self, tmp_path):
        path = tmp_path / "resnet18.pth.tar"
        written = self.write(path)
        body = make_model("resnet18", get_norm("iabn"), [2]).body
        load_pretrained(body, "resnet18", path)
        own = body.state_dict()
        assert all(torch.equal(v, own[k]) for k, v in written.state_dict().items())

    def test_missing_file_names_path_readme_and_flag(self, tmp_path):
        with pytest.raises(UserError, match=r"none\.tar.*pretrained/README\.md.*--no-pretrained"):
            load_pretrained(torch.nn.Identity(), "resnet18", tmp_path / "none.tar")

    @pytest.mark.parametrize("kind", ["missing", "unknown", "shape", "nan"])
    def test_wrong_keys_are_named_and_change_nothing(self, tmp_path, kind: str):
        key = "module.mod1.conv1.weight"
        changes = {
            "missing": lambda s: s.pop(key),
            "unknown": lambda s: s.update({"module.extra": torch.zeros(1)}),
            "shape": lambda s: s.update({key: torch.zeros(64, 3, 3, 3)}),
            "nan": lambda s: s[key].fill_(float("nan")),
        }
        path = tmp_path / "w.pth.tar"
        self.write(path, changes[kind])
        body = make_model("resnet18", get_norm("iabn"), [2]).body
        before = {k: v.clone() for k, v in body.state_dict().items()}
        with pytest.raises(UserError, match=r"mod1\.conv1\.weight|extra"):
            load_pretrained(body, "resnet18", path)
        assert all(torch.equal(v, body.state_dict()[k]) for k, v in before.items())
