"""Systems are compared on the same start noise; denoisers of one line tell what must come out."""

from __future__ import annotations

import dataclasses
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import nn

from stages.architecture import Architecture
from stages.diffusion.evaluate import evaluate_images, write_png
from stages.diffusion.facts import ConditionFacts, ImageFacts, ScheduleFacts
from stages.diffusion.generate import Gallery, ImageContender, items_of, to_look_at
from stages.diffusion.judge import DigitsJudge, require_digits
from stages.diffusion.noise import normal
from stages.diffusion.schedule import Schedule
from stages.diffusion.train_config import ImageEvaluateConfig
from stages.errors import UserError
from stages.interruption import StopRequest

pytestmark = pytest.mark.slow

FLOW = ScheduleFacts(kind="flow", prediction="flow", train_timesteps=1000)
SHARE = 0.25
"""Of x in what a `Painted` takes for the image."""


class Painted:
    """A flow model of one line: the image is its label times `contrast`, and a share of x.

    After one step from pure noise that is what it has drawn.
    """

    takes_scale = False
    schedule = FLOW

    def __init__(self, contrast=0.05, offset=0.0, adapter=0.0, calls=None):
        self.contrast, self.offset, self.adapter = contrast, offset, adapter
        self.module = nn.Linear(1, 1)
        self.told, self.calls = [], [] if calls is None else calls

    def architecture(self):
        return Architecture(
            parameters=2, parts={}, active_parameters=2,
            flops_per_timestep=7, dense_flops_per_timestep=7,
        )  # fmt: skip

    def predict(self, x, t, conditions, scale=None):
        assert not torch.is_grad_enabled()
        assert t.dtype == torch.float64
        self.told.append(scale)
        self.calls.append(len(x))
        label = conditions["class_labels"].float().reshape(-1, 1, 1, 1)
        image = self.contrast * label + self.offset + self.adapter
        sigma = (t / 1000).float().reshape(-1, 1, 1, 1)
        return (x - image - SHARE * x) / sigma

    @contextmanager
    def adapter_off(self):
        kept, self.adapter = self.adapter, 0.0
        yield
        self.adapter = kept


class Shown:
    """What decodes pixels: nothing is to be done."""

    def decode(self, latents):
        return latents


class Labelled:
    """A dataset of labelled pictures in memory: the label in grey, or what is given."""

    def __init__(self, count=4, classes=3, buckets=((1, 4, 4),), **splits):
        self.facts = ImageFacts(
            encoder="pixels", latent_channels=buckets[0][0], downsample=1, scaling=1.0,
            buckets=buckets, conditions={"class_labels": ConditionFacts(dtype="int64", shape=())},
            unconditional="label", classes=tuple("abcdefghij"[:classes]),
        )  # fmt: skip
        self.tables = {"conditions": [{"class_labels": np.int64(classes)}], "latents": []}
        for label in range(classes):
            self.tables["conditions"].append({"class_labels": np.int64(label)})
        self._samples = {
            split: [self._sample(f"{split}{i}", i, classes) for i in range(number)]
            for split, number in ({"test": count} | splits).items()
        }

    def _sample(self, name, index, classes):
        bucket = index % len(self.facts.buckets)
        self.tables["latents"].append(
            {"latent": np.full(self.facts.buckets[bucket], 0.1 * index, np.float16)}
        )
        label = index % classes
        return {
            "sample_id": name, "text": None, "label": label, "target": "teacher", "weight": 1.0,
            "bucket": bucket, "latents": [len(self.tables["latents"]) - 1],
            "conditions": [label + 1],
        }  # fmt: skip

    def samples(self, split):
        return self._samples.get(split, [])

    def table(self, name):
        return self.tables[name]

    def decoder(self, device):
        return Shown()

    def reference(self, sample_id):
        (sample,) = [
            s for rows in self._samples.values() for s in rows if s["sample_id"] == sample_id
        ]
        latent = self.tables["latents"][sample["latents"][0]]["latent"].astype(np.float64)
        return np.rint((latent.transpose(1, 2, 0).clip(-1, 1) + 1) * 127.5).astype(np.uint8)


def settings(**changes):
    return ImageEvaluateConfig.model_validate(
        {"samples": 6, "steps": [1], "images": 2, "bootstrap_draws": 100, "seed": 5} | changes
    )


