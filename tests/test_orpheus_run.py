"""A language model with Orpheus' ids from recordings to a chain of adapters, as a user runs it."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.stored_audio import StoredAudio
from stages.audio_codec import load_audio_codec
from stages.config import FitConfig
from stages.dataset import Dataset
from stages.distributed import Place
from stages.errors import UserError
from stages.family import Family, Sample, load_family
from stages.fit import fit
from stages.interruption import StopRequest
from store import PredictionStore
from tests.conftest import Program, Run, write_run

pytestmark = pytest.mark.slow

ENTRIES, FIRST, END, VOCABULARY = 64, 128_266, 128_258, 156_940
"""Entries of the audio codec's codebooks; ids as Orpheus' tokenizer has them."""
V = 4097
"""Ids that a slot can have, the end among them."""
SNAC = {
    "sampling_rate": 24000, "encoder_dim": 8, "encoder_rates": [2, 4, 8, 8], "decoder_dim": 32,
    "decoder_rates": [8, 8, 4, 2], "attn_window_size": None, "codebook_size": ENTRIES,
    "codebook_dim": 8, "vq_strides": [4, 2, 1], "noise": True, "depthwise": True,
}  # fmt: skip
MODEL = {
    "family": "causal_lm",
    "layout": {
        "slots": [[0, 0], [1, 0], [2, 0], [2, 1], [1, 1], [2, 2], [2, 3]],
        "codes_per_slot": 4096, "audio_base_id": FIRST, "end_id": END,
    },
    "special": {
        "human": {"id": 128_259, "token": "<custom_token_3>"},
        "begin": {"id": 128_000, "token": "<|begin_of_text|>"},
        "stop": {"id": 128_009, "token": "<|eot_id|>"},
        "end_human": {"id": 128_260, "token": "<custom_token_4>"},
        "ai": {"id": 128_261, "token": "<custom_token_5>"},
        "speech": {"id": 128_257, "token": "<custom_token_1>"},
    },
    "prompt": "<human><begin>{speaker}: {text}<stop><end_human><ai><speech>",
}  # fmt: skip


@pytest.fixture(scope="module")
def foretell(require, foretell) -> Callable[..., Program]:
    require("peft", "pip install 'foretell[orpheus]'")
    return partial(foretell, imports=["stages.families.causal_lm", "stages.families.snac_codec"])


@pytest.fixture(scope="module")
def base(require, tmp_path_factory) -> Path:
    """A Llama of Orpheus' vocabulary whose predictions are far from uniform."""
    require("peft", "pip install 'foretell[orpheus]'")
    from stages.families.causal_lm_tiny import save_tiny, tiny_config

    folder = tmp_path_factory.mktemp("models") / "base"
    size = {"width": 32, "layers": 2, "heads": 4, "key_value_heads": 2, "feed_forward": 48}
    model = save_tiny(folder, tiny_config(**size, positions=512, vocabulary=VOCABULARY))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def snac(require, base) -> Path:
    """A SNAC of random weights in the published layout."""
    require("snac", "pip install 'foretell[orpheus]'")
    from tests.test_snac_codec import build

    return build(base.with_name("snac"), SNAC)


def model_of(base: Path, rank: int | None, **changes: Any) -> dict[str, Any]:
    lora = None if rank is None else {"rank": rank, "alpha": 2.0 * rank}
    return MODEL | {"path": str(base), "lora": lora} | changes


SCHEDULE = {
    "steps": 24, "batch_size": 8, "learning_rate": 3e-3, "warmup_steps": 2, "checkpoint_every": 8,
    "log_every": 8, "device": "cpu",
}  # fmt: skip
ROLLOUT = {
    "variations": 2,
    "guidance": {"scale": 1.5},
    "sampler": {"temperature": 0.8, "min_timesteps": 3, "max_timesteps": 10},
    "target": {"kind": "top_k", "k": 16, "temperatures": [1.0, 2.0], "dtype": "float32"},
    "rollouts_per_shard": 8,
    "batch_size": 4,
    "device": "cpu",
}  # fmt: skip


def student_of(model: dict[str, Any], init: str, **changes: Any) -> dict[str, Any]:
    loss = {"recipe": "guide", "alpha": 0.1}
    return {"model": model, "init": {"kind": init}, "loss": loss, "optimizer": SCHEDULE} | changes


