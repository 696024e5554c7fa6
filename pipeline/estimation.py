"""What `foretell rollout --estimate` does and says."""

from __future__ import annotations

import os

import torch

from pipeline.assembly import Assembly
from pipeline.config import Run
from pipeline.image_assembly import ImageAssembly
from pipeline.run_config import RunConfig, require_round
from pipeline.status import span
from stages.estimate import Estimate
from stages.interruption import StopRequest


def estimate_of(config: Run, round_name: str | None) -> Estimate:
    """Estimate stage one of a run, or a round of it; raises UserError where it has none."""
    require_round(config.name, config.rounds, round_name)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))  # as its processes have
    if isinstance(config, RunConfig):
        return Assembly(config, StopRequest()).estimate(round_name)
    return ImageAssembly(config, StopRequest()).estimate()


def estimate_text(found: Estimate) -> str:
    """Return an estimate, a line for each array."""
    width = max(map(len, (*found.bytes, "in all")))
    lines = [
        f"{found.rollouts:,} rollouts of {found.samples:,} samples in {found.shards:,} shards, "
        f"about {found.timesteps:,} timesteps; {found.rejected:,} samples are left out",
        *(f"  {name:<{width}}  {size:>20,} bytes" for name, size in found.bytes.items()),
        f"  {'in all':<{width}}  {found.bytes_in_all:>20,} bytes",
        f"{found.missing_shards:,} shards are missing: {found.missing_bytes:,} bytes",
    ]
    if found.timesteps_per_s is not None:
        lines.append(
            f"about {span(3600 * found.hours)} with rollout.processes: {found.processes}, of "
            f"{found.timesteps_per_s:,.1f} timesteps/s each, as {found.timed_rollouts} rollouts "
            "took that were not stored"
        )
    verdict = "it fits" if found.fits else "IT DOES NOT FIT"
    lines.append(
        f"{found.free_bytes:,} bytes are free, of which rollout.free_floor keeps "
        f"{found.free_floor:,}: {verdict}"
    )
    return "\n".join(lines)
