"""Weights of 8 and 4 bits on CUDA: what layers compute, what they take, and what the audit says."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stages.audit import audit, predictions
from stages.config import QuantizationConfig
from stages.quantization import BACKENDS, quantize, quantize_family, weight_bytes
from tests.test_codec_lm import family_of, samples_of
from tests.test_quantization import BITS, WIDE, Pair, rounded

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

METHODS = sorted(BACKENDS["cuda"])
TYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(autouse=True)
def _packages(require):
    require("bitsandbytes", "pip install 'foretell[orpheus]'")


def rounded_on_cuda(weight: torch.Tensor, method: str) -> torch.Tensor:
    """What a weight becomes there: 127 steps of int8, where the CPU's backend has 127.5."""
    if method != "int8":
        return rounded(weight, method)
    scale = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scale).round() * scale


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", TYPES)
def test_layers_multiply_by_the_rounded_weights_and_pass_gradients_through_them(method, dtype):
    module = Pair().to(dtype)
    full = {name: p.detach().clone() for name, p in module.named_parameters()}
    record = quantize(module, method, device="cuda")
    assert record.layers == ("up", "down")
    assert record.backend == BACKENDS["cuda"][method].package
    assert all(p.is_cuda for p in module.parameters())
    expected = Pair().to(dtype)
    with torch.no_grad():
        for name in record.layers:
            weight = rounded_on_cuda(full[f"{name}.weight"].float(), method)
            expected.get_submodule(name).weight.copy_(weight)
    inputs = torch.randn(5, 128).to(dtype)
    x, y = inputs.cuda().requires_grad_(), inputs.clone().requires_grad_()
    with torch.no_grad():
        module.eval()(x)  # an inference pass must not take the gradients of a later one away
    ours, theirs = module.train()(x), expected(y)
    assert ours.dtype == dtype
    ours.sum().backward()
    theirs.sum().backward()
    tolerance = 1e-3 if dtype == torch.float32 else 3e-2
    if method == "int8":
        tolerance = 3e-2  # whose inputs are rounded to 8 bits too
    for found, right in ((ours.detach(), theirs.detach()), (x.grad, y.grad)):
        atol = tolerance * float(right.abs().max())
        torch.testing.assert_close(found.cpu(), right, rtol=0, atol=atol)
    assert not any(module.get_submodule(name).weight.requires_grad for name in record.layers)


@pytest.mark.parametrize(
    ("method", "least", "most"), [("int8", 1e-3, 0.02), ("int4", 0.01, 0.2), ("fp8", 0.01, 0.05)]
)
@pytest.mark.parametrize("dtype", TYPES)
def test_a_quantized_layer_is_near_the_full_one_and_not_equal_to_it(method, least, most, dtype):
    torch.manual_seed(1)
    layer = nn.Sequential(nn.Linear(512, 256, bias=False)).to(dtype)
    x = torch.randn(64, 512)
    with torch.no_grad():
        before = nn.functional.linear(x, layer[0].weight.float())
        quantize(layer, method, device="cuda")
        found = layer(x.to("cuda", dtype)).float().cpu()
    assert least < float((found - before).norm() / before.norm()) < most


def laid_out(shape: str) -> torch.Tensor:
    """Rows of 128 numbers that do not lie one behind the other."""
    given = {"device": "cuda", "dtype": torch.bfloat16}
    if shape == "one row":
        return torch.randn(1, 128, 3, **given)[..., 0]
    whole = torch.randn(2, 128, 5, 3, **given)
    return {
        "transposed": whole[:1].flatten(2).transpose(1, 2),
        "many": whole.permute(0, 2, 3, 1),
        "expanded": whole[:1, :, :1, 0].transpose(1, 2).expand(4, 1, 128),
    }[shape]


@pytest.mark.parametrize("shape", ["one row", "transposed", "many", "expanded"])
@pytest.mark.parametrize("method", METHODS)
def test_how_an_input_lies_in_memory_makes_no_difference(method, shape):
    module = nn.Sequential(Pair().up).to(torch.bfloat16)
    quantize(module, method, device="cuda")
    x = laid_out(shape)
    assert not x.is_contiguous()
    with torch.no_grad():
        found, rows = module(x), module(x.reshape(-1, 128).contiguous())
    assert found.shape == (*x.shape[:-1], 64)
    torch.testing.assert_close(found.reshape(-1, 64), rows, rtol=0, atol=2e-2)


