"""Checkpoints of the family magpie: from NeMo's files and back to them, and what is refused."""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from stages.errors import Refused, UserError
from stages.family import load_family
from stages.model_config import MagpieConfig, MagpieTeacher
from tests.magpie_models import (
    CODEBOOKS,
    CODES,
    TOKENIZER,
    VOCABULARY,
    Models,
    batch_of,
    guided,
    nemo,
    policy_of,
    quiet,
    random_codes,
    restored,
    roll,
    samples_of,
)

pytestmark = pytest.mark.slow

LENGTHS = torch.tensor([5, 3])


@pytest.fixture(scope="module")
def models(require, tmp_path_factory) -> Models:
    require("nemo", "pip install 'foretell[magpie]'")
    return Models(tmp_path_factory.mktemp("magpie"))


def predicted(family: Any) -> Tensor:
    samples = samples_of(2, speakers="speaker" in family.conditions)
    family.module.eval()
    with torch.no_grad():
        scores = family.score(samples, random_codes(family, [5, 3]), LENGTHS, cfg_scale=2.5)
    return torch.cat([scores.logits[0], scores.logits[1, :3]])


def state_of(family: Any) -> dict[str, Tensor]:
    """All weights by NeMo's names."""
    with quiet():
        state: dict[str, Tensor] = family.module.model.state_dict()
    return state


def loaded(folder: Path) -> Any:
    return load_family("magpie").load(folder, device="cpu", dtype=torch.float32)


def members(path: Path) -> dict[str, bytes]:
    """Contents of an archive by their names, without `./`."""
    with tarfile.open(path) as archive:
        return {
            str(Path(member.name)): archive.extractfile(member).read()
            for member in archive.getmembers()
            if member.isfile()
        }


