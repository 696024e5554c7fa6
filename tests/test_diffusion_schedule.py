"""Schedules: equal to diffusers', exact on their own times, and drawn from strata."""

from __future__ import annotations

import math

import numpy as np
import pytest
from pydantic import ValidationError

from stages.diffusion.facts import ScheduleFacts
from stages.diffusion.model_config import ScheduleConfig, TimestepsConfig
from stages.diffusion.schedule import GRID, Schedule, ddpm_facts, facts_of
from stages.errors import UserError

BETA_SCHEDULES = ["linear", "scaled_linear", "squaredcos_cap_v2"]
HINT = 'pip install "foretell[diffusion]"'


def ddpm(**settings) -> Schedule:
    return Schedule(facts_of(ScheduleConfig.model_validate(settings)))


def flow(**settings) -> Schedule:
    return ddpm(kind="flow", prediction="flow", **settings)


def arguments(facts: ScheduleFacts) -> dict:
    return {name: value for name, value in facts.scheduler.items() if not name.startswith("_")}


ALL = {
    **{f"{name}{' zero' * zero}": ddpm(beta_schedule=name, zero_terminal_snr=zero)
       for name in BETA_SCHEDULES for zero in (False, True)},
    "short": ddpm(train_timesteps=10),
    "flow": flow(),
    "flow shifted": flow(shift=3.0, train_timesteps=1000),
    "flow of other length": flow(train_timesteps=37),
}  # fmt: skip


def on(schedule: Schedule, count: int = 500) -> np.ndarray:
    """Times of a schedule, its ends included."""
    steps = schedule.facts.train_timesteps
    if schedule.facts.kind == "ddpm":
        return np.arange(-1, steps, dtype=np.float64)
    inner = schedule.draw(TimestepsConfig(), count, "times")
    return np.concatenate([[0.0, GRID], inner, [float(steps)]])


# ----------------------------------------------------------------------------------- the table


@pytest.mark.parametrize("name", BETA_SCHEDULES)
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("steps", [10, 1000])
def test_the_table_is_the_one_that_diffusers_computes(require, name, zero, steps):
    require("diffusers", HINT)
    from diffusers import DDIMScheduler, DDPMScheduler

    facts = ddpm_facts(
        ScheduleConfig(beta_schedule=name, zero_terminal_snr=zero, train_timesteps=steps)
    )
    assert facts.scheduler["_class_name"] == "DDIMScheduler"
    ddim = DDIMScheduler(**arguments(facts))
    np.testing.assert_array_equal(ddim.alphas_cumprod.numpy(), facts.alphas_cumprod)
    names = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end",
             "rescale_betas_zero_snr")  # fmt: skip
    other = DDPMScheduler(**{name: facts.scheduler[name] for name in names})
    np.testing.assert_array_equal(other.alphas_cumprod.numpy(), facts.alphas_cumprod)
    assert (facts.alphas_cumprod[-1] == 0) == zero


def test_betas_follow_their_formulas():
    # Independent of torch and of diffusers, in float64.
    steps = 1000
    linear = np.linspace(1e-4, 0.02, steps)
    scaled = np.linspace(0.00085**0.5, 0.012**0.5, steps) ** 2

    def left(t):
        return math.cos((t / steps + 0.008) / 1.008 * math.pi / 2) ** 2

    cosine = np.array([min(1 - left(t + 1) / left(t), 0.999) for t in range(steps)])
    betas = zip(BETA_SCHEDULES, (linear, scaled, cosine), strict=True)
    for name, expected in betas:
        table = np.array(ddpm(beta_schedule=name).facts.alphas_cumprod)
        np.testing.assert_allclose(table, np.cumprod(1 - expected), rtol=2e-4, err_msg=name)


def test_without_signal_at_the_end_the_first_alpha_stays():
    plain, zero = (ddpm(zero_terminal_snr=zero) for zero in (False, True))
    (a, a2), (b, b2) = (each.at(np.array([0.0, 999.0]))[0] for each in (plain, zero))
    assert b == pytest.approx(a, rel=1e-6)
    assert a2 > 0
    assert b2 == 0


@pytest.mark.parametrize(
    "table",
    [(0.9, 0.5), (0.9, 0.5, 0.5), (0.9, 0.4, 0.5), (1.0, 0.5, 0.1), (0.9, 0.5, -0.1), ()],
)
def test_what_is_no_table_of_alphas_is_refused(table):
    facts = ScheduleFacts(
        kind="ddpm", prediction="epsilon", train_timesteps=3, alphas_cumprod=table
    )
    with pytest.raises(UserError, match=f"{len(table)} values of alpha² for 3 training steps"):
        Schedule(facts)


