"""What a user did wrong, apart from what we did."""


class UserError(ValueError):
    """A mistake of the user, in one line that says what to write instead.

    The command line prints the message alone. Any other exception, a ``ValueError`` too, is a defect of the code that
    raised it and keeps its traceback.
    """

    shared = False
    """Whether every process raises it in the same words, so that to print it once is enough."""
    shows_cause = False
    """Whether the traceback of what led to it is printed as well."""


class RewardError(UserError):
    """A reward raised an exception of its own, which is the cause."""

    shows_cause = True
