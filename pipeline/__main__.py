"""`python -m pipeline` is the command `foretell`."""

from pipeline.cli import main

main()