@pytest.fixture(scope="module")
def run(base, snac, tone_corpus, foretell, tmp_path_factory) -> Run:
    """A finished run: a teacher of rank 8, students of rank 4 and 2, and a round between them."""
    folder = tmp_path_factory.mktemp("orpheus")
    document = {
        "name": "orpheus",
        "runs": str(folder / "runs"),
        "seed": 1,
        "prepare": {
            "source": str(tone_corpus), "dev_texts": 2, "test_texts": 3, "trim": None,
            "audio_codec": {"kind": "snac", "path": str(snac), "device": "cpu"},
        },
        "teacher": {"model": model_of(base, 8)},
        "fit": {
            "condition_dropout": 0.3, "dev_batches": 1,
            "optimizer": SCHEDULE | {"steps": 40, "learning_rate": 1e-2, "processes": 2},
        },
        "rollout": ROLLOUT,
        "rounds": {"again": {"teacher": "student"}},
        "students": {
            "student": student_of(model_of(base, 4), "teacher"),
            "merged": student_of(
                model_of(base, 2), "merged", optimizer=SCHEDULE | {"learning_rate": 1e-3}
            ),
            "small": student_of(model_of(base, 2), "teacher", round="again"),
        },
        "evaluate": {
            "samples": 4, "judges": [], "audio_samples": 1, "single_samples": 0, "device": "cpu",
        },
    }  # fmt: skip
    run = write_run(document, folder)
    foretell("run", run.path)
    return run


@pytest.fixture
def run_on(run, base, tmp_path) -> Callable[..., Run]:
    """Write a run of its own on the dataset of `run`; sections that are None are left out."""

    def make(name: str, **sections: Any) -> Run:
        document = {
            "name": name,
            "runs": str(tmp_path / "runs"),
            "seed": 1,
            "dataset": str(run.root / "dataset"),
            "teacher": {"checkpoint": str(run.root / "teacher")},
            "rollout": ROLLOUT,
            "students": {"student": student_of(model_of(base, 2), "teacher")},
        }
        document |= sections
        return write_run({k: v for k, v in document.items() if v is not None}, tmp_path)

    return make


def load(folder: Path) -> Family:
    return load_family("causal_lm").load(folder, device="cpu", dtype=torch.float32)


def samples_of(run: Run, split: str) -> dict[str, Sample]:
    dataset = Dataset.open(run.root / "dataset")
    return {sample["sample_id"]: sample for sample in dataset.samples(split)}


@torch.no_grad()
def logprobs(
    family: Family, sample: Sample, codes: np.ndarray | Tensor, scale: float, temperature: float = 1
) -> Tensor:
    """[T, 7, V] of codes [T, 7], alone in a batch."""
    given = torch.as_tensor(np.asarray(codes).astype(np.int64))[None]
    logits = family.score([sample], given, torch.tensor([len(given[0])]), cfg_scale=scale).logits[0]
    logits[..., list(family.forbidden)] = -torch.inf
    return (logits / temperature).log_softmax(-1)


def counted(codes: np.ndarray) -> np.ndarray:
    """[T, 7] bool: everything up to the first end, frame by frame, by hand."""
    marks, ended = np.zeros(codes.shape, bool), False
    for place in np.ndindex(codes.shape):
        marks[place] = not ended
        ended = ended or codes[place] == V - 1
    return marks


# ---- the run


def test_every_command_knows_the_finished_run(run, foretell):
    stages = json.loads(foretell("status", run.path, "--json").stdout)["stages"]
    assert [*stages] == [
        "prepare", "fit", "rollout", "train:merged", "train:student", "rollout:again",
        "train:small", "evaluate",
    ]  # fmt: skip
    assert {stage["state"] for stage in stages.values()} == {"done"}
    checked = json.loads(foretell("verify", run.root / "store", "--json").stdout)
    assert (checked["ok"], checked["rollouts"], checked["bad"]) == (True, 40, [])
    store = json.loads(foretell("inspect", run.root / "store", "--json").stdout)
    assert (store["rollouts"], store["cfg_scale"]) == (40, 1.5)
    student = json.loads(foretell("inspect", run.root / "student_small", "--json").stdout)
    rank, width, heads, narrow, wide, layers = 2, 32, 32, 16, 48, 2
    added = rank * (2 * (width + heads) + 2 * (width + narrow) + 3 * (width + wide)) * layers
    per_layer = 2 * width * heads + 2 * width * narrow + 3 * width * wide + 2 * width
    whole = VOCABULARY * width + layers * per_layer + width
    assert student["architecture"]["parameters"] == whole + added


