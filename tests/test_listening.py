"""Blind listening: sheets that give nothing away, and answers of which none is lost or invented."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
import re
from collections import Counter
from fractions import Fraction
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile

from pipeline.listening import SheetOptions, export_sheets, read_key, tally_answers
from pipeline.listening_page import LABELS
from pipeline.report import write_report
from stages.answers import read_answers
from stages.binomial import exact_interval, sign_test
from stages.errors import UserError
from stages.listening import ANSWERS, COLUMNS, Sentence, plan_sheets
from stages.metrics import Bootstrap, crossed_metric, ratio
from stages.report_schema import AudioClip, AudioSample, Report, System
from stages.tally import tally
from tests.browser import Browser, find_chromium
from tests.test_cli import foretell
from tests.test_report import HOSTILE, Outline

pytestmark = pytest.mark.slow

SYSTEMS = ("codec_copy", "teacher_guided", "teacher_unguided", "student")
MODELS = SYSTEMS[1:]


def plan(sentences=6, systems=SYSTEMS, *, kinds=("mos", "ab"), sheets=2, seed=0):
    texts = [Sentence(sample_id=f"s{i}", text=f"Text {i}.") for i in range(sentences)]
    return plan_sheets("run", texts, systems, kinds=kinds, sheets=sheets, seed=seed, audio="00")


# ---- the plan


def of_kind(sheet, kind):
    return [question for question in sheet.questions if question.kind == kind]


def test_every_clip_is_rated_once_and_every_pair_of_models_compared_once_per_sheet():
    for sheet in plan().sheets:
        rated = [(q.sentence.sample_id, q.clips[0].system) for q in of_kind(sheet, "mos")]
        assert sorted(rated) == sorted((f"s{i}", system) for i in range(6) for system in SYSTEMS)
        compared = [
            (q.sentence.sample_id, frozenset(clip.system for clip in q.clips))
            for q in of_kind(sheet, "ab")
        ]
        pairs = [frozenset(pair) for pair in combinations(MODELS, 2)]
        assert Counter(compared) == Counter((f"s{i}", pair) for i in range(6) for pair in pairs)
        kinds = [question.kind for question in sheet.questions]
        assert kinds == sorted(kinds, reverse=True), "ratings first: comparing teaches differences"


@pytest.mark.parametrize("sentences", [5, 6])
def test_orders_of_a_pair_are_balanced_within_a_sheet_and_reversed_on_the_next(sentences):
    first, second = (
        {
            (q.sentence.sample_id, frozenset(c.system for c in q.clips)): q.clips[0].system
            for q in of_kind(sheet, "ab")
        }
        for sheet in plan(sentences).sheets
    )
    assert first.keys() == second.keys()
    assert all(first[asked] != second[asked] for asked in first)
    for pair in map(frozenset, combinations(MODELS, 2)):
        counts = Counter(leader for (_, asked), leader in first.items() if asked == pair)
        assert max(counts.values()) - min(counts.values()) <= 1


def test_names_tell_a_listener_nothing_and_belong_to_one_clip_of_a_sheet():
    key = plan(sentences=40, sheets=2)
    for sheet in key.sheets:
        owners = {}
        for question in sheet.questions:
            for clip in question.clips:
                assert re.fullmatch(r"clip-\d{3}\.wav", clip.name)
                owner = (question.sentence.sample_id, clip.system)
                assert owners.setdefault(clip.name, owner) == owner
        assert len(owners) == len(set(owners.values())) == 40 * len(SYSTEMS)
        # Were names or order to follow the systems, neighbours would more often be alike.
        by_name = [owners[name][1] for name in sorted(owners)]
        asked = [question.clips[0].system for question in of_kind(sheet, "mos")]
        for order in (by_name, asked):
            alike = sum(a == b for a, b in pairwise(order))
            assert 20 < alike < 60, "a quarter of 159 by chance"


def test_a_plan_is_a_function_of_its_arguments_and_every_sheet_differs():
    assert plan() == plan()
    sheets = [*plan().sheets, *plan(seed=1).sheets, *plan(sentences=5).sheets]
    assert len({sheet.sheet for sheet in sheets}) == len(sheets)
    orders = [tuple((q.sentence.sample_id, q.clips) for q in sheet.questions) for sheet in sheets]
    assert len(set(orders)) == len(orders)
    assert plan(sheets=3).sheets[:2] == plan(sheets=2).sheets, "more sheets change none"
    assert {q.kind for q in plan(kinds=("ab",)).sheets[0].questions} == {"ab"}


# ---- the folder


@pytest.fixture
def run(run_of):
    """A run whose report has four systems on five samples, of which two share a text."""
    run = run_of(evaluate={"judges": [], "audio_samples": 5})
    folder = run.root / "report"
    samples = []
    for index in range(5):
        clips = {}
        for number, system in enumerate(("recording", *SYSTEMS)):
            path = folder / "audio" / system / f"{index:05d}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            tone = np.sin(np.arange(800 + 100 * number) / (10 + index)) * (8000 + number)
            soundfile.write(path, tone.astype(np.int16), 8000)
            clips[system] = AudioClip(file=f"audio/{system}/{index:05d}.wav")
        del clips["recording"]
        text = HOSTILE if index < 2 else f"Text {index}."
        samples.append(AudioSample(sample_id=f"id_{index}", text=text, clips=clips))
    systems = {name: System() for name in SYSTEMS}
    report = Report(run="own", samples=5, sentences=4, audio=tuple(samples), **systems)
    report.write(folder / "report.json")
    return run


def sheet_folders(run):
    return sorted(path for path in (run.root / "listening").iterdir() if path.is_dir())


def test_a_sheet_holds_all_that_a_listener_needs_and_nothing_that_tells_who_speaks(run):
    export_sheets(run.load(), SheetOptions(sheets=2))
    assert sorted(p.name for p in (run.root / "listening").iterdir()) == [
        "key.json", "sheet_01", "sheet_02",
    ]  # fmt: skip
    for folder in sheet_folders(run):
        names = {path.relative_to(folder).as_posix() for path in folder.rglob("*.*")}
        clips = {f"clips/clip-{i:03d}.wav" for i in range(1, 21)}
        assert names == clips | {"listen.html", "answers.csv"}
        for path in (folder / "listen.html", folder / "answers.csv"):
            text = path.read_text()
            for secret in (*SYSTEMS, "teacher", "guided", "codec", "id_0", "id_4", "key.json"):
                assert not re.search(rf"\b{secret}\b", text), secret
            assert str(run.root) not in text


def test_the_clips_of_a_sheet_are_those_that_the_key_says(run):
    key = export_sheets(run.load(), SheetOptions(sheets=2, systems=("student", "recording")))
    assert read_key(run.root / "listening") == key
    for folder, sheet in zip(sheet_folders(run), key.sheets, strict=True):
        for question in sheet.questions:
            (clip,) = question.clips
            index = int(question.sentence.sample_id.removeprefix("id_"))
            source = run.root / "report" / "audio" / clip.system / f"{index:05d}.wav"
            assert (folder / "clips" / clip.name).read_bytes() == source.read_bytes()
    assert key.systems == ("recording", "student")


def test_exporting_again_changes_nothing_and_other_sheets_are_never_overwritten(run):
    def written():
        files = sorted((run.root / "listening").rglob("*.*"))
        return {path: hashlib.sha256(path.read_bytes()).digest() for path in files}

    export_sheets(run.load(), SheetOptions())
    before = written()
    export_sheets(run.load(), SheetOptions())
    assert written() == before
    with pytest.raises(UserError, match="other settings or audio: move it away"):
        export_sheets(run.load(), SheetOptions(seed=1))
    clip = run.root / "report" / "audio" / "student" / "00002.wav"
    clip.write_bytes(clip.read_bytes()[:-2] + b"\x01\x01")
    with pytest.raises(UserError, match="other settings or audio: move it away"):
        export_sheets(run.load(), SheetOptions())
    assert written() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            SheetOptions(items=6),
            "6 items were asked for.*audio of 5.*larger evaluate.audio_samples",
        ),
        (SheetOptions(systems=("student", "pupil")), "--system pupil: name each once, out of reco"),
        (SheetOptions(systems=("student", "student")), "name each once"),
        (SheetOptions(systems=("student", "codec_copy"), kinds=("ab",)), "nothing to ask"),
    ],
)
def test_sheets_that_cannot_be_made_are_refused_with_what_is_there(run, options, message):
    with pytest.raises(UserError, match=message):
        export_sheets(run.load(), options)
    assert not (run.root / "listening").exists()


def test_without_a_report_or_its_audio_there_is_nothing_to_export(run):
    (run.root / "report" / "audio" / "student" / "00001.wav").unlink()
    with pytest.raises(UserError, match=r"student/00001\.wav is missing"):
        export_sheets(run.load(), SheetOptions())
    (run.root / "report" / "report.json").unlink()
    with pytest.raises(UserError, match="run `foretell evaluate` first"):
        export_sheets(run.load(), SheetOptions())
    assert not (run.root / "listening").exists()


def test_the_page_is_well_formed_escapes_every_text_and_reaches_only_its_clips(run):
    export_sheets(run.load(), SheetOptions())
    folder = run.root / "listening" / "sheet_01"
    outline = Outline((folder / "listen.html").read_text())
    assert outline.open == []
    sources = [a["src"] for _, a in outline.elements if "src" in a]
    assert sources
    assert all((folder / source).is_file() for source in sources)
    assert not any("href" in attributes for _, attributes in outline.elements)
    assert not any(name.startswith("on") for _, a in outline.elements for name in a)
    policy = next(a["content"] for t, a in outline.elements if "http-equiv" in a)
    assert policy.startswith("default-src 'none';")
    assert "connect-src" not in policy
    # Two sentences of that text, each rated for four systems and compared in three pairs.
    assert "".join(outline.text).count(HOSTILE) == 2 * (4 + 3)


def test_every_choice_of_the_page_can_be_read_back():
    assert {kind: tuple(labels) for kind, labels in LABELS.items()} == ANSWERS


# ---- the answers

GOOD = {"mos": "4", "ab": "a"}


def fill(run, sheet=1, listener="Zoë", answers=GOOD):
    """Fill the template of a sheet; `answers` is kind → answer, or a function of (row, key)."""
    folder = run.root / "listening" / f"sheet_{sheet:02d}"
    rows = list(csv.DictReader(io.StringIO((folder / "answers.csv").read_text())))
    assert tuple(rows[0]) == COLUMNS
    for row in rows:
        row["answer"] = answers(row) if callable(answers) else answers[row["kind"]]
        row["listener"] = listener
    return rows


def write(path, rows, *, delimiter=",", encoding="utf-8"):
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    path.write_bytes(text.getvalue().encode(encoding))
    return path


@pytest.fixture
def exported(run):
    export_sheets(run.load(), SheetOptions(sheets=2))
    return run


def test_what_listeners_answer_becomes_means_and_preferences(exported, tmp_path):
    config, key = exported.load(), read_key(exported.root / "listening")
    questions = {(s.sheet, q.item): q for s in key.sheets for q in s.questions}
    worth = {"codec_copy": 5, "teacher_guided": 4, "student": 3, "teacher_unguided": 2}

    def judge(row):
        systems = [clip.system for clip in questions[row["sheet"], row["item"]].clips]
        if row["kind"] == "mos":
            return str(worth[systems[0]])
        if set(systems) == {"teacher_guided", "student"}:
            return "equal"
        return "a" if worth[systems[0]] > worth[systems[1]] else "b"

    files = [
        write(tmp_path / "ann.csv", fill(exported, 1, "Ann", judge)),
        write(tmp_path / "bo.csv", fill(exported, 2, "Bo", judge)),
    ]
    result = tally_answers(config, files)
    assert (result.listeners, result.answers, result.unanswered) == (("Ann", "Bo"), 70, 0)
    assert result.faults == ()
    assert {name: rating.mos.value for name, rating in result.ratings.items()} == worth
    assert list(result.ratings) == list(SYSTEMS)
    pairs = {(p.system, p.against): p for p in result.preferences}
    assert set(pairs) == set(combinations(MODELS, 2))
    equal = pairs["teacher_guided", "student"]
    assert (equal.preferred, equal.rejected, equal.equal) == (0, 0, 10)
    assert (equal.share, equal.p_value) == (None, 1.0)
    better = pairs["teacher_guided", "teacher_unguided"]
    assert (better.preferred, better.rejected, better.equal) == (10, 0, 0)
    assert better.p_value == 2 / 2**10
    assert better.share.low == pytest.approx(0.025 ** (1 / 10))
    worse = pairs["teacher_unguided", "student"]
    assert (worse.preferred, worse.rejected) == (0, 10)
    stored = json.loads((exported.root / "listening" / "tally.json").read_text())
    assert stored == result.model_dump(mode="json")
    page = (exported.root / "report" / "report.html").read_text()
    assert "70 answers of 2 listeners" in page
    outline = Outline(page)
    assert outline.open == []
    assert re.search(r"teacher, guidedagainst teacher, unguided1000", "".join(outline.text))


@pytest.mark.parametrize(
    ("delimiter", "encoding"), [(",", "utf-8"), (";", "utf-8-sig"), ("\t", "utf-8-sig")]
)
def test_what_spreadsheets_make_of_a_csv_file_is_read_alike(
    exported, tmp_path, delimiter, encoding
):
    rows = fill(exported)
    for row in rows:
        row["remark"] = "one, two; “three”"
    path = write(tmp_path / "a.csv", rows, delimiter=delimiter, encoding=encoding)
    path.write_bytes(path.read_bytes() + delimiter.join([""] * 8).encode() + b"\r\n\r\n")
    found = read_answers([path], read_key(exported.root / "listening"))
    assert found.faults == ()
    assert len(found.given) == len(rows)
    assert {answer.listener for answer in found.given} == {"Zoë"}


def faults_of(run, *files):
    return read_answers(files, read_key(run.root / "listening"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"answer": "6"}, "the answer '6' to item 'mos-001' is none of 1, 2, 3, 4, 5"),
        ({"answer": "0"}, "none of 1, 2, 3, 4, 5"),
        ({"answer": "3.5"}, "none of 1, 2, 3, 4, 5"),
        ({"answer": "a"}, "none of 1, 2, 3, 4, 5"),
        ({"item": "mos-999"}, "has no item 'mos-999'"),
        ({"sheet": "sheet-0123456789ab"}, "is of another export; this one has sheet-"),
        ({"kind": "ab"}, "the cells before the answer must stay as they were"),
        ({"a": "clip-999.wav"}, "the cells before the answer must stay as they were"),
        ({"b": "clip-001.wav"}, "the cells before the answer must stay as they were"),
        ({"listener": " "}, "names no listener"),
    ],
)
def test_a_row_that_cannot_count_is_named_and_the_others_count(exported, tmp_path, change, reason):
    rows = fill(exported)
    rows[0] |= change
    found = faults_of(exported, write(tmp_path / "a.csv", rows))
    (fault,) = found.faults
    assert (fault.file, fault.row) == (str(tmp_path / "a.csv"), 2)
    assert reason in fault.reason
    assert len(found.given) == len(rows) - 1


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"\xef\xbb\xbf\r\n", "is empty"),
        (b"sheet,item,kind,a,b,answer\r\n", "wrong in listener: 'sheet,item,kind,a,b,answer'"),
        (b"sheet,item,kind,a,b,answer,answer,listener\r\n", "wrong in answer"),
        ("sheet;item;kind;a;b;answer;listener\r\nZoë".encode("cp1252"), "is not UTF-8"),
        ("sheet,item".encode("utf-16"), "is not UTF-8"),
        (b'sheet,item,kind,a,b,answer,listener\r\n"' + b"a" * 200_000, "line 2 is not CSV"),
    ],
)
def test_a_file_that_is_no_answers_file_is_named_and_the_others_count(
    exported, tmp_path, content, reason
):
    (tmp_path / "bad.csv").write_bytes(content)
    good = write(tmp_path / "good.csv", fill(exported))
    found = faults_of(exported, tmp_path / "bad.csv", good, tmp_path / "none.csv")
    assert [fault.file for fault in found.faults] == [
        str(tmp_path / "bad.csv"), str(tmp_path / "none.csv"),
    ]  # fmt: skip
    assert {fault.row for fault in found.faults} == {None}
    assert reason in found.faults[0].reason
    assert "No such file" in found.faults[1].reason
    assert len(found.given) == len(fill(exported))


def test_a_row_of_too_few_or_many_cells_is_named_by_its_line(exported, tmp_path):
    path = write(tmp_path / "a.csv", fill(exported))
    lines = path.read_text().splitlines()
    lines[1] += ",more"
    lines[3] = lines[3].rpartition(",")[0]
    path.write_text("\n".join(lines))
    found = faults_of(exported, path)
    assert [fault.row for fault in found.faults] == [2, 4]
    assert all("number of cells" in fault.reason for fault in found.faults)


def test_items_left_empty_are_counted_and_are_no_fault(exported, tmp_path):
    rows = fill(exported)
    rows[0]["answer"] = rows[1]["answer"] = rows[1]["listener"] = ""
    found = faults_of(exported, write(tmp_path / "a.csv", rows))
    assert (found.unanswered, len(found.given), found.faults) == (2, len(rows) - 2, ())


def test_equal_answers_of_a_listener_count_once_and_different_ones_not_at_all(exported, tmp_path):
    first = write(tmp_path / "a.csv", fill(exported))
    changed = fill(exported)
    changed[0]["answer"] = "1"
    second = write(tmp_path / "b.csv", changed)
    other = write(tmp_path / "c.csv", fill(exported, listener="Bo"))
    found = faults_of(exported, first, second, other)
    count = len(changed)
    counted = Counter(answer.listener for answer in found.given)
    assert counted == {"Zoë": count - 1, "Bo": count}
    conflict = [fault for fault in found.faults if "in different ways" in fault.reason]
    assert [(Path(fault.file).name, fault.row) for fault in conflict] == [
        ("a.csv", 2),
        ("b.csv", 2),
    ]
    assert f"{first} row 2 and {second} row 2" in conflict[0].reason
    assert len([fault for fault in found.faults if "counts once" in fault.reason]) == count - 1


# ---- the numbers


@pytest.mark.parametrize(("successes", "trials"), [(0, 5), (5, 5), (3, 10), (8, 10), (40, 100)])
def test_limits_are_where_such_a_count_has_a_probability_of_a_fortieth(successes, trials):
    def at_least(count, share):
        """P(X ≥ count), in exact arithmetic."""
        p = Fraction(share)
        terms = (
            math.comb(trials, i) * p**i * (1 - p) ** (trials - i) for i in range(count, trials + 1)
        )
        return float(sum(terms))

    low, high = exact_interval(successes, trials)
    if successes:
        assert at_least(successes, low) == pytest.approx(0.025)
    else:
        assert low == 0
    if successes < trials:
        assert 1 - at_least(successes + 1, high) == pytest.approx(0.025)
    else:
        assert high == 1


def test_an_interval_and_a_sign_test_agree_with_published_tables():
    assert exact_interval(8, 10) == pytest.approx((0.4439, 0.9748), abs=1e-4)
    assert exact_interval(0, 10) == pytest.approx((0, 0.3085), abs=1e-4)
    assert sign_test(8, 10) == pytest.approx(0.109375)
    assert sign_test(2, 10) == sign_test(8, 10)
    assert sign_test(5, 10) == sign_test(0, 0) == 1
    assert 0 < sign_test(1500, 2500) < 1e-20


def test_an_interval_of_answers_draws_sentences_and_listeners_together():
    scores = np.random.default_rng(0).integers(1, 6, 12).astype(float)
    texts, names = [str(i % 4) for i in range(12)], [str(i // 4) for i in range(12)]
    sentences = Bootstrap.over(texts, draws=300, seed=1)
    listeners = Bootstrap.over(names, draws=300, seed=2)
    means = []
    for drawn_texts, drawn_names in zip(sentences.weights, listeners.weights, strict=True):
        answers = [
            score
            for score, text, name in zip(scores, texts, names, strict=True)
            for _ in range(drawn_texts[int(text)] * drawn_names[int(name)])
        ]
        means.append(np.mean(answers))
    metric = crossed_metric(sentences, listeners, ratio(scores))
    assert metric.value == pytest.approx(scores.mean())
    np.testing.assert_allclose([metric.low, metric.high], np.percentile(means, [2.5, 97.5]))


def test_listeners_who_disagree_widen_the_interval(exported, tmp_path):
    key = read_key(exported.root / "listening")

    def width(answers):
        files = [
            write(tmp_path / f"{name}.csv", fill(exported, 1, name, {"mos": score, "ab": "a"}))
            for name, score in answers.items()
        ]
        result = tally(key, read_answers(files, key), files=len(files), draws=500, seed=0)
        mos = result.ratings["student"].mos
        return mos.value, mos.high - mos.low

    assert width({"a": "3", "b": "3", "c": "3"}) == (3, 0)
    value, wide = width({"a": "1", "b": "3", "c": "5"})
    assert value == 3
    assert wide > 2


def test_one_listener_of_one_sentence_has_a_mean_without_an_interval(run, tmp_path):
    export_sheets(run.load(), SheetOptions(items=1))
    result = tally_answers(run.load(), [write(tmp_path / "a.csv", fill(run))])
    assert result.ratings["student"].mos.value == 4
    assert result.ratings["student"].mos.low is None


# ---- the command line


def test_the_commands_say_where_things_are_and_what_they_found(run, tmp_path):
    assert foretell("tally", run.path, tmp_path / "a.csv").returncode == 2
    options = ("--sheets", 2, "--items", 4, "--system", "student", "--system", "teacher_guided")
    exported = foretell("listen", run.path, *options, "--json")
    assert exported.returncode == 0, exported.stderr
    document = json.loads(exported.stdout)
    assert document["systems"] == ["teacher_guided", "student"]
    assert [sheet["questions"] for sheet in document["sheets"]] == [12, 12]
    assert Path(document["key"]).is_file()
    assert all((Path(s["folder"]) / "listen.html").is_file() for s in document["sheets"])
    told = foretell("listen", run.path, *options)
    assert "8 clips to rate and 4 pairs to compare on each of 2 sheets" in told.stdout
    assert foretell("listen", run.path).returncode == 2, "of other settings"

    good = write(tmp_path / "good.csv", fill(run))
    done = foretell("tally", run.path, good)
    assert done.returncode == 0
    assert "12 answers of 1 listeners in 1 files, 0 items left empty, 0 faults" in done.stdout
    assert re.search(r"student +MOS 4\.00 \[4\.00, 4\.00\]  4 answers", done.stdout)
    rows = fill(run, listener="Bo")
    rows[1]["answer"] = "9"
    bad = write(tmp_path / "bad.csv", rows)
    failed = foretell("tally", run.path, good, bad, "--json")
    assert failed.returncode == 1
    found = json.loads(failed.stdout)
    assert found["answers"] == 23
    assert [(fault["file"], fault["row"]) for fault in found["faults"]] == [(str(bad), 3)]
    assert f"{bad} row 3: the answer '9'" in foretell("tally", run.path, bad).stdout


def test_answers_of_which_none_counts_fail(exported, tmp_path):
    rows = fill(exported, answers={"mos": "", "ab": ""})
    done = foretell("tally", exported.path, write(tmp_path / "a.csv", rows))
    assert done.returncode == 1
    assert f"0 answers of 0 listeners in 1 files, {len(rows)} items left empty" in done.stdout


def test_a_damaged_key_is_a_users_error(exported):
    (exported.root / "listening" / "key.json").write_text("{}")
    with pytest.raises(UserError, match="is not the key of listening sheets"):
        tally_answers(exported.load(), [])


def test_the_report_without_listeners_says_nothing_of_them(run):
    assert "Listeners" not in write_report(run.root / "report").read_text()


# ---- a real browser


@pytest.fixture
def browser(tmp_path):
    chromium = find_chromium()
    if chromium is None:
        reason = "no Chromium is installed: put one on the path, or name it in CHROMIUM"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    with Browser(chromium, tmp_path / "profile") as browser:
        yield browser


LEFT = "document.getElementById('left').textContent"
SHOWN = (
    "[...document.querySelectorAll('.question')].filter(q => !q.hidden).map(q => q.dataset.item)"
)


def test_answering_in_the_page_yields_the_answers_file(exported, tmp_path, browser):
    folder = exported.root / "listening" / "sheet_01"
    page = folder / "listen.html"
    browser.open(page)
    assert browser.run(LEFT) == "35 of 35 left"
    assert browser.run(SHOWN) == ["mos-001"]
    assert browser.run(
        "Promise.all([...document.querySelectorAll('audio')].map(a => a.readyState >= 1 || "
        "new Promise(done => { a.onloadedmetadata = () => done(true); a.onerror = () => "
        "done(false); })))"
    ) == [True] * (20 + 2 * 15), "every clip can be played"

    # Keys: answer the first, go on, answer the second twice, go on; nothing while a name is typed.
    for key in "4n25n":
        browser.press(key)
    assert browser.run(LEFT) == "33 of 35 left"
    assert browser.run(SHOWN) == ["mos-003"]
    browser.run("document.getElementById('download').click()")
    assert "name or initials" in browser.run("document.getElementById('notice').textContent")
    assert browser.run("document.activeElement.id") == "listener"
    for key in "n1":
        browser.press(key)
    assert browser.run("document.getElementById('listener').value") == "n1"
    assert browser.run(SHOWN) == ["mos-003"]

    # Pointer: answer by clicking; a reload loses neither answers, nor the name, nor the place.
    browser.run("document.querySelector('.question:not([hidden]) input[value=\"1\"]').click()")
    browser.open(page)
    assert browser.run(LEFT) == "32 of 35 left"
    assert browser.run(SHOWN) == ["mos-003"]
    assert browser.run("document.getElementById('listener').value") == "n1"
    browser.run("document.getElementById('unanswered').click()")
    assert browser.run(SHOWN) == ["mos-004"]
    browser.run('document.querySelector(\'input[name="ab-002"][value="equal"]\').click()')

    text = browser.run(
        "(async () => { const made = URL.createObjectURL; let blob; URL.createObjectURL = b => "
        "{ blob = b; return made(b); }; document.getElementById('download').click(); "
        "return String.fromCharCode(...new Uint8Array(await blob.arrayBuffer())); })()"
    )
    (tmp_path / "a.csv").write_bytes(text.encode("latin-1"))
    rows = list(csv.DictReader(io.StringIO(text.encode("latin-1").decode("utf-8-sig"))))
    template = list(csv.DictReader(io.StringIO((folder / "answers.csv").read_text())))
    assert [r | {"answer": "", "listener": ""} for r in rows] == template
    found = faults_of(exported, tmp_path / "a.csv")
    assert found.faults == ()
    assert {a.question.item: a.answer for a in found.given} == {
        "mos-001": "4", "mos-002": "5", "mos-003": "1", "ab-002": "equal",
    }  # fmt: skip
    assert found.unanswered == 31
