"""Previews: the teacher's images at fixed seeds, rendered once, and a student's beside them."""

from __future__ import annotations

import io
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from stages.diffusion import previews as previews_module
from stages.diffusion.model_config import DiffusionTeacher
from stages.diffusion.noise import normal
from stages.diffusion.previews import Previews, StudentGallery, grid, render
from stages.diffusion.record_config import AdapterContrast, ModelContrast, PreviewConfig
from stages.diffusion.schedule import Schedule
from stages.diffusion.train_config import StudentPreviews
from stages.errors import UserError
from tests.recorded import SHAPES, FakeDenoiser, by_hand, facts_of_images, images

CONFIG = PreviewConfig(samples=3, steps=4, split="train", seed=5)


@dataclass
class Grey:
    """A decoder of the first channel."""

    freed: int = 0
    sizes: list = field(default_factory=list)

    def decode(self, latents):
        self.sizes.append(tuple(latents.shape))
        return latents[:, :1]

    def free(self):
        self.freed += 1


class WithTables:
    """A dataset of images that is read from, with or without a decoder."""

    def __init__(self, path, decoder=None, **changes):
        self._images, self._decoder = images(path, ["teacher"] * 4, **changes), decoder
        self.facts, self.samples = self._images.facts, self._images.samples
        self.devices = []

    def table(self, name):
        from store.side_tables import SideTable

        return SideTable(self._images.path / "tables" / name, self._images.header.tables[name])

    def decoder(self, device):
        self.devices.append(device)
        return self._decoder


def solved(denoiser, noise, label, scale, steps=4, adapter=0.0):
    """The end of a trajectory of v predictions, by the formulas, in float64.

    `adapter` is what is added to every one of them.
    """
    schedule = Schedule(denoiser.schedule)
    times = schedule.solver_times(steps)
    levels = list(zip(*schedule.at(times), strict=True))
    x = noise.astype(np.float64)
    for t, (alpha, sigma), (alpha2, sigma2) in zip(times, levels, levels[1:], strict=False):
        cond, uncond = (by_hand(denoiser, x, t, each) for each in (label, 3))
        v = uncond + scale * (cond - uncond) + adapter
        x = alpha2 * (alpha * x - sigma * v) + sigma2 * (sigma * x + alpha * v)
    return x


def test_the_final_latents_are_those_of_the_guided_and_the_unguided_teacher(tmp_path):
    dataset, denoiser = WithTables(tmp_path / "images"), FakeDenoiser(facts_of_images())
    render(denoiser, dataset, CONFIG, 3.0, tmp_path / "previews")
    previews = Previews.read(tmp_path / "previews")
    assert previews.sample_ids == ("image/0", "image/1", "image/2")
    assert (previews.steps, previews.scale) == (4, 3.0)
    for number, sample_id in enumerate(previews.sample_ids):
        noise = normal(SHAPES[number % 2], "preview", 5, sample_id)
        np.testing.assert_array_equal(previews.noise[number], noise)
        label = int(previews.conditions[number]["class_labels"])
        assert label == number % 3
        for way, scale in (("guided", 3.0), ("unguided", 1.0)):
            expected = solved(denoiser, noise, label, scale)
            np.testing.assert_allclose(previews.latents[way][number], expected, atol=2e-4)
    assert not (tmp_path / "previews" / "grid.png").exists()


@pytest.mark.parametrize("unconditional", ["label", "none"])
def test_previews_of_an_adapter_lead_away_from_the_model_without_it(tmp_path, unconditional):
    facts = facts_of_images(unconditional=unconditional)
    dataset = WithTables(tmp_path / "images", facts=facts)
    denoiser = FakeDenoiser(facts, adapted=True)
    contrast = AdapterContrast(kind="adapter")
    render(denoiser, dataset, CONFIG, 3.0, tmp_path / "previews", contrast=contrast)
    previews = Previews.read(tmp_path / "previews")
    assert previews.scale == 3.0
    for number, noise in enumerate(previews.noise):
        label = int(previews.conditions[number]["class_labels"])
        for way, scale in (("guided", 3.0), ("unguided", 1.0)):
            expected = solved(denoiser, noise, label, 1.0, adapter=0.25 * scale)
            np.testing.assert_allclose(previews.latents[way][number], expected, atol=2e-4)
    assert denoiser.adapted


