"""A folder of images as a dataset: what enters, what does not and why, and that it is settled."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from stages.dataset import Dataset
from stages.diffusion import dataset as dataset_module
from stages.diffusion import images as images_module
from stages.diffusion import prepare as module
from stages.diffusion.dataset import ImageDataset
from stages.diffusion.image_config import ImagesConfig
from stages.diffusion.images import to_uint8
from stages.diffusion.noise import normal
from stages.diffusion.prepare import prepare_images
from stages.encoded_parts import parts_folder
from stages.errors import UserError
from store.errors import StoreError
from tests.fake_images import (
    HUGE_COLOUR,
    NAN_COLOUR,
    FakeEncoder,
    encoded_images,
    encoded_text,
    gradient,
    write_images,
)

BUCKETS = {"sizes": [[32, 32], [48, 24]]}
SIZES = ((40, 40), (64, 32), (33, 36), (90, 44), (32, 32), (50, 45))
CAPTIONS = ("a cat", "a dog", "a cat", "a cow", "a pig", "an emu")

Make = Callable[..., ImagesConfig]


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeEncoder]:
    FakeEncoder.reset()
    for place in (module, dataset_module):
        monkeypatch.setattr(place, "load_image_encoder", lambda: FakeEncoder)
    return FakeEncoder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Six images with captions, for two buckets; the last two are of dev and test."""
    images = {f"{n}.png": gradient(*size, seed=n) for n, size in enumerate(SIZES)}
    rows: list[dict[str, Any]] = [{"text": text, "split": "train"} for text in CAPTIONS]
    rows[4]["split"], rows[5]["split"] = "dev", "test"
    return write_images(tmp_path / "source", images, rows)


@pytest.fixture
def config(source: Path, tmp_path: Path) -> Make:
    def make(pipeline: str = "plain", **changes: Any) -> ImagesConfig:
        encoder: dict[str, Any] = changes.pop("encoder", {})
        if "kind" not in encoder:
            given = {"kind": "pipeline", "path": tmp_path / pipeline, "posterior": "mode"}
            encoder = given | {"device": "cpu"} | encoder
        base = {"source": source, "encoder": encoder, "buckets": BUCKETS, "batch_size": 2}
        return ImagesConfig.model_validate(base | changes)

    return make


def add_rows(source: Path, *rows: dict[str, Any] | str) -> None:
    with (source / "metadata.jsonl").open("a") as table:
        table.writelines(row if isinstance(row, str) else f"{json.dumps(row)}\n" for row in rows)