def packed(path: Path, contents: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:") as archive:
        for name, content in contents.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def settings_of(path: Path) -> dict[str, Any]:
    """NeMo's configuration in an archive, as it stands there."""
    settings: dict[str, Any] = yaml.safe_load(members(path)["model_config.yaml"])
    return settings


def weights_of(path: Path) -> dict[str, Tensor]:
    weights = members(path)["model_weights.ckpt"]
    tensors: dict[str, Tensor] = torch.load(io.BytesIO(weights), weights_only=True)
    return tensors


def edited(path: Path, to: Path, **settings: Any) -> Path:
    """An archive with dotted keys of its configuration changed; `to` is its path."""
    from omegaconf import OmegaConf

    contents = members(path)
    config = OmegaConf.create(contents["model_config.yaml"].decode())
    for key, value in settings.items():
        OmegaConf.update(config, key, value, force_add=True, merge=False)
    return packed(to, contents | {"model_config.yaml": OmegaConf.to_yaml(config).encode()})


class Executed:
    """Leaves a trace when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


# Back to NeMo


@pytest.mark.parametrize("shape", [{}, {"experts": 3, "frame_stacking": 2}], ids=["dense", "both"])
def test_stock_nemo_restores_a_student_with_equal_weights(models, tmp_path, shape):
    path = models.archive(**shape)
    student = models.student(path, seed=4, like=path)
    with torch.no_grad():
        for parameter in student.module.parameters():
            parameter.add_(0.01)  # as training would
    student.save(tmp_path)
    stock = restored(tmp_path / "model.nemo")
    with quiet():
        ours, theirs = state_of(student), stock.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert type(stock).__name__ == "MagpieTTSModel"
    assert type(stock._codec_model).__name__ == "AudioCodecModel"


def test_nemos_own_inference_at_scale_1_says_what_the_student_says(models, tmp_path):
    path = models.archive(settings={"inference_parameters": {"max_decoder_steps": 12, "topk": 1}})
    student = models.student(path, like=path)
    student.save(tmp_path)
    stock, samples = restored(tmp_path / "model.nemo"), samples_of(2, equal=True)
    stock.inference_parameters.apply_attention_prior = False
    batch = batch_of(stock, samples)
    with quiet():
        said = stock.infer_batch(dict(batch), use_cfg=False)
        stock.infer_batch(dict(batch), use_cfg=False, use_local_transformer_for_inference=True)
    assert said.predicted_audio.isfinite().all()
    rolled = roll(
        student, samples, 1.0, top_k=1, min_timesteps=4, max_timesteps=12, reference_multiple=None
    )
    for row, length in enumerate(said.predicted_codes_lens.tolist()):
        frames = student.frames(rolled.row(row)[0])
        assert len(frames) >= 4
        steps = min(len(frames), length)
        assert torch.equal(said.predicted_codes[row, :, :steps].mT, frames[:steps])


def distillation_keys() -> set[str]:
    from nemo.collections.tts.models.magpietts_cfg_distillation import _DefaultParams

    return {field.name for field in dataclasses.fields(_DefaultParams)} | {"teacher_model_path"}


@pytest.fixture(scope="module")
def online(models) -> Path:
    """The .nemo of a student of NeMo's online distillation."""
    from nemo.collections.tts.models.magpietts_cfg_distillation import OnlineCFGDistillation
    from omegaconf import OmegaConf

    settings = models.config() | {"teacher_model_path": str(models.archive()), "alpha": 0.5}
    settings |= {key: 1.0 for key in ("beta", "moe_loss_weight", "truncation_weight")}
    settings |= {"max_decoder_steps": 20, "distill_local_transformer": True, "rollout_topk": 40}
    settings |= {"lt_distillation_start_step": 0, "init_from_nemo_model": None}
    path = models.folder / "online.nemo"
    with quiet():
        OnlineCFGDistillation(OmegaConf.create(settings)).save_to(str(path))
    return path


@pytest.mark.parametrize("source", ["nemo", "yaml"])
def test_no_setting_of_distillation_reaches_the_saved_student(models, online, tmp_path, source):
    given, keys = online, distillation_keys()
    assert len(keys) == 16
    if source == "yaml":
        given = tmp_path / "online.yaml"
        content = settings_of(online) | {key: None for key in keys}
        given.write_text(yaml.safe_dump(content), encoding="utf-8")
    assert keys & settings_of(online).keys()
    student = models.student(given)
    student.save(tmp_path / "student")
    saved = settings_of(tmp_path / "student" / "model.nemo")
    assert not (keys | {"init_from_nemo_model"}) & saved.keys()
    assert saved["target"].endswith("magpietts.MagpieTTSModel")
    for key in ("train_ds", "validation_ds"):
        assert saved[key] is None
    restored(tmp_path / "student" / "model.nemo")


def test_a_student_of_nemos_online_distillation_is_a_teacher(models, online):
    stock = weights_of(online)
    family = models.teacher(online)
    ours = state_of(family)
    assert stock.keys() == ours.keys()
    assert all(torch.equal(ours[name], stock[name]) for name in stock)


# Saving and loading


@pytest.mark.parametrize("shape", [{}, {"experts": 3, "frame_stacking": 2}], ids=["dense", "both"])
def test_a_saved_student_loads_with_equal_predictions_and_fingerprint(models, tmp_path, shape):
    path = models.archive(**shape)
    student = models.student(path, seed=3, like=path)
    student.save(tmp_path)
    again = loaded(tmp_path)
    assert again.fingerprint() == student.fingerprint()
    assert again.tokenizer_fingerprint() == student.tokenizer_fingerprint()
    assert again.condition_dropout == student.condition_dropout == 0.1
    assert torch.equal(predicted(again), predicted(student))
    assert not again.module.training
    again.save(tmp_path / "again")
    assert loaded(tmp_path / "again").fingerprint() == student.fingerprint()


def test_what_was_overridden_is_saved_with_the_model(models, tmp_path):
    overrides = {"decoder.n_layers": 1, "decoder.d_ffn": 96, "local_transformer_type": "none"}
    student = models.student(models.archive(), overrides=overrides)
    student.save(tmp_path)
    again, stock = loaded(tmp_path), restored(tmp_path / "model.nemo")
    assert again.fingerprint() == student.fingerprint()
    assert torch.equal(predicted(again), predicted(student))
    assert len(stock.decoder.layers) == 1
    assert stock.local_transformer_type.value == "none"


def test_a_save_that_fails_leaves_no_model_behind(models, tmp_path, monkeypatch):
    from stages.saved_model import is_saved

    student = models.student(models.archive())

    def save_to(path: str) -> None:
        Path(path).write_bytes(b"the first half")
        raise OSError("no space left on device")

    monkeypatch.setattr(student.module.model, "save_to", save_to)
    with pytest.raises(OSError, match="no space left"):
        student.save(tmp_path)
    assert not is_saved(tmp_path)
    assert list(tmp_path.glob("*.nemo")) == []


def test_baked_contexts_survive_saving(models, tmp_path):
    baked = torch.randn(3, 6, 64, generator=torch.Generator().manual_seed(2))
    path = models.archive(baked=baked)
    speakers = tuple(f"speaker {i}" for i in range(3))
    teacher = models.teacher(path, speakers=speakers)
    checkpoint = nemo("families.magpie_checkpoint")
    checkpoint.save(teacher.module.model, tmp_path / "copy.nemo")
    copied = models.teacher(tmp_path / "copy.nemo", speakers=speakers)
    assert copied.fingerprint() == teacher.fingerprint()
    assert torch.equal(predicted(copied), predicted(teacher))
    stock = restored(tmp_path / "copy.nemo")
    assert torch.equal(stock.baked_context_embedding.weight.view(3, 6, 64), baked)
    assert stock.baked_context_embedding_len.tolist() == [6, 5, 4]


def test_a_student_has_the_baked_contexts_of_its_teacher_and_does_not_train_them(models, tmp_path):
    baked = torch.randn(3, 6, 64, generator=torch.Generator().manual_seed(2))
    path, speakers = models.archive(baked=baked), tuple(f"speaker {i}" for i in range(3))
    student = models.student(path, seed=5, like=path, speakers=speakers)
    teacher = models.teacher(path, speakers=speakers)
    assert student.tokenizer_fingerprint() == teacher.tokenizer_fingerprint()
    assert torch.equal(predicted(student), predicted(teacher))
    trained = {n for n, p in student.module.named_parameters() if p.requires_grad}
    assert trained
    assert not any("context" in name for name in trained)
    student.save(tmp_path)
    stock = restored(tmp_path / "model.nemo")
    assert torch.equal(stock.baked_context_embedding.weight.view(3, 6, 64), baked)


def test_baked_contexts_that_a_student_cannot_have_are_refused(models):
    baked = torch.randn(2, 6, 64, generator=torch.Generator().manual_seed(2))
    with pytest.raises(UserError, match=r"speakers names baked contexts, but .* has none"):
        models.student(models.archive(), speakers=("a", "b"))
    narrow = dict.fromkeys(
        ("embedding_dim", "encoder.d_model", "context_encoder.d_model", "decoder.d_model",
         "decoder.xa_d_memory"), 32,
    )  # fmt: skip
    with pytest.raises(UserError, match="give the student the width of its teacher"):
        models.student(models.archive(baked=baked), speakers=("a", "b"), overrides=narrow)
    with pytest.raises(UserError, match=r"the model has 2 baked contexts, but .* names 1"):
        models.student(models.archive(baked=baked), speakers=("a",))


def test_fingerprints_tell_models_apart(models):
    path = models.archive()
    first = models.student(path, seed=1)
    torch.manual_seed(9)
    assert models.student(path, seed=1).fingerprint() == first.fingerprint()
    assert models.student(path, seed=2).fingerprint() != first.fingerprint()
    with torch.no_grad():
        first.module.model.final_proj.bias[7] += 1e-6
    assert models.student(path, seed=1).fingerprint() != first.fingerprint()


@pytest.mark.parametrize(
    "override", [{"local_transformer_n_heads": 2}, {"decoder.sa_n_heads": 2}], ids=str
)
def test_fingerprints_tell_apart_what_the_same_weights_are_computed_with(models, override):
    path = models.archive()
    one, two = models.student(path), models.student(path, overrides=override)
    two.inherit(path, None)
    one.inherit(path, None)
    assert not torch.equal(predicted(one), predicted(two))
    one.config = two.config  # not by the settings of foretell alone
    assert one.fingerprint() != two.fingerprint()


@pytest.mark.parametrize(
    "override",
    [{"decoder.p_dropout": 0.3}, {"encoder.p_dropout": 0.0}, {"decoder.router_jitter_noise": 0.3}],
    ids=str,
)
def test_fingerprints_do_not_depend_on_what_only_training_does(models, override):
    path = models.archive(experts=3)
    one, two = models.student(path), models.student(path, overrides=override)
    assert torch.equal(predicted(one), predicted(two))
    assert one.fingerprint() == two.fingerprint()


def test_a_student_is_the_same_model_wherever_it_lies_and_whatever_it_was_made_from(
    models, tmp_path
):
    student = models.student(models.archive(), overrides={"decoder.n_layers": 1})
    student.save(tmp_path / "one")
    archive = tmp_path / "moved.nemo"
    archive.write_bytes((tmp_path / "one" / "model.nemo").read_bytes())
    teacher = models.teacher(archive)
    assert teacher.fingerprint() == student.fingerprint()
    assert teacher.tokenizer_fingerprint() == student.tokenizer_fingerprint()


@pytest.mark.parametrize(
    "key",
    ["audio_bos_id", "audio_eos_id", "context_audio_bos_id", "context_audio_eos_id",
     "mask_token_id"],
)  # fmt: skip
def test_fingerprints_tell_apart_the_ids_that_begin_and_end(models, tmp_path, key):
    path = models.archive()
    moved = edited(path, tmp_path / "moved.nemo", **{f"forced_{key}": VOCABULARY - 1})
    assert models.teacher(moved).fingerprint() != models.teacher(path).fingerprint()


def test_a_setting_that_changes_ids_changes_the_fingerprint_of_the_tokenizers(models, tmp_path):
    path = models.archive()
    key = f"text_tokenizers.{TOKENIZER}.pad_with_space"
    one, two = (
        models.teacher(path),
        models.teacher(edited(path, tmp_path / "m.nemo", **{key: True})),
    )
    ids = [family.module.model.tokenizer.encode("abc", TOKENIZER) for family in (one, two)]
    assert ids[0] != ids[1]
    assert one.tokenizer_fingerprint() != two.tokenizer_fingerprint()


def test_a_folder_without_configuration_or_with_a_wrong_one_is_refused(models, tmp_path):
    with pytest.raises(UserError, match=r"config\.json is not the configuration"):
        loaded(tmp_path)
    models.student(models.archive()).save(tmp_path)
    description = json.loads((tmp_path / "config.json").read_text())
    description["config"]["wings"] = 2
    (tmp_path / "config.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match="wings"):
        loaded(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\x00")
    with pytest.raises(UserError, match=r"config\.json is not the configuration"):
        loaded(tmp_path)


def test_a_folder_whose_weights_are_missing_or_cut_off_is_refused(models, tmp_path):
    models.student(models.archive()).save(tmp_path)
    whole = (tmp_path / "model.nemo").read_bytes()
    for share in (0.0, 0.01, 0.5, 0.99):
        (tmp_path / "model.nemo").write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(UserError, match=r"model\.nemo"):
            loaded(tmp_path)
    (tmp_path / "model.nemo").unlink()
    with pytest.raises(UserError, match=r"model\.nemo"):
        loaded(tmp_path)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("missing", "final_proj.bias is missing"),
        ("foreign", "intruder is unknown"),
        ("shape", "final_proj.bias has shape (3,), not (288,)"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(models, tmp_path, damage, words):
    models.student(models.archive()).save(tmp_path)
    archive = tmp_path / "model.nemo"
    contents, weights = members(archive), weights_of(archive)
    if damage == "missing":
        del weights["final_proj.bias"]
    elif damage == "foreign":
        weights["intruder"] = torch.zeros(1)
    else:
        weights["final_proj.bias"] = torch.zeros(3)
    file = io.BytesIO()
    torch.save(weights, file)
    packed(archive, contents | {"model_weights.ckpt": file.getvalue()})
    with pytest.raises(UserError) as caught:
        loaded(tmp_path)
    assert words in str(caught.value)
    assert "model.nemo" in str(caught.value)


# Refused teachers


def test_the_audio_codec_is_no_teacher(models):
    with pytest.raises(UserError, match=r"codec\.nemo holds a .*AudioCodecModel"):
        models.teacher(models.codec)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_teacher_that_is_cut_off_is_refused(models, tmp_path, share):
    whole = models.archive().read_bytes()
    (tmp_path / "cut.nemo").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(UserError, match=r"cut\.nemo"):
        models.teacher(tmp_path / "cut.nemo")


def test_a_teacher_that_is_not_there_is_refused(models, tmp_path):
    with pytest.raises(UserError, match=r"absent\.nemo"):
        models.teacher(tmp_path / "absent.nemo")
    with pytest.raises(UserError, match=r"absent\.ckpt"):
        models.teacher(tmp_path / "absent.ckpt", nemo=models.archive())


@pytest.mark.parametrize("kind", ["nemo", "ckpt"])
@pytest.mark.parametrize("place", ["beside", "instead"])
def test_nothing_is_unpickled_but_tensors(models, tmp_path, kind, place):
    trace, path = tmp_path / "trace", tmp_path / f"model.{kind}"
    content: Any = Executed(trace)
    weights = weights_of(models.archive())
    if place == "beside" and kind == "nemo":
        content = weights | {"object": content}
    elif place == "beside":
        content = {"state_dict": weights, "callbacks": content}
    file = io.BytesIO()
    torch.save(content, file)
    settings = {}
    if kind == "nemo":
        packed(path, members(models.archive()) | {"model_weights.ckpt": file.getvalue()})
    else:
        path.write_bytes(file.getvalue())
        settings["nemo"] = yaml_of(models, tmp_path / "model.yaml")
    with pytest.raises(UserError, match=rf"model\.{kind}|model_weights.*refused"):
        models.teacher(path, **settings)
    student = models.student(models.archive())
    with pytest.raises(UserError, match="refused"):
        student.inherit(path, None)
    assert not trace.exists()


def test_a_plain_pickle_as_a_checkpoint_is_refused_unread(models, tmp_path):
    trace, path = tmp_path / "trace", tmp_path / "model.ckpt"
    path.write_bytes(pickle.dumps(Executed(trace)))
    with pytest.raises(UserError, match=r"model\.ckpt"):
        models.teacher(path, nemo=models.archive())
    path.write_bytes(b"no checkpoint at all")
    with pytest.raises(UserError, match=r"model\.ckpt"):
        models.teacher(path, nemo=models.archive())
    assert not trace.exists()


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"codebooks": 8}, "4 codebooks of 64 codes, .* 8 codebooks of 64"),
        ({"codes_per_codebook": 100}, "4 codebooks of 64 codes, .* 4 codebooks of 100"),
    ],
)
def test_a_teacher_of_other_codes_than_the_datasets_is_refused(models, facts, words):
    record = MagpieTeacher(family="magpie", path=models.archive(frame_stacking=2))
    with pytest.raises(UserError, match=words):
        load_family("magpie").pretrained(
            record, models.facts(**facts), device="cpu", dtype=torch.float32
        )


