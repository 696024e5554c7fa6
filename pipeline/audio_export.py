"""What `foretell inspect audio` does and says: one clip of a store as a WAV file."""

from __future__ import annotations

from pathlib import Path

from pipeline.rollout_inspection import ROLLOUT_KEY
from pipeline.stored_audio import StoredAudio
from stages.errors import UserError
from store import PredictionStore
from store.object_url import ObjectUrl
from store.schema import Record


class Clip(Record):
    """A clip that was written."""

    file: str
    """Where it is."""
    sample_id: str
    """Whose it is."""
    variation: int | None
    """Which rollout of the sample; null where it is the recording."""
    timesteps: int | None
    """Timesteps of that rollout; null where it is the recording."""
    stop_reason: str | None
    """Why it ended; null where it is the recording."""
    samples: int
    """Samples of the waveform."""
    rate_hz: int
    """Their rate."""

    @property
    def audio_s(self) -> float:
        """How long it is."""
        return self.samples / self.rate_hz


def export_clip(
    path: Path | ObjectUrl,
    key: str,
    output: Path,
    *,
    dataset: Path | None = None,
    recording: bool = False,
    overwrite: bool = False,
) -> Clip:
    """Write what the rollout SAMPLE/VARIATION of a store sounds like into a WAV file.

    With `recording` it is what the codes of the sample's own recording sound like. Raises
    `UserError` for a key of another form, an output that is there (unless `overwrite`) or no .wav,
    and what `StoredAudio` raises.
    """
    _require_writable(output, overwrite)
    match = ROLLOUT_KEY.fullmatch(key)
    if match is None:
        raise UserError(
            f"key {key!r} is not SAMPLE/VARIATION, such as {_example(path)!r}: a whole rollout is "
            "heard, and not a timestep"
        )
    sample_id, variation = match["sample_id"], int(match["variation"])
    store = PredictionStore.open(path)
    audio = StoredAudio.open(store, dataset)
    rollout = store[sample_id, variation]
    waveform = audio.recording(sample_id) if recording else audio.waveform(sample_id, variation)
    if not len(waveform.samples):
        raise UserError(
            f"{sample_id!r} variation {variation} ends within its first codec frame "
            f"({rollout.stop_reason}): there is nothing to hear"
        )
    from stages.audio import encode_wav  # noqa: PLC0415, it needs torch
    from stages.publish import replace_file  # noqa: PLC0415, likewise

    try:
        replace_file(output, encode_wav(*waveform))
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror}") from error
    return Clip(
        file=str(output),
        sample_id=sample_id,
        variation=None if recording else variation,
        timesteps=None if recording else len(rollout),
        stop_reason=None if recording else rollout.stop_reason,
        samples=len(waveform.samples),
        rate_hz=waveform.rate_hz,
    )


def clip_text(clip: Clip) -> str:
    """Return what was written, in a sentence."""
    if clip.variation is None:
        what = f"the recording {clip.sample_id!r}, as its codes sound"
    else:
        what = (
            f"{clip.sample_id!r} variation {clip.variation}, {clip.timesteps} timesteps "
            f"({clip.stop_reason})"
        )
    return f"{what}\n  {clip.file}: {clip.audio_s:.2f} s at {clip.rate_hz:,} Hz"


def _require_writable(output: Path, overwrite: bool) -> None:
    if output.suffix.lower() != ".wav":
        raise UserError(
            f"-o {output}: what is written is a WAV file; give a name that ends in .wav"
        )
    if output.is_dir():
        raise UserError(f"-o {output} is a folder: name a file in it")
    if output.exists() and not overwrite:
        raise UserError(f"-o {output} is there: choose another name, or replace it with --force")


def _example(path: Path | ObjectUrl) -> str:
    sample_id, variation = next(iter(PredictionStore.open(path).keys()), ("SAMPLE", 0))
    return f"{sample_id}/{variation}"
