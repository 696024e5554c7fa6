"""Which package should hold a quantized teacher's weights on the CPU: one layer, several ways.

Every way multiplies as a decoding step does (1 and 16 rows) and as scoring and training do (512
rows, and those with the gradient of the input), on one thread, in turns with the unquantized layer.
Beside the time: the bytes of the weight, how far the output is from that in float32, and whether
the gradient is that of the quantized weight, also after a pass without gradients. The ways of
optimum-quanto are tried when they are named; the first use of `quanto_int4` compiles for a minute.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from measure import interleaved, report
from torch import Tensor, nn

from stages.quantization import BACKENDS, quantize, weight_bytes
from store.schema import QuantizationMethod

ROWS = (1, 16, 512)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Way = Callable[[nn.Linear], nn.Module]


def foretell(method: QuantizationMethod) -> Way:
    """The way that stage one takes."""

    def way(layer: nn.Linear) -> nn.Module:
        model = nn.Sequential(layer)
        quantize(model, method, device="cpu")
        return model[0]

    return way


def torchao_nf4(layer: nn.Linear) -> nn.Module:
    """The only 4 bits of torchao that are packed on a CPU and have gradients."""
    from torchao.quantization import to_nf4

    layer.weight = nn.Parameter(to_nf4(layer.weight.detach()), requires_grad=False)
    return layer


def bitsandbytes_int8(layer: nn.Linear) -> nn.Module:
    """What CUDA takes, on the CPU."""
    import bitsandbytes

    return BACKENDS["cuda"]["int8"].replace(bitsandbytes, layer, torch.device("cpu"))


def quanto(bits: int) -> Way:
    """optimum-quanto's weights."""

    def way(layer: nn.Linear) -> nn.Module:
        import optimum.quanto

        model = nn.Sequential(layer)
        weights = getattr(optimum.quanto, f"qint{bits}")
        optimum.quanto.quantize(model, weights=weights)
        optimum.quanto.freeze(model)
        return model[0]

    return way


WAYS: dict[str, Way] = {
    "torchao_int8": foretell("int8"),
    "bitsandbytes_int8": bitsandbytes_int8,
    "quanto_int8": quanto(8),
    "bitsandbytes_int4": foretell("int4"),
    "torchao_int4": torchao_nf4,
    "quanto_int4": quanto(4),
}


def apart(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference, as a share of the expected."""
    difference = found.detach().float() - expected.detach().float()
    return float(difference.norm() / expected.detach().float().norm())


def backward(layer: nn.Module, x: Tensor) -> Tensor:
    """Gradient of the summed output with respect to the input."""
    x = x.detach().requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None, "the layer gives its input no gradient"
    return x.grad


def inference(layer: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """A forward pass without gradients."""

    @torch.no_grad()
    def work() -> Tensor:
        output: Tensor = layer(x)
        return output

    return work


def build(ways: Sequence[str], weight: Tensor) -> dict[str, nn.Module]:
    """The layer with its weight in full, and one for every way."""
    layers: dict[str, nn.Module] = {}
    for name in ("full", *ways):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
        layers[name] = layer if name == "full" else WAYS[name](layer)
    return layers


def faults(layer: nn.Module, full: Tensor, inputs: Tensor, dtype: torch.dtype) -> dict[str, float]:
    """How far the output is from that in float32, and the gradient from that of the held weight."""
    x = inputs.to(dtype)
    error = apart(inference(layer, x)(), inputs @ full.T)
    held = inference(layer, torch.eye(full.shape[1], dtype=dtype))().float().T
    gradient = apart(backward(layer, x), torch.ones(len(x), len(full)) @ held)
    return {"error": error, "gradient_error": max(gradient, 1e-9)}


def slowdowns(layers: Mapping[str, nn.Module], x: Tensor, repeats: int) -> dict[str, float]:
    """Time of every way ÷ that of the full layer, by name of the way and of what was done."""
    found = {}
    for rows in ROWS:
        works = {name: inference(layer, x[:rows]) for name, layer in layers.items()}
        for name, turns in interleaved(works, "full", repeats).items():
            found[f"{name}:{rows}_rows"] = turns.slowdown
    trained = {name: partial(backward, layer, x) for name, layer in layers.items()}
    for name, turns in interleaved(trained, "full", repeats).items():
        found[f"{name}:{len(x)}_rows_gradient"] = turns.slowdown
    return found


def main() -> None:
    """Measure, print a table, and end with one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    default = [name for name in WAYS if not name.startswith("quanto")]
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=default)
    parser.add_argument("--inputs", type=int, default=3072)
    parser.add_argument("--outputs", type=int, default=3072)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="print the last line only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of the packages, at import and at first use

    torch.manual_seed(0)
    weight = torch.randn(options.outputs, options.inputs) / options.inputs**0.5
    inputs = torch.randn(max(ROWS), options.inputs)
    ratios: dict[str, float] = {}
    for dtype_name, dtype in DTYPES.items():
        layers = build(options.ways, weight.to(dtype))
        held = {name: weight_bytes(layer) for name, layer in layers.items()}
        slower = slowdowns(layers, inputs.to(dtype), options.repeats)
        for name in options.ways:
            found = {"bytes": held[name] / held["full"]}
            found |= faults(layers[name], weight, inputs, dtype)
            of_way = (each for each in slower if each.startswith(f"{name}:"))
            found |= {each.partition(":")[2]: slower[each] for each in of_way}
            ratios |= {f"{name}_{dtype_name}_{key}": value for key, value in found.items()}
    if not options.json:
        for name, ratio in ratios.items():
            print(f"{name:<55}{ratio:>12.4g}")
    report(__file__, ratios, packages=["torch", "torchao", "bitsandbytes"])


if __name__ == "__main__":
    main()