def test_a_flow_whose_shift_leads_nowhere_is_refused():
    with pytest.raises(ValidationError, match="shift"):
        ScheduleFacts(kind="flow", prediction="flow", shift=0.0)


# --------------------------------------------------------------------------- alpha and sigma of t


@pytest.mark.parametrize("name", ALL)
def test_alpha_and_sigma_are_on_the_circle_or_on_the_line(name):
    schedule = ALL[name]
    alpha, sigma = schedule.at(on(schedule))
    whole = alpha + sigma if schedule.facts.kind == "flow" else alpha**2 + sigma**2
    np.testing.assert_allclose(whole, 1, rtol=1e-15)
    assert alpha.dtype == sigma.dtype == np.float64
    assert (alpha[0], sigma[0]) == (1, 0)
    rising = np.sort(on(schedule))
    alpha, sigma = schedule.at(rising)
    assert (np.diff(alpha) < 0).all()
    assert (np.diff(sigma) > 0).all()


def test_steps_have_the_tables_values_and_flow_the_shares():
    schedule = ALL["scaled_linear"]
    table = np.array(schedule.facts.alphas_cumprod)
    alpha, sigma = schedule.at(np.arange(1000.0))
    np.testing.assert_array_equal(alpha, np.sqrt(table))
    np.testing.assert_array_equal(sigma, np.sqrt(1 - table))
    alpha, sigma = flow(train_timesteps=500).at(np.array([[0.0, 125.0], [250.0, 500.0]]))
    np.testing.assert_array_equal(sigma, [[0, 0.25], [0.5, 1]])
    np.testing.assert_array_equal(alpha, [[1, 0.75], [0.5, 0]])


@pytest.mark.parametrize("name", ["linear", "squaredcos_cap_v2 zero", "short"])
def test_between_steps_noise_rises_and_stays_on_the_circle(name):
    schedule = ALL[name]
    t = np.linspace(-1, schedule.facts.train_timesteps - 1, 5003)
    alpha, sigma = schedule.at(t)
    np.testing.assert_allclose(alpha**2 + sigma**2, 1, rtol=1e-15)
    assert (np.diff(sigma) >= 0).all()
    assert (np.diff(alpha) < 0).all()
    half = schedule.at(np.array([1.0, 1.5, 2.0]))
    angle = np.arctan2(half[1], half[0])
    assert angle[1] == pytest.approx((angle[0] + angle[2]) / 2)


@pytest.mark.parametrize("t", [-1.001, 999.001, np.nan])
def test_a_time_off_the_schedule_is_refused(t):
    with pytest.raises(ValueError, match="must lie in"):
        ALL["linear"].at(np.array([5.0, t]))
    with pytest.raises(ValueError, match="must lie in"):
        ALL["flow"].at(np.array([5.0, t + 1.0 if t > 0 else t]))


# --------------------------------------------------------------------------------- times drawn


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("slots", [1, 8, 50])
def test_every_slot_has_its_stratum(name, slots):
    schedule = ALL[name]
    steps, shift = schedule.facts.train_timesteps, schedule.facts.shift
    edges = np.arange(slots + 1) / slots
    if schedule.facts.kind == "flow":
        edges = shift * edges / (1 + (shift - 1) * edges)
    for key in range(20):
        t = schedule.draw(TimestepsConfig(), slots, 3, "sample", key)
        assert t.dtype == np.float64
        assert t.shape == (slots,)
        if schedule.facts.kind == "flow":
            assert (t >= steps * edges[:-1] - GRID).all()
            assert (t <= steps * edges[1:] + GRID).all()
            assert (t > 0).all()
        else:
            assert (t == np.floor(t)).all()
            assert (t >= np.floor(steps * edges[:-1])).all()
            assert (t <= np.minimum(np.floor(steps * edges[1:]), steps - 1)).all()


def test_a_key_names_the_times_whoever_else_draws():
    schedule, config = ALL["linear"], TimestepsConfig()
    first = schedule.draw(config, 8, 1, "a", 0, 0)
    others = [(2, "a", 0, 0), (1, "b", 0, 0), (1, "a", 1, 0), (1, "a", 0, 1)]
    drawn = [schedule.draw(config, 8, *key) for key in others]
    np.testing.assert_array_equal(schedule.draw(config, 8, 1, "a", 0, 0), first)
    assert all((other != first).any() for other in drawn)
    assert first.tolist() == [31, 192, 288, 482, 540, 708, 761, 942]  # as in every release