def evaluated(folder, contenders, dataset=None, *, stop=None, identity="i", **changes):
    return evaluate_images(
        contenders,
        dataset or Labelled(),
        settings(**changes),
        folder,
        identity=identity,
        stop=stop or StopRequest(),
    )


def three(student=None, scale=3.0):
    return [
        ImageContender("teacher_guided", Painted, guidance_scale=scale),
        ImageContender("teacher_unguided", Painted),
        ImageContender("student", lambda: student or Painted(offset=0.5)),
    ]


def test_errors_are_to_the_guided_teacher_from_the_same_noise(tmp_path):
    found = evaluated(tmp_path, three(), samples=8)
    guided, unguided, student = found.systems.values()
    # Away from the null label 3 at scale 3: 0.05·(3·label − 2·3), against 0.05·label.
    labels = np.array([0, 1, 2, 0] * 2)
    assert guided.paired_mse.value == guided.paired_mse.low == guided.paired_mse.high == 0
    assert guided.frechet_to_guided.value == pytest.approx(0, abs=1e-12)
    squares = (0.05 * (3 * labels - 6) - 0.05 * labels) ** 2
    assert unguided.paired_mse.value == pytest.approx(squares.mean(), rel=1e-5)
    assert unguided.paired_mse.low < squares.mean() < unguided.paired_mse.high
    squares = (0.05 * (3 * labels - 6) - 0.05 * labels - 0.5) ** 2
    assert student.paired_mse.value == pytest.approx(squares.mean(), rel=1e-5)
    assert [s.passes.value for s in found.systems.values()] == [2, 1, 1]
    assert [s.parameters.value for s in found.systems.values()] == [2, 2, 2]
    assert all(s.seconds_per_image.value > 0 for s in found.systems.values())
    assert found.samples == 8
    assert found.conditions == 3
    pairs = {(c.system, c.against): c.difference for c in found.comparisons}
    difference = pairs["student", "teacher_unguided"]
    expected = student.paired_mse.value - unguided.paired_mse.value
    assert difference.value == pytest.approx(expected)
    assert difference.low <= difference.value <= difference.high


def euler(steps, label, index, scale, offset=0.0):
    """Latents after every step, solved by hand: x += (sigma' - sigma) v."""
    sigmas = Schedule(FLOW).solver_times(steps) / 1000
    x = normal((1, 4, 4), "start", 5, index).astype(np.float64)
    for sigma, following in pairwise(sigmas):
        towards, away = (0.05 * shown + offset + SHARE * x for shown in (label, 3))
        image = scale * towards + (1 - scale) * away
        x = x + (following - sigma) * (x - image) / sigma
        yield x


@pytest.mark.parametrize("batch_size", [2, 64])
def test_the_error_by_solver_step_is_that_of_latents_solved_by_hand(tmp_path, batch_size):
    found = evaluated(tmp_path, three(), steps=[12, 2], samples=6, batch_size=batch_size)
    path = found.images.path
    assert path.images == 6
    assert path.steps == (1, 3, 4, 6, 7, 9, 10, 12)
    assert all(value.value == value.high == 0 for value in path.systems["teacher_guided"])
    errors = [
        [((a - b) ** 2).mean() for a, b in zip(*both, strict=True)]
        for index, label in enumerate([0, 1, 2, 0, 0, 1])
        for both in [(euler(12, label, index, 1.0, 0.5), euler(12, label, index, 3.0))]
    ]
    expected = np.mean(errors, 0)[[step - 1 for step in path.steps]]
    values = path.systems["student"]
    assert [value.value for value in values] == pytest.approx(expected, rel=1e-4)
    assert values[-1].value == pytest.approx(found.systems["student"].paired_mse.value, rel=1e-12)
    assert all(value.low <= value.value <= value.high for value in values)


def test_without_a_guided_teacher_there_is_no_error_by_step(tmp_path):
    assert evaluated(tmp_path, three()[1:]).images.path is None


