"""NeMo's audio codec: codes that do not depend on company, sound at its own rate, honest files."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from stages.audio_codec import load_audio_codec
from stages.errors import UserError
from stages.prepare import prepare
from stages.prepare_config import NemoAudioCodecConfig, PrepareConfig

pytestmark = pytest.mark.slow

RATE_HZ, FRAME_SAMPLES = 22050, 1024


@pytest.fixture(scope="module")
def tiny(require: Callable[[str, str], None]) -> Any:
    require("nemo", "pip install 'foretell[magpie]'")
    from stages.families.nemo_archive import quiet

    with quiet():
        from stages.families import magpie_tiny
    return magpie_tiny


@torch.no_grad()
def build(path: Path, tiny: Any, **changes: Any) -> Path:
    """Write a lively audio codec whose settings are changed."""
    from nemo.collections.tts.models import AudioCodecModel
    from omegaconf import OmegaConf

    from stages.families.nemo_archive import quiet

    with quiet(), torch.random.fork_rng():
        torch.manual_seed(0)
        model = AudioCodecModel(OmegaConf.create(tiny.codec_config() | changes)).eval()
        tiny.enliven(model)
        model.save_to(str(path))
    return path


@pytest.fixture(scope="module")
def path(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("codec") / "codec.nemo", tiny)


@pytest.fixture(scope="module")
def audio_codec(path: Path) -> Any:
    from stages.families.nemo_codec import NemoCodec

    return NemoCodec.open(path)


def noises(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [0.1 * torch.randn(length, generator=generator) for length in lengths]


RAGGED = noises(9000, 22050, 1, 1024, 1025, 40000, 5000)


def test_the_configuration_alone_tells_rates_and_codebooks(path, audio_codec):
    from stages.families.nemo_codec import describe

    facts = describe(path)
    assert (facts.sample_rate_hz, facts.output_sample_rate_hz) == (RATE_HZ, RATE_HZ)
    assert (facts.codebooks, facts.codes_per_codebook) == (4, 64)
    assert facts.frame_rate_hz == audio_codec.frame_rate_hz == RATE_HZ / FRAME_SAMPLES


def test_codes_are_nemos_own(path, audio_codec):
    from nemo.collections.tts.models import AudioCodecModel

    from stages.families.nemo_archive import SafeConnector, quiet

    clip = RAGGED[1]
    with quiet(), torch.inference_mode():
        model = AudioCodecModel.restore_from(
            str(path), map_location="cpu", save_restore_connector=SafeConnector()
        ).eval()
        tokens, _ = model.encode(audio=clip[None], audio_len=torch.tensor([len(clip)]))
        audio, _ = model.decode(tokens=tokens, tokens_len=torch.tensor([tokens.shape[2]]))
    (codes,) = audio_codec.encode([clip])
    np.testing.assert_array_equal(codes, tokens[0].T.numpy())
    assert len(np.unique(codes)) > 20
    assert torch.equal(audio_codec.decode(codes), audio[0])


def test_codes_do_not_depend_on_the_clips_beside_them(audio_codec):
    together = audio_codec.encode(RAGGED)
    for clip, codes in zip(RAGGED, together, strict=True):
        assert codes.dtype == np.uint16
        assert codes.shape == (-(-len(clip) // FRAME_SAMPLES), 4)
        np.testing.assert_array_equal(audio_codec.encode([clip])[0], codes)


def test_a_batch_of_nemos_would_give_a_short_clip_other_codes(audio_codec):
    """Why clips are encoded one by one: if this fails, they need not be."""
    short, long = RAGGED[0], RAGGED[5]
    batch = torch.zeros(2, len(long))
    batch[0, : len(short)], batch[1] = short, long
    lengths = torch.tensor([len(short), len(long)])
    with torch.inference_mode():
        tokens, frames = audio_codec.model.encode(audio=batch, audio_len=lengths)
    (alone,) = audio_codec.encode([short])
    assert (tokens[0, :, : frames[0]].T.numpy() != alone).any()


@pytest.mark.parametrize("frames", [0, 1, 3, 4, 9])
def test_any_number_of_frames_becomes_as_much_audio(audio_codec, frames):
    codes = np.random.default_rng(0).integers(0, 64, (frames, 4)).astype(np.uint16)
    waveform = audio_codec.decode(codes)
    assert waveform.shape == (frames * FRAME_SAMPLES,)
    assert waveform.dtype == torch.float32


def test_codes_of_another_vocabulary_are_refused(audio_codec):
    with pytest.raises(ValueError, match="code 64 is no entry of a codebook of 64"):
        audio_codec.decode(np.full((2, 4), 64, np.uint16))
    with pytest.raises(ValueError, match=r"not \[frames, 4\]"):
        audio_codec.decode(np.zeros((2, 3), np.uint16))


def test_a_frame_is_the_sum_of_its_codes_vectors(audio_codec):
    vectors = audio_codec.code_vectors()
    assert vectors.shape[:2] == (4, 64)
    codes = torch.randint(64, (50, 4), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        frames = audio_codec.model.dequantize(tokens=codes.T[None], tokens_len=torch.tensor([50]))
    sums = sum(vectors[book, codes[:, book]] for book in range(4))
    rest = frames[0].T - sums
    torch.testing.assert_close(rest, rest[:1].expand_as(rest))
    distances = torch.cdist(vectors, vectors) + 9 * torch.eye(64)
    assert distances.min() > 0.1  # no two codes of a codebook mean the same


def test_an_audio_codec_that_decodes_at_another_rate_says_so(tiny, tmp_path):
    from stages.families.nemo_codec import NemoCodec

    decoder = tiny.codec_config()["audio_decoder"] | {"up_sample_rates": [8, 8, 8, 4]}
    changed = build(
        tmp_path / "codec.nemo", tiny, output_sample_rate=2 * RATE_HZ, audio_decoder=decoder
    )
    audio_codec = NemoCodec.open(changed)
    assert audio_codec.output_sample_rate_hz == 2 * audio_codec.sample_rate_hz
    codes = audio_codec.encode(RAGGED[:1])[0]
    assert len(audio_codec.decode(codes)) == 2 * FRAME_SAMPLES * len(codes)
    assert len(audio_codec.decode(codes[:2])) == 4 * FRAME_SAMPLES


def test_a_residual_quantiser_works_too(tiny, tmp_path):
    from stages.families.nemo_codec import NemoCodec

    module = "nemo.collections.tts.modules.encodec_modules"
    quantiser = {
        "_target_": f"{module}.ResidualVectorQuantizer",
        "num_codebooks": 3, "codebook_size": 16, "codebook_dim": 12, "kmeans_iters": None,
    }  # fmt: skip
    audio_codec = NemoCodec.open(build(tmp_path / "codec.nemo", tiny, vector_quantizer=quantiser))
    assert (audio_codec.codebooks, audio_codec.codes_per_codebook) == (3, 16)
    assert audio_codec.code_vectors().shape == (3, 16, 12)
    assert audio_codec.encode(RAGGED[:1])[0].max() < 16


def test_a_saved_audio_codec_encodes_alike_and_an_altered_one_is_refused(audio_codec, tmp_path):
    audio_codec.save(tmp_path)
    loaded = load_audio_codec(tmp_path)
    assert loaded.fingerprint() == audio_codec.fingerprint()
    np.testing.assert_array_equal(loaded.encode(RAGGED[:1])[0], audio_codec.encode(RAGGED[:1])[0])
    header = json.loads((tmp_path / "audio_codec.json").read_text())
    (tmp_path / "audio_codec.json").write_text(json.dumps(header | {"fingerprint": "0" * 64}))
    with pytest.raises(UserError, match="a file was altered"):
        load_audio_codec(tmp_path)
    (tmp_path / "codec.nemo").unlink()
    with pytest.raises(UserError, match=r"codec\.nemo cannot be read"):
        load_audio_codec(tmp_path)


def rewritten(path: Path, out: Path, change: Callable[[str, bytes], bytes | None]) -> Path:
    """Copy an archive with its members changed, or left out where there is None."""
    with tarfile.open(path) as old, tarfile.open(out, "w:") as new:
        for member in old.getmembers():
            file = old.extractfile(member)
            content = None if file is None else change(Path(member.name).name, file.read())
            if content is not None:
                member.size = len(content)
                new.addfile(member, io.BytesIO(content))
    return out


def test_weights_that_are_missing_are_not_drawn_at_random(path, tmp_path):
    from stages.families.nemo_codec import NemoCodec

    def without_decoder(name: str, content: bytes) -> bytes:
        if not name.endswith(".ckpt"):
            return content
        weights = torch.load(io.BytesIO(content), weights_only=True)
        file = io.BytesIO()
        torch.save({k: v for k, v in weights.items() if "audio_decoder" not in k}, file)
        return file.getvalue()

    with pytest.raises(UserError, match=r"lacks \d+ weights .* such as audio_decoder\."):
        NemoCodec.open(rewritten(path, tmp_path / "half.nemo", without_decoder))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("AudioCodecModel", "VitsModel", "holds a .*VitsModel, but an audio codec is needed"),
        ("GroupFiniteScalarQuantizer", "Nothing", "no audio codec can be built"),
        ("nemo.collections.tts.modules.audio_codec_modules.Group", "os.path.", "unsafe target"),
        ("vector_quantizer:", "quantiser:", "lacks vector_quantizer"),
        ("sample_rate: 22050", "sample_rate: fast", "no audio codec can be built"),
        ("encoded_dim: 12", "encoded_dim: 16", "do not fit its configuration"),
        (
            "sample_rate: 22050",
            "sample_rate: 22050\nsemantic_codec_path: /a",
            "save the audio codec",
        ),
    ],
)
def test_another_model_or_configuration_is_an_error_with_the_file(
    path, tmp_path, old, new, message
):
    from stages.families.nemo_codec import NemoCodec

    def change(name: str, content: bytes) -> bytes:
        if not name.endswith(".yaml"):
            return content
        assert old in content.decode()
        return content.decode().replace(old, new).encode()

    with pytest.raises(UserError, match=message) as error:
        NemoCodec.open(rewritten(path, tmp_path / "other.nemo", change))
    assert "other.nemo" in str(error.value)


def test_what_only_training_needs_is_neither_built_nor_downloaded(path, tmp_path):
    from stages.families.nemo_codec import NemoCodec

    judge = "nemo.collections.tts.modules.audio_codec_modules.SLMDiscriminator"
    more = (
        f"use_scl_loss: true\nuse_slm_loss: true\ndiscriminator: {{_target_: {judge}}}\n".encode()
    )
    changed = rewritten(
        path,
        tmp_path / "judged.nemo",
        lambda name, content: content + more if name.endswith(".yaml") else content,
    )
    np.testing.assert_array_equal(
        NemoCodec.open(changed).encode(RAGGED[:1])[0], NemoCodec.open(path).encode(RAGGED[:1])[0]
    )


def write_source(folder: Path) -> Path:
    (folder / "wavs").mkdir(parents=True)
    random, rows = np.random.default_rng(0), []
    for number in range(8):
        wave = 0.1 * random.standard_normal(8000 + 700 * number)
        soundfile.write(folder / "wavs" / f"c{number}.wav", wave, 16000)
        rows.append(f"c{number}|Text {number}||{'xy'[number % 2]}\n")
    (folder / "metadata.csv").write_text("".join(rows))
    return folder


def test_recordings_become_the_codes_of_nemos_audio_codec(path, audio_codec, tmp_path):
    given = NemoAudioCodecConfig(kind="nemo", path=path, device="cpu")
    config = PrepareConfig(
        source=write_source(tmp_path / "source"), audio_codec=given, dev_texts=1, test_texts=1,
        context_s=0.3, alphabet="abcdefghijklmnopqrstuvwxyz0123456789 ",
    )  # fmt: skip
    dataset = prepare(config, tmp_path / "dataset")
    facts = dataset.facts
    assert (facts.codebooks, facts.codes_per_codebook) == (4, 64)
    assert facts.frame_rate_hz == RATE_HZ / FRAME_SAMPLES
    assert facts.audio_codec == audio_codec.fingerprint()
    assert dataset.header.sample_rate_hz == RATE_HZ
    (row,) = dataset.samples("test")
    waveform, rate_hz = dataset.reference(row["sample_id"])
    assert rate_hz == RATE_HZ
    (codes,) = dataset.audio_codec().encode([waveform])
    np.testing.assert_array_equal(codes, dataset.codes(row))
    assert len(row["context_codes"]) == 4 * facts.context_frames
    # A copy elsewhere is the same audio codec; another one is not.
    path.with_name("copy.nemo").write_bytes(path.read_bytes())
    elsewhere = given.model_copy(update={"path": path.with_name("copy.nemo"), "device": "auto"})
    again = prepare(config.model_copy(update={"audio_codec": elsewhere}), tmp_path / "dataset")
    assert again.header == dataset.header


def test_a_dataset_of_another_audio_codec_is_not_overwritten(path, tiny, tmp_path):
    source = write_source(tmp_path / "source")
    given = NemoAudioCodecConfig(kind="nemo", path=path, device="cpu")
    config = PrepareConfig(source=source, audio_codec=given, dev_texts=1, test_texts=1)
    prepare(config, tmp_path / "dataset")
    other = build(
        tmp_path / "other.nemo",
        tiny,
        audio_encoder=tiny.codec_config()["audio_encoder"] | {"base_channels": 2},
    )
    changed = config.model_copy(update={"audio_codec": given.model_copy(update={"path": other})})
    with pytest.raises(UserError, match="prepared with another audio_codec"):
        prepare(changed, tmp_path / "dataset")


def test_a_missing_file_is_an_error_before_any_recording_is_read(tiny, tmp_path):
    given = NemoAudioCodecConfig(kind="nemo", path=tmp_path / "absent.nemo", device="cpu")
    source = write_source(tmp_path / "source")
    with pytest.raises(UserError, match=r"absent\.nemo cannot be read"):
        prepare(PrepareConfig(source=source, audio_codec=given), tmp_path / "dataset")
    assert not (tmp_path / "dataset").exists()
