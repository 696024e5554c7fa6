"""LoRA adapters: nothing at first, exact when merged, stock peft's files, best when truncated."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from stages.causal_lm_config import LoraConfig
from stages.errors import UserError
from stages.families.low_rank import Factors, truncate

pytestmark = pytest.mark.slow  # transformers and peft take seconds to import

VOCABULARY, WIDTH = 60, 16
ALL = LoraConfig(rank=4, alpha=8.0)
IDS = torch.arange(14).view(2, 7) * 3 % VOCABULARY
FINGERPRINT = "f" * 64


@pytest.fixture(scope="module")
def adapter(require):
    require("peft", "pip install 'foretell[orpheus]'")
    require("transformers", "pip install 'foretell[orpheus]'")
    from stages.families import causal_lm_adapter

    return causal_lm_adapter


def llama(seed: int = 0, **changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "max_position_embeddings": 32, "tie_word_embeddings": True,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**settings | changes)).eval()


def stock(**settings: Any) -> Any:
    """A trained adapter of peft's own making."""
    import peft

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*")
        config = peft.LoraConfig(task_type="CAUSAL_LM", **settings)
        return trained(peft.get_peft_model(llama(), config)).eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS).logits


@torch.no_grad()
def trained(model: Any) -> Any:
    """Let every adapter add something, as training would."""
    generator = torch.Generator().manual_seed(7)
    for name, x in model.named_parameters():
        if "lora_B" in name:
            x.copy_(0.3 * torch.randn(x.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def base(adapter, tmp_path_factory) -> Path:
    """A model as transformers saves it."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    llama().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved(adapter, base, tmp_path_factory):
    """The folder of a trained adapter, and the logits of its model."""
    folder = tmp_path_factory.mktemp("adapters") / "student"
    model = trained(adapter.attach(llama(), ALL, seed=3)).eval()
    adapter.save_adapter(model, folder, base_path=base, base_fingerprint=FINGERPRINT)
    return folder, logits(model)


def copied(saved: Any, tmp_path: Path, **changes: Any) -> Path:
    """A copy of the saved adapter whose configuration is changed; None leaves a key out."""
    config = json.loads((saved[0] / "adapter_config.json").read_text()) | changes
    kept = {name: value for name, value in config.items() if value is not None}
    (tmp_path / "adapter_config.json").write_text(json.dumps(kept))
    tensors = load_file(saved[0] / "adapter_model.safetensors")
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    return tmp_path


def load(adapter: Any, folder: Path, base: Path, model: Any = None, **more: Any) -> Any:
    given = {"base_path": base, "base_fingerprint": FINGERPRINT, "trainable": False} | more
    return adapter.load_adapter(model or llama(), folder, **given)


def test_a_fresh_adapter_changes_nothing_and_alone_is_trained(adapter):
    model = adapter.attach(llama(), ALL, seed=0)
    assert torch.equal(logits(model), logits(llama()))
    names = {name for name, x in model.named_parameters() if x.requires_grad}
    assert names == {name for name, _ in model.named_parameters() if ".lora_" in name}
    kv, ff = WIDTH // 2, 24
    by_hand = 4 * ((WIDTH + WIDTH) * 2 + (WIDTH + kv) * 2 + (WIDTH + ff) * 3) * 2
    assert adapter.trained_parameters(model) == by_hand


def test_what_is_drawn_belongs_to_the_seed_alone(adapter):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = adapter.attach(llama(), ALL, seed=5).state_dict()
    assert torch.equal(torch.get_rng_state(), before), "nobody else's draws move"
    torch.manual_seed(2)
    again = adapter.attach(llama(), ALL, seed=5).state_dict()
    other = adapter.attach(llama(), ALL, seed=6).state_dict()
    drawn = [name for name in first if "lora_A" in name]
    assert drawn
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in drawn)


@pytest.mark.parametrize("target", ["q_prj", "lm_head", "embed_tokens", "self_attn"])
def test_targets_must_name_linear_layers_inside_the_model(adapter, target):
    with pytest.raises(UserError) as caught:
        adapter.attach(llama(), LoraConfig(targets=("q_proj", target)), seed=0)
    message = str(caught.value)
    assert f"names {target!r}" in message
    assert "'down_proj', 'gate_proj', 'k_proj', 'o_proj', 'q_proj'" in message


def test_stock_peft_in_another_process_opens_what_is_saved(adapter, base, saved, tmp_path):
    folder, expected = saved
    script = (
        "import sys, torch; from transformers import AutoModelForCausalLM; from peft import "
        "PeftModel, AutoPeftModelForCausalLM\n"
        "base, folder, out = sys.argv[1:]\n"
        "ids = torch.arange(14).view(2, 7) * 3 % 60\n"
        "model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)\n"
        "by_name = AutoPeftModelForCausalLM.from_pretrained(folder)\n"
        "with torch.no_grad():\n"
        "    torch.save([m.eval()(input_ids=ids).logits for m in (model, by_name)], out)\n"
    )
    out = tmp_path / "logits.pt"
    command = [sys.executable, "-c", script, str(base), str(folder), str(out)]
    # From elsewhere: the base is found by its absolute path.
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ours, by_name = torch.load(out, weights_only=True)
    assert torch.equal(ours, expected)
    assert torch.equal(by_name, expected)


def test_a_relative_base_is_named_by_its_whole_path(adapter, base, tmp_path, monkeypatch):
    monkeypatch.chdir(base.parent)
    model = adapter.attach(llama(), ALL, seed=0)
    adapter.save_adapter(model, tmp_path, base_path=Path("tiny-llama"), base_fingerprint="0")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    assert config["target_modules"] == sorted(ALL.targets)


@pytest.mark.parametrize("trainable", [False, True])
def test_what_is_loaded_is_what_was_saved(adapter, base, saved, trainable):
    model = load(adapter, saved[0], base, trainable=trainable).eval()
    assert torch.equal(logits(model), saved[1])
    assert (adapter.trained_parameters(model) > 0) == trainable
    frozen = [n for n, x in model.named_parameters() if ".lora_" not in n and x.requires_grad]
    assert frozen == []


def test_saving_again_writes_the_same_bytes(adapter, base, saved, tmp_path):
    model = load(adapter, saved[0], base)
    adapter.save_adapter(model, tmp_path, base_path=base, base_fingerprint=FINGERPRINT)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / name).read_bytes() == (saved[0] / name).read_bytes()


def test_weights_that_cannot_be_written_leave_the_old_ones(
    adapter, base, saved, tmp_path, monkeypatch
):
    folder = copied(saved, tmp_path)
    before = (folder / "adapter_model.safetensors").read_bytes()

    def full(tensors: Any, path: Path, **_: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(adapter, "save_file", full)
    model = load(adapter, saved[0], base)
    with pytest.raises(OSError, match="disk full"):
        adapter.save_adapter(model, folder, base_path=base, base_fingerprint=FINGERPRINT)
    assert (folder / "adapter_model.safetensors").read_bytes() == before
    assert sorted(p.name for p in folder.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip


def test_an_adapter_that_peft_wrote_is_read(adapter, base, tmp_path):
    model = stock(
        r=4, lora_alpha=6, use_rslora=True, target_modules=r".*\.(q_proj|up_proj)",
        rank_pattern={"up_proj": 2}, alpha_pattern={"layers.1.self_attn.q_proj": 10},
    )  # fmt: skip
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(adapter, tmp_path, base).eval()), logits(model))


def test_merged_weights_predict_the_same(adapter, base, saved):
    merged = adapter.merge(load(adapter, saved[0], base))
    assert type(merged) is type(llama())
    assert merged.state_dict().keys() == llama().state_dict().keys()
    assert (logits(merged) - saved[1]).abs().max() < 1e-6
    assert (logits(llama()) - saved[1]).abs().max() > 1e-2, "control: the adapter does something"


BASES: dict[str, tuple[dict[str, Any], str]] = {
    "shallower": ({"num_hidden_layers": 1}, r"layers\.1\.self_attn\.q_proj\.lora_A.* is unknown"),
    "deeper": ({"num_hidden_layers": 3}, r"layers\.2\.mlp\.down_proj\.lora_B.* is missing"),
    "wider": (
        {"intermediate_size": 32},
        r"layers\.0\.mlp\.down_proj\.lora_A\.weight has shape \(4, 24\), not \(4, 32\)",
    ),
}


@pytest.mark.parametrize("name", BASES)
def test_an_adapter_of_other_shapes_is_refused(adapter, base, saved, name):
    changes, message = BASES[name]
    with pytest.raises(UserError, match=message):
        load(adapter, saved[0], base, llama(**changes))


def test_an_adapter_of_another_base_is_refused_by_fingerprint_first_and_else_by_name(
    adapter, base, saved, tmp_path
):
    with pytest.raises(UserError, match=rf"another base \(foretell's fingerprint {FINGERPRINT}"):
        load(adapter, saved[0], base, base_fingerprint="0" * 64)
    # What foretell wrote may lie anywhere.
    load(adapter, saved[0], Path("/elsewhere/renamed"))
    foreign = copied(saved, tmp_path)
    with pytest.raises(UserError, match=r"trained on '.*tiny-llama' \(base_model_name_or_path"):
        load(adapter, foreign, Path("/elsewhere/renamed"), base_fingerprint="0" * 64)
    load(adapter, foreign, base, base_fingerprint="0" * 64)
    copied(saved, tmp_path, base_model_name_or_path="a/b")
    load(adapter, foreign, Path("/hub/models--a--b/snapshots/1f2e"))
    copied(saved, tmp_path, base_model_name_or_path=None)
    load(adapter, foreign, Path("/elsewhere/renamed"))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, "use_dora is True"),
    "another type": ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
    "unknown key": ({"rank": 4}, "rank is an unknown key"),
    "trained bias": ({"bias": "all"}, "bias is 'all'"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\]"),
    "changed base": ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
    "no rank": ({"r": None}, "(?s)not the configuration of a LoRA adapter.*r\n"),
    "another rank": ({"r": 2}, r"lora_A\.weight has shape \(4, 16\), not \(2, 16\)"),
    "no such layer": ({"target_modules": ["c_attn"]}, "target_modules names 'c_attn'"),
    "no such pattern": ({"target_modules": ".*c_attn"}, "peft cannot adapt this model: .*c_attn"),
    "fewer layers": ({"target_modules": ["q_proj"]}, r"k_proj\.lora_A\.weight is unknown"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_plain_lora_of_this_model_is_refused(adapter, base, saved, name, tmp_path):
    changes, message = REFUSED[name]
    with pytest.raises(UserError, match=message):
        load(adapter, copied(saved, tmp_path, **changes), base)


def test_missing_pickled_and_damaged_adapters_are_refused(adapter, base, saved, tmp_path):
    with pytest.raises(UserError, match=r"adapter_config\.json does not exist"):
        load(adapter, tmp_path, base)
    folder = copied(saved, tmp_path)
    weights = folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-7])
    with pytest.raises(UserError, match=r"adapter_model\.safetensors cannot be read as safetens"):
        load(adapter, folder, base)
    weights.unlink()
    torch.save(load_file(saved[0] / "adapter_model.safetensors"), folder / "adapter_model.bin")
    with pytest.raises(UserError, match="save the adapter as safetensors"):
        load(adapter, folder, base)


def test_a_quantized_base_takes_an_adapter_but_no_merging(adapter, require, base, tmp_path):
    require("torchao", "pip install 'foretell[orpheus]'")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = llama()
    quantize_(model.model, Int8WeightOnlyConfig())
    alone = logits(model)
    adapted = adapter.attach(model, ALL, seed=0)
    assert torch.equal(logits(adapted), alone)
    trained(adapted)(input_ids=IDS).logits.sum().backward()
    assert all(x.grad is not None for x in adapted.parameters() if x.requires_grad)
    adapter.save_adapter(adapted, tmp_path, base_path=base, base_fingerprint=FINGERPRINT)
    after = logits(load(adapter, tmp_path, base).eval())
    assert (after - logits(adapted)).abs().max() < 0.05, "it fits the base before quantization too"
    with pytest.raises(UserError, match="load the base without quantization"):
        adapter.merge(adapted)


def product(model: Any) -> dict[str, np.ndarray]:
    """What the adapters add to every layer, formed whole in float64."""
    added = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A"):
            down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            whole = layer.scaling["default"] * (up.double() @ down.double())
            added[name] = whole.detach().numpy()
    return added


@pytest.mark.parametrize(("rank", "alpha"), [(1, 1.0), (2, 12.0), (3, 3.0)])
def test_a_lower_rank_is_the_best_that_numpy_finds(adapter, base, saved, rank, alpha):
    source = product(load(adapter, saved[0], base))
    student = adapter.attach(llama(), LoraConfig(rank=rank, alpha=alpha), seed=9)
    adapter.start_from(student, saved[0], base_path=base, base_fingerprint=FINGERPRINT)
    found = product(student)
    assert len(source) == 14
    for name, whole in source.items():
        left, singular, right = np.linalg.svd(whole)
        best = left[:, :rank] * singular[:rank] @ right[:rank]
        np.testing.assert_allclose(found[name], best, atol=1e-5)
        # Eckart and Young: no matrix of this rank is nearer than the singular values left out.
        error = np.linalg.norm(found[name] - whole)
        np.testing.assert_allclose(error, np.linalg.norm(singular[rank:]), atol=1e-5)
        assert np.linalg.norm(singular[rank:]) > 0.05, "control: something is lost"
    norms = {name: x.detach().norm() for name, x in student.named_parameters() if ".lora_" in name}
    for name in (name for name in norms if "lora_A" in name):
        assert torch.isclose(norms[name], norms[name.replace("lora_A", "lora_B")], rtol=1e-4)


def test_the_same_rank_is_the_same_change_at_another_alpha(adapter, base, saved):
    student = adapter.attach(llama(), LoraConfig(rank=4, alpha=20.0), seed=9)
    adapter.start_from(student, saved[0], base_path=base, base_fingerprint=FINGERPRINT)
    assert (logits(student.eval()) - saved[1]).abs().max() < 1e-6
    alike = adapter.attach(llama(), ALL, seed=9)
    adapter.start_from(alike, saved[0], base_path=base, base_fingerprint=FINGERPRINT)
    assert torch.equal(logits(alike.eval()), saved[1])


def test_layers_of_unequal_rank_and_scale_are_truncated_each_by_its_own(adapter, base, tmp_path):
    model = stock(
        r=6, lora_alpha=6, use_rslora=True, target_modules=["q_proj", "up_proj"],
        rank_pattern={"up_proj": 3}, alpha_pattern={"layers.1.self_attn.q_proj": 10},
    )  # fmt: skip
    model.save_pretrained(tmp_path)
    student = adapter.attach(llama(), LoraConfig(rank=2, alpha=5.0), seed=1)
    adapter.start_from(student, tmp_path, base_path=base, base_fingerprint="")
    found, source = product(student), product(model)
    assert len(source) == 4
    for name, whole in source.items():
        left, singular, right = np.linalg.svd(whole)
        best = left[:, :2] * singular[:2] @ right[:2]
        np.testing.assert_allclose(found[name], best, atol=1e-5)
    assert all(not added.any() for name, added in found.items() if name not in source)


def test_starting_from_an_adapter_that_does_not_fit_is_refused(adapter, base, saved):
    def start(config: LoraConfig, fingerprint: str = FINGERPRINT, **changes: Any) -> None:
        student = adapter.attach(llama(**changes), config, seed=0)
        adapter.start_from(student, saved[0], base_path=base, base_fingerprint=fingerprint)

    with pytest.raises(UserError, match=r"down_proj: the adapter has rank 4, and 5 is wanted"):
        start(LoraConfig(rank=5))
    with pytest.raises(UserError, match=r"adapts gate_proj, .*up_proj, .*add them to lora\.tar"):
        start(LoraConfig(rank=2, targets=("q_proj", "down_proj")))
    with pytest.raises(UserError, match="from 24 to 16 features, but the model's from 32 to 16"):
        start(LoraConfig(rank=2), intermediate_size=32)
    with pytest.raises(UserError, match="was trained on another base"):
        start(LoraConfig(rank=2), fingerprint="0")


def test_a_layer_narrower_than_the_rank_is_kept_whole():
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(8, 20, generator=generator), torch.randn(3, 8, generator=generator)
    found = truncate(Factors(down, up, 0.5), 6, 2.0)
    assert (found.down.shape, found.up.shape) == ((6, 20), (3, 6))
    torch.testing.assert_close(2.0 * found.up @ found.down, 0.5 * up @ down)
