"""One code path for one process and many.

Only this file and the norms of `modules/`, which synchronise in every pass, use torch.distributed.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from utils import launcher
from utils.errors import UserError

# Rank 0 may scan a whole dataset while the others wait.
TIMEOUT = timedelta(hours=2)
JOINING = timedelta(minutes=10)  # from the first process to the last one, on all machines

_host_group: Any = None  # for flags on the CPU; None is the default group
_norm_group: Any = None  # of the norms, made when the first one asks


def init(local_rank: int | None = None) -> torch.device:
    """Join the processes that a launcher started, if one did; returns this process's device.

    A launcher (torchrun, torch.distributed.launch) sets RANK and WORLD_SIZE; without them the
    program runs as a single process. `local_rank` is what the launcher passed as a flag, else
    LOCAL_RANK is read. NCCL on GPU, gloo on CPU. Raises UserError for more processes than GPUs.
    """
    launcher.check_environment()
    local = launcher.number("LOCAL_RANK", 0) if local_rank is None else local_rank
    cuda = torch.cuda.is_available()
    if cuda and local >= torch.cuda.device_count():
        raise UserError(
            f"process {local} has no GPU of its own, this machine shows "
            f"{torch.cuda.device_count()}: lower --nproc_per_node"
        )
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if launcher.is_launched():
        _join("nccl" if cuda else "gloo", device if cuda else None)
    return device


def _join(backend: str, device_id: torch.device | None) -> None:
    global _host_group
    store, rank, world = next(dist.rendezvous("env://", timeout=JOINING))
    store.set_timeout(TIMEOUT)
    # torchrun's store outlives the processes: those it starts anew must not find the addresses
    # that dead ones left there.
    life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    dist.init_process_group(
        backend,
        store=dist.PrefixStore(f"life-{life}", store),
        rank=rank,
        world_size=world,
        timeout=TIMEOUT,
        device_id=device_id,
    )
    _host_group = None if backend == "gloo" else dist.new_group(backend="gloo", timeout=TIMEOUT)


def be_deterministic() -> None:
    """The same run twice gives the same bits on CUDA, too, at some loss of speed.

    An operation that has no deterministic form warns and names itself.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True, warn_only=True)


def shutdown(failed: bool = False) -> None:
    """Leave the group, if there is one.

    After a failure other processes may hang in a collective that NCCL would wait for; the launcher
    ends them.
    """
    global _norm_group
    if _active() and not (failed and dist.get_backend() == "nccl"):
        dist.destroy_process_group()
        _norm_group = None


def rank() -> int:
    """0 .. world_size - 1; 0 for a single process."""
    return dist.get_rank() if _active() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if _active() else 1


def is_main() -> bool:
    """Whether this process is the one that logs and writes."""
    return rank() == 0


def all_reduce(tensor: Tensor) -> Tensor:
    """Sum over the processes, in place and returned."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def average(tensor: Tensor) -> Tensor:
    """Mean over the processes, in place and returned."""
    return all_reduce(tensor).div_(world_size())


def broadcast_buffers(module: nn.Module) -> None:
    """Give every process rank 0's buffers: unsynchronised norms keep statistics of their own."""
    if world_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def norm_group() -> Any:
    """The process group of synchronised norms; all processes ask for it at the same place.

    The collectives of a group run one after the other. A norm waits for its own, so they must not
    queue behind those of DistributedDataParallel, which move megabytes and can wait. The first call
    makes the group: without a synchronised norm nobody pays for its connections.
    """
    global _norm_group
    if _norm_group is None:
        _norm_group = dist.new_group(timeout=TIMEOUT)
    return _norm_group


def any_process(flag: bool) -> bool:
    """Whether `flag` holds in any process; all call this at the same places and get one answer.

    Goes from CPU to CPU, so it waits for no GPU.
    """
    if world_size() == 1:
        return flag
    flags = torch.tensor(int(flag))
    dist.all_reduce(flags, group=_host_group)
    return bool(flags.item())


class PeerStopped(Exception):
    """Rank 0 stopped with an error of its own while this process waited for it."""


def lost_peer(error: BaseException) -> bool:
    """Whether `error` says that another process died in the middle of a collective."""
    signs = ("gloo", "by peer", "Broken pipe", "Socket", "TCPStore")
    return isinstance(error, dist.DistError) or (
        world_size() > 1
        and isinstance(error, RuntimeError)
        and any(sign in str(error) for sign in signs)
    )


@contextmanager
def main_first() -> Iterator[None]:
    """Rank 0 runs the block, then the others do: what it writes to disk they find.

    Where the block fails on rank 0, the others raise PeerStopped instead of running it.
    """
    if is_main():
        try:
            yield
        except BaseException:
            any_process(True)
            raise
        any_process(False)
    else:
        if any_process(False):
            raise PeerStopped
        yield


def wrap(module: nn.Module, device: torch.device) -> nn.Module:
    """DistributedDataParallel where there are several processes, else the module itself.

    Buffers are not broadcast at every forward pass: training does not read them
    (`broadcast_buffers` does it before they are). On the CPU, and on CUDA after `be_deterministic`,
    a run that is interrupted and goes on sums its gradients in the order of one that is not.
    """
    if world_size() == 1:
        return module
    known = inspect.signature(DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    # After its first iteration DDP groups the gradients anew, by the order of their arrival, and
    # three or more numbers have another sum in another place of a group. It does not where it
    # looks for unused parameters, which costs a walk over the graph and, in vain, a warning.
    exact = device.type == "cpu" or torch.are_deterministic_algorithms_enabled()
    fixed_groups = exact and world_size() > 2
    # torch 2.15 gave the first one another name
    settings: dict[str, Any] = {buffers: False, "find_unused_parameters": fixed_groups}
    return DistributedDataParallel(
        module,
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        **settings,
    )


def _active() -> bool:
    return dist.is_available() and dist.is_initialized()
