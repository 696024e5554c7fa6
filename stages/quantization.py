"""A teacher whose linear layers hold their weights in 8 or 4 bits.

Weights alone are quantized; what a layer reads and gives keeps its type, and gradients with respect
to it flow, so that adapters can be trained on top. What did not end as it was asked for is an error
or is recorded: no layer stays in full precision unsaid.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from importlib.metadata import version
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from stages.architecture import Architecture
from stages.config import QuantizationConfig
from stages.errors import UserError
from stages.family import Family
from stages.silence import silenced
from store.schema import DTypeName, Quantization, QuantizationMethod

logger = logging.getLogger(__name__)

NF4_BLOCK = 64
"""Weights of a row that share a scale in nf4; a row is whole blocks."""
FLOAT8 = torch.float8_e4m3fn
OUTLIERS = 6.0
"""Features of an input this large are multiplied in full. Source: LLM.int8() (2208.07339)."""


@dataclass(frozen=True)
class Backend:
    """What holds the weights of a layer for a method on a kind of device."""

    package: str
    extra: str
    """The extra of foretell that installs it; torch is always there."""
    replace: Callable[[ModuleType, nn.Linear, torch.device], nn.Linear]
    """Return the layer, on the device and with its weight quantized; may change the one given."""
    holds: Callable[[nn.Linear], bool]
    """Whether the weight of a layer really is quantized, by its parameters."""
    block: int = 1
    """Inputs of a layer must be a multiple of it."""


def quantize(
    module: nn.Module,
    method: QuantizationMethod,
    *,
    device: str | torch.device,
    keep: Collection[str] = (),
) -> Quantization:
    """Quantize the weights of the linear layers of a module in place and move it to `device`.

    The module comes from the CPU, in the type that it will compute in, and layer by layer is
    quantized and moved, so that the device never holds it whole. `keep` are names of layers, or
    patterns as of a shell, that stay as they are: output heads, and layers whose weight is read by
    other than the layer itself. Embeddings, layers that share their weight with one and subclasses
    of nn.Linear always do. Quantized weights need no gradients; whether others do is not changed.
    Raises UserError when the package is missing, no layer is left to quantize, or a layer did not
    become what was asked for.
    """
    device = torch.device(device)
    backend, package = require_backend(method, device)
    _require_whole(module)
    dtype = _dtype(module)
    layers, kept = _chosen(module, backend, keep)
    if not layers:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in kept.items())
        raise UserError(
            f"quantization to {method!r} would leave every linear layer as it is ({reasons or 'no'}"
            " layers): load the teacher without it"
        )
    full = sum(weight_bytes(module.get_submodule(name)) for name in layers)
    with silenced():
        for name in layers:
            _replace(module, name, backend, package, device)
    module.to(device)
    _check(module, layers, backend, method)
    record = Quantization(
        method=method,
        dtype=dtype,
        backend=backend.package,
        backend_version=version(backend.package),
        layers=tuple(layers),
        kept=kept,
    )
    _announce(record, full, sum(weight_bytes(module.get_submodule(name)) for name in layers))
    return record


def require_backend(method: QuantizationMethod, device: torch.device) -> tuple[Backend, ModuleType]:
    """Return what quantizes on a device, and its package; raises UserError where there is none."""
    if device.type not in BACKENDS or method not in BACKENDS[device.type]:
        raise UserError(
            f"quantization to {method!r} on device {device} is not supported: use a device of "
            f"{sorted(BACKENDS)}, and one of {sorted(BACKENDS['cpu'])}"
        )
    backend = BACKENDS[device.type][method]
    return backend, _import(backend, method)


def _announce(record: Quantization, full: int, held: int) -> None:
    logger.info(
        "quantized %d linear layers to %s with %s %s, %.1f MiB to %.1f MiB: %s",
        len(record.layers), record.method, record.backend, record.backend_version,
        full / 2**20, held / 2**20, grouped(record.layers),
    )  # fmt: skip
    kept: dict[str, list[str]] = {}
    for name, reason in record.kept.items():
        kept.setdefault(reason, []).append(name)
    for reason, names in kept.items():
        logger.info("kept %s in %s: %s", grouped(names), record.dtype, reason)


def grouped(names: Iterable[str]) -> str:
    """Join names of layers, of those that differ in nothing but numbers the pattern and the count.

    Of `a.0.b`, `a.1.b` and `c` that is `a.*.b ×2, c`.
    """
    alike: dict[str, list[list[str]]] = {}
    for name in names:
        parts = name.split(".")
        key = ".".join("*" if part.isdecimal() else part for part in parts)
        alike.setdefault(key, []).append(parts)
    return ", ".join(_pattern(group) for group in alike.values())


def _pattern(group: Sequence[Sequence[str]]) -> str:
    shared = (parts[0] if len(set(parts)) == 1 else "*" for parts in zip(*group, strict=True))
    return ".".join(shared) + (f" ×{len(group)}" if len(group) > 1 else "")


def _require_whole(module: nn.Module) -> None:
    for name, layer in module.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        if type(layer.weight) is not nn.Parameter or not layer.weight.is_floating_point():
            raise UserError(
                f"the weight of {name} is {type(layer.weight).__name__} of {layer.weight.dtype}, "
                "quantized before: load the model anew and quantize it once"
            )


def _dtype(module: nn.Module) -> DTypeName:
    dtypes = {p.dtype for p in module.parameters() if p.is_floating_point()}
    names: dict[torch.dtype, DTypeName] = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
    if len(dtypes) != 1 or not dtypes <= names.keys():
        raise UserError(
            f"a module of {sorted(map(str, dtypes))} cannot be quantized: load it in float32 or in "
            "bfloat16"
        )
    return names[dtypes.pop()]


def _chosen(
    module: nn.Module, backend: Backend, keep: Collection[str]
) -> tuple[list[str], dict[str, str]]:
    """Return the names of the layers to quantize, and of those kept with the reason."""
    tied = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    layers, kept = [], {}
    for name, layer in module.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        pattern = next((p for p in keep if fnmatchcase(name, p)), None)
        if pattern is not None:
            kept[name] = f"named by {pattern!r}"
        elif type(layer) is not nn.Linear:
            kept[name] = f"{type(layer).__name__} may read its weight in its own way"
        elif id(layer.weight) in tied:
            kept[name] = "shares its weight with an embedding"
        elif layer.in_features % backend.block:
            kept[name] = f"{layer.in_features} inputs are no multiple of {backend.block}"
        else:
            layers.append(name)
    return layers, kept


def _replace(
    module: nn.Module, name: str, backend: Backend, package: ModuleType, device: torch.device
) -> None:
    parent, _, child = name.rpartition(".")
    layer = module.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    quantized = backend.replace(package, layer, device).train(layer.training)
    quantized.weight.requires_grad_(False)
    setattr(module.get_submodule(parent), child, quantized)


def _check(
    module: nn.Module, layers: Collection[str], backend: Backend, method: QuantizationMethod
) -> None:
    for name in layers:
        layer = module.get_submodule(name)
        if not (isinstance(layer, nn.Linear) and backend.holds(layer)):
            raise UserError(
                f"{backend.package} {version(backend.package)} was asked to hold {name} in "
                f"{method} and left its weight as {type(layer.weight).__name__} of "
                f"{layer.weight.dtype}: install another version of it"
            )


def weight_bytes(layer: nn.Module) -> int:
    """Bytes that the weight of a linear layer takes, scales included."""
    weight: Any = layer.weight
    state: Any = getattr(weight, "quant_state", None)
    own = getattr(layer, "scale", None)
    scales = [getattr(weight, "SCB", None), state and state.absmax, own]
    return _stored(weight) + sum(x.nbytes for x in scales if isinstance(x, torch.Tensor))


def _stored(tensor: Any) -> int:
    """Bytes of a tensor, or of those that a subclass is made of."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        return int(tensor.nbytes)
    return sum(_stored(getattr(tensor, name)) for name in flatten()[0])


