"""Diffusers' pipelines: what we ask of their networks and encoders is what they ask themselves.

Every pipeline is small, of random weights, and built offline. What stands against ours is always
the stock pipeline's own call, not a second reading of it.
"""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from stages.diffusion.facts import ConditionFacts, ImageFacts
from stages.diffusion.model_config import DenoiserConfig, DiffusionTeacher, LoraConfig
from stages.errors import UserError
from stages.family import load_denoiser, load_image_encoder
from stages.silence import silenced

pytestmark = pytest.mark.slow

TEXTS = ["a red fox", "two cats, a dog and, at the back, a very small horse"]
HINT = "pip install 'foretell[diffusion]'"
CPU = torch.device("cpu")


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


def conditions_of(tiny_one, texts=TEXTS):
    rows = tiny_one.encoder.encode_texts(texts)
    return {name: torch.tensor(np.stack([row[name] for row in rows])).float() for name in rows[0]}


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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_network_is_asked_what_its_stock_pipeline_asks(tiny, kind, dtype):
    from stages.families.diffusion_networks import unpack
    from stages.families.diffusion_tiny import tiny_pipeline

    with silenced():
        pipeline = tiny_pipeline(kind).to(dtype)
    one = SimpleNamespace(**vars(tiny(kind)) | {"pipeline": pipeline})
    conditions = conditions_of(one)
    stock = call_stock(one, {n: c.to(dtype) for n, c in conditions.items()}, **GUIDANCE[kind])
    told = 3.5 if kind == "flux" else None
    denoiser = pretrained(one, dtype, embedded_guidance=told)
    sizes = one.encoder.sizes((32, 32), (0, 0), (32, 32))
    assert stock.outputs[0].dtype == dtype
    assert (set(sizes) == {"time_ids"}) == (kind == "sdxl")
    conditions |= {name: torch.tensor(value).expand(2, -1) for name, value in sizes.items()}
    times = one.pipeline.scheduler.timesteps
    assert len(stock.inputs) == 3
    assert 600 < times[0] <= 1000  # on the schedule's scale, whatever the network wants
    for t, inputs, output in zip(times, stock.inputs, stock.outputs, strict=True):
        given = inputs["sample"] if "sample" in inputs else inputs["hidden_states"]
        x = unpack(given, 16, 16) if kind == "flux" else given
        with Calls(denoiser.module) as ours, torch.no_grad():
            found = denoiser.predict(x, t.double().expand(2), conditions)
        assert torch.equal(found, unpack(output, 16, 16) if kind == "flux" else output)
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
    empty = one.encoder.encode_texts([""])[0]
    assert all(np.isfinite(array).all() and (array != 0).any() for array in empty.values())
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
    dora = tmp_path / "dora.safetensors"
    key = next(iter(tensors)).partition(".")[0]
    save_file(tensors | {f"{key}.dora_scale": torch.ones(1)}, dora)
    with pytest.raises(UserError, match=r"more than a LoRA.*dora_scale"):
        pretrained(one, adapter=dora)
    with pytest.raises(UserError, match="no LoRA here"):
        pretrained(one, adapter=tmp_path / "absent.safetensors")


def test_weights_of_a_pipeline_of_another_type_of_prediction_are_told_of(tiny, caplog):
    one = tiny("sd15")
    adapted(one)
    assert not caplog.records
    adapted(one, prediction="v_prediction")
    (record,) = caplog.records
    assert f"{one.folder} predicts 'epsilon', " in record.message
    assert "is to predict 'v_prediction'" in record.message


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
    for name in ("x_embedder", "proj_out", "time_text_embed.guidance_embedder.linear_1"):
        kept = denoiser.module.get_submodule(name).weight
        assert (type(kept), kept.dtype) == (torch.nn.Parameter, torch.bfloat16), name