def test_a_dataset_of_another_audio_codec_is_refused(models, tmp_path):
    with quiet():
        other = models.tiny.build_codec(tmp_path / "other.nemo", seed=1)
    with pytest.raises(UserError, match=r"other\.nemo has fingerprint"):
        models.teacher(models.archive(), audio_codec=other)


def test_an_audio_codec_that_is_not_here_is_said_and_not_needed(models, tmp_path, caplog):
    contents = members(models.archive())
    settings = yaml.safe_load(contents["model_config.yaml"]) | {"codecmodel_path": "/nowhere.nemo"}
    contents["model_config.yaml"] = yaml.safe_dump(settings).encode()
    family = models.teacher(packed(tmp_path / "moved.nemo", contents))
    assert "/nowhere.nemo" in caplog.text
    assert torch.equal(predicted(family), predicted(models.teacher(models.archive())))


def test_a_dataset_without_context_is_refused(models):
    record = MagpieTeacher(family="magpie", path=models.archive())
    with pytest.raises(UserError, match=r"prepare\.context_s"):
        load_family("magpie").pretrained(
            record, models.facts(context_frames=0), device="cpu", dtype=torch.float32
        )


def test_a_mask_predicting_local_transformer_is_refused_unless_it_is_left_out(models):
    path = models.archive(settings={"local_transformer_type": "maskgit"})
    with pytest.raises(UserError, match=r"'maskgit'.*local_streams: false"):
        models.teacher(path)
    family = models.teacher(path, local_streams=False)
    assert {stream.group for stream in family.streams} == {"backbone"}
    assert predicted(family).isfinite().all()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"decoder.kernel_size": 3}, r"decoder\.kernel_size=3.*takes decoder\.kernel_size=1"),
        ({"frame_stacking_factor": 3}, r"frame_stacking_factor=3.*1 or 2 or 4"),
        ({"decoder.is_causal": False}, r"decoder\.is_causal=False"),
    ],
)
def test_decoders_that_are_decoded_otherwise_are_refused(models, settings, words):
    with pytest.raises(UserError, match=words):
        models.teacher(models.archive(settings=settings))