def test_the_store_has_the_ids_of_each_slot_and_no_others(run):
    store = PredictionStore.open(run.root / "store")
    assert [stream.vocabulary for stream in store.manifest.streams] == [V] * 7
    assert store.manifest.forbidden == tuple(range(ENTRIES, V - 1))
    ends = 0
    for key in store:
        rollout = store[key]
        codes, marks = rollout.codes.astype(int), counted(rollout.codes)
        assert codes.shape[1] == 7
        assert ((codes < ENTRIES) | (codes == V - 1)).all()
        assert (codes[~marks] == V - 1).all()
        ids = rollout.arrays["top_k.ids"].astype(int)
        assert ((ids < ENTRIES) | (ids == V - 1)).all()
        assert (ids == V - 1).any(-1).all(), "the end is always kept"
        assert (ids == codes[..., None]).any(-1).all(), "and so is what was drawn"
        ends += bool((codes == V - 1).any())
    assert ends > 0, "no rollout comes to an end: this run proves nothing of it"


@pytest.mark.parametrize("name", ["store", "store_again"])
def test_stored_predictions_are_what_the_teacher_scores(run, name):
    """At both temperatures, with the mass of what was not kept, by formulas of this test's own."""
    teacher = load(run.root / ("teacher" if name == "store" else "student"))
    scale = 1.5 if name == "store" else 1.0
    store, samples = PredictionStore.open(run.root / name), samples_of(run, "train")
    assert store.manifest.fingerprints.teacher == teacher.fingerprint()
    for key in list(store)[::5]:
        rollout, marks = store[key], counted(store[key].codes)
        ids = torch.from_numpy(rollout.arrays["top_k.ids"].astype(np.int64))
        kept = torch.tensor(rollout.arrays["top_k.logits"])
        for place, temperature in enumerate((1.0, 2.0)):
            full = logprobs(teacher, samples[key[0]], rollout.codes, scale, temperature)
            expected = full.gather(-1, ids)
            within = (kept / temperature).log_softmax(-1)
            mass = expected.logsumexp(-1, keepdim=True)
            torch.testing.assert_close((within + mass)[marks], expected[marks], atol=1e-4, rtol=0)
            rest = full.exp().scatter(-1, ids, 0.0).sum(-1)
            tail = torch.tensor(rollout.arrays["top_k.tail_logmass"])[..., place]
            torch.testing.assert_close(tail.exp()[marks], rest[marks], atol=1e-4, rtol=0)


def divergence(student: Family, run: Run) -> float:
    """Mean KL in nats of a student from the guided teacher on the reference rollouts."""
    store, samples = (
        PredictionStore.open(run.root / "report" / "reference"),
        samples_of(run, "test"),
    )
    values = []
    for key in store:
        codes, marks = store[key].codes, counted(store[key].codes)
        teacher = torch.tensor(store[key].arrays["full.logits"]).double().log_softmax(-1)
        ours = logprobs(student, samples[key[0]], codes, 1.0).double()
        terms = torch.where(teacher.isinf(), 0.0, teacher.exp() * (teacher - ours))
        values.append(terms.sum(-1)[marks])
    return float(torch.cat(values).mean())


def untrained(base: Path, run: Run, rank: int, beginning: str, *, merged: bool = False) -> Family:
    facts = Dataset.open(run.root / "dataset").facts.model_dump(mode="json")
    cls = load_family("causal_lm")
    config = cls.load(run.root / "student", device="cpu", dtype=torch.float32).config
    lora = config.lora.model_copy(update={"rank": rank, "alpha": 2.0 * rank})
    student = cls.build(config.model_copy(update={"lora": lora}), facts, seed=1)
    student.inherit(run.root / beginning, None, merged=merged)
    student.module.eval()
    return student


@pytest.mark.parametrize(
    ("name", "rank", "beginning"),
    [("student", 4, "teacher"), ("student_merged", 2, "teacher"), ("student_small", 2, "student")],
)
def test_students_come_closer_to_the_guided_teacher(run, base, name, rank, beginning):
    report = json.loads((run.root / "report" / "report.json").read_text())
    trained = divergence(load(run.root / name), run)
    assert trained == pytest.approx(report[name]["paired_kl"]["value"], rel=0.2)
    assert trained < divergence(untrained(base, run, rank, beginning, merged="merged" in name), run)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("name", ["teacher", "student", "student_merged", "student_small"])
