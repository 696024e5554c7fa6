"""`python -m pipeline` is the command `foretell`."""

import os

from pipeline.job_environment import IN_JOB, raise_early_signal
from stages.interruption import hold_back

if IN_JOB in os.environ or {"RANK", "WORLD_SIZE"} <= os.environ.keys():
    hold_back()  # a signal waits until the command listens, however long imports take
    raise_early_signal()

from pipeline.entry import main

main()
