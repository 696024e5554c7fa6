"""Quantized teachers: weights really are, what stays is said, the audit measures what it cost."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import warnings
import weakref
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from pipeline.inspection import describe_store
from pipeline.inspection_text import store_text
from pipeline.teachers import Teachers
from stages.audit import audit, audit_samples, predictions
from stages.config import QuantizationConfig, RolloutConfig
from stages.errors import UserError
from stages.family import Scores
from stages.interruption import StopRequest
from stages.quantization import (
    BACKENDS,
    Backend,
    quantize,
    quantize_family,
    require_layers,
    weight_bytes,
)
from stages.rollout import rollout
from stages.rollout_plan import create_store, lay_out
from store import PredictionStore, StoreError, verify
from store.schema import Latent
from tests.conftest import TINY_MODEL
from tests.test_codec_lm import family_of, samples_of

METHODS = {"int8": "torchao", "int4": "bitsandbytes", "fp8": "torch"}
OPTIONAL = {"int8": "torchao", "int4": "bitsandbytes"}
ERRORS = {"int8": 0.05, "int4": 0.4, "fp8": 0.1}
WIDE = {"d_model": 64, "heads": 4, "feed_forward": 128}
BITS = {"int8": 8, "int4": 4, "fp8": 8}


@pytest.fixture(autouse=True)
def _packages(require):
    for package in METHODS.values():
        require(package, "pip install 'foretell[orpheus]'")


def rounded(weight: torch.Tensor, method: str) -> torch.Tensor:
    """What a weight becomes, by formulas of our own: 8 bits per row, or nf4 in blocks of 64.

    A number of e4m3 has three bits after the first, and 2^-6 is the least whose first bit is one.
    """
    if method == "fp8":
        scale = weight.abs().amax(1, keepdim=True) / 448
        numbers = weight / scale
        step = 2.0 ** (torch.floor(torch.log2(numbers.abs())).clamp(min=-6) - 3)
        return (numbers / step).round() * step * scale
    if method == "int8":
        scale = weight.abs().amax(1, keepdim=True) / 127.5
        return (weight / scale).round().clamp(-128, 127) * scale
    # The quantiles of a normal distribution of QLoRA (2305.14314), appendix E.
    levels = torch.tensor(
        [-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0,
         0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]
    )  # fmt: skip
    blocks = weight.reshape(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    nearest = ((blocks / scale).unsqueeze(-1) - levels).abs().argmin(-1)
    return (levels[nearest] * scale).view_as(weight)


class Pair(nn.Module):
    """Two layers and a head; the head shares its weight with the embedding."""

    def __init__(self, inputs: int = 128) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(20, 32)
        self.up, self.down = nn.Linear(inputs, 64), nn.Linear(64, 32, bias=False)
        self.head = nn.Linear(32, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.down(self.up(x).tanh()))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_multiply_by_the_rounded_weights_and_pass_gradients_through_them(method, dtype):
    module = Pair().to(dtype)
    full = {name: p.detach().clone() for name, p in module.named_parameters()}
    record = quantize(module, method, device="cpu")
    assert record.layers == ("up", "down")
    assert record.kept == {"head": "shares its weight with an embedding"}
    assert (record.method, record.backend) == (method, METHODS[method])
    assert record.backend_version
    expected = Pair().to(dtype)
    with torch.no_grad():
        for name in record.layers:
            weight = rounded(full[f"{name}.weight"].float(), method)
            expected.get_submodule(name).weight.copy_(weight)
    inputs = torch.randn(5, 128).to(dtype)
    x, y = (inputs.clone().requires_grad_() for _ in range(2))
    with torch.no_grad():
        module.eval()(x)  # an inference pass must not take the gradients of a later one away
    ours, theirs = module.train()(x), expected(y)
    tolerance = 1e-3 if dtype == torch.float32 else 3e-2
    ours.sum().backward()
    theirs.sum().backward()
    assert x.grad is not None
    for found, right in ((ours.detach(), theirs.detach()), (x.grad, y.grad)):
        atol = tolerance * float(right.abs().max())
        torch.testing.assert_close(found, right, rtol=0, atol=atol)
    assert torch.equal(module.head.weight, full["embedding.weight"])
    quantized = [module.get_submodule(name).weight for name in record.layers]
    assert not any(weight.requires_grad for weight in quantized)


@pytest.mark.parametrize(
    ("method", "least", "most"), [("int8", 1e-4, 0.02), ("int4", 0.01, 0.2), ("fp8", 0.01, 0.05)]
)
def test_a_quantized_layer_is_near_the_full_one_and_not_equal_to_it(method, least, most):
    torch.manual_seed(1)
    layer = nn.Sequential(nn.Linear(512, 256, bias=False))
    x = torch.randn(64, 512)
    with torch.no_grad():
        before = layer(x)
        quantize(layer, method, device="cpu")
        error = float((layer(x) - before).norm() / before.norm())
    assert least < error < most


@pytest.mark.parametrize("method", METHODS)
def test_the_weights_take_the_bytes_of_their_bits(method):
    layer = nn.Sequential(nn.Linear(512, 512, bias=False))
    full = weight_bytes(layer[0])
    assert full == 512 * 512 * 4
    quantize(layer, method, device="cpu")
    held = weight_bytes(layer[0])
    bits = BITS[method]
    assert full * bits / 32 <= held <= full * (bits / 32 + 0.02)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                for t in inner_tensors(layer[0])}  # fmt: skip
    assert held == sum(storages.values()), "nothing else is held beside them"


def inner_tensors(layer: Any) -> list[torch.Tensor]:
    weight = layer.weight
    if hasattr(layer, "scale"):
        return [weight, layer.scale]
    if hasattr(weight, "__tensor_flatten__"):
        return [getattr(weight, name) for name in weight.__tensor_flatten__()[0]]
    return [weight, weight.quant_state.absmax]


def test_layers_that_do_not_fit_blocks_are_kept_with_the_reason():
    module = Pair(inputs=100)
    record = quantize(module, "int4", device="cpu")
    assert record.layers == ("down",)
    assert record.kept["up"] == "100 inputs are no multiple of 64"
    assert type(module.up) is nn.Linear
    assert quantize(Pair(inputs=100), "int8", device="cpu").layers == ("up", "down")


def test_names_and_patterns_keep_layers_and_subclasses_are_left_alone():
    class Own(nn.Linear):
        pass

    module = Pair()
    module.own = Own(64, 64)
    record = quantize(module, "int8", device="cpu", keep=("do*",))
    assert record.layers == ("up",)
    assert record.kept["down"] == "named by 'do*'"
    assert record.kept["own"] == "Own may read its weight in its own way"


@pytest.mark.parametrize("method", METHODS)
def test_what_cannot_be_quantized_is_refused(method):
    with pytest.raises(UserError, match="would leave every linear layer as it is"):
        quantize(Pair(), method, device="cpu", keep=("*",))
    with pytest.raises(UserError, match=r"device mps is not supported.*\['cpu', 'cuda'\]"):
        quantize(Pair(), method, device="mps")
    with pytest.raises(UserError, match="load it in float32 or in bfloat16"):
        quantize(Pair().half(), method, device="cpu")
    module = Pair()
    quantize(module, method, device="cpu")
    with pytest.raises(UserError, match=r"up is .* quantized before: load the model anew"):
        quantize(module, method, device="cpu")


@pytest.mark.parametrize("method", OPTIONAL)
def test_a_missing_package_is_named_with_the_command(method, monkeypatch):
    monkeypatch.setitem(sys.modules, OPTIONAL[method], None)
    message = rf"needs the package '{OPTIONAL[method]}'.*pip install 'foretell\[orpheus\]'"
    with pytest.raises(UserError, match=message):
        quantize(Pair(), method, device="cpu")


@pytest.mark.parametrize("method", METHODS)
def test_a_backend_that_leaves_a_layer_as_it_was_is_an_error(method, monkeypatch):
    def ignore(package: ModuleType, layer: nn.Linear, device: torch.device) -> nn.Linear:
        return layer

    real = BACKENDS["cpu"][method]
    lazy = Backend(real.package, real.extra, ignore, real.holds, real.block)
    monkeypatch.setitem(BACKENDS["cpu"], method, lazy)
    with pytest.raises(UserError, match=rf"asked to hold up in {method} and left its weight"):
        quantize(Pair(), method, device="cpu")


@pytest.mark.slow
def test_what_the_packages_say_of_themselves_does_not_reach_the_log():
    script = (
        "from torch import nn; from stages.quantization import quantize\n"
        "for method in ('int8', 'int4', 'fp8'):\n"
        "    quantize(nn.Sequential(nn.Linear(64, 64)), method, device='cpu')"
    )
    command = [sys.executable, "-W", "error", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "")


def test_the_layers_are_said(caplog):
    caplog.set_level(logging.INFO)
    quantize(Pair(), "int8", device="cpu")
    said = [record.message for record in caplog.records if record.name == "stages.quantization"]
    assert said[0].startswith("quantized 2 linear layers to int8 with torchao ")
    assert said[0].endswith(": up, down")
    assert said[1] == "kept head in float32: shares its weight with an embedding"


def test_layers_that_differ_in_numbers_alone_are_said_as_one_and_recorded_each(caplog):
    caplog.set_level(logging.INFO)
    blocks = [nn.ModuleDict({"up": nn.Linear(8, 8), "out": nn.ModuleList([nn.Linear(8, 8)])})
              for _ in range(12)]  # fmt: skip
    module = nn.ModuleDict({"blocks": nn.ModuleList(blocks), "in1": nn.Linear(8, 8)})
    module["in2"] = nn.Linear(8, 8)
    record = quantize(module, "fp8", device="cpu", keep=("blocks.1*.up", "blocks.7.up"))
    assert len(record.layers) == 8 + 12 + 2
    assert "blocks.11.out.0" in record.layers
    assert list(record.kept) == ["blocks.1.up", "blocks.7.up", "blocks.10.up", "blocks.11.up"]
    said = [record.message for record in caplog.records if record.name == "stages.quantization"]
    assert said[0].endswith("MiB: blocks.*.up ×8, blocks.*.out.0 ×12, in1, in2")
    assert said[1:] == [
        "kept blocks.*.up ×3 in float32: named by 'blocks.1*.up'",
        "kept blocks.7.up in float32: named by 'blocks.7.up'",
    ]
    with pytest.raises(UserError, match=r"keep names \['nose'\].* are blocks\.\*\.up ×12, blocks"):
        require_layers(module, ("nose", "in1"), "keep")


# LoRA on a quantized base


@pytest.fixture
def llama(require):
    require("peft", "pip install 'foretell[orpheus]'")
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=90, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
        )
    ).eval()  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_a_llama_keeps_its_tied_head_and_learns_adapters_on_a_frozen_base(llama, method):
    from peft import LoraConfig, get_peft_model

    ids = torch.randint(0, 90, (2, 7))
    with torch.no_grad():
        before = llama(ids).logits
        record = quantize(llama, method, device="cpu")
        after = llama(ids).logits
    assert record.kept == {"lm_head": "shares its weight with an embedding"}
    assert len(record.layers) == 14
    assert 1e-4 < float((after - before).norm() / before.norm()) < ERRORS[method]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft tells that such a base cannot be merged into
        adapted = get_peft_model(
            llama, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        )
    frozen = {n: stored_values(p) for n, p in adapted.named_parameters() if "lora_" not in n}
    adapters = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    assert len(adapters) == 8
    assert all("lora_" in name for name in adapters)
    optimizer = torch.optim.SGD(adapters.values(), lr=0.05)
    losses = []
    for _ in range(4):
        loss = nn.functional.cross_entropy(
            adapted.train()(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
        )
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in adapters.values())
        optimizer.step()
    assert losses[-1] < losses[0]
    for name, parameter in adapted.named_parameters():
        if name in frozen:
            assert torch.equal(stored_values(parameter), frozen[name]), name


def stored_values(parameter: Any) -> torch.Tensor:
    """The numbers that a parameter is stored as."""
    data = getattr(parameter, "qdata", parameter)
    return data.detach().clone()


@pytest.mark.parametrize("method", METHODS)
def test_adapters_are_never_merged_into_quantized_weights_without_a_word(llama, method):
    from peft import LoraConfig, get_peft_model

    quantize(llama, method, device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(llama, LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises((ValueError, RuntimeError)):
        adapted.merge_and_unload()


# Families


@pytest.mark.parametrize("method", METHODS)
def test_a_family_keeps_its_heads_and_what_it_said_of_itself(method):
    local = {"local_transformer": {"d_model": 64, "heads": 2}}
    family = family_of(**WIDE, **local, experts={"experts": 3, "active": 1})
    heads, said = family.head_weights(), (family.fingerprint(), family.architecture())
    quantized = quantize_family(family, QuantizationConfig(method=method), device="cpu")
    assert (quantized.fingerprint, quantized.architecture) == said
    after = family.head_weights()
    assert all(np.array_equal(heads[name], after[name]) for name in heads)
    kept = quantized.record.kept
    assert {"head", "decoder.0.feed_forward.router"} <= kept.keys()
    assert not any("head" in name or "router" in name for name in quantized.record.layers)
    assert {"local.read_hidden", "decoder.0.self_attention.qkv"} & set(quantized.record.layers)
    samples = samples_of(2)
    codes = nn.utils.rnn.pad_sequence([family.reference_codes(s) for s in samples], True)
    assert family.score(samples, codes, torch.tensor([4, 5])).logits.isfinite().all()


def test_a_pattern_that_is_no_layer_s_is_refused_with_the_names_of_the_layers():
    config = QuantizationConfig(method="int8", keep=("decoder.9.*",))
    with pytest.raises(UserError, match=r"'decoder\.9\.\*'.*no linear layer.*text_encoder"):
        quantize_family(family_of(**WIDE), config, device="cpu")


# The audit


def test_the_audit_is_the_divergence_between_full_and_quantized_teacher():
    samples, scale = samples_of(4), 2.5
    full = predictions(family_of(**WIDE), samples, scale)
    family = family_of(**WIDE)
    quantize_family(family, QuantizationConfig(method="int4"), device="cpu")
    found = audit(family, samples, scale, full)
    kl, agreed = [], []
    for sample in samples:
        ours, theirs = (logprobs(each, sample, scale) for each in (family_of(**WIDE), family))
        kl.append((np.exp(ours) * (ours - theirs)).sum(-1))
        agreed += (ours.argmax(-1) == theirs.argmax(-1)).flatten().tolist()
    together = np.concatenate([each.flatten() for each in kl])
    assert found.kl_mean == pytest.approx(together.mean(), rel=1e-4)
    assert found.kl_largest == pytest.approx(max(each.mean() for each in kl), rel=1e-4)
    assert found.kl_p99 == pytest.approx(np.quantile(together, 0.99), rel=1e-4)
    assert found.agreement == pytest.approx(np.mean(agreed))
    assert (found.samples, found.predictions) == (4, len(together))
    assert found.kl_mean > 1e-4
    assert found.mse is None


def logprobs(family, sample, scale: float) -> np.ndarray:
    """Guided log-probabilities [T, C, allowed ids], each branch scored by itself, in float64."""
    codes = family.reference_codes(sample).unsqueeze(0)
    branches = []
    for unconditional in (False, True):
        with torch.no_grad():
            scores = family.score(
                [sample], codes, torch.tensor([codes.shape[1]]),
                unconditional=torch.tensor([unconditional]),
            )  # fmt: skip
        branches.append(scores.logits[0].double().numpy())
    logits = np.delete(branches[1] + scale * (branches[0] - branches[1]), family.forbidden, -1)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_fewer_bits_diverge_more_and_the_full_teacher_not_at_all():
    samples = samples_of(3)
    full = predictions(family_of(**WIDE), samples, 2.0)
    found = {"none": audit(family_of(**WIDE), samples, 2.0, full)}
    for method in METHODS:
        family = family_of(**WIDE)
        quantize_family(family, QuantizationConfig(method=method), device="cpu")
        found[method] = audit(family, samples, 2.0, full)
    assert abs(found["none"].kl_mean) < 1e-7
    assert found["none"].agreement == 1
    assert 1e-7 < found["int8"].kl_mean < found["fp8"].kl_mean < found["int4"].kl_mean


def test_continuous_streams_are_audited_by_their_squared_error():
    class Field:
        streams = (Latent(name="noise", group="noise", shape=(2,)),)
        forbidden = ()

        def __init__(self, value: float) -> None:
            self.module, self.value = nn.Linear(1, 1), value

        def reference_codes(self, sample):
            return torch.zeros(sample["timesteps"], 1, dtype=torch.int64)

        def score(self, samples, codes, lengths, *, cfg_scale):
            return Scores(torch.full((1, codes.shape[1], 1, 2), self.value))

    samples = [{"sample_id": str(n), "timesteps": 1 + n} for n in range(3)]
    found = audit(Field(2.5), samples, 1.0, predictions(Field(2.0), samples, 1.0))
    assert (found.mse, found.mse_share) == pytest.approx((0.25, 0.0625))
    assert (found.samples, found.predictions, found.kl_mean, found.agreement) == (3, 6, None, None)


def test_the_audit_s_samples_are_spread_and_always_the_same():
    rows = [{"sample_id": str(n)} for n in range(10)]
    assert [row["sample_id"] for row in audit_samples(rows, 4, bool)] == ["0", "2", "5", "7"]
    assert audit_samples(rows, 20, bool) == rows
    assert audit_samples(rows, 0, bool) == audit_samples([], 8, bool) == []


def test_what_the_teacher_does_not_take_is_not_audited():
    rows = [{"sample_id": str(i)} for i in range(10)]
    taken = audit_samples(rows, 4, lambda row: row["sample_id"] not in "0789")
    assert [row["sample_id"] for row in taken] == ["1", "2", "5"]


# Stage one


@pytest.fixture(scope="module")
def wide_run(whole_run, tmp_path_factory):
    """A run with a teacher wide enough for blocks of 64, up to the point where it is fitted."""
    run = whole_run(tmp_path_factory.mktemp("wide"), teacher={"model": TINY_MODEL | WIDE})
    run.do("prepare", "fit")
    return run


@pytest.fixture
def quantized_run(wide_run, run_of, tiny_run):
    """Write the configuration of a rollout by the fitted teacher, with changes to the section."""

    def make(name: str = "own", **changes):
        section = tiny_run.document["rollout"] | changes
        return run_of(
            name, rollout=section, students=None, fit=None,
            dataset=str(wide_run.root / "dataset"),
            teacher={"checkpoint": str(wide_run.root / "teacher")},
        )  # fmt: skip

    return make


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_quantized_teacher_writes_a_store_that_says_so(quantized_run, method, caplog):
    caplog.set_level(logging.INFO)
    run = quantized_run(quantization={"method": method}, audit_samples=3)
    plain = quantized_run("plain")
    plain.do("rollout")
    run.do("rollout")
    said = [record.message for record in caplog.records]
    assert any(line.startswith("audit: KL from float32, over 3 recordings") for line in said)
    store = PredictionStore.open(run.root / "store")
    full = PredictionStore.open(plain.root / "store")
    assert verify(store.path).ok
    record = store.manifest.quantization
    assert full.manifest.quantization is None
    assert "quantization" not in json.loads((full.path / "manifest.json").read_text())
    assert (record.method, record.dtype, record.backend) == (method, "float32", METHODS[method])
    assert "decoder.0.feed_forward.up" in record.layers
    assert record.kept["head"] == "named by 'head'"
    assert record.audit.samples == 3
    assert 0 < record.audit.kl_mean <= record.audit.kl_largest
    assert store.manifest.fingerprints == full.manifest.fingerprints
    assert store.manifest.architecture == full.manifest.architecture
    assert store.fingerprint != full.fingerprint
    document = describe_store(store.path)
    assert document["quantization"] == record.model_dump(mode="json")
    text = store_text(document)
    assert METHODS[method] in text
    assert "decoder.0.feed_forward.up" in text
    assert "nats" in text


@pytest.mark.slow
def test_a_resumed_rollout_audits_no_second_time_and_ends_with_the_same_bytes(
    quantized_run, monkeypatch
):
    import shutil

    run = quantized_run(quantization={"method": "int4"}, audit_samples=2)
    run.do("rollout")
    store = run.root / "store"
    before = {p.relative_to(store): p.read_bytes() for p in store.rglob("*") if p.is_file()}
    shutil.rmtree(store / "shards" / "00001")
    monkeypatch.setattr("pipeline.teachers.predictions", None)
    monkeypatch.setattr("pipeline.teachers.audit", None)
    run.do("rollout")
    after = {p.relative_to(store): p.read_bytes() for p in store.rglob("*") if p.is_file()}
    assert after == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"quantization": None}, "quantization"),
        ({"quantization": {"method": "int8"}}, "quantization.backend"),
        ({"quantization": {"method": "int4", "keep": ["*.down"]}}, "quantization.layers"),
    ],
)
def test_a_store_of_another_quantization_is_refused_naming_what_differs(
    quantized_run, change, named
):
    quantized_run(quantization={"method": "int4"}, audit_samples=0).do("rollout")
    with pytest.raises(StoreError, match=named.replace(".", r"\.")):
        quantized_run(audit_samples=0, **change).do("rollout")


@pytest.mark.slow
def test_a_teacher_in_bfloat16_is_audited_when_that_is_asked_for(quantized_run):
    run = quantized_run(precision="bf16", audit_samples=2)
    run.do("rollout")
    record = PredictionStore.open(run.root / "store").manifest.quantization
    assert (record.method, record.dtype, record.layers) == ("none", "bfloat16", ())
    assert 0 < record.audit.kl_mean < 0.1
    text = store_text(describe_store(run.root / "store"))
    assert "weights and arithmetic in bfloat16" in text


@pytest.mark.slow
def test_two_processes_audit_once(quantized_run, start_worker):
    run = quantized_run(quantization={"method": "int8"}, audit_samples=2)
    workers = [start_worker("rollout", run, "--task", f"{task}/2") for task in range(2)]
    assert [worker.wait() for worker in workers] == [0, 0]
    said = "".join(worker.stderr.read_text() for worker in workers)
    assert said.count("audit: scoring") == 1
    assert PredictionStore.open(run.root / "store").missing() == []


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("source", ["teacher", "dataset"])
def test_scoring_a_stored_rollout_again_with_the_quantized_teacher_gives_what_was_stored(
    tmp_path, method, source
):
    family, samples = family_of(**WIDE), samples_of(3)
    quantized = quantize_family(family, QuantizationConfig(method=method), device="cpu")
    config = RolloutConfig.model_validate(
        {
            "source": source, "guidance": {"scale": 2.5},
            "sampler": {"temperature": 0.9, "min_timesteps": 2, "max_timesteps": 10},
            "target": {"kind": "full", "dtype": "float32"}, "rollouts_per_shard": 3,
            "batch_size": 2,
        }
    )  # fmt: skip
    store = create_store(
        tmp_path / "store",
        family,
        lay_out(
            config,
            family,
            samples,
            facts=family.facts,
            dataset_fingerprint="d",
            seed=4,
            quantized=quantized,
            quantization=quantized.record,
        ),
    )
    by_id = {sample["sample_id"]: sample for sample in samples}
    assert rollout(family, store, by_id, [0], batch_size=2, stop=StopRequest())
    store = PredictionStore.open(store.path)
    assert store.manifest.quantization == quantized.record
    again = family_of(**WIDE)
    quantize_family(again, QuantizationConfig(method=method), device="cpu")
    apart = []
    for sample_id, variation in store:
        stored = store[sample_id, variation]
        codes = torch.from_numpy(stored.codes.astype(np.int64))[None]
        for teacher in (again, family_of(**WIDE)):
            with torch.no_grad():
                logits = teacher.score(
                    [by_id[sample_id]], codes, torch.tensor([len(stored)]), cfg_scale=2.5
                ).logits[0]
            logits[..., list(teacher.forbidden)] = -torch.inf
            held = torch.from_numpy(stored.arrays["full.logits"].copy())
            difference = logits.softmax(-1) - held.softmax(-1)
            apart.append(float(difference.abs().max()))
    assert max(apart[::2]) < 1e-4, "the same quantized teacher"
    assert max(apart[1::2]) > 1e-3, "the unquantized one would be noticed"


@pytest.mark.slow
def test_the_evaluation_is_of_the_quantized_teacher_and_says_so(quantized_run, tiny_run):
    run = quantized_run(quantization={"method": "int4"}, audit_samples=0)
    document = run.document | {"evaluate": tiny_run.document["evaluate"]}
    run.path.write_text(yaml.safe_dump(document), encoding="utf-8")
    run.do("evaluate")
    reference = PredictionStore.open(run.root / "report" / "reference").manifest
    assert reference.quantization.method == "int4"
    assert reference.quantization.audit is None
    report = json.loads((run.root / "report" / "report.json").read_text())
    teacher = report["teacher_guided"]
    assert abs(teacher["paired_kl"]["value"]) < 1e-6, "it is its own reference"
    assert teacher["agreement"]["value"] > 0.999
    assert teacher["parameters"]["value"] == reference.architecture["parameters"]
    (said,) = [line for line in report["warnings"] if "int4" in line]
    assert f"{len(reference.quantization.layers)} of its linear layers" in said
    assert "bitsandbytes" in said


def test_what_cuda_takes_for_int8_is_held_in_int8():
    """As far as a machine without CUDA can tell: the package does it on the CPU too."""
    import bitsandbytes

    backend = BACKENDS["cuda"]["int8"]
    torch.manual_seed(0)
    layer = nn.Linear(128, 64).to(torch.bfloat16)
    x = torch.randn(8, 128, dtype=torch.bfloat16)
    with torch.no_grad():
        before = layer(x)
        assert not backend.holds(layer)
        held = backend.replace(bitsandbytes, layer, torch.device("cpu")).eval()
        assert backend.holds(held)
        assert weight_bytes(held) == 64 * 128 + 64 * 4
        error = float((held(x) - before).norm() / before.norm())
    assert 1e-4 < error < 0.03


@pytest.mark.slow
def test_the_full_and_the_quantized_teacher_are_never_in_memory_together(
    quantized_run, monkeypatch
):
    run = quantized_run(quantization={"method": "int8"}, audit_samples=1)
    load, loaded = Teachers.load, []

    def watched(self, *arguments):
        assert [each() for each in loaded] == [None] * len(loaded)
        family = load(self, *arguments)
        loaded.append(weakref.ref(family.module))
        return family

    monkeypatch.setattr(Teachers, "load", watched)
    run.do("rollout")
    assert len(loaded) == 2
