"""The place of a process among the data-parallel processes of a stage."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.rendezvous import rendezvous

from stages.errors import UserError
from stages.peers import watched

PATIENCE = timedelta(hours=1)
"""How long processes wait for one that is there but slow: it may compile, validate, draw or save.
One that has ended is noticed at once (`stages.peers`)."""

_meetings = itertools.count()


@dataclass(frozen=True)
class Place:
    """Rank of this process and how many there are, from the variables that torchrun sets."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def totals(self, *values: float) -> list[float]:
        """Sum each number over all processes."""
        if self.world_size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def most(self, value: int) -> int:
        """Return the largest of the numbers of all processes."""
        if self.world_size == 1:
            return value
        tensor = torch.tensor(value, device=self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor)

    def parallel(self, module: nn.Module) -> nn.Module:
        """Return `module` with gradients averaged over all processes."""
        if self.world_size == 1:
            return module
        # Buffers are tables that training leaves alone. Sent around with every pass, they would let
        # the leading process wait for the others, which do not validate.
        return nn.parallel.DistributedDataParallel(module, forward_sync_buffers=False)

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.world_size > 1:
            dist.barrier()


@contextmanager
def place(device: str) -> Iterator[Place]:
    """Join the process group that the environment describes, for the length of the block.

    The variables are those that torchrun sets; without them the process is alone. Raises
    `UserError` when there are fewer accelerators on this machine than processes, and `PeerLost`
    when another process ends by an error.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    target = choose_device(device)
    if world_size == 1:
        yield Place(0, 1, target)
        return
    if target.type == "cuda":
        _require_devices(int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size))))
        torch.cuda.set_device(target)
    rank = int(os.environ["RANK"])
    # A process may do several stages: what one has left in the store would mislead the next.
    store = dist.PrefixStore(  # type: ignore[attr-defined] # torch exports it unseen
        f"foretell/{next(_meetings)}", _store()
    )
    with watched(rank, world_size, store):
        dist.init_process_group(
            "nccl" if target.type == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=PATIENCE,
            device_id=target if target.type == "cuda" else None,
        )
        try:
            yield Place(rank, world_size, target)
        finally:
            dist.destroy_process_group()


@cache
def _store() -> Any:
    """Return the store in which processes find each other: rank 0 or torchrun serves it."""
    return next(iter(rendezvous("env://")))[0]


def _require_devices(processes: int) -> None:
    present = torch.cuda.device_count()
    if processes > present:
        raise UserError(
            f"{processes} data-parallel processes on this machine need {processes} CUDA devices, "
            f"but there are {present}: set optimizer.processes: {present}, or device: cpu"
        )


def choose_device(name: str) -> torch.device:
    """Return the torch device for a setting; `auto` is CUDA where it is present, else the CPU.

    Processes of one machine take its CUDA devices in turn, by the variable LOCAL_RANK. From then on
    float32 is float32 in convolutions there, as it is in products. Raises `UserError` for a device
    that torch does not know or does not see.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device {name!r} is not a torch device: use auto, cpu or cuda") from error
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise UserError(
            f"device {name!r} was asked for, but torch {torch.__version__} sees no CUDA device "
            "here: set device: auto or cpu, or install a CUDA build and driver"
        )
    # Left alone cudnn rounds what it multiplies to ten bits, and what fp32 says would not hold.
    torch.backends.cudnn.allow_tf32 = False
    present = torch.cuda.device_count()
    if device.index is None:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % present)
    if device.index >= present:
        raise UserError(
            f"device {name!r} was asked for, but this machine has {present} CUDA devices, "
            f"cuda:0 to cuda:{present - 1}: name one of them, or set device: auto"
        )
    return device


def computes_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 matrices in hardware; without that bf16 is slower."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # Releases before 2.14 cannot tell, and then fp32 is the safe answer.
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def peak_device_bytes(device: torch.device) -> int:
    """Most bytes this process held on the device; 0 on the CPU, where resident memory counts."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
