"""ImageNet weights: every layout gives the body the function that its network had."""

from __future__ import annotations

import copy
import hashlib
import io
import os
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import get_model_weights

from modules.norm import get_norm
from modules.pretrained import match_norms
from modules.resnet import ResNet
from segmentation_module import load_pretrained, make_model
from tests.conftest import ROOT
from utils import checkpoint
from utils.errors import UserError

BACKBONES = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]
DILATIONS = {16: {"layer4": 2}, 8: {"layer3": 2, "layer4": 4}}


def draw_norms(network: nn.Module, seed: int) -> None:
    """Random norms, half of the weights negative: a sign that is lost anywhere shows."""
    g = torch.Generator().manual_seed(seed)
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            size, kind = norm.num_features, {"generator": g, "dtype": norm.weight.dtype}
            sign = torch.randint(0, 2, (size,), generator=g) * 2 - 1
            norm.weight.data = sign * (0.3 + torch.rand(size, **kind))
            norm.bias.data = torch.randn(size, **kind)
            norm.running_mean = torch.randn(size, **kind)
            norm.running_var = 0.5 + torch.rand(size, **kind)


def theirs(backbone: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(1)
    network = torchvision.models.get_model(backbone, num_classes=7).to(dtype).eval()
    draw_norms(network, 2)
    return network


def ours(backbone: str, norm: str, stride: int = 16, dtype: torch.dtype = torch.float32) -> ResNet:
    return ResNet(backbone, get_norm(norm), stride).to(dtype).eval()


def features(network: nn.Module, images: Tensor, stride: int) -> Tensor:
    """What torchvision's layers compute with leaky ReLU, dilated as our body is.

    Its own `replace_stride_with_dilation` leaves the first 3x3 of a layer at the dilation of the
    layer before, and basic blocks refuse it, so stride and dilation of the layers that do not
    stride are set here, on a copy.
    """
    network = copy.deepcopy(network)
    for module in network.modules():
        if hasattr(module, "relu"):
            module.relu = nn.LeakyReLU(0.01)
    for layer, dilation in DILATIONS[stride].items():
        for conv in getattr(network, layer).modules():
            if isinstance(conv, nn.Conv2d):
                conv.stride = (1, 1)
                if conv.kernel_size == (3, 3):
                    conv.dilation = conv.padding = (dilation, dilation)
    stem = [network.conv1, network.bn1, network.relu, network.maxpool]
    layers = [network.layer1, network.layer2, network.layer3, network.layer4]
    with torch.no_grad():
        return nn.Sequential(*stem, *layers)(images)


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    g = torch.Generator().manual_seed(3)
    return torch.randn(2, 3, 64, 96, generator=g, dtype=torch.float64).to(dtype)


def assert_close(actual: Tensor, expected: Tensor, share: float) -> None:
    deviation = ((actual - expected).abs().max() / expected.abs().max()).item()
    print(f"max deviation {deviation:.1e} of the largest, allowed {share:.0e}")
    assert deviation <= share


def save(content: object, folder: Path) -> Path:
    path = folder / "weights.pth"
    torch.save(content, path)
    return path


def prefixed(state: dict[str, Tensor], prefix: str = "module.") -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("norm", ["abn", "iabn"])
@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
class TestTorchvision:
    @pytest.mark.parametrize("stride", [16, 8])
    def test_features_are_those_of_torchvision(self, tmp_path, backbone, norm, dtype, stride):
        network = theirs(backbone, dtype)
        body = ours(backbone, norm, stride, dtype)
        load_pretrained(body, backbone, save(network.state_dict(), tmp_path))
        with torch.no_grad():
            actual = body(images(dtype))[0]
        share = 1e-5 if dtype == torch.float32 else 1e-13
        assert_close(actual, features(network, images(dtype), stride), share)

    def test_also_in_training(self, tmp_path, backbone, norm, dtype):
        """Batch statistics and what they make of the running ones, in evaluation afterwards."""
        network, body = theirs(backbone, dtype).train(), ours(backbone, norm, 16, dtype).train()
        load_pretrained(body, backbone, save(network.state_dict(), tmp_path))
        with torch.no_grad():
            actual = body(images(dtype))[0]
        share = 1e-4 if dtype == torch.float32 else 1e-12
        assert_close(actual, features(network, images(dtype), 16), share)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_backbone_of_torchvision_fits(tmp_path, backbone: str):
    with torch.device("meta"):
        network = torchvision.models.get_model(backbone)
    state = {k: torch.zeros(v.shape, dtype=v.dtype) for k, v in network.state_dict().items()}
    body = ours(backbone, "abn")
    load_pretrained(body, backbone, save(state, tmp_path))
    assert not any(v.any() for v in body.state_dict().values())


def test_module_prefix_wrapper_and_missing_counters(tmp_path):
    """As the ImageNet example of PyTorch saves it; torch 0.4 had no num_batches_tracked."""
    network, plain, wrapped = theirs("resnet18"), ours("resnet18", "abn"), ours("resnet18", "abn")
    state = network.state_dict()
    load_pretrained(plain, "resnet18", save(state, tmp_path))
    old = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    content = {"epoch": 90, "arch": "resnet18", "state_dict": prefixed(old)}
    load_pretrained(wrapped, "resnet18", save(content, tmp_path))
    for key, value in plain.state_dict().items():
        assert torch.equal(value, wrapped.state_dict()[key])
    assert torch.equal(plain.mod1.conv1.weight, network.conv1.weight)


def test_weights_below_eps_multiply_by_eps():
    """|w| + eps cannot be less than eps; from there on it is |w|, and the sign is folded."""
    body = ours("resnet18", "iabn")
    norm, conv = body.mod1.bn1, body.mod1.conv1
    weights = torch.tensor([0.0, 4e-6, -4e-6, 1e-5, -3e-5, -2.0])
    norm.weight.data[:6] = weights
    norm.running_mean.fill_(1.0)
    before = conv.weight.detach().clone()
    match_norms(body, in_place=False)
    scale = norm.weight.detach()[:6].abs() + norm.eps
    assert torch.allclose(scale, weights.abs().clamp(min=norm.eps), rtol=1e-6)
    assert (norm.weight >= 0).all()
    signs = torch.tensor([1.0, 1, -1, 1, -1, -1])
    assert torch.equal(norm.running_mean[:6], signs)
    assert torch.equal(conv.weight[:6], before[:6] * signs.view(-1, 1, 1, 1))


class TestOwnLayouts:
    """Bodies with norms of either kind give their function to bodies of either kind."""

    @pytest.mark.parametrize("norm", ["abn", "iabn"])
    @pytest.mark.parametrize("prefix", ["", "module."])
    def test_official(self, tmp_path, norm: str, prefix: str):
        source, body = ours("resnet18", "iabn"), ours("resnet18", norm)
        draw_norms(source, 4)
        state = source.state_dict() | {"classifier.fc.weight": torch.zeros(3, 512)}
        load_pretrained(body, "resnet18", save({"state_dict": prefixed(state, prefix)}, tmp_path))
        self.assert_same(source, body, exactly=norm == "iabn")

    @pytest.mark.parametrize("prefix", ["", "module."])
    @pytest.mark.parametrize("norm", ["abn", "iabn"])
    @pytest.mark.parametrize("trained", ["abn_sync", "iabn_sync", "std"])
    def test_checkpoint(self, tmp_path, trained: str, norm: str, prefix: str):
        model, body = make_model("resnet18", get_norm(trained), [4]).eval(), ours("resnet18", norm)
        draw_norms(model, 5)
        path = tmp_path / "step" / "a_0.pth"
        options = {"dataset": "voc", "task": "15-5", "backbone": "resnet18", "norm_act": trained}
        content = {"model_state": prefixed(model.state_dict(), prefix), "options": options}
        path.parent.mkdir()
        checkpoint.save(path, content)
        load_pretrained(body, "resnet18", path)
        self.assert_same(model.body, body, exactly=trained.startswith(norm))

    @pytest.mark.parametrize("norm", ["abn", "iabn"])
    def test_checkpoint_that_says_nothing_is_taken_as_it_is(self, tmp_path, norm: str):
        model, body = make_model("resnet18", get_norm(norm), [4]).eval(), ours("resnet18", norm)
        draw_norms(model, 5)
        load_pretrained(body, "resnet18", save({"model_state": model.state_dict()}, tmp_path))
        self.assert_same(model.body, body, exactly=True)

    def test_default_is_the_official_file(self, tmp_path, monkeypatch):
        source, body = ours("resnet18", "iabn"), ours("resnet18", "iabn")
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UserError, match=r"pretrained/resnet18_iabn_sync\.pth\.tar"):
            load_pretrained(body, "resnet18")
        Path("pretrained").mkdir()
        torch.save({"state_dict": source.state_dict()}, "pretrained/resnet18_iabn_sync.pth.tar")
        load_pretrained(body, "resnet18")
        self.assert_same(source, body, exactly=True)

    def assert_same(self, source: nn.Module, body: nn.Module, exactly: bool) -> None:
        with torch.no_grad():
            assert_close(body(images())[0], source(images())[0], 1e-5)
        if exactly:
            own = body.state_dict()
            assert all(torch.equal(value, own[key]) for key, value in source.state_dict().items())


