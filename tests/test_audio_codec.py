"""The audio codec: codes that do not depend on company, sound that comes back, files that last."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from stages.audio import resample, trim_silence
from stages.audio_codec import ResidualMel, load_audio_codec
from stages.errors import UserError
from stages.prepare_config import FitAudioCodecConfig, SpectrumDecoderConfig
from stages.residual_kmeans import fit_codebooks, nearest, quantise

RATE_HZ = 8000
SMALL = FitAudioCodecConfig(
    sample_rate_hz=RATE_HZ, hop=64, mels=20, codebooks=4, codes_per_codebook=16, iterations=4,
    decoder=SpectrumDecoderConfig(
        width=32, layers=1, steps=250, batch_size=8, crop_frames=16, learning_rate=1e-2
    ),
)  # fmt: skip


def melody(seed: int, seconds: float = 0.6) -> Tensor:
    """Three notes of two harmonics, with a little noise."""
    random = np.random.default_rng(seed)
    notes = np.repeat(random.choice([200.0, 300.0, 450.0, 700.0], 3), round(seconds * RATE_HZ / 3))
    phase = 2 * np.pi * np.cumsum(notes) / RATE_HZ
    samples = 0.2 * np.sin(phase) + 0.1 * np.sin(2 * phase) + 0.002 * random.normal(size=len(phase))
    return torch.from_numpy(samples.astype(np.float32))


WAVEFORMS = [melody(seed, 0.5 + 0.05 * (seed % 5)) for seed in range(20)]


@pytest.fixture(scope="module")
def audio_codec() -> ResidualMel:
    return ResidualMel.fit(SMALL, WAVEFORMS)


def log_spectrum(waveform: Tensor) -> Tensor:
    window = torch.hann_window(256)
    spectrum = torch.stft(waveform, 256, 64, window=window, return_complex=True).abs()
    return spectrum.clamp(min=0.05).log()


def test_codes_have_a_frame_for_every_started_stretch_of_audio(audio_codec):
    codes = audio_codec.encode([torch.zeros(1), torch.zeros(128), torch.zeros(129)])
    assert [each.shape for each in codes] == [(1, 4), (1, 4), (2, 4)]
    assert all(each.dtype == np.uint16 for each in codes)
    assert audio_codec.frame_rate_hz == RATE_HZ / 128


def test_codes_do_not_depend_on_the_clips_beside_them(audio_codec):
    together = audio_codec.encode(WAVEFORMS)
    for waveform, codes in zip(WAVEFORMS, together, strict=True):
        np.testing.assert_array_equal(audio_codec.encode([waveform])[0], codes)


def test_a_copy_resembles_its_original_more_than_another_clip(audio_codec):
    codes = audio_codec.encode(WAVEFORMS[:6])
    copies = [audio_codec.decode(each) for each in codes]
    for i, copy in enumerate(copies):
        assert len(copy) == len(codes[i]) * 128
        length = min(map(len, [copy, *WAVEFORMS[:6]]))
        distances = [
            float((log_spectrum(copy[:length]) - log_spectrum(w[:length])).abs().mean())
            for w in WAVEFORMS[:6]
        ]
        assert np.argmin(distances) == i


def test_the_trained_decoder_is_nearer_to_the_spectrum_than_the_inverted_filter_bank(audio_codec):
    plain = ResidualMel(
        SMALL.model_copy(update={"decoder": None}),
        audio_codec.mean,
        audio_codec.centroids,
        decoder=None,
    )

    def distance(decoded_by: ResidualMel) -> float:
        errors = []
        for waveform in (melody(seed) for seed in range(100, 106)):
            copy = decoded_by.decode(audio_codec.encode([waveform])[0])[: len(waveform)]
            errors.append(float((log_spectrum(copy) - log_spectrum(waveform)).abs().mean()))
        return float(np.mean(errors))

    assert distance(audio_codec) < 0.9 * distance(plain)


def test_fitting_twice_gives_the_same_audio_codec(audio_codec):
    with torch.random.fork_rng():
        torch.manual_seed(99)
        again = ResidualMel.fit(SMALL, WAVEFORMS)
    assert again.fingerprint() == audio_codec.fingerprint()
    other = ResidualMel.fit(SMALL.model_copy(update={"seed": 1}), WAVEFORMS)
    assert other.fingerprint() != audio_codec.fingerprint()


def test_every_codebook_lowers_what_is_left_over():
    features = torch.randn(800, 6, generator=torch.Generator().manual_seed(0))
    books = fit_codebooks(features, SMALL)
    codes, left, last = quantise(features, books), features, float("inf")
    for c, book in enumerate(books):
        left = left - book[codes[:, c]]
        assert left.square().mean() < 0.8 * min(last, features.square().mean())
        last = float(left.square().mean())


def test_the_nearest_centroid_is_the_nearest():
    points, centroids = torch.randn(50, 3), torch.randn(9, 3)
    distances = (points[:, None] - centroids[None]).norm(dim=2)
    assert torch.equal(nearest(points, centroids), distances.argmin(dim=1))


def test_codebooks_are_found_where_there_are_fewer_different_points_than_codes():
    features = torch.eye(3).repeat(20, 1)
    books = fit_codebooks(features, SMALL)
    assert torch.isfinite(books).all()
    restored = sum(book[quantise(features, books)[:, c]] for c, book in enumerate(books))
    torch.testing.assert_close(restored, features, atol=1e-5, rtol=0)


def test_a_saved_audio_codec_encodes_and_decodes_alike(audio_codec, tmp_path):
    audio_codec.save(tmp_path)
    loaded = load_audio_codec(tmp_path)
    codes = audio_codec.encode(WAVEFORMS[:2])
    np.testing.assert_array_equal(loaded.encode(WAVEFORMS[:2])[1], codes[1])
    assert torch.equal(loaded.decode(codes[0]), audio_codec.decode(codes[0]))
    assert loaded.fingerprint() == audio_codec.fingerprint()


def test_an_altered_audio_codec_is_refused(audio_codec, tmp_path):
    audio_codec.save(tmp_path)
    weights = tmp_path / "audio_codec.safetensors"
    tensors = load_file(weights)
    tensors["codebooks"][2, 3, 4] += 1e-3
    save_file(tensors, weights)
    with pytest.raises(UserError, match="a file was altered"):
        load_audio_codec(tmp_path)


@pytest.mark.parametrize("name", ["audio_codec.json", "audio_codec.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"{}", b"\x00" * 64])
def test_a_damaged_audio_codec_is_an_error_with_its_folder(audio_codec, tmp_path, name, content):
    audio_codec.save(tmp_path)
    file: Path = tmp_path / name
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(UserError, match=f"no audio codec can be read from {tmp_path}"):
        load_audio_codec(tmp_path)


def test_an_audio_codec_without_a_weight_is_refused(audio_codec, tmp_path):
    audio_codec.save(tmp_path)
    weights = tmp_path / "audio_codec.safetensors"
    tensors = load_file(weights)
    del tensors["decoder.output.bias"]
    save_file(tensors, weights)
    with pytest.raises(UserError, match=r"output\.bias"):
        load_audio_codec(tmp_path)


def test_the_header_names_settings_and_fingerprint(audio_codec, tmp_path):
    audio_codec.save(tmp_path)
    header = json.loads((tmp_path / "audio_codec.json").read_text())
    assert FitAudioCodecConfig.model_validate(header["config"]) == SMALL
    assert header["fingerprint"] == audio_codec.fingerprint()


def test_codes_outside_the_codebooks_are_refused(audio_codec):
    with pytest.raises(ValueError, match="code 16 is no entry of a codebook of 16"):
        audio_codec.decode(np.full((3, 4), 16, dtype=np.uint16))
    with pytest.raises(ValueError, match=r"shape \(3, 5\), not \[frames, 4\]"):
        audio_codec.decode(np.zeros((3, 5), dtype=np.uint16))


def test_too_little_audio_for_the_codebooks_is_an_error():
    with pytest.raises(UserError, match=r"gives 4 codec frames, fewer than .*=16"):
        ResidualMel.fit(SMALL, [torch.zeros(512)])


def test_resampling_keeps_a_tone_and_its_length():
    time_s = torch.arange(24000) / 24000
    changed = resample(torch.sin(2 * torch.pi * 440 * time_s), 24000, 22050)
    expected = torch.sin(2 * torch.pi * 440 * torch.arange(22050) / 22050)
    assert len(changed) == 22050
    torch.testing.assert_close(changed[500:-500], expected[500:-500], atol=1e-3, rtol=0)


def test_trimming_keeps_the_speech_and_a_margin():
    speech = torch.ones(800)
    padded = torch.cat([torch.zeros(1600), speech, torch.full((2400,), 1e-4)])
    trimmed = trim_silence(padded, RATE_HZ, below_peak_db=40, keep_s=0.05)
    assert len(trimmed) == 800 + 2 * 400
    assert torch.equal(trimmed[400:1200], speech)
    silence = torch.zeros(100)
    assert torch.equal(trim_silence(silence, RATE_HZ, 40, 0.05), silence)
