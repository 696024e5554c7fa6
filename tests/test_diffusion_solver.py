"""The solver: DDIM and Euler step for step as diffusers, and exact where the answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stages.diffusion.model_config import ScheduleConfig
from stages.diffusion.predictions import convert, of_pair
from stages.diffusion.schedule import Schedule, facts_of
from stages.diffusion.solver import State, step, trajectory
from stages.errors import UserError

HINT = 'pip install "foretell[diffusion]"'
SHAPE = (2, 3, 4, 4)


def schedule_of(**settings) -> Schedule:
    return Schedule(facts_of(ScheduleConfig.model_validate(settings)))


def start(seed: int = 0) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """A denoiser of sorts: bounded, and another at every time and place."""
    mixed = torch.tanh(x + 0.3 * x.roll(1, -1) - 0.2 * x.flip(1))
    return mixed * (0.5 + t.float().reshape(-1, 1, 1, 1) / 1000) + 0.1


def end_of(states: list[State]) -> torch.Tensor:
    assert states[-1].prediction is None
    return states[-1].x


@pytest.mark.parametrize("beta_schedule", ["scaled_linear", "linear"])
@pytest.mark.parametrize(
    ("prediction", "zero"),
    [("epsilon", False), ("v_prediction", False), ("sample", False), ("v_prediction", True),
     ("sample", True)],
)  # fmt: skip
@pytest.mark.parametrize("steps", [1, 4, 25])
def test_a_trajectory_is_diffusers_ddim(require, beta_schedule, prediction, zero, steps):
    require("diffusers", HINT)
    from diffusers import DDIMScheduler

    schedule = schedule_of(
        beta_schedule=beta_schedule, prediction=prediction, zero_terminal_snr=zero
    )
    arguments = schedule.facts.scheduler.items()
    theirs = DDIMScheduler(**{name: value for name, value in arguments if name[0] != "_"})
    theirs.set_timesteps(steps)
    states = list(trajectory(model, start(), schedule.solver_times(steps), schedule))
    assert [state.step for state in states] == list(range(steps + 1))
    x = start()
    for state, t in zip(states, theirs.timesteps, strict=False):
        assert state.t == t
        largest = float(x.abs().max())  # epsilon begins by dividing by a small alpha
        torch.testing.assert_close(state.x, x, rtol=1e-4, atol=2e-5 * largest)
        prediction_there = model(state.x, torch.full((2,), float(t)))
        torch.testing.assert_close(state.prediction, prediction_there)
        # From the same state, so that chaos of many steps hides nothing.
        x = theirs.step(state.prediction, t, state.x).prev_sample
    torch.testing.assert_close(end_of(states), x, rtol=1e-4, atol=2e-5 * float(x.abs().max()))
    assert (states[-1].t, states[-1].alpha, states[-1].sigma) == (-1, 1, 0)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 4, 28])
def test_a_trajectory_of_flow_is_diffusers_euler(require, shift, steps):
    require("diffusers", HINT)
    from diffusers import FlowMatchEulerDiscreteScheduler

    schedule = schedule_of(kind="flow", prediction="flow", shift=shift)
    theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(steps)
    states = list(trajectory(model, start(), schedule.solver_times(steps), schedule))
    x = start()
    for t in theirs.timesteps:
        x = theirs.step(model(x, t.expand(2).double()), t, x).prev_sample
    torch.testing.assert_close(end_of(states), x, rtol=1e-4, atol=1e-4)
    assert (states[0].t, states[-1].t) == (1000, 0)


def test_a_flow_step_is_an_euler_step():
    x, velocity = start(1), start(2)
    got = step(x, velocity, "flow", 0.25, 0.75, 0.4, 0.6)
    torch.testing.assert_close(got, x + (0.6 - 0.75) * velocity)


@pytest.mark.parametrize(
    ("settings", "prediction"),
    [
        ({"beta_schedule": "scaled_linear"}, "epsilon"),
        ({"zero_terminal_snr": True}, "v_prediction"),
        ({"zero_terminal_snr": True}, "sample"),
        ({"kind": "flow", "prediction": "flow"}, "flow"),
        ({"kind": "flow", "prediction": "flow", "shift": 3.0}, "sample"),
        ({"kind": "flow", "prediction": "flow"}, "v_prediction"),
    ],
)
def test_with_true_predictions_every_state_lies_between_one_noise_and_one_image(
    settings, prediction
):
    facts = schedule_of(**settings).facts.model_copy(update={"prediction": prediction})
    schedule = Schedule(facts)
    x0, noise = start(3), start(4)
    times = schedule.solver_times(7)
    alpha, sigma = schedule.at(times)

    def perfect(x, t):
        place = [torch.from_numpy(each) for each in schedule.at(t.numpy())]
        return of_pair(x0, noise, *place, prediction)

    begin = float(alpha[0]) * x0 + float(sigma[0]) * noise
    for number, state in enumerate(trajectory(perfect, begin, times, schedule)):
        expected = alpha[number] * x0.double() + sigma[number] * noise.double()
        torch.testing.assert_close(state.x.double(), expected, rtol=1e-4, atol=1e-4)
        assert (state.alpha, state.sigma) == (alpha[number], sigma[number])


def test_a_step_takes_levels_of_each_row():
    x, value = start(5), start(6)
    here = torch.tensor([0.6, 0.8]), torch.tensor([0.8, 0.6])
    there = torch.tensor([0.8, 1.0]), torch.tensor([0.6, 0.0])
    both = step(x, value, "v_prediction", *here, *there)
    for row in range(2):
        numbers = [float(each[row]) for each in (*here, *there)]
        one = step(x[row : row + 1], value[row : row + 1], "v_prediction", *numbers)
        torch.testing.assert_close(both[row : row + 1], one)


def test_a_step_to_where_one_is_changes_nothing():
    x, value = start(7), start(8)
    for kind in ("epsilon", "v_prediction", "sample", "flow"):
        torch.testing.assert_close(step(x, value, kind, 0.6, 0.8, 0.6, 0.8), x)


def test_rounded_states_are_what_the_model_is_asked_at_and_predictions_replay_them():
    schedule, asked = schedule_of(beta_schedule="scaled_linear"), []

    def remembering(x, t):
        asked.append(x)
        return model(x, t).half()

    times = schedule.solver_times(6)
    states = list(trajectory(remembering, start(9), times, schedule, rounded=torch.float16))
    for state, x in zip(states, asked, strict=False):
        assert torch.equal(state.x, x)
    for state in states:
        assert state.x.dtype == torch.float32
        assert torch.equal(state.x, state.x.half().float())
    # A store holds start and predictions in float16: the same states follow without the model.
    stored = iter([state.prediction for state in states[:-1]])
    again = trajectory(lambda x, t: next(stored), start(9), times, schedule, torch.float16)
    for state, same in zip(states, again, strict=True):
        assert torch.equal(state.x, same.x)
    exact = list(trajectory(model, start(9), times, schedule))
    assert not torch.equal(end_of(states), end_of(exact))
    torch.testing.assert_close(end_of(states), end_of(exact), rtol=0.1, atol=0.1)


def test_rows_do_not_depend_on_their_neighbours():
    schedule = schedule_of()
    times = schedule.solver_times(5)
    together = end_of(list(trajectory(model, start(10), times, schedule)))
    for row in range(2):
        alone = end_of(list(trajectory(model, start(10)[row : row + 1], times, schedule)))
        torch.testing.assert_close(alone, together[row : row + 1])


def test_states_come_one_by_one_and_end_with_the_asking():
    schedule, asked = schedule_of(), []

    def counting(x, t):
        asked.append(float(t[0]))
        return model(x, t)

    states = trajectory(counting, start(), schedule.solver_times(10), schedule)
    next(states)
    next(states)
    assert asked == [999, 899]
    assert next(states).step == 2


def test_a_part_of_the_way_is_solved_by_its_times():
    # Two halves are the whole: what a student learns of an end, or of a start in the middle.
    schedule = schedule_of()
    times = schedule.solver_times(8)
    whole = list(trajectory(model, start(), times, schedule))
    second = list(trajectory(model, whole[4].x, times[4:], schedule))
    assert torch.equal(end_of(second), end_of(whole))


def test_a_model_of_noise_cannot_start_without_signal():
    facts = schedule_of(zero_terminal_snr=True).facts
    schedule = Schedule(facts.model_copy(update={"prediction": "epsilon"}))
    with pytest.raises(UserError, match=r"'epsilon' cannot start.*alpha 0 at time 999"):
        next(trajectory(model, start(), schedule.solver_times(4), schedule))
    # Without the last step it can.
    times = np.array([998.0, 500.0, -1.0])
    assert len(list(trajectory(model, start(), times, schedule))) == 3


def test_the_end_implies_no_noise_of_its_own():
    schedule = schedule_of()
    states = list(trajectory(model, start(), schedule.solver_times(3), schedule))
    before = states[-2]
    place = [torch.full((2,), each, dtype=torch.float64) for each in (before.alpha, before.sigma)]
    noise = convert(before.prediction, before.x, *place, "v_prediction", "epsilon")
    expected = (before.x - before.sigma * noise) / before.alpha
    torch.testing.assert_close(end_of(states), expected, rtol=1e-4, atol=1e-5)
