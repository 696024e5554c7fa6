"""Numbers within a range, as settings have them."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Weight = Annotated[float, Field(gt=0.0)]


def _check_scale(scale: float | tuple[float, float]) -> float | tuple[float, float]:
    low, high = scale if isinstance(scale, tuple) else (scale, scale)
    if not 0 <= low <= high:
        raise ValueError(
            f"guidance_scale={scale} must be a number of at least 0, or (low, high) with "
            "0 <= low <= high; 1 is no guidance"
        )
    return scale


GuidanceScale = Annotated[float | tuple[float, float], AfterValidator(_check_scale)]
"""A scale at which parts are mixed, or (low, high) to draw it from."""