def all_samples(dataset: ImageDataset) -> list[dict[str, Any]]:
    return [row for split in ("train", "dev", "test") for row in dataset.samples(split)]


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def cut_again(pixels: np.ndarray, row: dict[str, np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """Cut an image as its row in the table says, by Pillow and slices alone."""
    top, left, flip, height, width = (int(value) for value in row["crop"])
    assert pixels.shape[:2] == (height, width)
    scale = max(size[0] / width, size[1] / height)
    resized = Image.fromarray(pixels).resize(
        (round(width * scale), round(height * scale)), Image.Resampling.LANCZOS
    )
    shown = np.asarray(resized)
    shown = shown[:, ::-1] if flip else shown
    return shown[top : top + size[1], left : left + size[0]]


def latent_of(pixels: np.ndarray) -> np.ndarray:
    images = torch.from_numpy(pixels.copy()).movedim(-1, 0)[None] / 127.5 - 1
    latent: np.ndarray = ((encoded_images(images) - 0.25) * 0.5)[0].numpy()
    return latent


# --------------------------------------------------------------------------------- what is stored


def test_latents_are_those_of_the_image_cut_as_the_stored_draw_says(config, source, tmp_path):
    drawn = config(image_variations=6, crop="random", flip=0.5)
    dataset = prepare_images(drawn, tmp_path / "dataset")
    table, seen = dataset.table("latents"), set()
    for sample in all_samples(dataset):
        pixels = np.asarray(Image.open(source / sample["file"]))
        size = drawn.buckets.sizes[sample["bucket"]]
        for number in sample["latents"]:
            row = table[number]
            shown = cut_again(pixels, row, size)
            assert row["latent"].dtype == np.float16
            assert row["latent"].shape == dataset.facts.buckets[sample["bucket"]]
            np.testing.assert_allclose(row["latent"], latent_of(shown), atol=2**-11)
            seen.add((sample["sample_id"], *row["crop"][:3].tolist()))
    assert len(seen) == len(table)
    tops, lefts, flips = (len({row[i] for row in seen}) for i in (1, 2, 3))
    assert (flips, tops > 1, lefts > 1) == (2, True, True)


def test_every_image_goes_to_the_bucket_of_its_shape(config, tmp_path):
    dataset = prepare_images(config(), tmp_path / "dataset")
    assert dataset.facts.buckets == ((4, 8, 8), (4, 6, 12))
    assert {row["file"]: row["bucket"] for row in all_samples(dataset)} == {
        "0.png": 0, "1.png": 1, "2.png": 0, "3.png": 1, "4.png": 0, "5.png": 0,
    }  # fmt: skip


def test_captions_are_encoded_once_before_any_image_and_both_encoders_are_freed(config, tmp_path):
    dataset = prepare_images(config(), tmp_path / "dataset")
    distinct = ["", *dict.fromkeys(CAPTIONS)]
    assert FakeEncoder.events == [*distinct, "free", 2, 2, 2, "free", "free"]
    table = dataset.table("conditions")
    assert len(table) == len(distinct)
    for sample in all_samples(dataset):
        (row,) = sample["conditions"]
        assert row > 0
        for name, values in encoded_text(sample["text"]).items():
            np.testing.assert_array_equal(table[row][name], values)


@pytest.mark.parametrize("kind", ["zeros", "empty", "negative"])
def test_row_0_is_what_stands_for_no_condition(config, tmp_path, kind):
    text = "blurry" if kind == "negative" else None
    asked = config(unconditional={"kind": kind, "text": text})
    dataset = prepare_images(asked, tmp_path / "dataset")
    expected = encoded_text(text or "")
    if kind == "zeros":
        expected = {name: np.zeros_like(values) for name, values in expected.items()}
    for name, values in expected.items():
        np.testing.assert_array_equal(dataset.table("conditions")[0][name], values)
    assert (dataset.facts.unconditional, dataset.facts.unconditional_text) == (kind, text)


def test_equal_draws_share_a_row_and_other_images_do_not(config, tmp_path):
    asked = config(image_variations=3, encoder={"posterior": "sample"})
    dataset = prepare_images(asked, tmp_path / "dataset")
    rows = [sample["latents"] for sample in all_samples(dataset)]
    assert all(len(set(each)) == 1 and len(each) == 3 for each in rows)
    assert len({each[0] for each in rows}) == len(dataset.table("latents")) == 6


def test_the_posterior_is_drawn_with_the_noise_of_its_key(config, tmp_path):
    modes = prepare_images(config(flip=1.0), tmp_path / "modes")
    asked = config(flip=1.0, seed=3, encoder={"posterior": "sample"})
    drawn = prepare_images(asked, tmp_path / "drawn")
    for mode, sample in zip(all_samples(modes), all_samples(drawn), strict=True):
        row = drawn.table("latents")[sample["latents"][0]]
        top, left, flip = row["crop"][:3].tolist()
        noise = normal(row["latent"].shape, 3, "posterior", sample["sample_id"], top, left, flip)
        clean = modes.table("latents")[mode["latents"][0]]["latent"]
        np.testing.assert_allclose(row["latent"] - clean, 0.0625 * noise, atol=2**-9)


def test_what_a_network_is_told_of_sizes_is_height_first(config, tmp_path):
    dataset = prepare_images(config("sizes", crop="random"), tmp_path / "dataset")
    sample = next(row for row in all_samples(dataset) if row["file"] == "3.png")
    row = dataset.table("latents")[sample["latents"][0]]
    top, left = row["crop"][:2].tolist()
    assert row["time_ids"].tolist() == [44, 90, top, left, 24, 48]


def test_masks_are_cut_as_their_image_and_averaged_over_what_a_latent_covers(
    config, source, tmp_path
):
    mask = np.zeros((40, 40), np.uint8)
    mask[:, 24:], mask[10, 8] = 255, 128
    Image.fromarray(mask).save(source / "mask.png")
    Image.fromarray(gradient(40, 40, 9)).save(source / "masked.png")
    add_rows(source, {"file_name": "masked.png", "text": "a yak", "mask": "mask.png"})
    asked = config(buckets={"sizes": [[40, 40]]}, flip=1.0)
    dataset = prepare_images(asked, tmp_path / "dataset")
    sample = next(row for row in all_samples(dataset) if row["file"] == "masked.png")
    found = dataset.table("latents")[sample["latents"][0]]["mask"]
    mirrored = mask[:, ::-1].reshape(10, 4, 10, 4).mean((1, 3)) / 255
    np.testing.assert_allclose(found, mirrored[None], atol=2**-11)
    assert (found.dtype, found.max(), found[0, 2, 7] > 0) == (np.float16, 1, True)
    other = next(row for row in all_samples(dataset) if row["file"] != "masked.png")
    assert "mask" not in dataset.table("latents")[other["latents"][0]]


def test_text_variations_go_through_all_captions_before_one_comes_again(config, source, tmp_path):
    Image.fromarray(gradient(32, 32, 9)).save(source / "many.png")
    texts = [f"caption {n}" for n in range(5)]
    add_rows(source, {"file_name": "many.png", "texts": texts})
    found = {}
    for seed in range(3):
        asked = config(text_variations=7, seed=seed)
        dataset = prepare_images(asked, tmp_path / f"dataset{seed}")
        sample = next(row for row in all_samples(dataset) if row["file"] == "many.png")
        table = dataset.table("conditions")
        by_pooled = {encoded_text(text)["pooled"].tobytes(): text for text in texts}
        drawn = [by_pooled[table[row]["pooled"].tobytes()] for row in sample["conditions"]]
        assert (sorted(drawn[:5]), drawn[5:]) == (texts, drawn[:2])
        assert sample["text"] == texts[0]
        found[seed] = tuple(drawn)
    assert len(set(found.values())) == 3


def test_tags_are_shuffled_behind_those_that_stay(config, source, tmp_path):
    Image.fromarray(gradient(32, 32, 9)).save(source / "tags.png")
    add_rows(source, {"file_name": "tags.png", "text": "one,two , three, four,five"})
    prepare_images(config(text_variations=8, shuffle_tags=True, keep_tags=2), tmp_path / "dataset")
    tagged = [text for text in FakeEncoder.events if str(text).startswith("one")]
    assert len(tagged) == len(set(tagged)) > 1
    assert all(text.startswith("one, two, ") for text in tagged)
    assert {tuple(sorted(text.split(", "))) for text in tagged} == {
        ("five", "four", "one", "three", "two")
    }


def test_images_without_captions_and_labels_have_no_conditions(config, tmp_path):
    dataset = prepare_images(config("no_text", text_variations=2), tmp_path / "dataset")
    assert list(dataset.header.tables) == ["latents"]
    assert (dataset.facts.unconditional, dataset.facts.conditions) == ("none", {})
    assert {tuple(row["conditions"]) for row in all_samples(dataset)} == {(-1, -1)}
    assert [row["text"] for row in all_samples(dataset)] == list(CAPTIONS)
    with pytest.raises(KeyError):
        dataset.table("conditions")


@pytest.mark.parametrize(
    ("labels", "classes", "names", "ids"),
    [
        (["cat", "ant", "cat", "bee"], None, ("ant", "bee", "cat"), [2, 0, 2, 1]),
        ([3, 0, 1, 3], None, ("0", "1", "2", "3"), [3, 0, 1, 3]),
        (["2", "00", "10", "01"], None, tuple(map(str, range(11))), [2, 0, 10, 1]),
        ([1, 0, 1, 0], 4, ("0", "1", "2", "3"), [1, 0, 1, 0]),
    ],
)
def test_labels_become_numbers_and_the_one_after_the_last_is_none(
    config, tmp_path, labels, classes, names, ids
):
    images = {f"{n}.png": gradient(32, 32, n) for n in range(4)}
    folder = write_images(tmp_path / "labelled", images, [{"label": each} for each in labels])
    dataset = prepare_images(
        config("no_text", source=folder, classes=classes), tmp_path / "dataset"
    )
    assert dataset.facts.classes == names
    rows = dataset.samples("train")
    assert [row["label"] for row in rows] == ids
    table = dataset.table("conditions")
    assert [table[row["conditions"][0]]["class_labels"] for row in rows] == ids
    assert table[0]["class_labels"] == len(names)
    assert table[0]["class_labels"].dtype == np.int64
    assert dataset.facts.unconditional == "label"


def test_columns_of_a_row_reach_the_dataset(config, source, tmp_path):
    Image.fromarray(gradient(32, 32, 9)).save(source / "more.png")
    more = {"target": "prior", "weight": 0.5, "split": "test", "other": [1]}
    add_rows(source, {"file_name": "more.png", "text": " a yak\n", **more})
    dataset = prepare_images(config(), tmp_path / "dataset")
    sample = next(row for row in dataset.samples("test") if row["file"] == "more.png")
    assert (sample["target"], sample["weight"], sample["text"]) == ("prior", 0.5, "a yak")
    assert {row["target"] for row in dataset.samples("train")} == {"teacher"}


def test_a_csv_says_the_same_as_json_lines(config, source, tmp_path):
    before = prepare_images(config(), tmp_path / "before")
    lines = map(json.loads, (source / "metadata.jsonl").read_text().splitlines())
    cells = [f'{row["file_name"]},"{row["text"]}",,{row["split"]}' for row in lines]
    (source / "metadata.jsonl").unlink()
    (source / "metadata.csv").write_text("\n".join(["\ufefffile_name,text,weight,split", *cells]))
    after = prepare_images(config(), tmp_path / "after")
    assert after.header.fingerprint == before.header.fingerprint


def test_equal_images_have_ids_of_their_own_and_share_a_split(config, tmp_path):
    images = {f"{n}.png": gradient(32, 32, n // 2) for n in range(12)}
    folder = write_images(tmp_path / "twins", images, [{"text": "a"}] * 12)
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    (folder / "metadata.jsonl").write_text("\n".join(lines[::-1]))
    dataset = prepare_images(config(source=folder, test_images=5, dev_images=2), tmp_path / "ds")
    rows = {row["file"]: row for row in all_samples(dataset)}
    for n in range(0, 12, 2):
        one, other = rows[f"{n}.png"], rows[f"{n + 1}.png"]
        assert other["sample_id"] == f"{one['sample_id']}-1"
        assert one["split"] == other["split"]
    assert dataset.header.samples == {"train": 6, "dev": 2, "test": 4}


def test_an_id_is_of_the_content_and_not_of_name_or_order(config, source, tmp_path):
    before = prepare_images(config(), tmp_path / "before")
    ids = {row["text"]: row["sample_id"] for row in all_samples(before)}
    lines = (source / "metadata.jsonl").read_text().replace(".png", "_.png").splitlines()
    for path in source.glob("*.png"):
        path.rename(path.with_name(f"{path.stem}_.png"))
    (source / "metadata.jsonl").write_text("\n".join(lines[::-1]))
    after = prepare_images(config(), tmp_path / "after")
    # Two images have the caption "a cat"; which comes last depends on the order.
    del ids["a cat"]
    assert ids.items() <= {row["text"]: row["sample_id"] for row in all_samples(after)}.items()


def test_splits_are_drawn_by_the_seed_and_named_ones_stay(config, tmp_path):
    images = {f"{n}.png": gradient(32, 32, n) for n in range(20)}
    rows = [{"text": "a", "split": "test"}] + [{"text": "a"}] * 19
    folder = write_images(tmp_path / "many", images, rows)
    found = {}
    for seed in (0, 1):
        asked = config(source=folder, test_images=5, dev_images=3, seed=seed)
        dataset = prepare_images(asked, tmp_path / f"dataset{seed}")
        assert dataset.header.samples == {"train": 11, "dev": 3, "test": 6}
        found[seed] = {row["file"] for row in dataset.samples("test")}
    assert "0.png" in found[0] & found[1]
    assert found[0] != found[1]


def test_references_are_what_dev_and_test_images_look_like(config, source, tmp_path):
    asked = config(crop="random", flip=0.5, image_variations=4)
    dataset = prepare_images(asked, tmp_path / "dataset")
    for sample in dataset.samples("dev") + dataset.samples("test"):
        pixels = np.asarray(Image.open(source / sample["file"]))
        row = dataset.table("latents")[sample["latents"][0]]
        np.testing.assert_array_equal(
            dataset.reference(sample["sample_id"]), cut_again(pixels, row, (32, 32))
        )
    with pytest.raises(KeyError):
        dataset.reference(dataset.samples("train")[0]["sample_id"])
    assert len(list((dataset.path / "references").iterdir())) == 2
    assert len(set(dataset.samples("test")[0]["latents"])) > 1


def test_the_dataset_decodes_with_its_own_copy_of_the_autoencoder(config, tmp_path):
    dataset = prepare_images(config(), tmp_path / "dataset")
    decoder = dataset.decoder("cpu")
    assert decoder.path == dataset.path / "decoder"
    (decoder.path / "config.json").write_text("[]")
    with pytest.raises(StoreError, match=r"decoder/config\.json was altered"):
        dataset.decoder("cpu")


def test_pixels_are_their_own_latents_and_come_back_as_they_were(config, source, tmp_path):
    asked = config(encoder={"kind": "pixels", "channels": 3})
    dataset = prepare_images(asked, tmp_path / "dataset")
    assert dataset.facts.buckets == ((3, 32, 32), (3, 24, 48))
    assert not FakeEncoder.events
    sample = dataset.samples("dev")[0]
    latent = dataset.table("latents")[sample["latents"][0]]["latent"]
    decoded = dataset.decoder().decode(torch.from_numpy(latent)[None])
    np.testing.assert_array_equal(to_uint8(decoded)[0], dataset.reference(sample["sample_id"]))


def test_digits_are_grey_pixels_with_labels(require, tmp_path):
    require("sklearn", "pip install 'foretell[diffusion]'")
    from sklearn.datasets import load_digits

    asked = ImagesConfig.model_validate(
        {
            "digits": {"seed": 1},
            "encoder": {"kind": "pixels", "channels": 1},
            "buckets": {"sizes": [[8, 8]]},
            "test_images": 540,
        }
    )
    dataset = prepare_images(asked, tmp_path / "dataset")
    assert dataset.header.samples == {"train": 1257, "dev": 0, "test": 540}
    assert dataset.facts.buckets == ((1, 8, 8),)
    assert dataset.facts.classes == tuple("0123456789")
    digits, table = load_digits(), dataset.table("latents")
    for row in all_samples(dataset):
        number = int(row["file"].removeprefix("digits/"))
        assert row["label"] == digits.target[number]
        latent = table[row["latents"][0]]["latent"]
        np.testing.assert_allclose(latent[0], digits.images[number] / 8 - 1, atol=1 / 255 + 1e-3)
    assert dataset.reference(dataset.samples("test")[0]["sample_id"]).shape == (8, 8, 1)


# -------------------------------------------------------------------------------- what is rejected


def flat(colour: tuple[int, int, int]) -> np.ndarray:
    return np.full((32, 32, 3), colour, np.uint8)


def test_every_defect_is_rejected_with_its_reason_and_stops_nothing(config, source, tmp_path):
    written = {
        "small.png": gradient(20, 20), "long.png": gradient(200, 32), "nan.png": flat(NAN_COLOUR),
        "huge.png": flat(HUGE_COLOUR), "blank.png": gradient(32, 32, 10),
        "twice.png": flat((1, 1, 1)), "mask.png": gradient(30, 40), "pale.png": flat((9, 9, 9)),
        "infinite.png": gradient(32, 32, 11), "light.png": flat((8, 8, 8)),
        "same.png": flat((5, 5, 5)), "same2.png": flat((5, 5, 5)),
    }  # fmt: skip
    for name, pixels in written.items():
        Image.fromarray(pixels).save(source / name)
    (source / "cut.png").write_bytes((source / "0.png").read_bytes()[:700])
    (source / "text.png").write_text("no image")
    (source / "empty.png").write_bytes(b"")
    (source / "folder.png").mkdir()
    Image.fromarray(gradient(32, 32)).save(tmp_path / "secret.png")
    (source / "link.png").symlink_to(tmp_path / "secret.png")
    (source / "circle.png").symlink_to(source / "circle.png")
    names = {
        "small.png": "image too small: 20×20 would be enlarged 1.60 times to fill 32×32; ",
        "long.png": "aspect ratio outside the buckets: 200×32 is a factor 3.12 from the ",
        "nan.png": "latent not finite: ",
        "huge.png": "latent not finite: ",
        "cut.png": "unreadable image: ",
        "text.png": "unreadable image: none of JPEG, PNG",
        "empty.png": "unreadable image: none of",
        "folder.png": "missing file: folder.png",
        "absent.png": "missing file: absent.png",
        "../secret.png": "file outside the folder: ../secret.png",
        "link.png": "file outside the folder: link.png",
        str(tmp_path / "secret.png"): "file outside the folder: ",
        "circle.png": "unreadable file: circle.png: links lead in a circle",
        "zero\0byte.png": "unreadable file: ",
        "x" * 300: "unreadable file: ",
    }
    rows: list[dict[str, Any]] = [{"file_name": name, "text": "a yak"} for name in names]
    odd: dict[str, tuple[dict[str, Any], str]] = {
        "blank.png": ({"text": " "}, "empty caption: "),
        "4.png/../4.png": ({"texts": []}, "no caption: "),
        "infinite.png": ({"text": "infinite"}, "condition not finite: that of 'infinite'"),
        "pale.png": ({"text": "a", "mask": "mask.png"}, "mask: mask of another size: 30×40"),
        "light.png": ({"text": "a", "mask": "none.png"}, "mask: missing file: none.png"),
        "twice.png": ({"text": "a"}, "duplicate file_name: 2 rows"),
        "./twice.png": ({"text": "b"}, "duplicate file_name: 2 rows"),
        "same.png": ({"text": "a", "split": "train"}, "several splits: "),
        "same2.png": ({"text": "a", "split": "test"}, "several splits: "),
    }
    names |= {name: reason for name, (_, reason) in odd.items()}
    rows += [{"file_name": name, **row} for name, (row, _) in odd.items()]
    faulty: list[tuple[dict[str, Any], str]] = [
        ({"file_name": "9.png", "text": 5}, "unreadable row: text: "),
        ({"file_name": "9.png", "text": "a", "weight": 0}, "unreadable row: weight: "),
        ({"file_name": "9.png", "text": "a", "weight": "nan"}, "unreadable row: weight: "),
        ({"file_name": "9.png", "text": "a", "target": "student"}, "unreadable row: target: "),
        ({"file_name": "9.png", "text": "a", "split": "val"}, "unreadable row: split: "),
        ({"file_name": "9.png", "text": "a", "label": 1.5}, "unreadable row: label: "),
        ({"file_name": "9.png", "text": "a", "label": -1}, "unreadable row: label: "),
        ({"text": "a"}, "unreadable row: file_name: Field required"),
    ]
    start = len(SIZES) + len(rows) + 1
    names |= {f"line {start + n}": reason for n, (_, reason) in enumerate(faulty)}
    add_rows(source, *rows, *(row for row, _ in faulty))
    dataset = prepare_images(config(), tmp_path / "dataset")
    found = {row["file"]: row["reason"] for row in dataset.rejected()}
    assert {name: found[name][: len(reason)] for name, reason in names.items()} == names
    assert len(dataset.rejected()) == len(rows) + len(faulty)
    assert dataset.header.rejected["unreadable row"] == len(faulty)
    assert [row["file"] for row in all_samples(dataset)] == [f"{n}.png" for n in range(6)]
    # Nothing of what was rejected is left in the tables, nor a caption that nobody has.
    assert len(dataset.table("latents")) == 6
    assert len(dataset.table("conditions")) == 1 + len(set(CAPTIONS))


def test_an_image_that_claims_to_be_vast_is_not_decoded(config, source, tmp_path, monkeypatch):
    monkeypatch.setattr(images_module, "MAX_PIXELS", 1000)
    with pytest.raises(UserError, match=r"rejected image too large: 6; 0 accepted"):
        prepare_images(config(), tmp_path / "dataset")


@pytest.mark.parametrize(
    ("row", "reason"),
    [({}, "no label: "), ({"label": ""}, "no label: "), ({"label": 70000}, "unknown label: 70000")],
)
def test_with_labels_every_image_needs_one(config, tmp_path, row, reason):
    images = {f"{n}.png": gradient(32, 32, n) for n in range(3)}
    folder = write_images(tmp_path / "labelled", images, [{"label": 0}, {"label": 1}, row])
    dataset = prepare_images(config("no_text", source=folder), tmp_path / "dataset")
    (rejected,) = dataset.rejected()
    assert rejected["reason"].startswith(reason)
    assert dataset.facts.classes == ("0", "1")


def test_a_label_beyond_the_classes_is_rejected_and_names_have_no_number(config, tmp_path):
    images = {f"{n}.png": gradient(32, 32, n) for n in range(3)}
    folder = write_images(tmp_path / "labelled", images, [{"label": n} for n in range(3)])
    dataset = prepare_images(config("no_text", source=folder, classes=2), tmp_path / "dataset")
    assert dataset.rejected()[0]["reason"] == "unknown label: 2, but there are 2"
    named = write_images(tmp_path / "named", images, [{"label": n} for n in ("a", "b", "1")])
    with pytest.raises(
        UserError, match=r"classes=2 goes with labels that are numbers.*\['a', 'b'\]"
    ):
        prepare_images(config("no_text", source=named, classes=2), tmp_path / "other")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds 0 tables"),
        ({"metadata.csv": "file_name\n", "metadata.jsonl": "{}"}, "holds 2 tables"),
        ({"metadata.jsonl": "\n \n"}, "has no rows"),
        ({"metadata.jsonl": '{"file_name": "a.png"}\n[1]\n'}, "line 2 is no row: "),
        ({"metadata.jsonl": "{'file_name': 1}"}, "line 1 is no row: "),
        (
            {"metadata.csv": "file_name,text\na.png,one, two\n"},
            "line 2 has 3 cells, but the header",
        ),
        ({"metadata.csv": 'file_name,text\na.png,"one\n'}, "line 2 is no CSV"),
        ({"metadata.csv": "name,text\na.png,one\n"}, "has the columns"),
        ({"metadata.csv": "file_name,texts\na.png,one\n"}, "a column texts"),
        ({"metadata.csv": "file_name,text,text\na.png,one,two\n"}, "name each column once"),
        ({"metadata.csv": b"file_name,text\na.png,\xff\n"}, "is not UTF-8"),
    ],
)
def test_a_source_without_a_sound_table_is_refused(config, tmp_path, files, message):
    folder = tmp_path / "odd"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message):
        prepare_images(config(source=folder), tmp_path / "dataset")
    assert not (tmp_path / "dataset").exists()


def test_nothing_left_to_train_on_says_why(config, source, tmp_path):
    with pytest.raises(UserError, match="none is no folder"):
        prepare_images(config(source=source / "none"), tmp_path / "dataset")
    table = source / "metadata.jsonl"
    lines = re.sub(r', "split": "\w+"', "", table.read_text())
    drawn = "by prepare.test_images=9: leave some for training"
    named = "by the splits that the table names for {} of them"
    held_out = {
        lines: (drawn, {"test_images": 9}),
        lines.replace("}", ', "split": "dev"}'): (named.format(6) + ": leave some", {}),
        lines.replace("}", ', "split": "test"}', 2): (
            f"{named.format(2)} and by prepare.dev_images=4: leave some", {"dev_images": 4},
        ),
    }  # fmt: skip
    for rows, (why, settings) in held_out.items():
        table.write_text(rows)
        said = f"left for the train split; rejected none; 6 accepted, all held out {why}"
        with pytest.raises(UserError, match=said):
            prepare_images(config(**settings), tmp_path / "dataset")
    assert not (tmp_path / "dataset").exists()


def test_buckets_that_the_autoencoder_cannot_halve_are_refused(config, tmp_path):
    with pytest.raises(UserError, match=r"holds \[\[30, 32\]\], but .* multiples of 4"):
        prepare_images(config(buckets={"sizes": [[32, 32], [30, 32]]}), tmp_path / "dataset")


def test_no_condition_that_is_not_finite_is_an_error_and_no_rejection(config, tmp_path):
    asked = config(unconditional={"kind": "negative", "text": "infinite"})
    with pytest.raises(UserError, match="'infinite', which stands for no condition"):
        prepare_images(asked, tmp_path / "dataset")


# --------------------------------------------------------------------- whole, settled, and resumed


def test_the_same_source_and_settings_give_the_same_bytes(config, tmp_path):
    asked = config(image_variations=2, crop="random", flip=0.5, encoder={"posterior": "sample"})
    one = prepare_images(asked, tmp_path / "one")
    other = prepare_images(asked, tmp_path / "other")
    assert content(one.path) == content(other.path)
    larger = prepare_images(asked.model_copy(update={"batch_size": 5}), tmp_path / "larger")
    assert larger.header.fingerprint == one.header.fingerprint
    seeded = prepare_images(asked.model_copy(update={"seed": 1}), tmp_path / "seeded")
    assert seeded.header.fingerprint != one.header.fingerprint


def test_an_interrupted_run_encodes_nothing_again_and_ends_with_the_same_bytes(config, tmp_path):
    asked = config(encoder={"posterior": "sample"})
    whole = prepare_images(asked, tmp_path / "whole")
    FakeEncoder.reset(stop_after=2)
    with pytest.raises(KeyboardInterrupt):
        prepare_images(asked, tmp_path / "dataset")
    assert sorted(path.name for path in tmp_path.glob("*dataset*")) == [".dataset.encoded"]
    FakeEncoder.reset()
    resumed = prepare_images(asked, tmp_path / "dataset")
    assert [event for event in FakeEncoder.events if event != "free"] == [2]
    assert content(resumed.path) == content(whole.path)
    assert not parts_folder(resumed.path).exists()


@pytest.mark.parametrize("what", ["precision", "seed", "image", "pipeline"])
def test_what_was_encoded_otherwise_is_encoded_again(config, source, tmp_path, what):
    FakeEncoder.reset(stop_after=2)
    with pytest.raises(KeyboardInterrupt):
        prepare_images(config(encoder={"posterior": "sample"}), tmp_path / "dataset")
    FakeEncoder.reset()
    changes = {"precision": {"encoder": {"posterior": "sample", "precision": "bf16"}}}
    changes |= {"seed": {"seed": 1}, "pipeline": {"pipeline": "other"}}
    if what == "image":
        for n, size in enumerate(SIZES):
            Image.fromarray(gradient(*size, seed=n + 50)).save(source / f"{n}.png")
    base = {"encoder": {"posterior": "sample"}}
    prepare_images(config(**(base | changes.get(what, {}))), tmp_path / "dataset")
    assert FakeEncoder.events.count(2) == 3


def test_a_damaged_part_is_named(config, tmp_path):
    FakeEncoder.reset(stop_after=2)
    with pytest.raises(KeyboardInterrupt):
        prepare_images(config(), tmp_path / "dataset")
    for part in parts_folder(tmp_path / "dataset").iterdir():
        part.write_bytes(part.read_bytes()[:-1] + b"\0")
    with pytest.raises(UserError, match=r"\.part, which an interrupted run left.*remove it"):
        prepare_images(config(), tmp_path / "dataset")


def test_an_image_that_is_gone_when_its_turn_comes_is_rejected(
    config, source, tmp_path, monkeypatch
):
    free = FakeEncoder.free

    def remove(self: FakeEncoder) -> None:
        free(self)
        (source / "2.png").unlink(missing_ok=True)
        Image.fromarray(gradient(34, 32)).save(source / "0.png")

    monkeypatch.setattr(FakeEncoder, "free", remove)
    dataset = prepare_images(config(), tmp_path / "dataset")
    assert {row["file"]: row["reason"].split(":")[0] for row in dataset.rejected()} == {
        "2.png": "missing file", "0.png": "changed file",
    }  # fmt: skip
    texts = [event for event in FakeEncoder.events if isinstance(event, str) and event != "free"]
    assert texts == ["", *dict.fromkeys(CAPTIONS)], "encoded once, though one is needed no more"
    assert dataset.header.samples == {"train": 2, "dev": 1, "test": 1}


def test_a_finished_dataset_is_opened_and_another_is_refused(config, source, tmp_path):
    prepare_images(config(), tmp_path / "dataset")
    FakeEncoder.reset()
    again = prepare_images(config(batch_size=5), tmp_path / "dataset")
    assert (FakeEncoder.events, again.header.samples["train"]) == ([], 4)
    with pytest.raises(UserError, match="prepared with another flip, seed;"):
        prepare_images(config(seed=1, flip=0.5), tmp_path / "dataset")
    with pytest.raises(UserError, match="prepared with another encoder;"):
        prepare_images(config(encoder={"precision": "bf16"}), tmp_path / "dataset")
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match=r"prepared with another encoder\.path;"):
        prepare_images(config("other"), tmp_path / "dataset")
    add_rows(source, {"file_name": "7.png"})
    with pytest.raises(UserError, match="prepared with another source;"):
        prepare_images(config(), tmp_path / "dataset")


