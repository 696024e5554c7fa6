"""The family magpie: it decodes and scores as NeMo's MagpieTTS does, and keeps its contract."""

from __future__ import annotations

import copy
import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from stages.errors import UserError
from stages.family import LinearOutput, has_linear_heads
from stages.loss_config import LossConfig
from stages.losses import distillation_loss
from stages.sampling import END, NOT_FINITE, TRUNCATED, RolloutPolicy
from stages.sampling import LIMIT as AT_LIMIT
from stages.stored_frames import stored_frames
from stages.targets import Forbidden, SparseTarget
from tests.magpie_models import (
    CODEBOOKS,
    CODES,
    EOS,
    LIMIT,
    REFERENCES,
    SHAPES,
    VOCABULARY,
    Answer,
    Models,
    answer,
    guided,
    nemo_student,
    policy_of,
    quiet,
    random_codes,
    restored,
    roll,
    samples_of,
    training,
)

pytestmark = pytest.mark.slow

LENGTHS = torch.tensor([6, 9, 4, 7])
EXPERTS = {"experts": 5, "local_transformer": False}
SINKHORN = {"decoder.routing_strategy": "sinkhorn", "router_load_balancing_loss_coeff": 0.0}


@pytest.fixture(scope="module")
def models(require, tmp_path_factory) -> Models:
    require("nemo", "pip install 'foretell[magpie]'")
    return Models(tmp_path_factory.mktemp("magpie"))


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)


def each_row(ours: Tensor, theirs: Tensor, lengths: Tensor, tolerance: float = 1e-4) -> None:
    """Compare [B, T, ...] within the lengths."""
    for row, length in enumerate(lengths):
        close(ours[row, :length], theirs[row, :length], tolerance)


def gradients(family: Any) -> dict[str, Tensor]:
    """Take the gradients of all parameters that have one."""
    found = {n: p.grad for n, p in family.module.named_parameters() if p.grad is not None}
    family.module.zero_grad(set_to_none=True)
    return found


# Parity with NeMo


def test_the_models_feel_text_context_and_history(models):
    """Without this, equal predictions would show little."""
    family, (one, other) = models.teacher(models.archive()), samples_of(2)
    codes = random_codes(family, [6, 6])
    changed = codes.clone()
    changed[:, 1] = (changed[:, 1] + 1) % CODES

    def logits(sample: dict, codes: Tensor, **settings: Any) -> Tensor:
        with torch.no_grad():
            return family.score([sample], codes[:1], torch.tensor([6]), **settings).logits

    before = logits(one, codes)
    for after in (
        logits(one | {"text": other["text"]}, codes),
        logits(one | {"context_codes": other["context_codes"]}, codes),
        logits(one, codes, unconditional=torch.tensor([True])),
        logits(one, changed)[:, 2:],
    ):
        difference = (after - before[:, -after.shape[1] :]).abs()
        assert difference[..., :CODEBOOKS, :].max() > 0.5
        assert difference[..., CODEBOOKS:, :].max() > 0.1
    assert before.std() > 1.0


@pytest.mark.parametrize("shape", SHAPES)
def test_incremental_decoding_equals_nemo_uncached_on_every_sample_alone(models, shape):
    path, samples = models.archive(**SHAPES[shape]), samples_of(5)
    family, stock = models.teacher(path), models.stock(path)
    rolled = roll(family, samples, 2.5)
    assert len(set(rolled.lengths.tolist())) > 1, "rows must end at different times"
    for row, sample in enumerate(samples):
        codes, logits = rolled.row(row)
        close(logits, guided(stock, [sample], codes[None], 2.5)[0])


def test_a_decoder_without_learned_positions_decodes_as_nemos_does(models):
    path = models.archive(settings={"decoder.use_learnable_pos_emb": False})
    samples, family = samples_of(3), models.teacher(path)
    rolled = roll(family, samples, 2.5)
    for row, sample in enumerate(samples):
        codes, logits = rolled.row(row)
        close(logits, guided(models.stock(path), [sample], codes[None], 2.5)[0])


@pytest.mark.parametrize("stacking", [1, 2])
def test_a_context_without_frames_is_its_special_ids_alone(models, stacking):
    path = models.archive(frame_stacking=stacking)
    samples = samples_of(3)
    samples[1] |= {"context_codes": samples[1]["context_codes"][:0]}
    rolled = roll(models.teacher(path), samples, 2.5)
    codes, logits = rolled.row(1)
    close(logits, guided(models.stock(path), samples[1:2], codes[None], 2.5)[0])


