"""Starts processes of a stage without paying for `import torch` each time; run by conftest.py.

Imports the worker once, then reads JSON requests, one a line: `{"arguments", "environment",
"stderr"}` forks a process that is `python -m pipeline.worker ARGUMENTS` and answers its pid;
`{"wait": pid}` answers its exit code, negative for a signal. This process runs no stage itself, so
no thread exists when it forks. `{"foretell": ARGUMENTS, "stdout"}` forks the command `foretell`
instead, `{"script": [FILE, ...], "stdout"}` a program in Python, and what these start are forks too
(forks.py). With `"observe": PATH` a process notes there which networks it built and what it read of
which weight files, and of diffusers' and transformers' models which it built of what. With
`"order": PATH` it appends there, for every global batch that it begins, the position, its rank and
the keys of its share. `"imports": [MODULE]` are imported once, before; with the argument `late` by
each process, for some open a CUDA device, which no fork can take along.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch._dynamo  # noqa: F401 - which the first optimizer of a process would import

from pipeline import worker
from stages.families import codec_lm_checkpoint, codec_lm_network
from stages.train import TargetLearner
from tests.forks import ended, foretell, redirect, script


def main() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        answer = {"code": wait(request["wait"])} if "wait" in request else {"pid": start(request)}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def wait(pid: int) -> int:
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def start(request: dict[str, Any]) -> int:
    if "late" not in sys.argv:
        load(request)
    pid = os.fork()
    if pid == 0:
        os._exit(work(request))
    return pid


def load(request: dict[str, Any]) -> None:
    for module in request.get("imports", ()):
        importlib.import_module(module)
    # No collection of garbage in a fork looks at what was imported, and so copies its memory.
    gc.collect()
    gc.freeze()


def work(request: dict[str, Any]) -> int:
    os.environ.update(request["environment"])
    redirect(2, request["stderr"])
    redirect(1, request.get("stdout", request["stderr"]))
    for program in (foretell, script):
        if program.__name__ in request:
            return program(request[program.__name__])
    load(request)  # with `late`; what these programs start imports by itself then
    seen = observed() if "observe" in request else None
    if "order" in request:
        note_order(Path(request["order"]))
    code = ended(lambda: worker.main(request["arguments"]))
    if seen is not None:
        Path(request["observe"]).write_text(json.dumps(seen), encoding="utf-8")
    return code


def observed() -> dict[str, Any]:
    """Note the networks that are built, and the tensors that are read from weight files."""
    seen: dict[str, Any] = {"networks": [], "files": defaultdict(list)}
    build = codec_lm_network.CodecLMNetwork.__init__

    def built(self: Any, config: Any, facts: Any) -> None:
        build(self, config, facts)
        device = str(next(self.parameters()).device)
        seen["networks"].append({"decoder_layers": config.decoder_layers, "device": device})

    codec_lm_network.CodecLMNetwork.__init__ = built  # type: ignore[method-assign]
    opened = codec_lm_checkpoint.safe_open

    class Opened:
        def __init__(self, path: Path, **options: Any) -> None:
            self._file, self._seen = opened(path, **options), seen["files"][str(path)]

        def __enter__(self) -> Opened:
            self._file.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self._file.__exit__(*error)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

        def get_tensor(self, name: str) -> Any:
            self._seen.append(name)
            return self._file.get_tensor(name)

    codec_lm_checkpoint.safe_open = Opened
    if "stages.families.diffusion" in sys.modules:
        seen["models"] = observed_models()
    return seen


def note_order(path: Path) -> None:
    """Let stage two tell what it learns from, and when."""
    read = TargetLearner.batches

    def batches(self: Any, position: int) -> Any:
        found = read(self, position)
        keys = [key for batch in found for key in batch.keys]
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([position, int(os.environ.get("RANK", "0")), keys]) + "\n")
        return found

    TargetLearner.batches = batches  # type: ignore[method-assign]


def observed_models() -> list[tuple[str, str | None]]:
    """Note the class of every model that gets weights, and where they come from, None if drawn."""
    diffusers, transformers = map(importlib.import_module, ("diffusers", "transformers"))
    empty = importlib.import_module("torch").empty
    seen: list[tuple[str, str | None]] = []
    inside = False

    def noted(owner: Any, name: str) -> None:
        method = getattr(owner, name).__func__

        def begun(cls: Any, source: Any, *rest: Any, **options: Any) -> Any:
            nonlocal inside
            drawn = name == "from_config"
            # One call leads to others, and a model on `meta` has no weights.
            if inside or (drawn and empty(0).is_meta):
                return method(cls, source, *rest, **options)
            seen.append((cls.__name__, None if drawn else str(source)))
            inside = True
            try:
                return method(cls, source, *rest, **options)
            finally:
                inside = False

        setattr(owner, name, classmethod(begun))

    mixin = diffusers.ModelMixin
    for owner in (mixin, transformers.PreTrainedModel):
        noted(owner, "from_pretrained")
    for name in ("from_config", "from_single_file"):
        for class_ in (diffusers.UNet2DConditionModel, diffusers.AutoencoderKL):
            noted(class_, name)
    return seen


if __name__ == "__main__":
    main()
