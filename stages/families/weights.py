"""Weights of checkpoints by their names: read, whether they fit a model, which layers are kept."""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from stages.errors import UserError

Shapes = Mapping[str, tuple[int, ...]]

NOT_TENSORS = (
    "the weights hold more than tensors, and reading them would run code of whoever made the file"
)


class Undrawn(TorchFunctionMode):
    """Build modules whose weights are read afterwards: none is drawn inside the block.

    On the device `meta` the drawing would import torch's compiler, which takes a second.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            return named["tensor"] if "tensor" in named else args[0]
        return func(*args, **named)


def load_tensors(file: Any, name: str, map_location: Any = "cpu") -> dict[str, Tensor]:
    """Read the tensors of a file that torch.save wrote, by their names, without unpickling.

    `file` is a path or open for reading; `name` is what errors call it. Raises UserError when it is
    damaged, or holds more than tensors.
    """
    try:
        weights = torch.load(file, map_location=map_location, weights_only=True)
    except UnpicklingError as error:
        raise UserError(f"{name} is refused: {NOT_TENSORS} ({error})") from error
    except (RuntimeError, EOFError, OSError, zlib.error) as error:
        raise UserError(f"the weights in {name} are damaged ({error}); get it again") from error
    named = isinstance(weights, dict) and all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in weights.items()
    )
    if not named:
        raise UserError(f"{name} is refused: its weights are no dictionary of tensors by name")
    return dict(weights)


def check_tensors(file: Path, expected: Shapes, found: Shapes) -> None:
    """Compare names and shapes of tensors; raises UserError that lists every difference."""
    faults = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    faults += [f"{name} is unknown" for name in sorted(found.keys() - expected.keys())]
    faults += [
        f"{name} has shape {found[name]}, not {expected[name]}"
        for name in sorted(expected.keys() & found.keys())
        if found[name] != expected[name]
    ]
    if faults:
        raise UserError(
            f"{file} does not fit the model: {'; '.join(faults)}. Use the configuration that the "
            "weights were trained with"
        )


def check_floating(file: Path, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Refuse whole numbers where a model has fractions, and the reverse; raises UserError."""
    faults = [
        f"{name} is {found[name].dtype}, not {expected[name].dtype}"
        for name in sorted(expected.keys() & found.keys())
        if found[name].is_floating_point() != expected[name].is_floating_point()
    ]
    if faults:
        raise UserError(
            f"{file} does not fit the model: {'; '.join(faults)}. Save the weights as they were "
            "trained"
        )


def digest_tensors(digest: hashlib._Hash, tensors: Mapping[str, Tensor]) -> None:
    """Let a hash depend on tensors: names in their order, types, shapes and every byte."""
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)


def no_adapters(family: str) -> UserError:
    """Return the error of a family that is asked to merge a teacher's adapters."""
    return UserError(
        f"init.kind is 'merged', but models of the family {family!r} have no adapters to merge: "
        "use 'teacher', which copies the teacher's weights"
    )


def kept_layers(
    weights: Path, layers: Sequence[int] | None, available: int, wanted: int
) -> list[int]:
    """Which decoder layers of a checkpoint a model of `wanted` layers inherits, in order.

    None spreads them evenly, the first and the last among them. Raises UserError where the layers
    named are not there, or not as many as the model has.
    """
    if layers is None:
        layers = np.linspace(0, available - 1, wanted).round().astype(int).tolist()
        if wanted > available:
            layers = list(range(available))
    if len(layers) != wanted or any(not 0 <= layer < available for layer in layers):
        raise UserError(
            f"{weights} has decoder layers 0 to {available - 1} and the model has {wanted} layers, "
            f"but the layers to keep are {list(layers)}: name {wanted} of them, or null"
        )
    return list(layers)


def project(vectors: Tensor, width: int) -> Tensor:
    """Project vectors [..., D] to [..., width] at random, keeping their size on average."""
    return vectors @ torch.randn(vectors.shape[-1], width) / math.sqrt(vectors.shape[-1])