def test_models_of_another_type_are_refused(models, tmp_path):
    contents = members(models.archive())
    settings = yaml.safe_load(contents["model_config.yaml"])
    settings["model_type"] = "multi_encoder_context_tts"
    contents["model_config.yaml"] = yaml.safe_dump(settings).encode()
    with pytest.raises(UserError, match=r"model_type=multi_encoder.*takes model_type=decoder_ce"):
        models.teacher(packed(tmp_path / "other.nemo", contents))


def test_overrides_that_nobody_knows_are_refused_by_name(models):
    for key in ("decoder.n_layer", "wings"):
        with pytest.raises(UserError, match=rf"model\.overrides names '{key}'"):
            models.student(models.archive(), overrides={key: 1})


def test_overrides_reach_the_model_and_keys_with_defaults_need_not_be_there(models, tmp_path):
    settings = models.config()
    del settings["frame_stacking_factor"], settings["local_transformer_n_layers"]
    path = tmp_path / "model.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    family = models.student(
        path,
        overrides={"frame_stacking_factor": 2, "decoder.n_layers": 3, "decoder.d_ffn": 48},
    )
    assert len(family.streams) == 2 * 2 * CODEBOOKS
    layers = family.module.model.decoder.layers
    assert len(layers) == 3
    assert layers[0].pos_ff.proj.conv.weight.shape == (48, 64, 1)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            {"decoder.routing_strategy": "sinkhorn", "use_moe": True, "decoder.use_moe": True},
            "sinkhorn",
        ),
        ({"decoder.sa_n_heads": 7}, "NeMo builds no model"),
        ({"local_transformer_type": "loud"}, "loud"),
        ({"decoder.d_model": 32}, r"embedding_dim=64, but decoder\.d_model=32"),
        ({"encoder.d_model": 32}, r"embedding_dim=64, but encoder\.d_model=32"),
    ],
)
def test_configurations_that_nemo_refuses_are_refused_with_its_words(models, overrides, words):
    with pytest.raises(UserError, match=words):
        models.student(models.archive(), overrides=overrides)


def test_a_configuration_that_is_none_is_refused(models, tmp_path):
    path = tmp_path / "model.yaml"
    for content in (b"- a\n- b\n", b"sample_rate: 22050\n", b"a: [", b"\xff\xfe\x00", b""):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"model\.yaml"):
            models.student(path)
    with pytest.raises(UserError, match=r"absent\.yaml"):
        models.student(tmp_path / "absent.yaml")


# Hostile and broken configurations

TOKENIZERS = "nemo.collections.common.tokenizers.text_to_speech.tts_tokenizers"


def refused(models: Models, path: Path, words: str) -> None:
    """A teacher and a student of this file are both refused, and nothing of it is built."""
    with pytest.raises(UserError, match=words):
        models.teacher(path)
    with pytest.raises(UserError, match=words):
        models.student(path)


def hub_with_code(folder: Path) -> Path:
    """A folder that AutoTokenizer loads by running the code in it; returns the code's trace."""
    trace = folder / "trace"
    code = "import pathlib\nfrom transformers import PreTrainedTokenizer\n"
    code += f"pathlib.Path({str(trace)!r}).touch()\nclass Tok(PreTrainedTokenizer):\n    pass\n"
    (folder / "tok.py").write_text(code)
    auto = {"tokenizer_class": "Tok", "auto_map": {"AutoTokenizer": ["tok.Tok", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(auto))
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    return trace


@pytest.mark.parametrize("place", ["text_tokenizers.evil", "text_tokenizer"])
def test_a_tokenizer_of_a_hub_runs_no_code(models, tmp_path, place):
    trace = hub_with_code(tmp_path)
    evil = {"_target_": "AutoTokenizer", "pretrained_model": str(tmp_path)}
    path = edited(models.archive(), tmp_path / "evil.nemo", **{place: evil})
    refused(models, path, r"evil\.nemo: .*AutoTokenizer, which is not built")
    (tmp_path / "evil.yaml").write_bytes(members(path)["model_config.yaml"])
    with pytest.raises(UserError, match=r"evil\.yaml: .*AutoTokenizer, which is not built"):
        models.student(tmp_path / "evil.yaml")
    assert not trace.exists()


@pytest.mark.parametrize(
    "tokenizer",
    [
        {"_target_": "AutoTokenizer", "pretrained_model": "google/byt5-small/../evil"},
        {"_target_": "T5Tokenizer", "pretrained_model": "google-t5/t5-small"},
        {"_target_": "nemo.collections.tts.models.FastPitchModel.restore_from"},
        {"_target_": "os.system", "command": "true"},
        {
            "_target_": f"{TOKENIZERS}.os.system",
            "command": "true",
        },  # what a module there imports is not its own
        {"_target_": f"{TOKENIZERS}.EnglishCharsTokenizer.__init__"},
        {"_target_": f"{TOKENIZERS}.EnglishCharsTokenizer", "_args_": [1]},
        {"_target_": f"{TOKENIZERS}.IPATokenizer", "g2p": {"_target_": "builtins.eval"}},
        {"_target_": f"{TOKENIZERS}.IPATokenizer", "g2p": {"deep": [{"_target_": "os.system"}]}},
        {"_target_": {"a": 1}},
    ],
    ids=str,
)
def test_tokenizers_of_other_classes_are_refused(models, tmp_path, tokenizer):
    settings = {"text_tokenizers.other": tokenizer}
    path = edited(models.archive(), tmp_path / "other.nemo", **settings)
    refused(models, path, r"other\.nemo: text_tokenizers\.other .* is not built")
    if isinstance(tokenizer["_target_"], str):
        key = f"text_tokenizers.{TOKENIZER}"
        with pytest.raises(UserError, match="is not built"):
            models.student(models.archive(), overrides={key: tokenizer})


def test_legacy_text_conditioning_is_refused(models, tmp_path):
    path = edited(models.archive(), tmp_path / "old.nemo", legacy_text_conditioning=True)
    refused(models, path, r"old\.nemo .*legacy_text_conditioning")


def test_the_tokenizer_of_bytes_needs_no_hub_and_gives_the_ids_of_one(models, tmp_path):
    from transformers import AutoTokenizer, ByT5Tokenizer

    ByT5Tokenizer().save_pretrained(tmp_path / "hub")
    hub = AutoTokenizer.from_pretrained(tmp_path / "hub", local_files_only=True)
    settings = models.config()
    french = {"_target_": "AutoTokenizer", "pretrained_model": "google/byt5-small"}
    settings["text_tokenizers"]["french"] = french
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    student = models.student(tmp_path / "model.yaml", tokenizer="french")
    tokenizer = student.module.model.tokenizer
    offset = tokenizer.tokenizer_offsets["french"]
    assert tokenizer.encode("déjà vu", "french") == [offset + i for i in hub.encode("déjà vu")]
    student.save(tmp_path / "student")
    assert settings_of(tmp_path / "student" / "model.nemo")["text_tokenizers"]["french"] == french
    assert loaded(tmp_path / "student").tokenizer_fingerprint() == student.tokenizer_fingerprint()


@pytest.mark.parametrize("key", ["heteronyms", "phoneme_dict", "mapping_file"])
@pytest.mark.parametrize("value", ["{secret}", "nemo:{secret}", "nemo:../secret.txt", "secret.txt"])
def test_an_archive_reads_no_file_of_this_machine(models, tmp_path, monkeypatch, key, value):
    monkeypatch.chdir(tmp_path)
    secret = tmp_path / "secret.txt"
    secret.write_text("SECRET\n")
    settings = {f"text_tokenizers.english_phoneme.g2p.{key}": value.format(secret=secret)}
    path = edited(with_dictionary(models, tmp_path), tmp_path / "thief.nemo", **settings)
    refused(models, path, rf"thief\.nemo read {key}=.*no file of the archive")


def test_what_only_training_reads_is_not_opened(models, tmp_path):
    settings = {"text_context_remapping_json": "/nowhere.json", "text_context_remapping_prob": 0.5}
    path = edited(models.archive(), tmp_path / "model.nemo", **settings)
    student = models.student(path)
    student.save(tmp_path)
    assert not settings.keys() & settings_of(tmp_path / "model.nemo").keys()


def test_an_environment_variable_gets_into_no_student(models, tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "s3cret")
    contents = members(models.archive())
    contents["model_config.yaml"] += b"note: ${oc.env:SECRET}\n"
    refused(models, packed(tmp_path / "env.nemo", contents), r"env\.nemo cannot be read")


@pytest.mark.parametrize("key", ["text_tokenizers", "decoder", "encoder", "context_encoder"])
@pytest.mark.parametrize("value", [None, "x", [1], 3, {}], ids=str)
def test_a_section_that_is_none_is_refused(models, tmp_path, key, value):
    path = edited(models.archive(), tmp_path / "m.nemo", **{key: value})
    refused(models, path, rf"m\.nemo .*{key}")


@pytest.mark.parametrize("value", ["x", [1], {"punct": True}, None], ids=str)
def test_a_tokenizer_without_a_class_is_refused(models, tmp_path, value):
    path = edited(models.archive(), tmp_path / "m.nemo", **{"text_tokenizers.wordless": value})
    refused(models, path, r"m\.nemo: text_tokenizers\.wordless names no class in _target_")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"decoder": 3}, "decoder=3, but it must be a section"),
        ({"decoder.n_layers": 0}, r"decoder\.n_layers=0, but it must be a whole number from 1"),
        ({"decoder.n_layers": 1.5}, r"decoder\.n_layers=1\.5"),
        ({"decoder.n_layers": True}, r"decoder\.n_layers=True"),
        ({"encoder.d_ffn": -4}, r"encoder\.d_ffn=-4"),
        ({"local_transformer_n_layers": 0}, "local_transformer_n_layers=0"),
        ({"decoder.num_experts": 0}, r"decoder\.num_experts=0"),
        ({"cfg_unconditional_prob": "abc"}, "cfg_unconditional_prob=abc, but it must be a number"),
        ({"cfg_unconditional_prob": 1.5}, r"cfg_unconditional_prob=1\.5"),
        ({"decoder.p_dropout": "x"}, r"decoder\.p_dropout=x"),
        ({"embedding_dim": "${nothing}"}, "model.overrides does not fit"),
        ({"decoder.d_ffn": 10**15}, "NeMo builds no model"),
    ],
    ids=str,
)
def test_overrides_that_make_no_model_are_refused(models, overrides, words):
    with pytest.raises(UserError, match=words):
        models.student(models.archive(), overrides=overrides)


