"""Launches are counted: what counts, what does not, and what an iteration must not do."""

from __future__ import annotations

import pytest
import torch

from benchmarks import launches
from benchmarks.counting import Ledger, Operations, Reads, multi_tensor_launches
from benchmarks.launches import count
from benchmarks.step import context_of
from engine.build import new_model
from modules.norm import ABN

TOY = ("--backbone", "resnet18", "--task", "15-5", "--crop_size", "64", "--batch_size", "4",
       "--amp", "bf16")  # fmt: skip


def counted(work) -> tuple[int, int, int]:
    ledger = Ledger()
    with Reads(ledger), Operations(ledger):
        work()
    return tuple(ledger.total(column) for column in ("launches", "copies", "syncs"))


def test_views_and_allocations_are_no_launches():
    x = torch.ones(4, 6)
    assert counted(lambda: torch.empty(3).new_empty(2).view(1, 2)) == (0, 0, 0)
    assert counted(lambda: (x.T[1:] + 1)[0]) == (1, 0, 0)
    assert counted(lambda: x.double().clone()) == (2, 2, 0)
    with torch.inference_mode():  # here `to` and `conv2d` arrive whole
        assert counted(lambda: x.to(torch.bfloat16)) == (1, 1, 0)
        assert counted(lambda: x.to(torch.float32)) == (0, 0, 0)


def test_what_the_host_reads_is_a_synchronisation():
    x = torch.ones(3)
    assert counted(lambda: x.sum().item()) == (1, 0, 1)
    assert counted(lambda: bool(x.isfinite().all()))[2] == 1
    assert counted(lambda: x[x > 0])[2] == 1
    assert counted(lambda: (x.cpu(), x.tolist(), x.to("cpu"))) == (0, 0, 3)
    assert counted(lambda: x.to(torch.device("cpu"), non_blocking=True)) == (0, 0, 0)


def test_the_backward_of_a_convolution_is_a_launch_per_gradient():
    x, w = torch.ones(1, 2, 4, 4, requires_grad=True), torch.ones(3, 2, 1, 1, requires_grad=True)
    y = torch.nn.functional.conv2d(x, w)
    grad = torch.ones_like(y)
    assert counted(lambda: torch.autograd.grad(y, w, grad, retain_graph=True))[0] == 1
    assert counted(lambda: torch.autograd.grad(y, (x, w), grad))[0] == 2


def test_lists_share_launches_within_what_a_kernel_holds():
    assert multi_tensor_launches([10] * 110, 1) == 1
    assert multi_tensor_launches([10] * 111, 1) == 2
    assert multi_tensor_launches([10] * 111, 3) == 3
    assert multi_tensor_launches([65536 * 641], 2) == 3
    tensors = [torch.ones(3) for _ in range(100)]
    assert counted(lambda: torch._foreach_mul_(tensors, 2.0))[0] == 1
    assert counted(lambda: torch._foreach_mul(tensors, 2.0))[0] == 2


def test_an_iteration_waits_for_nothing_and_says_where_its_launches_are():
    ledger = count((*TOY, "--method", "MIB"))
    assert ledger.total("syncs") == 0
    assert {"teacher", "student", "loss", "backward", "optimizer"} <= ledger.counts.keys()
    assert ledger.counts["teacher"]["launches"] < ledger.counts["student"]["launches"]
    assert ledger.total("collectives") == 0
    alone = count((*TOY, "--method", "FT"))
    assert "teacher" not in alone.counts
    assert alone.total() < ledger.total()


@pytest.mark.parametrize(
    ("method", "world", "most"),
    [
        ("MIB", 1, {"teacher": 103, "student": 151, "backward": 186, "optimizer": 6, "rest": 7}),
        ("MIB", 8, {"teacher": 103, "student": 174, "backward": 263, "optimizer": 6, "rest": 7}),
        ("RW", 1, {"student": 151, "backward": 186, "regulariser": 17, "optimizer": 6, "rest": 6}),
    ],
)
def test_no_phase_needs_more_launches_than_it_did(method, world, most):
    """A norm is 1 launch in the teacher, 3 in the student and 4 over ranks; lists share theirs."""
    counts = count((*TOY, "--method", method), world=world).counts
    found = {phase: row["launches"] for phase, row in counts.items() if phase != "loss"}
    assert found.keys() == most.keys()
    assert {phase: n for phase, n in found.items() if n > most[phase]} == {}


def test_ranks_add_a_collective_for_each_norm_and_direction():
    ledger = count((*TOY, "--method", "FT"), world=8)
    model = new_model(context_of(("--norm_act", "iabn_sync", *TOY), "cpu"), [16, 5])
    norms = sum(isinstance(layer, ABN) for layer in model.modules())
    assert ledger.counts["student"]["collectives"] == norms
    assert ledger.counts["backward"]["collectives"] > norms  # and the buckets of the gradients


@pytest.mark.parametrize("method", ["MIB", "RW"])
def test_a_validation_batch_has_neither_backward_nor_optimizer(method: str):
    ledger = count((*TOY, "--method", method), validation=True)
    assert not {"backward", "optimizer", "regulariser"} & ledger.counts.keys()
    assert ledger.counts["prediction"]["launches"] > 0


def test_the_program_prints_a_table(monkeypatch, capsys):
    argv = ["launches", "--methods", "FT", "--tasks", "15-5", *TOY[:2]]
    monkeypatch.setattr("sys.argv", argv)
    launches.main()
    out = capsys.readouterr().out
    assert "FT 15-5 training, 1 process(es)" in out
    assert out.count("  sum ") == 2
