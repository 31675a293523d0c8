"""Losses and predictions in pieces against their plain forms on full-size logits."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import harness
from benchmarks import loss as benchmark
from methods import pieces
from methods.groups import pixel_terms
from methods.loss import WeightedTerm, cross_entropy
from methods.pieces import Upsampled, _bands, pixel_losses, predict
from methods.table import METHODS, Method
from utils.compiled import check_compiler
from utils.constants import IGNORE_INDEX
from utils.errors import UserError

OLD, NEW = 4, 3
COMBINATIONS: dict[str, Method] = {
    **{name: method.at("voc", "15-5s") for name, method in METHODS.items()},
    "LWF alpha 2": replace(METHODS["LWF"], alpha=2.0),
    "MIB alpha 2": replace(METHODS["MIB"], alpha=2.0),
    "iCaRL disjoint": replace(METHODS["LWF-MC"], icarl_disjoint=True),
    "iCaRL disjoint, background": replace(METHODS["LWF-MC"], icarl_disjoint=True, icarl_bkg=True),
    "everything": replace(METHODS["LWF-MC"], loss_kd=3.0, unkd=True),
}


def terms_of(combination: str, step: int = 1) -> dict[str, WeightedTerm]:
    return pixel_terms(COMBINATIONS[combination], OLD if step else None)


def batch(small, size, step=1, images=3):
    """Logits (representable in float32), teacher, labels: a void corner, one image all void."""
    g = torch.Generator().manual_seed(1)
    logits = 4 * torch.randn(images, OLD + NEW, *small, generator=g)
    old_logits = 4 * torch.randn(images, OLD, *small, generator=g) if step else None
    labels = torch.randint(0, OLD + NEW, (images, *size), generator=g, dtype=torch.uint8)
    labels[:, : size[0] // 3, : size[1] // 3] = IGNORE_INDEX
    labels[-1] = IGNORE_INDEX
    return logits, old_logits, labels


def upsample(x: Tensor, size) -> Tensor:
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)


def plain(terms, logits, old_logits, labels, weights=None):
    """Value, summands and gradient of the plain formulation in float64."""
    leaf = logits.detach().double().requires_grad_()
    x = upsample(leaf, labels.shape[1:])
    x_old = None if old_logits is None else upsample(old_logits.double(), labels.shape[1:])
    losses = {k: weight * t(x, x_old, labels.long()) for k, (t, weight) in terms.items()}
    if weights is not None:
        losses[next(iter(terms))] *= weights.double().view(-1, 1, 1)
    values = {k: loss.mean() for k, loss in losses.items()}
    total = torch.stack(list(values.values())).sum()
    return total.detach(), values, torch.autograd.grad(total, leaf)[0]


def in_pieces(terms, logits, old_logits, labels, **options):
    leaf = logits.detach().clone().requires_grad_()
    total, values = pixel_losses(terms, leaf, old_logits, labels, **options)
    (gradient,) = torch.autograd.grad(total, leaf)
    assert not any(value.requires_grad for value in values.values())
    return total.detach(), values, gradient


def assert_equal(actual, expected, tolerance: float) -> None:
    """Values relative to themselves, gradients relative to their largest element."""
    assert actual[1].keys() == expected[1].keys()
    assert abs(actual[0] - expected[0]) <= tolerance * abs(expected[0])
    for name, value in expected[1].items():
        assert abs(actual[1][name] - value) <= tolerance * abs(value), name
    difference = (actual[2] - expected[2]).abs().max()
    assert difference <= tolerance * expected[2].abs().max()


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("combination", COMBINATIONS)
def test_every_objective_equals_the_plain_form(combination, dtype, tolerance, step):
    logits, old_logits, labels = batch((5, 4), (37, 50), step)
    terms = terms_of(combination, step)
    old = None if old_logits is None else old_logits.to(dtype)
    actual = in_pieces(terms, logits.to(dtype), old, labels, piece_size=1000)
    assert actual[0].dtype == actual[2].dtype == dtype
    assert_equal(actual, plain(terms, logits, old_logits, labels), tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize(("combination", "step"), [("FT", 0), ("MIB", 1), ("everything", 1)])
def test_weights_of_images_multiply_the_first_term(combination, step, dtype, tolerance):
    logits, old_logits, labels = batch((5, 4), (37, 50), step)
    terms, weights = terms_of(combination, step), torch.tensor([0.25, 0.0, 1.5])
    labels[-1] = labels[0]  # not all void
    old = None if old_logits is None else old_logits.to(dtype)
    actual = in_pieces(terms, logits.to(dtype), old, labels, piece_size=1000, weights=weights)
    assert actual[0].dtype == dtype
    assert_equal(actual, plain(terms, logits, old_logits, labels, weights), tolerance)


def test_weights_of_one_change_no_bit():
    case = batch((5, 4), (37, 50))
    expected = in_pieces(terms_of("MIB"), *case)
    actual = in_pieces(terms_of("MIB"), *case, weights=torch.ones(3))
    assert actual[:2] == expected[:2]
    assert torch.equal(actual[2], expected[2])


@pytest.mark.parametrize("piece_size", [1, 2000, 5000, None])
@pytest.mark.parametrize(
    ("small", "size"),
    [
        ((4, 4), (64, 64)),
        ((8, 6), (125, 94)),  # 500 x 375 from 32 x 24, a quarter
        ((1, 1), (7, 5)),
        ((7, 5), (7, 5)),
        ((9, 12), (31, 6)),
        ((12, 9), (5, 4)),
    ],
)
def test_any_size_and_any_piece(small, size, piece_size):
    case = batch(small, size)
    case = case[0].double(), case[1].double(), case[2]
    actual = in_pieces(terms_of("MIB"), *case, piece_size=piece_size)
    assert_equal(actual, plain(terms_of("MIB"), *case), 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_raised(dtype):
    logits, old_logits, labels = batch((5, 4), (37, 50))
    case = logits.to(dtype), old_logits.to(dtype), labels
    total, values, gradient = in_pieces(terms_of("MIB"), *case)
    assert total.dtype == torch.float32
    assert gradient.dtype == dtype
    raised = in_pieces(terms_of("MIB"), case[0].float(), case[1].float(), labels)
    assert total == raised[0]
    assert torch.equal(gradient, raised[2].to(dtype))


def test_a_loss_scaler_saves_small_gradients_from_underflow():
    logits, _, labels = batch((4, 4), (64, 64), step=0)
    terms = {"ce": WeightedTerm(cross_entropy, 1e-7)}
    expected = 2**12 * in_pieces(terms, logits.half().float(), None, labels)[2]
    leaf = logits.half().requires_grad_()
    total, _ = pixel_losses(terms, leaf, None, labels)
    (2**12 * total).backward()
    assert torch.equal(leaf.grad, expected.half())
    assert expected.abs().max() < 2**12 * torch.finfo(torch.half).smallest_normal


def test_autocast_does_not_reach_the_losses():
    case = batch((5, 4), (37, 50))
    expected = in_pieces(terms_of("MIB"), *case)
    with torch.autocast("cpu", torch.bfloat16):
        actual = in_pieces(terms_of("MIB"), *case)
        labels = predict(case[0], (37, 50))
    assert actual[0] == expected[0]
    assert torch.equal(actual[2], expected[2])
    assert torch.equal(labels, predict(case[0], (37, 50)))


def test_backward_scales_and_leaves_the_teacher_alone():
    logits, old_logits, labels = batch((5, 4), (37, 50))
    expected = in_pieces(terms_of("MIB"), logits, old_logits, labels)[2]
    logits.requires_grad_()
    old_logits.requires_grad_()
    total, _ = pixel_losses(terms_of("MIB"), logits, old_logits, labels)
    (3 * total).backward()
    torch.testing.assert_close(logits.grad, 3 * expected)
    assert old_logits.grad is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("combination", ["FT", "LWF-MC", "MIB"])
def test_on_cuda_compiled_pieces_equal_the_plain_form(combination):
    try:
        check_compiler(torch.device("cuda"))
    except UserError as error:
        pytest.skip(str(error))
    case = [t.cuda() for t in batch((16, 16), (256, 256))]
    terms = terms_of(combination)
    assert_equal(in_pieces(terms, *case), plain(terms, *case), 1e-6)
    weights = torch.tensor([0.25, 0.0, 1.5], device="cuda")
    assert_equal(in_pieces(terms, *case, weights=weights), plain(terms, *case, weights), 1e-6)
    assert not pieces._compiled_sums.failed
    x = upsample(case[0], (256, 256))
    chosen = x.gather(1, predict(case[0], (256, 256)).long()[:, None])[:, 0]
    torch.testing.assert_close(chosen, x.amax(1), rtol=0, atol=1e-4)  # but for near ties


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_values_without_grad(mode):
    case = batch((5, 4), (37, 50))
    leaf = case[0].clone().requires_grad_()
    with mode():
        total, values = pixel_losses(terms_of("MIB"), leaf, *case[1:])
    assert not total.requires_grad
    expected = in_pieces(terms_of("MIB"), *case)
    assert total == expected[0]
    assert values == expected[1]


def test_inference_tensors_of_a_teacher_and_a_cache_filled_in_inference_mode():
    # Sizes that no other test uses: their matrices are made here, in inference mode.
    logits, _, labels = batch((3, 11), (23, 29))
    with torch.inference_mode():
        old_logits = torch.randn(3, OLD, 3, 11)
        predict(old_logits, (23, 29))
    expected = plain(terms_of("MIB"), logits, old_logits.clone(), labels)
    assert_equal(in_pieces(terms_of("MIB"), logits, old_logits, labels), expected, 1e-6)


def test_threads_change_no_bit_and_are_given_back():
    case = batch((5, 4), (37, 50))

    def broken(*_):
        raise RuntimeError("term")

    one = in_pieces(terms_of("MIB"), *case, piece_size=1000), predict(case[0], (37, 50), 1000)
    torch.set_num_threads(2)
    try:
        two = in_pieces(terms_of("MIB"), *case, piece_size=1000), predict(case[0], (37, 50), 1000)
        with pytest.raises(RuntimeError, match="term"):
            in_pieces({"broken": WeightedTerm(broken, 1.0)}, *case)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert one[0][0] == two[0][0]
    assert one[0][1] == two[0][1]
    assert torch.equal(one[0][2], two[0][2])
    assert torch.equal(one[1], two[1])


class LargestTensor(TorchDispatchMode):
    """The number of elements in the largest floating-point tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.is_floating_point():
            self.elements = max(self.elements, result.numel())
        return result