def _import(backend: Backend, method: QuantizationMethod) -> ModuleType:
    """Import what a backend needs; raises UserError with the pip command if it is missing."""
    try:
        with silenced():
            return importlib.import_module(backend.package)
    except ModuleNotFoundError as error:
        raise UserError(
            f"quantization to {method!r} needs the package {error.name!r}, which is not installed: "
            f"pip install 'foretell[{backend.extra}]'"
        ) from error


def _int8_torchao(_: ModuleType, layer: nn.Linear, device: torch.device) -> nn.Linear:
    quantization = importlib.import_module("torchao.quantization")
    layer.to(device)
    # What it would set for torch.compile is global, and nothing is compiled here.
    quantization.quantize_(layer, quantization.Int8WeightOnlyConfig(set_inductor_config=False))
    return layer


def _holds_int8_torchao(layer: nn.Linear) -> bool:
    held = getattr(layer.weight, "qdata", None)
    return held is not None and held.dtype == torch.int8 and held.shape == layer.weight.shape


def _int8_bitsandbytes(package: ModuleType, layer: nn.Linear, device: torch.device) -> nn.Linear:
    # It would say with every pass of every layer that inputs are rounded by way of float16.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    made: nn.Linear = _int8_class(package)(
        layer.in_features, layer.out_features, bias=layer.bias is not None,
        has_fp16_weights=False, threshold=OUTLIERS, device="meta",
    )  # fmt: skip
    weight = package.nn.Int8Params(
        layer.weight.detach(), requires_grad=False, has_fp16_weights=False
    )
    return _with(made, weight, layer, device)


