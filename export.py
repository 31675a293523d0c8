"""Write a trained model for other runtimes, as ONNX or for `torch.export.load`.

    python export.py --ckpt checkpoints/step/voc-15-5/MIB_1.pth --out model.onnx

Input `images`, uint8 B 3 H W, RGB as a decoder gives it; batch, height and width are free. Outputs
`labels`, uint8 B H W, the data set's own, and `logits`, float32 B C h w, one channel per class, at
1 / output stride of the size. docs/export.md shows how to use them and what the metadata says.
"""

from __future__ import annotations

import utils.uncaught  # noqa: F401  before any library

# isort: split
import argparse
import io
import json
import math
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataset.transform import normalize
from engine.predictor import Predictor, add_reference_flags, load_predictor
from modules.folding import FoldedHead, fold_body
from utils import streams
from utils.constants import IMAGENET_MEAN, IMAGENET_STD
from utils.errors import UserError, in_a_line
from utils.files import atomic_write, check_writable, real
from utils.flags import Parser
from utils.version import VERSION

SUFFIXES = (".onnx", ".pt2")
EXTRAS = ("onnx", "onnxscript", "onnxruntime")  # requirements-extras.txt
OPSET = 18  # of ONNX; the first that torch writes, which most runtimes read
LEAST = 32  # pixels; .pt2 refuses smaller images
SIZES = ((96, 128), (61, 203), (288, 160))  # of the images that a result is checked with
TOLERANCE = 1e-4  # of logits, as a share of the largest

Run = Callable[[Tensor], tuple[Tensor, Tensor]]  # images -> labels, logits