def test_no_tensor_is_larger_than_a_piece():
    case = batch((4, 4), (64, 64))
    with LargestTensor() as largest:
        in_pieces(terms_of("everything"), *case, piece_size=2000)
        predict(case[0], (64, 64), piece_size=2000)
    assert largest.elements <= 2000


@pytest.mark.parametrize(
    ("images", "classes", "pieces_expected"),
    [(24, 151, 24), (24, 21, 24), (4, 151, 16), (1, 21, 1)],
)
def test_a_device_takes_few_pieces_whose_matrices_are_aligned(images, classes, pieces_expected):
    maps = torch.empty(images, classes, 32, 32, device="meta")
    upsampled = Upsampled(maps, (512, 512))
    found = [piece for piece, _ in upsampled.each_piece(lambda piece: None, None)]
    assert len(found) == pieces_expected
    largest = max(piece.rows.stop - piece.rows.start for piece in found) * 512 * classes
    assert largest <= max(2**24, images * classes * 512 * 512 / 16)
    for piece in found:
        source, vertical, _ = upsampled.operands(piece)
        assert (source.storage_offset() * 4) % 16 == 0
        assert vertical.storage_offset() == 0
        assert vertical.is_contiguous()


def test_bands_cover_all_rows_in_equal_shapes():
    for size_in, size_out, most, heights in [
        (32, 512, 13, {8}),
        (24, 375, 10, {5}),
        (32, 521, 10, {10, 1}),  # a prime: the last band is what remains
        (4, 6, 100, {6}),
    ]:
        bands = _bands(size_in, size_out, most)
        covered = [row for rows, _ in bands for row in range(size_out)[rows]]
        assert covered == list(range(size_out))
        assert {rows.stop - rows.start for rows, _ in bands} == heights
        assert len({span.stop - span.start for _, span in bands}) == 1
        assert all(span.start >= 0 and span.stop <= size_in for _, span in bands)