@cache
def _int8_class(package: ModuleType) -> Callable[..., nn.Linear]:
    """Return the package's layer, given rows that lie one behind the other.

    Its kernel reads numbers as they lie, so that an input seen transposed, as diffusers' attention
    sees images, is multiplied in the wrong order without an error; and it knows three dimensions.
    """

    class Int8Linear(package.nn.Linear8bitLt):  # type: ignore[name-defined,misc]
        def forward(self, x: Tensor) -> Tensor:
            rows = x.reshape(-1, x.shape[-1]).contiguous()
            product: Tensor = super().forward(rows)
            return product.view(*x.shape[:-1], -1)

    return Int8Linear


def _holds_int8_bitsandbytes(layer: nn.Linear) -> bool:
    return layer.weight.dtype == torch.int8 and getattr(layer.weight, "SCB", None) is not None


def _nf4_bitsandbytes(package: ModuleType, layer: nn.Linear, device: torch.device) -> nn.Linear:
    made: Any = package.nn.Linear4bit(
        layer.in_features, layer.out_features, bias=layer.bias is not None,
        compute_dtype=layer.weight.dtype, quant_type="nf4", device="meta",
    )  # fmt: skip
    # On some processors it would pack weights anew when they are first used without gradients: the
    # numbers would depend on the processor, and from then on gradients would silently be none.
    made.support_avx512bf16_for_cpu = False
    weight = package.nn.Params4bit(
        layer.weight.detach(), requires_grad=False, quant_type="nf4", blocksize=NF4_BLOCK,
        compress_statistics=False,
    )  # fmt: skip
    return _with(made, weight, layer, device)


def _holds_nf4_bitsandbytes(layer: nn.Linear) -> bool:
    weight: Any = layer.weight
    state = getattr(weight, "quant_state", None)
    return (
        weight.dtype == torch.uint8
        and weight.numel() == layer.in_features * layer.out_features // 2
        and state is not None
        and state.quant_type == "nf4"
    )


