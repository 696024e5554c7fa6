"""The local page over HTTP: who may read what, and that it says what the store and the runs do."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import soundfile
from PIL import Image

from pipeline.browse.application import Browse
from pipeline.browse.clips import SPECTROGRAM_ROWS, Clip
from pipeline.browse.reports import run_folders
from pipeline.browse.rollout_index import PAGE_ROLLOUTS, Query, RolloutIndex
from pipeline.browse.serving import Listening, browse_of, page_server
from pipeline.browse.store_view import MOST_CANDIDATES
from pipeline.candidates import describe_stream
from pipeline.entry import main
from stages.errors import UserError
from stages.report_schema import AudioClip, AudioSample, Images, ImageSample, Report, System
from store import PredictionStore
from store.plan import Plan
from store.schema import Full, Hidden, Sampled, Target, TopK
from store.synthetic import (
    synthetic_arrays,
    synthetic_heads,
    synthetic_manifest,
    synthetic_store,
    write_synthetic_shard,
)
from tests.conftest import ROOT
from tests.row_stores import rows_store
from tests.served_pages import Served, served

pytestmark = pytest.mark.slow

TOKEN = "a-token-of-some-letters"
REASONS = ("end", "truncated", "max_timesteps")


def store_of(folder: Path, sample_ids: list[str], target: Target | None = None) -> PredictionStore:
    """A store of two variations of each sample, three rollouts to a shard, with varied reasons."""
    manifest = synthetic_manifest(target or Full(), streams=2, vocabulary=34)
    texts = [f"Text {number} of {sample_id[:3]}" for number, sample_id in enumerate(sample_ids)]
    table = pa.table({"sample_id": sample_ids, "text": texts})
    plan = Plan.lay_out(sample_ids, 2, 3)
    store = PredictionStore.create(folder, manifest, plan, table, synthetic_heads(manifest))
    for shard in range(len(plan)):
        with store.writer(shard) as writer:
            for key in plan[shard]:
                seed = key[1] + sum(key[0].encode())
                arrays = synthetic_arrays(manifest, key, 1 + seed % 9)
                if "full.uncond" in arrays:  # flatter than with the condition, and so another one
                    arrays["full.uncond"] = arrays["full.uncond"] * np.float16(0.5)
                reason = REASONS[seed % len(REASONS)]
                writer.append(*key, arrays, stop_reason=reason, weight=1.0, seed=seed)
            writer.commit()
    return PredictionStore.open(folder)


IDS = [f"sample-{number}" for number in range(40)] + ["Äpfel/7", "a?b=c&d#e%2F"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> PredictionStore:
    return store_of(tmp_path_factory.mktemp("browse") / "store", IDS)


@pytest.fixture(scope="module")
def page(store: PredictionStore) -> Iterator[Served]:
    with served(Browse(store, [])) as found:
        yield found


def tone(folder: Path, name: str, pitch_hz: float) -> AudioClip:
    wave = 0.5 * np.sin(2 * np.pi * pitch_hz * np.arange(8000) / 16000)
    soundfile.write(folder / f"{name}.wav", wave, 16000)
    return AudioClip(file=f"{name}.wav")


def evaluated_run(folder: Path, **changes: Any) -> Path:
    """The folder of a run of which there is a report with clips, and nothing else."""
    (folder / "report").mkdir(parents=True)
    clips = {
        "teacher_guided": tone(folder / "report", "teacher", 440),
        "student": tone(folder / "report", "student", 880),
    }
    parts = {
        "run": folder.name, "samples": 1, "sentences": 1,
        "teacher_guided": System(), "student": System(),
        "audio": (AudioSample(sample_id="s", text="A sentence.", clips=clips),),
    }  # fmt: skip
    Report.model_validate(parts | changes).write(folder / "report" / "report.json")
    (folder / "report" / "report.html").write_text("<!doctype html><title>r</title>")
    return folder


# Who may read what


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"])
@pytest.mark.parametrize("path", ["/", "/api/overview", "/none"])
def test_nothing_but_reading_is_answered(page: Served, method: str, path: str) -> None:
    answer = page.ask(path, method)
    assert (answer.status, answer.headers["allow"]) == (405, "GET, HEAD")


def test_head_is_get_without_its_body(page: Served) -> None:
    answer = page.ask("/", "HEAD")
    assert (answer.status, answer.body) == (200, b"")
    assert int(answer.headers["content-length"]) == len(page.ask("/").body)


@pytest.mark.parametrize("path", ["/", "/page.js", "/api/overview", "/none", "/api/rollout"])
def test_every_answer_says_what_a_browser_may_do_with_it(page: Served, path: str) -> None:
    headers = page.ask(path).headers
    rules = dict(rule.split(" ", 1) for rule in headers["content-security-policy"].split("; "))
    assert rules["default-src"] == "'none'"
    assert rules["script-src"] == rules["style-src"] == "'self'"
    assert rules["frame-ancestors"] == "'none'"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cross-origin-resource-policy"] == "same-origin"
    assert "server" not in headers


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200), ("LOCALHOST:81", 200), ("127.0.0.1", 200), ("127.0.0.9:80", 200),
        ("[::1]:8765", 200), ("rebound.example", 403), ("localhost.example:80", 403),
        ("127.0.0.1.example", 403), ("10.0.0.1", 403), ("", 403), ("[::1", 403),
    ],
)  # fmt: skip
def test_on_loopback_only_its_own_names_are_answered(page: Served, host: str, status: int) -> None:
    assert page.ask("/api/overview", Host=host).status == (200 if host == "[::1" else status)


@pytest.mark.parametrize(
    "path",
    [
        "/../pyproject.toml", "/../../../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd",
        "//etc/passwd", "/..%2f..%2fetc%2fpasswd", "/page.js/../guard.py", "/guard.py",
        "/store_view.py", "/.", "/page.html", "/page.js%00.py", "/api/", "/..\\..\\etc\\passwd",
    ],
)  # fmt: skip
def test_no_path_leads_to_a_file(page: Served, path: str) -> None:
    answer = page.ask(path)
    assert answer.status == 404
    assert answer.value == {"error": "there is nothing at this address"}


def test_a_token_is_asked_for_and_then_kept_out_of_sight(store: PredictionStore) -> None:
    with served(Browse(store, []), Listening(port=0, token=TOKEN)) as page:
        for wrong in ("/", "/api/overview", "/page.js", f"/?token={TOKEN[:-1]}", "/?token="):
            assert page.ask(wrong).status == 401
        assert page.ask("/", Cookie="foretell-1=" + TOKEN).status == 401
        opened = page.ask(f"/?a=1%262&token={TOKEN}")
        assert (opened.status, opened.headers["location"]) == (303, "/?a=1%262")
        cookie, *attributes = opened.headers["set-cookie"].split("; ")
        assert {"HttpOnly", "SameSite=strict", "Path=/"} <= set(attributes)
        assert cookie == f"foretell-{page.port}={TOKEN}"
        assert page.ask("/api/overview", Cookie=f'x={{"a": [1]}}; y; {cookie}').status == 200
        assert page.ask("/api/overview", Cookie=cookie + "x").status == 401
        assert page.ask(f"/api/overview?token={TOKEN}").status == 200
        assert page.ask("/api/overview", Cookie='"=;;=\x80').status == 401


def test_elsewhere_than_on_loopback_a_token_is_drawn_and_any_name_answered() -> None:
    first, second = (page_server(Browse(None, []), Listening("0.0.0.0", 0)) for _ in range(2))
    with first.bound, second.bound:
        tokens = [page.address.partition("?token=")[2] for page in (first, second)]
    assert min(map(len, tokens)) >= 32
    assert tokens[0] != tokens[1]
    with served(Browse(None, []), Listening("0.0.0.0", 0, TOKEN)) as page:
        assert page.ask(f"/?token={TOKEN}", Host="node7.cluster:80").status == 303
        assert page.ask("/", Host="localhost").status == 401


def test_a_short_token_and_a_port_in_use_are_refused() -> None:
    with pytest.raises(UserError, match="--token has 5 letters but must have at least 16"):
        Listening(token="short")
    first = page_server(Browse(None, []), Listening(port=0))
    with first.bound:
        taken = Listening(port=first.bound.getsockname()[1])
        with pytest.raises(UserError, match=r"cannot listen on 127.0.0.1 port \d+: .*--port"):
            page_server(Browse(None, []), taken)


def test_a_place_that_is_nothing_of_ours_ends_with_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["foretell", "inspect", "serve", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        main()
    told = capsys.readouterr()
    assert (told.out, told.err.count("\n")) == ("", 1)
    assert "is neither a store nor the folder of a run" in told.err


@pytest.mark.slow
def test_the_command_tells_its_address_and_ends_quietly_when_interrupted(
    store: PredictionStore,
) -> None:
    command = [sys.executable, "-W", "error", "-m", "pipeline", "inspect", "serve", "--port", "0"]
    with subprocess.Popen(
        [*command, "--token", TOKEN, str(store.path)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        page = Served(address, int(address.rpartition(":")[2].partition("/")[0]))
        found = page.ask(f"/api/overview?token={TOKEN}").value["store"]
        assert found["rollouts"] == 2 * len(IDS)
        page.ask(f"/nothing?token={TOKEN}")
        process.send_signal(signal.SIGINT)
        rest, told = process.communicate(timeout=30)
    assert (process.returncode, rest, told) == (0, "", "Ctrl-C ends it.\n")
    assert address == f"http://127.0.0.1:{page.port}/?token={TOKEN}"


@pytest.mark.slow
def test_torch_is_loaded_by_who_listens_alone(tmp_path: Path) -> None:
    store = store_of(tmp_path / "store", ["a"])
    script = (
        "import sys; from pipeline.browse.serving import browse_of;"
        "from tests.served_pages import served\n"
        "with served(browse_of(sys.argv[1], [], None)) as page:\n"
        "    page.get('/api/overview'), page.get('/api/rollouts', order='most_entropy')\n"
        "    page.get('/api/timestep', sample='a', variation=0, timestep=0)\n"
        "sys.exit('torch' in sys.modules)"
    )
    command = [sys.executable, "-W", "error", "-c", script, str(store.path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_run_brings_its_store_and_a_store_its_run(tmp_path: Path) -> None:
    run = evaluated_run(tmp_path / "first" / "name")
    store_of(run / "store", ["a"])
    other = evaluated_run(tmp_path / "second" / "name")
    for place in (run, run / "store"):
        found = browse_of(str(place), [other], None)
        assert found.store is not None
        assert [r.name for r in found.runs] == ["name", "name (2)"]
        assert [r.path for r in found.runs] == [run, other]
    assert browse_of(str(other), [], None).store is None
    with pytest.raises(UserError, match="is no folder of a run"):
        browse_of(str(run), [tmp_path / "third"], None)


# What it says of a store


@pytest.mark.parametrize(
    "target", [TopK(k=8), Sampled(draws=20), Full(branches="both"), Hidden(branches="both")]
)
def test_a_timestep_is_what_inspect_says_of_it(tmp_path: Path, target: Target) -> None:
    store = store_of(tmp_path / "store", ["a", "b"], target)
    with served(Browse(store, [])) as page:
        found = page.get("/api/timestep", sample="b", variation=0, timestep=2)
    for number, shown in enumerate(found["streams"]):
        expected = describe_stream(store, store["b", 0, 2], number)
        every, drawn = expected["candidates"], expected["code"]
        first = every[:MOST_CANDIDATES]
        first += [c for c in every[MOST_CANDIDATES:] if c["id"] == drawn]
        assert shown["candidates"] == first
        assert (shown["code"], shown["tail_mass"]) == (drawn, expected["tail_mass"])
        others = [c["probability"] for c in every if c not in first]
        assert shown["left_out"]["count"] == len(others)
        assert shown["left_out"]["probability"] == pytest.approx(sum(others))


def test_an_unlikely_drawn_code_is_shown_behind_the_likely_ones(tmp_path: Path) -> None:
    manifest = synthetic_manifest(Full(), streams=1, vocabulary=100)
    store = synthetic_store(tmp_path / "store", manifest, 1, 1, 1)
    arrays = synthetic_arrays(manifest, ("sample-0", 0), 3)
    codes = arrays["full.logits"][:, :, :98].argmin(-1).astype(arrays["codes"].dtype)
    with store.writer(0) as writer:
        writer.append(
            "sample-0", 0, arrays | {"codes": codes}, stop_reason="end", weight=1.0, seed=1
        )
        writer.commit()
    with served(Browse(PredictionStore.open(store.path), [])) as page:
        (stream,) = page.get("/api/timestep", sample="sample-0", variation=0, timestep=1)["streams"]
    assert len(stream["candidates"]) == MOST_CANDIDATES + 1
    assert stream["candidates"][-1]["id"] == stream["code"] == codes[1, 0]
    together = sum(c["probability"] for c in stream["candidates"])
    assert together + stream["left_out"]["probability"] == pytest.approx(1)


def entropy_of(store: PredictionStore, key: tuple[str, int]) -> np.ndarray:
    """[T, C] entropies of a store of the target `full`, in float64."""
    logits = store[key].arrays["full.logits"].astype(np.float64)
    share = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return -(share * np.log(np.where(share > 0, share, 1))).sum(-1)


def test_a_rollout_is_shown_over_time(page: Served, store: PredictionStore) -> None:
    found = page.get("/api/rollout", sample="sample-3", variation=1)
    rollout = store["sample-3", 1]
    assert (found["timesteps"], found["seed"]) == (len(rollout), str(rollout.seed))
    assert found["variations"] == [0, 1]
    quantities = {quantity["title"]: quantity["values"] for quantity in found["quantities"]}
    expected = entropy_of(store, ("sample-3", 1)).T
    assert np.array(quantities["entropy"]) == pytest.approx(expected, rel=1e-3)


def all_rows(page: Served, **query: Any) -> list[dict[str, Any]]:
    """Rows of all pages of a search."""
    rows: list[dict[str, Any]] = []
    while True:
        found = page.get("/api/rollouts", **query, start=len(rows))
        rows += found["rows"]
        assert len(found["rows"]) <= PAGE_ROLLOUTS
        if len(rows) >= found["matched"]:
            assert len(rows) == found["matched"]
            return rows


def keys_of(rows: list[dict[str, Any]]) -> list[tuple[str, int]]:
    return [(row["sample_id"], row["variation"]) for row in rows]


def test_all_rollouts_are_listed_page_by_page_in_the_order_of_the_plan(
    page: Served, store: PredictionStore
) -> None:
    rows = all_rows(page)
    assert len(rows) > PAGE_ROLLOUTS
    assert keys_of(rows) == list(store.keys())
    for row in rows:
        rollout = store[row["sample_id"], row["variation"]]
        assert (row["timesteps"], row["stop_reason"]) == (len(rollout), rollout.stop_reason)
        assert row["seconds"] == pytest.approx(0.08 * len(rollout))
        assert row["excerpt"] == store.sample(row["sample_id"])["text"]


@pytest.mark.parametrize(
    ("query", "fits"),
    [
        ({"text": "SAMPLE-3"}, lambda s, r: "sample-3" in r.sample_id),
        ({"text": "äpfel"}, lambda s, r: r.sample_id == "Äpfel/7"),
        ({"text": "text 41 of"}, lambda s, r: r.sample_id == "a?b=c&d#e%2F"),
        ({"text": ".*"}, lambda s, r: False),
        ({"stop_reason": "end"}, lambda s, r: r.stop_reason == "end"),
        ({"shortest": 4, "longest": 6}, lambda s, r: 4 <= len(r) <= 6),
        (
            {"least_entropy": 1.4, "most_entropy": 1.7, "stop_reason": "truncated"},
            lambda s, r: (
                r.stop_reason == "truncated"
                and 1.4 <= entropy_of(s, (r.sample_id, r.variation)).mean() <= 1.7
            ),
        ),
    ],
)
def test_filters_find_what_fits_and_only_that(
    page: Served, store: PredictionStore, query: dict[str, Any], fits: Any
) -> None:
    expected = [key for key in store if fits(store, store[key])]
    assert query == {"text": ".*"} or 0 < len(expected) < 2 * len(IDS)
    assert keys_of(all_rows(page, **query)) == expected


@pytest.mark.parametrize("order", ["shortest", "longest", "least_entropy", "most_entropy"])
def test_rollouts_come_in_the_order_that_is_asked_for(
    page: Served, store: PredictionStore, order: str
) -> None:
    keys = keys_of(all_rows(page, order=order))
    assert sorted(keys) == sorted(store.keys())
    by_length = order in ("shortest", "longest")
    values = [len(store[k]) if by_length else entropy_of(store, k).mean() for k in keys]
    falling = order in ("longest", "most_entropy")
    steps = np.diff(values) * (-1 if falling else 1)
    assert (steps >= -1e-6).all()
    assert steps.max() > 0


def test_entropies_that_were_not_computed_are_told_and_come_when_asked_for(
    store: PredictionStore,
) -> None:
    index = RolloutIndex(store)
    assert {row["entropy"] for row in index.find(Query())["rows"]} == {None}
    assert index.learn([1, 2], budget_s=1e9).keys() == {"1", "2"}
    expected = [entropy_of(store, index.key(row)).mean() for row in (1, 2)]
    assert index.entropies[[1, 2]] == pytest.approx(expected, rel=1e-4)
    assert index.learn([2, 3], budget_s=-1).keys() == {"2"}, "the time was used up"


def test_a_search_by_entropy_says_over_how_many_it_is_known(
    store: PredictionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = RolloutIndex(store)
    index.learn([0, 1], budget_s=1e9)
    monkeypatch.setattr(RolloutIndex, "_learn", lambda *_: None)
    found = index.find(Query(order="most_entropy", stop_reason=index.stop_reasons[0]))
    with_reason = int((index.stop_reasons == index.stop_reasons[0]).sum())
    assert found["entropy_of"] == with_reason > found["entropy_known"] == found["matched"] > 0


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        ("/api/rollout?sample=none&variation=0", 404, "'none'"),
        ("/api/rollout?sample=sample-1&variation=9", 404, "is not planned"),
        ("/api/rollout?sample=sample-1", 400, "must say variation="),
        ("/api/rollout?sample=sample-1&variation=-1", 400, "must be a number"),
        ("/api/rollout?sample=sample-1&variation=٣", 400, "must be a number"),
        ("/api/rollout?sample=&variation=0", 400, "must say sample="),
        ("/api/timestep?sample=sample-1&variation=0&timestep=99", 404, "is not in [0, "),
        ("/api/rollouts?shortest=x", 400, "shortest: "),
        ("/api/rollouts?order=none", 400, "order: "),
        ("/api/rollouts?unknown=1", 400, "unknown: "),
        ("/api/entropies?places=1,99999", 404, "no rollout is committed at place 99999"),
        ("/api/run?run=0", 404, "run 0 is not in [0, 0)"),
        ("/clip.wav?sample=sample-1&variation=0", 404, "no audio codec is beside the store"),
        ("/channels.png?sample=sample-1&variation=0&timestep=0&stream=0&array=codes", 404, "codes"),
    ],
)
def test_what_cannot_be_answered_is_told_in_words(
    page: Served, path: str, status: int, message: str
) -> None:
    answer = page.ask(path.replace("٣", "%D9%A3"))
    assert answer.status == status
    assert message in answer.value["error"]


def test_a_damaged_shard_is_named_and_the_others_are_shown(tmp_path: Path) -> None:
    store = store_of(tmp_path / "store", ["a", "b", "c", "d"])
    (store.path / "shards" / "00001" / "rollouts.parquet").write_bytes(b"x")
    store = PredictionStore.open(store.path)
    with served(Browse(store, [])) as page:
        found = page.get("/api/overview")["store"]
        rows = page.get("/api/rollouts")["rows"]
    (damaged,) = found["damaged"]
    assert "00001" in damaged
    expected = [key for shard in (0, 2) for key in store.plan[shard]]
    assert keys_of(rows) == expected


def test_a_store_of_images_shows_norms_columns_and_channels(tmp_path: Path) -> None:
    store = rows_store(tmp_path / "store", tmp_path / "table")
    with served(Browse(store, [])) as page:
        overview = page.get("/api/overview")["store"]
        rollout = page.get("/api/rollout", sample="b", variation=0)
        timestep = page.get("/api/timestep", sample="b", variation=0, timestep=1)
        picture = page.ask(
            "/channels.png?sample=b&variation=0&timestep=1&stream=0&array=dense.delta"
        )
        rows = page.get("/api/rollouts", order="most_entropy")["rows"]
        bare = page.get("/api/rollout", sample="d", variation=1)
    assert not overview["has_entropy"]
    assert bare["quantities"][0]["title"].endswith("row.noise"), "nothing was predicted"
    assert {row["entropy"] for row in rows} == {None}
    arrays = store["b", 0].arrays
    quantities = {q["title"]: np.array(q["values"]) for q in rollout["quantities"]}
    flat = arrays["dense.cond"].astype(np.float64).reshape(*arrays["dense.cond"].shape[:2], -1)
    norms = np.sqrt((flat**2).sum(-1))
    assert quantities["norm of dense.cond"] == pytest.approx(norms.T, rel=1e-4)
    assert rollout["columns"]["t"] == pytest.approx(arrays["row.t"], abs=1e-6)
    assert rollout["drawn"].keys() == {"latent", "condition"}
    (stream,) = timestep["streams"]
    assert stream["summaries"] == describe_stream(store, store["b", 0, 1], 0)
    assert "dense.delta" in timestep["pictures"]
    shown = np.asarray(Image.open(io.BytesIO(picture.body)))
    values = np.concatenate(list(arrays["dense.delta"][1, 0].astype(np.float64)), -1)
    scaled = (values - values.min()) / (values.max() - values.min()) * 255
    assert shown == pytest.approx(scaled, abs=1)


# What it says of runs, and clips


@pytest.fixture(scope="module")
def run_page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, Path]]:
    folder = evaluated_run(tmp_path_factory.mktemp("runs") / "one")
    empty = folder.with_name("empty")
    empty.mkdir()
    with served(Browse(None, run_folders([folder, empty]))) as found:
        yield found, folder / "report"


CLIP = "/clip.wav?run=0&item=0&system=student"


def test_a_clip_of_a_run_is_heard_as_it_is(run_page: tuple[Served, Path]) -> None:
    page, folder = run_page
    answer = page.ask(CLIP)
    assert answer.headers["content-type"] == "audio/wav"
    heard, rate_hz = soundfile.read(io.BytesIO(answer.body))
    expected, expected_hz = soundfile.read(folder / "student.wav")
    assert rate_hz == expected_hz
    assert heard == pytest.approx(expected, abs=2**-15)


@pytest.mark.parametrize(
    ("asked", "part"),
    [
        ("bytes=0-0", slice(0, 1)), ("bytes=0-", slice(0, None)),
        ("bytes=100-199", slice(100, 200)),
        ("bytes=-7", slice(-7, None)), ("bytes=16000-99999999", slice(16000, None)),
        ("bytes=-99999999", slice(0, None)),
    ],
)  # fmt: skip
def test_ranges_are_cut_from_the_whole(
    run_page: tuple[Served, Path], asked: str, part: slice
) -> None:
    page, _ = run_page
    whole = page.ask(CLIP)
    assert whole.headers["accept-ranges"] == "bytes"
    answer = page.ask(CLIP, Range=asked)
    assert (answer.status, answer.body) == (206, whole.body[part])
    first = part.indices(len(whole.body))[0]
    last = first + len(answer.body) - 1
    assert answer.headers["content-range"] == f"bytes {first}-{last}/{len(whole.body)}"


@pytest.mark.parametrize(
    ("asked", "status"),
    [
        ("bytes=99999999-", 416), ("bytes=5-4", 416), ("bytes=-0", 416), ("bytes=0-1,3-4", 200),
        ("bytes=-", 200), ("lines=0-1", 200), ("bytes=" + "9" * 40 + "-", 200),
    ],
)  # fmt: skip
def test_other_ranges_are_refused_or_give_all(
    run_page: tuple[Served, Path], asked: str, status: int
) -> None:
    page, _ = run_page
    size = len(page.ask(CLIP).body)
    answer = page.ask(CLIP, Range=asked)
    assert (answer.status, len(answer.body)) == (status, 0 if status == 416 else size)
    if status == 416:
        assert answer.headers["content-range"] == f"bytes */{size}"


def test_the_outline_and_the_spectrogram_are_those_of_the_clip(
    run_page: tuple[Served, Path],
) -> None:
    page, folder = run_page
    facts = page.get("/api/outline", run=0, item=0, system="student")
    wave, rate_hz = soundfile.read(folder / "student.wav")
    assert (facts["seconds"], facts["rate_hz"]) == (len(wave) / rate_hz, rate_hz)
    outline = np.array(facts["outline"])
    assert outline.min() == pytest.approx(wave.min(), abs=1e-3)
    assert outline.max() == pytest.approx(wave.max(), abs=1e-3)
    brightest = []
    for system in ("teacher_guided", "student"):
        answer = page.ask(f"/spectrogram.png?run=0&item=0&system={system}")
        picture = np.asarray(Image.open(io.BytesIO(answer.body)).convert("L")).astype(int)
        assert picture.shape[0] == SPECTROGRAM_ROWS
        brightest.append(SPECTROGRAM_ROWS - 1 - int(picture.sum(-1).argmax()))
    mels = [2595 * np.log10(1 + hz / 700) for hz in (50, 440, 880, 8000)]
    places = [(mel - mels[0]) / (mels[-1] - mels[0]) for mel in mels[1:3]]
    assert np.array(brightest) / (SPECTROGRAM_ROWS - 1) == pytest.approx(places, abs=0.02)


@pytest.mark.parametrize("samples", [0, 1, 100])
def test_clips_of_next_to_nothing_are_drawn(samples: int) -> None:
    clip = Clip(np.zeros(samples, np.float32), 8000)
    assert soundfile.info(io.BytesIO(clip.wav)).frames == samples
    assert Image.open(io.BytesIO(clip.spectrogram)).height == SPECTROGRAM_ROWS
    assert len(clip.outline) == max(1, samples)


def test_a_run_shows_its_report_and_one_without_says_so(run_page: tuple[Served, Path]) -> None:
    page, folder = run_page
    overview = page.get("/api/overview")
    found = page.get("/api/run", run=0)
    assert overview == {
        "store": None,
        "runs": [
            {"run": 0, "name": "one", "report": found["report"]},
            {"run": 1, "name": "empty", "report": None},
        ],
    }
    assert [clip["system"] for clip in found["audio"][0]["clips"]] == ["teacher_guided", "student"]
    empty = {"name": "empty", "evaluated": False, "report": None}
    assert page.get("/api/run", run=1) == empty
    report = page.ask("/report?run=0")
    assert report.body == (folder / "report.html").read_bytes()
    assert "script-src" not in report.headers["content-security-policy"]
    assert page.ask("/report?run=1").status == 404
    assert page.ask("/api/rollouts").status == 404


def test_a_file_outside_a_report_and_one_that_is_no_audio_are_not_read(tmp_path: Path) -> None:
    folder = evaluated_run(tmp_path / "run") / "report"
    (tmp_path / "secret.wav").write_bytes((folder / "student.wav").read_bytes())
    (folder / "student.wav").unlink()
    (folder / "student.wav").symlink_to(tmp_path / "secret.wav")
    (folder / "teacher.wav").write_text("root:x:0:0")
    with served(Browse(None, run_folders([folder.parent]))) as page:
        linked = page.ask(CLIP)
        text = page.ask(CLIP.replace("student", "teacher_guided"))
    assert (linked.status, text.status) == (404, 404)
    assert "leads out of" in linked.value["error"]
    assert "cannot be read as audio" in text.value["error"]


def test_pictures_of_a_run_are_sent_as_they_are(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "report"
    sample = ImageSample(
        sample_id="s", text="a 3", reference="r.png", files={"student": "student.png"}
    )
    images = Images(solver_steps=4, features="pixels", references=1, samples=(sample,))
    evaluated_run(folder.parent, audio=(), images=images)
    for number, name in enumerate(("r", "student")):
        Image.new("L", (8, 8), 40 * number).save(folder / f"{name}.png")
    with served(Browse(None, run_folders([folder.parent]))) as page:
        assert page.get("/api/run", run=0)["images"][0]["systems"] == ["reference", "student"]
        for name, file in (("reference", "r.png"), ("student", "student.png")):
            answer = page.ask(f"/picture.png?run=0&item=0&system={name}")
            assert answer.body == (folder / file).read_bytes()
        assert page.ask("/picture.png?run=0&item=1&system=student").status == 404
        assert page.ask("/picture.png?run=0&item=0&system=..").status == 404


def test_a_store_in_object_storage_is_shown(object_url: str) -> None:
    store = synthetic_store(object_url, synthetic_manifest(TopK(k=4)), 3, 1, 2)
    for shard in range(2):
        write_synthetic_shard(PredictionStore.open(object_url), shard, 4)
    with served(browse_of(object_url, [], None)) as page:
        keys = keys_of(page.get("/api/rollouts")["rows"])
        assert keys == [(f"sample-{number}", 0) for number in range(3)]
        assert page.get("/api/rollout", sample="sample-2", variation=0)["timesteps"] > 0
    assert store.is_remote
