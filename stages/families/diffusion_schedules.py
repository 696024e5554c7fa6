"""Noise schedules of diffusers' schedulers, by what their configuration says."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pydantic import JsonValue

from stages.diffusion.facts import ScheduleFacts
from stages.diffusion.model_config import PredictionType
from stages.errors import UserError
from stages.families.diffusion_library import DDPMScheduler, reading

STEPPED = (
    "DDIMParallelScheduler", "DDIMScheduler", "DDPMParallelScheduler", "DDPMScheduler",
    "DEISMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler", "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler",
    "HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler",
    "LCMScheduler", "LMSDiscreteScheduler", "PNDMScheduler", "SASolverScheduler", "TCDScheduler",
    "UniPCMultistepScheduler",
)  # fmt: skip
"""Schedulers over one table of betas: they differ in how they solve, and noise alike."""
FLOWING = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
"""Schedulers of the straight line between data and noise."""
BETAS = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas",
    "rescale_betas_zero_snr",
)  # fmt: skip
"""What of a scheduler's configuration makes its table."""
PREDICTIONS: dict[str, PredictionType] = {
    "epsilon": "epsilon",
    "v_prediction": "v_prediction",
    "sample": "sample",
    "flow_prediction": "flow",
}


def schedule_of(
    scheduler: Mapping[str, Any], tokens: int, *, source: object = "its scheduler"
) -> ScheduleFacts:
    """Return the schedule of a scheduler_config.json.

    `tokens` is the length of the sequence that a transformer makes of a latent, which a flow's
    shift may depend on. Raises `UserError` for a scheduler that noises in another way; `source` is
    what errors call it.
    """
    name = scheduler.get("_class_name")
    if name in FLOWING or (name in STEPPED and scheduler.get("use_flow_sigmas")):
        return _flow(scheduler, tokens, source)
    if name not in STEPPED:
        raise UserError(
            f"{source} is a {name}, whose noise is neither that of betas nor a flow: save the "
            f"pipeline with one of {', '.join((*STEPPED, *FLOWING))}"
        )
    prediction = scheduler.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS or PREDICTIONS[prediction] == "flow":
        raise UserError(
            f"{source} has prediction_type={prediction!r}: a {name} with betas predicts epsilon, "
            "v_prediction or sample; correct scheduler_config.json"
        )
    with reading(source, "correct scheduler_config.json"):
        table = DDPMScheduler(**{key: scheduler[key] for key in BETAS if key in scheduler})
    return ScheduleFacts(
        kind="ddpm",
        prediction=PREDICTIONS[prediction],
        train_timesteps=table.config.num_train_timesteps,
        alphas_cumprod=tuple(table.alphas_cumprod.double().tolist()),
        scheduler=_finite(scheduler),
    )


def _flow(scheduler: Mapping[str, Any], tokens: int, source: object) -> ScheduleFacts:
    if scheduler.get("invert_sigmas"):
        raise UserError(
            f"{source} has invert_sigmas: its time runs from noise to data, and here 0 is clean; "
            "use a model whose time runs so"
        )
    shift = scheduler.get("shift", scheduler.get("flow_shift", 1.0))
    return ScheduleFacts(
        kind="flow",
        prediction="flow",
        train_timesteps=scheduler.get("num_train_timesteps", 1000),
        shift=_dynamic_shift(scheduler, tokens) if scheduler.get("use_dynamic_shifting") else shift,
        scheduler=_finite(scheduler),
    )


def _finite(scheduler: Mapping[str, Any]) -> dict[str, JsonValue]:
    """A configuration with its infinities as text: JSON has none, and DPM's bound is one."""
    return {
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in scheduler.items()
    }


def _dynamic_shift(scheduler: Mapping[str, Any], tokens: int) -> float:
    """The shift of an image's size. Source: `calculate_shift` and `time_shift` of diffusers."""
    short, long = scheduler.get("base_image_seq_len", 256), scheduler.get("max_image_seq_len", 4096)
    low, high = scheduler.get("base_shift", 0.5), scheduler.get("max_shift", 1.15)
    mu = low + (high - low) * (tokens - short) / (long - short)
    return mu if scheduler.get("time_shift_type") == "linear" else math.exp(mu)


def predicting(schedule: ScheduleFacts, prediction: PredictionType | None) -> ScheduleFacts:
    """Return a schedule whose model predicts something else; None leaves it as it is."""
    if prediction is None or prediction == schedule.prediction:
        return schedule
    if "flow" in (prediction, schedule.prediction):
        raise UserError(
            f"model.prediction={prediction!r} on a schedule of the kind {schedule.kind!r}: a flow "
            "predicts 'flow', and nothing else does; leave it out, or set model.schedule"
        )
    scheduler = schedule.scheduler and schedule.scheduler | {"prediction_type": prediction}
    return schedule.model_copy(update={"prediction": prediction, "scheduler": scheduler})