def test_a_teacher_is_held_quantized_with_its_adapter_whole(tiny, tmp_path):
    from stages.diffusion.holding import quantize_denoiser

    one = tiny("sdxl")
    trained = adapted(one)
    trained.save(tmp_path)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    teacher = pretrained(one, dtype=torch.bfloat16, adapter=file)
    fingerprint, asked = teacher.fingerprint(), question(one)
    expected, whole = answer(trained, asked), answer(teacher, asked).float()
    assert (whole - expected).norm() / expected.norm() < 0.05
    with pytest.raises(UserError, match=r"rollout.keep names \['\*\.nothing'\]"):
        quantize_denoiser(teacher, "fp8", keep=["*.nothing"], device="cpu")
    record = quantize_denoiser(teacher, "fp8", keep=["*.attn1.to_k*"], device="cpu")
    assert (record.method, record.dtype, record.backend) == ("fp8", "bfloat16", "torch")
    assert not [n for n in record.layers if "lora" in n or "attn1.to_k" in n or "embedding" in n]
    assert any(n.endswith("attn2.to_q.base_layer") for n in record.layers)
    assert {"time_embedding.linear_1", "add_embedding.linear_2"} <= record.kept.keys()
    held = answer(teacher, asked).float()
    assert 1e-4 < (held - whole).norm() / whole.norm() < 0.1
    assert teacher.fingerprint() == fingerprint


# ------------------------------------------------------------------------------ other files


def test_what_cannot_be_read_is_refused_with_what_to_do(tiny, tiny_unconditional, tmp_path):
    from stages.families.diffusion_tiny import tiny_pipeline

    one = tiny("sd15")
    denoiser, encoder = load_denoiser(), load_image_encoder()

    def teach(path, facts=one.facts, **more):
        settings = DiffusionTeacher(path=path, **more)
        return denoiser.pretrained(settings, facts, device="cpu", dtype=torch.float32)

    pickled = tmp_path / "pickled"
    tiny_pipeline("sd15").save_pretrained(pickled, safe_serialization=False)
    with pytest.raises(UserError, match=r"only pickles.*diffusion_pytorch_model\.bin.*save_pretr"):
        teach(pickled)
    opened = encoder.open(pickled, device=CPU)
    with pytest.raises(UserError, match="only pickles"):
        opened.decode(torch.zeros(1, 4, 8, 8))
    checkpoint = tmp_path / "model.ckpt"
    checkpoint.write_bytes(b"")
    with pytest.raises(UserError, match=r"only \.safetensors is read"):
        teach(checkpoint)
    single = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(1)}, single)
    with pytest.raises(UserError, match="does not say its architecture"):
        teach(single)
    with pytest.raises(UserError, match="needs the folder with its configuration"):
        encoder.open(single, device=CPU)
    with pytest.raises(UserError, match=r"model\.safetensors"):
        teach(single, config=one.folder)
    with pytest.raises(UserError, match="has no autoencoder"):
        encoder.open(tiny_unconditional.folder, device=CPU)
    with pytest.raises(UserError, match="is not told a guidance number"):
        teach(one.folder, embedded_guidance=2.0)
    with pytest.raises(UserError, match="cross_attention_dim=64, and the dataset needs 32"):
        teach(tiny("sdxl").folder, one.facts.model_copy(update={"scaling": 0.13025}))
    with pytest.raises(UserError, match="no text encoders"):
        tiny("dit").encoder.encode_texts(["a"])


def test_a_teacher_of_other_latents_numbers_or_tensors_is_another(tiny, tmp_path):
    one, encoder = tiny("sd15"), load_image_encoder()

    def teach(path, facts=one.facts, **more):
        settings = DiffusionTeacher(path=path, **more)
        return load_denoiser().pretrained(settings, facts, device="cpu", dtype=torch.float32)

    flux = tiny("flux")
    told = [teach(flux.folder, flux.facts, embedded_guidance=number) for number in (2.0, 3.5, 3.5)]
    assert len({each.fingerprint() for each in told}) == 2, "what it is told makes another teacher"
    other = one.facts.model_copy(update={"scaling": 0.5})
    with pytest.raises(UserError, match=r"scaling_factor=0\.18215.*0\.5"):
        teach(one.folder, other)
    silent = tmp_path / "silent"
    shutil.copytree(one.folder, silent)
    config = json.loads((silent / "vae" / "config.json").read_text())
    del config["scaling_factor"]  # as in the first releases; diffusers takes 0.18215 then
    (silent / "vae" / "config.json").write_text(json.dumps(config))
    assert teach(silent).fingerprint() == teach(one.folder).fingerprint()
    with pytest.raises(UserError, match=r"scaling_factor=0\.18215.*0\.5"):
        teach(silent, other)
    for name in ("latents_mean", "latents_std"):
        (silent / "vae" / "config.json").write_text(json.dumps(config | {name: [0.5] * 4}))
        with pytest.raises(UserError, match="scales every channel by its own"):
            encoder.open(silent, device=CPU)
    moved = flux.facts.model_copy(update={"shift": 0.5})
    with pytest.raises(UserError, match=r"shift_factor=0\.1159.*0\.5"):
        teach(flux.folder, moved)
    shutil.copytree(one.folder / "unet", tmp_path / "more" / "unet")
    shutil.copy(one.folder / "model_index.json", tmp_path / "more")
    shutil.copytree(one.folder / "scheduler", tmp_path / "more" / "scheduler")
    file = tmp_path / "more" / "unet" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(file) | {"nose.weight": torch.zeros(1)}, file)
    with pytest.raises(UserError, match=r"nose\.weight are missing or unknown"):
        teach(tmp_path / "more")


