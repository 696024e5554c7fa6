"""`python -m pipeline ARGUMENTS`, whose exit code is noted in the folder $EXITS under its rank.

torchrun does not tell how each of its processes ended.
"""

from __future__ import annotations

import os
import runpy
from pathlib import Path

if __name__ == "__main__":
    try:
        runpy.run_module("pipeline", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        Path(os.environ["EXITS"], os.environ["RANK"]).write_text(str(end.code), encoding="utf-8")
        raise