def test_batches_of_another_version_are_drawn_again(tmp_path):
    first = evaluated(tmp_path, three())
    batch = tmp_path / "systems" / "student" / "steps_1" / "00000.safetensors"
    with safe_open(batch, "np") as file:
        latents = {str(i): file.get_tensor(f"latent.{i}") for i in range(6)}
    save_file(latents, batch, metadata={"seconds": "0.1"})
    again = evaluated(tmp_path, three())
    assert again.images.path == first.images.path
    assert again.systems["student"].paired_mse == first.systems["student"].paired_mse


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_the_noise_of_an_image_has_a_key_of_its_own_whatever_the_batch(tmp_path, batch_size):
    evaluated(tmp_path, three(), batch_size=batch_size)
    latents = Gallery(tmp_path / "systems" / "teacher_unguided").latents(1)
    for index, (latent, label) in enumerate(zip(latents, [0, 1, 2, 0, 0, 1], strict=True)):
        noise = normal((1, 4, 4), "start", 5, index)
        np.testing.assert_allclose(latent, 0.05 * label + SHARE * noise, atol=1e-6)


@pytest.mark.slow
def test_an_interrupted_evaluation_goes_on_where_it_was_and_ends_as_one_that_was_not(tmp_path):
    whole = evaluated(tmp_path / "whole", three(), batch_size=2)
    calls, stop = [], StopRequest()

    class Stopping(Painted):
        def predict(self, *arguments):
            stop.requested = len(self.calls) == 2  # the warm-up, and the first batch
            return super().predict(*arguments)

    first, *others = three()
    broken = dataclasses.replace(first, load=lambda: Stopping(calls=calls))
    assert evaluated(tmp_path / "b", [broken, *others], stop=stop, batch_size=2) is None
    drawn = sorted((tmp_path / "b").rglob("*.safetensors"))
    before = [path.stat().st_mtime_ns for path in drawn]
    assert len(drawn) == 2  # the batch that was begun is finished

    again = []
    resumed = dataclasses.replace(first, load=lambda: Painted(calls=again))
    found = evaluated(tmp_path / "b", [resumed, *others], batch_size=2)
    assert [path.stat().st_mtime_ns for path in drawn] == before
    assert again == [4, 4]  # a warm-up and the third batch, two images with and without condition

    def timeless(evaluation):
        systems = evaluation.systems.items()
        return {n: s.model_copy(update={"seconds_per_image": None}) for n, s in systems}

    assert timeless(found) == timeless(whole)
    assert found.comparisons == whole.comparisons


@pytest.mark.slow
def test_a_system_that_was_drawn_is_not_loaded_again(tmp_path):
    first = evaluated(tmp_path, three())

    def fail():
        raise AssertionError("loaded")

    again = evaluated(tmp_path, [dataclasses.replace(c, load=fail) for c in three()])
    assert again == first


@pytest.mark.slow
def test_a_system_that_breaks_loses_nothing_of_the_others(tmp_path):
    class Broken(Painted):
        def predict(self, *arguments):
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        evaluated(tmp_path, three(Broken()))
    assert len(list((tmp_path / "systems").rglob("00000.safetensors"))) == 2
    assert evaluated(tmp_path, three()).systems["student"].paired_mse.value > 0


def test_what_is_not_finite_is_refused_by_name_and_not_kept(tmp_path):
    with pytest.raises(UserError, match=r"student draws .* not finite \(the first is image 0\)"):
        evaluated(tmp_path, three(Painted(offset=1e39)))
    assert not list((tmp_path / "systems" / "student").rglob("*.safetensors"))


def test_guidance_without_conditions_is_refused(tmp_path):
    dataset = Labelled()
    dataset.facts = dataset.facts.model_copy(update={"unconditional": "none"})
    with pytest.raises(UserError, match=r"scale 3\.0.* evaluate\.guidance_scale to 1"):
        evaluated(tmp_path, three(), dataset)


def test_parts_of_another_evaluation_are_refused(tmp_path):
    evaluated(tmp_path, three())
    with pytest.raises(UserError, match="other models or settings"):
        evaluated(tmp_path, three(), identity="j")


def test_every_count_of_steps_is_measured_and_the_first_one_leads(tmp_path):
    found = evaluated(tmp_path, three(), steps=[1, 4, 2])
    assert found.images.solver_steps == 1
    assert list(found.images.other_steps) == [4, 2]
    for systems in found.images.other_steps.values():
        assert systems["teacher_guided"].paired_mse.value == 0
        assert systems["student"].paired_mse.value > 0
    for steps in (1, 2, 4):
        x = normal((1, 4, 4), "start", 5, 1)
        for sigma, following in pairwise(Schedule(FLOW).solver_times(steps) / 1000):
            image = 0.05 * 1 + SHARE * x
            x = image + following / sigma * (x - image)
        drawn = Gallery(tmp_path / "systems" / "teacher_unguided").latents(steps)[1]
        np.testing.assert_allclose(drawn, x, atol=1e-5)


