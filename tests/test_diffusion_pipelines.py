"""Diffusers' pipelines: what we ask of their networks and encoders is what they ask themselves.

Every pipeline is small, of random weights, and built offline. What stands against ours is always
the stock pipeline's own call, not a second reading of it.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from stages.diffusion.config import DenoiserConfig, DiffusionTeacher, LoraConfig
from stages.diffusion.facts import ConditionFacts, ImageFacts
from stages.errors import UserError
from stages.family import load_denoiser, load_image_encoder
from stages.silence import silenced

TEXTS = ["a red fox", "two cats, a dog and, at the back, a very small horse"]
HINT = "pip install 'foretell[diffusion]'"
CPU = torch.device("cpu")
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True, scope="module")
def _needed(require):
    require("diffusers", HINT)
    require("peft", HINT)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Return a tiny pipeline, its folder, its encoder and the facts of a dataset for it."""
    from stages.families.diffusion_tiny import save_tiny

    made = {}

    def make(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            pipeline = save_tiny(kind, folder)
            encoder = load_image_encoder().open(folder, device=CPU)
            facts = facts_for(encoder)
            made[kind] = SimpleNamespace(
                pipeline=pipeline, folder=folder, encoder=encoder, facts=facts
            )
        return made[kind]

    return make


def facts_for(encoder, **changed):
    conditions = dict(encoder.conditions)
    known = {
        "encoder": "tiny",
        "latent_channels": encoder.latent_channels,
        "downsample": encoder.downsample,
        "scaling": encoder.scaling,
        "shift": encoder.shift,
        "buckets": ((encoder.latent_channels, 16, 16), (encoder.latent_channels, 16, 8)),
        "conditions": conditions,
        "unconditional": "empty",
    }
    if not conditions:
        known |= {
            "conditions": {"class_labels": ConditionFacts(dtype="int64", shape=())},
            "classes": tuple(map(str, range(10))),
            "unconditional": "label",
            "buckets": ((encoder.latent_channels, 8, 8),),
        }
    return ImageFacts.model_validate(known | changed)


def pretrained(tiny_one, dtype=torch.float32, **settings):
    config = DiffusionTeacher(path=tiny_one.folder, **settings)
    return load_denoiser().pretrained(config, tiny_one.facts, device="cpu", dtype=dtype)


class Calls:
    """What a network was called with, tensors by name, and what it gave."""

    def __init__(self, network):
        self.inputs, self.outputs = [], []
        self._handles = [
            network.register_forward_pre_hook(self._before, with_kwargs=True),
            network.register_forward_hook(self._after),
        ]

    def _before(self, module, args, kwargs):
        names = ("sample", "timestep") if "UNet" in type(module).__name__ else ("hidden_states",)
        given = dict(zip(names, args, strict=False)) | kwargs
        added = given.pop("added_cond_kwargs", None) or {}
        batch = len(given[names[0]])
        given["timestep"] = given["timestep"].expand(batch).float()
        self.inputs.append({k: v for k, v in (given | added).items() if torch.is_tensor(v)})

    def _after(self, module, args, output):
        self.outputs.append(output[0] if isinstance(output, tuple) else output.sample)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for handle in self._handles:
            handle.remove()


def conditions_of(tiny_one, texts=TEXTS, dtype=torch.float32):
    rows = tiny_one.encoder.encode_texts(texts)
    return {name: torch.tensor(np.stack([row[name] for row in rows])).to(dtype) for name in rows[0]}


def call_stock(tiny_one, conditions, **options):
    """Let the stock pipeline make images of 32×32; return what its network was asked and gave."""
    pipeline = tiny_one.pipeline
    network = pipeline.components.get("unet") or pipeline.components["transformer"]
    with Calls(network) as calls, silenced():  # its own deprecated calls
        pipeline(
            **conditions, num_inference_steps=3, height=32, width=32, output_type="latent",
            generator=torch.Generator().manual_seed(0), **options,
        )  # fmt: skip
    return calls


GUIDANCE = {"sd15": {"guidance_scale": 1.0}, "sdxl": {"guidance_scale": 1.0}}
GUIDANCE |= {"sd3": {"guidance_scale": 1.0}, "flux": {"guidance_scale": 3.5}}


@pytest.mark.parametrize("kind", ["sd15", "sdxl", "sd3", "flux"])
def test_a_network_is_asked_what_its_stock_pipeline_asks(tiny, kind):
    from stages.families.diffusion_networks import unpack

    one = tiny(kind)
    conditions = conditions_of(one)
    stock = call_stock(one, conditions, **GUIDANCE[kind])
    denoiser = pretrained(one, embedded_guidance=3.5 if kind == "flux" else None)
    sizes = one.encoder.sizes((32, 32), (0, 0), (32, 32))
    assert (set(sizes) == {"time_ids"}) == (kind == "sdxl")
    told = {name: torch.tensor(value).expand(2, -1) for name, value in sizes.items()}
    times = one.pipeline.scheduler.timesteps
    assert len(stock.inputs) == 3
    assert 600 < times[0] <= 1000  # on the schedule's scale, whatever the network wants
    for t, inputs, output in zip(times, stock.inputs, stock.outputs, strict=True):
        x = inputs["sample"] if "sample" in inputs else inputs["hidden_states"]
        if kind == "flux":
            x, output = unpack(x, 16, 16), unpack(output, 16, 16)
        with Calls(denoiser.module) as ours, torch.no_grad():
            found = denoiser.predict(x, t.double().expand(2), {**conditions, **told})
        assert torch.equal(found, output)
        assert ours.inputs[0].keys() == inputs.keys()
        for name, value in inputs.items():
            assert torch.equal(ours.inputs[0][name], value), name


def test_labels_of_dit_are_asked_as_its_pipeline_asks_and_the_mean_is_taken(tiny):
    one = tiny("dit")
    with Calls(one.pipeline.transformer) as stock:
        one.pipeline(
            [3, 9], guidance_scale=1.0, num_inference_steps=2, output_type="np",
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
    denoiser = pretrained(one)
    inputs, output = stock.inputs[0], stock.outputs[0]
    x, labels = inputs["hidden_states"], inputs["class_labels"]
    found = answer(denoiser, (x, inputs["timestep"].double(), {"class_labels": labels}))
    assert output.shape[1] == 2 * x.shape[1]
    assert torch.equal(found, output[:, :4])
    none = {"class_labels": torch.tensor([10, 10])}  # the label after the last one
    denoiser.module.train()
    asked = (x, inputs["timestep"].double(), none)
    assert torch.equal(answer(denoiser, asked), answer(denoiser, asked))


@pytest.mark.parametrize("kind", ["sd15", "sdxl", "sd3", "flux"])
def test_captions_are_encoded_as_by_the_stock_pipeline(tiny, kind):
    one = tiny(kind)
    rows = one.encoder.encode_texts(TEXTS)
    assert {n: f.shape for n, f in one.encoder.conditions.items()} == {
        n: a.shape for n, a in rows[0].items()
    }
    given = {"prompt": TEXTS, "device": CPU}
    if kind == "sd15":
        given |= {"num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    if kind == "sd3":
        given |= {"prompt_2": None, "prompt_3": None}
    with torch.no_grad():
        found = one.pipeline.encode_prompt(**given)
    embeds, pooled = found[0], found[1] if kind == "flux" else (*found, None, None, None)[2]
    for i, row in enumerate(rows):
        assert row["prompt_embeds"].dtype == np.float16
        np.testing.assert_array_equal(row["prompt_embeds"], embeds[i].half().numpy())
        if kind != "sd15":
            np.testing.assert_array_equal(row["pooled_prompt_embeds"], pooled[i].half().numpy())
    assert not np.array_equal(rows[0]["prompt_embeds"], rows[1]["prompt_embeds"])
    assert all((zero == 0).all() for zero in one.encoder.zeros().values())


@pytest.mark.parametrize("kind", ["sdxl", "flux"])
def test_images_are_encoded_and_decoded_as_by_the_stock_pipeline(tiny, kind, tmp_path):
    one = tiny(kind)
    vae, encoder = one.pipeline.vae, one.encoder
    images = torch.rand(2, 3, 32, 24) * 2 - 1
    shift = vae.config.shift_factor or 0.0
    with torch.no_grad():
        posterior = vae.encode(images).latent_dist
        mode = (posterior.mode() - shift) * vae.config.scaling_factor
        torch.manual_seed(3)
        drawn = (posterior.sample() - shift) * vae.config.scaling_factor
    torch.manual_seed(3)
    noise = torch.randn(2, 4, 16, 12)
    assert torch.equal(encoder.encode_images(images, None), mode)
    torch.testing.assert_close(encoder.encode_images(images, noise), drawn)
    with Decoding(vae) as stock, silenced():
        one.pipeline(
            **conditions_of(one), num_inference_steps=1, height=32, width=32, output_type="pt",
            generator=torch.Generator().manual_seed(0), guidance_scale=1.0,
        )  # fmt: skip
    latents = (stock.given - shift) * vae.config.scaling_factor
    torch.testing.assert_close(encoder.decode(latents), stock.made.clamp(-1, 1))
    encoder.keep_decoder(tmp_path)
    kept = load_image_encoder().open(tmp_path, device=CPU)
    assert torch.equal(kept.decode(latents), encoder.decode(latents))
    assert not kept.conditions
    assert (kept.downsample, kept.latent_channels) == (2, 4)


class Decoding:
    def __init__(self, vae):
        self._vae, self._decode = vae, vae.decode

    def __enter__(self):
        def decode(given, **options):
            made = self._decode(given, **options)
            self.given, self.made = given, made[0]
            return made

        self._vae.decode = decode
        return self

    def __exit__(self, *_):
        del self._vae.decode


def test_encoders_are_quantized_by_name_and_unknown_names_are_refused(tiny, caplog):
    one = tiny("flux")
    opened = load_image_encoder().open
    with pytest.raises(UserError, match=r"\['transformer'\].*vae, text_encoder, text_encoder_2"):
        opened(one.folder, device=CPU, quantization={"transformer": "int8"})
    with caplog.at_level("INFO"):
        held = opened(one.folder, device=CPU, quantization={"text_encoder_2": "fp8"})
        rows = held.encode_texts(TEXTS)
    whole = one.encoder.encode_texts(TEXTS)
    assert "quantizing text_encoder_2" in caplog.text
    assert "SelfAttention.q" in caplog.text
    error = rows[0]["prompt_embeds"].astype(float) - whole[0]["prompt_embeds"]
    assert 1e-4 < np.square(error).mean() ** 0.5 < 0.1
    np.testing.assert_array_equal(rows[0]["pooled_prompt_embeds"], whole[0]["pooled_prompt_embeds"])
    held.free()


# ---------------------------------------------------------------------------------- adapters


def adapted(one, **settings):
    """A denoiser that begins as the pipeline's, with an adapter that is no longer zero."""
    lora = LoraConfig(**{"rank": 2, "alpha": 6.0} | settings.pop("adapter", {}))
    config = DenoiserConfig(pipeline=one.folder, adapter=lora, **settings)
    denoiser = load_denoiser().build(config, one.facts, seed=0, weights=one.folder)
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in denoiser.module.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return denoiser


def question(one, seed=1):
    random = torch.Generator().manual_seed(seed)
    conditions = {
        name: torch.randn(2, *facts.shape, generator=random)
        for name, facts in one.facts.conditions.items()
    }
    if one.encoder.sizes((1, 1), (0, 0), (1, 1)):
        conditions["time_ids"] = torch.tensor([[32.0, 32, 0, 0, 32, 32]] * 2)
    x = torch.randn(2, *one.facts.buckets[0], generator=random)
    return x, torch.tensor([10.0, 700.0], dtype=torch.float64), conditions


def answer(denoiser, asked, **options):
    with torch.no_grad():
        return denoiser.predict(*asked, **options)


@pytest.mark.parametrize("kind", ["sd15", "sdxl", "sd3", "flux"])
def test_a_saved_adapter_loads_in_stock_diffusers_and_does_the_same(tiny, kind, tmp_path):
    from stages.families.diffusion_tiny import tiny_pipeline

    one = tiny(kind)
    denoiser, asked = adapted(one), question(one)
    before = answer(pretrained(one), asked)
    expected = answer(denoiser, asked)
    assert (expected - before).abs().max() > 0.01
    denoiser.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "config.json",
        "pytorch_lora_weights.safetensors",
    ]
    pipeline = tiny_pipeline(kind)
    pipeline.load_lora_weights(tmp_path)
    network = pipeline.components.get("unet") or pipeline.components["transformer"]
    stock = pretrained(one)
    stock.module.load_state_dict(one_network(one).state_dict())
    stock.module = stock.network = network
    torch.testing.assert_close(answer(stock, asked), expected)
    again = load_denoiser().load(tmp_path, device="cpu", dtype=torch.float32)
    torch.testing.assert_close(answer(again, asked), expected)
    assert again.fingerprint() == denoiser.fingerprint() != pretrained(one).fingerprint()
    with again.adapter_off():
        assert torch.equal(answer(again, asked), before)
    torch.testing.assert_close(answer(again, asked), expected)
    # As a teacher's, with its update halved: of the weights, half the change and not a quarter.
    file = tmp_path / "pytorch_lora_weights.safetensors"
    half = pretrained(one, adapter=file, adapter_scale=0.5)
    whole = pretrained(one, adapter=file)
    torch.testing.assert_close(answer(whole, asked), expected)
    name = next(n for n, _ in whole.module.named_modules() if n.endswith("to_q"))
    update = half.module.get_submodule(name).get_delta_weight("default")
    torch.testing.assert_close(
        update, 0.5 * denoiser.module.get_submodule(name).get_delta_weight("default")
    )
    assert update.abs().max() > 0
    with half.adapter_off():
        assert torch.equal(answer(half, asked), before)
    assert not any(p.requires_grad for p in half.module.parameters())
    assert len({d.fingerprint() for d in (half, whole, pretrained(one))}) == 3


def one_network(one):
    return one.pipeline.components.get("unet") or one.pipeline.components["transformer"]


def test_a_lora_in_kohyas_format_is_the_teachers(tiny, tmp_path):
    one = tiny("sd15")
    random = torch.Generator().manual_seed(2)
    network = one_network(one)
    names = [n for n, m in network.named_modules() if n.endswith(("attn1.to_q", "attn2.to_v"))]
    tensors, updates = {}, {}
    for name in names:
        weight = network.get_submodule(name).weight
        up = torch.randn(weight.shape[0], 4, generator=random)
        down = torch.randn(4, weight.shape[1], generator=random)
        key = f"lora_unet_{name.replace('.', '_')}"
        tensors |= {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down}
        tensors[f"{key}.alpha"] = torch.tensor(1.0)
        updates[name] = 0.25 * up @ down
    tensors |= {
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight": torch.ones(32, 4),
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight": torch.ones(4, 32),
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj.alpha": torch.tensor(1.0),
    }
    file = tmp_path / "style.safetensors"
    save_file(tensors, file)
    teacher = pretrained(one, adapter=file, adapter_scale=0.5)
    for name, update in updates.items():
        found = teacher.module.get_submodule(name).get_delta_weight("default")
        torch.testing.assert_close(found, 0.5 * update)
    other = tmp_path / "other.safetensors"
    save_file({k.replace("attn1", "attn9"): v for k, v in tensors.items()}, other)
    with pytest.raises(UserError, match=r"other\.safetensors"):
        pretrained(one, adapter=other)
    with pytest.raises(UserError, match="no LoRA here"):
        pretrained(one, adapter=tmp_path / "absent.safetensors")


@pytest.mark.parametrize("method", ["int8", "int4", "fp8"])
def test_an_adapter_is_trained_in_float32_on_a_quantized_base(tiny, method, require):
    require({"int8": "torchao", "int4": "bitsandbytes", "fp8": "torch"}[method], HINT)
    one = tiny("flux")
    denoiser = adapted(
        one, base_quantization=method, base_precision="bf16", gradient_checkpointing=True
    )
    asked = question(one)
    trained = {n: p for n, p in denoiser.module.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in n and p.dtype == torch.float32 for n, p in trained.items())
    denoiser.module.train()
    denoiser.predict(*asked).float().square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained.values())
    whole = answer(adapted(one), asked)
    error = (answer(denoiser, asked).float() - whole).norm() / whole.norm()
    assert 1e-4 < error < 0.5
    assert denoiser.fingerprint() == adapted(one).fingerprint()
