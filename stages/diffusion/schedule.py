"""Noise schedules: what a time means, which times are drawn, and which a solver visits.

A time is float64 on the scale that a model is told. Of `ddpm` it is a step of the table, 0 to
train_timesteps − 1, and −1 is the clean image, which has no step. Of `flow` it runs from 0, the
clean image, to train_timesteps, pure noise.
"""

from __future__ import annotations

import hashlib
from statistics import NormalDist

import numpy as np
import torch
from pydantic import JsonValue
from torch import Tensor

from stages.diffusion.facts import ScheduleFacts
from stages.diffusion.model_config import ScheduleConfig, TimestepsConfig
from stages.errors import UserError
from stages.sampling import keyed_generator

CLEAN = -1.0
"""Time of the clean image of a `ddpm` schedule."""
GRID = 2.0**-20
"""Times are multiples of this, so that sigma gives them back exactly (`Schedule.place`)."""
BETAS = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012)}
"""First and last beta: of Ho et al. (2006.11239), and of Stable Diffusion."""
LARGEST_COSINE_BETA = 0.999


def facts_of(config: ScheduleConfig) -> ScheduleFacts:
    """Return the schedule of a model that is trained here.

    Its `scheduler` is the configuration of the scheduler of diffusers' that samples from it.
    """
    if config.kind == "ddpm":
        return ddpm_facts(config)
    return ScheduleFacts(
        kind="flow",
        prediction=config.prediction,
        train_timesteps=config.train_timesteps,
        shift=config.shift,
        scheduler={
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": config.train_timesteps,
            "shift": config.shift,
        },
    )


def ddpm_facts(config: ScheduleConfig) -> ScheduleFacts:
    """Return the schedule of a model of kind `ddpm` that is trained here; see `facts_of`.

    The table is computed in float32 like that of diffusers' schedulers, and equal bit for bit.
    Sources: `linear` Ho et al. (2006.11239), `scaled_linear` Rombach et al. (2112.10752),
    `squaredcos_cap_v2` Nichol & Dhariwal (2102.09672); without signal at the end Lin et al.
    (2305.08891).
    """
    steps = config.train_timesteps
    betas = _betas(config.beta_schedule, steps)
    if config.zero_terminal_snr:
        betas = _without_signal_at_the_end(betas)
    first, last = BETAS.get(config.beta_schedule, BETAS["linear"])
    scheduler: dict[str, JsonValue] = {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": steps,
        "beta_schedule": config.beta_schedule,
        "beta_start": first,
        "beta_end": last,
        "rescale_betas_zero_snr": config.zero_terminal_snr,
        "prediction_type": config.prediction,
        "timestep_spacing": "trailing",
        "clip_sample": False,
        "set_alpha_to_one": True,
        "steps_offset": 0,
    }
    return ScheduleFacts(
        kind="ddpm",
        prediction=config.prediction,
        train_timesteps=steps,
        alphas_cumprod=tuple((1.0 - betas).cumprod(0).tolist()),
        scheduler=scheduler,
    )


def _betas(name: str, steps: int) -> Tensor:
    match name:
        case "linear":
            return torch.linspace(*BETAS[name], steps)
        case "scaled_linear":
            first, last = BETAS[name]
            return torch.linspace(first**0.5, last**0.5, steps) ** 2
    share = np.arange(steps + 1) / steps
    left = np.cos((share + 0.008) / 1.008 * np.pi / 2) ** 2
    return torch.tensor(np.minimum(1 - left[1:] / left[:-1], LARGEST_COSINE_BETA)).float()


def _without_signal_at_the_end(betas: Tensor) -> Tensor:
    """Betas whose last alpha is 0 and whose first is unchanged, the alphas between scaled."""
    alpha = (1.0 - betas).cumprod(0).sqrt()
    first, last = alpha[0].clone(), alpha[-1].clone()
    alpha = (alpha - last) * (first / (first - last))
    squared = alpha**2
    return 1 - torch.cat([squared[:1], squared[1:] / squared[:-1]])


