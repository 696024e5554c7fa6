"""The family codec_lm: decoding equals scoring, conditions are honest, checkpoints are strict."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from stages.errors import Refused, UserError
from stages.families.codec_lm import CodecLM
from stages.family import Branch, LinearOutput, has_linear_heads, load_family
from stages.model_config import CodecLMConfig, ExpertsConfig, LocalTransformerConfig
from tests import rolled as rolled_up

ALPHABET = " abcdefg"
LIMIT = 14
DRAWN = {"max_timesteps": LIMIT, "min_timesteps": 2}
policy_of, roll = partial(rolled_up.policy_of, **DRAWN), partial(rolled_up.roll, **DRAWN)

VARIANTS = {
    "plain": {},
    "stacked": {"frames_per_step": 2},
    "experts": {"experts": ExpertsConfig(experts=4, active=2)},
    "local": {"local_transformer": LocalTransformerConfig(d_model=16, heads=2)},
    "all": {
        "frames_per_step": 2,
        "experts": ExpertsConfig(experts=3, active=1),
        "local_transformer": LocalTransformerConfig(d_model=16, heads=2, layers=2),
    },
}


def config_of(**changes) -> CodecLMConfig:
    tiny = {
        "d_model": 32,
        "heads": 4,
        "text_layers": 1,
        "decoder_layers": 2,
        "feed_forward": 48,
        "dropout": 0.1,
        "max_timesteps": 40,
        "max_characters": 20,
    }
    return CodecLMConfig.model_validate(tiny | changes)


def facts_of(context_frames: int = 0) -> dict:
    return {
        "alphabet": ALPHABET,
        "speakers": ["low", "high"],
        "codebooks": 3,
        "codes_per_codebook": 10,
        "frame_rate_hz": 43.0,
        "audio_codec": "ab",
        "context_frames": context_frames,
    }


def samples_of(count: int, context: bool = False) -> list[dict]:
    """Samples whose texts, recordings and contexts all differ in length."""
    random = np.random.default_rng(0)
    samples = []
    for i in range(count):
        sample = {
            "sample_id": f"s{i}",
            "text": "".join(random.choice(list(ALPHABET), size=3 + 2 * i)),
            "speaker": ["low", "high"][i % 2],
            "codes": random.integers(0, 10, size=3 * (4 + i)).astype(np.uint16),
        }
        if context:
            sample["context_codes"] = random.integers(0, 10, size=3 * (2 + i)).astype(np.uint16)
        samples.append(sample)
    return samples


def family_of(seed: int = 0, context_frames: int = 0, **changes) -> CodecLM:
    """A model with weights large enough for its predictions to differ from uniform."""
    family = CodecLM.build(config_of(**changes), facts_of(context_frames), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in family.module.named_parameters():
            if "norm" not in name and "position" not in name:
                parameter.copy_(0.25 * torch.randn(parameter.shape, generator=generator))
    family.module.eval()
    return family


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("context", [False, True], ids=["no context", "ragged context"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_rollout_logits_equal_teacher_forced_ones(variant, context, scale):
    family = family_of(context_frames=9 * context, **VARIANTS[variant])
    samples = samples_of(6, context)
    rolled = roll(family, samples, scale)
    rolled.require_departures()
    codes = rolled.poisoned()
    with torch.no_grad():
        scores = family.score(samples, codes, rolled.lengths, cfg_scale=scale)
    for row, length in enumerate(rolled.lengths):
        expected = scores.logits[row, :length]
        torch.testing.assert_close(rolled.logits[row, :length], expected, atol=1e-4, rtol=1e-4)


def by_heads(family: CodecLM, branch: Branch) -> torch.Tensor:
    """Logits [..., C, V] in fp64 from the states of a branch and the weights of the heads."""
    weights, logits = family.head_weights(), []
    assert weights.keys() == {
        f"{h.group}.{part}" for h in family.heads for part in ("weight", "bias")
    }
    for head in family.heads:
        states = torch.cat(branch.hidden[head.group], -2).double()
        assert states.shape[-2:] == (head.vectors, head.width)
        weight, bias = (
            torch.from_numpy(weights[f"{head.group}.{part}"]) for part in ("weight", "bias")
        )
        assert weight.dtype == bias.dtype == torch.float32
        states = states.expand(*states.shape[:-2], len(weight), head.width)
        logits.append(torch.einsum("cvd,...cd->...cv", weight.double(), states) + bias.double())
    return torch.cat(logits, -2)


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("both", [False, True], ids=["as needed", "both asked"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_branches_are_what_was_mixed_and_their_states_what_the_heads_read(variant, both, scale):
    family, samples = family_of(**VARIANTS[variant]), samples_of(4)
    assert [head.group for head in family.heads] == list(
        dict.fromkeys(stream.group for stream in family.streams)
    )
    predictions = []
    for step in family.rollout(samples, policy_of(family, samples), scale, both_branches=both):
        predictions.append((step.logits, step.branches))
    codes = torch.stack([family.reference_codes(samples[0])] * 4)
    lengths = torch.full((4,), codes.shape[1])
    with torch.no_grad():
        scores = family.score(samples, codes, lengths, cfg_scale=scale, both_branches=both)
    predictions.append((scores.logits, scores.branches))
    for logits, branches in predictions:
        parts = {"cond": branches.cond, "uncond": branches.uncond}
        assert (parts["uncond"] is not None) == (both or scale != 1.0)
        joined = {
            name: torch.cat(branch.logits, -2).double()
            for name, branch in parts.items()
            if branch is not None
        }
        for name, predicted in joined.items():
            again = by_heads(family, parts[name])
            torch.testing.assert_close(again, predicted, atol=2e-5, rtol=2e-5)
        mixed = scale * joined["cond"] + (1 - scale) * joined.get("uncond", joined["cond"])
        torch.testing.assert_close(logits.double(), mixed, atol=5e-5, rtol=5e-5)


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("variant", VARIANTS)
def test_heads_that_are_left_to_the_reader_give_the_same_logits(variant, scale):
    family, samples = family_of(**VARIANTS[variant]), samples_of(4)
    codes = torch.stack([family.reference_codes(samples[0])] * 4)
    lengths = torch.full((4,), codes.shape[1])
    settings = {"cfg_scale": scale, "both_branches": True}
    with torch.no_grad():
        whole = family.score(samples, codes, lengths, **settings)
        left = family.score(samples, codes, lengths, **settings, linear=True)
    assert has_linear_heads(family)
    assert sum(len(output.weight) for output in left.outputs) == len(family.streams)
    torch.testing.assert_close(left.logits, whole.logits, atol=1e-5, rtol=1e-5)
    for ours, theirs in (
        (left.branches.cond, whole.branches.cond),
        (left.branches.uncond, whole.branches.uncond),
    ):
        assert all(isinstance(output, LinearOutput) for output in ours.outputs)
        one, two = torch.cat(ours.logits, -2), torch.cat(theirs.logits, -2)
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-6)
        row = torch.cat(ours.at(1, slice(2, 4)).logits, -2)
        torch.testing.assert_close(row, two[1, 2:4], atol=1e-6, rtol=1e-6)


def test_asking_for_both_branches_changes_neither_codes_nor_the_conditional_prediction():
    family, samples = family_of(**VARIANTS["all"]), samples_of(4)
    policy = policy_of(family, samples)
    alone = list(family.rollout(samples, policy_of(family, samples), 1.0))
    both = list(family.rollout(samples, policy, 1.0, both_branches=True))
    assert len(alone) == len(both)
    for one, two in zip(alone, both, strict=True):
        assert torch.equal(one.codes, two.codes)
        torch.testing.assert_close(one.logits, two.logits, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(two.logits, torch.cat(two.branches.uncond.logits, -2))


def test_a_row_does_not_depend_on_its_neighbours():
    family = family_of(context_frames=9)
    samples = samples_of(5, context=True)
    together = roll(family, samples, 2.0)
    for row in (0, 3):
        alone = roll(family, samples[row : row + 1], 2.0)
        length = int(alone.lengths[0])
        assert length == together.lengths[row]
        assert torch.equal(alone.codes[0, :length], together.codes[row, :length])


def test_guidance_changes_what_is_predicted_and_scale_one_is_the_condition_alone():
    family, samples = family_of(), samples_of(3)
    codes = torch.stack([family.reference_codes(samples[0])] * 3)
    lengths = torch.tensor([5, 5, 5])
    with torch.no_grad():
        cond = family.score(samples, codes, lengths).logits
        everything = torch.ones(3, dtype=torch.bool)
        uncond = family.score(samples, codes, lengths, unconditional=everything).logits
        mixed = family.score(samples, codes, lengths, cfg_scale=3.0).logits
    assert not torch.allclose(cond, uncond)
    torch.testing.assert_close(mixed, 3.0 * cond - 2.0 * uncond, atol=1e-4, rtol=1e-4)


def test_the_unconditional_branch_sees_nothing_of_the_conditions():
    family = family_of(context_frames=9)
    samples = samples_of(6, context=True)
    codes = torch.stack([family.reference_codes(samples[0])] * 6)
    everything = torch.ones(6, dtype=torch.bool)
    with torch.no_grad():
        lengths = torch.full((6,), codes.shape[1])
        logits = family.score(samples, codes, lengths, unconditional=everything).logits
    torch.testing.assert_close(logits, logits[:1].expand_as(logits), atol=1e-5, rtol=1e-5)


def test_local_streams_carry_the_codes_of_the_backbone_streams():
    family = family_of(**VARIANTS["local"])
    rolled = roll(family, samples_of(3), 1.5)
    assert [stream.group for stream in family.streams] == ["backbone"] * 3 + ["local"] * 3
    assert torch.equal(rolled.codes[..., :3], rolled.codes[..., 3:])
    reference = family.reference_codes(samples_of(1)[0])
    assert torch.equal(reference[:, :3], reference[:, 3:])


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_gets_a_gradient_in_every_step(variant):
    family = family_of(context_frames=9, **VARIANTS[variant])
    samples = samples_of(2, context=True)
    family.module.train()
    codes = torch.stack([family.reference_codes(samples[0])] * 2)
    scores = family.score(samples, codes, torch.tensor([3, 4]), alignment=True)
    (scores.logits.sum() + sum(scores.losses.values())).backward()
    missing = [name for name, p in family.module.named_parameters() if p.grad is None]
    assert missing == []


def test_alignment_loss_falls_when_attention_follows_the_diagonal_and_skips_dropped_rows():
    from stages.modules.alignment import diagonal_loss

    lengths = torch.tensor([8, 8])
    diagonal = torch.eye(8).expand(2, 1, 8, 8)
    counted = torch.tensor([True, False])
    assert diagonal_loss(diagonal, lengths, lengths, counted) == 0
    swapped = diagonal.clone()
    swapped[1] = diagonal[1].flip(-1)
    assert diagonal_loss(swapped, lengths, lengths, counted) == 0
    assert diagonal_loss(swapped, lengths, lengths, ~counted) > 0.3


def test_alignment_changes_no_logit():
    family, samples = family_of(), samples_of(3)
    codes = torch.stack([family.reference_codes(samples[0])] * 3)
    lengths = torch.tensor([5, 4, 3])
    with torch.no_grad():
        plain = family.score(samples, codes, lengths)
        aligned = family.score(samples, codes, lengths, alignment=True)
    assert set(plain.losses) == set()
    assert set(aligned.losses) == {"alignment"}
    valid = torch.arange(5) < lengths[:, None]
    torch.testing.assert_close(aligned.logits[valid], plain.logits[valid], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("noise", ["code_noise", "timestep_noise"])
def test_noise_acts_in_training_only(noise):
    family = family_of(**{noise: 0.5, "dropout": 0.0})
    samples = samples_of(2)
    codes = torch.stack([family.reference_codes(samples[0])] * 2)
    lengths = torch.tensor([5, 5])

    def logits():
        with torch.no_grad():
            return family.score(samples, codes, lengths).logits

    assert torch.equal(logits(), logits())
    family.module.train()
    torch.manual_seed(0)  # or, once in a while, both draws hide nothing
    assert not torch.equal(logits(), logits())


def test_saved_models_load_with_equal_predictions_and_fingerprint(tmp_path):
    family = family_of(context_frames=9, **VARIANTS["all"])
    family.condition_dropout = 0.15
    family.save(tmp_path / "model")
    loaded = load_family("codec_lm").load(tmp_path / "model", device="cpu", dtype=torch.float32)
    samples = samples_of(2, context=True)
    assert loaded.fingerprint() == family.fingerprint()
    assert loaded.tokenizer_fingerprint() == family.tokenizer_fingerprint()
    assert loaded.condition_dropout == 0.15
    first, second = roll(family, samples, 2.0), roll(loaded, samples, 2.0)
    assert torch.equal(first.codes, second.codes)


@pytest.mark.parametrize("variant", ["plain", "all"])
def test_adopted_codebooks_make_near_codes_near_in_and_out(variant):
    family = CodecLM.build(config_of(**VARIANTS[variant]), facts_of(), seed=0)
    before = {name: x.clone() for name, x in family.module.state_dict().items()}
    vectors = torch.arange(30.0).view(3, 10, 1).expand(3, 10, 7) + torch.randn(3, 10, 7)
    family.adopt_codebooks(vectors)
    after = family.module.state_dict()
    for name in ("code_embedding.weight", "head.weight"):
        for stream in range(family.layout.streams):
            codes = after[name][stream * 12 : stream * 12 + 10]
            assert torch.equal(
                after[name][stream * 12 + 10 :][:2], before[name][stream * 12 + 10 :][:2]
            )
            assert (codes[4] - codes[5]).norm() < (codes[4] - codes[9]).norm()
    for name in ("text_embedding.weight", "decoder.0.attention.qkv.weight"):
        assert torch.equal(after[name], before[name])
    again = CodecLM.build(config_of(**VARIANTS[variant]), facts_of(), seed=0)
    again.adopt_codebooks(vectors)
    assert again.fingerprint() == family.fingerprint()


def test_codebooks_of_another_audio_codec_are_refused():
    with pytest.raises(UserError, match="4 codebooks of 10 codes, but the model was built for 3"):
        family_of().adopt_codebooks(torch.zeros(4, 10, 2))


def test_fingerprints_tell_models_apart():
    assert family_of(0).fingerprint() == family_of(0).fingerprint()
    assert family_of(0).fingerprint() != family_of(1).fingerprint()
    assert family_of(0).fingerprint() != family_of(0, dropout=0.2).fingerprint()


def test_build_depends_on_its_seed_alone():
    torch.manual_seed(5)
    first = CodecLM.build(config_of(), facts_of(), seed=1)
    second = CodecLM.build(config_of(), facts_of(), seed=1)
    other = CodecLM.build(config_of(), facts_of(), seed=2)
    assert first.fingerprint() == second.fingerprint() != other.fingerprint()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("missing", "norm.weight is missing"),
        ("foreign", "intruder is unknown"),
        ("shape", "norm.weight has shape (3,), not (32,)"),
    ],
)
def test_load_refuses_weights_that_do_not_fit(tmp_path, damage, words):
    family_of().save(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    if damage == "missing":
        del tensors["norm.weight"]
    elif damage == "foreign":
        tensors["intruder"] = torch.zeros(1)
    else:
        tensors["norm.weight"] = torch.zeros(3)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError) as caught:
        CodecLM.load(tmp_path, device="cpu", dtype=torch.float32)
    assert words in str(caught.value)
    assert "model.safetensors" in str(caught.value)


def test_load_refuses_files_it_cannot_read(tmp_path):
    with pytest.raises(UserError, match=r"config\.json does not exist"):
        CodecLM.load(tmp_path, device="cpu", dtype=torch.float32)
    family_of().save(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        CodecLM.load(tmp_path, device="cpu", dtype=torch.float32)
    description = json.loads((tmp_path / "config.json").read_text())
    description["config"]["wings"] = 2
    (tmp_path / "config.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match="wings"):
        CodecLM.load(tmp_path, device="cpu", dtype=torch.float32)


def test_a_student_inherits_every_layer_or_some(tmp_path):
    teacher = family_of(seed=1, decoder_layers=4)
    teacher.save(tmp_path)
    student = family_of(seed=2, decoder_layers=4)
    student.inherit(tmp_path, None)
    assert student.fingerprint() == teacher.fingerprint()
    theirs = teacher.module.state_dict()
    for layers, sources in ((None, [0, 3]), ([2, 1], [2, 1])):
        shallow = family_of(seed=2, decoder_layers=2)
        shallow.inherit(tmp_path, layers)
        ours = shallow.module.state_dict()
        assert torch.equal(ours["head.weight"], theirs["head.weight"])
        for layer, source in enumerate(sources):
            name = "attention.qkv.weight"
            assert torch.equal(ours[f"decoder.{layer}.{name}"], theirs[f"decoder.{source}.{name}"])


def test_inheriting_refuses_other_widths_layers_and_datasets(tmp_path):
    family_of(decoder_layers=2).save(tmp_path)
    with pytest.raises(UserError, match=r"head\.weight has shape \(36, 32\), not \(36, 64\)"):
        family_of(d_model=64).inherit(tmp_path, None)
    with pytest.raises(UserError, match=r"layers 0 to 1 .* 4 layers"):
        family_of(decoder_layers=4).inherit(tmp_path, None)
    with pytest.raises(UserError, match=r"keep are \[7\]"):
        family_of(decoder_layers=1).inherit(tmp_path, [7])
    other = CodecLM.build(config_of(), facts_of() | {"alphabet": "gfedcba "}, seed=0)
    with pytest.raises(UserError, match=r"another dataset \(alphabet"):
        other.inherit(tmp_path, None)


def test_conditions_outside_the_model_are_refused_by_name():
    family, (sample,) = family_of(), samples_of(1)
    codes, lengths = family.reference_codes(sample)[None], torch.tensor([5])
    for change, words in (
        ({"text": "Zebra!"}, "'!Zr' of it are not among the model's characters ' abcdefg'"),
        ({"text": ""}, "empty text"),
        ({"text": "a" * 21}, "21 characters"),
        ({"speaker": "nobody"}, "'nobody' is not one of the model's speakers"),
    ):
        with pytest.raises(UserError) as caught:
            family.score([sample | change], codes, lengths)
        assert words in str(caught.value)
        assert "'s0'" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"text": None}, "empty text"),
        ({"text": "a" * 21}, "text too long"),
        ({"text": "x"}, "text outside the alphabet"),
        ({"speaker": None}, "unknown speaker"),
        ({"codes": np.zeros(8, np.uint16)}, "truncated frame"),
        ({"codes": np.full(6, 11, np.uint16)}, "code outside its codebook"),
        ({"context_codes": np.zeros(7, np.uint16)}, "truncated frame"),
        ({"context_codes": np.full(6, 12, np.uint16)}, "code outside its codebook"),
        ({"context_codes": np.zeros(3 * 40, np.uint16)}, "too long for the model"),
    ],
)
def test_samples_are_refused_by_the_kind_of_their_fault(change, kind):
    family = family_of(context_frames=9)
    (sample,) = samples_of(1, context=True)
    limit = family.config.max_timesteps
    family.check_sample(sample, limit)
    with pytest.raises(Refused) as caught:
        family.check_sample(sample | change, limit)
    assert caught.value.reason.startswith(f"{kind}: ")
    with pytest.raises(Refused, match="too long for the model: a rollout"):
        family.check_sample(sample, limit + 1)


def test_sequences_longer_than_the_model_are_refused():
    family, samples = family_of(max_timesteps=8), samples_of(1)
    with pytest.raises(UserError, match="9 timesteps, but the model takes 8"):
        family.score(samples, torch.zeros(1, 9, 3, dtype=torch.int64), torch.tensor([9]))
    with pytest.raises(UserError, match=r"sampler\.max_timesteps"):
        next(family.rollout(samples, policy_of(family, samples), 1.0))


def test_bfloat16_models_stay_close_to_float32(tmp_path):
    family_of().save(tmp_path)
    samples = samples_of(4)
    exact = CodecLM.load(tmp_path, device="cpu", dtype=torch.float32)
    rounded = CodecLM.load(tmp_path, device="cpu", dtype=torch.bfloat16)
    rolled = roll(rounded, samples, 1.0)
    with torch.no_grad():
        scores = exact.score(samples, rolled.codes, rolled.lengths)
    for row, length in enumerate(rolled.lengths):
        difference = (scores.logits[row, :length] - rolled.logits[row, :length]).abs().max()
        assert difference < 0.3


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["plain", "all"])
def test_the_training_pass_is_one_graph_without_breaks(variant):
    family = family_of(context_frames=9, dropout=0.0, **VARIANTS[variant])
    samples = samples_of(3, context=True)
    codes = torch.stack([family.reference_codes(samples[0])] * 3)
    lengths = torch.tensor([5, 4, 3])
    family.module.train()
    plain = family.score(samples, codes, lengths, alignment=True)
    family.network = torch.compile(family.module, backend="eager", fullgraph=True)
    compiled = family.score(samples, codes, lengths, alignment=True)
    torch.testing.assert_close(compiled.logits, plain.logits)
    torch.testing.assert_close(compiled.losses["alignment"], plain.losses["alignment"])