def test_saved_adapters_open_in_stock_peft(run, name):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = run.root / name
    settings = json.loads((folder / "adapter_config.json").read_text())
    stock = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(settings["base_model_name_or_path"]), folder
    )
    ids = torch.tensor([[128_259, 65, 128_257, FIRST, FIRST + 4096]])
    with torch.no_grad():
        ours = load(folder).module.model(ids).logits
        torch.testing.assert_close(stock(ids).logits, ours, atol=1e-5, rtol=1e-5)
        with stock.disable_adapter():
            assert not torch.allclose(stock(ids).logits, ours, atol=1e-2), "the adapter is idle"


def test_checkpoints_hold_adapters_and_their_moments_alone(run):
    for folder in (run.root / name for name in ("teacher", "student", "student_merged")):
        newest = sorted((folder / "checkpoints").iterdir())[-1]
        (file,) = newest.rglob("*.safetensors")
        assert all(".lora_" in name for name in load_file(file))
        assert sum(f.stat().st_size for f in folder.glob("*.safetensors")) < 10**5
    weights = [path.parent.name for path in run.root.rglob("model.safetensors")]
    assert sorted(weights) == ["audio_codec", "base"], "one base: the merged teacher's, once"


# ---- parts of it


def test_training_never_changes_the_base_and_both_prompts_learn(run, base, tmp_path):
    """Dropped conditions teach the prompt without them: the other half of guidance."""
    facts = Dataset.open(run.root / "dataset").facts.model_dump(mode="json")
    before = hashlib.sha256((base / "model.safetensors").read_bytes()).hexdigest()
    train = [*samples_of(run, "train").values()]
    cls = load_family("causal_lm")
    config = cls.load(run.root / "teacher", device="cpu", dtype=torch.float32).config
    losses = {}
    for dropout in (None, 0.0, 1.0):
        family = cls.build(config, facts, seed=1)
        frozen = {n: p.clone() for n, p in family.module.named_parameters() if "lora_" not in n}
        if dropout is not None:
            section = {
                "condition_dropout": dropout,
                "optimizer": SCHEDULE | {"steps": 10, "learning_rate": 1e-2, "weight_decay": 0.5},
            }
            assert fit(
                family, train, [], FitConfig.model_validate(section), tmp_path / str(dropout),
                seed=1, identity="x", place=Place(0, 1, torch.device("cpu")), stop=StopRequest(),
            )  # fmt: skip
        now = dict(family.module.named_parameters())
        assert all(torch.equal(now[name], value) for name, value in frozen.items())
        family.module.eval()
        losses[dropout] = [cross_entropy(family, train, dropped) for dropped in (False, True)]
    assert losses[1.0][1] < losses[0.0][1] < losses[None][1], "the prompt without conditions"
    assert losses[0.0][0] < losses[None][0], "the prompt with them"
    assert hashlib.sha256((base / "model.safetensors").read_bytes()).hexdigest() == before


@torch.no_grad()
def cross_entropy(family: Family, samples: Sequence[Sample], dropped: bool) -> float:
    total, count = 0.0, 0
    for sample in samples[:6]:
        codes = family.reference_codes(sample)
        scores = family.score(
            [sample], codes[None], torch.tensor([len(codes)]), unconditional=torch.tensor([dropped])
        )
        logits = scores.logits[0]
        logits[..., list(family.forbidden)] = -torch.inf
        chosen = logits.log_softmax(-1).gather(-1, codes[..., None])[..., 0]
        total -= float(chosen[torch.from_numpy(counted(codes.numpy()))].sum())
        count += int(counted(codes.numpy()).sum())
    return total / count


def test_a_store_of_recordings_has_their_codes_and_teaches(run, run_on):
    own = run_on("recordings", rollout=ROLLOUT | {"source": "dataset", "variations": 1})
    short = {"students.student.optimizer.steps=2"}
    own.do("rollout", "train:student", overrides=tuple(short))
    store, samples = PredictionStore.open(own.root / "store"), samples_of(run, "train")
    assert store.manifest.source == "dataset"
    for key in store:
        frames = np.asarray(samples[key[0]]["codes"]).reshape(-1, 7)
        np.testing.assert_array_equal(store[key].codes[:-1], frames)
        assert (store[key].codes[-1] == V - 1).all()
    assert (own.root / "student" / "adapter_model.safetensors").exists()
    line = json.loads((own.root / "student" / "log.jsonl").read_text().splitlines()[-1])
    assert {"hard", "soft", "total"} <= line.keys()
    assert line["total"] == pytest.approx(0.1 * line["hard"] + 0.9 * line["soft"])