@pytest.mark.parametrize("stacking", [2, 4])
def test_text_as_context_is_refused_where_frames_are_stacked(models, tmp_path, stacking):
    path = edited(
        models.archive(frame_stacking=stacking),
        tmp_path / "text.nemo",
        use_text_conditioning_encoder=True,
        context_duration_max=20.0,
    )
    refused(models, path, "use_text_conditioning_encoder with stacked frames=True")


def test_a_model_that_could_read_text_as_context_reads_audio_as_nemo_does(models, tmp_path):
    settings = {"use_text_conditioning_encoder": True}
    path = edited(models.archive(), tmp_path / "text.nemo", **settings)
    family, stock, samples = models.teacher(path), restored(path), samples_of(1)
    codes, lengths = random_codes(family, [6]), torch.tensor([6])
    batch = batch_of(stock, samples) | {
        "context_text_tokens": torch.tensor([[1, 2]]),
        "context_text_tokens_lens": torch.tensor([2]),
        "has_text_context": torch.tensor([False]),
    }
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.magpie_models.batch_of", lambda *_: batch)
        theirs = guided(stock, samples, codes, 2.5)
        ours = family.score(samples, codes, lengths, cfg_scale=2.5).logits
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "content",
    [{"state_dict": [1]}, {"state_dict": None}, {"state_dict": {0: torch.zeros(1)}}, [1], None,
     {0: torch.zeros(1)}],
    ids=str,
)  # fmt: skip
def test_a_checkpoint_without_named_weights_is_refused(models, tmp_path, content):
    torch.save(content, tmp_path / "odd.ckpt")
    with pytest.raises(UserError, match=r"odd\.ckpt (is refused|holds no weights)"):
        models.teacher(tmp_path / "odd.ckpt", nemo=models.archive())


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("audio_embeddings.0.weight", lambda x: x.sum(), "holds no audio embeddings"),
        ("final_proj.weight", lambda x: x.to(torch.int64), r"final_proj\.weight is torch\.int64"),
        ("final_proj.bias", lambda x: x.sum(), r"final_proj\.bias has shape \(\)"),
    ],
)
def test_tensors_of_another_kind_are_refused(models, tmp_path, name, change, words):
    weights = weights_of(models.archive())
    weights[name] = change(weights[name])
    path = lightning(models, tmp_path / "last.ckpt", weights)
    with pytest.raises(UserError, match=words):
        models.teacher(path, nemo=models.archive())
    if "embeddings" not in name:
        with pytest.raises(UserError, match=words):
            models.student(models.archive()).inherit(path, None)


def test_a_checkpoint_takes_the_files_of_its_tokenizers_from_the_archive(models, tmp_path):
    archive = with_dictionary(models, tmp_path)
    path = lightning(models, tmp_path / "last.ckpt", weights_of(archive))
    teacher, same = models.teacher(path, nemo=archive), models.teacher(archive)
    assert teacher.fingerprint() == same.fingerprint()
    assert teacher.tokenizer_fingerprint() == same.tokenizer_fingerprint()
    settings = tmp_path / "model.yaml"
    settings.write_bytes(members(archive)["model_config.yaml"])
    with pytest.raises(UserError, match=r"read files: name the model's \.nemo"):
        models.teacher(path, nemo=settings)


# Conditions that do not fit