@pytest.mark.parametrize("wrong", ["old_logits", "labels", "weights"])
def test_batches_of_different_length_are_refused(wrong):
    logits, *others = batch((5, 4), (37, 50))
    case = dict(zip(("old_logits", "labels", "weights"), [*others, torch.ones(3)], strict=True))
    case[wrong] = case[wrong][1:]
    with pytest.raises(ValueError, match="different length"):
        pixel_losses(terms_of("MIB"), logits, **case)


@pytest.mark.parametrize("piece_size", [1, 5000, None])
@pytest.mark.parametrize(
    ("classes", "small", "size", "dtype"),
    [
        (21, (4, 4), (64, 64), torch.uint8),
        (255, (3, 2), (31, 20), torch.uint8),
        (256, (3, 2), (9, 8), torch.int64),
        (5, (6, 7), (6, 7), torch.uint8),
    ],
)
def test_prediction_is_the_argmax_of_upsampled_logits(classes, small, size, dtype, piece_size):
    logits = torch.randn(2, classes, *small, generator=torch.Generator().manual_seed(2)).double()
    logits.requires_grad_()
    labels = predict(logits, size, piece_size)
    assert labels.dtype == dtype
    assert torch.equal(labels.long(), upsample(logits, size).argmax(1))


def test_prediction_breaks_ties_downwards():
    assert not predict(torch.zeros(1, 5, 2, 2), (9, 9)).any()


def test_the_plain_side_of_the_benchmark_computes_the_same():
    logits, old_logits, labels = benchmark.inputs(2, OLD, NEW, 4, 32, "cpu")
    logits, old_logits = logits.detach().double().requires_grad_(), old_logits.double()
    ours, plain_ = (f(logits, old_logits, labels) for f in (benchmark.ours, benchmark.plain))
    torch.testing.assert_close(ours, plain_, rtol=1e-12, atol=0)
    gradients = (torch.autograd.grad(x, logits)[0] for x in (ours, plain_))
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-15)


def test_the_benchmark_runs(tmp_path, monkeypatch, capsys):
    shape = "--batch 1 --old 2 --new 1 --small 2 --size 8 --repeats 1 --calls 1"
    file = tmp_path / "loss.json"
    monkeypatch.setattr(harness, "in_fresh_process", harness._measure)
    monkeypatch.setattr(sys, "argv", ["loss", *shape.split(), "--json", str(file)])
    benchmark.main()
    (case,) = json.loads(file.read_text())["cases"]
    assert len(case["ours"]) == len(case["plain"]) == 1
    assert case["summary"]["time ratio"] > 0
    assert case["name"] in capsys.readouterr().out
