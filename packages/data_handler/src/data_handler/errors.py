"""The one error type a user's mistake is raised as."""


class UserError(ValueError):
    """A mistake that the user can mend.

    The message is one sentence that names the offending thing and the remedy. Command lines print it to stderr and
    end with exit code 2; libraries let it propagate.
    """
