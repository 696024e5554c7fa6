"""SNAC: codes of three rates in one frame, that do not depend on company, from honest files."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import save_file
from torch import Tensor

from stages.audio_codec import load_audio_codec
from stages.errors import UserError
from stages.family import load_audio_codec_class
from stages.prepare import prepare
from stages.prepare_config import PrepareConfig, SnacAudioCodecConfig

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
RATE_HZ, FRAME_SAMPLES, ENTRIES = 24000, 2048, 64
TINY: dict[str, Any] = {
    "sampling_rate": RATE_HZ, "encoder_dim": 8, "encoder_rates": [2, 4, 8, 8], "decoder_dim": 32,
    "decoder_rates": [8, 8, 4, 2], "attn_window_size": None, "codebook_size": ENTRIES,
    "codebook_dim": 8, "vq_strides": [4, 2, 1], "noise": True, "depthwise": True,
}  # fmt: skip
"""The published 24 kHz model's shape, with fewer channels and entries."""
ATTENTIVE = TINY | {
    "encoder_rates": [2, 4], "encoder_dim": 16, "decoder_rates": [4, 2], "decoder_dim": 64,
    "attn_window_size": 32, "vq_strides": [8, 4, 2, 1],
}  # fmt: skip
"""With attention and four levels, as the 44 kHz model has them."""


@torch.no_grad()
def build(folder: Path, config: dict[str, Any]) -> Path:
    """Write a random model, lively enough to use its codes, in the published layout."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from snac import SNAC
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SNAC(**config)
        for name, parameter in model.named_parameters():
            if name.endswith("original0") and not name.startswith("decoder"):
                parameter.mul_(2.0)  # or what is quantised is hardly more than its bias
            elif name.endswith("bias"):
                parameter.zero_()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder


@pytest.fixture(scope="module")
def folder(require: Callable[[str, str], None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    require("snac", "pip install 'foretell[orpheus]'")
    return build(tmp_path_factory.mktemp("snac") / "tiny", TINY)


@pytest.fixture(scope="module")
def audio_codec(folder: Path) -> Any:
    from stages.families.snac_codec import SnacCodec

    return SnacCodec.open(folder)


@pytest.fixture(scope="module")
def attentive(folder: Path) -> Any:
    from stages.families.snac_codec import SnacCodec

    return SnacCodec.open(build(folder.with_name("attentive"), ATTENTIVE))


def noises(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [0.3 * torch.randn(length, generator=generator) for length in lengths]


RAGGED = noises(9000, 24000, 1, 2048, 2049, 40000, 5000)


def published(folder: Path) -> Any:
    """The package's own model of a folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from snac import SNAC

        return SNAC.from_pretrained(str(folder))


def test_the_configuration_alone_tells_rates_and_codebooks(folder, tmp_path):
    from stages.families.snac_codec import describe

    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    facts = describe(tmp_path)
    assert (facts.sampling_rate, facts.frame_samples) == (RATE_HZ, FRAME_SAMPLES)
    assert facts.frame_rate_hz == 11.71875
    assert facts.order.codes_per_level == (1, 2, 4)


def test_codes_are_the_packages_own_in_the_order_of_orpheus(folder, audio_codec):
    clip = RAGGED[5]
    with torch.inference_mode():
        first, second, third = (level[0] for level in published(folder).encode(clip[None, None]))
    (codes,) = audio_codec.encode([clip])
    assert codes.shape == (20, 7)
    assert min(len(np.unique(codes[:, slot])) for slot in range(7)) > 5
    for i, frame in enumerate(codes.astype(np.int64)):
        levels = [first[i], second[2 * i], third[4 * i], third[4 * i + 1]]
        levels += [second[2 * i + 1], third[4 * i + 2], third[4 * i + 3]]
        assert frame.tolist() == [int(code) for code in levels]


def test_sound_is_the_packages_own(folder, audio_codec):
    (codes,) = audio_codec.encode([RAGGED[1]])
    levels = audio_codec.order.separate(torch.from_numpy(codes.astype(np.int64)))
    model = published(folder)
    with torch.inference_mode(), torch.random.fork_rng():
        torch.manual_seed(0)
        audio = model.decode([level[None] for level in levels])
    assert torch.equal(audio_codec.decode(codes), audio[0, 0])


def test_the_same_codes_sound_the_same_and_touch_no_other_random_numbers(audio_codec):
    (codes,) = audio_codec.encode([RAGGED[1]])
    with torch.random.fork_rng():
        torch.manual_seed(5)
        expected = torch.rand(3)
        torch.manual_seed(5)
        first = audio_codec.decode(codes)
        assert torch.equal(torch.rand(3), expected)
    assert first.std() > 0.01
    assert torch.equal(audio_codec.decode(codes), first)