def test_all_steps_are_equally_likely():
    schedule = ALL["short"]
    drawn = np.concatenate([schedule.draw(TimestepsConfig(), 3, key) for key in range(4000)])
    counts = np.bincount(drawn.astype(int), minlength=10)
    assert (np.abs(counts - 1200) < 5 * math.sqrt(1200)).all()


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-1.0, 0.5), (1.0, 2.0)])
def test_logit_normal_shares_have_normal_logits(mean, std):
    schedule = ALL["flow"]
    config = TimestepsConfig(distribution="logit_normal", mean=mean, std=std)
    share = np.concatenate([schedule.draw(config, 64, key) for key in range(64)]) / 1000
    logits = np.sort((np.log(share / (1 - share)) - mean) / std)
    exact = np.array([0.5 * math.erfc(-each / math.sqrt(2)) for each in logits])
    # Strata lie closer to the distribution than chance: within 1/64 anyway.
    assert np.abs(exact - (np.arange(len(logits)) + 0.5) / len(logits)).max() < 0.01


@pytest.mark.parametrize("distribution", ["uniform", "logit_normal"])
@pytest.mark.parametrize(("low", "high"), [(0.0, 0.25), (0.4, 0.6), (0.9, 1.0)])
def test_a_range_of_the_schedule_is_kept_and_filled(distribution, low, high):
    config = TimestepsConfig(distribution=distribution, low=low, high=high, std=3.0)
    for name in ("flow", "linear"):
        drawn = np.concatenate([ALL[name].draw(config, 16, key) for key in range(64)])
        assert drawn.min() >= 1000 * low
        assert drawn.max() <= 1000 * high
        assert drawn.min() < 1000 * low + 5
        assert drawn.max() > 1000 * high - 5


def test_the_shift_moves_flow_times_towards_noise():
    plain, shifted = (
        schedule.draw(TimestepsConfig(), 32, "same")
        for schedule in (flow(), flow(shift=3.0))
    )  # fmt: skip
    share = plain / 1000
    np.testing.assert_allclose(shifted, 1000 * 3 * share / (1 + 2 * share), atol=2 * GRID)


def test_extreme_distributions_stay_on_the_schedule():
    for mean in (-1e4, 1e4):
        config = TimestepsConfig(distribution="logit_normal", mean=mean, std=1.0)
        for schedule in ALL.values():
            t = schedule.draw(config, 4, mean)
            alpha, sigma = schedule.at(t)
            assert (sigma > 0).all()
            assert (alpha < 1).all()


def test_a_model_of_epsilon_is_never_asked_where_there_is_no_signal():
    zero = ALL["linear zero"].facts
    epsilon = Schedule(zero.model_copy(update={"prediction": "epsilon"}))
    config = TimestepsConfig(low=0.99)
    drawn = np.concatenate([epsilon.draw(config, 4, key) for key in range(50)])
    assert drawn.max() == 998
    velocity = np.concatenate([ALL["linear zero"].draw(config, 4, key) for key in range(50)])
    assert velocity.max() == 999


# ------------------------------------------------------------------------------ times of a solver


@pytest.mark.parametrize("known", [1, 7, 100, 1000])
def test_ddpm_is_solved_at_diffusers_trailing_steps(require, known):
    require("diffusers", HINT)
    from diffusers import DDIMScheduler

    schedule = ddpm(train_timesteps=known)
    theirs = DDIMScheduler(num_train_timesteps=known, timestep_spacing="trailing")
    for steps in range(1, known + 1):
        theirs.set_timesteps(steps)
        times = schedule.solver_times(steps)
        assert times.shape == (steps + 1,)
        # Of some numbers of steps diffusers has one more, -1, because its range ends inexactly.
        np.testing.assert_array_equal(times[:-1], theirs.timesteps.numpy()[:steps])
        assert (np.diff(times) < 0).all()
        assert schedule.at(times)[1][-1] == 0


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
@pytest.mark.parametrize("known", [100, 1000])
def test_flow_is_solved_at_diffusers_sigmas(require, shift, known):
    require("diffusers", HINT)
    from diffusers import FlowMatchEulerDiscreteScheduler

    schedule = flow(shift=shift, train_timesteps=known)
    assert schedule.facts.scheduler["_class_name"] == "FlowMatchEulerDiscreteScheduler"
    theirs = FlowMatchEulerDiscreteScheduler(**arguments(schedule.facts))
    for steps in (1, 2, 4, 28, known):
        theirs.set_timesteps(steps)
        times = schedule.solver_times(steps)
        np.testing.assert_allclose(times[:-1], theirs.timesteps.numpy(), rtol=1e-6)
        np.testing.assert_allclose(schedule.at(times)[1], theirs.sigmas.numpy(), rtol=1e-6)
        assert (times[0], times[-1]) == (known, 0)