def test_of_two_models_the_teacher_alone_makes_previews(tmp_path):
    dataset, denoiser = WithTables(tmp_path / "images"), FakeDenoiser(facts_of_images())
    contrast = ModelContrast(kind="model", other=DiffusionTeacher(path="elsewhere"))
    render(denoiser, dataset, CONFIG, 3.0, tmp_path / "previews", contrast=contrast)
    previews = Previews.read(tmp_path / "previews")
    assert (list(previews.latents), previews.scale) == (["guided"], 1.0)
    for number, noise in enumerate(previews.noise):
        label = int(previews.conditions[number]["class_labels"])
        expected = solved(denoiser, noise, label, 1.0)
        np.testing.assert_allclose(previews.latents["guided"][number], expected, atol=2e-4)


def test_a_student_is_told_what_its_teacher_was(tmp_path):
    dataset = WithTables(tmp_path / "images")
    teacher = FakeDenoiser(dataset.facts, takes_scale=True, embedded_guidance=3.5)
    render(teacher, dataset, CONFIG, 1.0, tmp_path / "previews")
    previews = Previews.read(tmp_path / "previews")
    gallery = StudentGallery(previews, StudentPreviews(every=1), tmp_path / "student")
    student = Told(dataset.facts, takes_scale=True)
    student.module.eval()
    gallery.draw(student, 1)
    assert student.scales == {3.5}


def test_latents_are_decoded_where_the_teacher_was_and_it_is_away_meanwhile(tmp_path, monkeypatch):
    dataset = WithTables(tmp_path / "images", Grey())
    denoiser, places = FakeDenoiser(dataset.facts), []
    dataset._decoder.decode = lambda x: places.append(denoiser.module.gain.device.type) or x[:, :1]
    # A device on which nothing is computed stands for an accelerator.
    monkeypatch.setattr(previews_module, "_device", lambda _: torch.device("meta"))
    solution = np.zeros(SHAPES[0], np.float32)
    monkeypatch.setattr(previews_module, "_solved", lambda *_: solution)
    render(denoiser, dataset, CONFIG, 3.0, tmp_path / "previews")
    assert dataset.devices == ["meta"]
    assert places == ["cpu"] * 6
    assert denoiser.module.gain.device.type == "meta", "and back where it came from"


def test_they_are_rendered_once_and_another_rendering_is_equal(tmp_path):
    dataset = WithTables(tmp_path / "images", Grey())
    for name in ("one", "two"):
        render(FakeDenoiser(dataset.facts), dataset, CONFIG, 3.0, tmp_path / name)
    for file in ("latents.safetensors", "grid.png"):
        one, two = ((tmp_path / name / file).read_bytes() for name in ("one", "two"))
        assert one == two
    again = FakeDenoiser(dataset.facts, seed=3)
    render(again, dataset, CONFIG, 3.0, tmp_path / "one")
    assert not again.batches


def test_a_failure_leaves_nothing_behind(tmp_path):
    dataset = WithTables(tmp_path / "images", Grey())
    dataset._decoder.decode = lambda _: 1 / 0
    with pytest.raises(ZeroDivisionError):
        render(FakeDenoiser(dataset.facts), dataset, CONFIG, 3.0, tmp_path / "out" / "previews")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("why", ["scale", "told", "told nothing", "unconditional"])
def test_where_there_is_no_second_pass_there_is_one_way(tmp_path, why):
    facts = facts_of_images(unconditional="none") if why == "unconditional" else facts_of_images()
    dataset = WithTables(tmp_path / "images", facts=facts)
    number = 3.5 if why == "told" else None
    denoiser = FakeDenoiser(facts, takes_scale="told" in why, embedded_guidance=number)
    render(denoiser, dataset, CONFIG, 1.0 if why == "scale" else 3.0, tmp_path / "previews")
    previews = Previews.read(tmp_path / "previews")
    assert list(previews.latents) == ["guided"]
    assert previews.scale == (1.0 if number is None else number), "what a student is told"
    assert denoiser.batches == [1] * 4 * 3


