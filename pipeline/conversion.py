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


def profile_of(name: ProfileName, loss_nats: float | None) -> Profile:
    """Return a profile from the options of the command; raises `UserError`."""
    if name is ProfileName.FAST:
        if loss_nats is not None:
            raise UserError(
                f"--loss-nats {loss_nats} is for --profile compact: fast stores values as they are"
            )
        return Fast()
    try:
        return Compact() if loss_nats is None else Compact(loss_nats=loss_nats)
    except ValidationError as error:
        raise UserError(f"--loss-nats {loss_nats}: {error.errors()[0]['msg']}") from None


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
    if result.missing:
        lines.append(f"{result.missing} planned shards are not in the source: not converted")
    return "\n".join(lines)
