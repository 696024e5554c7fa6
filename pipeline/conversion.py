"""What `foretell convert` is asked for, and what it says."""

from __future__ import annotations

from enum import StrEnum

from pydantic import ValidationError

from stages.errors import UserError
from store.convert import Conversion
from store.schema import Compact, Fast, Profile


class ProfileName(StrEnum):
    """The profiles that a store may have."""

    FAST = "fast"
    COMPACT = "compact"


def profile_of(name: ProfileName, loss_nats: float | None, hidden_step: float | None) -> Profile:
    """Return a profile from the options of the command; raises `UserError`."""
    settings = {"loss_nats": loss_nats, "hidden_step": hidden_step}
    given = {setting: value for setting, value in settings.items() if value is not None}
    if name is ProfileName.FAST:
        for setting, value in given.items():
            raise UserError(
                f"{_option(setting)} {value} is for --profile compact: fast stores values as they "
                "are; leave it out"
            )
        return Fast()
    try:
        return Compact(**given)
    except ValidationError as error:
        fault = error.errors()[0]
        setting = str(fault["loc"][0])
        message = fault["msg"].removeprefix("Value error, ")
        raise UserError(f"{_option(setting)} {given[setting]}: {message}") from None


def _option(setting: str) -> str:
    return f"--{setting.replace('_', '-')}"


def conversion_text(result: Conversion) -> str:
    """Return what a conversion did and cost, a line for each array that is not exact."""
    share = result.bytes_after / max(result.bytes_before, 1)
    lines = [
        f"{result.shards} shards compared ({result.written} written now), {result.rollouts:,} "
        f"rollouts, {result.timesteps:,} timesteps",
        f"{result.bytes_before:,} bytes before, {result.bytes_after:,} after ({share:.0%})",
    ]
    for name, loss in result.losses.items():
        if not loss.exact:
            cost = "rounded within the profile's bound"
            if loss.mean_kl is not None:
                cost = f"KL {loss.mean_kl:.2g} nats on average, {loss.max_kl:.2g} at most"
            lines.append(f"{name}: {cost}")
    lines.append("all other arrays are exact")
    lines += _stated(result)
    if result.missing:
        lines.append(f"{result.missing} planned shards are not in the source: not converted")
    return "\n".join(lines)


def _stated(result: Conversion) -> list[str]:
    """What the values may have lost since the first store: this conversion alone may seem free."""
    by = f"by the profiles of the {len(result.lineage) + 1} stores from the first on,"
    stated = []
    if result.stated_nats:
        stated.append(f"{by} a row of logits may have lost {result.stated_nats:.3g} nats of KL")
    if result.stated_rms:
        stated.append(f"{by} a state may be off by {result.stated_rms:.2%} of its size")
    return stated
