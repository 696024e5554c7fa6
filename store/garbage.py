"""What interrupted work and repairs left in tmp/: listing it, and deleting what was listed."""

from __future__ import annotations

import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import chain
from pathlib import Path

from store import remote
from store.errors import StoreError, explain_os_errors
from store.layout import Layout
from store.object_url import ObjectUrl
from store.plain_file import lies_at
from store.remote import RemoteLayout, layout_of
from store.schema import Manifest, Record
from store.sealed import unseal

HERE = "this machine: "
"""Begins the names of what was made here to be sent to object storage."""


class Leftover(Record):
    """One entry of tmp/: work of a writer that ended or still works, or a damaged shard."""

    name: str
    """Below tmp/; of a store in object storage below its URL, or `this machine: NAME`."""
    files: int
    """Files in it."""
    bytes: int
    """Bytes of these files."""
    age_s: float
    """Seconds since anything in it was last written."""


class Kept(Record):
    """One entry of tmp/ that could not be deleted."""

    name: str
    """Below tmp/."""
    reason: str
    """What kept it, and what to do."""


def find_garbage(path: str | Path | ObjectUrl) -> list[Leftover]:
    """List what lies in tmp/ of a store, by name.

    In object storage it is what no commit names, and on this machine what was made to be sent;
    what is younger than a day is left out, as a job may still write it.
    Raises StoreError when there is no store at `path`, or tmp/ is a link, which may lead anywhere.
    """
    layout = layout_of(path)
    if isinstance(layout, RemoteLayout):
        return _find_remote(layout.opened())
    return _below(tmp_of(layout.root))


def _below(tmp: Path) -> list[Leftover]:
    with explain_os_errors(f"list {tmp}"):
        names = sorted(os.listdir(tmp)) if lies_at(tmp) else []
        return [_measured(tmp, name) for name in names]


def _find_remote(layout: RemoteLayout) -> list[Leftover]:
    """What no commit names, and what was made on this machine to be sent, if it is old enough."""
    objects = [
        Leftover(name=name, files=len(orphan.keys), bytes=orphan.bytes, age_s=orphan.age_s)
        for name, orphan in sorted(layout.orphans().items())
    ]
    here = [
        entry.model_copy(update={"name": f"{HERE}{entry.name}"}) for entry in _below(layout.tmp)
    ]
    return [entry for entry in [*objects, *here] if entry.age_s >= remote.GRACE_S]


def _delete_remote(layout: RemoteLayout, name: str) -> None:
    if name.startswith(HERE):
        _delete(layout.tmp / name.removeprefix(HERE))
    else:
        layout.delete_orphan(name)


def delete_garbage(path: str | Path | ObjectUrl, found: Sequence[Leftover]) -> list[Kept]:
    """Delete what was found in tmp/, and return what could not be deleted.

    Nothing else is touched: no link is followed, and what came into tmp/ since stays. Entries that
    are gone by now are not missed. Raises StoreError as `find_garbage` does.
    """
    layout = layout_of(path)
    delete: Callable[[str], None]
    if isinstance(layout, RemoteLayout):
        delete = partial(_delete_remote, layout.opened())
    else:
        tmp = tmp_of(layout.root)
        delete = lambda name: _delete(tmp / name)  # noqa: E731 - one of two
    kept = []
    for leftover in found:
        try:
            with explain_os_errors(f"delete {leftover.name} of {layout}"):
                delete(leftover.name)
        except StoreError as error:
            kept.append(Kept(name=leftover.name, reason=str(error)))
    return kept


def tmp_of(path: str | Path) -> Path:
    """Path of tmp/ of a store, whether or not it is there.

    Raises StoreError when there is no store at `path`, or tmp/ is a link.
    """
    layout = Layout.at(path)
    unseal(layout.manifest, Manifest)  # a folder named tmp/ that is not a store's is not ours
    if layout.tmp.is_symlink():
        raise StoreError(f"{layout.tmp} is a link and may lead to anything: replace it by a folder")
    return layout.tmp


def _measured(tmp: Path, name: str) -> Leftover:
    files = size = 0
    written_s = 0.0
    for found in _stats_below(tmp / name):
        written_s = max(written_s, found.st_mtime)
        if not stat.S_ISDIR(found.st_mode):
            files, size = files + 1, size + found.st_size
    age_s = max(time.time() - written_s, 0.0)
    return Leftover(name=name, files=files, bytes=size, age_s=age_s)


def _stats_below(root: Path) -> Iterator[os.stat_result]:
    """What lies at a path and below; what vanishes meanwhile is left out, no link is followed."""
    below = (Path(folder, name) for folder, *names in os.walk(root) for name in chain(*names))
    for path in chain([root], below):
        with suppress(FileNotFoundError):
            yield os.lstat(path)


def _delete(path: Path) -> None:
    try:
        if stat.S_ISDIR(os.lstat(path).st_mode):
            shutil.rmtree(path)
        else:
            path.unlink()
    except FileNotFoundError:
        if lies_at(path):  # a file in it was gone, not all of it
            raise