def test_norms_and_the_width_of_the_local_transformer_may_be_other_ones(models):
    settings = {
        "decoder.apply_norm_out": False,
        "decoder.apply_norm_to_cond": False,
        "local_transformer_hidden_dim": 64,
        "local_transformer_n_layers": 2,
        "local_transformer_n_heads": 2,
        "encoder.kernel_size": 1,
    }
    path, samples = models.archive(settings=settings), samples_of(3)
    rolled = roll(models.teacher(path), samples, 2.5)
    for row, sample in enumerate(samples):
        codes, logits = rolled.row(row)
        theirs = guided(models.stock(path), [sample], codes[None], 2.5)[0]
        torch.testing.assert_close(logits, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", ["stacked by 2", "experts"])
def test_bfloat16_stays_close_to_float32(models, shape):
    path, samples = models.archive(**SHAPES[shape]), samples_of(4)
    exact, rounded = models.teacher(path), models.teacher(path)
    rounded.module.to(torch.bfloat16)
    rolled = roll(rounded, samples, 1.0)
    with torch.no_grad():
        expected = exact.score(samples, rolled.codes, rolled.lengths).logits
        again = rounded.score(samples, rolled.codes, rolled.lengths).logits.float()
    for row, length in enumerate(rolled.lengths):
        for found in (rolled.logits, again):
            difference = (found[row, :length] - expected[row, :length]).abs()
            assert difference.mean() < 0.05 * expected[row, :length].std()


def test_heads_of_a_bfloat16_model_multiply_in_float32_for_guidance_amplifies_their_rounding(
    models,
):
    samples, family = samples_of(4), models.teacher(models.archive())
    family.module.to(torch.bfloat16)
    heads = {name: torch.from_numpy(x).double() for name, x in family.head_weights().items()}
    codes = random_codes(family, LENGTHS.tolist())
    with torch.no_grad():
        scored = family.score(samples, codes, LENGTHS, cfg_scale=2.5)
    predictions = [
        (step.logits, step.branches)
        for step in family.rollout(samples, policy_of(family, samples), 2.5)
    ]
    for logits, branches in [*predictions, (scored.logits, scored.branches)]:
        parts = []
        for group in ("backbone", "local"):
            cond, uncond = (
                torch.cat(branch.hidden[group], -2) for branch in (branches.cond, branches.uncond)
            )
            assert cond.dtype == torch.bfloat16
            mixed = 2.5 * cond.double() - 1.5 * uncond.double()
            weight, bias = heads[f"{group}.weight"], heads[f"{group}.bias"]
            mixed = mixed.expand(*mixed.shape[:-2], len(weight), -1)
            parts.append(torch.einsum("cvd,...cd->...cv", weight, mixed) + bias)
        close(logits.double(), torch.cat(parts, -2), 1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_for_equally_long_contexts_it_equals_one_batch_of_nemos(models, shape):
    path, samples = models.archive(**SHAPES[shape]), samples_of(4, equal=True)
    rolled = roll(models.teacher(path), samples, 2.5)
    theirs = guided(models.stock(path), samples, rolled.codes, 2.5, rolled.lengths)
    each_row(rolled.logits, theirs, rolled.lengths)


def test_without_guidance_a_rollout_is_nemos_conditional_branch_alone(models):
    path, samples = models.archive(), samples_of(4)
    rolled = roll(models.teacher(path), samples, 1.0)
    for row, sample in enumerate(samples):
        codes, logits = rolled.row(row)
        with torch.no_grad():
            close(logits, answer(models.stock(path), [sample], codes[None]).logits()[0])


@pytest.mark.parametrize("shape", SHAPES)
def test_a_student_predicts_what_nemos_own_student_pass_does(models, shape):
    path, samples = models.archive(**SHAPES[shape]), samples_of(4, equal=True)
    student, stock = models.student(path, like=path), models.stock(path)
    codes = random_codes(student, LENGTHS.tolist())
    with training(student.module, stock):
        ours = student.score(samples, codes, LENGTHS)
        theirs = nemo_student(stock, samples, codes, LENGTHS)
    parts = [theirs.logits] if theirs.logits_lt is None else [theirs.logits, theirs.logits_lt]
    shape_of_one = (4, 9, student.layout.streams, VOCABULARY)
    expected = torch.cat([part.reshape(shape_of_one) for part in parts], 2)
    each_row(ours.logits.detach(), expected.detach(), LENGTHS)
    assert ours.logits.requires_grad


@pytest.mark.parametrize("shape", ["dense", "experts, stacked by 2"])
def test_a_student_with_ragged_contexts_predicts_what_nemo_does_on_every_sample_alone(
    models, shape
):
    path, samples = models.archive(**SHAPES[shape]), samples_of(4)
    student, stock = models.student(path, like=path), models.stock(path)
    codes = random_codes(student, LENGTHS.tolist())
    with torch.no_grad(), training(student.module, stock):
        ours = student.score(samples, codes, LENGTHS).logits
        for row, (sample, length) in enumerate(zip(samples, LENGTHS, strict=True)):
            theirs = answer(stock, [sample], codes[row : row + 1, :length])
            close(ours[row, :length], theirs.logits()[0])


@pytest.mark.parametrize("shape", ["dense", "stacked by 2"])
def test_a_dropped_condition_is_nemos_dummy_condition_row_by_row(models, shape):
    path, samples = models.archive(**SHAPES[shape]), samples_of(4)
    family, stock = models.teacher(path), models.stock(path)
    codes = random_codes(family, LENGTHS.tolist())
    dropped = torch.tensor([True, False, False, True])
    with torch.no_grad():
        ours = family.score(samples, codes, LENGTHS, unconditional=dropped).logits
        for row, (sample, length) in enumerate(zip(samples, LENGTHS, strict=True)):
            given = codes[row : row + 1, :length]
            theirs = answer(stock, [sample], given, unconditional=bool(dropped[row]))
            close(ours[row, :length], theirs.logits()[0])


def test_nothing_of_a_dropped_condition_is_left_but_the_length_of_the_context(models):
    family, samples = models.teacher(models.archive()), samples_of(4, equal=True)
    codes = random_codes(family, [5])
    with torch.no_grad():
        logits = family.score(
            samples,
            codes.expand(4, -1, -1),
            torch.full((4,), 5),
            unconditional=torch.ones(4, dtype=torch.bool),
        ).logits
    close(logits, logits[:1].expand_as(logits), 1e-5)


@pytest.mark.parametrize("experts", [0, 3])
def test_dropout_acts_where_nemos_does(models, experts):
    """A dropout of 1 leaves zeros, so that one at a time shows where each of them acts."""
    path, samples = models.archive(experts=experts), samples_of(2, equal=True)
    student, stock = models.student(path, like=path), restored(path)
    codes, lengths = random_codes(student, [5, 3]), torch.tensor([5, 3])
    ours, theirs = dict(student.module.model.named_modules()), dict(stock.named_modules())
    names = [
        name
        for name, module in theirs.items()
        if isinstance(module, torch.nn.Dropout) and not name.startswith(("_codec", "local"))
    ]
    assert any("cross_attention" in name for name in names)
    undropped = None
    with torch.no_grad(), training(student.module, stock):
        for name in [None, *names]:
            if name is not None:
                ours[name].p = theirs[name].p = 1.0
            predicted = student.score(samples, codes, lengths).logits[..., :CODEBOOKS, :]
            expected = nemo_student(stock, samples, codes, lengths).logits
            each_row(predicted, expected.view(2, 5, CODEBOOKS, -1), lengths)
            undropped = predicted if undropped is None else undropped
            if name is not None:
                assert not torch.allclose(predicted[:, :3], undropped[:, :3], atol=1e-3), name
                ours[name].p = theirs[name].p = 0.0


def test_attention_weights_are_dropped_in_training(models):
    family = models.student(models.archive())
    samples, codes = samples_of(2), random_codes(family, [5, 3])
    lengths = torch.tensor([5, 3])
    attention = family.module.model.decoder.layers[0].self_attention

    def logits() -> Tensor:
        with torch.no_grad():
            return family.score(samples, codes, lengths).logits[0]

    with training(family.module):
        assert torch.equal(logits(), logits())
        attention.dropout.p = 0.5
        attention.dropout.forward = lambda x: x  # what is left acts on the weights alone
        assert not torch.equal(logits(), logits())


# The contract of families


@pytest.mark.parametrize("both", [False, True], ids=["guided", "both branches"])
@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("shape", SHAPES)
def test_scoring_a_rollout_again_gives_what_it_yielded(models, shape, scale, both):
    family, samples = models.teacher(models.archive(**SHAPES[shape])), samples_of(5)
    rolled = roll(family, samples, scale)
    assert len(set(rolled.lengths.tolist())) > 1, "rows must end at different times"
    assert rolled.batch_sizes == sorted(rolled.batch_sizes, reverse=True)
    assert rolled.batch_sizes[-1] < len(samples), "finished rows must leave the batch"
    beyond = torch.arange(LIMIT) >= rolled.lengths[:, None]
    codes = rolled.codes.masked_fill(beyond.unsqueeze(-1), 10**6)  # poison: never to be read
    with torch.no_grad():
        scores = family.score(samples, codes, rolled.lengths, cfg_scale=scale, both_branches=both)
    each_row(rolled.logits, scores.logits, rolled.lengths)
    assert (scores.branches.uncond is not None) == (both or scale != 1.0)


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("shape", ["dense", "experts, stacked by 2"])
def test_branches_are_what_was_mixed_and_heads_on_their_states_give_them(models, shape, scale):
    family, samples = models.teacher(models.archive(**SHAPES[shape])), samples_of(4)
    weights = {name: torch.from_numpy(x).double() for name, x in family.head_weights().items()}
    codes = random_codes(family, LENGTHS.tolist())
    with torch.no_grad():
        scored = family.score(samples, codes, LENGTHS, cfg_scale=scale, both_branches=True)
    steps = family.rollout(samples, policy_of(family, samples), scale, both_branches=True)
    valid = torch.arange(9) < LENGTHS[:, None]
    predictions = [(step.logits, step.branches, slice(None)) for step in steps]
    predictions.append((scored.logits[valid], scored.branches, valid))
    for logits, branches, place in predictions:
        mixed = 0.0
        for branch, factor in ((branches.cond, scale), (branches.uncond, 1 - scale)):
            found = torch.cat(branch.logits, -2)[place].double()
            parts = []
            for head in family.heads:
                states = torch.cat(branch.hidden[head.group], -2)[place].double()
                assert states.shape[-2:] == (head.vectors, head.width)
                weight, bias = (weights[f"{head.group}.{part}"] for part in ("weight", "bias"))
                states = states.expand(*states.shape[:-2], len(weight), head.width)
                parts.append(torch.einsum("cvd,...cd->...cv", weight, states) + bias)
            torch.testing.assert_close(torch.cat(parts, -2), found, atol=3e-5, rtol=3e-5)
            mixed = mixed + factor * found
        torch.testing.assert_close(logits.double(), mixed, atol=5e-5, rtol=5e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_rollout_is_the_same_alone_and_in_company(models, shape):
    family, samples = models.teacher(models.archive(**SHAPES[shape])), samples_of(5)
    together = roll(family, samples, 2.5)
    order = [4, 2, 0, 1, 3]
    shuffled = roll(family, [samples[i] for i in order], 2.5)
    for row, sample in enumerate(samples):
        codes, logits = together.row(row)
        for other in (roll(family, [sample], 2.5).row(0), shuffled.row(order.index(row))):
            assert torch.equal(other[0], codes)
            close(other[1], logits)


def test_asking_for_both_branches_changes_neither_codes_nor_predictions(models):
    family, samples = models.teacher(models.archive()), samples_of(4)
    alone = list(family.rollout(samples, policy_of(family, samples), 1.0))
    policy = policy_of(family, samples)
    both = list(family.rollout(samples, policy, 1.0, both_branches=True))
    for one, two in zip(alone, both, strict=True):
        assert one.branches.uncond is None
        assert torch.equal(one.codes, two.codes)
        close(one.logits, two.logits)
        uncond = torch.cat(two.branches.uncond.logits, -2)
        assert not torch.allclose(two.logits, uncond, atol=0.1)


@pytest.mark.parametrize("settings", [{}, {"cfg_scale": 2.5}], ids=["unguided", "guided"])
@pytest.mark.parametrize("shape", ["dense", "experts, stacked by 2", "no local transformer"])
def test_heads_left_to_the_reader_give_the_same_logits_and_gradients(models, shape, settings):
    path, samples = models.archive(**SHAPES[shape]), samples_of(4)
    family = models.student(path, like=path)
    assert has_linear_heads(family)
    codes = random_codes(family, LENGTHS.tolist())
    valid = (torch.arange(9) < LENGTHS[:, None])[..., None, None]
    found = []
    with training(family.module):
        for linear in (False, True):
            scores = family.score(samples, codes, LENGTHS, linear=linear, **settings)
            assert isinstance(scores.outputs, Tensor) != linear
            logits = torch.where(valid, scores.logits, 0.0)
            slope = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
            ((logits * slope).sum() + sum(scores.losses.values())).backward()
            found.append((logits.detach(), gradients(family)))
            parts = scores.branches.cond.outputs
            assert all(isinstance(part, LinearOutput) for part in parts) == linear
    (dense, theirs), (left, ours) = found
    close(left, dense, 5e-5)
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        scale = theirs[name].abs().max().item()
        torch.testing.assert_close(gradient, theirs[name], atol=1e-5 * max(scale, 1), rtol=1e-4)


# How a rollout goes on and ends


class LocalAlways(RolloutPolicy):
    """Draws one id in every stream of the local transformer, whatever was predicted."""

    always = EOS

    def draw(self, rows, timestep, logits, streams=slice(None)):
        codes = super().draw(rows, timestep, logits, streams)
        return torch.full_like(codes, self.always) if streams.start else codes


@pytest.mark.parametrize("shape", ["dense", "experts, stacked by 2"])
def test_what_the_local_transformer_draws_neither_goes_on_nor_ends_a_rollout(models, shape):
    family, samples = models.teacher(models.archive(**SHAPES[shape])), samples_of(4)
    streams = family.layout.streams
    assert [s.group for s in family.streams] == ["backbone"] * streams + ["local"] * streams
    plain = roll(family, samples, 2.5)
    other = roll(family, samples, 2.5, policy_of(family, samples, LocalAlways))
    assert torch.equal(plain.lengths, other.lengths)
    assert torch.equal(plain.codes[..., :streams], other.codes[..., :streams])
    for row in range(len(samples)):
        (codes, logits), (forced, changed) = plain.row(row), other.row(row)
        assert (forced[:, streams:] == EOS).all()
        assert (codes[:, :streams] != codes[:, streams:]).any(), "they must draw for themselves"
        close(changed[:, :streams], logits[:, :streams], 0.0)
        # Its first stream reads the decoder alone, all others what was drawn before them.
        close(changed[:, streams], logits[:, streams], 0.0)
        assert not torch.allclose(changed[:, streams + 1 :], logits[:, streams + 1 :], atol=0.1)


def test_scores_of_the_decoder_do_not_read_the_local_codes(models):
    family, samples = models.teacher(models.archive()), samples_of(4)
    codes = random_codes(family, LENGTHS.tolist())
    changed = codes.clone()
    changed[..., CODEBOOKS:] = random_codes(family, LENGTHS.tolist(), seed=1)[..., CODEBOOKS:]
    with torch.no_grad():
        one = family.score(samples, codes, LENGTHS).logits
        two = family.score(samples, changed, LENGTHS).logits
    each_row(two[..., :CODEBOOKS, :], one[..., :CODEBOOKS, :], LENGTHS, 0.0)
    assert not torch.allclose(two[:, 0, CODEBOOKS + 1 :], one[:, 0, CODEBOOKS + 1 :], atol=0.1)


def test_where_the_local_draws_are_the_history_they_go_on_and_end_the_rollout(models):
    path, samples = models.archive(frame_stacking=2), samples_of(5)
    family, stock = models.teacher(path, history="local"), models.stock(path)
    rolled = roll(family, samples, 2.5, temperature=1.5, max_timesteps=30, reference_multiple=None)
    streams = family.layout.streams
    assert len(set(rolled.lengths.tolist())) > 2
    for row, sample in enumerate(samples):
        codes, logits = rolled.row(row)
        assert torch.equal(codes[:, :streams], codes[:, streams:])
        close(logits, guided(stock, [sample], codes[None], 2.5)[0], 2e-4)
        allowed = logits[:, streams:].clone()
        allowed[..., list(family.forbidden)] = float("-inf")
        ends = (codes[:, streams:] == EOS) | (allowed.argmax(-1) == EOS)
        assert not ends[2:-1].any()
        assert ends[-1].any() == (rolled.policy.stop[row] == END)


def prefers(ids: range | list[int], by: float, group: str = "backbone"):
    """An edit of a model that makes ids likelier in every stream of a group."""

    def edit(model: Any) -> None:
        heads = [model.final_proj]
        if group == "local":
            heads = list(model.local_transformer_out_projections)
        for head in heads:
            head.bias.data.view(-1, VOCABULARY)[:, list(ids)] += by

    return edit


def test_a_rollout_ends_with_the_block_in_which_the_decoder_draws_the_end(models):
    for stacking, by in ((1, 0.0), (2, -1.0)):
        family = models.teacher(models.archive(frame_stacking=stacking))
        prefers([EOS], by)(family.module.model)
        samples = samples_of(6)
        rolled = roll(
            family, samples, 1.5, max_timesteps=60, temperature=2.0, reference_multiple=None
        )
        assert len(set(rolled.lengths.tolist())) > 2
        streams = family.layout.streams
        for row, length in enumerate(rolled.lengths):
            assert rolled.policy.stop[row] == END
            codes, logits = rolled.row(row)
            allowed = logits[:, :streams].clone()
            allowed[..., list(family.forbidden)] = float("-inf")
            ends = (codes[:, :streams] == EOS) | (allowed.argmax(-1) == EOS)
            assert length > 2
            assert ends[-1].any(), "the block with the end id is kept"
            assert not ends[2:-1].any(), "and it is the first one"


def test_a_rollout_that_does_not_end_stops_where_the_policy_says(models):
    family, samples = models.teacher(models.archive()), samples_of(5)
    prefers([EOS], -50.0)(family.module.model)
    rolled = roll(family, samples, 2.5)
    assert rolled.lengths.tolist() == [min(length, LIMIT) for length in REFERENCES[:5]]
    stopped = [TRUNCATED if length < LIMIT else AT_LIMIT for length in REFERENCES[:5]]
    assert rolled.policy.stop.tolist() == stopped


def test_the_end_id_is_not_drawn_before_its_time_in_any_group(models):
    family, samples = models.teacher(models.archive(frame_stacking=2)), samples_of(4)
    for group in ("backbone", "local"):
        prefers([EOS], 60.0, group)(family.module.model)
    rolled = roll(family, samples, 2.5, min_timesteps=3, reference_multiple=None)
    assert rolled.lengths.tolist() == [4] * 4
    assert (rolled.policy.stop == END).all()
    assert (rolled.codes[:, :3] < CODES).all()
    assert (rolled.codes[:, 3] == EOS).all()


def test_no_special_id_but_the_end_is_ever_drawn(models):
    family, samples = models.teacher(models.archive()), samples_of(4)
    special = [i for i in range(CODES, VOCABULARY) if i != EOS]
    assert list(family.forbidden) == special
    assert family.end_id == EOS == family.module.model.audio_eos_id
    for group in ("backbone", "local"):
        prefers(special, 60.0, group)(family.module.model)
    rolled = roll(family, samples, 2.5)
    for row in range(4):
        codes, logits = rolled.row(row)
        assert (logits.argmax(-1) >= CODES).all(), "what is stored is not masked"
        assert ((codes < CODES) | (codes == EOS)).all()


@pytest.mark.parametrize("history", ["backbone", "local"])
@pytest.mark.parametrize("shape", ["dense", "experts"])
def test_rollouts_that_become_nan_leave_the_batch_and_the_others_do_not_notice(
    models, shape, history
):
    """A code is spoiled as an input: it is NaN one timestep later, or in the local streams now."""
    path, samples = models.archive(**SHAPES[shape]), samples_of(6)
    healthy = roll(models.teacher(path, history=history), samples, 2.5)
    drawn = healthy.codes[..., CODEBOOKS if history == "local" else 0]
    code, row = int(drawn[2, 2]), 2
    family = models.teacher(path, history=history)
    family.module.model.audio_embeddings[0].weight.data[code] = float("nan")
    rolled = roll(family, samples, 2.5)
    lost = [i for i in range(6) if rolled.policy.stop[i] == NOT_FINITE]
    assert row in lost
    assert len(lost) < 6
    for i in range(6):
        (codes, logits), (before, expected) = rolled.row(i), healthy.row(i)
        kept = len(codes) - (i in lost)
        assert (i in lost) or kept == len(before)
        assert torch.equal(codes[:kept], before[:kept])
        close(logits[:kept], expected[:kept])
        assert (i in lost) == (not logits.isfinite().all())


@pytest.mark.parametrize("stacking", [1, 2, 4])
def test_the_layout_gives_a_recordings_frames_back(models, stacking):
    family = models.teacher(models.archive(frame_stacking=stacking))
    told: Any = SimpleNamespace(  # what a manifest says of them
        family=family.name, streams=family.streams, end_id=family.end_id,
        conditioning=family.facts.model_dump(mode="json"),
    )  # fmt: skip
    for sample in samples_of(5):
        codes = family.reference_codes(sample)
        frames = torch.from_numpy(sample["codes"].astype("int64")).view(-1, CODEBOOKS)
        assert codes.shape == (family.timesteps(sample), len(family.streams))
        assert len(codes) == -(-len(frames) // stacking) + 1
        assert torch.equal(family.frames(codes), frames)
        assert torch.equal(stored_frames(told, codes), frames)
        streams = CODEBOOKS * stacking
        assert torch.equal(codes[:, :streams], codes[:, streams:])
        whole = len(frames) // stacking
        assert torch.equal(
            codes[:whole, :streams].reshape(-1, CODEBOOKS), frames[: whole * stacking]
        )
    assert family.timestep_s == pytest.approx(stacking / 21.533)


# Gradients


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_finite_whatever_is_padded(models, shape):
    path, samples = models.archive(**SHAPES[shape]), samples_of(4)
    family = models.student(path, like=path)
    codes = random_codes(family, LENGTHS.tolist())
    valid = (torch.arange(9) < LENGTHS[:, None])[..., None, None]
    family.module.train()
    scores = family.score(samples, codes, LENGTHS, linear=True)
    loss = scores.logits.log_softmax(-1).masked_fill(~valid, 0.0).sum()
    (loss + sum(scores.losses.values())).backward()
    for name, gradient in gradients(family).items():
        assert gradient.isfinite().all(), name


@pytest.mark.parametrize("shape", SHAPES)
def test_every_trained_parameter_gets_a_gradient_in_every_step(models, shape):
    family, samples = models.student(models.archive(**SHAPES[shape])), samples_of(2)
    family.module.train()
    scores = family.score(samples, random_codes(family, [3, 2]), torch.tensor([3, 2]), linear=True)
    (scores.logits.sum() + sum(scores.losses.values())).backward()
    trained = {n for n, p in family.module.named_parameters() if p.requires_grad}
    assert trained == gradients(family).keys()


def test_an_expert_that_no_position_visits_gets_a_gradient_of_zero(models):
    """Data parallel training waits for the gradients of all parameters."""
    family, samples = models.student(models.archive(**EXPERTS)), samples_of(2)
    for layer in family.module.model.decoder.layers:
        weight = layer.pos_ff.router.router.weight.data
        weight[0] = 0.0  # two of the other four always come before it
        weight[1] = weight[2]
        weight[3:] = -weight[2]
    family.module.train()
    scores = family.score(samples, random_codes(family, [3, 2]), torch.tensor([3, 2]))
    (scores.logits.sum() + sum(scores.losses.values())).backward()
    assert scores.metrics["expert_usage_min"] == 0
    found = gradients(family)
    lonely = [name for name in found if ".experts.0." in name]
    assert len(lonely) == 2 * 2
    assert all((found[name] == 0).all() for name in lonely)


def test_the_loss_of_the_local_transformer_teaches_no_decoder(models):
    path, samples = models.archive(), samples_of(4)
    family = models.student(path, like=path)
    codes = random_codes(family, LENGTHS.tolist())
    with training(family.module):
        scores = family.score(samples, codes, LENGTHS)
        scores.logits[0, :6, CODEBOOKS:].square().sum().backward()
    taught = {name for name, g in gradients(family).items() if (g != 0).any()}
    parts = {name.removeprefix("model.").split(".")[0] for name in taught}
    assert parts == {
        "audio_embeddings",
        "local_transformer",
        "local_transformer_in_projection",
        "local_transformer_out_projections",
    }


def test_without_local_streams_the_local_transformer_is_not_trained(models):
    family, samples = models.student(models.archive(), local_streams=False), samples_of(2)
    assert {stream.group for stream in family.streams} == {"backbone"}
    family.module.train()
    scores = family.score(samples, random_codes(family, [3, 2]), torch.tensor([3, 2]))
    assert scores.logits.shape[2] == CODEBOOKS
    scores.logits.sum().backward()
    frozen = {n for n, p in family.module.named_parameters() if not p.requires_grad}
    assert frozen == {n for n in dict(family.module.named_parameters()) if "local_transformer" in n}
    assert not frozen & gradients(family).keys()


def test_without_local_streams_the_decoder_predicts_the_same(models):
    path, samples = models.archive(), samples_of(4)
    whole, part = models.teacher(path), models.teacher(path, local_streams=False)
    codes = random_codes(whole, LENGTHS.tolist())
    with torch.no_grad():
        both = whole.score(samples, codes, LENGTHS, cfg_scale=2.5).logits
        one = part.score(samples, codes[..., :CODEBOOKS], LENGTHS, cfg_scale=2.5).logits
    each_row(one, both[..., :CODEBOOKS, :], LENGTHS, 1e-5)


def test_a_teacher_is_frozen_and_a_student_is_not(models):
    path = models.archive()
    teacher = models.teacher(path)
    assert not any(p.requires_grad for p in teacher.module.parameters())
    assert not teacher.module.training
    assert all(p.requires_grad for p in models.student(path).module.parameters())


# Experts


def sharp_routers(model: Any) -> None:
    """Let routers prefer some experts, so that losses and usage say something."""
    for layer in model.decoder.layers:
        layer.pos_ff.router.router.weight.data *= 20.0


def usage_of(answers: list[Answer], experts: int) -> tuple[float, float, float]:
    """Mean over layers of the smallest and the largest share of visits, and mean entropy."""
    least, most, entropies = [], [], []
    for layer in range(len(answers[0].routing)):
        chosen = torch.cat([a.routing[layer]["expert_indices"][a.counted] for a in answers])
        counts = torch.bincount(chosen.flatten(), minlength=experts).double()
        least.append(float(counts.min() / counts.sum()))
        most.append(float(counts.max() / counts.sum()))
        for a in answers:
            p = a.routing[layer]["router_probs"][a.counted].double()
            entropies.append(-(p * p.clamp_min(1e-30).log()).sum(-1))
    return sum(least) / len(least), sum(most) / len(most), float(torch.cat(entropies).mean())


@pytest.mark.parametrize("routing", ["top_k", "sinkhorn"])
def test_the_loss_of_the_experts_and_what_is_reported_equal_nemos(models, routing):
    settings = SINKHORN if routing == "sinkhorn" else {}
    path = models.archive(settings=settings, edit=sharp_routers, **EXPERTS)
    samples = samples_of(4, equal=True)
    student, stock = models.student(path, like=path), models.stock(path)
    codes = random_codes(student, LENGTHS.tolist())
    with torch.no_grad(), training(student.module, stock), quiet():
        scores = student.score(samples, codes, LENGTHS)
        theirs = nemo_student(stock, samples, codes, LENGTHS)
        expected = stock.moe_auxiliary_loss(**theirs.moe_routing_data)[-1]
        told = usage_of([answer(stock, samples, codes, LENGTHS)], 5)
    each_row(scores.logits, theirs.logits.view(4, 9, CODEBOOKS, -1), LENGTHS)
    assert expected > 1e-4
    torch.testing.assert_close(scores.losses["experts"], expected, atol=0, rtol=1e-4)
    found = [scores.metrics[name] for name in ("expert_usage_min", "expert_usage_max")]
    torch.testing.assert_close(torch.stack(found).double(), torch.tensor(told[:2]).double())
    assert float(scores.metrics["router_entropy"]) == pytest.approx(told[2], rel=1e-4)
    assert told[0] < 0.9 * told[1], "an even use would show little"


def test_the_loss_of_the_experts_over_ragged_contexts_is_that_of_all_positions_together(models):
    path, samples = models.archive(edit=sharp_routers, **EXPERTS), samples_of(4)
    student, stock = models.student(path, like=path), models.stock(path)
    codes = random_codes(student, LENGTHS.tolist())
    with torch.no_grad(), training(student.module, stock):
        scores = student.score(samples, codes, LENGTHS)
        alone = [
            answer(stock, [sample], codes[row : row + 1, :length])
            for row, (sample, length) in enumerate(zip(samples, LENGTHS, strict=True))
        ]
    layers = [layer for a in alone for layer in a.routing]
    probabilities = torch.cat([x["router_probs"].flatten(0, 1) for x in layers]).double()
    logits = torch.cat([x["router_logits"].flatten(0, 1) for x in layers]).double()
    balance = (probabilities.mean(0) - 1 / 5).square().mean()
    z = logits.exp().sum(-1).log().square().mean()
    expected = float(0.01 * balance + 0.001 * z)
    assert float(scores.losses["experts"]) == pytest.approx(expected, rel=1e-4)
    least, most, entropy = usage_of(alone, 5)
    assert float(scores.metrics["expert_usage_min"]) == pytest.approx(least, rel=1e-5)
    assert float(scores.metrics["expert_usage_max"]) == pytest.approx(most, rel=1e-5)
    assert float(scores.metrics["router_entropy"]) == pytest.approx(entropy, rel=1e-4)


@pytest.mark.parametrize("routing", ["top_k", "sinkhorn"])
def test_padding_visits_no_expert_and_counts_nothing(models, routing):
    settings = SINKHORN if routing == "sinkhorn" else {}
    path = models.archive(settings=settings, edit=sharp_routers, **EXPERTS)
    student, samples = models.student(path, like=path), samples_of(4)
    codes = random_codes(student, LENGTHS.tolist())
    wide = torch.nn.functional.pad(codes, (0, 0, 0, 7), value=10**6)
    with torch.no_grad(), training(student.module):
        one = student.score(samples, codes, LENGTHS)
        two = student.score(samples, wide, LENGTHS)
    torch.testing.assert_close(two.losses["experts"], one.losses["experts"], atol=0, rtol=1e-5)
    assert one.metrics.keys() == {"expert_usage_min", "expert_usage_max", "router_entropy"}
    for name, value in one.metrics.items():
        torch.testing.assert_close(two.metrics[name], value, atol=0, rtol=1e-5)
    each_row(two.logits, one.logits, LENGTHS)


@pytest.mark.parametrize("shape", [*SHAPES, "sinkhorn"])
def test_a_training_step_under_autocast_is_close_to_one_of_float32(models, shape):
    if shape == "sinkhorn":
        path = models.archive(settings=SINKHORN, **EXPERTS)
    else:
        path = models.archive(**SHAPES[shape])
    student, samples = models.student(path, like=path), samples_of(4)
    codes, found = random_codes(student, LENGTHS.tolist()), {}
    for enabled in (False, True):
        with training(student.module), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            scores = student.score(samples, codes, LENGTHS)
            valid = torch.arange(9) < LENGTHS[:, None]
            likely = scores.logits[valid].float().log_softmax(-1)
            loss = -likely.gather(-1, codes[valid].unsqueeze(-1)).mean()
            (loss + sum(scores.losses.values())).backward()
        found[enabled] = loss.detach(), gradients(student)
    (exact, expected), (rounded, rough) = found[False], found[True]
    assert rounded == pytest.approx(float(exact), rel=0.01)
    assert rough.keys() == expected.keys()
    size = max(float(x.abs().max()) for x in expected.values())
    for name, gradient in expected.items():
        close(rough[name], gradient, 0.1 * size)


def test_bfloat16_routes_as_float32_does_on_the_same_states(models):
    path = models.archive(edit=sharp_routers, **EXPERTS)
    layers = importlib.import_module("stages.families.magpie_layers")
    layer = models.teacher(path).module.model.decoder.layers[0]
    x = torch.randn(2, 50, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    counted = torch.ones(2, 50, dtype=torch.bool)
    layer.pos_ff.router.to(torch.bfloat16)
    weight = layer.pos_ff.router.router.weight.double()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        fed, router = layers._through_experts(layer.pos_ff, x, counted)
    exact = x.double() @ weight.T
    close(router.logits.double(), exact, 1e-5)
    assert torch.equal(router.experts, exact.topk(2).indices)
    assert fed.dtype == torch.bfloat16


def test_a_dense_decoder_reports_nothing_of_experts(models):
    family = models.teacher(models.archive())
    scores = family.score(samples_of(2), random_codes(family, [3, 2]), torch.tensor([3, 2]))
    assert scores.losses == {}
    assert scores.metrics == {}


# Baked contexts

SPEAKERS = tuple(f"speaker {i}" for i in range(3))


def baked_contexts() -> Tensor:
    return torch.randn(3, 12, 64, generator=torch.Generator().manual_seed(5))


def of_full_length(model: Any) -> None:
    model.baked_context_embedding_len = torch.full((3,), 12)


@pytest.mark.parametrize("stacking", [1, 2])
def test_baked_contexts_of_full_length_predict_what_nemo_does_in_one_batch(models, stacking):
    path = models.archive(
        baked=baked_contexts(), edit=of_full_length, frame_stacking=stacking, seed=3
    )
    family, samples = models.teacher(path, speakers=SPEAKERS), samples_of(5, speakers=True)
    assert family.conditions == ("text", "speaker")
    rolled = roll(family, samples, 2.5)
    theirs = guided(models.stock(path), samples, rolled.codes, 2.5, rolled.lengths)
    each_row(rolled.logits, theirs, rolled.lengths)


def only_speaker(stock: Any, number: int) -> Any:
    """NeMo's model with the context of one speaker, cut to its own length."""
    alone, length = copy.copy(stock), int(stock.baked_context_embedding_len[number])
    table = stock.baked_context_embedding.weight[number].view(12, 64)[:length]
    alone._modules = dict(stock._modules)
    alone._buffers = dict(stock._buffers)
    alone.baked_context_embedding = torch.nn.Embedding(1, length * 64)
    alone.baked_context_embedding.weight.data = table.reshape(1, -1).clone()
    alone._baked_embedding_T = torch.tensor(length)
    alone.baked_context_embedding_len = torch.tensor([length])
    return alone


def test_baked_contexts_of_other_lengths_predict_as_if_each_were_the_only_one(models):
    path = models.archive(baked=baked_contexts(), seed=3)
    family, samples = models.teacher(path, speakers=SPEAKERS), samples_of(5, speakers=True)
    stock = models.stock(path)
    assert stock.baked_context_embedding_len.tolist() == [12, 11, 10]
    rolled = roll(family, samples, 2.5)
    for row, sample in enumerate(samples):
        codes, logits = rolled.row(row)
        alone = only_speaker(stock, row % 3)
        theirs = guided(alone, [sample | {"speaker": "speaker 0"}], codes[None], 2.5)
        close(logits, theirs[0])


def test_baked_speakers_are_told_apart_by_the_names_of_the_setting(models):
    path = models.archive(baked=baked_contexts(), seed=3)
    ours = models.teacher(path, speakers=SPEAKERS)
    turned = models.teacher(path, speakers=SPEAKERS[::-1])
    samples = samples_of(3, speakers=True)
    swapped = [
        sample | {"speaker": name} for sample, name in zip(samples, SPEAKERS[::-1], strict=True)
    ]
    codes, lengths = random_codes(ours, [4, 4, 4]), torch.full((3,), 4)
    with torch.no_grad():
        one = ours.score(samples, codes, lengths).logits
        assert torch.equal(turned.score(swapped, codes, lengths).logits, one)
        assert not torch.allclose(turned.score(samples, codes, lengths).logits, one, atol=0.1)
    assert ours.tokenizer_fingerprint() != turned.tokenizer_fingerprint()


def test_a_speaker_without_a_baked_context_is_refused_by_name(models):
    family = models.teacher(models.archive(baked=baked_contexts(), seed=3), speakers=SPEAKERS)
    samples = [samples_of(1, speakers=True)[0] | {"speaker": "nobody"}]
    with pytest.raises(
        UserError, match=r"'s0': unknown speaker: 'nobody' .* name its baked context"
    ):
        family.score(samples, random_codes(family, [3]), torch.tensor([3]))


@pytest.mark.parametrize("speakers", [(), SPEAKERS[:2], (*SPEAKERS, "one more")])
def test_another_number_of_baked_speakers_is_refused(models, speakers):
    path = models.archive(baked=baked_contexts(), seed=3)
    words = rf"has 3 baked contexts, but the setting speakers names {len(speakers)}"
    with pytest.raises(UserError, match=words):
        models.teacher(path, speakers=speakers)


def test_speakers_are_refused_where_nothing_is_baked(models):
    with pytest.raises(UserError, match="has 0 baked contexts"):
        models.teacher(models.archive(), speakers=SPEAKERS)


def test_what_baking_replaced_is_not_trained(models):
    path = models.archive(baked=baked_contexts(), seed=3)
    teacher = models.teacher(path, speakers=SPEAKERS)
    assert teacher.module.model.num_baked_speakers == 3
    names = {
        name
        for name, parameter in models.student(path).module.named_parameters()
        if not parameter.requires_grad
    }
    assert names == set(), "a student built from the configuration has a context encoder"


# Memory


def new_tensors(made: Any, args: tuple) -> list[Tensor]:
    """The tensors that a function made, without views of those that it was given."""
    given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
    found = made if isinstance(made, (tuple, list)) else [made]
    tensors = [x for x in found if isinstance(x, Tensor)]
    return [x for x in tensors if x.untyped_storage().data_ptr() not in given]


class Largest(TorchDispatchMode):
    """Notes the largest tensor that is made, and the largest one of logits."""

    def __init__(self, widths: set[int]) -> None:
        super().__init__()
        self.widths, self.elements, self.logits = widths, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in new_tensors(made, args):
            self.elements = max(self.elements, tensor.numel())
            if tensor.dim() and tensor.shape[-1] in self.widths:
                self.logits = max(self.logits, tensor.numel())
        return made


def test_training_never_holds_the_logits_of_a_batch(models):
    path = models.archive(frame_stacking=4)
    family, samples, steps = models.student(path, like=path), samples_of(4), 24
    streams = family.layout.streams
    codes = random_codes(family, [steps] * 4)
    whole = 4 * steps * 2 * streams * VOCABULARY
    heads = streams * VOCABULARY * 64
    forbidden = Forbidden(torch.tensor(family.forbidden), None)
    kept = torch.arange(10).expand(*codes.shape, 10)
    tail = torch.full((*codes.shape, 1), -1.0)
    target = SparseTarget(kept, torch.zeros(*codes.shape, 10) - 3.0, tail, (1.0,))
    weights = torch.ones(codes.shape)
    with Largest({VOCABULARY, streams * VOCABULARY}) as largest:
        scores = family.score(samples, codes, torch.full((4,), steps), linear=True)
        loss, _ = distillation_loss(
            scores.outputs, target, codes, weights, forbidden, LossConfig(kl=1.0, ce=0.3),
            block_values=4 * 2 * streams * VOCABULARY,
        )  # fmt: skip
        loss.backward()
    assert all(g.isfinite().all() for g in gradients(family).values())
    assert heads < whole / 2
    assert largest.elements < whole
    assert largest.logits <= max(4 * 2 * streams * VOCABULARY, heads)
    with Largest({VOCABULARY, streams * VOCABULARY}) as largest:
        family.score(samples, codes, torch.full((4,), steps))
    assert largest.logits >= whole / 2, "the measure must see what it looks for"


def test_a_rollout_never_holds_more_logits_than_those_of_a_step(models):
    family, samples = models.teacher(models.archive(frame_stacking=4)), samples_of(4)
    prefers([EOS], -50.0)(family.module.model)
    streams, steps = family.layout.streams, 24
    policy = policy_of(family, samples, max_timesteps=steps, reference_multiple=None)
    count = 0
    with Largest({VOCABULARY, streams * VOCABULARY}) as largest:
        for step in family.rollout(samples, policy, 2.5):
            assert len(step.rows) == 4
            count += 1
    assert count == steps
    assert largest.elements < 4 * steps * 2 * streams * VOCABULARY
    assert largest.logits <= 2 * 4 * 2 * streams * VOCABULARY


def test_a_late_step_of_a_rollout_makes_no_more_than_an_early_one(models):
    """Nothing is computed twice: only masks and attention's weights grow with the history."""
    family, samples = models.teacher(models.archive()), samples_of(2, equal=True)
    prefers([EOS], -50.0)(family.module.model)
    policy = policy_of(family, samples, max_timesteps=40, reference_multiple=None)
    sizes: list[int] = []
    steps = family.rollout(samples, policy, 2.5)
    next(steps)
    for _ in range(39):
        with Made() as made:
            next(steps)
        sizes.append(made.elements)
    assert max(sizes) < 1.01 * min(sizes)


class Made(TorchDispatchMode):
    """Adds up the elements of all tensors that are made, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        self.elements += sum(tensor.numel() for tensor in new_tensors(made, args))
        return made
