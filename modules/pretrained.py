"""ImageNet weights for the body, from any of the files that people have.

    layout        its keys                          its norms
    official      mod1.conv1.weight, ...            in place, of the In-Place ABN project
    torchvision   conv1.weight, layer1.0..., fc     plain
    checkpoint    model_state: body.mod1...         as its --norm_act says; only the body is taken

Each may lie under the key `state_dict`, with or without `module.` before its keys. Files are read
by `utils.checkpoint.load_file`, which runs no code.

A plain norm multiplies by w, of either sign; one in place multiplies by |w| + eps. `match_norms`
turns the one into the other, so that the body computes what it computed where it was trained.
torchvision's networks were trained with ReLU; the body here applies leaky ReLU to the same weights.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from modules.norm import ABN, InPlaceABN
from modules.residual import conv_before
from utils import distributed
from utils.checkpoint import load_file, strip_module_prefix
from utils.errors import UserError

TORCHVISION = "torchvision"  # the source that is fetched, not read from a file
SHORTCUT = {"downsample.0": "proj_conv", "downsample.1": "proj_bn"}
CURE = (
    "see pretrained/README.md for the official file, fetch weights with --pretrained torchvision, "
    "or start from random ones with --no-pretrained"
)


class Weights(NamedTuple):
    """A state dict in the names of `modules.resnet.ResNet`, and where it is from."""

    state: dict[str, Tensor]
    in_place: bool | None  # whether its norms multiply by |w| + eps; None if nothing says
    origin: str  # for messages


def read_weights(backbone: str, source: str | Path | None = None) -> Weights:
    """Read the weights of a body, by name of its backbone, without loading them.

    `source` is a file of one of the layouts above, the word "torchvision" (its IMAGENET1K_V1
    weights, fetched once) or None for `pretrained/<backbone>_iabn_sync.pth.tar`.

    Raises UserError if the file is missing, damaged or of no known layout, or cannot be fetched.
    Whether keys and shapes fit a body is for the caller to check.
    """
    if source == TORCHVISION:
        origin = f"torchvision's weights of {backbone}"
        with distributed.main_first():  # rank 0 fetches, the others read what it fetched
            content = _fetch(backbone)
    else:
        path = Path(source or f"pretrained/{backbone}_iabn_sync.pth.tar")
        if not path.is_file():
            raise UserError(f"no ImageNet weights at {path}: {CURE}")
        origin, content = f"ImageNet weights {path}", load_file(path)
    state = content.get("model_state", content.get("state_dict", content))
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise UserError(f"{origin}: no state dict is in there: {CURE}")
    weights = _recognise(strip_module_prefix(state), content, origin)
    if strange := [k for k, v in weights.state.items() if not isinstance(v, Tensor)]:
        raise UserError(f"{origin}: {strange[0][:100]!r} is no tensor: {CURE}")
    return weights


@torch.no_grad()
def match_norms(body: nn.Module, in_place: bool | None) -> None:
    """Change weights that come from norms of the other kind so that the body computes the same.

    Into plain norms: w becomes |w| + eps. Into norms in place: where w is negative, the output
    channel of the convolution before and its running mean change their sign, which changes that of
    x̂; then |w| - eps is kept. A norm in place cannot multiply by less than eps: |w| < eps is kept
    as 0 and multiplies by eps, which is wrong by less than eps (1e-5) times x̂.

    Args:
        body: Has loaded the weights; changed in place.
        in_place: Whether the weights come from norms in place; None changes nothing.
    """
    for name, norm in body.named_modules():
        if not isinstance(norm, ABN) or in_place in (None, isinstance(norm, InPlaceABN)):
            continue
        if in_place:
            norm.weight.copy_(norm.weight.abs() + norm.eps)
            continue
        _, conv = conv_before(body, name)
        assert norm.running_mean is not None
        sign = torch.where(norm.weight < 0, -1.0, 1.0).to(norm.weight)
        conv.weight.mul_(sign.view(-1, 1, 1, 1))
        norm.running_mean.mul_(sign)
        norm.weight.copy_((norm.weight.abs() - norm.eps).clamp(min=0))


def _recognise(state: dict[str, Any], content: Mapping[str, Any], origin: str) -> Weights:
    """The layout of a state dict, by its keys, and the body in our names."""
    if any(key.startswith("body.") for key in state):
        body = {k.removeprefix("body."): v for k, v in state.items() if k.startswith("body.")}
        return Weights(body, _checkpoint_in_place(content), origin)
    if any(key.startswith("mod1.") for key in state):
        body = {k: v for k, v in state.items() if not k.startswith("classifier.fc.")}
        return Weights(body, True, origin)
    if any(key.startswith("layer1.") for key in state):
        body = {_our_name(k): v for k, v in state.items() if not k.startswith("fc.")}
        return Weights(body, False, origin)
    first = f"its first key is {next(iter(state))[:100]!r}" if state else "it is empty"
    raise UserError(f"{origin}: no ResNet in a known layout, {first}: {CURE}")


def _our_name(key: str) -> str:
    """torchvision's name of a parameter -> ours; what it does not have stays as it is.

    layer1.0.conv1.weight -> mod2.block1.convs.conv1.weight, layer1.0.downsample.1.bias ->
    mod2.block1.proj_bn.bias, bn1.weight -> mod1.bn1.weight.
    """
    if key.startswith(("conv1.", "bn1.")):
        return f"mod1.{key}"
    match = re.fullmatch(r"layer(\d)\.(\d+)\.(.+)\.(\w+)", key)
    if match is None:
        return key
    layer, block, module, parameter = match.groups()
    ours = SHORTCUT.get(module, f"convs.{module}")
    return f"mod{int(layer) + 1}.block{int(block) + 1}.{ours}.{parameter}"


def _checkpoint_in_place(content: Mapping[str, Any]) -> bool | None:
    """Whether a checkpoint's norms work in place; None for the reference's, which do not say."""
    options = content.get("options")
    norm = options.get("norm_act") if isinstance(options, dict) else None
    return norm.startswith("iabn") if isinstance(norm, str) else None


def _fetch(backbone: str) -> dict[str, Any]:
    """torchvision's IMAGENET1K_V1 weights of a backbone, from its cache or from the network.

    A new file is checked against the hash in its name. Nothing in it is run.
    """
    from torchvision.models import get_model_weights  # half a second that others need not wait

    weights = get_model_weights(backbone)["IMAGENET1K_V1"]
    kept = Path(torch.hub.get_dir(), "checkpoints", os.path.basename(weights.url))
    show = distributed.is_main() and sys.stderr.isatty()
    try:
        return weights.get_state_dict(
            progress=show, check_hash=True, map_location="cpu", weights_only=True
        )
    except Exception as error:  # network, disk, hash and damaged files fail in many ways
        if kept.exists():  # it is put there when it is whole
            raise UserError(
                f"{kept} is damaged or holds more than weights: delete it, and --pretrained "
                "torchvision fetches it again"
            ) from error
        raise UserError(
            f"torchvision could not fetch {weights.url} ({error}): fetch it elsewhere and pass the "
            "file with --pretrained FILE"
        ) from error