def test_texts_and_lengths_that_the_model_cannot_take_are_refused_by_name(models):
    family = models.student(models.archive(positions=40))
    (sample,) = samples_of(1)
    codes, lengths = random_codes(family, [3]), torch.tensor([3])
    for text, words in (
        ("ab" * 20, r"'s0': text too long: the text has 40 tokens, .* takes 39"),
        ("", r"'s0': empty text"),
        ("ж", r"'s0': .*: the tokenizer 'english_chars' knows nothing of the text 'ж'"),
    ):
        with pytest.raises(UserError, match=words):
            family.score([sample | {"text": text}], codes, lengths)
        with pytest.raises(Refused, match=words):
            family.check_sample(sample | {"text": text}, 3)
    for column in ("codes", "context_codes"):
        cut, strange = (np.array([code] * size) for code, size in ((1, 5), (CODES, 4)))
        with pytest.raises(Refused, match=rf"truncated frame: {column} are 5, .* 1 of 4"):
            family.check_sample(sample | {column: cut}, 3)
        with pytest.raises(Refused, match=rf"code outside its codebook: {column} have {CODES} at"):
            family.check_sample(sample | {column: strange}, 3)
    assert family.score([sample | {"text": "a" * 39}], codes, lengths).logits.isfinite().all()


@pytest.mark.parametrize(
    ("frames", "steps", "words"),
    [
        (3, 36, r"'s0': .*: a context of 5 positions and 36 timesteps exceed the 40 positions"),
        (40, 9, r"'s0': .*: a context of 42 positions exceeds the 40 positions of the context enc"),
    ],
    ids=["context and timesteps", "context alone"],
)
def test_positions_beyond_the_models_are_refused(models, frames, steps, words):
    family = models.student(models.archive(positions=40))
    (sample,) = samples_of(1)
    sample |= {"context_codes": sample["context_codes"][:1].repeat(frames * CODEBOOKS)}
    with pytest.raises(UserError, match=words):
        family.score([sample], random_codes(family, [steps]), torch.tensor([steps]))
    policy = policy_of(family, [sample], max_timesteps=steps, reference_multiple=None)
    with pytest.raises(UserError, match=words):
        next(family.rollout([sample], policy, 2.5))
    with pytest.raises(UserError, match=words):
        family.check_sample(sample, steps)


def test_rows_that_fit_alone_fit_together(models):
    """The longest context and the longest rollout of a batch may be of different samples."""
    family, samples = models.teacher(models.archive(positions=40)), samples_of(2)
    for sample, frames in zip(samples, (25, 3), strict=True):
        sample["context_codes"] = sample["context_codes"][:1].repeat(frames * CODEBOOKS)
    lengths = torch.tensor([8, 30])
    codes = random_codes(family, lengths.tolist())
    together = family.score(samples, codes, lengths, cfg_scale=2.5).logits
    for row, length in enumerate(lengths.tolist()):
        alone = family.score(
            samples[row : row + 1], codes[row : row + 1, :length], lengths[row : row + 1],
            cfg_scale=2.5,
        )  # fmt: skip
        torch.testing.assert_close(together[row, :length], alone.logits[0], atol=1e-4, rtol=1e-4)


def test_positions_beyond_a_baked_context_are_refused(models):
    baked = torch.randn(3, 30, 64, generator=torch.Generator().manual_seed(2))
    path = models.archive(baked=baked, positions=40)
    family = models.teacher(path, speakers=tuple(f"speaker {i}" for i in range(3)))
    samples = samples_of(2, speakers=True)
    for row, steps in ((0, 11), (1, 12)):
        given = samples[row : row + 1]
        policy = policy_of(family, given, max_timesteps=steps, reference_multiple=None)
        words = rf"a context of {30 - row} positions and {steps} timesteps"
        with pytest.raises(UserError, match=words):
            family.score(given, random_codes(family, [steps]), torch.tensor([steps]))
        with pytest.raises(UserError, match=words):
            next(family.rollout(given, policy, 2.5))
        fewer = torch.tensor([steps - 1])
        family.score(given, random_codes(family, fewer.tolist()), fewer)


def test_the_last_position_can_be_used(models):
    family = models.student(models.archive(positions=40))
    (sample,) = samples_of(1)
    scores = family.score([sample], random_codes(family, [35]), torch.tensor([35]))
    assert scores.logits.isfinite().all()
    list(
        family.rollout(
            [sample], policy_of(family, [sample], max_timesteps=35, reference_multiple=None), 2.5
        )
    )


def test_a_context_encoder_of_fewer_positions_than_the_decoder_says_so(models):
    path = models.archive(settings={"context_encoder.max_length_causal_mask": 8})
    family, (sample,) = models.student(path), samples_of(1)
    sample |= {"context_codes": sample["context_codes"][:1].repeat(20 * CODEBOOKS)}
    with pytest.raises(
        UserError, match=r"context of 22 positions exceeds the 8 positions of the context encoder"
    ):
        family.score([sample], random_codes(family, [3]), torch.tensor([3]))


def test_an_unknown_tokenizer_is_refused(models):
    with pytest.raises(
        UserError, match="tokenizer='klingon' is none of the model's, english_chars"
    ):
        models.teacher(models.archive(), tokenizer="klingon")
    assert models.teacher(models.archive(), tokenizer=TOKENIZER).tokenizer_fingerprint()


# Checkpoints of a training


def yaml_of(models: Models, path: Path, *, section: bool = False, **shape: Any) -> Path:
    """Write the configuration of NeMo's training, or of the model alone."""
    settings: dict[str, Any] = models.config(**shape)
    settings |= {"train_ds": {"batch_size": 4}, "optim": {"name": "adamw"}}
    content = {"name": "Magpie", "model": settings, "trainer": {}} if section else settings
    if section:
        content["width"] = 64
        settings["embedding_dim"] = "${width}"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def lightning(models: Models, path: Path, weights: dict[str, Tensor]) -> Path:
    """Write what Lightning keeps of a training of NeMo's."""
    from omegaconf import OmegaConf

    torch.save(
        {
            "epoch": 3,
            "global_step": 1000,
            "pytorch-lightning_version": "2.4.0",
            "state_dict": weights,
            "loops": {"fit_loop": {"state_dict": {}}},
            "optimizer_states": [{"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": []}],
            "lr_schedulers": [{"last_epoch": 3}],
            "hyper_parameters": OmegaConf.create({"cfg": models.config(), "list": [1, "two"]}),
        },
        path,
    )
    return path


@pytest.mark.parametrize("section", [False, True], ids=["model alone", "section model"])
@pytest.mark.parametrize("others", [False, True], ids=["own weights", "weights of others"])
def test_a_checkpoint_of_a_training_is_the_same_teacher(models, tmp_path, section, others):
    archive = models.archive()
    weights = weights_of(archive)
    if others:
        weights |= {"_codec_model.encoder.weight": torch.zeros(3)}
        weights |= {"_speaker_verification_model.encoder.weight": torch.zeros(3)}
        weights |= {f"_teacher_model.{name}": x + 1 for name, x in weights_of(archive).items()}
    path = lightning(models, tmp_path / "last.ckpt", weights)
    settings = yaml_of(models, tmp_path / "model.yaml", section=section)
    teacher, same = models.teacher(path, nemo=settings), models.teacher(archive)
    assert teacher.fingerprint() == same.fingerprint()
    assert teacher.tokenizer_fingerprint() == same.tokenizer_fingerprint()
    assert torch.equal(predicted(teacher), predicted(same))
    student = models.student(settings)
    student.inherit(path, None)
    assert torch.equal(predicted(student), predicted(same))


