"""One process of a stage: `python -m pipeline.worker STAGE CONFIG`."""

from __future__ import annotations

import argparse
import ctypes
import logging
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from tqdm import tqdm

from pipeline.assembly import Assembly
from pipeline.cluster_config import ClusterConfig
from pipeline.config import load_config
from pipeline.image_assembly import ImageAssembly
from pipeline.launch import FAILED, FINISHED, MORE_TO_DO, USAGE_ERROR
from pipeline.printing import tell
from pipeline.record import own_usage
from pipeline.run_config import RunConfig
from stages.errors import PeerLost, UserError
from stages.interruption import StopRequest, stop_request
from stages.sharing import Share
from store import StoreError
from store.errors import SystemFailure

WHOLE = ("prepare", "evaluate")
"""Stages whose parts appear whole or not at all, so that they may be stopped anywhere."""


def main(arguments: Sequence[str] | None = None, asked: StopRequest | None = None) -> int:
    """Run one stage and return its exit code: 0 finished, 75 stopped with more to do, 2, 1.

    It stops when `asked` to; where nothing is given, at a signal.
    """
    options = _parse(arguments)
    _end_with_parent()
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[_TqdmHandler()])
    try:
        at_signals = stop_request(at_once=options.stage in WHOLE, last=True)
        with at_signals if asked is None else nullcontext(asked) as stop:
            # Inside, so that a signal that comes with an error does not keep it from being said.
            return _attempt(options, stop)
    except KeyboardInterrupt:
        return MORE_TO_DO


def _attempt(options: argparse.Namespace, stop: StopRequest) -> int:
    try:
        config = load_config(options.config, options.set)
        task, tasks = map(int, options.task.split("/"))
        assembly: Assembly | ImageAssembly
        cluster = config.cluster or ClusterConfig()
        share = Share(task, tasks, options.static, cluster.heartbeat_s)
        if isinstance(config, RunConfig):
            assembly = Assembly(config, stop, share)
        else:
            assembly = ImageAssembly(config, stop, share)
        code = FINISHED if assembly.run(options.stage) else MORE_TO_DO
        _note_usage(assembly.peak_device_bytes)
    except SystemFailure as error:
        tell(f"{options.stage}: {error}")
        return FAILED
    except (UserError, StoreError) as error:
        tell(f"{options.stage}: {error}")
        return USAGE_ERROR
    except (FloatingPointError, PeerLost) as error:
        tell(f"{options.stage}: {error}")
        return FAILED
    except OSError as error:
        tell(
            f"{options.stage}: {error}; what was finished before is safe: free space or correct "
            "the cause, then run the same command again"
        )
        return FAILED
    return code


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m pipeline.worker", description=__doc__)
    parser.add_argument("stage", help="prepare, fit, rollout[:NAME], train:NAME, ...")
    parser.add_argument("config", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    place = f"{os.environ.get('RANK', '0')}/{os.environ.get('WORLD_SIZE', '1')}"
    parser.add_argument("--task", default=place, metavar="I/N", help="share of the work")
    parser.add_argument("--static", action="store_true", help="write no shard but the own ones")
    return parser.parse_args(arguments)


def _note_usage(peak_device_bytes: int) -> None:
    """Tell the launching process what this one needed."""
    path = os.environ.get("FORETELL_USAGE")
    if path is not None:
        Path(path).write_text(own_usage(peak_device_bytes).model_dump_json(), encoding="utf-8")


def _end_with_parent() -> None:
    """Ask Linux for SIGTERM when the launching process dies, so that none is left behind."""
    parent = os.environ.get("FORETELL_PARENT")
    if parent is None or not sys.platform.startswith("linux"):
        return
    set_death_signal = 1
    ctypes.CDLL(None).prctl(set_death_signal, signal.SIGTERM)
    if os.getppid() != int(parent):
        os.kill(os.getpid(), signal.SIGTERM)


class _TqdmHandler(logging.Handler):
    """Writes log messages above the progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
