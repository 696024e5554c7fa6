"""NeMo's losses over the ids of all codebooks together: against a definition, and against NeMo."""

from __future__ import annotations

import pytest
import torch

from stages.family import LinearOutput
from stages.joint_losses import joint_losses
from stages.loss_config import LossConfig
from stages.losses import distillation_loss
from stages.targets import DenseTarget, Forbidden

Tensor = torch.Tensor
B, T, V = 3, 5, 23
FORBIDDEN = torch.tensor([19, 21])
LENGTHS = torch.tensor([5, 2, 4])
SAMPLE_WEIGHTS = torch.tensor([1.0, 0.1, 0.5])
TERMS = {"kl": 0.7, "ce": 0.3, "nrmse": 2.0}


def logits_of(streams: int, seed: int) -> Tensor:
    """[B, T, streams, V], of another height in every row."""
    random = torch.Generator().manual_seed(seed)
    heights = 3 * torch.randn(B, T, streams, 1, generator=random)
    return 2 * torch.randn(B, T, streams, V, generator=random) + heights


def teacher_of(streams: int) -> Tensor:
    return logits_of(streams, 1).index_fill(-1, FORBIDDEN, -torch.inf)


def with_levels(teacher: Tensor) -> DenseTarget:
    """As a store of the target `full` holds it."""
    levels = teacher.amax(-1)
    return DenseTarget(teacher - levels.unsqueeze(-1), levels)


def codes_of(streams: int) -> Tensor:
    return (torch.arange(B * T * streams).reshape(B, T, streams) * 7) % 19


def valid() -> Tensor:
    return torch.arange(T) < LENGTHS.unsqueeze(1)


def weights_of(streams: int) -> Tensor:
    """[B, T, streams]: a mean over rollouts, spread over their predictions."""
    each = SAMPLE_WEIGHTS / (LENGTHS * streams)
    return (valid() * each.unsqueeze(1)).unsqueeze(-1).expand(B, T, streams).contiguous()


def computed(student: Tensor, groups: tuple[int, ...], weights: Tensor, config: LossConfig, **more):
    """Loss, terms and gradient of the code under test, sums over the batch."""
    streams, leaf = sum(groups), student.clone().requires_grad_()
    loss, terms = distillation_loss(
        leaf, with_levels(teacher_of(streams)), codes_of(streams), weights,
        Forbidden(FORBIDDEN, None), config, more.get("block_values"), groups,
    )  # fmt: skip
    loss.backward()
    return loss.detach(), terms, leaf.grad


def reference(student: Tensor, groups: tuple[int, ...], weights: Tensor, config: LossConfig):
    """Terms, loss and gradient in fp64 by the definitions, one position at a time."""
    leaf, teacher = student.double().clone().requires_grad_(), teacher_of(sum(groups)).double()
    codes, tau, sums = codes_of(sum(groups)), config.temperature, dict.fromkeys(TERMS, 0.0)
    for b, t in valid().nonzero().tolist():
        first = 0
        for size in groups:
            streams = slice(first, first + size)
            ours, theirs = leaf[b, t, streams] / tau, teacher[b, t, streams] / tau
            p = theirs.exp() / theirs.exp().sum()
            q = ours.exp() / ours.exp().sum()
            for stream in range(size):
                weight = weights[b, t, first + stream].double()
                some = p[stream] > 0
                kl = (p[stream][some] * (p[stream][some] / q[stream][some]).log()).sum()
                sums["kl"] = sums["kl"] + weight * tau**2 * kl
                own = ours[stream].exp() / ours[stream].exp().sum()
                sums["ce"] = sums["ce"] - weight * own[codes[b, t, first + stream]].log()
                error = torch.where(some, ours[stream] - theirs[stream].clamp_min(-1e9), 0.0)
                filled = torch.where(some, theirs[stream], 0.0)
                std = ((filled - filled.mean()).square().sum() / (V - 1)).sqrt()
                sums["nrmse"] = sums["nrmse"] + weight * error.square().mean().sqrt() / std
            first += size
    loss = sum(config.terms[name] * sums[name] for name in config.terms)
    loss.backward()
    return float(loss.detach()), {n: float(sums[n].detach()) for n in config.terms}, leaf.grad


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("groups", [(3,), (2, 2)], ids=["backbone", "and local"])
def test_values_and_gradients_equal_the_definition(groups, temperature):
    config = LossConfig.model_validate(TERMS | {"joint": True, "temperature": temperature})
    student, streams = logits_of(sum(groups), 2), sum(groups)
    weights = weights_of(streams) * torch.linspace(0.5, 1.5, streams)
    loss, terms, gradient = computed(student, groups, weights, config)
    expected_loss, expected_terms, expected = reference(student, groups, weights, config)
    assert float(loss) == pytest.approx(expected_loss, rel=1e-5)
    assert {n: float(x) for n, x in terms.items()} == pytest.approx(expected_terms, rel=1e-5)
    torch.testing.assert_close(gradient.double(), expected, atol=1e-7, rtol=1e-5)
    assert (gradient[..., FORBIDDEN].abs().amax((0, 1)) > 0).all(), "the student is not masked"


@pytest.mark.parametrize("name", TERMS)
def test_each_term_alone_equals_the_definition(name):
    config = LossConfig.model_validate({"kl": 0.0, name: 1.3, "joint": True})
    student, weights = logits_of(3, 2), weights_of(3)
    loss, _, gradient = computed(student, (3,), weights, config)
    expected_loss, _, expected = reference(student, (3,), weights, config)
    assert float(loss) == pytest.approx(expected_loss, rel=1e-5)
    torch.testing.assert_close(gradient.double(), expected, atol=1e-7, rtol=1e-5)


