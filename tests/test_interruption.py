"""What becomes of signals around the block in which they are a request to stop."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.entry import ending_at_once
from stages.interruption import STOP_SIGNALS

ROOT = Path(__file__).parent.parent
SCRIPT = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from stages.interruption import hold_back, stop_request

number, last, when = int(sys.argv[1]), sys.argv[2] == "last", sys.argv[3]
if when == "before":
    hold_back()
    os.kill(os.getpid(), number)
with stop_request(last=last) as stop:
    if when == "within":
        os.kill(os.getpid(), number)
    print(sorted(stop.signals))
if when == "after":
    os.kill(os.getpid(), number)
print("ended")
"""


def said_by(number: int, last: str, when: str) -> subprocess.CompletedProcess[str]:
    """Run the script, whose signals do what they do to a command that a person types.

    Where a shell started the tests in the background, they ignore SIGINT, and children would too.
    """
    command = [sys.executable, "-c", SCRIPT, str(int(number)), last, when]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_after_the_last_block_does_not_look_like_a_failure(number):
    done = said_by(number, "last", "after")
    assert (done.returncode, done.stdout) == (0, "[]\nended\n")


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_after_any_other_block_a_signal_does_what_it_did_before(number):
    done = said_by(number, "another", "after")
    assert done.returncode in (-number, 1 if number == signal.SIGINT else -number)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("when", ["before", "within"])
@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_in_the_block_or_held_back_before_it_is_a_request(number, when):
    done = said_by(number, "last", when)
    assert (done.returncode, done.stdout) == (0, f"[{int(number)}]\nended\n")


IMPORTS = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)

class CtrlC:
    def find_spec(self, name, *rest):
        if name == sys.argv[-1]:
            os.kill(os.getpid(), signal.SIGINT)

from pipeline.entry import main
sys.meta_path.insert(0, CtrlC())
sys.argv = ["foretell", "inspect", *sys.argv[1:]]
main()
"""


@pytest.mark.parametrize("package", ["typer", "pyarrow", "pandas"])
def test_ctrl_c_during_an_import_ends_a_command_at_once_and_silently(package):
    """pyarrow imports pandas at its first use, and would go on without it."""
    store = ROOT / "tests" / "golden" / "fast" / "top_k"
    command = [sys.executable, "-c", IMPORTS, store, "--key", package]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_after_the_imports_ctrl_c_is_what_it_was():
    for heard in (signal.default_int_handler, signal.SIG_IGN):
        before = signal.signal(signal.SIGINT, heard)
        try:
            with ending_at_once():
                within = signal.getsignal(signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) is heard
            assert within == (signal.SIG_IGN if heard is signal.SIG_IGN else signal.SIG_DFL)
        finally:
            signal.signal(signal.SIGINT, before)
