"""Errors of the user, as opposed to bugs."""


class UserError(ValueError):
    """A mistake of the user, with a one-line message that says how to correct it.

    The command line prints only the message. Any other exception, including ``ValueError``, is a bug of the code that
    raised it and keeps its traceback.
    """

    shared = False
    """Whether every process raises it with the same message, so that printing it once is enough."""
    shows_cause = False
    """Whether the traceback of its cause is printed too."""


class RewardError(UserError):
    """A reward raised an exception, which is the cause of this one."""

    shows_cause = True
