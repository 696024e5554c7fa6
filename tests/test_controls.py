"""Controls: what a student learns is what its store was made of, guidance or none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from stages.config import DatasetFacts, RolloutConfig, TrainConfig
from stages.distributed import Place
from stages.errors import UserError
from stages.families.codec_lm import CodecLM
from stages.interruption import StopRequest
from stages.losses import kl_divergence
from stages.model_config import CodecLMConfig
from stages.rollout import rollout
from stages.rollout_plan import create_store, lay_out
from stages.sampling import mask_forbidden
from stages.targets import DenseTarget
from stages.train import train
from store import PredictionStore

CODES, SCALE = 14, 3.0
FACTS = DatasetFacts(
    alphabet=" abcdefg",
    speakers=("low", "high"),
    codebooks=2,
    codes_per_codebook=CODES,
    frame_rate_hz=25.0,
    audio_codec="ab",
)
MODEL = {
    "family": "codec_lm",
    "d_model": 32, "heads": 2, "text_layers": 1, "decoder_layers": 1, "feed_forward": 48,
    "dropout": 0.0, "max_timesteps": 40, "max_characters": 20,
}  # fmt: skip


def samples_of(count: int) -> list[dict]:
    random = np.random.default_rng(0)
    return [
        {
            "sample_id": f"clip {i}",
            "text": "".join(random.choice(list(" abcdefg"), size=4)),
            "speaker": ("low", "high")[i % 2],
            "codes": random.integers(0, CODES, size=12).astype(np.uint16),
        }
        for i in range(count)
    ]


def teacher_of() -> CodecLM:
    """A teacher whose branches disagree, so that guidance is far from no guidance."""
    config = CodecLMConfig.model_validate(MODEL)
    family = CodecLM.build(config, FACTS.model_dump(mode="json"), seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in family.module.named_parameters():
            if "norm" not in name and "position" not in name:
                parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator))
    family.condition_dropout = 0.1
    family.module.eval()
    return family


def store_of(path: Path, teacher: CodecLM, samples: list[dict], scale: float, **changes):
    plain = {
        "source": "dataset",
        "guidance": {"scale": scale},
        "sampler": {"max_timesteps": 30},
        "target": {"kind": "top_k", "k": 8, "dtype": "float32"},
    }
    config = RolloutConfig.model_validate(plain | changes)
    store = create_store(
        path,
        teacher,
        lay_out(config, teacher, samples, facts=FACTS, dataset_fingerprint="d", seed=0),
    )
    by_id = {sample["sample_id"]: sample for sample in samples}
    assert rollout(teacher, store, by_id, store.missing(), batch_size=8, stop=StopRequest())
    return PredictionStore.open(path)


def kl_to(teacher: CodecLM, scale: float, student: CodecLM, samples: list[dict]) -> float:
    """Mean KL(teacher at a guidance scale ‖ student) on the recordings' codes, in nats."""
    student.module.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for sample in samples:
            codes = teacher.reference_codes(sample)[None]
            lengths = torch.tensor([codes.shape[1]])
            target = teacher.score([sample], codes, lengths, cfg_scale=scale).logits
            ours = mask_forbidden(student.score([sample], codes, lengths).logits, student.forbidden)
            dense = DenseTarget(mask_forbidden(target, teacher.forbidden))
            kl = kl_divergence(ours, dense)
            total, count = total + float(kl.sum()), count + kl.numel()
    return total / count


def distilled(store: PredictionStore, teacher: CodecLM, folder: Path, steps: int = 80) -> CodecLM:
    """A student of the teacher's own weights, trained on a store."""
    student = CodecLM.build(teacher.config, FACTS.model_dump(mode="json"), seed=1)
    teacher.save(folder / "teacher")
    student.inherit(folder / "teacher", None)
    config = TrainConfig.model_validate(
        {
            "model": MODEL,
            "optimizer": {
                "steps": steps,
                "batch_size": 8,
                "learning_rate": 3e-3,
                "warmup_steps": 5,
                "weight_decay": 0.0,
            },
        }
    )
    assert train(
        student, store, config, folder / "student", seed=0, identity="",
        place=Place(0, 1, torch.device("cpu")), stop=StopRequest(),
    )  # fmt: skip
    return student


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A teacher, its samples, and students distilled from targets with and without guidance."""
    folder = tmp_path_factory.mktemp("controls")
    teacher, samples = teacher_of(), samples_of(24)
    students = {}
    for name, scale in (("guided", SCALE), ("unguided", 1.0)):
        store = store_of(folder / f"{name} store", teacher, samples, scale)
        students[name] = distilled(store, teacher, folder / name)
    return teacher, samples, students


def test_guidance_moves_this_teacher_far_enough_to_be_seen(scene):
    teacher, samples, _ = scene
    assert kl_to(teacher, SCALE, teacher, samples) > 0.2
    assert kl_to(teacher, 1.0, teacher, samples) < 1e-6


def test_a_student_of_guided_targets_does_with_one_pass_what_its_teacher_does_with_two(scene):
    teacher, samples, students = scene
    before = kl_to(teacher, SCALE, teacher, samples)
    after = kl_to(teacher, SCALE, students["guided"], samples)
    assert after < before / 3


def test_a_student_of_unguided_targets_does_not_move_towards_guidance(scene):
    teacher, samples, students = scene
    before = kl_to(teacher, SCALE, teacher, samples)
    after = kl_to(teacher, SCALE, students["unguided"], samples)
    assert after > 0.9 * before
    assert kl_to(teacher, 1.0, students["unguided"], samples) < 0.05 * before, "it stays at home"


def test_full_and_top_k_stores_of_every_allowed_id_teach_the_same_step(tmp_path):
    teacher, samples = teacher_of(), samples_of(8)
    students = []
    for target in (
        {"kind": "full", "dtype": "float32"},
        {"kind": "top_k", "k": CODES + 1, "dtype": "float32"},
    ):
        folder = tmp_path / target["kind"]
        store = store_of(folder / "store", teacher, samples, SCALE, target=target)
        students.append(distilled(store, teacher, folder, steps=3))
    one, other = (kl_to(teacher, SCALE, student, samples) for student in students)
    assert one == pytest.approx(other, rel=1e-3)


def test_a_store_whose_rollouts_all_weigh_nothing_is_refused_before_a_step(tmp_path):
    teacher, samples = teacher_of(), samples_of(8)
    rejected = {
        "max_timesteps": 5,
        "min_timesteps": 4,
        "truncated_weight": 0.0,
        "max_timesteps_weight": 0.0,
        "end_on": "majority",
    }
    store = store_of(
        tmp_path / "store", teacher, samples, SCALE, source="teacher", sampler=rejected
    )
    assert {store[key].weight for key in store} == {0.0}
    with pytest.raises(UserError, match="has nothing to learn from, for all of its rollouts"):
        distilled(store, teacher, tmp_path, steps=3)
