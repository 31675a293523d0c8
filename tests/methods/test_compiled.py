"""torch.compile: the loss in pieces, the networks, and what happens where it does not work."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import nn

from methods import pieces
from methods.groups import FeatureDistillation, PixelTerms
from methods.loss import WeightedTerm, cross_entropy
from methods.objective import Objective
from segmentation_module import Output
from tests.methods.test_pieces import (
    NEW,
    OLD,
    assert_equal,
    batch,
    in_pieces,
    plain,
    terms_of,
)
from utils.compiled import CompiledOrPlain, check_compiler, reset_compiler
from utils.constants import IGNORE_INDEX
from utils.errors import UserError
from utils.precision import Precision

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler"
)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """A compiler that remembers nothing, and a function that has not failed yet."""
    monkeypatch.setattr(pieces, "_compiled_sums", CompiledOrPlain(pieces._sums))
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@needs_compiler
@pytest.mark.parametrize("weights", [None, torch.tensor([0.25, 0.0, 1.0])])
def test_compiled_pieces_equal_the_plain_form_and_are_compiled_once(weights):
    logits, old_logits, labels = batch((4, 4), (64, 64))
    terms = terms_of("MIB")
    case = logits, old_logits, labels
    options = {"piece_size": 2000, "compiled": True}
    first = in_pieces(terms, *case, **options, weights=weights)
    assert_equal(first, plain(terms, *case, weights), 1e-6)
    others = None if weights is None else weights.flip(0) / 2
    with torch._dynamo.config.patch(error_on_recompile=True):
        again = in_pieces(terms, 2 * logits, old_logits, labels, **options, weights=others)
    assert_equal(again, plain(terms, 2 * logits, old_logits, labels, others), 1e-6)
    assert not pieces._compiled_sums.failed


@pytest.mark.parametrize(
    ("combination", "step"),
    [
        ("FT", 0),
        ("LWF", 1),
        ("LWF-MC", 0),
        ("MIB", 1),
        ("iCaRL disjoint, background", 1),
        ("everything", 1),
    ],
)
def test_no_objective_breaks_the_graph(combination, step, monkeypatch):
    function = CompiledOrPlain(pieces._sums)
    function.compiled = torch.compile(pieces._sums, fullgraph=True, backend="aot_eager")
    monkeypatch.setattr(pieces, "_compiled_sums", function)
    case = batch((5, 4), (37, 50), step)
    terms = terms_of(combination, step)
    actual = in_pieces(terms, *case, piece_size=5000, compiled=True)
    assert not function.failed
    assert_equal(actual, plain(terms, *case), 1e-6)


def test_a_term_that_cannot_be_compiled_is_computed_as_written(caplog):
    @torch.compiler.disable
    def untraceable(logits, old_logits, labels):
        return cross_entropy(logits, old_logits, labels)

    logits, _, labels = batch((4, 4), (32, 32), step=0)
    terms = {"ce": WeightedTerm(untraceable, 1.0)}
    actual = in_pieces(terms, logits, None, labels, compiled=True)
    assert_equal(actual, plain(terms_of("FT", 0), logits, None, labels), 1e-6)
    in_pieces(terms, logits, None, labels, compiled=True)
    warnings = [r.message for r in caplog.records if r.name == "utils.compiled"]
    assert len(warnings) == 1
    assert "the loss is not compiled" in warnings[0]


def test_an_error_of_a_term_stays_what_it_is():
    def broken(*_):
        raise ZeroDivisionError("term")

    with pytest.raises(ZeroDivisionError, match="term"):
        in_pieces({"x": WeightedTerm(broken, 1.0)}, *batch((4, 4), (8, 8)), compiled=True)


@needs_compiler
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_evaluation_is_compiled_for_sizes_that_recur(mode, monkeypatch):
    monkeypatch.setattr(pieces, "_compiled_values", CompiledOrPlain(pieces._sums))
    monkeypatch.setattr(pieces, "_sizes", pieces._Sizes())
    calls = []
    compiled = pieces._compiled_values
    monkeypatch.setattr(
        type(compiled), "__call__",
        lambda self, *a: (calls.append(a[1][0].shape), torch.compile(self.function)(*a))[1],
    )  # fmt: skip
    terms = terms_of("MIB")
    for size, often in [(16, 2), (8, 4), (12, 1)]:
        logits, old_logits, labels = batch((4, 4), (size, size))
        for _ in range(often):
            with mode():
                total, _ = pieces.pixel_losses(terms, logits, old_logits, labels, compiled=True)
            expected = plain(terms, logits, old_logits, labels)[0].float()
            torch.testing.assert_close(total, expected, rtol=1e-6, atol=0)
    assert len(calls) == 2 * len(logits)  # the third and the fourth batch of 8 x 8


class Tiny(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.body, self.cls = nn.Conv2d(3, 4, 3, 4, 1), nn.Conv2d(4, classes, 1)

    def forward(self, images, maps=()):
        features = self.body(images)
        return Output(self.cls(features), dict.fromkeys(maps, features))


@needs_compiler
def test_a_compiled_objective_has_the_same_terms_and_gradients():
    torch.manual_seed(0)
    student, teacher = Tiny(OLD + NEW), Tiny(OLD).requires_grad_(False).eval()
    images = torch.randn(2, 3, 32, 32)
    labels = torch.randint(0, OLD + NEW, (2, 32, 32), dtype=torch.uint8)
    labels[0, :8] = IGNORE_INDEX
    results = []
    for compiled in (False, True):
        student.zero_grad()
        precision = Precision(torch.device("cpu"))
        pixels = PixelTerms(terms_of("MIB"), asks_teacher=True, compiled=compiled)
        groups = [pixels, FeatureDistillation(2.0)]
        objective = Objective(groups, student, teacher, precision, compiled)
        total, terms, _ = objective(images, labels)
        total.backward()
        results.append((terms, [p.grad.clone() for p in student.parameters()]))
    assert results[0][0].keys() == results[1][0].keys() == {"unce", "unkd", "de"}
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)
    assert type(objective._run_student) is not type(student)


def test_a_machine_without_compiler_is_told_in_one_line():
    with (
        torch._inductor.config.patch({"cpp.cxx": (None, "/no/compiler"), "fx_graph_cache": False}),
        pytest.raises(UserError, match="--compile does not work on this machine .* drop it"),
    ):
        check_compiler(torch.device("cpu"))


def test_resetting_frees_the_places_of_shapes():
    function = CompiledOrPlain(pieces._sums)
    function.compiled = torch.compile(pieces._sums, fullgraph=True, backend="eager")
    operands = torch.ones(2, 3, 4), torch.ones(6, 2), torch.ones(4, 5)
    terms = (WeightedTerm(cross_entropy, 1.0),)
    for width in range(1, 12):  # more than torch allows without
        labels = torch.zeros(6, 1, width, dtype=torch.uint8)
        function(terms, (*operands[:2], torch.ones(4, width)), None, labels, True)
        reset_compiler()
    assert not function.failed