def test_a_stream_that_is_loud_takes_probability_from_the_others():
    # Which is why it is for comparison only: nothing that is drawn has changed.
    config = LossConfig(joint=True)
    student, weights = logits_of(3, 2), weights_of(3)
    loud = student.clone()
    loud[:, :, 0] += 6.0
    _, _, before = computed(student, (3,), weights, config)
    _, _, after = computed(loud, (3,), weights, config)
    assert (after - before)[:, :, 1].abs().max() > 1e-3
    plain = LossConfig()
    torch.testing.assert_close(
        computed(loud, (3,), weights, plain)[2], computed(student, (3,), weights, plain)[2],
        atol=1e-6, rtol=1e-4,
    )  # fmt: skip


def test_groups_are_normalised_apart():
    config = LossConfig.model_validate(TERMS | {"joint": True})
    student, weights = logits_of(4, 2), weights_of(4)
    _, _, apart = computed(student, (2, 2), weights, config)
    other = student.clone()
    other[:, :, 2:] += 5.0
    _, _, moved = computed(other, (2, 2), weights, config)
    torch.testing.assert_close(moved[:, :, :2], apart[:, :, :2])


def test_blocks_and_heads_within_them_change_nothing():
    config = LossConfig.model_validate(TERMS | {"joint": True})
    random = torch.Generator().manual_seed(4)
    head = LinearOutput(
        torch.randn(B, T, 1, 6, generator=random).requires_grad_(),
        torch.randn(4, V, 6, generator=random).requires_grad_(),
    )
    student, weights = head.logits(), weights_of(4)
    loss, _, gradient = computed(student.detach(), (2, 2), weights, config, block_values=4 * V)
    student.backward(gradient)
    expected = [head.states.grad, head.weight.grad]
    head.states.grad = head.weight.grad = None
    halves = [LinearOutput(head.states, part) for part in head.weight.split(2)]
    found, _ = distillation_loss(
        halves, with_levels(teacher_of(4)), codes_of(4), weights, Forbidden(FORBIDDEN, None),
        config, 4 * V, (2, 2),
    )  # fmt: skip
    found.backward()
    torch.testing.assert_close(found.detach(), loss)
    for ours, theirs in zip((head.states.grad, head.weight.grad), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_a_student_that_is_its_teacher_has_finite_gradients():
    # A square root has none where it is 0.
    config = LossConfig.model_validate(TERMS | {"joint": True})
    teacher, codes, weights = (x.flatten(0, 1) for x in (teacher_of(3), codes_of(3), weights_of(3)))
    same = teacher.nan_to_num(neginf=-5.0)
    values, gradient = joint_losses(same, teacher, codes, weights, (3,), config)
    assert (values["nrmse"] == 0).all()
    assert gradient.isfinite().all()


def test_groups_that_do_not_hold_all_streams_are_refused():
    with pytest.raises(ValueError, match=r"joint needs the groups of 3 streams, not \(2,\)"):
        distillation_loss(
            logits_of(3, 2), with_levels(teacher_of(3)), codes_of(3), weights_of(3),
            Forbidden(FORBIDDEN, None), LossConfig(joint=True), None, (2,),
        )  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of what NeMo imports
@pytest.mark.parametrize("frames", [1, 2])
def test_values_and_gradients_equal_those_of_the_installed_nemo(require, frames):
    require("nemo", "pip install 'foretell[magpie]'")
    from nemo.collections.tts.losses import magpietts_cfg_distillation as nemo

    codebooks = 3
    streams = codebooks * frames
    config = LossConfig.model_validate(TERMS | {"joint": True, "mean": "rollouts"})
    student, teacher, codes = logits_of(streams, 2), teacher_of(streams), codes_of(streams)
    loss, terms, gradient = computed(student, (streams,), weights_of(streams), config)

    leaf = student.clone().requires_grad_()
    # Of the stacked timesteps NeMo has the frames apart, in codes [B, codebooks, T·frames].
    unstacked = codes.view(B, T, frames, codebooks).permute(0, 3, 1, 2).flatten(2)
    shape = {"num_codebooks": codebooks, "num_tokens_per_codebook": V}
    shape |= {"frame_stacking_factor": frames}
    common = {
        "mask": valid().repeat_interleave(frames, 1).float(), "sample_weights": SAMPLE_WEIGHTS,
    }  # fmt: skip
    both = {"student_logits": leaf.flatten(2), "teacher_logits": teacher.flatten(2)} | common
    expected = {
        "kl": nemo.KLDivergenceLoss(**shape)(**both),
        "ce": nemo.CodesCrossEntropyLoss(**shape)(
            predicted_logits=leaf.flatten(2), target_codes=unstacked, **common
        ),
        "nrmse": nemo.NRMSELogitsLoss(**shape)(**both),
    }
    total = sum(TERMS[name] * value for name, value in expected.items())
    total.backward()
    for name, value in expected.items():
        assert float(terms[name]) / B == pytest.approx(float(value.detach()), rel=1e-5), name
    assert float(loss) / B == pytest.approx(float(total.detach()), rel=1e-5)
    torch.testing.assert_close(gradient / B, leaf.grad, atol=1e-7, rtol=1e-5)
