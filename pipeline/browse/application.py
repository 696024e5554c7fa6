"""The addresses of the local page, and what each answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pipeline.browse.clips import Clip
from pipeline.browse.live_index import LiveIndex
from pipeline.browse.ranges import in_ranges
from pipeline.browse.reports import RunFolder, describe_run
from pipeline.browse.rollout_index import PAGE_ROLLOUTS, Query, RolloutIndex
from pipeline.browse.store_view import (
    channels_png,
    describe_rollout,
    describe_timestep,
    overview,
)
from pipeline.stored_audio import StoredAudio
from stages.errors import UserError
from store import PredictionStore, StoreError
from store.errors import RolloutNotFound

HERE = Path(__file__).parent
ASSETS = {".css": "text/css", ".js": "text/javascript"}
REPORT_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; media-src data:; "
    "font-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""A report is one file that holds all it shows; no script of it would run."""
KEPT_CLIPS = 16
LONGEST_ID = 4096

Found = TypeVar("Found")


class BadAddress(UserError):
    """An address that no page of ours asks for."""


@dataclass
class Browse:
    """What the page shows: a store, runs, or both. Threads share it."""

    store: PredictionStore | None
    runs: list[RunFolder]
    dataset: Path | None = None
    """Where the audio codec of the store is; None looks beside the store."""
    look_s: float | None = None
    """Least time between two looks for new shards; None suits the place of the store."""
    _live: LiveIndex | None = field(init=False, default=None)
    _clips: dict[tuple[str, ...], Clip] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock)

    def __post_init__(self) -> None:
        if self.store is not None:
            self._live = LiveIndex(self.store, self.look_s)

    @property
    def index(self) -> RolloutIndex:
        """The rollouts of the store by now; raises `UserError` where there is no store."""
        if self._live is None:
            raise UserError("no store is shown: name its folder when you start `inspect serve`")
        return self._live.current()

    @cached_property
    def audio(self) -> StoredAudio:
        """Decodes codes of the store; raises `UserError` where that cannot be."""
        return StoredAudio.open(self.index.store, self.dataset)

    def overview(self, _: Request) -> Response:
        """What is shown by now: the store, and the runs by their numbers."""
        runs = [
            {"run": number, "name": run.name, "report": run.report_stamp}
            for number, run in enumerate(self.runs)
            if run.is_shown
        ]
        return JSONResponse({"store": self._shown_store(), "runs": runs})

    def _shown_store(self) -> dict[str, Any] | None:
        if self._live is None:
            return None
        shown = overview(self._live.current())
        return shown | self._heard() | {"trouble": self._live.trouble}

    def _heard(self) -> dict[str, str | bool | None]:
        """Why nothing of the store can be heard, and whether recordings can be; loads no codec."""
        try:
            dataset = self.audio.dataset
        except UserError as error:
            return {"silence": str(error), "recordings": False}
        return {"silence": None, "recordings": (dataset / "samples.parquet").is_file()}

    def rollouts(self, request: Request) -> Response:
        """A page of the rollouts that match."""
        query = Query.model_validate({k: v for k, v in request.query_params.items() if v})
        return JSONResponse(self.index.find(query))

    def entropies(self, request: Request) -> Response:
        """Mean entropies of some rollouts, by their places in the plan."""
        places = [_number("places", part) for part in _given(request, "places").split(",")]
        return JSONResponse(self.index.learn(places[:PAGE_ROLLOUTS]))

    def rollout(self, request: Request) -> Response:
        """One rollout over time."""
        return JSONResponse(describe_rollout(self.index, *_key(request)))

    def timestep(self, request: Request) -> Response:
        """One timestep: drawn codes and candidates."""
        timestep = _integer(request, "timestep")
        return JSONResponse(describe_timestep(self.index.store, *_key(request), timestep))

    def channels(self, request: Request) -> Response:
        """PNG of a stored prediction."""
        place = (_integer(request, "timestep"), _integer(request, "stream"))
        content = channels_png(self.index.store, *_key(request), *place, _given(request, "array"))
        return Response(content, media_type="image/png")

    def run(self, request: Request) -> Response:
        """What the evaluation of a run found."""
        return JSONResponse(describe_run(self._run(request)))

    def training(self, request: Request) -> Response:
        """What the training logs of a run say by now."""
        return JSONResponse(self._run(request).logs.describe())

    def report(self, request: Request) -> Response:
        """The report of a run, as it is."""
        page = self._run(request).page
        if page is None:
            raise UserError("this run has no report.html: run `foretell evaluate` first")
        headers = {"content-security-policy": REPORT_POLICY}
        return Response(page.read_bytes(), media_type="text/html", headers=headers)

    def picture(self, request: Request) -> Response:
        """PNG of what a system drew."""
        run, item = self._run(request), _integer(request, "item")
        content = run.picture(item, _given(request, "system")).read_bytes()
        return Response(content, media_type="image/png")

    def wav(self, request: Request) -> Response:
        """A clip, or a range of its bytes."""
        return in_ranges(request, self._clip(request).wav, "audio/wav")

    def outline(self, request: Request) -> Response:
        """Duration and waveform of a clip."""
        clip = self._clip(request)
        facts = {"seconds": clip.seconds, "rate_hz": clip.rate_hz, "outline": clip.outline}
        return JSONResponse(facts)

    def spectrogram(self, request: Request) -> Response:
        """PNG of the spectrogram of a clip."""
        return Response(self._clip(request).spectrogram, media_type="image/png")

    def _run(self, request: Request) -> RunFolder:
        number = _integer(request, "run")
        if not 0 <= number < len(self.runs):
            raise UserError(f"run {number} is not in [0, {len(self.runs)})")
        return self.runs[number]

    def _clip(self, request: Request) -> Clip:
        """The clip of a run's system, of a rollout, or of the recording behind it.

        A few stay in memory: a browser asks for the same one several times, part by part.
        """
        if "run" in request.query_params:
            item, system = _integer(request, "item"), _given(request, "system")
            path = self._run(request).clip(item, system)
            place = (str(path), str(path.stat().st_mtime_ns))
            return self._kept(place, partial(Clip.read, path))
        sample_id, variation = _key(request)
        if "recording" in request.query_params:
            return self._kept(
                ("recording", sample_id), lambda: Clip(*self.audio.recording(sample_id))
            )
        return self._kept(
            ("rollout", sample_id, str(variation), str(self.index.stamp_of(sample_id, variation))),
            lambda: Clip(*self.audio.waveform(sample_id, variation)),
        )

    def _kept(self, place: tuple[str, ...], make: Callable[[], Clip]) -> Clip:
        with self._lock:  # several parts of a clip are asked for at once, and it is made once
            clip = self._clips.pop(place, None) or make()
            self._clips[place] = clip
            while len(self._clips) > KEPT_CLIPS:
                del self._clips[next(iter(self._clips))]
            return clip


