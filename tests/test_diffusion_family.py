"""The family of diffusion models: networks that are built here, their files, their schedules."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stages.diffusion.facts import ConditionFacts, ImageFacts, ScheduleFacts
from stages.diffusion.model_config import DenoiserConfig, LoraConfig, ScheduleConfig
from stages.errors import UserError
from stages.family import load_denoiser
from stages.saved_model import is_saved, saved_family, saved_model

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
HINT = "pip install 'foretell[diffusion]'"
UNET = {
    "block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
}  # fmt: skip
TEXT_UNET = {
    "block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4,
    "attention_head_dim": 4, "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
}  # fmt: skip
DIT = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "patch_size": 2}
NETWORKS = {"UNet2DModel": UNET, "DiTTransformer2DModel": DIT}


@pytest.fixture(autouse=True, scope="module")
def _needed(require):
    require("diffusers", HINT)
    require("peft", HINT)


def facts(**changed):
    known = {
        "encoder": "pixels",
        "latent_channels": 1,
        "downsample": 1,
        "scaling": 1.0,
        "buckets": ((1, 8, 8),),
        "conditions": {"class_labels": ConditionFacts(dtype="int64", shape=())},
        "unconditional": "label",
        "classes": tuple("0123456789"),
    }
    return ImageFacts.model_validate(known | changed)


UNLABELLED = {"conditions": {}, "classes": (), "unconditional": "none"}
CAPTIONED = UNLABELLED | {
    "conditions": {"prompt_embeds": ConditionFacts(dtype="float16", shape=(5, 12))},
    "unconditional": "empty",
}


def config(network="UNet2DModel", settings=None, **more):
    settings = (NETWORKS | {"UNet2DConditionModel": TEXT_UNET})[network] | (settings or {})
    return DenoiserConfig(
        **{"network": network, "settings": settings, "schedule": ScheduleConfig()} | more
    )


def built(network="UNet2DModel", seed=0, known=None, weights=None, settings=None, **more):
    return load_denoiser().build(
        config(network, settings, **more), known or facts(), seed=seed, weights=weights
    )


def question(denoiser, rows=3):
    random = torch.Generator().manual_seed(5)
    conditions = {}
    if "class_labels" in denoiser.facts.conditions:
        conditions["class_labels"] = torch.tensor([1, 2, 10])[:rows]
    if "prompt_embeds" in denoiser.facts.conditions:
        conditions["prompt_embeds"] = torch.randn(rows, 5, 12, generator=random)
    x = torch.randn(rows, *denoiser.facts.buckets[0], generator=random)
    return x, torch.tensor([0.0, 20.0, 999.0], dtype=torch.float64)[:rows], conditions


def answer(denoiser, **options):
    with torch.no_grad():
        return denoiser.predict(*question(denoiser), **options)


def disturb(denoiser):
    """Move away from zero whatever begins there, as training would."""
    torch.manual_seed(11)
    with torch.no_grad():
        for parameter in denoiser.module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))


@pytest.mark.parametrize("network", NETWORKS)
def test_what_was_saved_loads_as_it_was_and_in_stock_diffusers_too(network, tmp_path):
    import diffusers

    denoiser = built(network)
    disturb(denoiser)
    denoiser.condition_dropout = 0.1
    expected, fingerprint = answer(denoiser), denoiser.fingerprint()
    assert not is_saved(tmp_path)
    denoiser.save(tmp_path)
    assert is_saved(tmp_path)
    again = load_denoiser().load(tmp_path, device="cpu", dtype=torch.float32)
    assert torch.equal(answer(again), expected)
    assert (again.fingerprint(), again.condition_dropout) == (fingerprint, 0.1)
    assert (again.config, again.facts, again.schedule) == (
        denoiser.config, denoiser.facts, denoiser.schedule,
    )  # fmt: skip
    half = load_denoiser().load(tmp_path, device="cpu", dtype=torch.bfloat16)
    assert answer(half).dtype == torch.bfloat16
    assert half.fingerprint() == fingerprint
    stock = getattr(diffusers, network).from_pretrained(tmp_path, local_files_only=True)
    x, t, conditions = question(denoiser)
    with torch.no_grad():
        found = stock(x, timestep=t.float(), **conditions).sample
    torch.testing.assert_close(found, expected)


def test_the_saved_folder_tells_what_it_holds(tmp_path):
    from pipeline.inspection import describe_model

    denoiser = built()
    denoiser.save(tmp_path)
    described = describe_model(tmp_path)
    assert (described["family"], described["finished"]) == ("diffusion", True)
    assert described["architecture"]["parameters"] == sum(
        parameter.numel() for parameter in denoiser.module.parameters()
    )
    assert described["facts"]["classes"] == list("0123456789")
    assert described["config"]["network"] == "UNet2DModel"
    assert saved_model(tmp_path).config == denoiser.config
    with pytest.raises(UserError, match="kind: diffusion"):
        saved_family(tmp_path)


def test_weights_belong_to_the_seed():
    assert torch.equal(answer(built(seed=3)), answer(built(seed=3)))
    assert built(seed=3).fingerprint() == built(seed=3).fingerprint()
    assert built(seed=3).fingerprint() != built(seed=4).fingerprint()


def test_a_student_begins_as_its_teacher_or_says_which_tensors_differ(tmp_path):
    teacher = built(seed=1)
    disturb(teacher)
    teacher.save(tmp_path)
    assert torch.equal(answer(built(seed=2, weights=tmp_path)), answer(teacher))
    with pytest.raises(UserError, match=r"conv_in\.weight has shape .*down_blocks\.0"):
        built(weights=tmp_path, settings={"block_out_channels": [4, 8]})
    with pytest.raises(UserError, match="is a UNet2DModel, and the model a DiTTransformer2DModel"):
        built("DiTTransformer2DModel", weights=tmp_path)
    with pytest.raises(UserError, match="does not exist here"):
        built(weights=tmp_path / "absent")


def test_a_student_of_another_type_than_its_first_weights_is_told_of_both(tmp_path, caplog):
    built(seed=1).save(tmp_path)
    built(weights=tmp_path)
    built(prediction="epsilon")
    assert not caplog.records, "of the same type, or of no weights that could be of another"
    student = built(weights=tmp_path, prediction="epsilon")
    student.save(tmp_path / "student")
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.message.startswith(
        f"{tmp_path} predicts 'v_prediction', and the student that begins with its weights is to "
        "predict 'epsilon': "
    )
    caplog.clear()
    built(weights=tmp_path / "student", prediction="epsilon")
    assert not caplog.records, "it has learned the other type"


@pytest.mark.parametrize("network", NETWORKS)
def test_training_drops_no_labels_by_itself(network):
    denoiser = built(network)
    denoiser.module.train()
    rows = 64  # of which DiT would drop a tenth
    x, t = torch.zeros(rows, 1, 8, 8), torch.full((rows,), 500.0, dtype=torch.float64)
    labels = {"class_labels": torch.full((rows,), 3)}
    with torch.no_grad():
        found = denoiser.predict(x, t, labels)
    torch.testing.assert_close(found, found[:1].expand_as(found))
    with torch.no_grad():
        none = denoiser.predict(x, t, {"class_labels": torch.full((rows,), 10)})
    assert not torch.equal(none, found)


def test_a_learned_variance_is_left_out(tmp_path):
    wide = built("DiTTransformer2DModel", settings={"out_channels": 2})
    x, t, conditions = question(wide)
    whole = wide.module(x, timestep=t.float(), **conditions).sample
    assert whole.shape[1] == 2
    assert torch.equal(wide.predict(x, t, conditions), whole[:, :1])


def test_a_network_without_labels_is_asked_without():
    known = facts(**UNLABELLED)
    denoiser = built(known=known)
    x, t, _ = question(denoiser)
    with torch.no_grad():
        assert torch.equal(denoiser.predict(x, t, {}), denoiser.module(x, t.float()).sample)
    assert denoiser.module.config.num_class_embeds is None


def test_a_learned_time_embedding_gets_whole_steps():
    settings = {"time_embedding_type": "learned", "num_train_timesteps": 1000}
    denoiser = built(settings=settings)
    x, t, conditions = question(denoiser)
    with torch.no_grad():
        expected = denoiser.module(x, t.long(), **conditions).sample
    assert torch.equal(answer(denoiser), expected)


@pytest.mark.parametrize(
    ("known", "network", "settings", "said"),
    [
        ({}, "UNet2DModel", {"num_class_embeds": 10}, "num_class_embeds=10.* needs 11"),
        ({}, "UNet2DModel", {"in_channels": 9}, "in_channels=9, and the dataset needs 1"),
        (UNLABELLED, "UNet2DModel", {"num_class_embeds": 5}, "wants labels"),
        ({"buckets": ((1, 7, 8),)}, "UNet2DModel", {}, "1×7×8 are no multiples of 2"),
        ({"buckets": ((1, 8, 4),)}, "DiTTransformer2DModel", {}, "not square"),
        (CAPTIONED, "UNet2DModel", {}, "reads no 'prompt_embeds'"),
        (CAPTIONED, "UNet2DConditionModel", {"cross_attention_dim": 8}, "needs 12"),
        ({}, "UNet2DModel", {"widths": 3}, r"\['widths'\], which UNet2DModel does not take"),
        ({}, "UNet2DModel", {"norm_num_groups": 5}, "model.settings of UNet2DModel cannot be"),
    ],
)
def test_a_network_that_does_not_fit_the_dataset_is_refused(known, network, settings, said):
    with pytest.raises(UserError, match=said):
        built(network, known=facts(**known), settings=settings)


# ---------------------------------------------------------------------------- the scale's input


def test_a_student_that_is_told_the_scale_begins_as_its_teacher_and_learns_to_hear_it(tmp_path):
    known = facts(**CAPTIONED)
    teacher = built("UNet2DConditionModel", known=known)
    disturb(teacher)
    teacher.save(tmp_path / "teacher")
    assert not teacher.takes_scale
    student = built(
        "UNet2DConditionModel", known=known, scale_input=True, weights=tmp_path / "teacher"
    )
    assert student.takes_scale
    seven, two = torch.full((3,), 7.0), torch.full((3,), 2.0)
    assert torch.equal(answer(student, scale=seven), answer(teacher))
    disturb(student)
    assert not torch.equal(answer(student, scale=seven), answer(student, scale=two))
    assert torch.equal(answer(student), answer(student, scale=torch.ones(3)))
    student.save(tmp_path / "student")
    again = load_denoiser().load(tmp_path / "student", device="cpu", dtype=torch.float32)
    assert torch.equal(answer(again, scale=two), answer(student, scale=two))


def test_the_scale_is_embedded_as_in_the_stock_pipeline():
    from diffusers import LatentConsistencyModelPipeline

    from stages.families.diffusion_networks import scale_embedding

    scales = torch.tensor([0.0, 0.5, 6.5])
    for features in (8, 9, 256):
        stock = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, scales, features)
        torch.testing.assert_close(scale_embedding(scales, features), stock)
    # What the stock pipeline is given is w = scale − 1, with which no guidance is 0.
    student, told = built("UNet2DConditionModel", known=facts(**CAPTIONED), scale_input=True), []
    student.module.time_embedding.cond_proj.register_forward_pre_hook(
        lambda _, given: told.append(given[0])
    )
    answer(student, scale=scales + 1)
    stock = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, scales, 256)
    torch.testing.assert_close(told[0], stock)


def test_networks_without_an_input_for_the_scale_say_so():
    with pytest.raises(UserError, match="UNet2DModel has no input for the guidance scale"):
        built(scale_input=True)
    with pytest.raises(UserError, match="no LoRA files of it"):
        built(adapter=LoraConfig())


# ------------------------------------------------------------------------------------ adapters


def adapted(weights, seed=0, **more):
    lora = LoraConfig(rank=2, alpha=3.0)
    return built(
        "UNet2DConditionModel", seed=seed, known=facts(**CAPTIONED), weights=weights, adapter=lora,
        **more,
    )  # fmt: skip


def test_an_adapter_on_a_base_that_lies_nowhere_takes_it_along(tmp_path, caplog):
    denoiser = adapted(None)
    disturb(denoiser)
    denoiser.save(tmp_path)
    assert (tmp_path / "base" / "diffusion_pytorch_model.safetensors").is_file()
    again = load_denoiser().load(tmp_path, device="cpu", dtype=torch.float32)
    torch.testing.assert_close(answer(again), answer(denoiser))
    assert again.fingerprint() == denoiser.fingerprint()
    assert saved_model(tmp_path).architecture.parts["adapter"] == sum(
        p.numel() for p in denoiser.module.parameters() if p.requires_grad
    )
    # A student of it begins as it is with its adapter: what it learned is part of the new base.
    next_one = adapted(tmp_path)
    assert not caplog.records
    adapted(tmp_path, prediction="sample")
    assert "predicts 'v_prediction', and the student" in caplog.text
    torch.testing.assert_close(answer(next_one), answer(denoiser))
    disturb(next_one)
    next_one.save(tmp_path / "next")
    third = load_denoiser().load(tmp_path / "next", device="cpu", dtype=torch.float32)
    torch.testing.assert_close(answer(third), answer(next_one))


def test_an_adapter_names_its_base_and_refuses_another(tmp_path):
    teacher = built("UNet2DConditionModel", known=facts(**CAPTIONED))
    teacher.save(tmp_path / "teacher")
    student = adapted(tmp_path / "teacher", scale_input=True)
    disturb(student)
    two = torch.full((3,), 2.0)
    assert not torch.equal(answer(student, scale=two), answer(student))
    student.save(tmp_path / "student")
    assert not (tmp_path / "student" / "base").exists()
    again = load_denoiser().load(tmp_path / "student", device="cpu", dtype=torch.float32)
    torch.testing.assert_close(answer(again, scale=two), answer(student, scale=two))
    with again.adapter_off():
        assert torch.equal(answer(again), answer(teacher))
    disturb(teacher)
    teacher.save(tmp_path / "teacher")
    with pytest.raises(UserError, match="whose weights are others"):
        load_denoiser().load(tmp_path / "student", device="cpu", dtype=torch.float32)
    (tmp_path / "teacher").rename(tmp_path / "gone")
    with pytest.raises(UserError, match="does not exist here"):
        load_denoiser().load(tmp_path / "student", device="cpu", dtype=torch.float32)


def test_an_adapter_alone_is_trained_and_begins_as_nothing(tmp_path):
    teacher = built("UNet2DConditionModel", known=facts(**CAPTIONED))
    teacher.save(tmp_path)
    student = adapted(tmp_path)
    assert torch.equal(answer(student), answer(teacher))
    trained = [n for n, p in student.module.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    with student.adapter_off():
        student.predict(*question(student))
    assert [n for n, p in student.module.named_parameters() if p.requires_grad] == trained
    with pytest.raises(UserError, match="no adapter"), teacher.adapter_off():
        pass
    with pytest.raises(UserError, match=r"\['to_qq'\], which no layer's name ends in"):
        built(
            "UNet2DConditionModel", known=facts(**CAPTIONED), adapter=LoraConfig(targets=("to_qq",))
        )


# ----------------------------------------------------------------------------------- schedules


def test_a_schedule_comes_from_the_settings_the_pipeline_or_the_store_in_this_order():
    own = built().schedule
    assert (own.kind, own.prediction, len(own.alphas_cumprod)) == ("ddpm", "v_prediction", 1000)
    store = own.model_copy(update={"prediction": "sample"})
    denoiser = load_denoiser()
    given = {"seed": 0, "schedule": store}
    assert denoiser.build(config(), facts(), **given).schedule == own
    assert denoiser.build(config(schedule=None), facts(), **given).schedule == store
    changed = denoiser.build(config(schedule=None, prediction="epsilon"), facts(), **given)
    assert changed.schedule.prediction == "epsilon"
    assert changed.schedule.scheduler["prediction_type"] == "epsilon"
    assert changed.schedule.alphas_cumprod == own.alphas_cumprod
    with pytest.raises(UserError, match="no noise schedule"):
        built(schedule=None)
    with pytest.raises(UserError, match=r"model\.prediction='flow'"):
        built(prediction="flow")


STABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("DDPMScheduler", {}),
        ("DDIMScheduler", STABLE | {"prediction_type": "v_prediction"}),
        ("DDIMScheduler", STABLE | {"rescale_betas_zero_snr": True}),
        ("PNDMScheduler", STABLE | {"skip_prk_steps": True}),
        ("EulerDiscreteScheduler", STABLE | {"timestep_spacing": "leading"}),
        ("DPMSolverMultistepScheduler", {"beta_schedule": "squaredcos_cap_v2"}),
        ("UniPCMultistepScheduler", {"trained_betas": [0.1, 0.2, 0.3], "num_train_timesteps": 3}),
    ],
)
def test_the_table_of_a_scheduler_is_its_own(name, settings, tmp_path):
    import diffusers

    from stages.families.diffusion_schedules import schedule_of

    scheduler = getattr(diffusers, name)(**settings)
    scheduler.save_pretrained(tmp_path)
    found = json.loads((tmp_path / "scheduler_config.json").read_text())
    schedule = schedule_of(found, tokens=4)
    table = scheduler.alphas_cumprod.double()
    assert torch.equal(torch.tensor(schedule.alphas_cumprod, dtype=torch.float64), table)
    assert schedule.prediction == settings.get("prediction_type", "epsilon")
    assert schedule.train_timesteps == len(table)
    if settings.get("rescale_betas_zero_snr"):
        assert schedule.alphas_cumprod[-1] == 0
    again = ScheduleFacts.model_validate_json(schedule.model_dump_json())
    assert again == schedule  # DPM's configuration holds an infinity, which JSON has not


@pytest.mark.parametrize(
    "settings",
    [
        {"shift": 3.0},
        {"use_dynamic_shifting": True},
        {"use_dynamic_shifting": True, "time_shift_type": "linear", "max_shift": 2.0},
        {"num_train_timesteps": 500},
    ],
)
def test_a_flow_is_shifted_as_its_scheduler_shifts(settings):
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    from stages.families.diffusion_schedules import schedule_of

    scheduler = FlowMatchEulerDiscreteScheduler(**settings)
    facts_ = schedule_of(
        dict(scheduler.config) | {"_class_name": type(scheduler).__name__}, tokens=1024
    )
    assert (facts_.kind, facts_.prediction) == ("flow", "flow")
    u = torch.linspace(1.0, 0.1, 10, dtype=torch.float64)
    mu = calculate_shift(1024, max_shift=settings.get("max_shift", 1.15))
    scheduler.set_timesteps(sigmas=u.numpy(), mu=mu)
    shifted = facts_.shift * u / (1 + (facts_.shift - 1) * u)
    torch.testing.assert_close(scheduler.sigmas[:-1].double(), shifted, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        scheduler.timesteps.double(), shifted * facts_.train_timesteps, rtol=1e-6, atol=0
    )


def test_a_scheduler_of_another_kind_is_refused():
    from stages.families.diffusion_schedules import schedule_of

    with pytest.raises(UserError, match="EDMEulerScheduler, whose noise is neither"):
        schedule_of({"_class_name": "EDMEulerScheduler"}, tokens=4)
    with pytest.raises(UserError, match="prediction_type='velocity'"):
        schedule_of({"_class_name": "DDIMScheduler", "prediction_type": "velocity"}, tokens=4)
    with pytest.raises(UserError, match="invert_sigmas"):
        schedule_of(
            {"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True}, tokens=4
        )


# ---------------------------------------------------------------------------------------- size


def test_flops_are_those_of_the_products_counted_by_hand():
    denoiser = built("DiTTransformer2DModel")
    width, tokens, blocks, patch = 16, 16, 2, 4
    frequencies = 256
    time = 2 * (frequencies * width + width * width)
    block = 2 * tokens * (4 * width * width + 2 * 4 * width * width)  # attention, feed-forward
    block += 2 * 2 * tokens * tokens * width  # what attends to what
    block += 2 * width * 6 * width + time  # what the time and the label modulate
    ends = 2 * tokens * 2 * patch * width + 2 * width * 2 * width + time
    assert denoiser.architecture().flops_per_timestep == blocks * block + ends


# ------------------------------------------------------------------------------------- packages


def test_stages_that_only_read_a_model_folder_load_no_diffusers(tmp_path):
    built().save(tmp_path)
    script = (
        "import sys; from pathlib import Path; from stages.saved_model import saved_model;"
        f"saved_model(Path({str(tmp_path)!r})); sys.exit('diffusers' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
