"""Codes that a student draws for a teacher to score later, in another process (on-policy rounds).

A round of on-policy distillation (GKD, 2306.13649; DistillSpec; DistiLLM's replay) needs the
student's own codes and the teacher's predictions on them. The student draws here, alone in
memory; the teacher scores in `stages.rollout`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from tqdm import tqdm

from stages.config import RolloutConfig
from stages.errors import UserError
from stages.family import Family, Sample
from stages.interruption import StopRequest
from stages.publish import replace_file
from stages.refusals import part
from stages.rollout import GivenCodes, finite_steps, refuse_not_finite, split
from stages.rollout_plan import plan
from stages.sampling import RolloutPolicy
from store.rejected import Rejected, rejected_table

Key = tuple[str, int]

REJECTED = "rejected.parquet"
"""File of the samples that the student refused, beside its codes."""


@torch.inference_mode()
def draw_codes(
    student: Family,
    samples: Sequence[Sample],
    config: RolloutConfig,
    folder: Path,
    *,
    seed: int,
    task: int,
    tasks: int,
    stop: StopRequest,
) -> bool:
    """Draw the codes of every planned rollout with a student, without guidance.

    Writes one Parquet file per shard of the plan; files that are there are kept, and of the
    missing ones task I of N takes those with number ≡ I modulo N. Samples that the student refuses
    are left out, and listed in rejected.parquet. Returns False when `stop` was requested first.
    Raises `UserError` when another student, or the same one with other settings, drew what is
    there.
    """
    student.module.eval()
    by_id = {sample["sample_id"]: sample for sample in samples}
    accepted, rejected = part(student, samples[: config.samples], config)
    shards = plan(config, student, accepted, seed)
    origin = draw_settings(config, shards, seed) | {"student": student.fingerprint()}
    for shard in range(len(shards)):
        if _path(folder, shard).exists():
            _require_origin(folder, shard, origin)
    _write_table(folder / REJECTED, rejected_table(rejected))
    missing = [s for s in range(len(shards)) if not _path(folder, s).exists() and s % tasks == task]
    for shard in tqdm(missing, unit="shard", desc="draw", disable=None):
        draws: dict[Key, GivenCodes] = {}
        for keys in split(shards[shard], config.batch_size):
            if stop.requested:
                return False
            draws |= _draw_batch(student, config, keys, [by_id[key[0]] for key in keys], seed)
        refuse_not_finite([draw.stop_reason for draw in draws.values()], len(draws))
        _write(_path(folder, shard), draws, origin)
    return True


def draw_plan(
    config: RolloutConfig, family: Family, samples: Sequence[Sample], seed: int, refused: Rejected
) -> list[list[Key]]:
    """Return the keys of every shard that a student draws, which has refused some samples.

    `family` is the student or the teacher: both count timesteps alike.
    """
    left_out = {sample_id for sample_id, _ in refused}
    accepted = [s for s in samples[: config.samples] if s["sample_id"] not in left_out]
    return plan(config, family, accepted, seed)


def draw_settings(
    config: RolloutConfig, shards: Sequence[Sequence[Key]], seed: int
) -> dict[str, str]:
    """Return all that a student's codes depend on besides the student, by name, as text."""
    planned = json.dumps(shards)
    return {
        "seed": str(seed),
        "sampler": config.sampler.model_dump_json(),
        "precision": config.precision,
        "plan (dataset, split, samples, variations, rollouts_per_shard)": sha256(
            planned.encode()
        ).hexdigest(),
    }


def _require_origin(folder: Path, shard: int, origin: Mapping[str, str]) -> dict[str, str]:
    """Refuse codes that have another origin; return all that is known of theirs."""
    found = _origin(folder, shard)
    other = [name for name, value in origin.items() if found.get(name) != value]
    if other:
        raise UserError(
            f"{_path(folder, shard)} was drawn with another {', '.join(other)} than the section "
            "rollout calls for: restore what was changed, or give this round a run of its own "
            "(name)"
        )
    return found


def _draw_batch(
    student: Family, config: RolloutConfig, keys: Sequence[Key], batch: Sequence[Sample], seed: int
) -> dict[Key, GivenCodes]:
    references = [student.timesteps(sample) for sample in batch]
    policy = RolloutPolicy(
        config.sampler,
        keys,
        seed=seed,
        streams=student.streams,
        forbidden=student.forbidden,
        end_id=student.end_id,
        reference_timesteps=references,
        device=next(student.module.parameters()).device,
    )
    drawn: list[list[Tensor]] = [[] for _ in keys]
    for step in finite_steps(student.rollout(batch, policy, 1.0), policy, keys):
        for row, codes in zip(step.rows.tolist(), step.codes.cpu(), strict=True):
            drawn[row].append(codes)
    return {
        key: GivenCodes(
            torch.stack(drawn[row]),
            policy.stop_reason(row),
            policy.weight(row, len(drawn[row]), references[row]),
        )
        for row, key in enumerate(keys)
    }


def _path(folder: Path, shard: int) -> Path:
    return folder / f"{shard:05d}.parquet"


def _write(path: Path, draws: dict[Key, GivenCodes], origin: Mapping[str, str]) -> None:
    table = pa.table(
        {
            "sample_id": [sample_id for sample_id, _ in draws],
            "variation": [variation for _, variation in draws],
            "codes": [draw.codes.flatten().tolist() for draw in draws.values()],
            "streams": [draw.codes.shape[1] for draw in draws.values()],
            "stop_reason": [draw.stop_reason for draw in draws.values()],
            "weight": [draw.weight for draw in draws.values()],
        }
    ).replace_schema_metadata(dict(origin))
    _write_table(path, table)


def _write_table(path: Path, table: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    replace_file(path, sink.getvalue().to_pybytes())


def read_refused(folder: Path) -> Rejected:
    """Read which samples the student refused, and why; raises `UserError` when it has not drawn."""
    table = _read(folder / REJECTED)
    return list(zip(*(table[name].to_pylist() for name in table.column_names), strict=True))


def read_draws(
    folder: Path,
    wanted: Iterable[Key],
    shards: Sequence[Sequence[Key]],
    origin: Mapping[str, str],
) -> dict[Key, GivenCodes]:
    """Read what a student drew for the wanted keys; `shards` are those that it drew.

    Raises `UserError` when a shard has not been drawn, or has another origin.
    """
    draws: dict[Key, GivenCodes] = {}
    left = set(wanted)
    for shard, keys in enumerate(shards):
        if left.isdisjoint(keys):
            continue
        _require_origin(folder, shard, origin)
        for row in _read(_path(folder, shard)).to_pylist():
            key = row["sample_id"], row["variation"]
            if key in left:
                codes = torch.tensor(row["codes"], dtype=torch.int64).view(-1, row["streams"])
                draws[key] = GivenCodes(codes, row["stop_reason"], row["weight"])
    return draws


def draw_origin(folder: Path, settings: Mapping[str, str]) -> dict[str, str]:
    """Return `settings` with the fingerprint of the `student` that drew the codes in `folder`.

    Raises `UserError` when nothing was drawn, or with other settings.
    """
    return _require_origin(folder, 0, settings)


def _origin(folder: Path, shard: int) -> dict[str, str]:
    metadata: dict[bytes, bytes] = _read(_path(folder, shard)).schema.metadata or {}
    return {name.decode(): value.decode() for name, value in metadata.items()}


def _read(path: Path) -> pa.Table:
    try:
        return pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(
            f"what the student drew, {path}, cannot be read ({error}): a store of source "
            "'student' needs it; run `foretell rollout` without --task once, which draws it"
        ) from None