class Float8Linear(nn.Linear):
    """A linear layer whose weight is held as float8 (e4m3) with a scale per output.

    It computes in the type of its input. The bytes are kept as whole numbers, as other packages do
    it: what moves a module to another type, or takes its own from a weight's, leaves them alone.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        whole = layer.weight.detach().float()
        largest = whole.abs().amax(dim=1, keepdim=True).clamp(min=1e-30)  # of a row of zeros
        scale = (largest / torch.finfo(FLOAT8).max).to(layer.weight.dtype)
        held = (whole / scale.float()).to(FLOAT8)
        self.weight = nn.Parameter(held.view(torch.uint8), requires_grad=False)
        self.bias = layer.bias
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply [..., in] to [..., out] in the type of `x`."""
        product: Tensor = _Float8Product.apply(x, self.weight, self.scale)
        return product if self.bias is None else product + self.bias.to(x.dtype)


class _Float8Product(torch.autograd.Function):
    """A product with a frozen weight that is widened anew on the way back, instead of kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return nn.functional.linear(x, _widened(weight, scale, x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        weight, scale = ctx.saved_tensors
        return gradient @ _widened(weight, scale, gradient.dtype), None, None


def _widened(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.view(FLOAT8).to(dtype) * scale.to(dtype)


def _float8(_: ModuleType, layer: nn.Linear, device: torch.device) -> nn.Linear:
    return Float8Linear(layer.to(device))


def _holds_float8(layer: nn.Linear) -> bool:
    return isinstance(layer, Float8Linear) and layer.weight.dtype == torch.uint8


def _with(made: nn.Linear, weight: Any, layer: nn.Linear, device: torch.device) -> nn.Linear:
    """Give a layer of bitsandbytes its weight, which is quantized on its way to the device."""
    made.weight = weight
    made.bias = layer.bias
    return made.to(device)


FLOAT8_BACKEND = Backend("torch", "", _float8, _holds_float8)
BACKENDS: dict[str, dict[QuantizationMethod, Backend]] = {
    "cpu": {
        "fp8": FLOAT8_BACKEND,
        "int8": Backend("torchao", "orpheus", _int8_torchao, _holds_int8_torchao),
        "int4": Backend(
            "bitsandbytes", "orpheus", _nf4_bitsandbytes, _holds_nf4_bitsandbytes, NF4_BLOCK
        ),
    },
    "cuda": {
        "fp8": FLOAT8_BACKEND,
        "int8": Backend("bitsandbytes", "orpheus", _int8_bitsandbytes, _holds_int8_bitsandbytes),
        "int4": Backend(
            "bitsandbytes", "orpheus", _nf4_bitsandbytes, _holds_nf4_bitsandbytes, NF4_BLOCK
        ),
    },
}
"""By kind of device and method; docs/quantization.md has the measurement that chose them."""


@dataclass(frozen=True)
class Quantized:
    """What was done to a model, and what it said of itself before."""

    record: Quantization
    fingerprint: str
    """Of the weights in the type that they were loaded in, before they were quantized."""
    architecture: Architecture
    """Of the model as it is without quantization: packed weights have other shapes."""


def quantize_family(
    family: Family, config: QuantizationConfig, *, device: str | torch.device
) -> Quantized:
    """Quantize the model of a family that was loaded on the CPU, as `quantize` does.

    What the family names in `full_precision` is kept too. Raises UserError where a name in
    `config.keep` is that of no layer.
    """
    require_layers(family.module, config.keep, "quantization.keep")
    before = family.fingerprint(), family.architecture()
    keep = (*family.full_precision, *config.keep)
    record = quantize(family.module, config.method, device=device, keep=keep)
    return Quantized(record, *before)


def require_layers(module: nn.Module, keep: Collection[str], setting: str) -> None:
    """Raise UserError where a name or pattern in `keep`, which `setting` gave, is no layer's."""
    names = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    unknown = [p for p in keep if not any(fnmatchcase(name, p) for name in names)]
    if unknown:
        raise UserError(
            f"{setting} names {unknown}, but no linear layer of the model is called so: its layers "
            f"are {grouped(names)}"
        )