def test_what_lightning_saves_of_nemos_online_distillation_is_a_teacher(models, online, tmp_path):
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint
    from nemo.collections.tts.models.magpietts_cfg_distillation import OnlineCFGDistillation
    from omegaconf import OmegaConf

    path, settings = tmp_path / "last.ckpt", tmp_path / "model.yaml"
    content = settings_of(online)
    settings.write_text(yaml.safe_dump({"model": content}), encoding="utf-8")
    with quiet():
        keeper = ModelCheckpoint(dirpath=tmp_path, monitor="val_loss")
        trainer = Trainer(
            accelerator="cpu", logger=False, callbacks=[keeper], enable_progress_bar=False
        )
        model = OnlineCFGDistillation(OmegaConf.create(content))
        model._load_teacher_model()
        trainer.strategy.connect(model)
        trainer.save_checkpoint(path)
    teacher = models.teacher(path, nemo=settings)
    with quiet():
        saved = model.state_dict()
    assert all(torch.equal(x, saved[name]) for name, x in state_of(teacher).items())


def test_a_checkpoint_and_its_configuration_belong_together(models, tmp_path):
    path = lightning(models, tmp_path / "last.ckpt", weights_of(models.archive()))
    for settings in ({}, {"path": models.archive(), "nemo": "model.yaml"}, {"path": "model.pt"}):
        with pytest.raises(ValueError, match=r"\.ckpt"):
            MagpieTeacher.model_validate({"family": "magpie", "path": path} | settings)
    wider = yaml_of(models, tmp_path / "model.yaml", feed_forward=96)
    words = r"last\.ckpt does not fit .*pos_ff\.proj\.conv\.weight has shape \(128, 64, 1\)"
    with pytest.raises(UserError, match=words):
        models.teacher(path, nemo=wider)
    torch.save({"state_dict": {"_codec_model.x": torch.zeros(1)}}, path)
    with pytest.raises(UserError, match="holds no weights"):
        models.teacher(path, nemo=yaml_of(models, tmp_path / "model.yaml"))
    torch.save({"state_dict": {"x": torch.zeros(1)}}, path)
    with pytest.raises(UserError, match=r"last\.ckpt holds no audio embeddings"):
        models.teacher(path, nemo=tmp_path / "model.yaml")


def test_a_checkpoint_of_another_vocabulary_of_texts_is_refused(models, tmp_path):
    path = lightning(models, tmp_path / "last.ckpt", weights_of(models.archive()))
    settings = models.config()
    settings["text_tokenizers"][TOKENIZER]["punct"] = False
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    with pytest.raises(UserError, match=r"text_embedding\.weight has shape"):
        models.teacher(path, nemo=tmp_path / "model.yaml")


# Files of tokenizers

SOUNDS = {"bad": "bˈæd", "cab": "kˈæb", "fed": "fˈɛd", "read": "ɹˈɛd"}


def dictionary(path: Path, **changes: str) -> Path:
    words = SOUNDS | changes
    path.write_text("".join(f"{word.upper()}  {sound}\n" for word, sound in words.items()), "utf-8")
    return path


def with_dictionary(
    models: Models, folder: Path, *, probability: float = 1.0, **changes: str
) -> Path:
    """The .nemo of a model whose tokenizer reads two files, which are gone afterwards."""
    from nemo.collections.tts.models import MagpieTTSModel
    from omegaconf import OmegaConf

    sounds = dictionary(folder / "sounds.txt", **changes)
    heteronyms = folder / "heteronyms.txt"
    heteronyms.write_text("READ\n", encoding="utf-8")
    text = "nemo.collections.common.tokenizers.text_to_speech.tts_tokenizers.IPATokenizer"
    settings = models.config() | {
        "text_tokenizers": {
            "english_phoneme": {
                "_target_": text,
                "punct": True,
                "apostrophe": True,
                "pad_with_space": False,
                "g2p": {
                    "_target_": "nemo.collections.tts.g2p.models.i18n_ipa.IpaG2p",
                    "phoneme_dict": str(sounds),
                    "heteronyms": str(heteronyms),
                    "phoneme_probability": probability,
                    "ignore_ambiguous_words": False,
                    "use_chars": True,
                    "use_stresses": True,
                },
            }
        }
    }
    path = folder / "phonemes.nemo"
    with quiet():
        model = MagpieTTSModel(OmegaConf.create(settings))
        models.tiny.sharpen(model)
        model.save_to(str(path))
    sounds.unlink()
    heteronyms.unlink()
    return path


def files_in(path: Path) -> dict[str, bytes]:
    """Contents of the files of tokenizers in an archive, by the ends of their names."""
    found = {name.rpartition("_")[2]: content for name, content in members(path).items()}
    return {name: found[name] for name in ("sounds.txt", "heteronyms.txt")}


def test_the_files_of_a_tokenizer_go_from_archive_to_archive(models, tmp_path):
    path = with_dictionary(models, tmp_path)
    files = files_in(path)
    assert b"READ" in files["heteronyms.txt"]
    text = "bad cab fed"
    teacher = models.teacher(path)
    expected = teacher.module.model.tokenizer.encode(text, "english_phoneme")
    assert len(expected) == len("bˈæd kˈæb fˈɛd"), "the dictionary must be read"
    student = models.student(path)
    student.save(tmp_path / "student")
    again = loaded(tmp_path / "student")
    second = models.student(tmp_path / "student" / "model.nemo")
    path.unlink()
    again.save(tmp_path / "again")
    second.save(tmp_path / "second")
    for family in (student, again, second, loaded(tmp_path / "again")):
        assert family.tokenizer_fingerprint() == teacher.tokenizer_fingerprint()
        assert family.module.model.tokenizer.encode(text, "english_phoneme") == expected
    for folder in ("student", "again", "second"):
        saved = tmp_path / folder / "model.nemo"
        assert files_in(saved) == files
        stock = restored(saved)
        assert stock.tokenizer.encode(text, "english_phoneme") == expected


def test_another_pronunciation_is_another_tokenizer(models, tmp_path):
    """The tokens are the same, but what texts become is not."""
    paths = []
    for number, changes in enumerate(({}, {"cab": "bˈæk"})):
        folder = tmp_path / str(number)
        folder.mkdir()
        paths.append(with_dictionary(models, folder, **changes))
    one, two = (models.teacher(path) for path in paths)
    tokens = [family.module.model.tokenizer for family in (one, two)]
    assert list(tokens[0].tokens) == list(tokens[1].tokens)
    assert tokens[0].encode("cab", "english_phoneme") != tokens[1].encode("cab", "english_phoneme")
    assert one.tokenizer_fingerprint() != two.tokenizer_fingerprint()