@pytest.mark.parametrize("method", ["fp8", "int4"])
def test_the_weights_are_those_that_the_cpu_rounds_to(method):
    """Not of int8, which another package holds there."""
    x, found = torch.eye(128), {}
    for device in ("cpu", "cuda"):
        layer = nn.Sequential(Pair().up)
        quantize(layer, method, device=device)
        with torch.no_grad():
            found[device] = layer(x.to(device)).cpu()
    assert (found["cpu"] - found["cuda"]).abs().gt(1e-5).float().mean() < 1e-3


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", TYPES)
def test_the_device_holds_the_bytes_of_the_bits_and_no_more(method, dtype):
    """The module comes from the CPU layer by layer, so it is never there whole either."""
    width, count = 2048, 8
    module = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(count))).to(dtype)
    full = width * width * dtype.itemsize
    quantize(nn.Sequential(nn.Linear(64, 64)), method, device="cuda")  # what a package keeps
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    quantize(module, method, device="cuda")
    held, peak = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
    told = sum(weight_bytes(layer) for layer in module)
    share = BITS[method] / (8 * dtype.itemsize)
    assert count * full * share <= held <= count * full * (share + 0.035)
    assert held == pytest.approx(told, rel=0.01)
    assert peak < held + 12 * width * width, "one layer in float32, and what it becomes"
    with torch.no_grad():
        module(torch.randn(4, width, device="cuda", dtype=dtype))
    assert torch.cuda.memory_allocated() - before < 1.1 * held + 40 * 2**20, "after a pass too"


@pytest.mark.parametrize("dtype", TYPES)
def test_fewer_bits_diverge_more_and_the_full_teacher_not_at_all(dtype):
    samples, found = samples_of(3), {}
    full = predictions(family_of(**WIDE), samples, 2.0)
    for method in (None, *METHODS):
        family = family_of(**WIDE)
        family.module.to(dtype)
        if method is None:
            family.module.cuda()
        else:
            quantize_family(family, QuantizationConfig(method=method), device="cuda")
        assert family.device.type == "cuda"
        found[method] = audit(family, samples, 2.0, full)
    if dtype == torch.float32:
        assert abs(found[None].kl_mean) < 1e-7
        assert found[None].agreement == 1
    assert found[None].kl_mean < min(found["int8"].kl_mean, found["fp8"].kl_mean)
    assert max(found["int8"].kl_mean, found["fp8"].kl_mean) < found["int4"].kl_mean < 1


@pytest.mark.parametrize("method", METHODS)
def test_a_quantized_module_goes_to_the_host_and_comes_back_the_same(method):
    """As a denoiser does while a decoder has its place."""
    module = Pair().to(torch.bfloat16)
    quantize(module, method, device="cuda")
    x = torch.randn(5, 128, device="cuda", dtype=torch.bfloat16)
    with torch.inference_mode():
        before = module(x)
        with torch.inference_mode(False):
            module.to("cpu")
            module.to("cuda")
        assert torch.equal(module(x), before)


@pytest.mark.parametrize("method", [None, "int8", "int4"])
def test_adapters_train_on_a_quantized_base(require, tmp_path, method):
    require("peft", "pip install 'foretell[orpheus]'")
    from stages.families import causal_lm_tiny
    from tests import test_causal_lm

    test_causal_lm.save(causal_lm_tiny, tmp_path, width=128, size=0.1)
    config = test_causal_lm.CausalLMConfig.model_validate(
        test_causal_lm.settings(tmp_path, lora={"rank": 4}, quantization=method)
    )
    family = test_causal_lm.load_family("causal_lm").build(
        config, test_causal_lm.FACTS, seed=0, device="cuda"
    )
    family.module.to("cuda")
    trained = [p for p in family.module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    samples, losses = test_causal_lm.samples_of(2), []
    lengths = torch.tensor([family.timesteps(sample) for sample in samples]).cuda()
    codes = nn.utils.rnn.pad_sequence(
        [family.reference_codes(sample) for sample in samples], batch_first=True
    ).cuda()
    for _ in range(8):
        logits = family.score(samples, codes, lengths).logits.float()
        loss = nn.functional.cross_entropy(logits.flatten(0, 2), codes.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
