"""Weights, gradients and moments shared out among data-parallel processes (FSDP2).

Each process keeps its rows of every parameter, as a `DTensor`. The whole of a block is gathered for
as long as it computes. What is written to disk is always whole, so that a run may go on with
another number of processes, or without sharing anything out.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import Tensor, nn

from stages.errors import UserError

FSDP, TENSORS = "torch.distributed.fsdp", "torch.distributed.tensor"
"""Modules that take a second to import, for which a stage that shares nothing out does not wait."""


def shard(module: nn.Module, blocks: Sequence[str], world_size: int, device: torch.device) -> None:
    """Share out the parameters of `module` in place, those of each of its blocks by themselves.

    `blocks` are patterns of names. What belongs to none is gathered for a whole pass and its
    backward, so that it may also be read outside of the module's own forward. Raises `UserError`
    for parameters that are not plain numbers, such as quantized ones.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    _require_plain(module)
    # It warns of writing into what a network returns, which nobody here does.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
    mesh = init_device_mesh(device.type, (world_size,))
    for block in _outermost(module, blocks):
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh, reshard_after_forward=False)


def is_sharded(module: nn.Module) -> bool:
    """Whether `shard` has shared out the parameters of a module."""
    return FSDP in sys.modules and isinstance(module, sys.modules[FSDP].FSDPModule)


def _is_shared(tensor: Tensor) -> bool:
    return TENSORS in sys.modules and isinstance(tensor, sys.modules[TENSORS].DTensor)


def _require_plain(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        plain = type(parameter) is nn.Parameter and type(parameter.data) is Tensor
        if not (plain and parameter.is_floating_point()):
            raise UserError(
                f"optimizer.parallel is fsdp, which shares out plain weights only, but {name} is "
                f"a {type(parameter.data).__name__} of {parameter.dtype}: set optimizer.parallel: "
                "ddp, or leave the model unquantized"
            )


def _outermost(module: nn.Module, blocks: Sequence[str]) -> Iterator[nn.Module]:
    """Yield what a pattern names, but nothing inside of what was yielded."""
    found: list[str] = []
    for name, part in module.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if not inside and any(fnmatchcase(name, pattern) for pattern in blocks):
            found.append(name)
            yield part


def reshard(module: nn.Module) -> None:
    """Let go of what a pass without backward has gathered; it would soon be out of date."""
    for part in module.modules():
        if is_sharded(part):
            cast(Any, part).reshard()


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor; where it is shared out, every process has to ask."""
    return cast(Any, tensor).full_tensor() if _is_shared(tensor) else tensor


def like(full: Tensor, shared: Tensor) -> Tensor:
    """Return of a whole tensor what a process keeps, on the device and in the form of `shared`."""
    if not _is_shared(shared):
        return full.to(shared.device)
    from torch.distributed.tensor import DTensor, distribute_tensor

    form = cast(DTensor, shared)
    # Every process has all of it, so none has to send anything.
    return distribute_tensor(
        full.to(form.device), form.device_mesh, form.placements, src_data_rank=None
    )


def gather(module: nn.Module, *, leads: bool) -> None:
    """Let `module` have all of its parameters, on the CPU, in the process that `leads`.

    Every process has to ask; the others keep their shares. No pass is possible after.
    """
    reshard(module)
    gathered: dict[Tensor, nn.Parameter] = {}  # what is tied stays tied
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False, remove_duplicate=False):
            if parameter not in gathered:
                full = whole(parameter.detach())
                kept = full.cpu() if leads else parameter.detach()
                gathered[parameter] = nn.Parameter(kept, parameter.requires_grad)
            setattr(part, name, gathered[parameter])
        if is_sharded(part):
            # `fully_shard` made a class of its own of this one, whose name would go into files.
            part.__class__ = type(part).__mro__[2]