def test_the_whole_vocabulary_says_of_a_slot_what_the_slots_say(run, run_on, base):
    """A stock adapter on its base as the teacher; what it says of all 156,940 ids, and of 4,097."""
    stores = {}
    for vocabulary in ("slots", "full"):
        pretrained = MODEL | {
            "path": str(base), "adapter": str(run.root / "teacher"), "vocabulary": vocabulary,
        }  # fmt: skip
        section = ROLLOUT | {
            "source": "dataset", "variations": 1, "samples": 1,
            "target": {"kind": "full", "dtype": "float32"},
        }  # fmt: skip
        own = run_on(vocabulary, teacher={"pretrained": pretrained}, rollout=section, students=None)
        own.do("rollout")
        stores[vocabulary] = PredictionStore.open(own.root / "store")
    (key,) = stores["slots"]
    slots, full = (stores[name][key] for name in ("slots", "full"))
    assert full.arrays["full.logits"].shape[1:] == (7, VOCABULARY)
    marks, codes = counted(slots.codes), slots.codes.astype(int)
    for slot in range(7):
        first = FIRST + 4096 * slot
        columns = [*range(first, first + ENTRIES), END]
        np.testing.assert_array_equal(
            full.codes[:, slot],
            np.where(codes[:, slot] == V - 1, END, codes[:, slot] + first),
        )
        ours = torch.from_numpy(slots.arrays["full.logits"][marks[:, slot], slot])
        theirs = torch.from_numpy(full.arrays["full.logits"][marks[:, slot], slot])
        assert ours.isinf().sum(-1).eq(4096 - ENTRIES).all()
        torch.testing.assert_close(
            ours[:, [*range(ENTRIES), V - 1]].softmax(-1), theirs[:, columns].softmax(-1),
            atol=1e-5, rtol=1e-4,
        )  # fmt: skip


