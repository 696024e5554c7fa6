"""Losses against independent formulas in fp64, their gradients, and what they must not read."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from stages.loss_config import LossConfig
from stages.losses import cross_entropy, distillation_loss, element_weights, kl_divergence
from stages.targets import DenseTarget, Forbidden, SparseTarget
from tests.stored_targets import ALLOWED, FORBIDDEN, TARGETS, B, C, Scene, T, V, scene, softmax

Tensor = torch.Tensor
CATEGORICAL = [kind for kind in TARGETS if not kind.startswith("dense")]
DISTRIBUTIONS = [kind for kind in CATEGORICAL if kind != "sampled"]
DIVERGENCES = ("kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd")
LENGTHS = torch.tensor([5, 2, 4])


def config_of(**terms: float) -> LossConfig:
    return LossConfig.model_validate({"kl": 0.0} | terms)


def student_of(kind: str, seed: int = 9, spread: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (B, T, C, 4, 3) if kind.startswith("dense") else (B, T, C, V)
    return spread * torch.randn(*shape, generator=generator)


CODES = (torch.arange(B * T * C).reshape(B, T, C) * 7) % 32


def weights_of(lengths=LENGTHS, rollout=(1.0, 0.1, 0.5), streams=(1.0, 0.3)) -> Tensor:
    return element_weights(lengths, torch.tensor(rollout), torch.tensor(streams), T)


def computed(made: Scene, student: Tensor, config: LossConfig, **changes):
    """Loss, terms and gradient of the code under test."""
    leaf = student.clone().requires_grad_()
    given = {"codes": CODES, "element_weights": weights_of(), "target": made.target()} | changes
    loss, terms = distillation_loss(
        leaf, given["target"], given["codes"], given["element_weights"], made.forbidden, config,
        given.get("block_values"),
    )  # fmt: skip
    loss.backward()
    return loss.detach(), terms, leaf.grad


# References: fp64, plain definitions, gradients by autograd over the whole tensor at once.


def log_student(student: Tensor, temperature: float) -> Tensor:
    masked = student.clone()
    masked[..., list(FORBIDDEN)] = -torch.inf
    return (masked / temperature).log_softmax(-1)


def categories(made: Scene) -> Tensor:
    """[B, T, C, M, V] fp64, 1 where an id belongs to a category.

    One category per allowed id, or one per kept id and, last, one for the others.
    """
    if "ids" not in made.arrays:
        return torch.eye(V, dtype=torch.float64)[ALLOWED].expand(B, T, C, -1, -1)
    ids = torch.from_numpy(made.arrays["ids"].astype(np.int64))
    kept = torch.nn.functional.one_hot(ids, V).double()
    rest = 1.0 - kept.sum(-2, keepdim=True)
    rest[..., list(FORBIDDEN)] = 0.0
    return torch.cat([kept, rest], -2)


def reference_divergence(name: str, p: Tensor, q: Tensor, config: LossConfig) -> Tensor:
    beta, alpha = config.jsd_beta, config.skew_alpha

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a / b).log()).sum(-1)

    middle = beta * p + (1 - beta) * q
    formulas: dict[str, Callable[[], Tensor]] = {
        "kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "jsd": lambda: beta * kl(p, middle) + (1 - beta) * kl(q, middle),
        "skew_kl": lambda: kl(p, alpha * p + (1 - alpha) * q),
        "skew_reverse_kl": lambda: kl(q, (1 - alpha) * p + alpha * q),
        "tvd": lambda: 0.5 * (p - q).abs().sum(-1),
    }
    return formulas[name]()


def reference_term(name: str, made: Scene, student: Tensor, config: LossConfig) -> Tensor:
    """[B, T, C] fp64, differentiable."""
    if name in DIVERGENCES:
        groups, temperature = categories(made), config.temperature
        teacher = torch.tensor(made.probabilities(temperature))
        p = torch.einsum("...mv,...v->...m", groups, teacher)
        q = torch.einsum("...mv,...v->...m", groups, log_student(student, temperature).exp())
        return temperature**2 * reference_divergence(name, p, q, config)
    if name == "mse":
        return (student - torch.tensor(made.logits)).square().flatten(3).mean(-1)
    if name in ("nrmse", "logit_mse"):
        return reference_error(name, made, student)
    return reference_draws(name, made, log_student(student, 1.0))


def stored_ids(made: Scene, name: str = "ids") -> Tensor:
    return torch.from_numpy(made.arrays[name].astype(np.int64))


def reference_draws(name: str, made: Scene, log_q: Tensor) -> Tensor:
    if name == "ce":
        return -log_q.gather(-1, CODES.unsqueeze(-1)).squeeze(-1)
    if name == "soft_ce":
        counts = torch.nn.functional.one_hot(stored_ids(made), V).sum(-2)
        return -(counts / counts.sum(-1, keepdim=True) * log_q.nan_to_num(neginf=0.0)).sum(-1)
    rest = categories(made)[..., -1, :]
    p_tail = (rest * torch.tensor(made.probabilities())).sum(-1)
    log_rest = (rest * log_q.exp()).sum(-1).log()
    within = log_q.gather(-1, stored_ids(made, "tail_ids")) - log_rest.unsqueeze(-1)
    return -p_tail * within.mean(-1)


def reference_error(name: str, made: Scene, student: Tensor) -> Tensor:
    teacher = torch.tensor(made.logits)
    ours, theirs = student[..., ALLOWED], teacher[..., ALLOWED]
    std = theirs.std(-1, correction=0)
    if "ids" in made.arrays:
        kept = teacher.gather(-1, stored_ids(made))
        if name == "logit_mse":
            ours, theirs = student.gather(-1, stored_ids(made)), kept
        else:
            total = theirs.sum(-1, keepdim=True) - kept.sum(-1, keepdim=True)
            flat = (total / (len(ALLOWED) - kept.shape[-1])).expand(B, T, C, V)
            theirs = flat.scatter(-1, stored_ids(made), kept)[..., ALLOWED]
    error = ours - theirs
    square = (error - error.mean(-1, keepdim=True)).square().mean(-1)
    return square if name == "logit_mse" else square.sqrt() / std


def reference(made: Scene, student: Tensor, config: LossConfig, weights: Tensor):
    """Terms, loss and gradient in fp64."""
    leaf = student.double().clone().requires_grad_()
    sums = {
        name: torch.where(weights > 0, weights * reference_term(name, made, leaf, config), 0).sum()
        for name in config.terms
    }
    loss = sum(config.terms[name] * value for name, value in sums.items())
    loss.backward()
    return float(loss.detach()), {n: float(v.detach()) for n, v in sums.items()}, leaf.grad


def assert_equals_reference(kind: str, config: LossConfig, dtype: str = "float32") -> None:
    made, student = scene(kind, dtype=dtype), student_of(kind)
    loss, terms, gradient = computed(made, student, config)
    expected_loss, expected_terms, expected = reference(made, student, config, weights_of())
    assert {name: float(value) for name, value in terms.items()} == pytest.approx(
        expected_terms, rel=2e-5
    )
    assert float(loss) == pytest.approx(expected_loss, rel=2e-5)
    torch.testing.assert_close(gradient.double(), expected, atol=6e-6, rtol=2e-5)
    assert gradient.abs().max() > 1e-3


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_a_divergence_and_its_gradient_equal_the_definition(kind, name):
    assert_equals_reference(kind, config_of(**{name: 0.7}))


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("temperature", [0.5, 3.0])
@pytest.mark.parametrize("kind", ["top_k", "full", "hidden_both"])
def test_a_temperature_counts_with_its_square_exactly_once(kind, temperature, name):
    assert_equals_reference(kind, config_of(temperature=temperature, **{name: 1.0}))


@pytest.mark.parametrize("kind", CATEGORICAL)
def test_the_cross_entropy_with_the_drawn_code_and_its_gradient_equal_the_definition(kind):
    assert_equals_reference(kind, config_of(ce=1.5))


def test_the_cross_entropy_with_stored_draws_and_its_gradient_equal_the_definition():
    assert_equals_reference("sampled", config_of(soft_ce=0.8, ce=0.3))


@pytest.mark.parametrize("share", [0.1, 1.0])
def test_the_shape_of_the_tail_and_its_gradient_equal_the_definition(share):
    assert_equals_reference("top_k_tail", config_of(kl=0.9, tail_share=share, ce=0.2))


@pytest.mark.parametrize("name", ["nrmse", "logit_mse"])
@pytest.mark.parametrize("kind", ["top_k", "full", "full_both", "hidden", "hidden_both"])
def test_an_error_of_the_logits_and_its_gradient_equal_the_definition(kind, name):
    assert_equals_reference(kind, config_of(**{name: 1.3}))


@pytest.mark.parametrize("kind", ["dense", "dense_both"])
def test_an_error_of_continuous_predictions_and_its_gradient_equal_the_definition(kind):
    assert_equals_reference(kind, config_of(mse=1.3))


EVERYTHING = {
    "top_k": config_of(
        kl=1.0, reverse_kl=0.2, jsd=0.3, jsd_beta=0.3, skew_kl=0.4, skew_reverse_kl=0.5,
        skew_alpha=0.2, tvd=0.6, ce=0.7, nrmse=0.8, logit_mse=0.01, temperature=3.0,
    ),
    "top_k_tail": config_of(kl=1.0, tail_share=0.5, jsd=0.3, ce=0.7, logit_mse=0.02),
    "sampled": config_of(ce=0.3, soft_ce=0.8),
    "dense_both": config_of(mse=2.0),
}  # fmt: skip
EVERYTHING |= dict.fromkeys(("full", "full_both", "hidden", "hidden_both"), EVERYTHING["top_k"])
EVERYTHING["dense"] = EVERYTHING["dense_both"]


@pytest.mark.parametrize("kind", TARGETS)
def test_all_terms_together_are_their_weighted_sum(kind):
    assert_equals_reference(kind, EVERYTHING[kind])


@pytest.mark.parametrize("kind", [kind for kind in TARGETS if kind != "sampled"])
def test_targets_stored_in_half_precision_teach_exactly_what_rounding_left(kind):
    arrays = scene(kind, dtype="float16").arrays
    assert any(array.dtype == np.float16 for array in arrays.values())
    assert_equals_reference(kind, EVERYTHING[kind], "float16")


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_divergences_and_drawn_codes_share_one_pass_at_temperature_1(kind):
    assert_equals_reference(kind, config_of(kl=1.0, jsd=0.3, ce=0.7))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("kind", ["full", "hidden"])
def test_the_reverse_divergence_may_be_taken_over_the_students_own_ids(kind, temperature):
    made, student = scene(kind), student_of(kind)
    settings = {"reverse_kl_top_k": 4, "temperature": temperature}
    config = config_of(reverse_kl=1.0, kl=0.5, nrmse=0.2, **settings)
    loss, _, gradient = computed(made, student, config)
    leaf = student.double().clone().requires_grad_()
    q = log_student(leaf, temperature).exp()
    p = torch.tensor(made.probabilities(temperature))
    ids = q.topk(4).indices
    q_cut, p_cut = (
        torch.cat([x.gather(-1, ids), 1 - x.gather(-1, ids).sum(-1, keepdim=True)], -1)
        for x in (q, p)
    )
    reverse = temperature**2 * (q_cut * (q_cut / p_cut).log()).sum(-1)
    forward = reference_term("kl", made, leaf, config)
    error = reference_term("nrmse", made, leaf, config)
    expected = (weights_of() * (reverse + 0.5 * forward + 0.2 * error)).sum()
    expected.backward()
    assert float(loss) == pytest.approx(float(expected.detach()), rel=2e-5)
    torch.testing.assert_close(gradient.double(), leaf.grad, atol=6e-6, rtol=2e-5)


@pytest.mark.parametrize("kind", TARGETS)
def test_the_size_of_the_blocks_changes_nothing(kind):
    made, student = scene(kind), student_of(kind)
    one, _, whole = computed(made, student, EVERYTHING[kind], block_values=2**20)
    # The heads of hidden targets multiply other numbers of rows at a time, which round otherwise.
    slack = 10 if "hidden" in kind else 1
    for values in (1, 2 * C * V, 5 * C * V):
        loss, _, gradient = computed(made, student, EVERYTHING[kind], block_values=values)
        torch.testing.assert_close(loss, one, rtol=1e-6 * slack, atol=0)
        torch.testing.assert_close(gradient, whole, rtol=1e-5, atol=1e-7 * slack)


class Largest(TorchDispatchMode):
    """Counts the tensors of at least `numel` elements that any operation makes."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.found = numel, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        outputs = made if isinstance(made, tuple | list) else (made,)
        known = [a for a in args if isinstance(a, torch.Tensor)]
        storages = {a.untyped_storage().data_ptr() for a in known}
        large = [o for o in outputs if isinstance(o, torch.Tensor) and o.numel() >= self.numel]
        new = [o for o in large if o.untyped_storage().data_ptr() not in storages]
        self.found += [(str(func), output.dtype) for output in new]
        return made