class Deployed(nn.Module):
    """From uint8 images to labels, without norms: what is exported."""

    mean: Tensor
    std: Tensor
    label_of: Tensor

    def __init__(self, predictor: Predictor) -> None:
        super().__init__()
        model = predictor.model
        self.body, self.head = fold_body(model.body), FoldedHead(model.head)
        self.classifiers = model.cls
        for name, values in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            self.register_buffer(name, 255 * torch.tensor(values).view(3, 1, 1))
        self.register_buffer("label_of", torch.tensor(predictor.labels, dtype=torch.uint8))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 RGB B 3 H W -> labels uint8 B H W, logits B C h w."""
        features, _ = self.body((images.float() - self.mean) / self.std)
        pre_logits = self.head(features)
        logits = torch.cat([classifier(pre_logits) for classifier in self.classifiers], 1)
        full = F.interpolate(logits, images.shape[2:], mode="bilinear", align_corners=False)
        return self.label_of[full.argmax(1)], logits


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns its exit status."""
    streams.make_steady()
    try:
        opts = parse(sys.argv[1:] if argv is None else list(argv))
        check_target(opts.out, opts.ckpt)
        if opts.out.suffix == ".onnx":
            import_extras()
        predictor = load_predictor(
            opts.ckpt, "cpu", dataset=opts.dataset, task=opts.task, step=opts.step,
            backbone=opts.backbone,
        )  # fmt: skip
        print(predictor.summary)
        print(export(predictor, opts.out))
    except (UserError, OSError) as error:
        print(f"error: {in_a_line(error)}", file=sys.stderr)
        return 1
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Command line -> options. Raises UserError."""
    parser = Parser("export.py", words="--ckpt FILE --out FILE [flags]", description=__doc__)
    add = parser.add_argument
    add("--ckpt", type=Path, required=True, help="checkpoint of run.py")
    add("--out", type=Path, required=True, help="file to write: .onnx or .pt2")
    add_reference_flags(parser)
    return parser.parse_args(list(argv))


def check_target(out: Path, ckpt: Path) -> None:
    """UserError, before the work, for a file that cannot be written or would replace the input."""
    if out.suffix not in SUFFIXES:
        raise UserError(f"--out {out}: its suffix chooses the format, {' or '.join(SUFFIXES)}")
    if out.is_dir():
        raise UserError(f"--out {out} is a folder: add the name of a file")
    if real(out) == real(ckpt):
        raise UserError(f"--out {out} is the checkpoint: choose another name")
    check_writable(out.parent)


def import_extras() -> None:
    """UserError unless what .onnx needs is installed."""
    for name in EXTRAS:
        try:
            import_module(name)
        except ImportError as error:
            raise UserError(
                f"{name} is missing, which .onnx needs: pip install -r requirements-extras.txt"
            ) from error


def export(predictor: Predictor, out: Path) -> str:
    """Write `out`, an .onnx or a .pt2, checked before it takes its place; returns a line on it.

    Missing folders are made, an existing file is replaced. Raises UserError where the file cannot
    be written, and where the result does not compute what the model computes.
    """
    network = Deployed(predictor).eval()
    about = metadata(predictor)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporters, on their own affairs
        program = trace(network)
        content = to_onnx(program, about) if out.suffix == ".onnx" else to_pt2(program, about)
        run = _onnx_run(content) if out.suffix == ".onnx" else _pt2_run(content)
        deviation = check(predictor, run)
    with atomic_write(out) as file:
        file.write(content)
    return (f"{out}: {len(content) / 1e6:.1f} MB; at {len(SIZES)} sizes its logits are PyTorch's "
            f"within {deviation:.0e} of the largest")  # fmt: skip


def metadata(predictor: Predictor) -> dict[str, Any]:
    """What a user of the file has to know; docs/export.md explains the keys."""
    options = predictor.options
    return {
        "class_names": [predictor.class_names[label] for label in predictor.labels],
        "labels": predictor.labels,
        "input": "uint8 RGB, B 3 H W, 0..255; normalised inside",
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "shorter_side": predictor.size,
        "probabilities": "sigmoid" if predictor.binary else "softmax",
        "output_stride": options.output_stride,
        "pooling": options.pooling,
        "dataset": options.dataset,
        "task": options.task,
        "backbone": options.backbone,
        "program": f"incremental segmentation {VERSION}",
    }


def trace(network: Deployed) -> torch.export.ExportedProgram:
    """The network as a graph for any batch and any size from LEAST on."""
    batch = torch.export.Dim("batch", min=1)
    height, width = (torch.export.Dim(name, min=LEAST) for name in ("height", "width"))
    example = torch.zeros(2, 3, 96, 128, dtype=torch.uint8)
    free = {"images": {0: batch, 2: height, 3: width}}
    return torch.export.export(network, (example,), dynamic_shapes=free)


def to_onnx(program: torch.export.ExportedProgram, about: dict[str, Any]) -> bytes:
    """The content of an .onnx file; each of the metadata is JSON."""
    written = torch.onnx.export(
        program, (), dynamo=True, opset_version=OPSET, verbose=False,
        input_names=["images"], output_names=["labels", "logits"],
    )  # fmt: skip
    assert written is not None
    model = written.model_proto
    _name_dimensions(model.graph)
    for key, value in about.items():
        model.metadata_props.add(key=key, value=json.dumps(value))
    return model.SerializeToString()


def _name_dimensions(graph: Any) -> None:
    """Call the free dimensions of an ONNX graph what they are; torch numbers them."""
    dims = graph.input[0].type.tensor_type.shape.dim
    names = {dims[i].dim_param: name for i, name in ((0, "batch"), (2, "height"), (3, "width"))}
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:  # a term of them behind a stride
                dim.dim_param = re.sub(
                    r"\w+", lambda word: names.get(word[0], word[0]), dim.dim_param
                )


def to_pt2(program: torch.export.ExportedProgram, about: dict[str, Any]) -> bytes:
    """The content of a .pt2 file, with the metadata as an extra file."""
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={"metadata.json": json.dumps(about)})
    return buffer.getvalue()


def _onnx_run(content: bytes) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        labels, logits = session.run(["labels", "logits"], {"images": images.numpy()})
        return torch.from_numpy(labels), torch.from_numpy(logits)

    return run


def _pt2_run(content: bytes) -> Run:
    return torch.export.load(io.BytesIO(content)).module()


def check(predictor: Predictor, run: Run) -> float:
    """Compare with the model on noise of several sizes; the largest deviation of the logits.

    UserError where it is above TOLERANCE (of the largest logit) or a label is not the data set's.
    """
    worst = 0.0
    generator = torch.Generator().manual_seed(0)
    for number, size in enumerate(SIZES, 1):
        images = torch.randint(0, 256, (number, 3, *size), generator=generator, dtype=torch.uint8)
        expected = predictor.model(normalize(images)).logits
        labels, logits = run(images)
        deviation = (logits - expected).abs().max() / expected.abs().max()
        worst = max(worst, deviation.nan_to_num(math.inf).item())
        known = torch.isin(labels, torch.tensor(predictor.labels, dtype=torch.uint8)).all()
        if not worst <= TOLERANCE or not known or labels.shape != images[:, 0].shape:
            raise UserError(
                f"what was exported differs from the model by {worst:.0e} of the largest logit: "
                "nothing was written, try other versions of torch and of requirements-extras.txt"
            )
    return worst


if __name__ == "__main__":
    sys.exit(main())
