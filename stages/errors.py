"""The one error a user can cause and repair."""


class UserError(Exception):
    """A mistake in what was given to a stage: the message says what, where, and what to do.

    The command line prints the message without a traceback and exits with code 2.
    """
