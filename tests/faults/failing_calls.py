"""Run by test_failing_disk.py under `fiu-run -x`: `failing_calls.py STORE POINT ERRNO`.

For n = 0, 1, 2, …: lets the n-th call of libc at POINT (such as posix/io/sync/fsync) fail while
shard 0 is committed, and prints a JSON line, until the commit needs no n-th call. The failure is
libfiu's, below Python and everything else.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import sys
from itertools import count
from pathlib import Path

from store import PredictionStore, StoreError
from store.synthetic import write_synthetic_shard

CHECK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_int), ctypes.c_void_p, ctypes.c_uint
)


def main(path: Path, point: str, number: int) -> None:
    library = ctypes.CDLL("libfiu.so.0")
    library.fiu_enable_external.argtypes = (
        ctypes.c_char_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, CHECK
    )  # fmt: skip
    store = PredictionStore.open(path)
    for chosen in count():
        calls = count()
        check = CHECK(lambda *_, calls=calls, chosen=chosen: int(next(calls) == chosen))
        assert library.fiu_enable_external(point.encode(), 1, number, 0, check) == 0
        said, done = "", False
        try:
            done = write_synthetic_shard(store, 0, mean_timesteps=8)
        except StoreError as error:
            said = str(error)
        finally:
            library.fiu_disable(point.encode())
        failed = next(calls) > chosen
        committed, left = store.is_committed(0), len(os.listdir(path / "tmp"))
        answer = {"failed": failed, "done": done, "said": said, "committed": committed}
        print(json.dumps(answer | {"left": left}), flush=True)  # noqa: T201
        if committed:
            shutil.rmtree(path / "shards/00000")
        if not failed:
            return


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