class TestErrors:
    def fails(self, source: str | Path, *words: str) -> None:
        """One line holds the words, and the body stays as it was."""
        body = ours("resnet18", "iabn")
        before = copy.deepcopy(body.state_dict())
        with pytest.raises(UserError) as error:
            load_pretrained(body, "resnet18", source)
        for word in words:
            assert word in str(error.value)
        assert all(torch.equal(value, before[key]) for key, value in body.state_dict().items())

    def test_missing_file_names_both_ways(self, tmp_path):
        path = tmp_path / "none.pth"
        self.fails(path, str(path), "pretrained/README.md", "--pretrained torchvision")
        assert (ROOT / "pretrained" / "README.md").is_file()

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            ({}, ["empty"]),
            ({"features.0.weight": torch.zeros(1)}, ["known layout", "'features.0.weight'"]),
            ({"state_dict": {"encoder.a": torch.zeros(1)}}, ["known layout", "'encoder.a'"]),
            ({"state_dict": [1]}, ["no state dict"]),
            ({"model_state": {3: torch.zeros(1)}}, ["no state dict"]),
            ({"layer1.0.conv1.weight": 3}, ["mod2.block1.convs.conv1.weight", "no tensor"]),
            ([1], ["list"]),
        ],
    )
    def test_unknown_layout(self, tmp_path, content: object, words: list[str]):
        self.fails(save(content, tmp_path), str(tmp_path / "weights.pth"), *words)

    @pytest.mark.parametrize("backbone", ["resnet34", "resnet50"])
    def test_another_backbone(self, tmp_path, backbone: str):
        path = save(torchvision.models.get_model(backbone).state_dict(), tmp_path)
        self.fails(path, str(path), "does not fit", "resnet18", "--backbone")

    def test_another_network_of_the_same_keys(self, tmp_path):
        state = torchvision.models.resnet18().state_dict()
        state["layer4.1.conv2.weight"] = torch.zeros(512, 512, 1, 1)
        path = save(state, tmp_path)
        self.fails(path, "another shape", "mod5.block2.convs.conv2.weight")

    def test_code_in_a_file_is_not_run(self, tmp_path):
        self.fails(save(Trap(tmp_path / "ran"), tmp_path), "more than weights")
        assert not (tmp_path / "ran").exists()


