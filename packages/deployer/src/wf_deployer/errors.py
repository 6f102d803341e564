"""The one error type a user's mistake is raised as."""


class UserError(ValueError):
    """A mistake that the user can mend.

    The message is one sentence that names the offending thing and the remedy; `main` prints it to stderr and returns 2.
    """
