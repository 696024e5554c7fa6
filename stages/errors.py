"""The errors a user can cause and repair."""


class UserError(Exception):
    """A mistake in what was given to a stage: the message says what, where, and what to do.

    The command line prints the message without a traceback and exits with code 2.
    """


class PeerLost(Exception):
    """Another process of the stage has ended, so that this one cannot go on; says who it was."""


class Refused(UserError):
    """What is wrong with one sample, and need not be with another: a stage may leave it out.

    Any other `UserError` is a mistake that leaving samples out does not repair.
    """

    def __init__(self, sample_id: str, kind: str, found: str) -> None:
        self.reason = f"{kind}: {found}"
        """Kind, colon, and what was found; names no path, so that all machines say the same."""
        super().__init__(f"sample {sample_id!r}: {self.reason}")