class Trap:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class TestFetch:
    """torchvision's own way to its files, without a network."""

    @pytest.fixture(autouse=True)
    def home(self, tmp_path, monkeypatch) -> Path:
        """Where torchvision keeps what it fetched: empty at first."""
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
        monkeypatch.setenv("no_proxy", "*")
        return tmp_path / "home" / "hub" / "checkpoints"

    def serve(self, monkeypatch, url: str) -> None:
        """Give torchvision another address for its ResNet-18."""
        weights = get_model_weights("resnet18")["IMAGENET1K_V1"]
        monkeypatch.setattr(weights.value, "url", url)

    def publish(self, folder: Path, network: nn.Module) -> Path:
        """A file called after its hash, as torchvision's are."""
        buffer = io.BytesIO()
        torch.save(network.state_dict(), buffer)
        name = hashlib.sha256(buffer.getvalue()).hexdigest()[:8]
        path = folder / f"resnet18-{name}.pth"
        path.write_bytes(buffer.getvalue())
        return path

    def assert_loads(self, network: nn.Module) -> None:
        body = ours("resnet18", "iabn")
        load_pretrained(body, "resnet18", "torchvision")
        with torch.no_grad():
            assert_close(body(images())[0], features(network, images(), 16), 1e-5)

    def fails(self, *words: str) -> None:
        TestErrors().fails("torchvision", *words)

    def test_a_file_already_there_needs_no_network(self, home):
        """Under the name that torchvision itself gives to these weights."""
        network = theirs("resnet18")
        home.mkdir(parents=True)
        torch.save(network.state_dict(), home / "resnet18-f37072fd.pth")
        self.assert_loads(network)

    def test_fetch_and_keep(self, tmp_path, monkeypatch, home):
        network = theirs("resnet18")
        path = self.publish(tmp_path, network)
        self.serve(monkeypatch, path.as_uri())
        self.assert_loads(network)
        path.unlink()
        assert [file.name for file in home.iterdir()] == [path.name]
        self.assert_loads(network)

    def test_a_wrong_hash_is_refused_and_not_kept(self, tmp_path, monkeypatch, home):
        path = self.publish(tmp_path, theirs("resnet18"))
        self.serve(monkeypatch, path.rename(tmp_path / "resnet18-00000000.pth").as_uri())
        self.fails("torchvision could not fetch", "resnet18-00000000.pth", "hash", "FILE")
        assert list(home.iterdir()) == []

    def test_without_a_network(self, monkeypatch):
        self.serve(monkeypatch, "http://127.0.0.1:9/resnet18-f37072fd.pth")
        self.fails(
            "torchvision could not fetch http://127.0.0.1:9/resnet18-f37072fd.pth",
            "fetch it elsewhere and pass the file with --pretrained FILE",
        )

    def test_a_home_that_cannot_be_written(self, tmp_path, monkeypatch):
        (tmp_path / "file").touch()
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / "file"))
        self.fails("torchvision could not fetch", "--pretrained FILE")

    @pytest.mark.parametrize("kind", ["cut", "code"])
    def test_a_bad_file_already_there(self, tmp_path, home, kind: str):
        home.mkdir(parents=True)
        path = home / "resnet18-f37072fd.pth"
        torch.save(Trap(tmp_path / "ran") if kind == "code" else theirs("resnet18"), path)
        if kind == "cut":
            path.write_bytes(path.read_bytes()[:1000])
        self.fails(str(path), "delete it")
        assert not (tmp_path / "ran").exists()