def test_the_dataset_stays_whole_when_its_source_is_gone(config, source, tmp_path):
    asked = config()
    before = prepare_images(asked, tmp_path / "dataset")
    shutil.rmtree(source)
    after = prepare_images(asked, tmp_path / "dataset")
    assert after.header == before.header


def dataset_sum(header: str) -> str:
    """Hash of a file of a table, as dataset.json has it."""
    found: str = json.loads(header)["files"]["tables/latents/00000.safetensors"]["xxh3"]
    return found


def test_damage_to_a_dataset_is_found(config, tmp_path):
    path = prepare_images(config(), tmp_path / "dataset").path
    with pytest.raises(UserError, match="is no dataset of speech; name one that `prepare` has"):
        Dataset.open(path)
    sound = content(path)
    table = path / "tables" / "latents" / "00000.safetensors"
    table.write_bytes(sound["tables/latents/00000.safetensors"][:-1] + b"\0")
    with pytest.raises(StoreError, match="was altered"):
        ImageDataset.open(path).table("latents")[0]
    header = sound["dataset.json"].decode()
    good = dataset_sum(header)
    (path / "dataset.json").write_text(header.replace(good, good[::-1]))
    with pytest.raises(UserError, match=r"have fingerprint .*: a file was altered"):
        ImageDataset.open(path)
    (path / "dataset.json").write_text(header.replace('"downsample": 4', '"downsample": 8'))
    with pytest.raises(UserError, match=r"have fingerprint .*: a file was altered"):
        ImageDataset.open(path)
    (path / "dataset.json").write_text(header.replace('"version": 1', '"version": 9'))
    with pytest.raises(UserError, match="has version 9"):
        ImageDataset.open(path)
    (path / "dataset.json").write_text('{"version": 1, "sample_rate_hz": 8000}')
    with pytest.raises(UserError, match="is no dataset of images"):
        ImageDataset.open(path)
    os.unlink(path / "dataset.json")
    with pytest.raises(UserError, match=r"dataset\.json is missing"):
        ImageDataset.open(path)


def test_a_split_that_is_not_there_is_named(config, tmp_path):
    dataset = prepare_images(config(), tmp_path / "dataset")
    with pytest.raises(UserError, match="split='val' is none of train, dev, test"):
        dataset.samples("val")
