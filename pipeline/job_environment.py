"""What the scripts of jobs tell the commands in them, through variables."""

from __future__ import annotations

import os
import signal

IN_JOB = "FORETELL_JOB"
"""Set in jobs whose script foretell wrote: only these put themselves back in line."""
EARLY_SIGNAL = "FORETELL_SIGNAL"
"""Names a signal that came before Python began: USR1 or TERM."""


def raise_early_signal() -> None:
    """Send this process the signal that came before it began; hold it back before."""
    name = os.environ.pop(EARLY_SIGNAL, None)
    if name in ("USR1", "TERM"):
        os.kill(os.getpid(), signal.Signals[f"SIG{name}"])