@pytest.mark.parametrize("kind", CATEGORICAL)
def test_of_all_logits_at_once_only_the_gradient_is_made_and_in_their_own_type(kind):
    made, student = scene(kind), student_of(kind).bfloat16().requires_grad_()
    target = made.target()
    with Largest(student.numel() // 2) as largest:
        loss, _ = distillation_loss(
            student, target, CODES, weights_of(), made.forbidden, EVERYTHING[kind], C * V
        )
        loss.backward()
    assert [dtype for _, dtype in largest.found] == [torch.bfloat16], largest.found


class Asked(TorchDispatchMode):
    """Counts how often a number is asked of the device, which then is waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.times = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.times += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", TARGETS)
def test_the_device_is_asked_as_often_for_many_blocks_as_for_one(kind):
    made, student, times = scene(kind), student_of(kind), []
    for values in (1, 2**20):
        with torch.no_grad(), Asked() as asked:
            distillation_loss(
                student, made.target(), CODES, weights_of(), made.forbidden, EVERYTHING[kind],
                values,
            )  # fmt: skip
        times.append(asked.times)
    assert times[0] == times[1]


def poisoned(made: Scene, lengths: Tensor) -> Scene:
    """The same targets with NaN, or ids that do not exist, beyond the end of every rollout."""
    beyond = np.arange(T) >= lengths.numpy()[:, None]
    arrays = {name: array.copy() for name, array in made.arrays.items()}
    for array in arrays.values():
        array[beyond] = np.nan if array.dtype.kind == "f" else np.iinfo(array.dtype).max
    return Scene(made.manifest, arrays, made.heads, made.logits)


@pytest.mark.parametrize("kind", TARGETS)
def test_nan_beyond_the_end_reaches_neither_loss_nor_gradient_and_without_the_mask_it_does(kind):
    made, student, config = scene(kind), student_of(kind), EVERYTHING[kind]
    expected, _, clean = computed(made, student, config)
    beyond = torch.arange(T) >= LENGTHS.unsqueeze(1)
    dirty, codes = student.clone(), CODES.clone()
    dirty[beyond], codes[beyond] = torch.nan, 2**40
    bad = poisoned(made, LENGTHS)
    found, _, gradient = computed(bad, dirty, config, codes=codes)
    assert torch.equal(found, expected)
    assert torch.equal(gradient, clean)
    assert (gradient[beyond] == 0).all()
    everywhere = weights_of(torch.full((B,), T))
    if kind != "sampled":  # whose ids have no NaN to show
        dirty[beyond] = 0.0
        made_nan = bad.target()
        if "ids" in bad.arrays:
            bad.arrays["ids"][beyond.numpy()] = 0
            if "tail_ids" in bad.arrays:
                bad.arrays["tail_ids"][beyond.numpy()] = 0
            made_nan = bad.target()
        loss, _, _ = computed(made, dirty, config, target=made_nan, element_weights=everywhere)
        assert loss.isnan()


def test_a_stream_without_weight_is_not_read_though_its_timestep_counts():
    made, student, config = scene("top_k"), student_of("top_k"), EVERYTHING["top_k"]
    weights = weights_of(streams=(1.0, 0.0))
    expected, _, clean = computed(made, student, config, element_weights=weights)
    student[:, :, 1] = torch.nan
    found, _, gradient = computed(made, student, config, element_weights=weights)
    assert torch.equal(found, expected)
    assert torch.equal(gradient, clean)
    assert (gradient[:, :, 1] == 0).all()


def test_rollouts_one_by_one_give_the_gradient_of_the_whole_batch():
    # A mean per rollout, or over padded positions, would weigh short rollouts differently.
    made, student, config = scene("top_k"), student_of("top_k"), EVERYTHING["top_k"]
    weights = weights_of()
    _, _, whole = computed(made, student, config)
    for row, length in enumerate(LENGTHS.tolist()):
        cut = (slice(row, row + 1), slice(length))
        arrays = {name: array[cut] for name, array in made.arrays.items()}
        part = Scene(made.manifest, arrays, {}, made.logits[cut])
        _, _, gradient = computed(
            part, student[cut], config, codes=CODES[cut], element_weights=weights[cut]
        )
        torch.testing.assert_close(gradient, whole[cut], atol=1e-8, rtol=1e-5)


def test_a_batch_whose_rollouts_all_weigh_nothing_has_no_loss_and_no_gradient():
    made, config = scene("top_k"), EVERYTHING["top_k"]
    nothing = weights_of(rollout=(0.0, 0.0, 0.0))
    loss, terms, gradient = computed(made, student_of("top_k"), config, element_weights=nothing)
    assert loss == 0
    assert set(terms) == set(config.terms)
    assert (gradient == 0).all()


@pytest.mark.parametrize("kind", CATEGORICAL)
def test_half_precision_logits_are_lifted_before_anything_is_summed(kind):
    made, half, config = scene(kind), student_of(kind).bfloat16(), EVERYTHING[kind]
    loss, _, gradient = computed(made, half, config)
    single, _, expected = computed(made, half.float(), config)
    assert loss.dtype == torch.float32
    assert loss == single
    assert torch.equal(gradient, expected.bfloat16())


@pytest.mark.parametrize("kind", ["hidden", "full_both", "top_k"])
def test_autocast_lowers_nothing_inside_the_loss(kind):
    made, student, config = scene(kind), student_of(kind), EVERYTHING[kind]
    expected, _, plain = computed(made, student, config)
    with torch.autocast("cpu", torch.bfloat16):
        found, _, gradient = computed(made, student, config)
    assert torch.equal(found, expected)
    assert torch.equal(gradient, plain)


def test_logits_that_do_not_lie_in_one_piece_give_the_same():
    made, student, config = scene("top_k"), student_of("top_k"), EVERYTHING["top_k"]
    expected, _, plain = computed(made, student, config)
    wide = torch.zeros(B, C, T, V + 3).transpose(1, 2)[..., :V].copy_(student)
    found, _, gradient = computed(made, wide, config)
    assert torch.equal(found, expected)
    assert torch.equal(gradient, plain)


def test_a_loss_is_differentiated_once_and_scales_with_what_it_is_divided_by():
    made, student, config = scene("top_k"), student_of("top_k"), EVERYTHING["top_k"]
    _, _, plain = computed(made, student, config)
    leaf = student.clone().requires_grad_()
    loss, terms = distillation_loss(
        leaf, made.target(), CODES, weights_of(), made.forbidden, config
    )
    assert not any(term.requires_grad for term in terms.values())
    (loss / 4).backward(retain_graph=True)
    torch.testing.assert_close(leaf.grad, plain / 4)
    with pytest.raises(RuntimeError, match="differentiated once"):
        loss.backward()


def test_without_gradients_the_same_loss_is_computed():
    made, student, config = scene("hidden"), student_of("hidden"), EVERYTHING["hidden"]
    expected, _, _ = computed(made, student, config)
    with torch.inference_mode():
        loss, _ = distillation_loss(
            student, made.target(), CODES, weights_of(), made.forbidden, config
        )
    assert loss == expected


@pytest.mark.parametrize("kind", CATEGORICAL)
def test_forbidden_ids_of_the_student_take_no_mass_and_no_gradient(kind):
    made, student, config = scene(kind), student_of(kind), EVERYTHING[kind]
    quiet, _, _ = computed(made, student, config)
    loud = student.index_fill(-1, torch.tensor(FORBIDDEN), 80.0)
    found, _, gradient = computed(made, loud, config)
    assert torch.equal(quiet, found)
    assert (gradient[..., list(FORBIDDEN)] == 0).all()
    assert gradient.isfinite().all()


def test_ids_beyond_the_vocabulary_of_a_stream_take_no_mass_and_no_gradient():
    made = scene("full")
    streams = list(made.manifest.streams)
    streams[1] = streams[1].model_copy(update={"vocabulary": V - 4})
    manifest = made.manifest.model_copy(update={"streams": tuple(streams)})
    logits = made.arrays["logits"].copy()
    logits[:, :, 1, V - 4 :] = -np.inf
    short = Scene(manifest, {"logits": logits}, {}, made.logits)
    student, config = student_of("full"), config_of(kl=1.0, reverse_kl=1.0, nrmse=1.0, logit_mse=1)
    quiet, _, gradient = computed(short, student, config)
    assert gradient.isfinite().all()
    assert (gradient[:, :, 1, V - 4 :] == 0).all()
    student[:, :, 1, V - 4 :] = 60.0
    assert torch.equal(computed(short, student, config)[0], quiet)


@pytest.mark.parametrize("kind", ["top_k", "full", "hidden"])
def test_a_student_that_agrees_has_no_loss_and_no_gradient_though_it_differs_by_a_constant(kind):
    made = scene(kind)
    student = torch.tensor(made.logits).nan_to_num(neginf=0.0).float() + 5.0
    # The total variation has no gradient there that is not noise: its sign is.
    config = config_of(**dict.fromkeys(DIVERGENCES[:-1], 1.0))
    loss, _, gradient = computed(made, student, config)
    assert loss.abs() < 5e-5
    assert gradient.abs().max() < 5e-6


def test_a_student_sharper_than_its_teacher_is_not_rewarded_for_leaving_the_tail_out():
    # Truncated without a tail, this loss is negative on half of such rows.
    made = scene("top_k")
    student = 1.5 * torch.tensor(made.logits).nan_to_num(neginf=0.0).float()
    masked = made.forbidden.fill_(student)
    everything = made.target().rows(torch.arange(B * T))
    assert (kl_divergence(masked.flatten(0, 1), everything) > 1e-4).all()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_full_divergence_is_the_sparse_one_and_what_happens_within_the_tail(temperature):
    # Chain rule: KL(p‖q) = L + p_o KL(p(.|tail) ‖ q(.|tail)), so L never exceeds it.
    made, student = scene("top_k"), student_of("top_k")
    rows = made.target().rows(torch.arange(B * T))
    masked = made.forbidden.fill_(student.clone()).flatten(0, 1)
    sparse = kl_divergence(masked, rows, temperature).double().numpy()
    p = made.probabilities(temperature).reshape(-1, C, V)
    q = log_student(student.double(), temperature).exp().numpy().reshape(-1, C, V)
    full, within = np.zeros(sparse.shape), np.zeros(sparse.shape)
    for place in np.ndindex(*sparse.shape):
        ids = rows.ids[place].tolist()
        tail = [i for i in ALLOWED if i not in ids]
        a, b = p[place], q[place]
        full[place] = (a[ALLOWED] * np.log(a[ALLOWED] / b[ALLOWED])).sum()
        a_tail, b_tail = a[tail] / a[tail].sum(), b[tail] / b[tail].sum()
        within[place] = a[tail].sum() * (a_tail * np.log(a_tail / b_tail)).sum()
    np.testing.assert_allclose(sparse + temperature**2 * within, temperature**2 * full, rtol=2e-5)
    assert (sparse >= 0).all()
    assert (sparse <= temperature**2 * full).all()


def test_cross_entropy_is_minus_the_log_probability_of_the_code():
    student = student_of("full")
    expected = -log_student(student.double(), 1.0).gather(-1, CODES.unsqueeze(-1)).squeeze(-1)
    masked = Forbidden(torch.tensor(FORBIDDEN), None).fill_(student.clone())
    torch.testing.assert_close(cross_entropy(masked, CODES).double(), expected, rtol=1e-5, atol=0)


# Extremes. The reference is computed in fp64 with logsumexp over explicit categories.


def single_row(teacher: np.ndarray, k: int) -> tuple[SparseTarget, np.ndarray]:
    """A top-k target of logits [V] and its ids."""
    ids = np.sort(np.argsort(-teacher)[:k])
    outside = np.delete(teacher, ids)
    tail = np.logaddexp.reduce(outside) - np.logaddexp.reduce(teacher)
    target = SparseTarget(
        torch.from_numpy(ids)[None, None],
        torch.from_numpy(teacher[ids] - teacher.max()).float()[None, None],
        torch.tensor([[[tail]]], dtype=torch.float32),
        (1.0,),
    )
    return target, ids


def exact(teacher: np.ndarray, student: np.ndarray, ids: np.ndarray) -> float:
    """KL over ids and the rest, in fp64 and in logarithms throughout."""

    def logs(x: np.ndarray) -> np.ndarray:
        rest = np.logaddexp.reduce(np.delete(x, ids))
        return np.append(x[ids], rest) - np.logaddexp.reduce(x)

    p, q = logs(teacher), logs(student)
    return float((np.exp(p) * (p - q)).sum())


@settings(max_examples=60)
@given(
    gap=st.floats(0.0, 60.0),
    student_gap=st.floats(0.0, 60.0),
    k=st.integers(1, 5),
    seed=st.integers(0, 1000),
)
def test_a_tail_from_next_to_nothing_to_nearly_everything_teaches_what_it_should(
    gap, student_gap, k, seed
):
    # At 60 nats the tail's mass is e^-60, about 1e-26: 1 − P would be 0 in fp32 and in fp64.
    random = np.random.default_rng(seed)
    teacher, student = (np.float32(random.normal(size=V)) for _ in range(2))
    ids = np.sort(np.argsort(-teacher)[:k])
    teacher[ids] += np.float32(gap)
    student[ids] += np.float32(student_gap)
    target, ids = single_row(teacher.astype(np.float64), k)
    found = kl_divergence(torch.from_numpy(student)[None, None], target)
    expected = exact(teacher.astype(np.float64), student.astype(np.float64), ids)
    assert float(found) == pytest.approx(expected, rel=1e-4, abs=3e-6)


@pytest.mark.parametrize("kept", [1e-7, 1e-5, 1 - 1e-5, 1 - 1e-12, 1.0])
def test_a_kept_mass_near_nothing_or_everything_keeps_gradients_finite_and_right(kept):
    tail = math.log1p(-kept) if kept < 1 else -69.0  # p_o = 1e-30
    target = SparseTarget(
        torch.tensor([[[[0, 1]]]]), torch.tensor([[[[0.0, -1.0]]]]),
        torch.tensor([[[[tail]]]]), (1.0,),
    )  # fmt: skip
    student = torch.zeros(1, 1, 1, 6, requires_grad=True)
    config = config_of(kl=1.0, reverse_kl=1.0, jsd=1.0, skew_kl=1.0, skew_reverse_kl=1.0, tvd=1.0)
    nothing = Forbidden(torch.empty(0, dtype=torch.int64), None)
    where = torch.zeros(1, 1, 1, dtype=torch.int64), torch.ones(1, 1, 1)
    loss, terms = distillation_loss(student, target, *where, nothing, config)
    loss.backward()
    assert all(term.isfinite() for term in terms.values())
    assert student.grad.isfinite().all()
    student.grad = None
    distillation_loss(student, target, *where, nothing, config_of(kl=1.0))[0].backward()
    p_tail = math.exp(tail)
    first = 1 / (1 + math.exp(-1.0))
    p = [(1 - p_tail) * first, (1 - p_tail) * (1 - first)]
    q_tail = 4 / 6
    expected = [1 / 6 - p[0], 1 / 6 - p[1], *[(q_tail - p_tail) / 4] * 4]
    assert student.grad.flatten().tolist() == pytest.approx(expected, abs=2e-7)


@settings(max_examples=40)
@given(
    kind=st.sampled_from(["top_k", "full", "hidden", "sampled"]),
    spread=st.sampled_from([1e-3, 1.0, 30.0, 1e4]),
    seed=st.integers(0, 100),
)
def test_an_extreme_student_gives_finite_losses_and_gradients(kind, spread, seed):
    made, student = scene(kind), student_of(kind, seed, spread)
    loss, terms, gradient = computed(made, student, EVERYTHING[kind])
    assert all(term.isfinite() for term in terms.values())
    assert loss.isfinite()
    assert gradient.isfinite().all()


def test_keeping_every_allowed_id_equals_the_dense_loss_and_gradient():
    teacher = scene("full").logits.astype(np.float32)
    everything = SparseTarget(
        torch.tensor(ALLOWED).expand(B, T, C, -1),
        torch.from_numpy(teacher[..., ALLOWED]),
        torch.full((B, T, C, 1), -torch.inf),
        (1.0,),
    )
    dense = DenseTarget(torch.from_numpy(teacher))
    config = config_of(**dict.fromkeys(DIVERGENCES, 1.0))
    made, student = scene("full"), student_of("full")
    sparse_loss, _, sparse_gradient = computed(made, student, config, target=everything)
    dense_loss, _, dense_gradient = computed(made, student, config, target=dense)
    torch.testing.assert_close(sparse_loss, dense_loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(sparse_gradient, dense_gradient, atol=1e-6, rtol=1e-4)
    assert softmax(teacher).max() > 0.1