def test_flow_that_shifts_by_size_is_solved_as_its_pipelines_ask(require):
    require("diffusers", HINT)
    from diffusers import FlowMatchEulerDiscreteScheduler

    theirs = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    mu, steps = 1.15, 28
    theirs.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    facts = flow(shift=math.exp(mu)).facts
    schedule = Schedule(facts.model_copy(update={"scheduler": dict(theirs.config)}))
    times = schedule.solver_times(steps)
    np.testing.assert_allclose(times[:-1], theirs.timesteps.numpy(), rtol=1e-6)


def test_more_steps_than_the_model_has_are_refused():
    with pytest.raises(UserError, match="11 solver steps for a model of 10 training steps"):
        ALL["short"].solver_times(11)


# ------------------------------------------------------------------------------ another's rows


@pytest.mark.parametrize("name", ALL)
def test_rows_of_the_same_schedule_keep_their_numbers_exactly(name):
    schedule = ALL[name]
    for t in (on(schedule), schedule.solver_times(10)):
        alpha, sigma = schedule.at(t)
        scale, own_alpha, own_sigma, own_t = schedule.place(alpha, sigma)
        np.testing.assert_array_equal(own_t, t)
        np.testing.assert_array_equal(scale, 1)
        np.testing.assert_array_equal(own_alpha, alpha)
        np.testing.assert_array_equal(own_sigma, sigma)


@pytest.mark.parametrize("source", ALL)
@pytest.mark.parametrize("wanted", ["linear zero", "squaredcos_cap_v2 zero", "flow"])
def test_rows_of_another_schedule_get_the_time_of_equal_signal_and_noise(source, wanted):
    here, there = ALL[source], ALL[wanted]
    alpha, sigma = here.at(on(here))
    scale, own_alpha, own_sigma, t = there.place(alpha, sigma)
    np.testing.assert_allclose(own_alpha * sigma, own_sigma * alpha, atol=1e-15)
    np.testing.assert_allclose(own_alpha, scale * alpha, rtol=1e-15)
    expected = there.at(t)
    # Times lie on a grid; so fine that the difference is below that of float32.
    np.testing.assert_allclose(own_alpha, expected[0], atol=1e-8)
    np.testing.assert_allclose(own_sigma, expected[1], atol=1e-8)
    assert ((t >= -1) & (t <= there.facts.train_timesteps)).all()


def test_a_row_that_goes_to_flow_and_back_is_where_it_was():
    here, there = ALL["scaled_linear"], ALL["flow"]
    t = np.arange(1000.0)
    alpha, sigma = here.at(t)
    scale, *pair, _ = there.place(alpha, sigma)
    back, alpha2, sigma2, t2 = here.place(*pair)
    np.testing.assert_allclose(t2, t, atol=2 * GRID)
    np.testing.assert_allclose(scale * back, 1, rtol=1e-14)
    np.testing.assert_allclose(alpha2, alpha, rtol=1e-14)
    np.testing.assert_allclose(sigma2, sigma, rtol=1e-14)


def test_rows_beyond_the_table_have_the_time_of_its_ends():
    schedule = ALL["scaled_linear"]
    least = schedule.at(np.array([0.0]))[1][0]
    alpha, sigma = np.array([0.0, 1.0, 1.0]), np.array([1.0, 0.0, 0.5 * least])
    scale, own_alpha, own_sigma, t = schedule.place(alpha, sigma)
    assert t[0] == 999
    assert t[1] == -1
    assert -1 < t[2] < 0
    assert (own_alpha[0], own_sigma[0]) == (0, 1)
    assert (own_alpha[1], own_sigma[1]) == (1, 0)
    assert scale[2] < 1


# -------------------------------------------------------------------------------------- identity


def test_the_digest_is_of_what_a_time_means():
    base = ddpm().facts
    same = [
        base.model_copy(update={"prediction": "epsilon"}),
        base.model_copy(update={"scheduler": {}}),
    ]
    assert {Schedule(facts).digest() for facts in same} == {Schedule(base).digest()}
    table = (*base.alphas_cumprod[:-1], base.alphas_cumprod[-1] / 2)
    other = [
        base.model_copy(update={"alphas_cumprod": table}),
        ddpm(zero_terminal_snr=True).facts,
        ddpm(beta_schedule="linear").facts,
        ddpm(train_timesteps=999).facts,
        flow().facts,
        flow(train_timesteps=999).facts,
    ]
    digests = {Schedule(facts).digest() for facts in (base, *other)}
    assert len(digests) == len(other) + 1
    assert flow(shift=3.0).digest() == flow().digest()
    assert len(Schedule(base).digest()) == 64