def test_a_text_becomes_the_same_tokens_every_time(models, tmp_path):
    """Training with NeMo draws anew which words are spelled out; a store could not be matched."""
    path = with_dictionary(models, tmp_path, probability=0.5)
    family, text, (sample,) = models.teacher(path), "bad cab fed " * 4, samples_of(1)
    tokenizer = restored(path).tokenizer
    tokens = {tuple(tokenizer.encode(text, "english_phoneme")) for _ in range(20)}
    assert len(tokens) > 1, "NeMo's own tokenizer must draw"
    with tokenizer.tokenizers["english_phoneme"].set_phone_prob(1.0):
        expected = tokenizer.encode(text, "english_phoneme")
    for _ in range(20):
        (found,) = family._reader.read([sample | {"text": text}]).text.tolist()
        assert found[:-1] == expected
    saved = models.student(path)
    saved.save(tmp_path / "student")
    settings = settings_of(tmp_path / "student" / "model.nemo")["text_tokenizers"]
    assert settings["english_phoneme"]["g2p"]["phoneme_probability"] == 0.5


# Inheriting


def test_a_student_of_the_same_shape_inherits_everything(models, tmp_path):
    path = models.archive(seed=2)
    student = models.student(path, seed=5)
    before = predicted(student)
    student.inherit(path, None)
    assert not torch.allclose(predicted(student), before, atol=0.1)
    theirs = weights_of(path)
    assert all(torch.equal(x, theirs[n]) for n, x in state_of(student).items())
    student.save(tmp_path)
    other = models.student(path, seed=6)
    other.inherit(tmp_path, None)
    assert torch.equal(predicted(other), predicted(student))
    with pytest.raises(UserError, match="family 'magpie' have no adapters to merge"):
        other.inherit(tmp_path, None, merged=True)


@pytest.mark.parametrize(("layers", "sources"), [(None, [0, 3]), ([2, 1], [2, 1])])
def test_a_shallower_student_inherits_the_layers_that_are_kept(models, layers, sources):
    path = models.archive(layers=4)
    student = models.student(path, overrides={"decoder.n_layers": 2})
    student.inherit(path, layers)
    ours, theirs = state_of(student), weights_of(path)
    for name, tensor in ours.items():
        parts = name.split(".")
        if parts[:2] == ["decoder", "layers"]:
            parts[2] = str(sources[int(parts[2])])
        assert torch.equal(tensor, theirs[".".join(parts)]), name


MIXTURE = {"use_moe": True, "decoder.use_moe": True, "decoder.num_experts": 4}


@pytest.mark.parametrize("active", [1, 2])
def test_experts_that_start_as_the_dense_layer_predict_what_it_does(models, active):
    path = models.archive(layers=3)
    overrides = MIXTURE | {"decoder.top_k_experts": active, "decoder.n_layers": 2}
    student = models.student(path, overrides=overrides, seed=3)
    routers = {n: x.clone() for n, x in state_of(student).items() if ".router." in n}
    dense = models.student(path, overrides={"decoder.n_layers": 2})
    for family in (student, dense):
        family.inherit(path, [0, 2])
    torch.testing.assert_close(predicted(student), predicted(dense), atol=1e-4, rtol=0)
    state = state_of(student)
    assert len(routers) == 2
    assert all(torch.equal(state[name], x) for name, x in routers.items()), "routers stay fresh"


def test_experts_are_inherited_one_by_one_where_the_teacher_has_them(models):
    path = models.archive(experts=3, layers=3)
    student = models.student(path, overrides={"decoder.n_layers": 1})
    student.inherit(path, [1])
    ours, theirs = state_of(student), weights_of(path)
    names = [name for name in ours if ".pos_ff." in name and name.startswith("decoder")]
    assert len(names) == 3 * 2 + 1
    for name in names:
        assert torch.equal(ours[name], theirs[name.replace("layers.0", "layers.1")])


def test_what_does_not_fit_a_student_is_refused_with_every_name(models):
    path, dense = models.archive(experts=3), models.archive()
    with pytest.raises(UserError, match=r"keep are \[7\]"):
        models.student(dense, overrides={"decoder.n_layers": 1}).inherit(dense, [7])
    with pytest.raises(UserError, match=r"layers 0 to 1 .* 3 layers"):
        models.student(dense, overrides={"decoder.n_layers": 3}).inherit(dense, None)
    for source, overrides in (
        (dense, {"decoder.d_ffn": 96}),
        (path, {"decoder.num_experts": 4}),
        (path, {"decoder.num_experts": 2}),
        (dense, {"local_transformer_hidden_dim": 16}),
        (dense, {"local_transformer_type": "none"}),
    ):
        student = models.student(source, overrides=overrides)
        before = predicted(student)
        with pytest.raises(UserError) as caught:
            student.inherit(source, None)
        message = str(caught.value)
        assert str(source) in message
        part = "local_transformer" if "local" in str(overrides) else "pos_ff"
        assert message.count(part) > 1
        assert torch.equal(predicted(student), before), "nothing is copied by halves"
    with pytest.raises(UserError, match="is unknown"):
        models.student(dense).inherit(path, None)


# The audio codec


def test_no_model_is_built_or_loaded_with_its_audio_codec(models, tmp_path, monkeypatch):
    from nemo.collections.tts.models import AudioCodecModel

    path = models.archive()

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the audio codec was built")

    monkeypatch.setattr(AudioCodecModel, "__init__", refuse)
    with pytest.raises(AssertionError, match="the audio codec was built"):
        restored(path)
    teacher = models.teacher(path)
    student = models.student(path)
    student.inherit(path, None)
    student.save(tmp_path)
    again = loaded(tmp_path)
    assert torch.equal(predicted(again), predicted(teacher))
    for family in (teacher, student, again):
        assert not any("codec" in name for name, _ in family.module.named_parameters())
        roll(family, samples_of(2), 2.5)


def test_a_model_needs_no_file_but_its_own(models, tmp_path):
    """A codec that is gone, a training's data that are gone: neither is looked for."""
    settings = models.config() | {"codecmodel_path": "nvidia/nowhere"}
    settings["train_ds"] = {"dataset_meta": {"manifest": "/nowhere.json"}}
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    family = models.student(tmp_path / "model.yaml")
    family.save(tmp_path / "student")
    assert settings_of(tmp_path / "student" / "model.nemo")["codecmodel_path"] == "nvidia/nowhere"
    assert loaded(tmp_path / "student").fingerprint() == family.fingerprint()


@pytest.mark.parametrize("seed", [1, 2])
def test_building_changes_no_random_state_and_depends_on_its_seed_alone(models, seed):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    config = MagpieConfig(family="magpie", nemo=models.archive())
    family = load_family("magpie").build(config, models.facts().model_dump(), seed=seed)
    assert torch.equal(torch.get_rng_state(), before)
    assert family.module.model.final_proj.weight.shape == (CODEBOOKS * VOCABULARY, 64)