def application(browse: Browse) -> Starlette:
    """Return the page as an ASGI application; every address is fixed, none leads to a file."""
    page = (HERE / "page.html").read_bytes()
    assets = {p.name: p.read_bytes() for p in sorted(HERE.iterdir()) if p.suffix in ASSETS}
    answers: Mapping[str, Callable[[Request], Response]] = {
        "/": partial(_file, page, "text/html"),
        **{
            f"/{name}": partial(_file, content, ASSETS[Path(name).suffix])
            for name, content in assets.items()
        },
        "/favicon.ico": lambda _: Response(status_code=204),
        "/api/overview": browse.overview,
        "/api/rollouts": browse.rollouts,
        "/api/entropies": browse.entropies,
        "/api/rollout": browse.rollout,
        "/api/timestep": browse.timestep,
        "/api/run": browse.run,
        "/api/training": browse.training,
        "/api/outline": browse.outline,
        "/clip.wav": browse.wav,
        "/spectrogram.png": browse.spectrogram,
        "/channels.png": browse.channels,
        "/picture.png": browse.picture,
        "/report": browse.report,
    }
    return Starlette(
        routes=[Route(path, answer, methods=["GET"]) for path, answer in answers.items()],
        exception_handlers={
            ValidationError: _refused,
            UserError: _refused,
            StoreError: _refused,
            404: _absent,
        },
    )


def _file(content: bytes, media_type: str, _: Request) -> Response:
    return Response(content, media_type=media_type)


def _refused(_: Request, error: Exception) -> Response:
    """Tell the page what is wrong, in the words of the command line."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return JSONResponse({"error": f"{first['loc'][0]}: {first['msg']}"}, 400)
    if isinstance(error, BadAddress):
        return JSONResponse({"error": str(error)}, 400)
    status = 404 if isinstance(error, UserError | RolloutNotFound) else 500
    return JSONResponse({"error": str(error)}, status)


def _absent(_: Request, __: Exception) -> Response:
    return JSONResponse({"error": "there is nothing at this address"}, 404)


def _key(request: Request) -> tuple[str, int]:
    return _given(request, "sample"), _integer(request, "variation")


def _given(request: Request, name: str) -> str:
    value = request.query_params.get(name, "")
    if not 0 < len(value) <= LONGEST_ID:
        raise BadAddress(f"the address must say {name}=…, of at most {LONGEST_ID} letters")
    return value


def _integer(request: Request, name: str) -> int:
    return _number(name, _given(request, name))


def _number(name: str, text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= 10):
        raise BadAddress(f"{name}={text[:40]!r} must be a number of at most ten digits")
    return int(text)