def test_codes_do_not_depend_on_the_clips_beside_them(audio_codec, attentive):
    for each in (audio_codec, attentive):
        together = each.encode(RAGGED)
        for clip, codes in zip(RAGGED, together, strict=True):
            assert codes.dtype == np.uint16
            assert codes.shape == (-(-len(clip) // each.settings.frame_samples), each.codebooks)
            np.testing.assert_array_equal(each.encode([clip])[0], codes)


def test_padding_in_a_batch_would_give_a_short_clip_other_codes(audio_codec):
    """Why clips are encoded one by one: if this fails, they need not be."""
    short, long = RAGGED[0], RAGGED[5]
    batch = torch.zeros(2, 1, len(long))
    batch[0, 0, : len(short)], batch[1, 0] = short, long
    with torch.inference_mode():
        levels = audio_codec.model.encode(batch)
    (alone,) = audio_codec.encode([short])
    padded = audio_codec.order.interleave([level[0] for level in levels])[: len(alone)]
    assert (padded.numpy() != alone).any()


@pytest.mark.parametrize("frames", [0, 1, 3, 4, 9])
def test_any_number_of_frames_becomes_as_much_audio(audio_codec, attentive, frames):
    for each in (audio_codec, attentive):
        shape = (frames, each.codebooks)
        codes = np.random.default_rng(0).integers(0, ENTRIES, shape).astype(np.uint16)
        waveform = each.decode(codes)
        assert waveform.shape == (frames * each.settings.frame_samples,)
        assert waveform.dtype == torch.float32


def test_it_is_imported_without_a_word(folder):
    command = [sys.executable, "-W", "error", "-c", "import stages.families.snac_codec"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_missing_package_is_an_error_with_the_command_to_type(monkeypatch):
    monkeypatch.delitem(sys.modules, "stages.families.snac_codec", raising=False)
    monkeypatch.setitem(sys.modules, "snac", None)
    with pytest.raises(UserError, match=r"needs the package 'snac'.*foretell\[orpheus\]"):
        load_audio_codec_class("snac")


def test_silence_has_no_frames(audio_codec):
    assert audio_codec.encode([torch.zeros(0)])[0].shape == (0, 7)


def test_four_levels_are_fifteen_codes_a_frame(attentive):
    assert attentive.codebooks == 15
    assert attentive.order.codes_per_level == (1, 2, 4, 8)


def test_levels_of_one_rate_have_no_slots(folder, tmp_path):
    from stages.families.snac_codec import SnacCodec

    level = SnacCodec.open(build(tmp_path / "level", TINY | {"vq_strides": [1, 1]}))
    assert (level.codebooks, level.slots) == (2, ())


def test_codes_of_another_vocabulary_are_refused(audio_codec):
    with pytest.raises(ValueError, match="code 64 is no entry of a codebook of 64"):
        audio_codec.decode(np.full((2, 7), ENTRIES, np.uint16))
    with pytest.raises(ValueError, match=r"not \[frames, 7\]"):
        audio_codec.decode(np.zeros((2, 3), np.uint16))


def test_distances_of_summed_vectors_are_those_of_quantised_frames(audio_codec):
    vectors = audio_codec.code_vectors()
    assert vectors.shape == (7, ENTRIES, 4 * 24)
    codes = torch.randint(ENTRIES, (30, 7), generator=torch.Generator().manual_seed(0))
    levels = [level[None] for level in audio_codec.order.separate(codes)]
    with torch.inference_mode():
        quantised = audio_codec.model.quantizer.from_codes(levels)[0]
    frames = quantised.T.reshape(30, -1)
    sums = sum(vectors[slot, codes[:, slot]] for slot in range(7))
    torch.testing.assert_close(*(torch.nn.functional.pdist(each) for each in (sums, frames)))


def test_a_saved_audio_codec_encodes_alike_and_an_altered_one_is_refused(audio_codec, tmp_path):
    from stages.families.snac_codec import SnacCodec

    audio_codec.save(tmp_path)
    loaded = load_audio_codec(tmp_path)
    assert loaded.fingerprint() == audio_codec.fingerprint()
    assert SnacCodec.open(tmp_path).fingerprint() == audio_codec.fingerprint()
    np.testing.assert_array_equal(loaded.encode(RAGGED[:1])[0], audio_codec.encode(RAGGED[:1])[0])
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"sampling_rate": 48000}))
    with pytest.raises(UserError, match="a file was altered"):
        load_audio_codec(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match=r"model\.safetensors are damaged"):
        load_audio_codec(tmp_path)


def test_the_container_of_the_weights_makes_no_difference(folder, audio_codec, tmp_path):
    from stages.families.snac_codec import SnacCodec

    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    spelled = dict(reversed(TINY.items())) | {"latent_dim": 128}
    (tmp_path / "config.json").write_text(json.dumps(spelled))
    save_file(weights, tmp_path / "model.safetensors")
    assert SnacCodec.open(tmp_path).fingerprint() == audio_codec.fingerprint()
    older = {
        name.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        ): tensor
        for name, tensor in weights.items()
    }
    assert older.keys() != weights.keys()
    save_file(older, tmp_path / "model.safetensors")
    assert SnacCodec.open(tmp_path).fingerprint() == audio_codec.fingerprint()
    weights["quantizer.quantizers.2.codebook.weight"][-1, -1] += 1e-3
    save_file(weights, tmp_path / "model.safetensors")
    assert SnacCodec.open(tmp_path).fingerprint() != audio_codec.fingerprint()


