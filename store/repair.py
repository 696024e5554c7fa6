"""Taking damaged shards out of a store, so that they are planned again; nothing is deleted."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path

from store.durable import sync_folder
from store.errors import explain_os_errors
from store.garbage import tmp_of
from store.layout import shard_name
from store.object_url import ObjectUrl
from store.plain_file import lies_at
from store.reader import PredictionStore
from store.remote import RemoteLayout, layout_of
from store.schema import Record
from store.verify import Damage, Verification, damages_of


class Repaired(Record):
    """A damaged shard that was taken out of a store."""

    shard: int
    """Its number; it is planned and no longer committed."""
    folder: str
    """Where it lies now, below the store."""


def repairable(found: Verification) -> list[int]:
    """Shards that are damaged, rising; one that the system does not let us read may be sound."""
    return sorted(
        {damage.shard for damage in found.bad if damage.shard is not None and not damage.unreadable}
    )


def unrepairable(found: Verification) -> list[Damage]:
    """What `repair` cannot take out: files beside the shards, and what could not be read."""
    shards = set(repairable(found))
    return [damage for damage in found.bad if damage.shard not in shards]


def after_repair(found: Verification, repaired: Sequence[Repaired]) -> Verification:
    """What is true of a store once some of its damaged shards were taken out.

    `bad` still lists all that was found; `ok` says whether none of it is left.
    """
    gone = {shard.shard for shard in repaired}
    return found.model_copy(
        update={
            "ok": all(damage.shard in gone for damage in found.bad),
            "not_committed": tuple(sorted({*found.not_committed, *gone})),
        }
    )


def repair(path: str | Path | ObjectUrl, shards: Iterable[int]) -> list[Repaired]:
    """Move those of some shards that are damaged into tmp/, where `gc` lists them.

    Each is looked at again first, for another process may have taken it out, or made it again. A
    move is one rename and is durable when this returns. In object storage the commit is moved, and
    what it names becomes garbage. Raises StoreError.
    """
    store, layout = PredictionStore.open(path, cached_shards=1), layout_of(path)
    if isinstance(layout, RemoteLayout):
        return [
            Repaired(shard=shard, folder=layout.take_out(shard))
            for shard in shards
            if layout.is_committed(shard)
            and any(not damage.unreadable for damage in damages_of(store, shard))
        ]
    tmp = tmp_of(layout.root)
    moved = []
    with explain_os_errors(f"take damaged shards out of {layout.root}"):
        tmp.mkdir(exist_ok=True)
        for shard in shards:
            source = layout.shard(shard)
            if not lies_at(source) or not any(
                not damage.unreadable for damage in damages_of(store, shard)
            ):
                continue
            target = tmp / f"damaged-{shard_name(shard)}-{uuid.uuid4().hex}"
            try:
                os.rename(source, target)
            except FileNotFoundError:  # another repair was faster
                continue
            moved.append(Repaired(shard=shard, folder=f"{tmp.name}/{target.name}"))
        if moved:
            sync_folder(tmp)
            sync_folder(layout.shards)
    return moved