def test_guidance_leads_away_from_the_model_without_its_adapter_or_another_model(tmp_path):
    contenders = [
        ImageContender(
            "teacher_guided", lambda: Painted(0, adapter=0.1), guidance_scale=3, guides_by="adapter"
        ),
        ImageContender(
            "student_other",
            lambda: Painted(0, offset=0.3),
            guidance_scale=3,
            guides_by="model",
            load_other=lambda: Painted(0, offset=0.2),
        ),
    ]
    evaluated(tmp_path, contenders)
    noise = SHARE * normal((1, 4, 4), "start", 5, 0)
    for name, expected in (("teacher_guided", 0.3), ("student_other", 3 * 0.3 - 2 * 0.2)):
        latent = Gallery(tmp_path / "systems" / name).latents(1)[0]
        np.testing.assert_allclose(latent, expected + noise, atol=1e-6)


def test_a_student_is_told_its_scale(tmp_path):
    model = Painted()
    evaluated(tmp_path, [ImageContender("student", lambda: model, told_scale=7.5)])
    assert [told.tolist() for told in model.told[-1:]] == [[7.5] * 6]
    plain = Painted()
    evaluated(tmp_path / "b", [ImageContender("student", lambda: plain)])
    assert plain.told == [None, None]


def test_without_the_guided_teacher_nothing_is_paired(tmp_path):
    found = evaluated(tmp_path, [ImageContender("student", Painted)])
    student = found.systems["student"]
    assert student.paired_mse is student.frechet_to_guided is None
    assert student.frechet.value > 0
    assert found.comparisons == ()


def test_the_distance_is_to_the_images_of_the_split(tmp_path):
    class Copy(Painted):
        def predict(self, x, t, conditions, scale=None):
            self.calls.append(len(x))
            return x - 0.1 * conditions["class_labels"].reshape(-1, 1, 1, 1)

    # Three samples whose images are their labels in grey, drawn once each.
    found = evaluated(tmp_path, [ImageContender("student", Copy)], Labelled(3), samples=3)
    assert found.systems["student"].frechet.value == pytest.approx(0, abs=1e-12)
    assert found.images.references == 3
    assert found.images.features == "pixels"
    assert found.images.reference.frechet is None  # a half of one image


def test_images_of_several_shapes_are_compared_by_areas(tmp_path):
    dataset = Labelled(6, buckets=((3, 16, 8), (3, 8, 16)))
    found = evaluated(tmp_path, three(), dataset, batch_size=2)
    assert found.images.features == "areas"
    shapes = [a.shape for a in Gallery(tmp_path / "systems" / "student").latents(1)]
    assert shapes == [(3, 16, 8), (3, 8, 16)] * 3
    assert found.systems["student"].frechet.value > 0
    assert found.images.reference.frechet.value > 0


def test_conditions_are_taken_in_turn_and_then_their_next_variations():
    dataset = Labelled(2)
    dataset.samples("test")[0]["conditions"] = [1, 3]
    items = items_of(dataset, settings(samples=5))
    assert [item.draw.condition for item in items] == [1, 2, 3, 2, 1]
    assert [item.sample["sample_id"] for item in items] == ["test0", "test1"] * 2 + ["test0"]


def test_a_split_without_samples_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no samples in the split 'dev'.*prepare\.dev_images"):
        evaluated(tmp_path, three(), split="dev")


def test_people_see_every_condition_before_one_twice():
    items = items_of(Labelled(5), settings(samples=9))  # labels 0 1 2 0 1, and again
    assert [i.sample["label"] for i in to_look_at(items, 5)] == [0, 1, 2, 0, 1]
    assert [i.index for i in to_look_at(items, 4)] == [0, 1, 2, 3]
    assert to_look_at(items, 0) == []