class Trap:
    """Unpickling it would make a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_weights_from_a_stranger_are_never_unpickled(folder, tmp_path, monkeypatch):
    from stages.families.snac_codec import SnacCodec

    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    trap = Trap(tmp_path / "sprung")
    for write in (torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, 2))):
        write({"a": trap}, tmp_path / "pytorch_model.bin")
        with pytest.raises(UserError, match=r"pytorch_model\.bin is refused: .* more than tensors"):
            SnacCodec.open(tmp_path)
    assert not trap.path.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {k: v for k, v in w.items() if "decoder" not in k}, r"lacks \d+ .* decoder\."),
        (lambda w: w | {"extra": torch.zeros(1)}, "has unknown 1 weights, such as extra"),
        (lambda w: w | {"encoder.block.0.bias": torch.zeros(9)}, "does not fit .*config.json"),
    ],
)
def test_weights_of_another_model_are_refused_with_the_file(folder, tmp_path, change, message):
    from stages.families.snac_codec import SnacCodec

    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    torch.save(change(weights), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=message) as error:
        SnacCodec.open(tmp_path)
    assert "pytorch_model.bin" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vq_strides": [4, 3, 1]}, "must divide the first"),
        ({"vq_strides": [2, 4, 1]}, "must divide the first"),
        ({"decoder_rates": [8, 8, 4]}, "their products differ"),
        ({"codebook_size": 70000}, "less than or equal to 65536"),
        ({"latent_dim": 100}, "not what the encoder has: 128"),
        ({"attn_window_size": 32}, "needs multiples of 64"),
        ({"decoder_dim": 24}, "cannot be halved 4 times"),
        ({"hidden_size": 24}, "hidden_size"),
    ],
)
def test_a_configuration_that_cannot_be_is_an_error_with_its_file(
    folder, tmp_path, changes, message
):
    from stages.families.snac_codec import describe

    (tmp_path / "config.json").write_text(json.dumps(TINY | changes))
    with pytest.raises(UserError, match=message) as error:
        describe(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value)


def test_an_empty_folder_says_what_is_needed(folder, tmp_path):
    from stages.families.snac_codec import SnacCodec

    with pytest.raises(UserError, match=r"with config\.json and pytorch_model\.bin"):
        SnacCodec.open(tmp_path)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(UserError, match=r"pytorch_model\.bin"):
        SnacCodec.open(tmp_path)


def test_recordings_become_the_codes_of_snac(folder, audio_codec, tmp_path):
    source = tmp_path / "source"
    (source / "wavs").mkdir(parents=True)
    random, rows = np.random.default_rng(0), []
    for number in range(8):
        soundfile.write(
            source / "wavs" / f"c{number}.wav",
            0.1 * random.standard_normal(8000 + 700 * number), 16000,
        )  # fmt: skip
        rows.append(f"c{number}|Text {number}||{'xy'[number % 2]}\n")
    (source / "metadata.csv").write_text("".join(rows))
    given = SnacAudioCodecConfig(kind="snac", path=folder, device="cpu")
    config = PrepareConfig(
        source=source, audio_codec=given, dev_texts=1, test_texts=1, context_s=0.3,
        alphabet="abcdefghijklmnopqrstuvwxyz0123456789 ",
    )  # fmt: skip
    dataset = prepare(config, tmp_path / "dataset")
    assert (dataset.facts.codebooks, dataset.facts.codes_per_codebook) == (7, ENTRIES)
    assert dataset.facts.frame_rate_hz == RATE_HZ / FRAME_SAMPLES
    orpheus = [[0, 0], [1, 0], [2, 0], [2, 1], [1, 1], [2, 2], [2, 3]]
    assert [list(slot) for slot in dataset.facts.slots] == orpheus
    written = json.loads((dataset.path / "dataset.json").read_text())["facts"]
    assert written["slots"] == orpheus
    assert written == dataset.facts.model_dump(mode="json")
    (row,) = dataset.samples("test")
    waveform, rate_hz = dataset.reference(row["sample_id"])
    assert rate_hz == RATE_HZ
    (codes,) = dataset.audio_codec().encode([waveform])
    np.testing.assert_array_equal(codes, dataset.codes(row))
    assert len(dataset.audio_codec().decode(codes)) == FRAME_SAMPLES * len(codes)
    # The dataset's copy is the same audio codec, wherever it lies.
    copy = given.model_copy(update={"path": dataset.path / "audio_codec"})
    again = prepare(config.model_copy(update={"audio_codec": copy}), dataset.path)
    assert again.header == dataset.header