def test_a_picture_has_a_row_for_each_way_and_a_cell_for_each_image():
    latents = {
        "guided": [np.full((2, 4, 3), -1.0, np.float32), np.full((2, 3, 4), 1.0, np.float32)],
        "unguided": [np.zeros((2, 4, 3), np.float32), np.full((2, 3, 4), -0.5, np.float32)],
    }
    decoder = Grey()
    sheet = np.asarray(Image.open(io.BytesIO(grid(latents, decoder))))
    assert sheet.shape == (2 * (88 + 2), 2 * (88 + 2)), "22 times as large: 3 pixels are 64 or more"
    assert (sheet[:88, :66] == 0).all()
    assert (sheet[:66, 90:178] == 255).all()
    assert (sheet[90:178, :66] == 128).all()
    assert (sheet[90:156, 90:178] == 64).all()
    assert (sheet[156:, 90:] == 255).all()
    assert decoder.freed == 1
    assert decoder.sizes == [(1, 2, 4, 3), (1, 2, 3, 4)] * 2


def test_a_split_without_samples_is_refused(tmp_path):
    dataset = WithTables(tmp_path / "images")
    config = CONFIG.model_copy(update={"split": "dev"})
    with pytest.raises(UserError, match=r"split 'dev' of rollout\.previews\.split has no"):
        render(FakeDenoiser(dataset.facts), dataset, config, 3.0, tmp_path / "previews")


class Told(FakeDenoiser):
    """Notes which scale it is told."""

    def __post_init__(self):
        super().__post_init__()
        self.scales = set()

    def predict(self, x, t, conditions, scale=None):
        self.scales.add(None if scale is None else scale.item())
        return super().predict(x, t, conditions, scale)


def test_a_student_draws_from_the_same_noise_in_one_pass_when_it_is_due(tmp_path):
    dataset = WithTables(tmp_path / "images")
    render(FakeDenoiser(dataset.facts), dataset, CONFIG, 3.0, tmp_path / "previews")
    previews = Previews.read(tmp_path / "previews")
    gallery = StudentGallery(previews, StudentPreviews(every=10), tmp_path / "student", Grey())
    student = Told(dataset.facts, seed=1)
    student.module.eval()
    for step in (0, 5, 10):
        gallery.draw(student, step)
    names = sorted(path.name for path in (tmp_path / "student").iterdir())
    stems = ("00000000", "00000010")
    assert names == [f"{stem}.{kind}" for stem in stems for kind in ("png", "safetensors")]
    found = load_file(tmp_path / "student" / "00000010.safetensors")
    for number in range(3):
        label = int(previews.conditions[number]["class_labels"])
        expected = solved(student, previews.noise[number], label, 1.0)
        np.testing.assert_allclose(found[str(number)], expected, atol=2e-4)
    assert set(student.batches) == {1}
    assert student.scales == {None}
    student.batches.clear()
    gallery.draw(student, 10)
    assert not student.batches


@pytest.mark.parametrize(("given", "told"), [(None, 3.0), (5.0, 5.0)])
def test_a_student_that_takes_a_scale_is_told_the_teacher_s_or_its_own(tmp_path, given, told):
    dataset = WithTables(tmp_path / "images")
    render(FakeDenoiser(dataset.facts), dataset, CONFIG, 3.0, tmp_path / "previews")
    config = StudentPreviews(every=1, guidance_scale=given)
    gallery = StudentGallery(Previews.read(tmp_path / "previews"), config, tmp_path / "student")
    student = Told(dataset.facts, takes_scale=True)
    student.module.eval()
    gallery.draw(student, 1)
    assert student.scales == {told}
    assert torch.is_inference_mode_enabled() is False