def test_the_pictures_are_what_was_drawn(tmp_path):
    found = evaluated(tmp_path, three(), images=3)
    assert [sample.text for sample in found.images.samples] == ["a", "b", "c"]
    latents = Gallery(tmp_path / "systems" / "student").latents(1)
    for index, sample in enumerate(found.images.samples):
        with Image.open(tmp_path / sample.files["student"]) as picture:
            pixels = np.asarray(picture)
        wanted = (np.clip(latents[index][0], -1, 1) + 1) * 127.5
        assert np.abs(pixels - wanted).max() <= 0.5 + 1e-4
        with Image.open(tmp_path / sample.reference) as picture:
            np.testing.assert_array_equal(np.asarray(picture), round((0.1 * index + 1) * 127.5))


def test_colour_and_grey_pictures_survive_being_written(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    write_png(tmp_path / "rgb.png", image)
    write_png(tmp_path / "grey.png", image[:, :, :1])
    with Image.open(tmp_path / "rgb.png") as rgb, Image.open(tmp_path / "grey.png") as grey:
        np.testing.assert_array_equal(np.asarray(rgb), image)
        np.testing.assert_array_equal(np.asarray(grey), image[:, :, 0])


class Digits(Labelled):
    """scikit-learn's digits, a few of them for tests, and a train split for the judge."""

    def __init__(self):
        from sklearn.datasets import load_digits

        super().__init__(100, 10, ((1, 8, 8),), train=600)
        images, labels = load_digits(return_X_y=True)
        for place, sample in enumerate(self.samples("test") + self.samples("train")):
            image = (images[place].reshape(1, 8, 8) / 8 - 1).astype(np.float16)
            self.tables["latents"][sample["latents"][0]] = {"latent": image}
            sample["label"], sample["conditions"] = int(labels[place]), [int(labels[place]) + 1]


@pytest.fixture(scope="module")
def digits(require):
    require("sklearn", "pip install 'foretell[diffusion]'")
    return Digits()


def test_the_judge_knows_digits_it_has_not_seen_and_is_asked_about_the_condition(tmp_path, digits):
    means = np.stack(
        [
            np.mean(
                [
                    digits.reference(s["sample_id"])
                    for s in digits.samples("train")
                    if s["label"] == n
                ],
                0,
            )
            for n in range(10)
        ]
    )

    class Wrong(Painted):
        """Draws the mean digit that is `shift` after the one asked for."""

        def __init__(self, shift):
            super().__init__()
            self.shift = shift

        def predict(self, x, t, conditions, scale=None):
            shifted = (conditions["class_labels"] + self.shift) % 10
            images = torch.from_numpy(means[shifted].transpose(0, 3, 1, 2) / 127.5 - 1).float()
            return x - images

    contenders = [
        ImageContender("student", lambda: Wrong(0)),
        ImageContender("student_b", lambda: Wrong(1)),
    ]
    found = evaluated(tmp_path, contenders, digits, judge="digits", samples=40)
    right, wrong = found.systems.values()
    assert right.accuracy.value == 1
    assert wrong.accuracy.value == 0
    assert right.log_probability.value > -0.2
    assert wrong.log_probability.value < -3
    assert right.class_spread.value < 1e-3  # the noise that is left, rounded away
    assert right.class_spread.value < 0.01 * found.images.reference.class_spread.value
    reference = found.images.reference
    assert reference.accuracy.value > 0.95
    assert -0.4 < reference.log_probability.value < 0
    assert 0.2 < reference.class_spread.value < 0.6
    (use,) = found.judges
    assert use.name == "digits"
    assert use.measures == ("accuracy", "log_probability")
    assert use.reason is None


def test_without_its_package_the_judge_gives_the_reason_and_the_rest_is_measured(
    tmp_path, digits, monkeypatch
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = evaluated(tmp_path, three(), digits, judge="digits", images=0)
    assert "pip install 'foretell[diffusion]'" in found.judges[0].reason
    assert found.systems["student"].accuracy is None
    assert found.systems["student"].paired_mse.value > 0


def test_the_judge_refuses_what_it_cannot_know(tmp_path, digits):
    with pytest.raises(UserError, match="leave the judge out"):
        evaluated(tmp_path, three(), judge="digits")
    assert not (tmp_path / "systems").exists()
    require_digits(digits.facts)
    with pytest.raises(UserError, match=r"labels \[0, 1\] instead"):
        DigitsJudge.trained(np.zeros((2, 64)), np.array([0, 1]))