class Schedule:
    """A noise schedule: x_t = alpha·x0 + sigma·noise, with alpha and sigma of a time."""

    def __init__(self, facts: ScheduleFacts) -> None:
        """Raises `UserError` for a table that is none."""
        self.facts = facts
        if facts.kind == "ddpm":
            squared = np.array([1.0, *facts.alphas_cumprod])  # the clean image before step 0
            steps = facts.train_timesteps
            if len(squared) != steps + 1 or squared[-1] < 0 or (np.diff(squared) >= 0).any():
                raise UserError(
                    f"the noise schedule has a table of {len(squared) - 1} values of alpha² for "
                    f"{steps} training steps; it must have one per step, falling from below 1 to "
                    "no less than 0: mend the scheduler's configuration"
                )
            self._alpha, self._sigma = np.sqrt(squared), np.sqrt(1.0 - squared)
            self._angle = np.arctan2(self._sigma, self._alpha)

    def at(self, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return alpha and sigma [...] float64 of times [...].

        Between two steps of a `ddpm` schedule the angle of (alpha, sigma) is interpolated, which
        unlike the logarithm of their ratio is finite at both ends. Raises ValueError for a time
        off the schedule.
        """
        t = np.asarray(t, np.float64)
        steps = self.facts.train_timesteps
        least, largest = (0.0, steps) if self.facts.kind == "flow" else (CLEAN, steps - 1)
        if not ((t >= least) & (t <= largest)).all():
            raise ValueError(f"times {t} must lie in [{least}, {largest}]")
        if self.facts.kind == "flow":
            sigma = t / steps
            return 1.0 - sigma, sigma
        place = t - CLEAN
        below = np.floor(place).astype(np.int64)
        above = np.minimum(below + 1, steps)
        rest = place - below
        angle = self._angle[below] + rest * (self._angle[above] - self._angle[below])
        alpha = np.where(rest == 0, self._alpha[below], np.cos(angle))
        sigma = np.where(rest == 0, self._sigma[below], np.sin(angle))
        return alpha, sigma

    def draw(self, config: TimestepsConfig, slots: int, *key: object) -> np.ndarray:
        """Draw times [slots] float64, one from each of as many strata, rising, that a key names.

        The share of the schedule is low + (high − low)·s, where s has the distribution asked for
        and slot j the j-th part of its probability (`logit_normal`: Esser et al. 2403.03206). Of
        `ddpm` the times are steps; where the model predicts epsilon, none without signal, because
        there the noise is its input. Of `flow` the share is shifted towards noise, and never 0.
        """
        words = keyed_generator("time", *key).bit_generator.random_raw(slots)
        inside = ((words >> np.uint64(32)).astype(np.float64) + 0.5) * 2.0**-32  # never 0 or 1
        share: np.ndarray = (np.arange(slots) + inside) / slots
        if config.distribution == "logit_normal":
            logits = NormalDist(config.mean, config.std)
            share = 0.5 * (1 + np.tanh([0.5 * logits.inv_cdf(each) for each in share]))
        share = config.low + (config.high - config.low) * share
        steps = self.facts.train_timesteps
        if self.facts.kind == "flow":
            return _on_grid(steps * self._shifted(share)).clip(min=GRID)
        last = steps - 1
        if self.facts.prediction == "epsilon" and self._alpha[-1] == 0:
            last -= 1
        return np.floor(steps * share).clip(max=last)

    def solver_times(self, steps: int) -> np.ndarray:
        """Return the times [steps + 1] float64 that a solver visits, falling to the clean image.

        Of `ddpm` those of diffusers' `timestep_spacing="trailing"`, which begins at the last step
        (Lin et al. 2305.08891, table 2). Of `flow` those of FlowMatchEulerDiscreteScheduler: from 1
        to the least noise of its own steps, shifted; where it shifts by the size of the image, from
        1 to 1/steps, as the pipelines that have one ask it to. Raises `UserError` for more solver
        steps than training steps.
        """
        known = self.facts.train_timesteps
        if steps > known:
            raise UserError(
                f"{steps} solver steps for a model of {known} training steps: ask for fewer"
            )
        if self.facts.kind == "ddpm":
            places = np.arange(known, 0, -known / steps)[:steps]  # rounding may lead to one more
            return np.append(np.round(places) - 1, CLEAN)
        dynamic = bool(self.facts.scheduler.get("use_dynamic_shifting"))
        least = 1 / steps if dynamic else self._shifted(np.array(1 / known))
        sigmas = self._shifted(np.linspace(1.0, least, steps))
        return np.append(_on_grid(known * sigmas), 0.0)

    def place(
        self, alpha: np.ndarray, sigma: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return (scale, alpha', sigma', t'), [b] float64 each, of rows of another schedule.

        scale·x_t = alpha'·x0 + sigma'·noise is what this schedule has at t', with the same
        signal-to-noise ratio. Noise, x0 and noise − x0 stay as they are; a v_prediction is
        multiplied by scale. A row of this schedule keeps its numbers and its time exactly. Noise
        between the clean image and step 0 of `ddpm` has a time between −1 and 0, and more noise
        than its last step has the time of that.
        """
        alpha, sigma = np.asarray(alpha, np.float64), np.asarray(sigma, np.float64)
        if self.facts.kind == "flow":
            scale = 1 / (alpha + sigma)
            t = _on_grid(self.facts.train_timesteps * (scale * sigma))
        else:
            scale = 1 / np.hypot(alpha, sigma)
            places = np.arange(len(self._angle))
            t = _on_grid(np.interp(np.arctan2(sigma, alpha), self._angle, places)) + CLEAN
        own_alpha, own_sigma = self.at(t)
        scale = np.where((own_alpha == alpha) & (own_sigma == sigma), 1.0, scale)
        return scale, scale * alpha, scale * sigma, t

    def digest(self) -> str:
        """Sha256 over all that `at` depends on, hexadecimal: the same digest, the same times."""
        held = self.facts.model_copy(update={"prediction": "sample", "shift": 1.0, "scheduler": {}})
        return hashlib.sha256(held.model_dump_json().encode()).hexdigest()

    def _shifted(self, share: np.ndarray) -> np.ndarray:
        shift = self.facts.shift
        shifted: np.ndarray = shift * share / (1 + (shift - 1) * share)
        return shifted


def _on_grid(t: np.ndarray) -> np.ndarray:
    return np.round(t / GRID) * GRID