def test_a_student_of_the_whole_vocabulary_learns_from_its_own_store(run, run_on, base):
    pretrained = MODEL | {
        "path": str(base), "adapter": str(run.root / "teacher"), "vocabulary": "full",
    }  # fmt: skip
    model = model_of(base, 2, vocabulary="full")
    schedule = SCHEDULE | {"steps": 12, "batch_size": 2, "log_every": 4}
    own = run_on(
        "whole", teacher={"pretrained": pretrained},
        rollout=ROLLOUT | {"variations": 1, "samples": 2, "batch_size": 2},
        students={"student": student_of(model, "teacher", optimizer=schedule)},
    )  # fmt: skip
    own.do("rollout", "train:student")
    store = PredictionStore.open(own.root / "store")
    assert [stream.vocabulary for stream in store.manifest.streams] == [VOCABULARY] * 7
    for key in store:
        relative = store[key].codes.astype(int) - FIRST - 4096 * np.arange(7)
        ends = store[key].codes == END
        assert (ends | ((relative >= 0) & (relative < ENTRIES))).all(), "drawn of its slot alone"
        audio = StoredAudio.open(store, run.root / "dataset")
        frames = relative[~ends.any(-1)]
        if len(frames):
            expected = load_audio_codec(run.root / "dataset" / "audio_codec").decode(frames)
            np.testing.assert_array_equal(audio.waveform(*key).samples, expected.numpy())
    lines = [json.loads(x) for x in (own.root / "student" / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["total"] < lines[0]["total"]


# ---- mistakes

MISTAKES: dict[str, tuple[str, str, str]] = {
    "a temperature that was not stored": (
        "train:student", "students.student.loss.temperature=3.0",
        r"loss.temperature=3.0: .* at the temperatures \[1.0, 2.0\] only",
    ),
    "a student of the whole vocabulary": (
        "train:student", "students.student.model.vocabulary=full",
        "backbone.0:156940, .*backbone.0:4097, .* layout and vocabulary",
    ),
    "a student of another prompt": (
        "train:student", "students.student.model.prompt=<human>{text}<ai>",
        "student's tokenizer .* differ from the store's .* its tokenizer, prompts",
    ),
    "a student of a narrower layout": (
        "train:student", "students.student.model.layout.codes_per_slot=4000",
        "backbone.0:4001, .*backbone.0:4097,",
    ),
    "a higher rank than the teacher's": (
        "train:student", "students.student.model.lora.rank=16",
        "the adapter has rank 8, and 16 is wanted",
    ),
    "an end by majority": (
        "rollout", "rollout.sampler.end_on=majority", "sampler.end_on='majority' is for",
    ),
    "more than the context holds": (
        "rollout", "rollout.sampler.max_timesteps=80",
        "none of the .*'clip-.*: a prompt of .* and 80 timesteps of 7 ids are .* takes 512",
    ),
    "more ids than a slot has": (
        "rollout", "rollout.target.k=66", "k is 66 but must be <= 65",
    ),
    "an order of slots that is not the dataset's": (
        "rollout",
        "teacher.pretrained.layout.slots=[[0,0],[1,0],[1,1],[2,0],[2,1],[2,2],[2,3]]",
        "the dataset's frames list the codes .* give the order",
    ),
    "an adapter of another base": (
        "rollout", "teacher.pretrained.path=OTHER", "was trained on another base .* give that",
    ),
    "no adapter": (
        "rollout", "teacher.pretrained.adapter=NOWHERE",
        "adapter_config.json does not exist: give the folder",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_told_in_one_line_before_any_work(run, run_on, base, tmp_path, case):
    stage, override, message = MISTAKES[case]
    other = base.with_name("other")
    if not other.exists():
        shutil.copytree(base, other)
        tensors = load_file(other / "model.safetensors")
        tensors["model.norm.weight"] += 1.0
        save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    pretrained = MODEL | {"path": str(base), "adapter": str(run.root / "teacher")}
    source = {"store": str(run.root / "store"), "rollout": None} if stage != "rollout" else {}
    own = run_on("mistaken", teacher={"pretrained": pretrained}, **source)
    override = override.replace("OTHER", str(other)).replace("NOWHERE", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=message) as caught:
        own.do(stage, overrides=(override,))
    assert "\n" not in str(caught.value)
    assert not list((own.root / "store").glob("shards/*"))
    assert not (own.root / "student").exists()


def test_a_mistake_ends_a_command_with_code_2(run_on, base, foretell):
    special = MODEL["special"] | {"ai": {"id": 128_262, "token": "<custom_token_5>"}}
    model = model_of(base, 4, special=special)
    own = run_on("special", teacher={"model": model}, fit={"optimizer": SCHEDULE})
    done = foretell("fit", own.path, code=2)
    assert "has '<custom_token_5>' at id 128261, but special.ai says 128262" in done.stderr
    assert len([line for line in done.stderr.splitlines() if "special.ai" in line]) == 1


# ---- interruptions


def arrays_of(folder: Path) -> dict[str, bytes]:
    """Files of a store's committed arrays, and the adapters of a run, by their places."""
    files = [path for path in (folder / "store" / "shards").rglob("*") if path.is_file()]
    files += folder.glob("*/adapter_model.safetensors")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_a_run_that_was_killed_in_every_stage_ends_with_the_same_bytes(run_on, base, start_worker):
    long = SCHEDULE | {"checkpoint_every": 2}
    sections = {
        "teacher": {"model": model_of(base, 4, lora={"rank": 4, "dropout": 0.1})},
        "fit": {"condition_dropout": 0.3, "dev_batches": 1, "optimizer": long},
        "rollout": ROLLOUT | {"variations": 1, "rollouts_per_shard": 2},
        "students": {"student": student_of(model_of(base, 2), "teacher", optimizer=long)},
    }
    whole, killed = run_on("whole", **sections), run_on("killed", **sections)
    root = killed.root

    def shards() -> int:
        return len(list((root / "store" / "shards").glob("*")))

    moments = {
        "fit": (root / "teacher" / "checkpoints" / "step_00000004").exists,
        "rollout": lambda: shards() >= 2,
        "train:student": (root / "student" / "checkpoints" / "step_00000004").exists,
    }
    for stage, ready in moments.items():
        whole.do(stage)
        worker = start_worker(stage, killed, imports=["stages.families.causal_lm"])
        assert worker.kill_when(ready, signal.SIGKILL) == -signal.SIGKILL
        if stage == "rollout":
            assert shards() < 10
        else:
            name = {"fit": "teacher"}.get(stage, "student")
            assert not (root / name / "adapter_model.safetensors").exists()
        killed.do(stage)
    expected = arrays_of(whole.root)
    assert len(expected) > 12
    assert arrays_of(root) == expected