def test_a_tokenizer_without_a_length_is_named(tmp_path):
    from stages.families.diffusion_tiny import save_tiny

    save_tiny("sd15", tmp_path)
    file = tmp_path / "tokenizer" / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    del settings["model_max_length"]
    file.write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"tokenizer_config\.json has model_max_length=None"):
        _ = load_image_encoder().open(tmp_path, device=CPU).conditions


def test_weights_in_half_precision_alone_are_found(tiny, tmp_path):
    from stages.families.diffusion_tiny import tiny_pipeline

    one = tiny("sd15")
    with silenced():  # it advises against what it is asked for
        tiny_pipeline("sd15").to(torch.float16).save_pretrained(tmp_path, variant="fp16")
    assert not (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").exists()
    half = load_denoiser().pretrained(
        DiffusionTeacher(path=tmp_path), one.facts, device="cpu", dtype=torch.float32
    )
    whole, found = answer(pretrained(one), question(one)), answer(half, question(one))
    assert 0 < (whole - found).norm() / whole.norm() < 0.01
    encoder = load_image_encoder().open(tmp_path, device=CPU)
    assert encoder.fingerprint() != one.encoder.fingerprint()
    rows, expected = encoder.encode_texts(TEXTS), one.encoder.encode_texts(TEXTS)
    np.testing.assert_allclose(rows[0]["prompt_embeds"], expected[0]["prompt_embeds"], atol=0.02)


@pytest.fixture(scope="module")
def single_file(tiny, tmp_path_factory):
    """Stable Diffusion's own single file: other names of the same tensors."""
    pipeline = tiny("sd15").pipeline
    tensors = {}
    for name, tensor in pipeline.unet.state_dict().items():
        tensors[f"model.diffusion_model.{original_unet(name)}"] = tensor
    for name, tensor in pipeline.vae.state_dict().items():
        own, shaped = original_vae(name, tensor)
        tensors[f"first_stage_model.{own}"] = shaped
    for name, tensor in pipeline.text_encoder.state_dict().items():
        tensors[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = (
            tensor
        )
    file = tmp_path_factory.mktemp("single") / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    return file


RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
OUTER = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip


def original_unet(name):
    """The name in Stable Diffusion's own code of a tensor of a UNet with one layer per block."""
    for ours, theirs in OUTER.items():
        if name.startswith(f"{ours}."):
            return name.replace(ours, theirs, 1)
    part, rest = name.split(".", 1)
    if part == "mid_block":
        kind, number, rest = rest.split(".", 2)
        place = f"middle_block.{1 if kind == 'attentions' else 2 * int(number)}"
    else:
        block, kind, number, rest = rest.split(".", 3)
        first = int(block) * 2 + int(number)
        if kind == "downsamplers":
            return f"input_blocks.{2 * (int(block) + 1)}.0.op.{rest.removeprefix('conv.')}"
        if kind == "upsamplers":
            return f"output_blocks.{2 * int(block) + 1}.{2 if block == '0' else 1}.{rest}"
        blocks = f"input_blocks.{first + 1}" if part == "down_blocks" else f"output_blocks.{first}"
        place = f"{blocks}.{0 if kind == 'resnets' else 1}"
    if kind == "resnets":
        inner, rest = rest.split(".", 1)
        rest = f"{RESNET[inner]}.{rest}"
    return f"{place}.{rest}"


def original_vae(name, tensor):
    """The name in Stable Diffusion's own code of a tensor of an autoencoder of two blocks."""
    attention = {
        "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out",
    }  # fmt: skip
    name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    if "mid_block.attentions.0" in name:
        for ours, theirs in attention.items():
            name = name.replace(f"attentions.0.{ours}", f"attn_1.{theirs}")
        tensor = tensor[:, :, None, None] if tensor.dim() == 2 else tensor
    name = name.replace("mid_block.resnets.0", "mid.block_1").replace(
        "mid_block.resnets.1", "mid.block_2"
    )
    name = name.replace("mid_block", "mid")
    for block in range(2):
        name = name.replace(f"down_blocks.{block}.resnets", f"down.{block}.block")
        name = name.replace(f"down_blocks.{block}.downsamplers.0", f"down.{block}.downsample")
        name = name.replace(f"up_blocks.{block}.resnets", f"up.{1 - block}.block")
        name = name.replace(f"up_blocks.{block}.upsamplers.0", f"up.{1 - block}.upsample")
    return name, tensor


def test_a_single_file_is_read_as_the_folder_is(tiny, single_file, tmp_path):
    one = tiny("sd15")
    settings = DiffusionTeacher(path=single_file, config=one.folder)
    teacher = load_denoiser().pretrained(settings, one.facts, device="cpu", dtype=torch.float32)
    asked = question(one)
    assert torch.equal(answer(teacher, asked), answer(pretrained(one), asked))
    assert teacher.schedule == pretrained(one).schedule
    encoder = load_image_encoder().open(single_file, config=one.folder, device=CPU)
    rows, expected = encoder.encode_texts(TEXTS), one.encoder.encode_texts(TEXTS)
    np.testing.assert_array_equal(rows[1]["prompt_embeds"], expected[1]["prompt_embeds"])
    latents = torch.randn(1, 4, 8, 8)
    assert torch.equal(encoder.decode(latents), one.encoder.decode(latents))
    encoder.keep_decoder(tmp_path)
    kept = load_image_encoder().open(tmp_path, device=CPU)
    assert torch.equal(kept.decode(latents), one.encoder.decode(latents))
    # A student begins as it, from the file, and its adapter finds the file again.
    lora = LoraConfig(rank=2)
    config = DenoiserConfig(pipeline=single_file, pipeline_config=one.folder, adapter=lora)
    student = load_denoiser().build(
        config, one.facts, seed=0, weights=single_file, weights_config=one.folder
    )
    student.save(tmp_path / "student")
    again = load_denoiser().load(tmp_path / "student", device="cpu", dtype=torch.float32)
    assert torch.equal(answer(again, asked), answer(teacher, asked))


def test_the_builder_of_tiny_pipelines_is_a_command(tmp_path, capsys):
    from typer.testing import CliRunner

    from stages.families import diffusion_tiny as command

    app = command.typer.Typer()
    app.command()(command.main)
    done = CliRunner().invoke(app, ["ddpm", str(tmp_path / "pipeline")])
    assert done.exit_code == 0
    assert "DDPMPipeline of unet, scheduler" in done.output
    refused = CliRunner().invoke(app, ["sd2", str(tmp_path / "other")])
    assert refused.exit_code == 2


def test_pixels_of_an_unconditional_pipeline_are_asked_as_it_asks(tiny_unconditional):
    one = tiny_unconditional
    with Calls(one.pipeline.unet) as stock, silenced():
        one.pipeline(
            batch_size=2, num_inference_steps=2, output_type="np",
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
    denoiser = pretrained(one)
    for inputs, output in zip(stock.inputs, stock.outputs, strict=True):
        found = answer(denoiser, (inputs["sample"], inputs["timestep"].double(), {}))
        assert torch.equal(found, output)


@pytest.fixture
def tiny_unconditional(tmp_path):
    from stages.families.diffusion_tiny import save_tiny

    facts = ImageFacts(
        encoder="pixels", latent_channels=3, downsample=1, scaling=1.0, buckets=((3, 16, 16),),
        conditions={}, unconditional="none",
    )  # fmt: skip
    return SimpleNamespace(pipeline=save_tiny("ddpm", tmp_path), folder=tmp_path, facts=facts)
